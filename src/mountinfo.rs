//! Reads the mount table of a process: /proc/PID/mountinfo, described in proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::{Context, Result};

/// The file system type of our mounts, which the kernel makes of FUSE's subtype `boxlite`.
const OUR_TYPE: &str = "fuse.boxlite";

/// The device of a mounted file system. All mounts of the file system have the same one, in every
/// mount namespace, and no other file system has it as long as this one is mounted or in use
/// anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Device {
    /// 0 for every file system without a disk, such as FUSE.
    pub major: u32,
    /// For FUSE, the number of the connection.
    pub minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The identity of a mount among all that exist at the same time, wherever it is moved to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MountId {
    /// Its number in the mount table.
    pub id: u64,
    /// The file system that is mounted.
    pub device: Device,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// The identity of the mount.
    pub id: MountId,
    /// The number of the mount that this one is mounted on.
    pub parent: u64,
    /// Where it is mounted, an absolute path.
    pub mountpoint: PathBuf,
    /// For example `ext4` or `fuse.sshfs`.
    pub fstype: String,
    /// Its source: the home, for a mount of ours.
    pub source: PathBuf,
}

impl MountEntry {
    /// Whether this is a mount of boxlitefs.
    pub fn is_ours(&self) -> bool {
        self.fstype == OUR_TYPE
    }

    /// Whether a FUSE process serves this mount.
    pub fn is_fuse(&self) -> bool {
        self.fstype == "fuse" || self.fstype == "fuseblk" || self.fstype.starts_with("fuse.")
    }
}

/// The mount table of a process at one moment.
#[derive(Debug)]
pub(crate) struct MountTable(Vec<MountEntry>);

impl MountTable {
    /// Reads the table of this process.
    ///
    /// # Errors
    /// Those of reading /proc/self/mountinfo.
    pub fn own() -> Result<MountTable> {
        fs::read("/proc/self/mountinfo")
            .map(|text| MountTable::parsed(&text))
            .context(|| "cannot read the mount table /proc/self/mountinfo; is /proc mounted?")
    }

    /// Reads the table of another process.
    ///
    /// # Errors
    /// Those of reading /proc/PID/mountinfo: the process is gone, or another user's.
    pub fn of_process(pid: u32) -> io::Result<MountTable> {
        fs::read(format!("/proc/{pid}/mountinfo")).map(|text| MountTable::parsed(&text))
    }

    fn parsed(text: &[u8]) -> MountTable {
        let lines = text.split(|&byte| byte == b'\n');
        MountTable(lines.filter_map(entry).collect())
    }

    /// Returns the mount on exactly this path (absolute, canonical) where a lookup of it ends: the
    /// topmost of several, and none that is hidden by a mount on a directory above.
    pub fn at(&self, path: &Path) -> Option<&MountEntry> {
        self.0
            .iter()
            .rfind(|entry| entry.mountpoint == path && self.hindrance(entry, false).is_none())
    }

    /// Returns the mount in which this path (absolute, canonical) is.
    pub fn around(&self, path: &Path) -> Option<&MountEntry> {
        path.ancestors().find_map(|place| self.at(place))
    }

    /// Returns a mountpoint inside this directory, at any depth; the directory itself does not
    /// count.
    pub fn below(&self, dir: &Path) -> Option<&Path> {
        self.0
            .iter()
            .map(|entry| entry.mountpoint.as_path())
            .find(|mountpoint| mountpoint.starts_with(dir) && *mountpoint != dir)
    }

    /// Finds a mount, wherever it is now; None when it is no longer in this table.
    pub fn find(&self, id: MountId) -> Option<&MountEntry> {
        self.0.iter().find(|entry| entry.id == id)
    }

