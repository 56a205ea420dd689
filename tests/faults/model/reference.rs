//! The expected contents of disks, and their comparison with real ones, which qemu-img reads.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use blake3::Hash;
use sha2::{Digest, Sha256};

use super::operation::{Fill, Write};
use crate::common::*;

/// The unit of guest writes: a quarter of a cluster, so that layers share clusters.
pub const BLOCK: u64 = 16 * 1024;

/// Blocks per cluster.
const CLUSTER: u64 = 4;

/// Blocks of the smallest disk.
const BLOCKS: u64 = (8 << 20) / BLOCK;

/// An archive that boxes are imported from, and the bytes of its disk.
pub struct Original {
    pub archive: PathBuf,
    bytes: Vec<u8>,
}

/// Returns the originals: a small disk and a larger one.
pub fn originals() -> &'static [Original; 2] {
    static ORIGINALS: OnceLock<[Original; 2]> = OnceLock::new();
    ORIGINALS.get_or_init(|| {
        // With names of their own, because other tests replace their archives.
        ["8M", "16M"].map(|size| {
            let archive = make_archive(&format!("model-{size}.boxlite"), &["--size", size]);
            let disk = disk_in(&fs::read(&archive).expect("an archive")).expect("its disk");
            let place = tempfile::tempdir().expect("a temporary directory");
            let image = place.path().join("disk.qcow2");
            fs::write(&image, disk).expect("a disk");
            let bytes = guest_bytes(&image);
            Original { archive, bytes }
        })
    })
}

/// The contents of a disk: an original and the writes since.
#[derive(Clone)]
pub struct Disk {
    original: usize,
    written: Arc<BTreeMap<u64, Fill>>,
}

impl Disk {
    /// Returns whether the model of another disk differs.
    pub fn differs_from(&self, other: &Disk) -> bool {
        self.original != other.original || self.written != other.written
    }

    /// Makes the contents of an original.
    pub fn original(which: usize) -> Disk {
        Disk {
            original: which,
            written: Arc::default(),
        }
    }

    /// Applies a guest write; returns the command for qemu-io.
    pub fn write(&mut self, write: &Write) -> String {
        let written = Arc::make_mut(&mut self.written);
        let (first, blocks) = match write.fill {
            Fill::Byte(_) => (
                u64::from(write.at) % (BLOCKS - u64::from(write.blocks)),
                u64::from(write.blocks),
            ),
            Fill::ZeroCluster => (u64::from(write.at) % (BLOCKS / CLUSTER) * CLUSTER, CLUSTER),
        };
        for block in first..first + blocks {
            written.insert(block, write.fill);
        }
        let (at, length) = (first * BLOCK, blocks * BLOCK);
        match write.fill {
            Fill::Byte(byte) => format!("write -q -P {byte} {at} {length}"),
            Fill::ZeroCluster => format!("write -q -z {at} {length}"),
        }
    }

    /// Returns whether BoxLite reads the disk correctly. It treats a zero cluster as unallocated,
    /// and reads the layer below.
    pub fn is_boxlites(&self) -> bool {
        !self.written.values().any(|fill| *fill == Fill::ZeroCluster)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = originals()[self.original].bytes.clone();
        for (block, fill) in &*self.written {
            let at = usize::try_from(block * BLOCK).expect("a small disk");
            let fill = match fill {
                Fill::Byte(byte) => *byte,
                Fill::ZeroCluster => 0,
            };
            bytes[at..at + BLOCK as usize].fill(fill);
        }
        bytes
    }

    fn hash(&self) -> Hash {
        type Content = (usize, Arc<BTreeMap<u64, Fill>>);
        static KNOWN: Mutex<Option<HashMap<Content, Hash>>> = Mutex::new(None);
        let content = (self.original, self.written.clone());
        if let Some(hash) = KNOWN
            .lock()
            .expect("a lock")
            .get_or_insert_default()
            .get(&content)
        {
            return *hash;
        }
        let hash = blake3::hash(&self.bytes());
        let mut known = KNOWN.lock().expect("a lock");
        known.get_or_insert_default().insert(content, hash);
        hash
    }

    /// Fails unless qemu-img reads these contents from an image and its chain.
    pub fn assert_in_image(&self, image: &Path, what: &str) {
        let bytes = guest_bytes(image);
        if blake3::hash(&bytes) != self.hash() {
            panic!("{what}: {}", self.difference(&bytes));
        }
    }

    /// Fails unless an archive has these contents and a correct checksum.
    pub fn assert_in_archive(&self, path: &Path, what: &str) {
        let archive = fs::read(path).unwrap_or_else(|e| panic!("{what}: {}: {e}", path.display()));
        if let Err(difference) = self.compare_archive(&archive) {
            panic!("{what}: {difference}");
        }
    }

