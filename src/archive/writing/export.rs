//! Plain archives, computed while they are read and never stored: a tar of `disk.qcow2` and, last,
//! `manifest.json`. The manifest's length does not depend on the checksum in it, so every size and
//! offset is known before a byte of the disk is read.

use super::digest::DiskDigest;
use crate::archive::manifest::{About, manifest_bytes, unix_seconds};
use crate::disk::{Chain, Flattened};
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::sync::Arc;

/// Size of a tar block in bytes; members are padded to it.
const BLOCK: u64 = 512;
/// Two blocks of zeros end a tar.
const TRAILER: u64 = 2 * BLOCK;
/// The layout that keys are of. Change it when the same layers make other bytes. Earlier versions
/// remembered what may be wrong of states that could change unseen.
const LAYOUT_CONTEXT: &str = "boxlitefs 2026-11-29 plain archive of settled layers, layout 2";

/// An archive of one state of a box.
pub struct Export {
    chain: Arc<Chain>,
    about: About,
    disk: Flattened,
    disk_header: [u8; BLOCK as usize],
    manifest_header: [u8; BLOCK as usize],
    layout: ArchiveLayout,
    digest: DiskDigest,
}

/// The parts of the archive, as byte ranges.
struct ArchiveLayout {
    disk_header: Range<u64>,
    disk: Range<u64>,
    manifest_header: Range<u64>,
    manifest: Range<u64>,
    len: u64,
}

impl Export {
    /// Computes the layout; reads no data. Errors: those of [`Flattened::plan`].
    pub fn plan(chain: Arc<Chain>, about: About) -> Result<Export> {
        let disk = Flattened::plan(Arc::clone(&chain))?;
        let manifest_len = manifest_bytes(&about, &[0; 32]).len() as u64;
        let disk_len = disk.len();
        let layout = ArchiveLayout::of(disk_len, manifest_len);
        let modified = unix_seconds(about.changed_at);
        Ok(Export {
            disk_header: member_header("disk.qcow2", disk.len(), modified)?,
            manifest_header: member_header("manifest.json", manifest_len, modified)?,
            chain,
            about,
            disk,
            layout,
            digest: DiskDigest::new(disk_len),
        })
    }

    /// The disk it is of.
    pub fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    /// Length of the archive in bytes, exactly.
    #[allow(clippy::len_without_is_empty)] // A tar is never empty.
    pub fn len(&self) -> u64 {
        self.layout.len
    }

