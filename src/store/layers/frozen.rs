//! Disk states that stay as they are.

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

/// What the live disk was when it was frozen.
#[derive(Clone, Debug)]
pub enum Frozen {
    /// A layer in `bases/` that has exactly the contents and the virtual size of the live disk.
    Base { path: PathBuf },
    /// The live disk is an empty overlay on this: a raw image, or a layer of another virtual size.
    Below { path: PathBuf, format: Format },
}

/// A disk state that stays as it is.
#[derive(Clone, Debug)]
pub struct FrozenDisk {
    pub layer: Frozen,
    /// Virtual size of the disk in bytes.
    pub virtual_size: u64,
    /// The file that was on top: has the time of the state, and is what to copy where the layer
    /// can't stand for it.
    pub top: PathBuf,
    /// That file, open: as long as it is, no other gets its inode number.
    pub file: Arc<File>,
}

impl FrozenDisk {
    /// What an overlay that starts from this state has to name as its backing file.
    pub fn backing(&self) -> (&Path, Format) {
        match &self.layer {
            Frozen::Base { path } => (path, Format::Qcow2),
            Frozen::Below { path, format } => (path, *format),
        }
    }
}

/// The row of a base that is about to be there, with the contents of `file`.
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

/// An empty overlay on the frozen state, with the time of that.
pub fn make_overlay(locked: &LockedBox<'_>, frozen: &FrozenDisk, overlay: &Path) -> Result<()> {
    let (backing, format) = frozen.backing();
    disk::create_overlay(overlay, backing, format, frozen.virtual_size)?;
    locked.store.home().give_to_owner(overlay)?;
    durable::copy_times(&frozen.top, overlay)?;
    durable::sync_file(overlay)
}
