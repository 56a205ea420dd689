//! The mount table of this process: /proc/self/mountinfo, described in proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::{Context, Result};

/// The file system type of our mounts: what the kernel makes of FUSE's subtype `boxlite`.
const OUR_TYPE: &str = "fuse.boxlite";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Minor number of the mounted file system's device; for FUSE the number of its connection.
    pub minor: u32,
    /// Where it is mounted, an absolute path.
    pub mountpoint: PathBuf,
    /// For example `ext4` or `fuse.sshfs`.
    pub fstype: String,
}

impl Entry {
    /// Whether this is a mount of boxlitefs.
    pub fn is_ours(&self) -> bool {
        self.fstype == OUR_TYPE
    }

    /// Whether a FUSE process serves this mount.
    pub fn is_fuse(&self) -> bool {
        self.fstype == "fuse" || self.fstype == "fuseblk" || self.fstype.starts_with("fuse.")
    }
}

/// What is mounted on exactly this path (absolute, canonical); the topmost if several are.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(crate) fn at(path: &Path) -> Result<Option<Entry>> {
    Ok(topmost(&table()?, path))
}

/// A mountpoint in this directory (absolute, canonical), however deep; the directory itself does not
/// count.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(crate) fn below(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(entry_below(&table()?, dir))
}

/// Where boxlitefs is mounted, each place once.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(crate) fn ours() -> Result<Vec<PathBuf>> {
    Ok(entries_of_ours(&table()?))
}

fn entries_of_ours(table: &[u8]) -> Vec<PathBuf> {
    let lines = table.split(|&byte| byte == b'\n').filter_map(entry);
    let mut places: Vec<PathBuf> = lines
        .filter(Entry::is_ours)
        .map(|entry| entry.mountpoint)
        .collect();
    places.sort();
    places.dedup();
    places
}

fn table() -> Result<Vec<u8>> {
    fs::read("/proc/self/mountinfo")
        .context(|| "cannot read the mount table /proc/self/mountinfo; is /proc mounted?")
}

fn entry_below(table: &[u8], dir: &Path) -> Option<PathBuf> {
    table
        .split(|&byte| byte == b'\n')
        .filter_map(entry)
        .map(|entry| entry.mountpoint)
        .find(|mountpoint| mountpoint.starts_with(dir) && mountpoint != dir)
}

/// The table lists a mount after the one it covers.
fn topmost(table: &[u8], path: &Path) -> Option<Entry> {
    table
        .split(|&byte| byte == b'\n')
        .filter_map(entry)
        .rfind(|entry| entry.mountpoint == path)
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: id, parent, device, root,
/// mountpoint, options, any number of tags, a dash, type, source, options.
fn entry(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (_, minor) = device.split_once(':')?;
    let mountpoint = unescaped(fields.nth(1)?);
    fields.find(|field| *field == b"-")?;
    Some(Entry {
        minor: minor.parse().ok()?,
        mountpoint: PathBuf::from(OsString::from_vec(mountpoint)),
        fstype: String::from_utf8_lossy(&unescaped(fields.next()?)).into_owned(),
    })
}

/// The kernel writes blanks, line breaks and backslashes as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, after) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    after @ ..,
                ],
            ) => {
                plain.push((a & 3) << 6 | (b & 7) << 3 | (c & 7));
                rest = after;
            }
            _ => {
                plain.push(byte);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 28 0:20 / /proc rw,nosuid - proc proc rw
36 28 98:0 /mnt1 /mnt/a rw,noatime master:1 shared:7 - ext4 /dev/root rw,errors=continue
40 28 0:51 / /mnt/my\\040boxes\\134x rw,nosuid,nodev shared:9 - fuse.boxlite /home/u/.boxlite rw
41 36 0:52 / /mnt/a rw - fuse.sshfs host: rw
not a line of the table
";

    #[test]
    fn the_topmost_mount_of_a_path_is_the_one_that_counts() {
        let entry = topmost(TABLE, Path::new("/mnt/a")).unwrap();
        assert_eq!(entry.fstype, "fuse.sshfs");
        assert!(entry.is_fuse() && !entry.is_ours());
    }

    #[test]
    fn a_mount_in_a_directory_is_found_and_the_directory_itself_is_none() {
        let below = |dir: &str| entry_below(TABLE, Path::new(dir));
        assert_eq!(below("/mnt/my boxes\\x"), None);
        assert_eq!(below("/mn"), None);
        assert_eq!(below("/mnt"), Some(PathBuf::from("/mnt/a")));
    }

    #[test]
    fn a_mountpoint_with_blanks_and_backslashes_is_found() {
        let entry = topmost(TABLE, Path::new("/mnt/my boxes\\x")).unwrap();
        assert!(entry.is_ours());
        assert_eq!(entry.minor, 51);
    }

    #[test]
    fn the_mounts_of_boxlitefs_are_told_from_others() {
        let twice = [TABLE, TABLE].concat();
        assert_eq!(entries_of_ours(&twice), [Path::new("/mnt/my boxes\\x")]);
    }

    #[test]
    fn a_directory_below_a_mount_is_no_mount() {
        assert_eq!(topmost(TABLE, Path::new("/mnt/a/b")), None);
        assert_eq!(topmost(TABLE, Path::new("/mnt")), None);
    }

    #[test]
    fn the_table_of_this_machine_can_be_read() {
        assert!(at(Path::new("/proc")).unwrap().is_some());
    }
}
