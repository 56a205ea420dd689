//! An archive that is computed while it is read, never stored: a plain tar of `disk.qcow2` and, last,
//! `manifest.json`, whose length does not depend on the checksum in it. So every size and offset is
//! known before a byte of the disk is read.

use super::digest::Digest;
use crate::archive::manifest::{About, manifest_bytes, unix_seconds};
use crate::disk::{Chain, Flattened};
use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Size of a tar block in bytes; members are padded to it.
const BLOCK: u64 = 512;
/// Two blocks of zeros end a tar.
const TRAILER: u64 = 2 * BLOCK;
/// Says which layout keys are of; to be raised when the same layers make other bytes. Of states
/// that could change unseen, earlier versions remembered what may be wrong.
const LAYOUT_CONTEXT: &str = "boxlitefs 2026-11-29 plain archive of settled layers, layout 2";

/// An archive of one state of a box.
pub struct Export {
    chain: Arc<Chain>,
    about: About,
    disk: Flattened,
    disk_header: [u8; BLOCK as usize],
    manifest_header: [u8; BLOCK as usize],
    parts: Parts,
    digest: Digest,
}

/// Where the parts lie, as byte ranges of the archive.
struct Parts {
    disk_header: Range<u64>,
    disk: Range<u64>,
    manifest_header: Range<u64>,
    manifest: Range<u64>,
    len: u64,
}

impl Export {
    /// Works out the layout; no data is read. Errors: those of [`Flattened::plan`].
    pub fn plan(chain: Arc<Chain>, about: About) -> Result<Export> {
        let disk = Flattened::plan(Arc::clone(&chain))?;
        let manifest_len = manifest_bytes(&about, &[0; 32]).len() as u64;
        let disk_len = disk.len();
        let parts = Parts::of(disk_len, manifest_len);
        let modified = unix_seconds(about.changed_at);
        Ok(Export {
            disk_header: member_header("disk.qcow2", disk.len(), modified)?,
            manifest_header: member_header("manifest.json", manifest_len, modified)?,
            chain,
            about,
            disk,
            parts,
            digest: Digest::new(disk_len),
        })
    }

    /// The disk it is of.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
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
        for padding in [
            parts.disk.end..parts.manifest_header.start,
            parts.manifest.end..parts.len,
        ] {
            if let Some((_, part)) = overlap(&all, &padding, buf) {
                part.fill(0);
            }
        }
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
            let digest = self.complete_digest()?;
            copy_from(&manifest_bytes(&self.about, &digest), at, part);
        }
        Ok(len)
    }

    /// Takes bytes that [`read_at`](Export::read_at) gave from `offset` on along into the disk's
    /// checksum. Not part of reading: whoever waits for the bytes need not wait for this.
    pub fn take_along(&self, offset: u64, bytes: &[u8]) {
        let disk = &self.parts.disk;
        let skipped = usize::try_from(disk.start.saturating_sub(offset)).unwrap_or(usize::MAX);
        let at = offset.max(disk.start);
        let left = usize::try_from(disk.end.saturating_sub(at)).unwrap_or(usize::MAX);
        let bytes = bytes.get(skipped..).unwrap_or_default();
        let bytes = bytes.get(..left.min(bytes.len())).unwrap_or_default();
        self.digest.take(at - disk.start, bytes);
    }

    /// The sha256 of `disk.qcow2`, if it is known.
    pub fn digest(&self) -> Option<[u8; 32]> {
        self.digest.finished()
    }

    /// The sha256 of `disk.qcow2` is known from before.
    pub fn set_digest(&self, digest: [u8; 32]) {
        self.digest.set(digest);
    }

    /// Whether the checksum is behind what is taken along by more than this many bytes.
    pub(super) fn digest_lags(&self, bytes: usize) -> bool {
        self.digest.lags(bytes)
    }

    /// The flattened disk in it.
    pub(super) fn disk(&self) -> &Flattened {
        &self.disk
    }

    /// Where `disk.qcow2` lies in the archive.
    pub(super) fn disk_range(&self) -> Range<u64> {
        self.parts.disk.clone()
    }

    /// Hash of all that the archive's bytes follow from: the state of each layer, and what the manifest
    /// says. The same in another process.
    pub fn state_key(&self) -> [u8; 32] {
        let mut hasher = self.disk_hasher();
        hasher.update(&manifest_bytes(&self.about, &[0; 32]));
        hasher.finalize().into()
    }

    /// Hash of all that the bytes of `disk.qcow2` follow from.
    pub fn disk_key(&self) -> [u8; 32] {
        self.disk_hasher().finalize().into()
    }

    fn disk_hasher(&self) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new_derive_key(LAYOUT_CONTEXT);
        for state in self.chain.states() {
            hasher.update(&state.bytes());
        }
        // Where a raw layer has holes does not follow from its state on every file system.
        for window in 0..self.disk.windows() {
            hasher.update(&self.disk.clusters_in(window).to_le_bytes());
        }
        hasher
    }

    /// Bytes of `disk.qcow2`, checked to be of the planned state.
    fn read_disk(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(at, buf)?;
        self.chain.unchanged()
    }

    /// The sha256 of `disk.qcow2`: what was taken along is in it, the rest is read now.
    pub(super) fn complete_digest(&self) -> Result<[u8; 32]> {
        self.digest.complete(|at, buf| self.read_disk(at, buf))
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
    use std::os::fd::AsRawFd;
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

    /// mke2fs leaves unwritten extents, and what of them is in the page cache counts as data for
    /// SEEK_DATA.
    #[test]
    #[ignore = "needs programs"]
    fn what_was_read_of_a_raw_base_changes_no_byte_of_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        let file = File::create_new(&base).unwrap();
        file.set_len(256 << 20).unwrap();
        succeed("mke2fs", &["-q", "-F", "-t", "ext4", text(&base)]);
        file.sync_all().unwrap();
        // SAFETY: the descriptor is open; the rest are numbers.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let top = dir.path().join("top.qcow2");
        create_overlay(&top, &base, Format::Raw, 256 << 20).unwrap();
        let before = export(&top);
        std::fs::read(&base).unwrap();
        let after = export(&top);
        assert_eq!(before.disk_key(), after.disk_key());
        assert_eq!(before.len(), after.len());
        assert!(whole(&before) == whole(&after));
        let disk = dir.path().join("disk.qcow2");
        let bytes = whole(&after);
        std::fs::write(&disk, &bytes[after.disk_range().start as usize..]).unwrap();
        let said = succeed("qemu-img", &["compare", text(&base), text(&disk)]);
        assert!(said.contains("identical"), "{said}");
    }

    #[test]
    #[ignore = "needs programs"]
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
    #[ignore = "needs programs"]
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
    #[ignore = "needs programs"]
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
                        again.take_along(at as u64, &bytes[..len]);
                    }
                });
            }
        });
        assert!(again.digest().is_some());
    }

    #[test]
    #[ignore = "needs programs"]
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
    #[ignore = "needs programs"]
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
