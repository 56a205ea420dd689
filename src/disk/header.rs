//! The header of a qcow2 image, read with suspicion.
//!
//! Field offsets are those of qemu's `docs/interop/qcow2.rst`.

use super::bytes::{COMPRESSED, be32, be64, slice};
use super::features::reject_features;
use super::file::open_image;
use super::{Format, read_zero_padded};
use crate::{Context, Error, Result};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// "QFI\xfb", the first four bytes of every qcow2 image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of a version 2 header; in version 3 the field at byte 100 says it.
const V2_HEADER_LENGTH: u64 = 72;
/// Shortest version 3 header.
const V3_HEADER_LENGTH: u64 = 104;
/// Header extension: the end of the extensions.
const EXTENSION_END: u32 = 0;
/// Header extension: the format of the backing file, as a string.
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;
/// Header extension: names of feature bits, 48 bytes each.
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_F857;
/// Header extension: the name of an external data file.
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
/// Bytes read of a first cluster if the backing name, which follows all extensions, ends in them.
const PAGE: u64 = 4096;
/// Longest backing file name (qcow2.rst, byte 16 of the header).
pub(super) const MAX_BACKING_NAME: usize = 1023;
/// Most entries of an L1 table: 32 MiB, qemu's and imago's limit.
pub(super) const MAX_L1_ENTRIES: u64 = 4 << 20;

/// The header of a qcow2 image, checked: tables are aligned and inside the file, the L1 table
/// covers the virtual size, and no feature is in use that would change how the image reads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes, 9..=21.
    pub cluster_bits: u32,
    /// Size of the disk as the guest sees it, in bytes.
    pub virtual_size: u64,
    /// The layer below, if there is one.
    pub backing: Option<Backing>,
    /// Number of entries in the L1 table.
    pub l1_size: u32,
    /// Host offset of the L1 table in bytes.
    pub l1_table_offset: u64,
    /// Host offset of the refcount table in bytes.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// log2 of the bits of a refcount, 0..=6 (4 in version 2).
    pub refcount_order: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Host offset of the table of internal snapshots in bytes; meaningless if there are none.
    pub snapshots_offset: u64,
    /// The compatible feature bits, as stored (0 in version 2).
    pub compatible_features: u64,
    /// The autoclear feature bits, as stored (0 in version 2).
    pub autoclear_features: u64,
    /// Length of the header structure in bytes (72 in version 2).
    pub header_length: u32,
    /// An extension names an external data file. No feature bit makes use of it, or reading the
    /// header would have been an error.
    pub names_data_file: bool,
    /// Where the backing name is in the file, if there is one.
    pub(super) name: Option<NameSpan>,
    /// First byte after the extensions' end marker; None if there is no end marker.
    pub(super) extensions_end: Option<u64>,
}

/// The layer below an image, as its header names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// The path as stored; a relative one is relative to the directory of the image.
    pub path: PathBuf,
    /// The format as the extension says; None without the extension (then the magic decides).
    pub format: Option<Format>,
}

/// Where a backing name is, in bytes of the image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct NameSpan {
    pub offset: u64,
    pub len: u64,
}

impl NameSpan {
    /// Returns the first byte after the name.
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

impl Header {
    /// Reads the header of `file`; `path` is only for messages. `Ok(None)`: there is no qcow2
    /// magic, so it is a raw image. EIO: it is a qcow2 that is malformed, or has an unsupported
    /// feature (extended L2 entries, encryption, external data file, a compression other than
    /// deflate, dirty or corrupt, unknown incompatible bits). The message names it.
    pub fn read(file: &File, path: &Path) -> Result<Option<Header>> {
        let unreadable = || format!("cannot read the header of {}", path.display());
        let mut fixed = [0u8; V3_HEADER_LENGTH as usize];
        read_zero_padded(file, &mut fixed, 0).context(unreadable)?;
        if !fixed.starts_with(&MAGIC) {
            return Ok(None);
        }
        let file_len = file.metadata().context(unreadable)?.len();
        let fault = |what: String| Error::damaged(format!("{} {what}", path.display()));

        let mut header = Header::fixed_fields(&fixed, path)?;
        header.check_tables(file_len, path)?;

        // The backing name and the extensions both lie in the first cluster (qcow2.rst).
        header.name = header.place_of_name(&fixed, path)?;
        // Mostly in the first page. Finding out which layer reads which takes thousands of headers.
        let wanted = match header.name {
            Some(name) if name.end() <= PAGE => PAGE.min(header.cluster_size()),
            _ => header.cluster_size(),
        };
        let mut first_cluster = vec![0u8; wanted as usize];
        read_zero_padded(file, &mut first_cluster, 0).context(unreadable)?;
        let format = header.read_extensions(&first_cluster, path)?;
        if let Some(place) = header.name {
            let name = slice(&first_cluster, place.offset, place.len)
                .ok_or_else(|| fault("has its backing name outside of the first cluster".into()))?;
            let name = std::str::from_utf8(name)
                .map_err(|e| fault("has a backing name that is not UTF-8".into()).caused_by(e))?;
            header.backing = Some(Backing {
                path: PathBuf::from(name),
                format,
            });
        }
        Ok(Some(header))
    }

