//! Identifiers as BoxLite makes them, and times as it writes them.

use std::fs::File;
use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::{Context, Result};

/// Digits of BoxLite's ids (runtime/id.rs: base62).
const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Returns a new box id: 12 base62 characters.
pub fn box_id() -> Result<String> {
    base62(12)
}

/// Returns a new base disk id: 8 base62 characters; also the stem of its file in `bases/`.
pub fn base_id() -> Result<String> {
    base62(8)
}

/// Returns a new snapshot id: 8 base62 characters.
pub fn snapshot_id() -> Result<String> {
    base62(8)
}

/// Returns a new container id: 64 hexadecimal digits.
pub fn container_id() -> Result<String> {
    Ok(random(32)?.iter().map(|b| format!("{b:02x}")).collect())
}

/// Returns `length` random base62 characters, each equally likely.
fn base62(length: usize) -> Result<String> {
    let mut id = String::with_capacity(length);
    while id.len() < length {
        // 248 = 4 × 62: bytes above would favour the first digits.
        id.extend(
            random(2 * length)?
                .into_iter()
                .filter(|byte| *byte < 248)
                .map(|byte| char::from(BASE62[usize::from(byte) % 62])),
        );
    }
    id.truncate(length);
    Ok(id)
}

fn random(length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .context(|| "cannot read /dev/urandom for a new id")?;
    Ok(bytes)
}

/// Returns whether an id from the database may be used as one path component. BoxLite's ids are
/// base62; anything that could leave its directory is refused.
pub fn is_safe_component(id: &str) -> bool {
    !id.is_empty()
        && id.len() <= 255
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// Returns whether BoxLite accepts a snapshot name (snapshot_mgr.rs, validate_snapshot_name): not
/// empty, at most 255 bytes, no leading dot, no `/`, `\` or NUL.
pub fn is_snapshot_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && !name.contains(['/', '\\', '\0'])
}

/// Formats a time in seconds since 1970 as RFC 3339 in UTC, as in BoxLite's JSON.
pub fn rfc3339(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds)
        .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
        .to_string()
}

/// Formats a time as [`rfc3339`] does, without its part of a second. A time before 1970 becomes the
/// beginning of 1970.
pub fn rfc3339_at(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    rfc3339(i64::try_from(since.as_secs()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_boxlites_lengths_and_digits() {
        let id = box_id().unwrap();
        assert_eq!(id.len(), 12);
        assert!(is_safe_component(&id));
        assert_eq!(base_id().unwrap().len(), 8);
        let container = container_id().unwrap();
        assert_eq!(container.len(), 64);
        assert!(container.bytes().all(|b| b.is_ascii_hexdigit()));
    }

    #[test]
    fn an_id_that_could_leave_its_directory_is_refused() {
        for id in ["", ".", "..", "a/b", "../x", "a\0b", "a.b"] {
            assert!(!is_safe_component(id), "{id:?}");
        }
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(rfc3339(1_795_570_251), "2026-11-25T01:30:51Z");
    }

    #[test]
    fn snapshot_names_follow_boxlites_rule() {
        for good in ["a", "before upgrade", "ü", "a.b", &"x".repeat(255)] {
            assert!(is_snapshot_name(good), "{good}");
        }
        for bad in ["", ".a", "..", "a/b", "a\\b", "a\0", &"x".repeat(256)] {
            assert!(!is_snapshot_name(bad), "{bad}");
        }
    }
}
