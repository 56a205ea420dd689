//! The names of files in the mount, and how a box's name is written as one.

use std::ffi::OsStr;

use crate::{Error, Result};

/// The hidden directory of the root.
pub const HIDDEN: &str = ".boxlite";
/// The log in it.
pub const LOG: &str = "log";
/// The status, beside the log.
pub const STATUS: &str = "status";
/// A box's configuration and state.
pub const BOX_JSON: &str = "box.json";
/// A disk state as an archive.
pub const EXPORT: &str = "export.boxlite";
/// A disk state as a compressed archive: a link into the view.
pub const COMPRESSED: &str = "export.boxlite.zst";
/// The guest's files: a link into the view.
pub const ROOTFS: &str = "rootfs";
/// The raw disk: a link into the view.
pub const DISK_IMAGE: &str = "disk.img";
/// The directory in the hidden one that these links point into.
pub const VIEW: &str = "view";
/// The directory in the hidden one of what can be had back.
pub const UNDO: &str = "undo";
/// Describes the removal or restore that an undo entry can reverse.
pub const WHY_JSON: &str = "why.json";
/// The directory of a box's snapshots.
pub const SNAPSHOTS: &str = "snapshots";
/// A snapshot's row.
pub const SNAPSHOT_JSON: &str = "snapshot.json";
/// The suffix of archives that are put into the root.
pub const ARCHIVE_SUFFIX: &str = ".boxlite";

/// The suffix of compressed ones, as a copy of `export.boxlite.zst` may be called.
const COMPRESSED_SUFFIX: &str = ".boxlite.zst";

/// Returns the name of the box that an archive of this name in the root becomes; None for what is
/// no archive's name.
pub fn archive_stem(name: &str) -> Option<&str> {
    let stem = name
        .strip_suffix(COMPRESSED_SUFFIX)
        .or_else(|| name.strip_suffix(ARCHIVE_SUFFIX));
    stem.filter(|stem| !stem.is_empty())
}

/// Returns whether an archive in the root has the name that all exports have. The box that it
/// becomes is called by its manifest.
pub fn is_nameless_archive(name: &str) -> bool {
    matches!(name, EXPORT | COMPRESSED)
}

/// The longest file name (NAME_MAX), in bytes.
const LONGEST: usize = 255;

/// Returns a box's name as a file name: `/` is `%2F`, `%` is `%25`. None when it can't be one.
pub fn encode(name: &str) -> Option<String> {
    let shown = name.replace('%', "%25").replace('/', "%2F");
    let impossible = matches!(shown.as_str(), "" | "." | ".." | HIDDEN)
        || shown.len() > LONGEST
        || shown.contains('\0');
    (!impossible).then_some(shown)
}

/// Returns the box name that a file name stands for.
///
/// # Errors
/// EINVAL when no box could be shown like this.
pub fn decode(shown: &str) -> Result<String> {
    let mut name = String::with_capacity(shown.len());
    let mut rest = shown;
    while let Some(at) = rest.find('%') {
        name.push_str(&rest[..at]);
        let (escape, after) = rest[at..].split_at(3.min(rest.len() - at));
        match escape {
            "%2F" => name.push('/'),
            "%25" => name.push('%'),
            _ => {
                return Err(Error::new(
                    libc::EINVAL,
                    format!("{shown:?}: write % as %25 and / as %2F in a box's name"),
                ));
            }
        }
        rest = after;
    }
    name.push_str(rest);
    if encode(&name).as_deref() != Some(shown) {
        return Err(Error::new(
            libc::EINVAL,
            format!("{shown:?} can't be a box's name"),
        ));
    }
    Ok(name)
}

/// EEXIST for a name that is taken.
pub fn exists(name: &str) -> Error {
    Error::new(libc::EEXIST, format!("{name} is there already"))
}

/// ENOENT for a name that does not exist.
pub fn not_there() -> Error {
    Error::new(libc::ENOENT, "there is no such file")
}

/// ESTALE for a name that the kernel kept too long: it looks the name up again, from the root on.
pub fn gone() -> Error {
    Error::new(libc::ESTALE, "that is gone")
}

/// Returns a file name as text.
///
/// # Errors
/// EINVAL for a name that is not UTF-8, which no box and no snapshot has.
pub fn text(name: &OsStr) -> Result<&str> {
    name.to_str().ok_or_else(|| {
        Error::new(
            libc::EINVAL,
            format!("{name:?} is not UTF-8, as all names of BoxLite are"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_and_percents_are_escaped_and_come_back() {
        for (name, shown) in [
            ("web", "web"),
            ("a/b", "a%2Fb"),
            ("50%", "50%25"),
            ("ü .x", "ü .x"),
        ] {
            assert_eq!(encode(name).as_deref(), Some(shown));
            assert_eq!(decode(shown).unwrap(), name);
        }
    }

    #[test]
    fn names_no_file_can_have_are_shown_by_id() {
        for name in ["", ".", "..", ".boxlite", &"x".repeat(256), "a\0b"] {
            assert_eq!(encode(name), None, "{name:?}");
        }
    }

    #[test]
    fn a_name_no_box_is_shown_by_is_refused() {
        for shown in ["a%2fb", "50%", "%", "%4", "..", ".boxlite"] {
            assert_eq!(decode(shown).unwrap_err().errno(), libc::EINVAL, "{shown}");
        }
    }
}