    /// Reads the header of the file at `path` as [`Header::read`] does. Errors besides: those of
    /// opening it.
    pub fn open(path: &Path) -> Result<Option<Header>> {
        Header::read(&open_image(path, false)?, path)
    }

    /// Returns the path of the layer below. A relative path is taken from the directory of the
    /// image at `image`, not from the working directory.
    pub fn backing_path(&self, image: &Path) -> Option<PathBuf> {
        let stored = &self.backing.as_ref()?.path;
        Some(match image.parent() {
            Some(directory) => directory.join(stored),
            None => stored.clone(),
        })
    }

    /// Size of a cluster in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the host offsets that a compressed cluster reaches over, by its L2 entry: the lower
    /// `62 - (cluster_bits - 8)` bits are where it starts, the others up to bit 61 the number of
    /// 512-byte sectors beyond the one it starts in (qcow2.rst).
    pub(super) fn compressed_place(&self, entry: u64) -> Range<u64> {
        let offset_bits = 62 - (self.cluster_bits - 8);
        let start = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
        start..(start & !511) + sectors * 512
    }

    /// Parses the fields at fixed places, and checks what needs nothing else.
    fn fixed_fields(fixed: &[u8; V3_HEADER_LENGTH as usize], path: &Path) -> Result<Header> {
        let fault = |what: String| Err(Error::damaged(format!("{} {what}", path.display())));
        let version = be32(fixed, 4);
        let cluster_bits = be32(fixed, 20);
        let crypt_method = be32(fixed, 32);
        if version != 2 && version != 3 {
            return fault(format!(
                "is qcow2 version {version}; only 2 and 3 are known"
            ));
        }
        if !(9..=21).contains(&cluster_bits) {
            return fault(format!(
                "has clusters of 2^{cluster_bits} bytes; qcow2 has 2^9 to 2^21"
            ));
        }
        match crypt_method {
            0 => {}
            1 => return fault("is encrypted (AES); encrypted images are not supported".into()),
            2 => return fault("is encrypted (LUKS); encrypted images are not supported".into()),
            n => return fault(format!("is encrypted with the unknown method {n}")),
        }
        let v3 = version == 3;
        if v3 {
            reject_features(be64(fixed, 72), path)?;
        }
        let header = Header {
            version,
            cluster_bits,
            virtual_size: be64(fixed, 24),
            backing: None,
            l1_size: be32(fixed, 36),
            l1_table_offset: be64(fixed, 40),
            refcount_table_offset: be64(fixed, 48),
            refcount_table_clusters: be32(fixed, 56),
            refcount_order: if v3 { be32(fixed, 96) } else { 4 },
            nb_snapshots: be32(fixed, 60),
            snapshots_offset: be64(fixed, 64),
            compatible_features: if v3 { be64(fixed, 80) } else { 0 },
            autoclear_features: if v3 { be64(fixed, 88) } else { 0 },
            header_length: if v3 {
                be32(fixed, 100)
            } else {
                V2_HEADER_LENGTH as u32
            },
            names_data_file: false,
            name: None,
            extensions_end: None,
        };
        if header.refcount_order > 6 {
            return fault(format!(
                "has refcounts of 2^{} bits; qcow2 has at most 2^6",
                header.refcount_order
            ));
        }
        let length = u64::from(header.header_length);
        if v3 && (length < V3_HEADER_LENGTH || length > header.cluster_size()) {
            return fault(format!("has an impossible header length of {length} bytes"));
        }
        Ok(header)
    }

