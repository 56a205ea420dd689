//! One open image file, without the layers below it.
//!
//! imago reads the mapping tables and inflates compressed clusters; data is read from our own
//! descriptor, at the host offsets that imago names.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::bytes::{be64, pieces};
use super::file::open_image;
use super::{FileId, Format, Header, holes, read_zero_padded};
use crate::{Context, Error, Result};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping};
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// An image file, opened for reading, without the layer below it. It keeps reading the same inode,
/// whatever happens to its names.
pub struct Layer {
    path: PathBuf,
    id: FileId,
    format: Format,
    virtual_size: u64,
    file: File,
    qcow2: Option<Mapped>,
}

/// The qcow2 side of a layer.
struct Mapped {
    header: Header,
    access: FormatAccess<imago::file::File>,
    /// The compressed cluster inflated last, with its guest offset. Reads smaller than a cluster
    /// would inflate it again and again.
    inflated: Mutex<Option<(u64, Vec<u8>)>>,
}

/// What one layer has for a run of guest bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Run {
    /// Nothing: the layer below has it.
    Unallocated,
    /// Zeros, whatever lies below.
    Zero,
    /// Data from this host offset of the layer's file.
    Data { host: u64 },
    /// Compressed clusters.
    Compressed,
}

impl Layer {
    /// Opens the image at `path` for reading, in this format. Errors: those of opening; EINVAL when
    /// it is not a regular file; EIO when it should be a qcow2 and is not one, is damaged or needs
    /// an unsupported feature (see [`Header::read`]).
    pub fn open(path: &Path, format: Format) -> Result<Layer> {
        let file = open_image(path, false)?;
        Layer::of(path, file, format)
    }

