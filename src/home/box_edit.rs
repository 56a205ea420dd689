//! Edits of `box.json`: which options of a box may be changed, and what its row keeps.
//!
//! An edit is compared with what is shown, value by value. What equals it stays as the row has it:
//! hidden secrets keep their values, and fields that are not known here survive. So only what a
//! person has changed is checked.

use serde_json::{Map, Value, json};

use super::host_access::reject_edited_access;
use super::option_types::{OptionNature, check_edited_options, nature_of, unknown_option};
use super::options::{HIDDEN, normalize_imported, redact_secrets};
use super::records::BoxRecord;
use crate::{Error, Result};

/// Options that are what they are because the disk is: a change would have no effect.
const OF_DISK: [&str; 2] = ["rootfs", "disk_size_gb"];
/// BoxLite computes this limit from the size of the disk at each start.
const FILE_SIZE_LIMIT: [&str; 4] = ["advanced", "security", "resource_limits", "max_file_size"];

/// An accepted edit of a box's options.
#[derive(Clone, Debug)]
pub struct OptionEdit {
    /// All options of the box, edited.
    pub options: Value,
    /// The places of the options that were changed; empty if none was.
    pub changed: Vec<String>,
    /// The changed options alone, each in its place.
    delta: Value,
}

impl BoxRecord {
    /// Returns what people are shown of the box: its configuration, with its state under `state`
    /// and without the values of secrets.
    ///
    /// # Errors
    /// EIO when a row is not JSON.
    pub fn shown(&self) -> Result<Value> {
        let mut value = self.config()?;
        if !self.state.is_empty() {
            value["state"] = self.state()?;
        }
        if !value["state"]["status"].is_string() {
            value["state"]["status"] = Value::String(self.status.clone());
        }
        redact_secrets(&mut value);
        Ok(value)
    }

    /// Returns the options of the box after what is [shown](BoxRecord::shown) of it was edited.
    /// `untrusted` says that the box may not be given access to the host.
    ///
    /// # Errors
    /// EINVAL naming a field that can't be changed, or that BoxLite could not read; EPERM for one
    /// that gives access to the host; EIO when a row is not JSON.
    pub fn edited(&self, written: &Value, untrusted: bool) -> Result<OptionEdit> {
        let shown = self.shown()?;
        refuse_other_fields(&shown, written)?;
        let config = self.config()?;
        let edit = edit_options(&config["options"], &written["options"])?;
        if edit.has_changed("options.network") && !self.outbound_policy().is_null() {
            return Err(invalid(
                "options.network can't be changed: state.outbound_policy, which was set while the \
                 box ran, counts instead; set that with BoxLite",
            ));
        }
        if untrusted {
            reject_edited_access(&edit.delta)?;
        }
        Ok(edit)
    }
}

/// Returns the options of a new box that is made of a disk with these options, and of the box.json
/// that came with it, where that was edited. `options` are those of an archive of this `version`,
/// or of the box that is cloned (None), not normalized yet. What the description says of anything
/// but options describes the box that it was copied from.
///
/// # Errors
/// Those of [`BoxRecord::edited`].
pub fn described_options(
    options: &Value,
    version: Option<u64>,
    description: &Value,
    untrusted: bool,
) -> Result<OptionEdit> {
    if !description["options"].is_object() {
        return Err(invalid("options of box.json is not an object"));
    }
    let mut base = normalize_imported(options.clone(), version);
    for field in ["auto_remove", "auto_delete"] {
        if let Some(value) = options.get(field) {
            base[field] = value.clone();
        }
    }
    let mut written = description["options"].clone();
    let mut unedited = options.clone();
    redact_secrets(&mut unedited);
    let mut take = |field: &str| match base.get(field) {
        Some(value) => written[field] = value.clone(),
        None => remove(&mut written, field),
    };
    // An export has the policy in place of the option.
    if !description["state"]["outbound_policy"].is_null() {
        take("network");
    }
    // Ports of an old archive, whose meaning has changed since.
    if description["options"]["ports"] == unedited["ports"] {
        take("ports");
    }
    // BoxLite may have set it anew between the copies of the two files.
    keep_at(&base, &mut written, &FILE_SIZE_LIMIT);
    let mut edit = edit_options(&base, &written)?;
    if untrusted {
        reject_edited_access(&edit.delta)?;
    }
    edit.options = normalize_imported(edit.options, None);
    Ok(edit)
}

