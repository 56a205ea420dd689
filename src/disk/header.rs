//! The first cluster of a qcow2 image: reading it with suspicion, and rebasing it in place.
//!
//! Field offsets are those of qemu's `docs/interop/qcow2.rst`.

use super::{FileId, Format, read_zero_padded};
use crate::{Context, Error, Result};
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

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
/// What is read of a first cluster if the backing name, which follows all extensions, ends in it.
const PAGE: u64 = 4096;
/// Longest backing file name (qcow2.rst, byte 16 of the header).
pub(super) const MAX_BACKING_NAME: usize = 1023;
/// Most entries of an L1 table: 32 MiB, qemu's and imago's limit.
pub(super) const MAX_L1_ENTRIES: u64 = 4 << 20;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// What the header of a qcow2 image says, checked: tables are aligned and inside the file, the L1
/// table covers the virtual size, and no feature is in use that would change how the image reads.
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
    /// An extension names an external data file (which no feature bit puts to use, or reading the
    /// header would have been an error).
    pub names_data_file: bool,
    /// Where the backing name lies in the file, if there is one.
    name: Option<Place>,
    /// First byte after the extensions' end marker; None if there is no end marker.
    extensions_end: Option<u64>,
}

/// The layer below an image, as its header names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// The path as stored; a relative one is relative to the directory of the image.
    pub path: PathBuf,
    /// The format as the extension says; None without the extension (then the magic decides).
    pub format: Option<Format>,
}

/// Where a backing name lies: bytes of the image file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    offset: u64,
    len: u64,
}

