//! The entries of a home.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::catalog::Catalog;
use super::identity::base_id;
use super::kept::{KeptBox, KeptFrom, KeptRows, is_entry_name};
use super::paths::Home;
use super::records::SnapshotRecord;
use crate::{Context, Result};

impl Home {
    /// Returns an id for a new entry: no box has one like it.
    ///
    /// # Errors
    /// EIO without random bytes.
    pub fn new_kept_id(&self, rows: &KeptRows) -> Result<String> {
        Ok(format!("undo-{}-{}", rows.when(), base_id()?))
    }

    /// Returns the ids of all entries, also of those whose rows can't be read.
    ///
    /// # Errors
    /// Those of reading the directory.
    pub fn kept_ids(&self) -> Result<Vec<String>> {
        let dir = self.undo_dir();
        if dir.is_symlink() || !dir.exists() {
            return Ok(Vec::new());
        }
        let message = || format!("cannot list {}", dir.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).context(message)? {
            names.extend(entry.context(message)?.file_name().into_string());
        }
        names.retain(|name| is_entry_name(name));
        names.sort();
        Ok(names)
    }

    /// Reads an entry.
    ///
    /// # Errors
    /// ENOENT when it is gone; EIO when its rows are damaged.
    pub fn read_kept(&self, id: &str) -> Result<KeptBox> {
        KeptBox::read(&self.undo_dir(), id, self.owner().uid)
    }

    /// Returns whether what an entry keeps is gone, as the rows and the files are now. False where a
    /// crash cut the removal or the restore off, and where the entry was had back. True where only
    /// rows came back (an older database was put in place) and the disk did not.
    pub fn is_gone(&self, entry: &KeptBox, catalog: &Catalog) -> bool {
        let box_id = entry.box_id();
        match entry.rows.action {
            KeptFrom::BoxRemoved => {
                let had_disk = self.live_disk(entry.id()).exists();
                let is_lost = had_disk && !self.live_disk(box_id).exists();
                is_lost || catalog.box_by_id(box_id).is_none()
            }
            KeptFrom::SnapshotRemoved => {
                let removed = entry.rows.removed_snapshot();
                let row = removed.and_then(|row| catalog.snapshot_by_id(box_id, &row.id));
                let layer = row.and_then(SnapshotRecord::base_path);
                layer.is_none_or(|layer| !Path::new(&layer).exists())
            }
            KeptFrom::DiskReplaced => {
                inode(&self.live_disk(entry.id())) != inode(&self.live_disk(box_id))
            }
        }
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let meta = fs::symlink_metadata(path).ok()?;
    Some((meta.dev(), meta.ino()))
}
