//! The types of BoxLite's box options: whether BoxLite is able to read them.
//!
//! BoxLite reads every row when it lists boxes, and one that it can't parse breaks the whole home.
//! So options from an archive are checked against the types of BoxLite's own struct
//! (runtime/options.rs and advanced_options.rs) before they get into a row. Every field has a
//! default there and unknown fields are ignored, so absent and unknown fields pass.

use serde_json::Value;

use crate::{Error, Result};

/// The type a known field must have, as serde reads it.
enum OptionType {
    Bool,
    /// An unsigned integer of at most this value.
    Unsigned(u64),
    Text,
    List(&'static OptionType),
    /// Null or the type.
    Optional(&'static OptionType),
    /// An object whose listed fields, where present, have these types.
    Object(&'static [(&'static str, OptionType)]),
    /// An object with these fields, all of them present.
    Complete(&'static [(&'static str, OptionType)]),
    /// A two-element array of strings.
    Pair,
    /// An enum: a bare word, or an object with the one variant as its key.
    OneOf(
        &'static [&'static str],
        &'static [(&'static str, OptionType)],
    ),
    /// All of these at once.
    All(&'static [&'static OptionType]),
    /// A list that must be empty, because its elements differ between versions of BoxLite.
    EmptyList,
    /// Null, for the same reason.
    Nothing,
}

use OptionType::*;

const U8: OptionType = Unsigned(u8::MAX as u64);
const U16: OptionType = Unsigned(u16::MAX as u64);
const U32: OptionType = Unsigned(u32::MAX as u64);
const U64: OptionType = Unsigned(u64::MAX);
const TEXTS: OptionType = List(&Text);

const NETWORK: OptionType = OneOf(
    &["Disabled"],
    &[("Enabled", Object(&[("allow_net", TEXTS)]))],
);

const OPTIONS: OptionType = Object(&[
    ("cpus", Optional(&U8)),
    ("memory_mib", Optional(&U32)),
    ("disk_size_gb", Optional(&U64)),
    ("working_dir", Optional(&Text)),
    ("env", List(&Pair)),
    (
        "rootfs",
        OneOf(&[], &[("Image", Text), ("RootfsPath", Text)]),
    ),
    (
        "volumes",
        List(&All(&[
            &Object(&[("managed_volume", Optional(&Text)), ("host_path", Text)]),
            &Complete(&[("guest_path", Text), ("read_only", Bool)]),
        ])),
    ),
    ("mounts", EmptyList),
    ("network", NETWORK),
    ("inbound_network", NETWORK),
    (
        "ports",
        List(&All(&[
            &Object(&[
                ("host_port", Optional(&U16)),
                ("protocol", OneOf(&["tcp", "udp", "Tcp", "Udp"], &[])),
                ("host_ip", Optional(&Text)),
            ]),
            &Complete(&[("guest_port", U16)]),
        ])),
    ),
    ("auto_remove", Bool),
    ("auto_stop", Optional(&U32)),
    ("auto_delete", Optional(&U32)),
    ("auto_resume", Optional(&Bool)),
    ("detach", Bool),
    ("entrypoint", Optional(&TEXTS)),
    ("cmd", Optional(&TEXTS)),
    ("user", Optional(&Text)),
    ("tty", Bool),
    (
        "secrets",
        List(&Complete(&[
            ("name", Text),
            ("hosts", TEXTS),
            ("placeholder", Text),
            ("value", Text),
        ])),
    ),
    (
        "advanced",
        Object(&[
            (
                "security",
                Object(&[
                    ("jailer_enabled", Bool),
                    ("seccomp_enabled", Bool),
                    ("uid", Optional(&U32)),
                    ("gid", Optional(&U32)),
                    ("new_pid_ns", Bool),
                    ("new_net_ns", Bool),
                    ("chroot_base", Text),
                    ("chroot_enabled", Bool),
                    ("close_fds", Bool),
                    ("sanitize_env", Bool),
                    ("env_allowlist", TEXTS),
                    (
                        "resource_limits",
                        Object(&[
                            ("max_open_files", Optional(&U64)),
                            ("max_file_size", Optional(&U64)),
                            ("max_processes", Optional(&U64)),
                            ("max_memory", Optional(&U64)),
                            ("max_cpu_time", Optional(&U64)),
                        ]),
                    ),
                    ("sandbox_profile", Optional(&Text)),
                    ("network_enabled", Bool),
                ]),
            ),
            (
                "capabilities",
                Optional(&Object(&[("add", TEXTS), ("drop", TEXTS)])),
            ),
            ("isolate_mounts", Bool),
            (
                "health_check",
                Optional(&Object(&[
                    ("interval", DURATION),
                    ("timeout", DURATION),
                    ("retries", U32),
                    ("start_period", DURATION),
                ])),
            ),
            ("kernel", Nothing),
            ("nested_virtualization", Bool),
            (
                "network_rate_limit",
                Object(&[("tx_kbps", Optional(&U64)), ("rx_kbps", Optional(&U64))]),
            ),
            ("privileged", Bool),
        ]),
    ),
]);