fn remove(object: &mut Value, field: &str) {
    if let Some(fields) = object.as_object_mut() {
        fields.remove(field);
    }
}

/// Gives `to` the value that `from` has at a place, if both have one.
fn keep_at(from: &Value, to: &mut Value, place: &[&str]) {
    let kept = place.iter().try_fold(from, |value, field| value.get(field));
    let at = place
        .iter()
        .try_fold(to, |value, field| value.get_mut(*field));
    if let (Some(kept), Some(at)) = (kept, at) {
        *at = kept.clone();
    }
}

/// Refuses an edit of anything but options. `space` is computed when it is read, so it is never
/// compared.
fn refuse_other_fields(shown: &Value, written: &Value) -> Result<()> {
    let (Some(ours), Some(theirs)) = (shown.as_object(), written.as_object()) else {
        return Err(invalid("box.json is not a JSON object"));
    };
    let is_compared = |field: &&String| !matches!(field.as_str(), "options" | "space");
    let mut fields = ours.keys().chain(theirs.keys()).filter(is_compared);
    let Some(field) = fields.find(|field| ours.get(*field) != theirs.get(*field)) else {
        return Ok(());
    };
    Err(match field.as_str() {
        "name" => invalid("name can't be changed here; rename the box with mv"),
        "id" => invalid(
            "id can't be changed: it is the identity of the box. If this is the box.json of \
             another box, copy only its options",
        ),
        "state" => {
            let field = first_difference(&shown["state"], &written["state"]);
            invalid(format!(
                "state{field} can't be changed, because only BoxLite sets it; if you did not change \
                 it, the box has run since box.json was read: read it again"
            ))
        }
        "created_at" | "container" | "engine_kind" | "box_home" => invalid(format!(
            "{field} can't be changed, because only BoxLite sets it; what can be changed is under \
             options"
        )),
        field => invalid(format!(
            "{} can't be changed: it is not known here; what can be changed is under options",
            quoted(field)
        )),
    })
}

fn first_difference(ours: &Value, theirs: &Value) -> String {
    let (Some(ours), Some(theirs)) = (ours.as_object(), theirs.as_object()) else {
        return String::new();
    };
    let mut fields = ours.keys().chain(theirs.keys());
    let field = fields.find(|field| ours.get(*field) != theirs.get(*field));
    field.map_or_else(String::new, |field| format!(".{}", short(field)))
}

/// Returns `options` with what was changed in `written`, which was made of what is shown of them.
fn edit_options(options: &Value, written: &Value) -> Result<OptionEdit> {
    let mut shown = options.clone();
    redact_secrets(&mut shown);
    let mut merge = Merge::default();
    let mut place = Vec::new();
    let edited = merge.objects([options, &shown, written], &mut place)?;
    let known = unknown_option(options).is_some();
    if let Some(unknown) = unknown_option(&merge.delta).filter(|_| !known) {
        return Err(invalid(format!(
            "{} is not known here",
            in_options(&unknown)
        )));
    }
    check_edited_options(&merge.delta)?;
    if is_removed_on_stop(&edited) && !is_removed_on_stop(options) {
        return Err(invalid(
            "options.auto_remove can't be turned on for a stopped box, nor options.auto_delete: \
             BoxLite would delete the box at its next start; delete it with rm -r",
        ));
    }
    Ok(OptionEdit {
        options: edited,
        changed: merge.changed,
        delta: merge.delta,
    })
}

/// Returns whether BoxLite deletes a stopped box with these options when it starts.
fn is_removed_on_stop(options: &Value) -> bool {
    match options["auto_delete"].as_u64() {
        Some(seconds) => seconds > 0,
        None => options["auto_remove"] == json!(true),
    }
}

impl OptionEdit {
    fn has_changed(&self, place: &str) -> bool {
        self.changed.iter().any(|changed| changed == place)
    }
}

/// Puts a value at a place below an object.
fn put(object: &mut Value, names: &[&str], value: Value) {
    match names {
        [] => {}
        [name] => object[*name] = value,
        [name, rest @ ..] => {
            if !object[*name].is_object() {
                object[*name] = json!({});
            }
            put(&mut object[*name], rest, value);
        }
    }
}

/// What was changed so far.
struct Merge {
    changed: Vec<String>,
    /// The changed options alone, each in its place.
    delta: Value,
}

impl Default for Merge {
    fn default() -> Merge {
        Merge {
            changed: Vec::new(),
            delta: json!({}),
        }
    }
}