    /// Fills `buf` with the archive's bytes from `offset` on, completely unless the archive ends.
    /// Returns how many bytes that are. Thread-safe. EIO when the disk changed since the plan, or
    /// is damaged: never a mixture.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let left = self.layout.len.saturating_sub(offset);
        let len = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        let buf = buf.get_mut(..len).unwrap_or_default();
        let all = offset..offset.saturating_add(len as u64);
        let layout = &self.layout;
        for padding in [
            layout.disk.end..layout.manifest_header.start,
            layout.manifest.end..layout.len,
        ] {
            if let Some((_, part)) = overlap(&all, &padding, buf) {
                part.fill(0);
            }
        }
        if let Some((at, part)) = overlap(&all, &layout.disk_header, buf) {
            copy_from(&self.disk_header, at, part);
        }
        if let Some((at, part)) = overlap(&all, &layout.disk, buf) {
            self.read_disk(at, part)?;
        }
        if let Some((at, part)) = overlap(&all, &layout.manifest_header, buf) {
            copy_from(&self.manifest_header, at, part);
        }
        if let Some((at, part)) = overlap(&all, &layout.manifest, buf) {
            let digest = self.complete_digest()?;
            copy_from(&manifest_bytes(&self.about, &digest), at, part);
        }
        Ok(len)
    }

    /// Feeds bytes that [`read_at`](Export::read_at) returned for `offset` to the disk's checksum.
    /// Reading does not do this, so that a reader need not wait for it.
    pub fn take_along(&self, offset: u64, bytes: &[u8]) {
        let disk = &self.layout.disk;
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

    /// Sets the sha256 of `disk.qcow2`, known from before.
    pub fn set_digest(&self, digest: [u8; 32]) {
        self.digest.set(digest);
    }

    /// Returns whether the checksum lags by more than this many bytes.
    pub(super) fn digest_lags(&self, bytes: usize) -> bool {
        self.digest.lags(bytes)
    }

    /// Returns whether the checksum can use these bytes of the archive now.
    pub(super) fn digest_wants(&self, range: Range<u64>) -> bool {
        let disk = &self.layout.disk;
        let (start, end) = (range.start.max(disk.start), range.end.min(disk.end));
        start < end && self.digest.wants(start - disk.start..end - disk.start)
    }

    /// The flattened disk in it.
    pub(super) fn disk(&self) -> &Flattened {
        &self.disk
    }

    /// Where `disk.qcow2` lies in the archive.
    pub(super) fn disk_range(&self) -> Range<u64> {
        self.layout.disk.clone()
    }

    /// Returns a hash of everything that determines the archive's bytes: the state of each layer,
    /// and the manifest. It is the same in another process.
    pub fn state_key(&self) -> [u8; 32] {
        let mut hasher = self.disk_hasher();
        hasher.update(&manifest_bytes(&self.about, &[0; 32]));
        hasher.finalize().into()
    }

    /// Returns a hash of everything that determines the bytes of `disk.qcow2`.
    pub fn disk_key(&self) -> [u8; 32] {
        self.disk_hasher().finalize().into()
    }

    fn disk_hasher(&self) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new_derive_key(LAYOUT_CONTEXT);
        for state in self.chain.states() {
            hasher.update(&state.bytes());
        }
        // On some file systems, the holes of a raw layer do not follow from its state.
        for window in 0..self.disk.windows() {
            hasher.update(&self.disk.clusters_in(window).to_le_bytes());
        }
        hasher
    }

    /// Reads bytes of `disk.qcow2`, and verifies that they are of the planned state.
    fn read_disk(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.disk.read_at(at, buf)?;
        self.chain.unchanged()
    }

    /// Returns the sha256 of `disk.qcow2` as it can be read now, whatever was known of it.
    ///
    /// # Errors
    /// EIO when the disk changed since the plan, or is damaged.
    pub fn read_digest(&self) -> Result<[u8; 32]> {
        const PIECE: u64 = 1 << 20;
        let len = self.layout.disk.end - self.layout.disk.start;
        let mut hasher = Sha256::new();
        let mut piece = vec![0; PIECE.min(len) as usize];
        let mut at = 0;
        while at < len {
            let part = piece.get_mut(..(len - at).min(PIECE) as usize);
            let part = part.unwrap_or_default();
            self.read_disk(at, part)?;
            hasher.update(&part);
            at += part.len() as u64;
        }
        Ok(hasher.finalize().into())
    }

    /// Returns the sha256 of `disk.qcow2`. Bytes that were not fed to it yet are read now.
    pub(super) fn complete_digest(&self) -> Result<[u8; 32]> {
        self.digest.complete(|at, buf| self.read_disk(at, buf))
    }
}

impl ArchiveLayout {
    fn of(disk_len: u64, manifest_len: u64) -> ArchiveLayout {
        let after = |start: u64, len: u64| start..start + len;
        let disk_header = after(0, BLOCK);
        let disk = after(disk_header.end, disk_len);
        let manifest_header = after(disk.end.next_multiple_of(BLOCK), BLOCK);
        let manifest = after(manifest_header.end, manifest_len);
        ArchiveLayout {
            len: manifest.end.next_multiple_of(BLOCK) + TRAILER,
            disk_header,
            disk,
            manifest_header,
            manifest,
        }
    }
}

/// Returns the tar header of a member: a regular file of root, mode 0644. Sizes from 8 GiB on are
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

/// Returns the part of `buf` (the archive's bytes `all`) that belongs to `part`, and how far into
/// `part` it begins.
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
mod tests;