/// std::time::Duration as serde writes it.
const DURATION: OptionType = Complete(&[("secs", U64), ("nanos", Unsigned(999_999_999))]);

/// Checks that BoxLite can read these options.
///
/// # Errors
/// EBADMSG naming the field and the expected type.
pub fn check_options(options: &Value) -> Result<()> {
    let mut at = String::from("box_options");
    OPTIONS.check(options, &mut at)
}

/// Checks that BoxLite can read options that were edited in `box.json`.
///
/// # Errors
/// EINVAL naming the field and the expected type.
pub(super) fn check_edited_options(options: &Value) -> Result<()> {
    let checked = OPTIONS.check(options, &mut String::from("options"));
    checked.map_err(|error| Error::new(libc::EINVAL, error.to_string()))
}

/// What an option is, by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OptionNature {
    /// It is not known.
    Unknown,
    /// It is an object whose fields are options of their own.
    Group,
    /// It has one value.
    Single,
}

/// Returns what the option at a place below the options is.
pub(super) fn nature_of(place: &[String]) -> OptionNature {
    let mut names = place.iter();
    match names.try_fold(&OPTIONS, |of, name| of.field(name)) {
        None => OptionNature::Unknown,
        Some(Object(_)) => OptionNature::Group,
        Some(_) => OptionNature::Single,
    }
}

/// Returns the place of the first option that BoxLite is not known to have.
pub fn unknown_option(options: &Value) -> Option<String> {
    OPTIONS.unknown(options, &mut String::from("box_options"))
}

impl OptionType {
    /// Returns the type of a field of an object; None if it is not known.
    fn field(&self, name: &str) -> Option<&OptionType> {
        match self {
            Object(fields) | Complete(fields) => {
                let mut fields = fields.iter();
                fields.find(|(known, _)| *known == name).map(|(_, it)| it)
            }
            OneOf(_, variants) => {
                let mut variants = variants.iter();
                variants.find(|(known, _)| *known == name).map(|(_, it)| it)
            }
            All(types) => types.iter().find_map(|one| one.field(name)),
            Optional(inner) => inner.field(name),
            _ => None,
        }
    }

    /// Returns the place of the first unknown field in a value of this type.
    fn unknown(&self, value: &Value, at: &mut String) -> Option<String> {
        match value {
            Value::Object(fields) => {
                fields
                    .iter()
                    .find_map(|(name, value)| match self.field(name) {
                        Some(field) => {
                            below(at, &format!(".{name}"), |at| field.unknown(value, at))
                        }
                        None => Some(format!("{at}.{}", shown(name))),
                    })
            }
            Value::Array(items) => match self.item() {
                Some(inner) => items.iter().enumerate().find_map(|(index, item)| {
                    below(at, &format!("[{index}]"), |at| inner.unknown(item, at))
                }),
                None => None,
            },
            _ => None,
        }
    }

    fn item(&self) -> Option<&OptionType> {
        match self {
            List(inner) => Some(inner),
            Optional(inner) => inner.item(),
            _ => None,
        }
    }