    /// Verifies the tables. The L1 table must be aligned, inside the file and long enough for the
    /// virtual size; the refcount table must be aligned and begin inside the file.
    fn check_tables(&self, file_len: u64, path: &Path) -> Result<()> {
        let fault = |what: &str| Err(Error::damaged(format!("{} {what}", path.display())));
        let cluster = self.cluster_size();
        let entries = u64::from(self.l1_size);
        if entries > MAX_L1_ENTRIES {
            return fault("has an L1 table of more than 32 MiB");
        }
        // An L2 table is one cluster of 8-byte entries, a cluster of the guest each.
        let per_entry = 1u64 << (2 * self.cluster_bits - 3);
        if self.virtual_size.div_ceil(per_entry) > entries {
            return fault("has an L1 table too short for its virtual size");
        }
        if !self.l1_table_offset.is_multiple_of(cluster)
            || (entries > 0 && self.l1_table_offset == 0)
        {
            return fault("has an L1 table that is not at a cluster of its own");
        }
        let l1_end = self.l1_table_offset.checked_add(entries * 8);
        if l1_end.is_none_or(|end| end > file_len) {
            return fault(
                "has an L1 table that reaches beyond the end of the file (is it cut short?)",
            );
        }
        if !self.refcount_table_offset.is_multiple_of(cluster) || self.refcount_table_offset == 0 {
            return fault("has a refcount table that is not at a cluster of its own");
        }
        if self.refcount_table_offset >= file_len {
            return fault("has a refcount table beyond the end of the file (is it cut short?)");
        }
        if self.nb_snapshots > 0
            && (!self.snapshots_offset.is_multiple_of(cluster) || self.snapshots_offset == 0)
        {
            return fault("has a snapshot table that is not at a cluster of its own");
        }
        Ok(())
    }

    /// Finds the backing name. imago wants it to end before the end of the cluster.
    fn place_of_name(&self, fixed: &[u8], path: &Path) -> Result<Option<NameSpan>> {
        let fault = |what: &str| Err(Error::damaged(format!("{} {what}", path.display())));
        let place = NameSpan {
            offset: be64(fixed, 8),
            len: u64::from(be32(fixed, 16)),
        };
        if place.offset == 0 {
            return Ok(None);
        }
        if place.len > MAX_BACKING_NAME as u64 {
            return fault("has a backing name of more than 1023 bytes");
        }
        if place.len == 0 {
            return fault("has an empty backing name");
        }
        if place.offset < u64::from(self.header_length) {
            return fault("has its backing name inside of the header");
        }
        if place.end() >= self.cluster_size() {
            return fault("has its backing name outside of the first cluster");
        }
        Ok(Some(place))
    }

    /// Walks the extensions, which end at an end marker, or (as qemu reads them) where the backing
    /// name begins. Returns the backing format.
    fn read_extensions(&mut self, first_cluster: &[u8], path: &Path) -> Result<Option<Format>> {
        let fault = |what: String| Error::damaged(format!("{} {what}", path.display()));
        let limit = self.name.map_or(self.cluster_size(), |name| name.offset);
        let mut at = u64::from(self.header_length);
        let mut format = None;
        while at.saturating_add(8) <= limit {
            let (kind, len) = match slice(first_cluster, at, 8) {
                Some(head) => (be32(head, 0), u64::from(be32(head, 4))),
                None => break,
            };
            let data_at = at + 8;
            if len > limit - data_at {
                return Err(fault("has a header extension that is too long".into()));
            }
            let data = slice(first_cluster, data_at, len).unwrap_or_default();
            at = data_at + len.next_multiple_of(8);
            match kind {
                EXTENSION_END => {
                    self.extensions_end = Some(at);
                    break;
                }
                EXTENSION_BACKING_FORMAT => {
                    let named = backing_format(data, path)?;
                    if format.is_some_and(|earlier| earlier != named) {
                        return Err(fault("names two different backing formats".into()));
                    }
                    format = Some(named);
                }
                EXTENSION_DATA_FILE => self.names_data_file = true,
                // imago indexes into the last name without looking at its length.
                EXTENSION_FEATURE_NAMES if len % 48 != 0 => {
                    return Err(fault(format!("has a feature name table of {len} bytes")));
                }
                _ => {}
            }
        }
        Ok(format)
    }
}

/// Parses a backing format extension. "file" is the older name of raw.
fn backing_format(name: &[u8], path: &Path) -> Result<Format> {
    match name {
        b"qcow2" => Ok(Format::Qcow2),
        b"raw" | b"file" => Ok(Format::Raw),
        other => Err(Error::damaged(format!(
            "{} has a backing file of format {:?}; only qcow2 and raw are supported",
            path.display(),
            String::from_utf8_lossy(other)
        ))),
    }
}

#[cfg(test)]
mod tests;