impl Place {
    fn end(self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

impl Header {
    /// Reads the header of `file`; `path` is for the message of an error only. `Ok(None)`: no qcow2
    /// magic, so this is a raw image. EIO: it is qcow2, but insane, or with a feature that is
    /// refused (extended L2 entries, encryption, external data file, a compression other than
    /// deflate, dirty or corrupt, unknown incompatible bits); the message names it.
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
        // Mostly in the first page: thousands of headers are read to find out who reads what.
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

    /// As [`Header::read`], of the file at `path`. Errors besides: those of opening it.
    pub fn open(path: &Path) -> Result<Option<Header>> {
        Header::read(&open_image(path, false)?, path)
    }

    /// The path of the layer below, a relative one taken from the directory of the image at `image`
    /// (not from the working directory).
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

    /// Everything of fixed place, and the checks that need nothing else.
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
            refuse_features(be64(fixed, 72), path)?;
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

    /// The L1 table must be aligned, inside the file and long enough for the virtual size; the
    /// refcount table must be aligned and begin inside the file.
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

    /// Where the backing name lies. imago wants it to end before the end of the cluster.
    fn place_of_name(&self, fixed: &[u8], path: &Path) -> Result<Option<Place>> {
        let fault = |what: &str| Err(Error::damaged(format!("{} {what}", path.display())));
        let place = Place {
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

/// Says no to every incompatible feature, by name.
fn refuse_features(bits: u64, path: &Path) -> Result<()> {
    let known = [
        (
            INCOMPATIBLE_DIRTY,
            "is marked dirty: it was not closed properly; `qemu-img check -r all` repairs it",
        ),
        (
            INCOMPATIBLE_CORRUPT,
            "is marked corrupt; `qemu-img check -r all` may repair it",
        ),
        (
            INCOMPATIBLE_DATA_FILE,
            "keeps its data in an external data file, which is not supported",
        ),
        (
            INCOMPATIBLE_COMPRESSION,
            "has clusters compressed with zstd; only deflate is supported",
        ),
        (
            INCOMPATIBLE_EXTENDED_L2,
            "has extended L2 entries, which are not supported",
        ),
    ];
    for (bit, message) in known {
        if bits & bit != 0 {
            return Err(Error::damaged(format!("{} {message}", path.display())));
        }
    }
    if bits != 0 {
        return Err(Error::damaged(format!(
            "{} needs unknown qcow2 features ({bits:#x}); a newer qemu made it",
            path.display()
        )));
    }
    Ok(())
}

/// The format that a backing format extension names. "file" is the older name of raw.
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

/// Opens an image. O_NONBLOCK, lest a FIFO in its place hang us; what is no regular file is refused
/// with EINVAL.
pub(super) fn open_image(path: &Path, writable: bool) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .context(|| format!("cannot open the image {}", path.display()))?;
    let meta = file
        .metadata()
        .context(|| format!("cannot look at the image {}", path.display()))?;
    if !meta.is_file() {
        return Err(Error::new(
            libc::EINVAL,
            format!("the image {} is no regular file", path.display()),
        ));
    }
    Ok(file)
}

/// Makes the qcow2 image at `image` name `new_backing` as the layer below it, in place. The format
/// of the layer below stays as it is stored. Contents do not change, so access and modification
/// times are put back. Does nothing if the image names that path already.
///
/// Crash-safe and repeatable: the new name is written to a place nothing refers to and synced, then
/// offset and length (bytes 8 to 19, within one sector) in one write and synced.
///
/// EOPNOTSUPP, with the file untouched (copy the layer instead): the image is raw or has no backing
/// file; no end marker in its header extensions; the path is empty, not UTF-8 or over 1023 bytes;
/// no room for it in the first cluster; or the file at `new_backing` is of another format than
/// the header says. EIO as [`Header::read`]; other errors are those of the system calls.
pub fn rebase(image: &Path, new_backing: &Path) -> Result<()> {
    rebase_opened(&open_image(image, true)?, image, new_backing)
}

/// Likewise, if the image still is the file `id`.
///
/// # Errors
/// As [`rebase`]; EBUSY when another file has its name by now.
pub fn rebase_this(image: &Path, id: FileId, new_backing: &Path) -> Result<()> {
    let file = open_image(image, true)?;
    if FileId::of_open(&file, image)? != id {
        return Err(Error::busy(format!(
            "{} was replaced at this moment; try again",
            image.display()
        )));
    }
    rebase_opened(&file, image, new_backing)
}

fn rebase_opened(file: &File, image: &Path, new_backing: &Path) -> Result<()> {
    let refused = |why: &str| {
        Error::new(
            libc::EOPNOTSUPP,
            format!("cannot rebase {} in place: {why}", image.display()),
        )
    };
    let header = Header::read(file, image)?.ok_or_else(|| refused("it is a raw image"))?;
    let backing = header
        .backing
        .as_ref()
        .ok_or_else(|| refused("it has no backing file"))?;
    if backing.path.as_os_str() == new_backing.as_os_str() {
        return Ok(());
    }
    let name = new_backing.as_os_str().as_bytes();
    if name.is_empty() || name.len() > MAX_BACKING_NAME || name.contains(&0) {
        return Err(refused("the new path is not 1 to 1023 bytes"));
    }
    if std::str::from_utf8(name).is_err() {
        return Err(refused("the new path is not UTF-8"));
    }
    if let Some(format) = backing.format {
        let target = image.parent().unwrap_or(Path::new("")).join(new_backing);
        check_same_format(&target, format).map_err(|why| refused(&why))?;
    }
    let place = header
        .unused_place(name.len() as u64)
        .map_err(|why| refused(&why))?;
    write_backing(file, image, place, name)
}

/// Takes the dirty bit from a copy of an image: its reference counts may be wrong, its tables are right, and
/// nobody writes to a copy. `of` is what the original is called.
///
/// # Errors
/// Those of reading and writing it.
pub fn forget_dirty(copy: &File, of: &Path) -> Result<()> {
    const VERSION: u64 = 4;
    const INCOMPATIBLE: u64 = 72;
    let message = || format!("cannot copy {}", of.display());
    let mut version = [0; 4];
    let mut bits = [0; 8];
    copy.read_exact_at(&mut version, VERSION).context(message)?;
    copy.read_exact_at(&mut bits, INCOMPATIBLE)
        .context(message)?;
    let known = u64::from_be_bytes(bits);
    if u32::from_be_bytes(version) < 3 || known & 1 == 0 {
        return Ok(());
    }
    copy.write_all_at(&(known & !1).to_be_bytes(), INCOMPATIBLE)
        .context(message)
}

/// The format at `target` must be the stored one: a "raw" extension over a qcow2 silently reads
/// zeros. A target that is not there (yet) cannot be compared.
fn check_same_format(target: &Path, stored: Format) -> Result<(), String> {
    let found = match Header::open(target) {
        Ok(Some(_)) => Format::Qcow2,
        Ok(None) => Format::Raw,
        Err(e) if e.errno() == libc::ENOENT => return Ok(()),
        Err(e) => return Err(e.to_string()),
    };
    if found == stored {
        return Ok(());
    }
    Err(format!(
        "its header says the layer below is {}, but {} is {}",
        stored.name(),
        target.display(),
        found.name()
    ))
}

impl Header {
    /// A place of `len` bytes in the first cluster that nothing uses: after the extensions, outside
    /// of the current name, ending before the end of the cluster (where imago would refuse it).
    fn unused_place(&self, len: u64) -> Result<Place, String> {
        let start = self
            .extensions_end
            .ok_or("its header extensions have no end marker")?;
        let free_after = |offset: u64| Place { offset, len };
        let before = free_after(start);
        let place = match self.name {
            Some(name) if before.end() > name.offset => free_after(start.max(name.end())),
            _ => before,
        };
        if place.end() >= self.cluster_size() {
            return Err(format!(
                "its first cluster has no room for a path of {len} bytes"
            ));
        }
        Ok(place)
    }
}

/// The two synced writes of a rebase.
fn write_backing(file: &File, image: &Path, place: Place, name: &[u8]) -> Result<()> {
    let failed = || format!("cannot write the header of {}", image.display());
    let meta = file.metadata().context(failed)?;
    // A crash after this leaves bytes that nothing refers to.
    write_untimed(file, name, place.offset, &meta).context(failed)?;
    sync(file, image)?;
    let mut pointer = [0u8; 12];
    pointer[..8].copy_from_slice(&place.offset.to_be_bytes());
    pointer[8..].copy_from_slice(&(name.len() as u32).to_be_bytes());
    let mut old = [0u8; 12];
    file.read_exact_at(&mut old, 8).context(failed)?;
    // A crash after this leaves the old or the new path, both whole.
    let written = write_untimed(file, &pointer, 8, &meta)
        .context(failed)
        .and_then(|()| sync(file, image));
    if written.is_err() {
        // The kernel takes what a flush failed for as written. With the old path back, whoever tries again
        // writes the new one again, and does not find it there already.
        let taken_back = write_untimed(file, &old, 8, &meta).and_then(|()| file.sync_all());
        if taken_back.is_err() {
            let unsettled = (image.to_owned(), FileId::of(&meta));
            UNSETTLED.lock().push(unsettled);
        }
    }
    written
}

/// Images that name either path after a loss of power: what a rebase wrote could not be flushed, nor could the
/// old path.
static UNSETTLED: Mutex<Vec<(PathBuf, FileId)>> = Mutex::new(Vec::new());

/// Has the images for which [`rebase`] failed and could not take that back name on disk what they are read to
/// name. To be called before a layer loses a name or goes that one of them may name. What is no longer where it
/// was is left as it is.
///
/// # Errors
/// EIO and others of the system calls: not yet.
pub fn settle_headers() -> Result<()> {
    let unsettled = UNSETTLED.lock().clone();
    for (image, id) in unsettled {
        if FileId::at(&image).is_ok_and(|found| found == id) {
            write_again(&open_image(&image, true)?, &image)?;
        }
        UNSETTLED.lock().retain(|(_, settled)| *settled != id);
    }
    Ok(())
}

/// Writes the backing path as it is read. What a flush failed for counts as written; this does not.
fn write_again(file: &File, image: &Path) -> Result<()> {
    let failed = || format!("cannot write the header of {}", image.display());
    let meta = file.metadata().context(failed)?;
    if let Some(name) = Header::read(file, image)?.and_then(|header| header.name) {
        for place in [name, Place { offset: 8, len: 12 }] {
            // A path has 1023 bytes at most.
            let mut bytes = vec![0; place.len as usize];
            file.read_exact_at(&mut bytes, place.offset)
                .and_then(|()| write_untimed(file, &bytes, place.offset, &meta))
                .context(failed)?;
        }
    }
    sync(file, image)
}

/// fsync with a message.
fn sync(file: &File, image: &Path) -> Result<()> {
    file.sync_all()
        .context(|| format!("cannot sync {}", image.display()))
}

/// A write that leaves the times as `meta` has them, for readers who watch the mtime.
fn write_untimed(
    file: &File,
    bytes: &[u8],
    offset: u64,
    meta: &std::fs::Metadata,
) -> std::io::Result<()> {
    file.write_all_at(bytes, offset)?;
    let times = [
        libc::timespec {
            tv_sec: meta.atime(),
            tv_nsec: meta.atime_nsec(),
        },
        libc::timespec {
            tv_sec: meta.mtime(),
            tv_nsec: meta.mtime_nsec(),
        },
    ];
    futimens(file, &times)
}

/// futimens(2): std's `File::set_times` cannot name every timestamp that stat returns.
pub(super) fn futimens(file: &File, times: &[libc::timespec; 2]) -> std::io::Result<()> {
    // SAFETY: the descriptor is open as long as `file` is, and the two timespecs are only read.
    match unsafe { libc::futimens(file.as_raw_fd(), times.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// `len` bytes of `bytes` from `at`, if they are there.
fn slice(bytes: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..at.checked_add(usize::try_from(len).ok()?)?)
}

/// A big-endian u32 at `at`; what lies past the end of `bytes` is zeros.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |four| u32::from_be_bytes(*four))
}

/// A big-endian u64 at `at`; what lies past the end of `bytes` is zeros.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |eight| u64::from_be_bytes(*eight))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::create_overlay;
    use crate::disk::judges::{
        check_clean, create, guest_bytes, info, qemu_io, run, succeed, text,
    };

    /// A base of 4 MiB and, under a second name, the same inode.
    fn base_with_two_names(dir: &Path) -> (PathBuf, PathBuf) {
        let base = dir.join("base.qcow2");
        create(&base, "compat=1.1", None, "4M");
        qemu_io(&base, &["write -P 1 0 4M"]);
        let other = dir.join("the-other-name-of-the-base.qcow2");
        std::fs::hard_link(&base, &other).unwrap();
        (base, other)
    }

    fn times(path: &Path) -> (i64, i64, i64, i64) {
        let meta = std::fs::metadata(path).unwrap();
        (
            meta.mtime(),
            meta.mtime_nsec(),
            meta.atime(),
            meta.atime_nsec(),
        )
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_rebased_image_reads_the_same_through_the_other_name() {
        let dir = tempfile::tempdir().unwrap();
        let (base, other) = base_with_two_names(dir.path());
        for compat in ["0.10", "1.1"] {
            for cluster in [512, 1024, 4096, 65536, 2 << 20] {
                let image = dir.path().join(format!("{compat}-{cluster}.qcow2"));
                let options = format!("compat={compat},cluster_size={cluster}");
                create(&image, &options, Some((&base, "qcow2")), "4M");
                qemu_io(&image, &["write -P 2 1M 64k"]);
                let (bytes, before) = (guest_bytes(&image), times(&image));
                for path in [&other, &base, &other, &base] {
                    rebase(&image, path).unwrap();
                    let said = info(&image);
                    assert_eq!(said["backing-filename"], text(path), "{compat} {cluster}");
                    assert_eq!(said["backing-filename-format"], "qcow2");
                    check_clean(&image);
                    assert!(guest_bytes(&image) == bytes, "{compat} {cluster}");
                }
                let after = times(&image);
                assert_eq!((before.0, before.1), (after.0, after.1));
            }
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn an_overlay_of_ours_is_rebased_to_longer_and_shorter_paths() {
        let dir = tempfile::tempdir().unwrap();
        let (base, other) = base_with_two_names(dir.path());
        let image = dir.path().join("overlay.qcow2");
        create_overlay(&image, &base, Format::Qcow2, 4 << 20).unwrap();
        // A path as long as a header can hold, relative so that the filesystem takes it too.
        let up = "./".repeat((MAX_BACKING_NAME - text(&other).len()) / 2);
        let longest = dir.path().join(up).join("the-other-name-of-the-base.qcow2");
        for path in [&longest, &base, &longest, &other] {
            rebase(&image, path).unwrap();
            let header = Header::open(&image).unwrap().unwrap();
            assert_eq!(header.backing.unwrap().path.as_os_str(), path.as_os_str());
            check_clean(&image);
            succeed("qemu-img", &["compare", text(&image), text(&base)]);
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_rebase_interrupted_after_the_name_is_repeatable() {
        let dir = tempfile::tempdir().unwrap();
        let (base, other) = base_with_two_names(dir.path());
        let image = dir.path().join("overlay.qcow2");
        create(&image, "compat=1.1", Some((&base, "qcow2")), "4M");
        let header = Header::open(&image).unwrap().unwrap();
        let name = text(&other).as_bytes();
        let place = header.unused_place(name.len() as u64).unwrap();
        open_image(&image, true)
            .unwrap()
            .write_all_at(name, place.offset)
            .unwrap();
        assert_eq!(Header::open(&image).unwrap(), Some(header));
        assert_eq!(info(&image)["backing-filename"], text(&base));
        rebase(&image, &other).unwrap();
        assert_eq!(info(&image)["backing-filename"], text(&other));
        check_clean(&image);
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_rebase_that_is_refused_leaves_the_file_untouched() {
        let dir = tempfile::tempdir().unwrap();
        let (base, other) = base_with_two_names(dir.path());
        let raw = dir.path().join("base.raw");
        std::fs::write(&raw, [0u8; 4096]).unwrap();
        let refused = |image: &Path, to: &Path| {
            let before = (
                std::fs::read(image).unwrap(),
                times(image).0,
                times(image).1,
            );
            let error = rebase(image, to).unwrap_err();
            assert_eq!(error.errno(), libc::EOPNOTSUPP, "{error}");
            let after = (
                std::fs::read(image).unwrap(),
                times(image).0,
                times(image).1,
            );
            assert!(before == after);
            error.to_string()
        };
        assert!(refused(&raw, &other).contains("raw"));
        assert!(refused(&base, &other).contains("no backing file"));
        let image = dir.path().join("overlay.qcow2");
        create(
            &image,
            "compat=1.1,cluster_size=1k",
            Some((&base, "qcow2")),
            "4M",
        );
        assert!(refused(&image, &raw).contains("base.raw is raw"));
        let long = PathBuf::from(format!("/{}", "x".repeat(1023)));
        assert!(refused(&image, &long).contains("1023"));
        let no_room = PathBuf::from(format!("/{}", "x".repeat(200)).repeat(5));
        assert!(refused(&image, &no_room).contains("no room"));
        // The name directly after the header: old version 2 images without extensions.
        let old = dir.path().join("old.qcow2");
        create(&old, "compat=0.10", Some((&base, "qcow2")), "4M");
        let file = open_image(&old, true).unwrap();
        file.write_all_at(text(&base).as_bytes(), 72).unwrap();
        file.write_all_at(&72u64.to_be_bytes(), 8).unwrap();
        assert!(refused(&old, &other).contains("end marker"));
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_rebase_to_the_same_path_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (base, _) = base_with_two_names(dir.path());
        let image = dir.path().join("overlay.qcow2");
        create_overlay(&image, &base, Format::Qcow2, 4 << 20).unwrap();
        let before = (
            std::fs::read(&image).unwrap(),
            std::fs::metadata(&image).unwrap().ctime_nsec(),
        );
        rebase(&image, &base).unwrap();
        let after = (
            std::fs::read(&image).unwrap(),
            std::fs::metadata(&image).unwrap().ctime_nsec(),
        );
        assert!(before == after);
    }

    #[test]
    #[ignore = "needs programs"]
    fn an_image_whose_features_change_how_it_reads_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let made = |name: &str, arguments: &[&str]| {
            let image = dir.path().join(name);
            let mut all = vec!["create", "-q", "-f", "qcow2"];
            all.extend(arguments);
            all.extend([text(&image), "1M"]);
            succeed("qemu-img", &all);
            let error = Header::open(&image).unwrap_err();
            assert_eq!(error.errno(), libc::EIO);
            error.to_string()
        };
        let secret = ["--object", "secret,id=s,data=x", "-o"];
        let encrypted = |format: &str| {
            let option = format!("encrypt.format={format},encrypt.key-secret=s");
            let mut all = secret.to_vec();
            all.push(&option);
            all.iter().map(|s| s.to_string()).collect::<Vec<_>>()
        };
        let luks = encrypted("luks");
        let luks: Vec<&str> = luks.iter().map(String::as_str).collect();
        assert!(made("luks", &luks).contains("LUKS"));
        assert!(made("l2", &["-o", "extended_l2=on"]).contains("extended L2"));
        let data = format!("data_file={}", text(&dir.path().join("data.raw")));
        assert!(made("data", &["-o", &data]).contains("external data file"));
        assert!(made("zstd", &["-o", "compression_type=zstd"]).contains("zstd"));
        // qemu-img makes no AES images any more, and no dirty ones on demand.
        let changed = |name: &str, at: u64, bytes: &[u8]| {
            let image = dir.path().join(name);
            create(&image, "compat=1.1", None, "1M");
            open_image(&image, true)
                .unwrap()
                .write_all_at(bytes, at)
                .unwrap();
            Header::open(&image).unwrap_err().to_string()
        };
        assert!(changed("aes", 32, &1u32.to_be_bytes()).contains("AES"));
        assert!(changed("dirty", 72, &1u64.to_be_bytes()).contains("dirty"));
        assert!(changed("corrupt", 72, &2u64.to_be_bytes()).contains("corrupt"));
        assert!(changed("future", 72, &(1u64 << 40).to_be_bytes()).contains("unknown"));
    }

    #[test]
    #[ignore = "needs programs"]
    fn an_insane_header_is_an_error_and_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let good = dir.path().join("good.qcow2");
        create(
            &good,
            "compat=1.1",
            Some((Path::new("/dev/null"), "raw")),
            "1M",
        );
        let bytes = std::fs::read(&good).unwrap();
        let image = dir.path().join("bad.qcow2");
        for at in 0..256 {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] = value;
                std::fs::write(&image, &bad).unwrap();
                // Whatever we accept, imago must open or refuse; nothing may panic.
                if let Ok(Some(_)) = Header::open(&image) {
                    let _ = crate::disk::Layer::open(&image, Format::Qcow2)
                        .and_then(|layer| layer.holds_data());
                }
            }
        }
        for len in [4, 71, 72, 103, 104, 200, 65536, 131072] {
            std::fs::write(&image, &bytes[..len]).unwrap();
            assert!(Header::open(&image).is_err(), "cut to {len} bytes");
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn what_has_no_magic_is_raw_and_what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        for bytes in [&b""[..], b"QF", b"#!/bin/sh"] {
            std::fs::write(&raw, bytes).unwrap();
            assert_eq!(Header::open(&raw).unwrap(), None);
        }
        assert_eq!(Header::open(dir.path()).unwrap_err().errno(), libc::EINVAL);
        let fifo = dir.path().join("fifo");
        assert!(run("mkfifo", &[text(&fifo)]).status.success());
        assert_eq!(Header::open(&fifo).unwrap_err().errno(), libc::EINVAL);
    }
}
