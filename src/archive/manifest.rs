//! `manifest.json`: the description of the box in an archive.

use crate::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// The newest version of the manifest that is read and written (boxlite-home: "Readers accept up to
/// 5").
const NEWEST: u64 = 5;
/// The first version with options and with a mandatory checksum.
const FIRST_WITH_OPTIONS: u64 = 3;
/// Largest manifest that is read, in bytes.
const LARGEST: usize = 1 << 20;
/// How a checksum begins.
const SHA256: &str = "sha256:";

/// The description of the box in an export.
#[derive(Clone, Debug)]
pub struct About {
    /// The box's name; None for a box without one.
    pub box_name: Option<String>,
    /// Reference of the image it was made from.
    pub image: String,
    /// The options, in the shape of `box_config.json`.
    pub options: Value,
    /// When the disk changed last. All times in the archive are this one, so two exports of one
    /// state are the same bytes.
    pub changed_at: SystemTime,
}

/// A manifest that was read and checked.
#[derive(Clone, PartialEq, Debug)]
pub struct Manifest {
    /// 1 to 5.
    pub version: u64,
    /// The box's name, where it had one.
    pub box_name: Option<String>,
    /// Reference of the image it was made from.
    pub image: String,
    /// The options, an object; version 3 and later.
    pub options: Option<Value>,
    /// sha256 of `disk.qcow2`; None where version 1 leaves it unchecked.
    pub disk_digest: Option<[u8; 32]>,
    /// When it was exported, as written (RFC 3339).
    pub exported_at: Option<String>,
}

/// Returns the manifest as JSON. Its length does not depend on the digest (sha256 of `disk.qcow2`).
/// The version is the lowest that can express the options: 5 with ports, 4 with capabilities, else
/// 3.
pub fn manifest_bytes(about: &About, digest: &[u8; 32]) -> Vec<u8> {
    let manifest = json!({
        "version": version_for(&about.options),
        "box_name": about.box_name,
        "image": about.image,
        "box_options": about.options,
        "guest_disk_checksum": "",
        "container_disk_checksum": format!("{SHA256}{}", hex(digest)),
        "exported_at": rfc3339(about.changed_at),
    });
    format!("{manifest:#}\n").into_bytes()
}

/// Returns the lowest version whose readers understand `options`.
fn version_for(options: &Value) -> u64 {
    let ports = &options["ports"];
    let none = ports.is_null() || ports.as_array().is_some_and(Vec::is_empty);
    if !none {
        5
    } else if !options["advanced"]["capabilities"].is_null() {
        4
    } else {
        FIRST_WITH_OPTIONS
    }
}

impl Manifest {
    /// Parses and checks `manifest.json`. EBADMSG for anything that is not a manifest of version 1
    /// to 5: over 1 MiB, not a JSON object, an object with a key twice, a field that is missing or
    /// has another type, a malformed checksum (mandatory from version 2 on).
    pub fn parse(bytes: &[u8]) -> Result<Manifest> {
        if bytes.len() > LARGEST {
            return Err(refused("is larger than 1 MiB"));
        }
        let value = parse_unambiguous(bytes).map_err(|e| {
            let what = if e.is_data() {
                "is ambiguous"
            } else {
                "is not JSON"
            };
            refused(what).caused_by(e)
        })?;
        let fields = value
            .as_object()
            .ok_or_else(|| refused("is not a JSON object"))?;
        let version = fields
            .get("version")
            .and_then(Value::as_u64)
            .ok_or_else(|| refused("has no version number"))?;
        if !(1..=NEWEST).contains(&version) {
            return Err(refused(&format!(
                "has version {version}; versions 1 to {NEWEST} are known"
            )));
        }
        // BoxLite makes the guest's own disk anew, so its checksum is unused, but it must be there.
        required_text(fields, "guest_disk_checksum")?;
        Ok(Manifest {
            version,
            box_name: text(fields, "box_name")?,
            image: required_text(fields, "image")?,
            options: options(fields, version)?,
            disk_digest: disk_digest(fields, version)?,
            exported_at: text(fields, "exported_at")?,
        })
    }
}

/// Parses JSON in which no object has a key twice.
///
/// # Errors
/// Those of the parser; a key that occurs twice is an error of the data.
pub fn parse_unambiguous(bytes: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(bytes).map(|Unique(value)| value)
}

/// JSON in which no object has a key twice. Readers differ in which of the two counts: one could be
/// checked here, and the other used later.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Unique, D::Error> {
        from.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = fields.next_key::<String>()? {
            let Unique(value) = fields.next_value()?;
            if object.contains_key(&name) {
                let short: String = name.chars().take(100).collect();
                return Err(A::Error::custom(format_args!(
                    "{short:?} occurs twice in it"
                )));
            }
            object.insert(name, value);
        }
        Ok(object.into())
    }
}

/// EBADMSG that says what is wrong with the manifest.
fn refused(what: &str) -> Error {
    Error::bad_archive(format!("the archive's manifest.json {what}"))
}

/// A string field that may be null or missing.
fn text(fields: &Map<String, Value>, name: &str) -> Result<Option<String>> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(refused(&format!("has a {name} that is not a string"))),
    }
}

/// A string field that must be there.
fn required_text(fields: &Map<String, Value>, name: &str) -> Result<String> {
    text(fields, name)?.ok_or_else(|| refused(&format!("has no {name}")))
}

/// Returns the options, if the version has them.
fn options(fields: &Map<String, Value>, version: u64) -> Result<Option<Value>> {
    match fields.get("box_options") {
        _ if version < FIRST_WITH_OPTIONS => Ok(None),
        None | Some(Value::Null) => Ok(None),
        Some(options @ Value::Object(_)) => Ok(Some(options.clone())),
        Some(_) => Err(refused("has box_options that are not an object")),
    }
}

/// Returns the checksum of the disk. Version 1 may leave it out or empty; then nothing is checked.
fn disk_digest(fields: &Map<String, Value>, version: u64) -> Result<Option<[u8; 32]>> {
    let checksum = match text(fields, "container_disk_checksum")? {
        Some(checksum) => checksum,
        None if version == 1 => return Ok(None),
        None => return Err(refused("has no container_disk_checksum")),
    };
    if checksum.is_empty() && version == 1 {
        return Ok(None);
    }
    let digest = checksum.strip_prefix(SHA256).and_then(unhex);
    match digest {
        Some(digest) => Ok(Some(digest)),
        None => Err(refused(
            "has a container_disk_checksum that is not sha256: and 64 hex digits",
        )),
    }
}

/// 64 lower-case hex digits.
fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The 32 bytes that 64 hex digits mean.
fn unhex(digits: &str) -> Option<[u8; 32]> {
    let digits = digits.as_bytes();
    let mut digest = [0u8; 32];
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        let mut value = 0;
        for &digit in pair {
            value = value * 16 + (digit as char).to_digit(16)?;
        }
        *byte = u8::try_from(value).ok()?;
    }
    Some(digest)
}

/// Returns whole seconds since 1970, within the years 1970 to 9999 that RFC 3339 and tar can
/// express.
pub(super) fn unix_seconds(time: SystemTime) -> u64 {
    const END_OF_9999: u64 = 253_402_300_799;
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs().min(END_OF_9999))
}

/// `2026-01-31T23:59:59Z`.
fn rfc3339(time: SystemTime) -> String {
    let seconds = unix_seconds(time);
    let (year, month, day) = civil_date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Returns the Gregorian date `days` after 1970-01-01, as (year, month, day). Years begin in March,
/// so that the leap day is the last of its year; 146 097 days make 400 years.
fn civil_date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests;
