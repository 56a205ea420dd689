//! The file that a disk is unpacked into: hashed as it is in the archive, stored with holes for
//! zeros.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk_writer::{DiskWriter, MakeRoom, PIECE, Piece, zeros};
use super::stages::Stages;
use super::{MOST_HOLES, over_limit};
use crate::disk::{Chain, LeftOut};
use crate::{Context, Error, Result};

/// The largest disk: 64 TiB, as for the virtual size.
const MAX_LENGTH: u64 = 64 << 40;

/// Free bytes that are made besides those of the disk, where some can be made: a file system needs
/// some itself, and may say so only at the flush, when it is too late.
const MARGIN: u64 = 8 << 20;

/// Creates a new file. A full file system may have no room even for its name.
fn create_with_room(path: &Path, make_room: &MakeRoom) -> std::io::Result<File> {
    loop {
        let mut options = File::options();
        match options.read(true).write(true).create_new(true).open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull && make_room() => {}
            created => return created,
        }
    }
}

/// The file, the current piece, and the stages that complete pieces go through.
pub(super) struct DiskFile {
    path: PathBuf,
    /// For statfs.
    file: Arc<File>,
    piece: Piece,
    stages: Stages,
    /// The most bytes that may be written to the file.
    most: Option<u64>,
    /// The disk that it is compared with.
    other: Option<Arc<Chain>>,
    /// Frees space of which more is needed.
    make_room: MakeRoom,
}

impl DiskFile {
    /// Creates the file, of which at most `most` bytes will be written, and leaves out the clusters
    /// that `other` has as well.
    pub(super) fn create(
        path: &Path,
        most: Option<u64>,
        other: Option<Arc<Chain>>,
        make_room: MakeRoom,
    ) -> Result<DiskFile> {
        let file = create_with_room(path, &make_room)
            .context(|| format!("cannot create {} for the disk", path.display()))?;
        let file = Arc::new(file);
        let writer = DiskWriter::new(path, file.clone(), most, other.clone());
        let writer = writer.with_room(make_room.clone());
        Ok(DiskFile {
            path: path.to_owned(),
            file,
            piece: Piece::new(),
            stages: Stages::new(writer),
            most,
            other,
            make_room,
        })
    }

    /// Starts anew: another disk takes its place.
    pub(super) fn begin_anew(&mut self) -> Result<()> {
        let path = self.path.clone();
        std::fs::remove_file(&path).context(|| format!("cannot remove {}", path.display()))?;
        *self = DiskFile::create(&path, self.most, self.other.clone(), self.make_room.clone())?;
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a disk that can't fit before any of it is written. `stored` bytes are in the
    /// archive, which expand to `expanded`.
    pub(super) fn check_room(&self, stored: u64, expanded: u64) -> Result<()> {
        if expanded > MAX_LENGTH {
            return Err(Error::bad_archive(format!(
                "the archive is refused: its disk.qcow2 of {expanded} bytes is over 64 TiB"
            )));
        }
        let holes = expanded.saturating_sub(stored);
        if holes > MOST_HOLES {
            return Err(Error::bad_archive(format!(
                "the archive is refused: its sparse disk.qcow2 has holes of {holes} bytes, over {} GiB; `qemu-img convert` makes a disk without holes",
                MOST_HOLES >> 30
            )));
        }
        if let Some(most) = self.most.filter(|most| stored > *most) {
            return Err(over_limit(
                &format!("the archive's disk.qcow2 has {stored} bytes"),
                most,
            ));
        }
        loop {
            let free = free_space(&self.file)
                .context(|| format!("cannot tell the free space for {}", self.path.display()))?;
            if stored.saturating_add(MARGIN) <= free {
                return Ok(());
            }
            if !(self.make_room)() {
                if stored <= free {
                    return Ok(());
                }
                return Err(Error::new(
                    libc::ENOSPC,
                    format!(
                        "the archive's disk.qcow2 has {stored} bytes, but only {free} are free; make room and copy it again"
                    ),
                ));
            }
        }
    }

    /// Appends data. An error may be about earlier data.
    pub(super) fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            bytes = self.piece.fill(bytes);
            if self.piece.room() == 0 {
                self.stages.data(&mut self.piece)?;
            }
        }
        Ok(())
    }

    /// Appends `count` zeros. An error may be about earlier data.
    pub(super) fn zeros(&mut self, mut count: u64) -> Result<()> {
        while count > 0 {
            let whole = count - count % PIECE as u64;
            count = if self.piece.is_empty() && whole > 0 {
                self.stages.zeros(whole)?;
                count.saturating_sub(whole)
            } else {
                let some = zeros(count.min(self.piece.room() as u64));
                self.data(some)?;
                count.saturating_sub(some.len() as u64)
            };
        }
        Ok(())
    }

    /// Waits until everything is hashed and written, except for the current piece.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.stages.drain()
    }

    /// Waits for the whole disk to be hashed and written, and returns the digest.
    pub(super) fn end(&mut self) -> Result<[u8; 32]> {
        self.stages.data(&mut self.piece)?;
        self.stages.end()
    }

    /// Returns what was left out of the disk, once it is whole.
    pub(super) fn take_left_out(&mut self) -> Option<LeftOut> {
        self.stages.take_left_out()
    }

    /// Makes the disk durable. The caller flushes its directory.
    pub(super) fn sync(&self) -> Result<()> {
        self.stages.sync()
    }
}

/// Returns the bytes that a user without privileges may still write to the file system of `file`.
fn free_space(file: &File) -> std::io::Result<u64> {
    let stat = rustix::fs::fstatvfs(file)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