impl Merge {
    /// Merges objects whose fields are options of their own: as stored, as shown, as written.
    fn objects(
        &mut self,
        [stored, shown, written]: [&Value; 3],
        place: &mut Vec<String>,
    ) -> Result<Value> {
        let (Some(stored), Some(shown)) = (stored.as_object(), shown.as_object()) else {
            return Err(invalid("the box has no options that can be edited"));
        };
        let Some(written) = written.as_object() else {
            return Err(invalid(format!("{} is not an object", path(place))));
        };
        let mut merged = Map::new();
        for (field, value) in written {
            place.push(field.clone());
            let stored = stored.get(field);
            let edited = match (stored, shown.get(field)) {
                (Some(stored), Some(shown)) if shown == value => stored.clone(),
                (Some(stored), Some(shown)) => self.changed(stored, shown, value, place)?,
                _ => self.set(&Value::Null, value, place)?,
            };
            place.pop();
            merged.insert(field.clone(), edited);
        }
        for field in stored.keys().filter(|field| !written.contains_key(*field)) {
            place.push(field.clone());
            self.note(place)?;
            place.pop();
        }
        Ok(Value::Object(merged))
    }

    fn changed(
        &mut self,
        stored: &Value,
        shown: &Value,
        written: &Value,
        place: &mut Vec<String>,
    ) -> Result<Value> {
        let is_group = nature_of(place) == OptionNature::Group;
        if is_group && stored.is_object() && written.is_object() {
            return self.objects([stored, shown, written], place);
        }
        self.set(stored, written, place)
    }

    fn set(&mut self, stored: &Value, written: &Value, place: &[String]) -> Result<Value> {
        self.note(place)?;
        let value = match place {
            [field] if field == "secrets" => with_hidden_values(stored, written)?,
            _ => written.clone(),
        };
        let names: Vec<&str> = place.iter().map(String::as_str).collect();
        put(&mut self.delta, &names, value.clone());
        Ok(value)
    }

    /// Notes a changed option.
    ///
    /// # Errors
    /// EINVAL for one that can't be changed.
    fn note(&mut self, place: &[String]) -> Result<()> {
        let path = path(place);
        if nature_of(place) == OptionNature::Unknown {
            return Err(invalid(format!(
                "{path} is not known here, so it can't be checked; change it with BoxLite"
            )));
        }
        if place.len() == 1 && OF_DISK.contains(&place[0].as_str()) {
            return Err(invalid(format!(
                "{path} can't be changed: the box has a disk that was made by it"
            )));
        }
        if place == FILE_SIZE_LIMIT {
            return Err(invalid(format!(
                "{path} can't be changed: BoxLite computes it from the size of the disk"
            )));
        }
        self.changed.push(path);
        Ok(())
    }
}

/// Returns secrets as they were written, with the stored value of each that is hidden. Secrets are
/// told apart by their names.
fn with_hidden_values(stored: &Value, written: &Value) -> Result<Value> {
    let mut secrets = written.clone();
    let mut left: Vec<&Value> = stored.as_array().into_iter().flatten().collect();
    for (index, secret) in secrets.as_array_mut().into_iter().flatten().enumerate() {
        let position = left
            .iter()
            .position(|stored| stored.is_object() && stored["name"] == secret["name"]);
        let stored = position.map(|position| left.remove(position));
        if *secret != json!(HIDDEN) && secret.get("value") != Some(&json!(HIDDEN)) {
            continue;
        }
        match stored.and_then(|stored| stored.get("value")) {
            Some(value) if secret.is_object() => secret["value"] = value.clone(),
            _ => {
                return Err(invalid(format!(
                    "options.secrets[{index}] is {HIDDEN}, and the box has no secret of that name \
                     whose value could stay; write its value"
                )));
            }
        }
    }
    Ok(secrets)
}

fn path(place: &[String]) -> String {
    let names = place.iter().map(|name| format!(".{}", short(name)));
    std::iter::once("options".to_owned()).chain(names).collect()
}

/// Returns the place of an option in box.json for one in a manifest.
fn in_options(place: &str) -> String {
    place.replacen("box_options", "options", 1)
}

/// Returns a field's name as messages have it: of a length that can be read.
fn short(name: &str) -> String {
    name.chars().take(100).collect()
}

fn quoted(name: &str) -> String {
    format!("{:?}", short(name))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(libc::EINVAL, message)
}

#[cfg(test)]
mod tests;
