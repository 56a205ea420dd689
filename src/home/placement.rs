//! Checks that the parts of a home are where changes can be made. Layers are moved and linked
//! between `boxes/`, `bases/` and our own directory, each of which may be a link to another place.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use super::Home;
use crate::{Context, Error, Result};

/// Refuses changes of a home whose parts can't exchange files, or belong to another home. In
/// the middle of a change it would be too late.
///
/// # Errors
/// EXDEV when a part is on another file system, EPERM when it is in another home; those of
/// looking.
pub(super) fn reject_scattered(home: &Home) -> Result<()> {
    let staging = home.staging_dir();
    let ours = MountedAt::of(&staging)?;
    for (name, dir) in [("boxes", home.boxes_dir()), ("bases", home.bases_dir())] {
        if !dir.is_dir() {
            continue;
        }
        let shown = home.root().join(name);
        if MountedAt::of(&dir)? != ours {
            return Err(Error::new(
                libc::EXDEV,
                format!(
                    "{} lies on another file system than {}: layers are moved between boxes, bases and .boxlitefs, which can only be done within one; move the whole home to one file system",
                    led_to(&shown, &dir),
                    staging.display()
                ),
            ));
        }
        let parent = dir.parent().filter(|parent| *parent != home.root());
        if let Some(other) = parent.filter(|parent| parent.join("db/boxlite.db").exists()) {
            return Err(Error::new(
                libc::EPERM,
                format!(
                    "{} is part of another home, {}: a change could remove layers that it needs; give this home a directory of its own",
                    led_to(&shown, &dir),
                    other.display()
                ),
            ));
        }
    }
    Ok(())
}

/// Refuses a box with a directory that is a link: BoxLite and boxlitefs would give its layers
/// different names.
///
/// # Errors
/// EPERM.
pub fn reject_linked_box(home: &Home, id: &str) -> Result<()> {
    let dir = home.box_dir(id);
    let parts = [dir.clone(), dir.join("disks"), home.snapshots_dir(id)];
    match parts.iter().find(|part| part.is_symlink()) {
        None => Ok(()),
        Some(part) => Err(Error::new(
            libc::EPERM,
            format!(
                "{} is a link: layers are named by their paths, so put the directory itself there (rm the link, mv the directory)",
                part.display()
            ),
        )),
    }
}

fn led_to(shown: &Path, dir: &Path) -> String {
    if shown == dir {
        return shown.display().to_string();
    }
    format!("{} leads to {}, which", shown.display(), dir.display())
}

/// Which mount of which file system a directory is on: files can be moved and linked within one.
#[derive(PartialEq, Eq)]
struct MountedAt {
    device: (u32, u32),
    /// One file system may be mounted twice, and files can't be moved between the mounts. 0 where
    /// the kernel (before 5.8) does not tell.
    mount: u64,
}

impl MountedAt {
    fn of(dir: &Path) -> Result<MountedAt> {
        let found = statx(CWD, dir, AtFlags::empty(), StatxFlags::MNT_ID)
            .map_err(std::io::Error::from)
            .context(|| format!("cannot look at {}", dir.display()))?;
        let has_mount = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(MountedAt {
            device: (found.stx_dev_major, found.stx_dev_minor),
            mount: if has_mount { found.stx_mnt_id } else { 0 },
        })
    }
}
