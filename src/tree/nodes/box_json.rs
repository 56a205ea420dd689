//! `box.json` and `snapshot.json`: what BoxLite keeps, as people read it.

use serde_json::Value;

use crate::archive::parse_unambiguous;
use crate::home::{BoxRecord, SnapshotRecord};
use crate::store::Usage;
use crate::tree::nodes::names::{BOX_JSON, SNAPSHOT_JSON};
use crate::{Error, Result};

/// Returns the configuration, with the state under `state` and what the box takes on the disk under
/// `space`. It is pretty-printed, and secret values are hidden. Its length does not depend on
/// `usage`, so that it is known without looking for that.
///
/// # Errors
/// EIO when a row is not JSON.
pub fn box_json(record: &BoxRecord, usage: Usage) -> Result<Vec<u8>> {
    with_usage(record.shown()?, usage)
}

/// Returns the row of a snapshot with what it takes on the disk, and with the time that it is shown
/// with: a backup keeps the order of snapshots that were made in one second.
///
/// # Errors
/// EIO when the row is not JSON.
pub fn snapshot_json(snapshot: &SnapshotRecord, usage: Usage) -> Result<Vec<u8>> {
    let mut value = snapshot.value()?;
    value["created_at"] = snapshot.shown_at.into();
    with_usage(value, usage)
}

/// Digits of the largest number of bytes.
const WIDTH: usize = 20;

/// Adds bytes as numbers that are as wide as any, with spaces before them, which JSON allows.
fn with_usage(mut value: Value, usage: Usage) -> Result<Vec<u8>> {
    value["space"] = serde_json::json!({"own_bytes": 0, "shared_bytes": 0});
    let text = String::from_utf8(pretty(&value)?)
        .map_err(|e| Error::damaged("cannot write JSON").caused_by(e))?;
    // It is the last object; all text of users comes before it.
    let (before, space) = text.rsplit_once("\"space\": {").unwrap_or((&text, ""));
    let space = space
        .replacen(": 0", &format!(": {:>WIDTH$}", usage.own), 1)
        .replacen(": 0", &format!(": {:>WIDTH$}", usage.shared), 1);
    Ok(format!("{before}\"space\": {{{space}").into_bytes())
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::damaged("cannot write JSON").caused_by(e))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Returns `created_at` (seconds since 1970) of a snapshot.json that was copied out.
pub fn created_at(json: &[u8]) -> Option<i64> {
    serde_json::from_slice::<Value>(json).ok()?["created_at"].as_i64()
}

/// Returns the fields of a snapshot.json that are kept nowhere.
pub fn unkept_fields(json: &[u8]) -> Vec<String> {
    const KNOWN: [&str; 8] = [
        "id",
        "box_id",
        "name",
        "created_at",
        "base_path",
        "container_disk_bytes",
        "size_bytes",
        "space",
    ];
    let value = serde_json::from_slice::<Value>(json).unwrap_or_default();
    let fields = value
        .as_object()
        .into_iter()
        .flat_map(|fields| fields.keys());
    let unkept = fields.filter(|field| !KNOWN.contains(&field.as_str()));
    unkept
        .map(|field| field.chars().take(100).collect())
        .collect()
}

/// Refuses a box.json, or a snapshot.json, as soon as the text so far can't be one of ours. A
/// complete one has the fields that every version of us has written.
///
/// # Errors
/// EINVAL.
pub fn refuse_foreign(is_snapshot: bool, text: &[u8]) -> Result<()> {
    let text = text.trim_ascii();
    let (Some(first), Some(last)) = (text.first(), text.last()) else {
        return Ok(());
    };
    if *first != b'{' {
        return Err(foreign(is_snapshot));
    }
    // Only what ends with a brace can be complete.
    if *last != b'}' {
        return Ok(());
    }
    let value: Value = match serde_json::from_slice(text) {
        Ok(value) => value,
        Err(error) if error.is_eof() => return Ok(()),
        Err(_) => return Err(foreign(is_snapshot)),
    };
    let has_text = |field: &str| value[field].is_string();
    let is_ours = if is_snapshot {
        has_text("id") && has_text("box_id") && value["created_at"].is_i64()
    } else {
        has_text("id") && value["options"].is_object()
    };
    if !is_ours {
        return Err(foreign(is_snapshot));
    }
    if is_snapshot || has_disk(&value) {
        return Ok(());
    }
    Err(Error::new(
        libc::EINVAL,
        "box.json is of a box that never started: there is no disk in its backup to make a box of; \
         create the box with BoxLite",
    ))
}

