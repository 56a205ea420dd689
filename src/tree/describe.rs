//! `box.json` and `snapshot.json`: what BoxLite keeps, as people read it.

use serde_json::Value;

use crate::home::{BoxRecord, SnapshotRecord, redact_secrets};
use crate::{Error, Result};

/// Configuration with the state under `state`, pretty, secret values hidden.
///
/// # Errors
/// EIO when a row is not JSON.
pub(super) fn box_json(record: &BoxRecord) -> Result<Vec<u8>> {
    let mut value = record.config()?;
    if !record.state.is_empty() {
        value["state"] = record.state()?;
    }
    if !value["state"]["status"].is_string() {
        value["state"]["status"] = Value::String(record.status.clone());
    }
    redact_secrets(&mut value);
    pretty(&value)
}

/// The snapshot's row.
///
/// # Errors
/// EIO when it is not JSON.
pub(super) fn snapshot_json(snapshot: &SnapshotRecord) -> Result<Vec<u8>> {
    pretty(&snapshot.value()?)
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)
        .map_err(|e| Error::damaged("cannot write JSON").caused_by(e))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// `created_at` (seconds since 1970) in a snapshot.json, as it was copied out.
pub(super) fn created_at(json: &[u8]) -> Option<i64> {
    serde_json::from_slice::<Value>(json).ok()?["created_at"].as_i64()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let text = String::from_utf8(box_json(&record).unwrap()).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["future"], 7);
        assert_eq!(value["state"]["lock_id"], 3);
        assert!(!text.contains("s3cret"));
        assert!(text.contains("\n  \"future\": 7"));
    }
}
