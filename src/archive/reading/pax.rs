//! Parses pax extension headers.

use super::names::shown;
use super::refusal::{damaged, refused};
use crate::Result;

/// The pax records that are used.
#[derive(Default)]
pub(super) struct PaxRecords {
    pub path: Option<Vec<u8>>,
    pub size: Option<u64>,
}

/// Parses the records of a pax extension, each `LENGTH KEY=VALUE\n` (POSIX pax). Only path and size
/// are used.
pub(super) fn parse_pax(mut records: &[u8]) -> Result<PaxRecords> {
    let mut pax = PaxRecords::default();
    while !records.is_empty() {
        let (key, value, rest) =
            pax_record(records).ok_or_else(|| damaged("a pax header is malformed"))?;
        let twice = match key {
            b"path" => pax.path.replace(value.to_owned()).is_some(),
            b"size" => {
                let size = std::str::from_utf8(value)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| damaged("the size in a pax header is no number"))?;
                pax.size.replace(size).is_some()
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(refused(
                    "it has a sparse member in pax format; pack it with --format=gnu or without --sparse",
                ));
            }
            _ => false,
        };
        if twice {
            return Err(damaged(format!("a pax header says {} twice", shown(key))));
        }
        records = rest;
    }
    Ok(pax)
}

/// Returns key and value of the first record, and the records after it.
fn pax_record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = records.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(records.get(..blank)?)
        .ok()?
        .parse()
        .ok()?;
    let record = records.get(blank.checked_add(1)?..length)?;
    let record = record.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((
        record.get(..equals)?,
        record.get(equals.checked_add(1)?..)?,
        records.get(length..)?,
    ))
}
