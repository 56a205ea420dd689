//! An archive that is computed while it is read, never stored: a plain tar of `disk.qcow2` and, last,
//! `manifest.json`, whose length does not depend on the checksum in it. So every size and offset is
//! known before a byte of the disk is read.

use super::manifest::{About, manifest_bytes, unix_seconds};
use crate::disk::{Chain, Flattened};
use crate::{Error, Result};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Size of a tar block in bytes; members are padded to it.
const BLOCK: u64 = 512;
/// Two blocks of zeros end a tar.
const TRAILER: u64 = 2 * BLOCK;
/// Bytes read at a time when the checksum has to catch up.
const CATCH_UP: u64 = 1 << 20;
/// Most bytes that are kept because they were read ahead of the checksum (the kernel's read-ahead
/// comes in several requests at once, in any order).
const MOST_AHEAD: u64 = 8 << 20;

/// An archive of one state of a box.
pub struct Export {
    chain: Arc<Chain>,
    about: About,
    disk: Flattened,
    disk_header: [u8; BLOCK as usize],
    manifest_header: [u8; BLOCK as usize],
    parts: Parts,
    digest: Mutex<Progress>,
    /// Held by whoever reads the disk only to catch up, so that two do not read the same.
    catching_up: Mutex<()>,
}

/// Where the parts lie, as byte ranges of the archive.
struct Parts {
    disk_header: Range<u64>,
    disk: Range<u64>,
    manifest_header: Range<u64>,
    manifest: Range<u64>,
    len: u64,
}

/// How far the disk's checksum is.
struct Progress {
    hasher: Sha256,
    /// Bytes of the disk in `hasher`.
    hashed: u64,
    /// Pieces that were read ahead, by their offset.
    ahead: BTreeMap<u64, Vec<u8>>,
    ahead_bytes: u64,
    finished: Option<[u8; 32]>,
}

impl Export {
    /// Works out the layout; no data is read. Errors: those of [`Flattened::plan`].
    pub fn plan(chain: Arc<Chain>, about: About) -> Result<Export> {
        let disk = Flattened::plan(Arc::clone(&chain))?;
        let manifest_len = manifest_bytes(&about, &[0; 32]).len() as u64;
        let parts = Parts::of(disk.len(), manifest_len);
        let modified = unix_seconds(about.changed_at);
        Ok(Export {
            disk_header: member_header("disk.qcow2", disk.len(), modified)?,
            manifest_header: member_header("manifest.json", manifest_len, modified)?,
            chain,
            about,
            disk,
            parts,
            digest: Mutex::new(Progress::new()),
            catching_up: Mutex::new(()),
        })
    }

    /// Length of the archive in bytes, exactly.
    #[allow(clippy::len_without_is_empty)] // A tar is never empty.
    pub fn len(&self) -> u64 {
        self.parts.len
    }

    /// Fills `buf` with the archive's bytes from `offset` on, completely unless the archive ends;
    /// returns how many bytes that are. Thread-safe. EIO when the disk changed since the plan, or is
    /// damaged: never a mixture.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let left = self.parts.len.saturating_sub(offset);
        let len = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        let buf = buf.get_mut(..len).unwrap_or_default();
        let all = offset..offset.saturating_add(len as u64);
        let parts = &self.parts;
        buf.fill(0); // Padding and trailer.
        if let Some((at, part)) = overlap(&all, &parts.disk_header, buf) {
            copy_from(&self.disk_header, at, part);
        }
        if let Some((at, part)) = overlap(&all, &parts.disk, buf) {
            self.read_disk(at, part)?;
        }
        if let Some((at, part)) = overlap(&all, &parts.manifest_header, buf) {
            copy_from(&self.manifest_header, at, part);
        }
        if let Some((at, part)) = overlap(&all, &parts.manifest, buf) {
            let digest = self.disk_digest()?;
            copy_from(&manifest_bytes(&self.about, &digest), at, part);
        }
        Ok(len)
    }

    /// Bytes of `disk.qcow2`, checked to be of the planned state, and taken along into the checksum.
    fn read_disk(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(at, buf)?;
        self.chain.unchanged()?;
        self.digest.lock().take(at, buf, self.disk.len());
        Ok(())
    }

    /// The sha256 of `disk.qcow2`: what was read already is in it, the rest is read now.
    fn disk_digest(&self) -> Result<[u8; 32]> {
        if let Some(digest) = self.digest.lock().finished {
            return Ok(digest);
        }
        let _alone = self.catching_up.lock();
        let mut piece = vec![0u8; CATCH_UP as usize];
        loop {
            // The lock is not held while reading: others go on, and what they read counts.
            let (finished, hashed) = {
                let progress = self.digest.lock();
                (progress.finished, progress.hashed)
            };
            if let Some(digest) = finished {
                return Ok(digest);
            }
            let len = (self.disk.len() - hashed).min(CATCH_UP) as usize;
            let piece = piece.get_mut(..len).unwrap_or_default();
            self.read_disk(hashed, piece)?;
        }
    }
}

