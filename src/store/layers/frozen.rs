//! Frozen disk states: states that stay as they are.

use std::fs;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::Format;
use crate::files::durable;
use crate::home::NewBase;
use crate::store::access::locked_box::LockedBox;
use crate::store::layers::bases::now;
use crate::{Context, Result, disk};

/// The layer that stands for a frozen disk state.
#[derive(Clone, Debug)]
pub enum Frozen {
    /// A layer in `bases/` with exactly the contents and the virtual size of the disk.
    Base { path: PathBuf },
    /// The disk is an empty overlay on this: a raw image, or a layer of another virtual size.
    Below { path: PathBuf, format: Format },
}

/// A frozen disk state.
#[derive(Clone, Debug)]
pub struct FrozenDisk {
    /// The layer that stands for the state.
    pub layer: Frozen,
    /// Virtual size of the disk in bytes.
    pub virtual_size: u64,
    /// The file that was on top. It has the time of the state, and is the file to copy where the
    /// layer can't stand for the state.
    pub top: PathBuf,
    /// That file, open. Its inode number is not reused while it is open.
    pub file: Arc<File>,
}

impl FrozenDisk {
    /// Returns the backing file and its format for an overlay that starts from this state.
    pub fn backing(&self) -> (&Path, Format) {
        match &self.layer {
            Frozen::Base { path } => (path, Format::Qcow2),
            Frozen::Below { path, format } => (path, *format),
        }
    }
}

/// Records a base that is about to be made with the contents of `file`, and a reference to it from
/// the box `reader`, if given.
///
/// # Errors
/// Those of reading the file and of SQLite.
pub fn record_frozen(
    locked: &mut LockedBox<'_>,
    base: &Path,
    file: &Path,
    virtual_size: u64,
    reader: Option<&str>,
) -> Result<()> {
    let id = base
        .file_stem()
        .and_then(|stem| stem.to_str())
        .unwrap_or_default()
        .to_owned();
    let meta = fs::metadata(file).context(|| format!("cannot look at {}", file.display()))?;
    let row = NewBase {
        id: id.clone(),
        path: base.display().to_string(),
        virtual_size,
        file_size: meta.len(),
        created_at: now(),
    };
    locked.change.transaction(|rows| {
        rows.insert_base(&row)?;
        match reader {
            Some(box_id) => rows.insert_ref(&id, box_id),
            None => Ok(()),
        }
    })
}

/// Makes an empty overlay on the frozen state, with the time of the state, and flushes it.
///
/// # Errors
/// Those of system calls.
pub fn make_overlay(locked: &LockedBox<'_>, frozen: &FrozenDisk, overlay: &Path) -> Result<()> {
    let (backing, format) = frozen.backing();
    disk::create_overlay(overlay, backing, format, frozen.virtual_size)?;
    locked.store.home().give_to_owner(overlay)?;
    durable::copy_times(&frozen.top, overlay)?;
    durable::sync_file(overlay)
}
