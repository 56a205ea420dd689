//! Chains of layers, top first, as the guest sees them.

use super::descent::{Descent, Scope, check_owner};
use super::walk::{DataSource, Extent, Walk};
use super::{FileState, Layer};
use crate::{Context, Error, Result};
use std::fs::{File, Metadata};
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// An open backing chain, top first. All layers stay open, so a rename or a removal takes none away
/// from a reader.
pub struct Chain {
    layers: Vec<Layer>,
    /// Each layer's metadata when it was opened, and the state these describe.
    opened: Vec<(Metadata, FileState)>,
    changed_at: SystemTime,
}

impl Chain {
    /// Opens the image at `top` and every layer below it. The header above a layer says its format.
    /// Without that, and for `top`, the magic decides.
    ///
    /// Errors: those of opening, naming the layer; EINVAL for a layer that is no regular file;
    /// EPERM for a layer outside of `home` (symlinks resolved) that does not belong to the user
    /// `owner`; ELOOP for a cycle or more than 64 layers; EIO for a damaged layer.
    pub fn open(top: &Path, home: &Path, owner: u32) -> Result<Chain> {
        let home = std::fs::canonicalize(home)
            .context(|| format!("cannot look at the home {}", home.display()))?;
        let scope = Scope {
            homes: vec![home],
            owner,
            moved: Vec::new(),
        };
        Chain::open_in(top, &scope)
    }

    /// Opens the chain of an image in a home whose directories may be links, or lie elsewhere than
    /// headers say.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_in(top: &Path, scope: &Scope) -> Result<Chain> {
        Chain::descend(Descent::from(top), top, scope)
    }

    /// Opens the chain of `copy`, which takes the place of the file at `top`: what it names is
    /// looked for as if it were that file.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_over(copy: File, top: &Path, scope: &Scope) -> Result<Chain> {
        let mut walk = Descent::from(top);
        walk.top = Some(copy);
        Chain::descend(walk, top, scope)
    }

    fn descend(mut walk: Descent, top: &Path, scope: &Scope) -> Result<Chain> {
        let mut chain = Vec::new();
        let mut opened = Vec::new();
        while let Some((path, file, format)) = walk.next_layer()? {
            let meta = file
                .metadata()
                .context(|| format!("cannot look at the image {}", path.display()))?;
            check_owner(&path, &file, &meta, scope)?;
            let state = FileState::of_open(&file, &meta);
            let layer = Layer::of(&path, file, format)?;
            walk.below(&path, layer.header());
            if let Some((below, _)) = &mut walk.next
                && let Some(here) = scope.relocated(below)
            {
                *below = here;
            }
            chain.push(layer);
            opened.push((meta, state));
        }
        let changed_at = opened
            .first()
            .map_or(Ok(SystemTime::UNIX_EPOCH), |(meta, _)| meta.modified())
            .context(|| format!("cannot tell when {} changed", top.display()))?;
        Ok(Chain {
            layers: chain,
            opened,
            changed_at,
        })
    }

    /// The layers, top first; at least one.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The state each layer's file was in when it was opened, top first.
    pub fn states(&self) -> impl Iterator<Item = FileState> + '_ {
        self.opened.iter().map(|(_, state)| *state)
    }

    /// Size of the disk in bytes: that of the top layer.
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::virtual_size)
    }

    /// The mtime of the top layer when the chain was opened.
    pub fn changed_at(&self) -> SystemTime {
        self.changed_at
    }

    /// Returns the guest bytes of `range` as runs, in order and complete. Adjacent runs that
    /// continue each other are one. Past the virtual size there are zeros. EIO when a layer's
    /// tables are damaged.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut walk = self.walk(range);
        while let Some(next) = walk.next_extent()? {
            match extents.last_mut() {
                Some(last) if last.source.after(last.len) == next.source => last.len += next.len,
                _ => extents.push(next),
            }
        }
        Ok(extents)
    }

    /// Walks the guest bytes of `range`, and keeps nothing of what was passed.
    pub(super) fn walk(&self, range: Range<u64>) -> Walk<'_> {
        self.walk_upper(range, self.layers.len())
    }

    /// Walks the guest bytes of `range`, and asks only the `upper` layers on top.
    pub(super) fn walk_upper(&self, range: Range<u64>, upper: usize) -> Walk<'_> {
        Walk::new(&self.layers, range, upper)
    }

    /// Fills `buf` with the guest bytes from `guest_offset` on; zeros past the virtual size. EIO
    /// when a layer is damaged; other errors are those of reading.
    pub fn read_at(&self, guest_offset: u64, buf: &mut [u8]) -> Result<()> {
        // No disk reaches this far: bytes that have no offset are past the virtual size.
        let end = guest_offset.saturating_add(buf.len() as u64);
        let (mut rest, past) = buf.split_at_mut((end - guest_offset) as usize);
        past.fill(0);
        let mut walk = self.walk(guest_offset..end);
        while let Some(extent) = walk.next_extent()? {
            let (now, later) = rest.split_at_mut(extent.len as usize);
            self.read_extent(&extent, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Fills `buf`, as long as the extent, with its bytes.
    fn read_extent(&self, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        let image = |layer: usize| {
            self.layers
                .get(layer)
                .ok_or_else(|| Error::damaged(format!("the chain has no layer {layer}")))
        };
        match extent.source {
            DataSource::Zero => {
                buf.fill(0);
                Ok(())
            }
            DataSource::Data { layer, host } => image(layer)?.read_data(host, buf),
            DataSource::Compressed { layer } => image(layer)?.read_compressed(extent.guest, buf),
        }
    }

    /// Returns how many bytes of the disk come from a layer; the rest is zeros. EIO when a layer's
    /// tables are damaged.
    pub fn allocated(&self) -> Result<u64> {
        let mut walk = self.walk(0..self.virtual_size());
        let mut allocated = 0;
        while let Some(extent) = walk.next_extent()? {
            if !matches!(extent.source, DataSource::Zero) {
                allocated += extent.len;
            }
        }
        Ok(allocated)
    }

    /// Returns where from `at` on the disk's bytes come from a layer (`data`), or are zeros that no
    /// layer has; None if there is no such place before the end. EIO when a layer's tables are
    /// damaged.
    pub fn next(&self, at: u64, data: bool) -> Result<Option<u64>> {
        let mut walk = self.walk(at..self.virtual_size());
        while let Some(extent) = walk.next_extent()? {
            if matches!(extent.source, DataSource::Zero) != data {
                return Ok(Some(extent.guest));
            }
        }
        Ok(None)
    }

    /// Verifies that size and mtime of each layer's open file are as they were when it was opened.
    /// EIO otherwise: what was read may be a mixture. (A rebase changes the mtime for an instant
    /// only.)
    pub fn unchanged(&self) -> Result<()> {
        for (layer, (opened, _)) in self.layers.iter().zip(&self.opened) {
            if !layer.differs_from(opened)? {
                continue;
            }
            // A rebase restores the mtime in the next system call: give it that moment.
            std::thread::sleep(Duration::from_millis(20));
            if layer.differs_from(opened)? {
                return Err(Error::damaged(format!(
                    "{} changed while it was read (was the box started?); read it again",
                    layer.path().display()
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