    /// Compares an archive with this disk; the error describes the difference.
    pub fn compare_archive(&self, archive: &[u8]) -> Result<(), String> {
        let disk = disk_in(archive).map_err(|e| e.to_string())?;
        // Exports of the same state have the same bytes, so most were compared before.
        static JUDGED: Mutex<Option<HashMap<Hash, Hash>>> = Mutex::new(None);
        let key = blake3::hash(&disk);
        let judged = JUDGED
            .lock()
            .expect("a lock")
            .get_or_insert_default()
            .get(&key)
            .copied();
        if judged == Some(self.hash()) {
            return Ok(());
        }
        let image = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(image.path(), disk).expect("a disk");
        let bytes = guest_bytes(image.path());
        let hash = blake3::hash(&bytes);
        let mut judged = JUDGED.lock().expect("a lock");
        judged.get_or_insert_default().insert(key, hash);
        if hash == self.hash() {
            Ok(())
        } else {
            Err(self.difference(&bytes))
        }
    }

    fn difference(&self, bytes: &[u8]) -> String {
        let wanted = self.bytes();
        if bytes.len() != wanted.len() {
            return format!("a disk of {} bytes, not {}", bytes.len(), wanted.len());
        }
        let size = BLOCK as usize;
        let blocks = wanted.chunks(size).zip(bytes.chunks(size)).enumerate();
        let wrong: Vec<String> = blocks
            .filter(|(_, (wanted, found))| wanted != found)
            .map(|(block, (wanted, found))| {
                format!(
                    "{block}: {:#04x}, not {:#04x} ({:?})",
                    found[0],
                    wanted[0],
                    self.written.get(&(block as u64))
                )
            })
            .collect();
        format!(
            "{} blocks differ: {}",
            wrong.len(),
            wrong[..wrong.len().min(12)].join(", ")
        )
    }
}

/// Returns `disk.qcow2` of an archive, plain or compressed. Fails unless it matches the checksum in
/// the manifest.
fn disk_in(archive: &[u8]) -> io::Result<Vec<u8>> {
    let plain;
    let archive = match archive {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            plain = zstd::decode_all(archive)?;
            &plain
        }
        archive => archive,
    };
    let (mut disk, mut manifest) = (Vec::new(), Vec::new());
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let into = match entry.path_bytes().as_ref() {
            b"disk.qcow2" => &mut disk,
            b"manifest.json" => &mut manifest,
            other => {
                let name = String::from_utf8_lossy(other).into_owned();
                return Err(io::Error::other(format!("{name} in an archive")));
            }
        };
        entry.read_to_end(into)?;
    }
    let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    let sum = Sha256::digest(&disk);
    let sum: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
    if manifest["container_disk_checksum"] != format!("sha256:{sum}") {
        return Err(io::Error::other(format!("not the disk of {manifest}")));
    }
    Ok(disk)
}

/// Reads the guest disk of an image and its chain, with qemu-img.
fn guest_bytes(image: &Path) -> Vec<u8> {
    fs::read(raw_disk(image).path()).expect("its bytes")
}

/// An export that is read in two parts, with other operations in between.
pub struct Reader {
    pub what: String,
    /// The number of the box, and whether this is its live disk.
    pub of: usize,
    pub is_live: bool,
    /// The disk, name or configuration of the box has changed since, so EIO is allowed.
    pub may_fail: bool,
    disk: Disk,
    file: File,
    begun: Vec<u8>,
}

impl Reader {
    /// Opens an export and reads its first bytes.
    pub fn begin(path: &Path, what: &str, of: usize, is_live: bool, disk: Disk) -> Reader {
        let file = File::open(path).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut begun = Vec::new();
        (&file)
            .take(100_000)
            .read_to_end(&mut begun)
            .unwrap_or_else(|e| panic!("{what}: {e}"));
        Reader {
            what: what.to_owned(),
            of,
            is_live,
            may_fail: false,
            disk,
            file,
            begun,
        }
    }

    /// Reads the rest, which must belong to the same state as the first part. If that state has
    /// changed, the read may fail instead.
    pub fn finish(mut self) {
        match self.file.read_to_end(&mut self.begun) {
            Ok(_) => {
                if let Err(difference) = self.disk.compare_archive(&self.begun) {
                    panic!("reading on in {}: {difference}", self.what);
                }
            }
            Err(e) => assert!(
                self.may_fail && e.raw_os_error() == Some(libc::EIO),
                "reading on in {}: {e}",
                self.what
            ),
        }
    }
}