    /// Opens a layer as [`Layer::open`] does, from an open file.
    pub(super) fn of(path: &Path, file: File, format: Format) -> Result<Layer> {
        let meta = file
            .metadata()
            .context(|| format!("cannot look at the image {}", path.display()))?;
        let qcow2 = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(Mapped::new(&file, path, meta.len())?),
        };
        Ok(Layer {
            path: path.to_path_buf(),
            id: FileId::of(&meta),
            format,
            virtual_size: qcow2
                .as_ref()
                .map_or(meta.len(), |mapped| mapped.header.virtual_size),
            file,
            qcow2,
        })
    }

    /// The path it was opened at.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Size of the disk in bytes; for a raw image the length of the file.
    pub fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The header of a qcow2; None for a raw image.
    pub fn header(&self) -> Option<&Header> {
        self.qcow2.as_ref().map(|mapped| &mapped.header)
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns whether any cluster is not "unallocated": data, compressed or explicit zeros. Then
    /// the layer differs from the one below it. A raw image always does. EIO when the tables are
    /// damaged.
    pub fn holds_data(&self) -> Result<bool> {
        if self.format == Format::Raw {
            return Ok(true);
        }
        let mut at = 0;
        while at < self.virtual_size {
            match self.run_at(at, self.virtual_size - at)? {
                (Run::Unallocated, len) => at += len,
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// Returns what is at guest offset `at`, and for how many bytes (1 to `max`; `max` is not 0)
    /// that goes on. Beyond the virtual size: zeros, whatever lies below.
    pub(super) fn run_at(&self, at: u64, max: u64) -> Result<(Run, u64)> {
        let Some(inside) = self.virtual_size.checked_sub(at).filter(|&n| n > 0) else {
            return Ok((Run::Zero, max));
        };
        let max = max.min(inside);
        let (run, len) = match &self.qcow2 {
            Some(mapped) => mapped.run_at(at, max),
            None => self.raw_run_at(at, max),
        }
        .context(|| format!("cannot find out where {} has its data", self.path.display()))?;
        if len == 0 {
            return Err(Error::damaged(format!(
                "{} has no mapping at guest offset {at}",
                self.path.display()
            )));
        }
        Ok((run, len.min(max)))
    }

    /// Finds data or a hole by the file system's map.
    fn raw_run_at(&self, at: u64, max: u64) -> io::Result<(Run, u64)> {
        match holes::run_at(&self.file, at, max) {
            Ok((true, len)) => Ok((Run::Data { host: at }, len)),
            Ok((false, len)) => Ok((Run::Zero, len)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EIO | libc::EINTR)) => Err(e),
            // A file system without such a map.
            Err(_) => self.sought_run_at(at, max),
        }
    }

    /// Finds data or a hole by SEEK_DATA. A file system without that shows everything as data.
    pub(super) fn sought_run_at(&self, at: u64, max: u64) -> io::Result<(Run, u64)> {
        let end = at + max;
        let data = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok((Run::Zero, max)),
            Err(Errno::INVAL) => return Ok((Run::Data { host: at }, max)),
            Err(error) => return Err(error.into()),
        };
        if data > at {
            return Ok((Run::Zero, data.min(end) - at));
        }
        // ENXIO: the file was cut at `at` meanwhile; `Chain::unchanged` will report it.
        let hole = match seek(&self.file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.clamp(at + 1, end),
            Err(Errno::NXIO) => end,
            Err(error) => return Err(error.into()),
        };
        Ok((Run::Data { host: at }, hole - at))
    }

    /// Fills `buf` from host offset `host` of the file; zeros past its end.
    pub(super) fn read_data(&self, host: u64, buf: &mut [u8]) -> Result<()> {
        read_zero_padded(&self.file, buf, host)
            .context(|| format!("cannot read the layer {}", self.path.display()))
    }

    /// Fills `buf` with the compressed clusters at guest offset `at`, all of which must be
    /// compressed. EIO when they do not inflate.
    pub(super) fn read_compressed(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mapped = self.qcow2.as_ref().ok_or_else(|| {
            Error::damaged(format!("{} has no compressed data", self.path.display()))
        })?;
        mapped
            .read_compressed(at, buf)
            .context(|| format!("cannot inflate data of the layer {}", self.path.display()))
    }

    /// Returns whether length or mtime of the open file differ from `since`.
    pub(super) fn differs_from(&self, since: &std::fs::Metadata) -> Result<bool> {
        let now = self
            .file
            .metadata()
            .context(|| format!("cannot look at the layer {}", self.path.display()))?;
        let state = |meta: &std::fs::Metadata| (meta.mtime(), meta.mtime_nsec(), meta.len());
        Ok(state(&now) != state(since))
    }
}

impl Mapped {
    fn new(file: &File, path: &Path, file_len: u64) -> Result<Mapped> {
        let header = Header::read(file, path)?.ok_or_else(|| {
            Error::damaged(format!(
                "{} should be a qcow2 image, but does not begin like one",
                path.display()
            ))
        })?;
        check_l1_entries(file, &header, file_len, path)?;
        let failed = || format!("cannot open {} as a qcow2 image", path.display());
        let own = file.try_clone().context(failed)?;
        let storage = imago::file::File::try_from(own).context(failed)?;
        // No layer below and no data file, whatever the header names: nothing but `file` is opened.
        let image = Qcow2::<imago::file::File>::builder(storage)
            .backing(None)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
            .context(failed)?;
        Ok(Mapped {
            header,
            access: FormatAccess::new(image),
            inflated: Mutex::new(None),
        })
    }

    fn run_at(&self, at: u64, max: u64) -> io::Result<(Run, u64)> {
        let (mapping, len) = self.access.get_shallow_mapping(at, max)?;
        let run = match mapping {
            ShallowMapping::Raw { offset, .. } => Run::Data { host: offset },
            ShallowMapping::Zero { explicit: true, .. } => Run::Zero,
            // Without an image below, imago reports unallocated clusters as zeros that are not
            // explicit.
            ShallowMapping::Zero { .. } => Run::Unallocated,
            ShallowMapping::Special { .. } => Run::Compressed,
            _ => {
                return Err(io::Error::other(
                    "imago named a layer below, and there is none",
                ));
            }
        };
        Ok((run, len))
    }

    fn read_compressed(&self, at: u64, mut buf: &mut [u8]) -> io::Result<()> {
        let cluster = self.header.cluster_size();
        for (at, len) in pieces(at, buf.len() as u64, cluster) {
            let within = at % cluster;
            let (now, rest) = buf.split_at_mut(len as usize);
            if len == cluster {
                self.inflate(at, now)?;
            } else {
                self.read_inflated(at - within, within as usize, now)?;
            }
            buf = rest;
        }
        Ok(())
    }

    /// Fills `buf`, a cluster long, with the compressed cluster at guest offset `at`.
    ///
    /// A stream that refers to bytes before its own beginning is damaged, and an error for qemu.
    /// imago would take whatever was in the buffer: any bytes this process had in memory. So it is
    /// inflated twice, over different bytes; compressed clusters are rare.
    fn inflate(&self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut again = vec![0xffu8; buf.len()];
        buf.fill(0);
        self.access.read(&mut *buf, at)?;
        self.access.read(again.as_mut_slice(), at)?;
        if *buf == *again {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "the compressed cluster at guest offset {at} refers to bytes before its beginning"
            )))
        }
    }

    /// Fills `buf` with a part of the compressed cluster at guest offset `at`, `within` bytes into
    /// it.
    fn read_inflated(&self, at: u64, within: usize, buf: &mut [u8]) -> io::Result<()> {
        let mut inflated = self.inflated.lock();
        if inflated.as_ref().is_none_or(|(held, _)| *held != at) {
            let mut bytes = vec![0u8; self.header.cluster_size() as usize];
            self.inflate(at, &mut bytes)?;
            *inflated = Some((at, bytes));
        }
        let part = inflated
            .as_ref()
            .and_then(|(_, bytes)| bytes.get(within..within.checked_add(buf.len())?))
            .ok_or_else(|| io::Error::other("a compressed cluster is shorter than a cluster"))?;
        buf.copy_from_slice(part);
        Ok(())
    }
}

/// Bits of an L1 entry that are the host offset of an L2 table (qcow2.rst).
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Verifies that all L2 tables lie in the file. imago takes one beyond the end for an empty table,
/// so a file that was cut short would silently lose data.
fn check_l1_entries(file: &File, header: &Header, file_len: u64, path: &Path) -> Result<()> {
    let mut table = vec![0u8; header.l1_size as usize * 8];
    read_zero_padded(file, &mut table, header.l1_table_offset)
        .context(|| format!("cannot read the L1 table of {}", path.display()))?;
    let beyond = table
        .chunks_exact(8)
        .any(|entry| be64(entry, 0) & L1_OFFSET >= file_len);
    if beyond {
        return Err(Error::damaged(format!(
            "{} has an L2 table beyond the end of the file (is it cut short?)",
            path.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