    /// Returns all mounts, in the order of the table.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &MountEntry> {
        self.0.iter()
    }

    /// Returns all mounts of a file system.
    pub fn of_device(&self, device: Device) -> impl DoubleEndedIterator<Item = &MountEntry> {
        self.entries()
            .filter(move |entry| entry.id.device == device)
    }

    /// Returns another mount that an unmount of this one by its path would hit or take along: one
    /// that covers it or a directory above, or one that is mounted inside it.
    pub fn in_the_way(&self, entry: &MountEntry) -> Option<&MountEntry> {
        self.hindrance(entry, true)
    }

    /// Returns a mount that covers this one, or, if `also_inside`, one that is mounted in it.
    fn hindrance(&self, entry: &MountEntry, also_inside: bool) -> Option<&MountEntry> {
        let on_it = |other: &&MountEntry| {
            other.parent == entry.id.id && (also_inside || other.mountpoint == entry.mountpoint)
        };
        self.entries()
            .find(on_it)
            .or_else(|| self.what_hides(entry))
    }

    /// Returns a mount on a directory above, made in the same mount as this one or as one above it:
    /// lookups lead into that.
    fn what_hides(&self, entry: &MountEntry) -> Option<&MountEntry> {
        let mut hidden = entry;
        // A table has no cycles; the bound also ends the loop for one that changed while it was
        // read.
        for _ in 0..self.0.len() {
            let covers = |other: &&MountEntry| {
                other.parent == hidden.parent
                    && other.id != hidden.id
                    && hidden.mountpoint.starts_with(&other.mountpoint)
            };
            if let Some(cover) = self.entries().find(covers) {
                return Some(cover);
            }
            hidden = self.entries().find(|other| other.id.id == hidden.parent)?;
        }
        None
    }
}

/// Returns the mount on exactly this path (absolute, canonical), the topmost if there are several.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(crate) fn at(path: &Path) -> Result<Option<MountEntry>> {
    Ok(MountTable::own()?.at(path).cloned())
}

/// Returns a mountpoint inside this directory (absolute, canonical), at any depth; the directory
/// itself does not count.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(crate) fn below(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(MountTable::own()?.below(dir).map(Path::to_owned))
}

/// Returns where boxlitefs is mounted, each place once.
///
/// # Errors
/// Those of reading /proc/self/mountinfo.
pub(crate) fn ours() -> Result<Vec<PathBuf>> {
    Ok(places_of_ours(&MountTable::own()?))
}

fn places_of_ours(table: &MountTable) -> Vec<PathBuf> {
    let ours = table.entries().filter(|entry| entry.is_ours());
    let mut places: Vec<PathBuf> = ours.map(|entry| entry.mountpoint.clone()).collect();
    places.sort();
    places.dedup();
    places
}

/// Returns the path to compare with the mount table: canonical, or, where that needs an answer from
/// a file system that does not answer, its canonical directory and its name.
///
/// # Errors
/// Those of resolving it.
pub(crate) fn resolve(path: &Path) -> io::Result<PathBuf> {
    path.canonicalize().or_else(|error| {
        let absolute = std::path::absolute(path)?;
        match (absolute.parent(), absolute.file_name()) {
            (Some(parent), Some(name)) if error.kind() != io::ErrorKind::NotFound => {
                Ok(parent.canonicalize()?.join(name))
            }
            _ => Err(error),
        }
    })
}