/// Parses a box.json that is being written. None for one that may still become complete.
///
/// # Errors
/// EINVAL for what can't become a JSON object, or has a key twice.
pub fn parse_object(text: &[u8]) -> Result<Option<Value>> {
    let text = text.trim_ascii();
    let foreign = |why: &str| Error::new(libc::EINVAL, format!("{BOX_JSON} {why}"));
    match text {
        [] => return Ok(None),
        [b'{', ..] => {}
        _ => return Err(foreign("is not a JSON object")),
    }
    // Only what ends with a brace can be complete.
    if text.last() != Some(&b'}') {
        return Ok(None);
    }
    match parse_unambiguous(text) {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_eof() => Ok(None),
        Err(error) => Err(foreign(&format!("is not JSON: {error}"))),
    }
}

/// Refuses a why.json as soon as the text so far can't be one of ours. It says what was done to a box,
/// and a copy of the box does without it.
///
/// # Errors
/// EINVAL.
pub fn refuse_foreign_why(text: &[u8]) -> Result<()> {
    let text = text.trim_ascii();
    let is_ours = match (text.first(), text.last()) {
        (None, _) => true,
        (Some(b'{'), Some(b'}')) => match serde_json::from_slice::<Value>(text) {
            Ok(value) => value["action"].is_string() && value["box_id"].is_string(),
            Err(error) => error.is_eof(),
        },
        (Some(first), _) => *first == b'{',
    };
    if is_ours {
        return Ok(());
    }
    Err(Error::new(
        libc::EINVAL,
        "this is not the why.json of what was kept; no other file of that name is kept here",
    ))
}

/// Returns whether a box.json is of a box that had a disk. Older ones do not say.
fn has_disk(value: &Value) -> bool {
    let bytes = |field: &str| value["space"][field].as_u64();
    (bytes("own_bytes"), bytes("shared_bytes")) != (Some(0), Some(0))
}

/// Refuses a text that ended in the middle.
///
/// # Errors
/// EINVAL.
pub fn refuse_partial(text: &[u8]) -> Result<()> {
    if text.trim_ascii().is_empty() || serde_json::from_slice::<Value>(text).is_ok() {
        return Ok(());
    }
    Err(Error::new(
        libc::EINVAL,
        "it ends in the middle; copy it again from the start",
    ))
}

fn foreign(is_snapshot: bool) -> Error {
    let name = if is_snapshot { SNAPSHOT_JSON } else { BOX_JSON };
    Error::new(
        libc::EINVAL,
        format!("this is not the {name} of a backup; no other file of that name is kept here"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_description_is_refused_as_soon_as_that_shows() {
        let ours = br#"{"id":"a","options":{},"space":{"own_bytes":1,"shared_bytes":0}}"#;
        for end in 0..=ours.len() {
            refuse_foreign(false, &ours[..end]).unwrap();
            assert_eq!(
                refuse_partial(&ours[..end]).is_ok(),
                end == 0 || end == ours.len()
            );
        }
        refuse_foreign(false, br#"{"id":"a","options":{}}"#).unwrap();
        refuse_foreign(true, br#"{"id":"s","box_id":"a","created_at":1}"#).unwrap();
        for (is_snapshot, text) in [
            (false, &b"1"[..]),
            (false, b"notes"),
            (false, b"{}"),
            (false, b"{]}"),
            (false, br#"{"id":"s","box_id":"a","created_at":1}"#),
            (true, ours),
            (
                false,
                br#"{"id":"a","options":{},"space":{"own_bytes":0,"shared_bytes":0}}"#,
            ),
        ] {
            assert_eq!(
                refuse_foreign(is_snapshot, text).unwrap_err().errno(),
                libc::EINVAL,
                "{text:?}"
            );
        }
    }

    #[test]
    fn the_state_is_merged_and_secrets_are_hidden() {
        let record = BoxRecord {
            id: "a".into(),
            name: Some("web".into()),
            created_at: 1,
            config:
                r#"{"id":"a","future":7,"options":{"secrets":[{"name":"k","value":"s3cret"}]}}"#
                    .into(),
            status: "stopped".into(),
            pid: None,
            state: r#"{"status":"stopped","lock_id":3}"#.into(),
        };
        let usage = Usage {
            own: 5 << 40,
            shared: 0,
        };
        let text = String::from_utf8(box_json(&record, usage).unwrap()).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["future"], 7);
        assert_eq!(value["state"]["lock_id"], 3);
        assert!(!text.contains("s3cret"));
        assert!(text.contains("\n  \"future\": 7"));
        assert_eq!(value["space"]["own_bytes"], 5u64 << 40);
        assert_eq!(value["space"]["shared_bytes"], 0);
        let most = Usage {
            own: u64::MAX,
            shared: u64::MAX,
        };
        for usage in [Usage::default(), most] {
            assert_eq!(box_json(&record, usage).unwrap().len(), text.len());
        }
    }
}