impl Parts {
    fn of(disk_len: u64, manifest_len: u64) -> Parts {
        let after = |start: u64, len: u64| start..start + len;
        let disk_header = after(0, BLOCK);
        let disk = after(disk_header.end, disk_len);
        let manifest_header = after(disk.end.next_multiple_of(BLOCK), BLOCK);
        let manifest = after(manifest_header.end, manifest_len);
        Parts {
            len: manifest.end.next_multiple_of(BLOCK) + TRAILER,
            disk_header,
            disk,
            manifest_header,
            manifest,
        }
    }
}

impl Progress {
    fn new() -> Progress {
        Progress {
            hasher: Sha256::new(),
            hashed: 0,
            ahead: BTreeMap::new(),
            ahead_bytes: 0,
            finished: None,
        }
    }

    /// Takes `bytes` of the disk, `at` bytes into it, into the checksum of `disk_len` bytes, now or
    /// when the gap before them is filled. What is too far ahead is read again when needed.
    fn take(&mut self, at: u64, bytes: &[u8], disk_len: u64) {
        if self.finished.is_some() {
            return;
        }
        let end = at.saturating_add(bytes.len() as u64);
        if at > self.hashed {
            let near = end - self.hashed <= MOST_AHEAD;
            let room = self.ahead_bytes + bytes.len() as u64 <= MOST_AHEAD;
            if near && room && !self.ahead.contains_key(&at) {
                self.ahead_bytes += bytes.len() as u64;
                self.ahead.insert(at, bytes.to_vec());
            }
            return;
        }
        self.hash(at, bytes);
        while let Some(first) = self.ahead.first_entry() {
            if *first.key() > self.hashed {
                break;
            }
            let (at, bytes) = first.remove_entry();
            self.ahead_bytes -= bytes.len() as u64;
            self.hash(at, &bytes);
        }
        if self.hashed == disk_len {
            self.finished = Some(self.hasher.finalize_reset().into());
        }
    }

    /// Hashes what of `bytes`, `at` or more bytes into the disk, is not hashed yet; `at` is not beyond
    /// what is hashed.
    fn hash(&mut self, at: u64, bytes: &[u8]) {
        let known = usize::try_from(self.hashed - at).unwrap_or(usize::MAX);
        if let Some(new) = bytes.get(known..) {
            self.hasher.update(new);
            self.hashed += new.len() as u64;
        }
    }
}

/// The tar header of a member: a regular file of root's, mode 0644. Sizes from 8 GiB on are written
/// in base 256, which GNU tar, tar-rs and Python read.
fn member_header(name: &str, len: u64, modified: u64) -> Result<[u8; BLOCK as usize]> {
    let mut header = tar::Header::new_gnu();
    header
        .set_path(name)
        .map_err(|e| Error::io(format!("cannot write a tar header for {name}"), e))?;
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(len);
    header.set_mtime(modified);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_cksum();
    Ok(*header.as_bytes())
}

/// The part of `buf` (the archive's bytes `all`) that belongs to `part`, and how far into `part` it
/// begins.
fn overlap<'a>(
    all: &Range<u64>,
    part: &Range<u64>,
    buf: &'a mut [u8],
) -> Option<(u64, &'a mut [u8])> {
    let (start, end) = (all.start.max(part.start), all.end.min(part.end));
    if start >= end {
        return None;
    }
    let slice = buf.get_mut((start - all.start) as usize..(end - all.start) as usize)?;
    Some((start - part.start, slice))
}