    fn check(&self, value: &Value, at: &mut String) -> Result<()> {
        match self {
            Bool if value.is_boolean() => Ok(()),
            Text if value.is_string() => Ok(()),
            Unsigned(most) if value.as_u64().is_some_and(|number| number <= *most) => Ok(()),
            EmptyList if value.as_array().is_some_and(Vec::is_empty) => Ok(()),
            Nothing if value.is_null() => Ok(()),
            All(types) => types.iter().try_for_each(|one| one.check(value, at)),
            Optional(_) if value.is_null() => Ok(()),
            Optional(inner) => inner.check(value, at),
            List(inner) => check_list(value, inner, at),
            Pair if is_pair(value) => Ok(()),
            Object(fields) => check_fields(value, fields, false, at),
            Complete(fields) => check_fields(value, fields, true, at),
            OneOf(words, variants) => check_variant(value, words, variants, at),
            EmptyList | Nothing => Err(Error::bad_archive(format!(
                "{at} is set, and versions of BoxLite differ in its fields; set it with BoxLite itself"
            ))),
            other => Err(mismatch(at, &other.name())),
        }
    }

    fn name(&self) -> String {
        match self {
            Bool => "true or false".into(),
            Text => "a string".into(),
            Unsigned(most) => format!("a whole number from 0 to {most}"),
            Pair => "a pair of strings".into(),
            List(_) => "a list".into(),
            Optional(inner) => format!("null or {}", inner.name()),
            Object(_) | Complete(_) | All(_) => "an object".into(),
            EmptyList => "an empty list".into(),
            Nothing => "null".into(),
            OneOf(words, variants) => one_of(words, variants),
        }
    }
}

fn one_of(words: &[&str], variants: &[(&str, OptionType)]) -> String {
    let names: Vec<&str> = words
        .iter()
        .copied()
        .chain(variants.iter().map(|(name, _)| *name))
        .collect();
    format!("one of {}", names.join(", "))
}

fn mismatch(at: &str, expected: &str) -> Error {
    Error::bad_archive(format!("{at} is not {expected}, BoxLite could not read it"))
}

fn is_pair(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|pair| pair.len() == 2 && pair.iter().all(Value::is_string))
}

fn check_list(value: &Value, inner: &OptionType, at: &mut String) -> Result<()> {
    let items = value.as_array().ok_or_else(|| mismatch(at, "a list"))?;
    for (index, item) in items.iter().enumerate() {
        below(at, &format!("[{index}]"), |at| inner.check(item, at))?;
    }
    Ok(())
}

fn check_fields(
    value: &Value,
    fields: &[(&str, OptionType)],
    complete: bool,
    at: &mut String,
) -> Result<()> {
    let object = value.as_object().ok_or_else(|| mismatch(at, "an object"))?;
    for (name, field) in fields {
        match object.get(*name) {
            Some(value) => below(at, &format!(".{name}"), |at| field.check(value, at))?,
            None if complete => return Err(mismatch(at, &format!("complete, it lacks {name}"))),
            None => {}
        }
    }
    Ok(())
}

fn check_variant(
    value: &Value,
    words: &[&str],
    variants: &[(&str, OptionType)],
    at: &mut String,
) -> Result<()> {
    if value.as_str().is_some_and(|word| words.contains(&word)) {
        return Ok(());
    }
    if let Some(object) = value.as_object()
        && object.len() == 1
    {
        for (name, inner) in variants {
            if let Some(value) = object.get(*name) {
                return below(at, &format!(".{name}"), |at| inner.check(value, at));
            }
        }
    }
    Err(mismatch(at, &one_of(words, variants)))
}

/// Quotes and cuts a name from an archive, for a message.
fn shown(name: &str) -> String {
    let short: String = name.chars().take(100).collect();
    format!("{short:?}")
}

fn below<T>(at: &mut String, step: &str, check: impl FnOnce(&mut String) -> T) -> T {
    let length = at.len();
    at.push_str(step);
    let result = check(at);
    at.truncate(length);
    result
}

#[cfg(test)]
mod tests;
