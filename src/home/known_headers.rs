//! What the headers of image files said, kept in `db/boxlitefs.db` from one mount to the next: reading
//! thousands of them from a disk takes seconds.
//!
//! A header is known by its file's inode, length, modification and change time (ns). Within one boot
//! every write changes the last of these. After a power loss a file may have the new header and the
//! old times, so what was learnt before the machine started counts for nothing.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rusqlite::{Row, params};

use super::size_cache::SizeCache;

/// The most headers that are kept, some 200 MB.
const MOST_HEADERS: usize = 1_000_000;

/// The backing path in the header of an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownHeader {
    /// The number of the device that the file is on.
    pub device: u64,
    /// The inode number.
    pub inode: u64,
    /// Length in bytes.
    pub length: u64,
    /// Modification and change time in nanoseconds since 1970.
    pub times: (i64, i64),
    /// The backing path as the header spells it; None for an image without one.
    pub backing: Option<PathBuf>,
}

impl KnownHeader {
    fn of(row: &Row<'_>) -> rusqlite::Result<KnownHeader> {
        let number = |column| row.get(column).map(i64::cast_unsigned);
        let backing: Option<Vec<u8>> = row.get(5)?;
        Ok(KnownHeader {
            device: number(0)?,
            inode: number(1)?,
            length: number(2)?,
            times: (row.get(3)?, row.get(4)?),
            backing: backing.map(|path| PathBuf::from(OsString::from_vec(path))),
        })
    }
}

impl SizeCache {
    /// Returns the headers that were kept since the machine started.
    pub fn headers(&self) -> Vec<KnownHeader> {
        let Some(boot) = boot() else {
            return Vec::new();
        };
        let found = self.read(|connection| {
            let mut statement = connection.prepare(
                "SELECT device, inode, length, modified, changed, backing
                 FROM header WHERE boot = ?1",
            )?;
            let rows = statement.query_map([boot], KnownHeader::of)?;
            rows.collect()
        });
        found.unwrap_or_default()
    }

    /// Keeps these headers in place of all that were kept before.
    pub fn put_headers(&self, headers: &[KnownHeader]) {
        let Some(boot) = boot() else {
            return;
        };
        self.change(|transaction, _| {
            transaction.execute("DELETE FROM header", [])?;
            let mut insert = transaction
                .prepare("INSERT OR REPLACE INTO header VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?;
            for header in headers.iter().take(MOST_HEADERS) {
                let backing = header.backing.as_ref().map(|path| path.as_os_str());
                insert.execute(params![
                    header.device.cast_signed(),
                    header.inode.cast_signed(),
                    header.length.cast_signed(),
                    header.times.0,
                    header.times.1,
                    backing.map(|path| path.as_encoded_bytes()),
                    boot,
                ])?;
            }
            Ok(())
        });
    }
}

/// Returns what Linux calls this start of the machine; None where that can't be read.
fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_known_until_the_machine_starts_again() {
        let dir = tempfile::tempdir().unwrap();
        let home = super::super::size_cache::home_in(dir.path());
        let cache = SizeCache::open(&home, false);
        let header = KnownHeader {
            device: u64::MAX,
            inode: 7,
            length: 1 << 40,
            times: (-1, i64::MAX),
            backing: Some(PathBuf::from(OsString::from_vec(b"/home/\xff".to_vec()))),
        };
        let other = KnownHeader {
            inode: 8,
            backing: None,
            ..header.clone()
        };
        cache.put_headers(std::slice::from_ref(&other));
        cache.put_headers(&[header.clone(), other.clone()]);
        drop(cache);
        let cache = SizeCache::open(&home, true);
        assert_eq!(cache.headers(), [header, other]);
        drop(cache);
        let cache = SizeCache::open(&home, false);
        cache.change(|rows, _| {
            rows.execute("UPDATE header SET boot = 'another'", [])
                .map(drop)
        });
        assert_eq!(cache.headers(), []);
    }
}