/// Copies from `bytes`, `at` bytes into them.
fn copy_from(bytes: &[u8], at: u64, buf: &mut [u8]) {
    let from = bytes.get(at as usize..).unwrap_or_default();
    for (to, byte) in buf.iter_mut().zip(from) {
        *to = *byte;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::Manifest;
    use crate::disk::judges::{Numbers, check_clean, create, qemu_io, succeed, text};
    use crate::disk::{Format, create_overlay};
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::path::{Path, PathBuf};

    /// A chain with some MiB of data on a raw base.
    fn box_disk(dir: &Path) -> PathBuf {
        let base = dir.join("base.raw");
        let bytes: Vec<u8> = (0..3u32 << 20).map(|i| (i / 7) as u8).collect();
        std::fs::write(&base, bytes).unwrap();
        let top = dir.join("top.qcow2");
        create_overlay(&top, &base, Format::Raw, 1 << 30).unwrap();
        qemu_io(
            &top,
            &["write -P 3 10M 20M", "write -P 4 700M 1M", "write -z 0 1M"],
        );
        top
    }

    fn export(top: &Path) -> Export {
        let home = top.parent().unwrap();
        let owner = std::fs::metadata(home).unwrap().uid();
        let chain = Arc::new(Chain::open(top, home, owner).unwrap());
        let about = About {
            box_name: Some("web".into()),
            image: "alpine:latest".into(),
            options: serde_json::json!({"rootfs": {"Image": "alpine:latest"}}),
            changed_at: chain.changed_at(),
        };
        Export::plan(chain, about).unwrap()
    }

    fn whole(export: &Export) -> Vec<u8> {
        let mut bytes = vec![1u8; export.len() as usize + 10];
        let len = export.read_at(0, &mut bytes).unwrap();
        assert_eq!(len as u64, export.len());
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn tar_and_python_unpack_it_and_the_checksum_is_right() {
        let dir = tempfile::tempdir().unwrap();
        let top = box_disk(dir.path());
        let archive = dir.path().join("export.boxlite");
        std::fs::write(&archive, whole(&export(&top))).unwrap();
        let listed = succeed("tar", &["--utc", "-tvf", text(&archive)]);
        assert_eq!(listed.lines().count(), 2, "{listed}");
        assert!(
            listed
                .lines()
                .all(|line| line.starts_with("-rw-r--r-- 0/0 ")),
            "{listed}"
        );
        let script = "import sys, tarfile, json, hashlib, os\n\
            t = tarfile.open(sys.argv[1])\n\
            assert t.getnames() == ['disk.qcow2', 'manifest.json'], t.getnames()\n\
            m = json.load(t.extractfile('manifest.json'))\n\
            d = t.extractfile('disk.qcow2').read()\n\
            assert m['container_disk_checksum'] == 'sha256:' + hashlib.sha256(d).hexdigest()\n\
            assert {i.mtime for i in t} == {int(os.stat(sys.argv[2]).st_mtime)}\n\
            print(m['version'], m['box_name'])";
        let said = succeed("python3", &["-c", script, text(&archive), text(&top)]);
        assert_eq!(said.trim(), "3 web");
        let out = dir.path().join("out");
        std::fs::create_dir(&out).unwrap();
        succeed("tar", &["-xf", text(&archive), "-C", text(&out)]);
        let disk = out.join("disk.qcow2");
        check_clean(&disk);
        let said = succeed("qemu-img", &["compare", text(&top), text(&disk)]);
        assert!(said.contains("identical"), "{said}");
        let sum = succeed("sha256sum", &[text(&disk)]);
        let manifest = std::fs::read(out.join("manifest.json")).unwrap();
        let checksum = Manifest::parse(&manifest).unwrap().disk_digest.unwrap();
        let hex: String = checksum.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(sum.split(' ').next(), Some(hex.as_str()));
    }

    #[test]
    fn two_exports_of_one_state_are_the_same_bytes_in_whatever_order_they_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let top = box_disk(dir.path());
        let expected = whole(&export(&top));
        let mut numbers = Numbers(99);
        // Backwards: the manifest first, so that the checksum is computed on demand.
        for piece in [4096usize, 131_072, 1_000_003] {
            let again = export(&top);
            let mut bytes = vec![1u8; expected.len()];
            let starts: Vec<usize> = (0..bytes.len()).step_by(piece).collect();
            for &start in starts.iter().rev() {
                let end = (start + piece).min(bytes.len());
                let len = again.read_at(start as u64, &mut bytes[start..end]).unwrap();
                assert_eq!(len, end - start);
            }
            assert!(bytes == expected, "backwards by {piece}");
        }
        let again = export(&top);
        for _ in 0..300 {
            let at = numbers.below(expected.len() as u64 + 5000) as usize;
            let mut part = vec![1u8; 1 + numbers.below(200_000) as usize];
            let len = again.read_at(at as u64, &mut part).unwrap();
            let there = expected.get(at..(at + part.len()).min(expected.len()));
            assert!(part[..len] == *there.unwrap_or_default(), "at {at}");
        }
    }

    #[test]
    fn reading_ahead_in_several_threads_still_hashes_along() {
        let dir = tempfile::tempdir().unwrap();
        let top = box_disk(dir.path());
        let expected = whole(&export(&top));
        let again = export(&top);
        let piece = 128 << 10;
        let next = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let at = piece * next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if at >= expected.len() {
                            break;
                        }
                        let mut bytes = vec![0u8; piece];
                        let len = again.read_at(at as u64, &mut bytes).unwrap();
                        assert!(bytes[..len] == expected[at..at + len]);
                    }
                });
            }
        });
        let progress = again.digest.lock();
        assert_eq!(progress.ahead_bytes, 0);
        assert!(progress.finished.is_some());
    }

    #[test]
    fn pieces_in_a_jumble_are_hashed_once_each_and_in_order() {
        let data: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let digest: [u8; 32] = Sha256::digest(&data).into();
        let mut numbers = Numbers(5);
        for _ in 0..20 {
            let mut progress = Progress::new();
            while progress.finished.is_none() {
                let near = progress.hashed + numbers.below(100_000);
                let at = near.saturating_sub(numbers.below(100_000)).min(999_999) as usize;
                let end = (at + 1 + numbers.below(50_000) as usize).min(data.len());
                progress.take(at as u64, &data[at..end], data.len() as u64);
            }
            assert_eq!(progress.finished, Some(digest));
            assert_eq!(progress.ahead_bytes, 0);
        }
    }

    #[test]
    fn what_is_read_far_ahead_is_not_kept() {
        let mut progress = Progress::new();
        let piece = vec![0u8; 1 << 20];
        for at in 1..1000u64 {
            progress.take(at << 20, &piece, 2000 << 20);
        }
        assert!(progress.ahead_bytes <= MOST_AHEAD);
    }

    #[test]
    fn a_disk_of_eight_gibibytes_and_more_is_listed_with_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("large.qcow2");
        create(&image, "preallocation=metadata", None, "9G");
        let export = export(&image);
        let archive = File::create(dir.path().join("export.boxlite")).unwrap();
        archive.set_len(export.len()).unwrap();
        // All but the data (zeros) and the manifest (its checksum takes a while).
        for range in [0..BLOCK, export.parts.manifest_header.clone()] {
            let mut bytes = vec![0u8; (range.end - range.start) as usize];
            export.read_at(range.start, &mut bytes).unwrap();
            archive.write_all_at(&bytes, range.start).unwrap();
        }
        let size = export.disk.len();
        assert!(size > 9 << 30);
        let path = dir.path().join("export.boxlite");
        let listed = succeed("tar", &["-tvf", text(&path)]);
        assert!(
            listed.contains(&size.to_string()) && listed.contains("manifest.json"),
            "{listed}"
        );
        let script = "import sys, tarfile; print([i.size for i in tarfile.open(sys.argv[1])])";
        let said = succeed("python3", &["-c", script, text(&path)]);
        let manifest = export.parts.manifest.end - export.parts.manifest.start;
        assert_eq!(said.trim(), format!("[{size}, {manifest}]"));
        let mut archive = tar::Archive::new(File::open(&path).unwrap());
        let sizes: Vec<u64> = archive
            .entries_with_seek()
            .unwrap()
            .map(|entry| entry.unwrap().size())
            .collect();
        assert_eq!(sizes, [size, manifest]);
    }

    #[test]
    fn a_disk_that_changes_while_it_is_read_is_an_error_and_no_mixture() {
        let dir = tempfile::tempdir().unwrap();
        let top = box_disk(dir.path());
        let export = export(&top);
        let mut bytes = vec![0u8; 1 << 20];
        export.read_at(0, &mut bytes).unwrap();
        qemu_io(&top, &["write -P 9 10M 64k"]);
        assert_eq!(
            export.read_at(1 << 20, &mut bytes).unwrap_err().errno(),
            libc::EIO
        );
        let end = export.len() - 2048;
        assert_eq!(
            export.read_at(end, &mut bytes).unwrap_err().errno(),
            libc::EIO
        );
    }
}