/// Parses a line such as `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`: id,
/// parent, device, root, mountpoint, options, any number of tags, a dash, type, source, options.
fn entry(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let id = text()?.parse().ok()?;
    let parent = text()?.parse().ok()?;
    let (major, minor) = text()?.split_once(':')?;
    let device = Device {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    let path = |field| PathBuf::from(OsString::from_vec(unescaped(field)));
    let mountpoint = path(fields.nth(1)?);
    fields.find(|field| *field == b"-")?;
    Some(MountEntry {
        id: MountId { id, device },
        parent,
        mountpoint,
        fstype: String::from_utf8_lossy(&unescaped(fields.next()?)).into_owned(),
        source: path(fields.next()?),
    })
}

/// Decodes a field: the kernel writes blanks, line breaks and backslashes as a backslash and three
/// octal digits.
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
28 1 8:1 / / rw - ext4 /dev/sda1 rw
36 28 98:0 /mnt1 /mnt/a rw,noatime master:1 shared:7 - ext4 /dev/root rw,errors=continue
40 28 0:51 / /mnt/my\\040boxes\\134x rw,nosuid,nodev shared:9 - fuse.boxlite /home/u/.boxlite rw
41 36 0:52 / /mnt/a rw - fuse.sshfs host: rw
not a line of the table
";

    fn table(text: &[u8]) -> MountTable {
        MountTable::parsed(text)
    }

    #[test]
    fn the_topmost_mount_of_a_path_is_the_one_that_counts() {
        let table = table(TABLE);
        let entry = table.at(Path::new("/mnt/a")).unwrap();
        assert_eq!(entry.fstype, "fuse.sshfs");
        assert!(entry.is_fuse() && !entry.is_ours());
    }

    #[test]
    fn which_mount_is_topmost_follows_from_what_it_is_mounted_on_and_not_from_its_line() {
        // The one that is listed last was moved beneath the other.
        let table = table(
            b"28 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              50 51 0:51 / /mnt rw - fuse.boxlite /h rw\n\
              51 28 0:52 / /mnt rw - tmpfs tmpfs rw\n",
        );
        let top = table.at(Path::new("/mnt")).unwrap();
        assert_eq!(top.id.id, 50);
        assert_eq!(table.in_the_way(top), None);
        let below = table.entries().last().unwrap();
        assert_eq!(table.in_the_way(below), Some(top));
    }

    #[test]
    fn a_mount_that_a_directory_above_hides_is_not_where_its_path_leads() {
        let hidden = table(
            b"28 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              30 28 0:51 / /a/b rw - fuse.boxlite /h rw\n\
              31 28 0:52 / /a rw - tmpfs tmpfs rw\n",
        );
        let (ours, cover) = (hidden.entries().nth(1).unwrap(), hidden.entries().nth(2));
        assert_eq!(hidden.at(Path::new("/a/b")), None);
        assert_eq!(hidden.in_the_way(ours), cover);
        // What is mounted there anew is another mount.
        let anew = table(
            b"28 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              30 28 0:51 / /a/b rw - fuse.boxlite /h rw\n\
              31 28 0:52 / /a rw - tmpfs tmpfs rw\n\
              32 31 0:53 / /a/b rw - fuse.boxlite /h rw\n",
        );
        assert_eq!(anew.at(Path::new("/a/b")).unwrap().id.id, 32);
    }

    #[test]
    fn what_is_mounted_in_a_mount_is_in_the_way_of_its_unmount() {
        let table = table(
            b"28 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              30 28 0:51 / /mnt rw - fuse.boxlite /h rw\n\
              31 30 0:52 / /mnt/web rw - tmpfs tmpfs rw\n",
        );
        let ours = table.at(Path::new("/mnt")).unwrap();
        assert_eq!(table.in_the_way(ours).unwrap().id.id, 31);
        let around = |path| table.around(Path::new(path)).unwrap().id.id;
        assert_eq!(
            (around("/mnt/x/y"), around("/mnt/web/x"), around("/x")),
            (30, 31, 28)
        );
    }

    #[test]
    fn a_mount_in_a_directory_is_found_and_the_directory_itself_is_none() {
        let table = table(TABLE);
        let below = |dir: &str| table.below(Path::new(dir));
        assert_eq!(below("/mnt/my boxes\\x"), None);
        assert_eq!(below("/mn"), None);
        assert_eq!(below("/mnt"), Some(Path::new("/mnt/a")));
    }

    #[test]
    fn a_mountpoint_with_blanks_and_backslashes_is_found() {
        let table = table(TABLE);
        let entry = table.at(Path::new("/mnt/my boxes\\x")).unwrap();
        assert!(entry.is_ours());
        let device = Device {
            major: 0,
            minor: 51,
        };
        assert_eq!(entry.id, MountId { id: 40, device });
        assert_eq!(entry.source, Path::new("/home/u/.boxlite"));
        assert_eq!(table.find(entry.id), Some(entry));
        assert_eq!(table.of_device(device).collect::<Vec<_>>(), [entry]);
    }

    #[test]
    fn the_mounts_of_boxlitefs_are_told_from_others() {
        let twice = table(&[TABLE, TABLE].concat());
        assert_eq!(places_of_ours(&twice), [Path::new("/mnt/my boxes\\x")]);
    }

    #[test]
    fn a_directory_below_a_mount_is_no_mount() {
        let table = table(TABLE);
        assert_eq!(table.at(Path::new("/mnt/a/b")), None);
        assert_eq!(table.at(Path::new("/mnt")), None);
    }

    #[test]
    fn the_table_of_this_machine_can_be_read() {
        assert!(at(Path::new("/proc")).unwrap().is_some());
        assert!(MountTable::of_process(std::process::id()).is_ok());
    }
}
