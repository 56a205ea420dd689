//! Works out how much space a computed image will take, without reading data.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::write::ZERO_BLOCK;
use super::{DataSource, Extent, Flattened, Layer};
use crate::{Error, Result};

impl Flattened {
    /// Returns about how many bytes the image takes on the disk when it is written: holes of the
    /// layers stay holes. Zeros that are stored in a layer count, though they become holes as well.
    ///
    /// # Errors
    /// Those of reading the layers' tables and of looking for their holes.
    pub fn allocation(&self) -> Result<u64> {
        let mut bytes = self.metadata_len();
        for window in 0..self.windows() {
            for run in self.data_in(window)? {
                let mut blocks = Blocks::default();
                for extent in self.chain().extents(run.clone())? {
                    let from = extent.guest - run.start;
                    self.add_extent(&extent, from, &mut blocks)?;
                }
                bytes += blocks.count * ZERO_BLOCK;
            }
        }
        Ok(bytes)
    }

    /// Adds the blocks of an extent that begins `from` bytes into its run.
    fn add_extent(&self, extent: &Extent, from: u64, blocks: &mut Blocks) -> Result<()> {
        let (layer, host) = match extent.source {
            DataSource::Zero => return Ok(()),
            DataSource::Compressed { .. } => {
                blocks.add(from, extent.len);
                return Ok(());
            }
            DataSource::Data { layer, host } => (layer, host),
        };
        let image = self.chain().layers().get(layer);
        let image = image.ok_or_else(|| Error::damaged("the chain has no such layer"))?;
        let mut done = 0;
        while let Some((at, len)) = data_from(image, host + done, extent.len - done)? {
            blocks.add(from + done + at, len);
            done += at + len;
        }
        Ok(())
    }
}

/// Returns the first bytes among `max` from `host` on of a layer's file that are no hole: where
/// they begin, and how many they are.
fn data_from(layer: &Layer, host: u64, max: u64) -> Result<Option<(u64, u64)>> {
    let end = host.saturating_add(max);
    let at = match seek(layer.file(), SeekFrom::Data(host)) {
        Ok(at) if at < end => at,
        // A file system that knows no holes.
        Err(Errno::INVAL) if max > 0 => return Ok(Some((0, max))),
        Ok(_) | Err(Errno::NXIO | Errno::INVAL) => return Ok(None),
        Err(error) => {
            let message = format!("cannot look for holes of {}", layer.path().display());
            return Err(Error::io(message, error.into()));
        }
    };
    let hole = seek(layer.file(), SeekFrom::Hole(at)).unwrap_or(end);
    Ok(Some((at - host, hole.clamp(at + 1, end) - at)))
}

/// Counts blocks, each once.
#[derive(Default)]
struct Blocks {
    count: u64,
    /// The first block that is not counted yet.
    next: u64,
}

impl Blocks {
    /// Counts the blocks of these bytes, which are not before those that were added last.
    fn add(&mut self, from: u64, len: u64) {
        let first = (from / ZERO_BLOCK).max(self.next);
        let end = (from + len).div_ceil(ZERO_BLOCK);
        self.count += end.saturating_sub(first);
        self.next = self.next.max(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_counts_once() {
        let mut blocks = Blocks::default();
        for (from, len, wanted) in [
            (0, 1, 1),
            (100, 1, 1),
            (ZERO_BLOCK - 1, 2, 2),
            (5 * ZERO_BLOCK, 2 * ZERO_BLOCK, 4),
        ] {
            blocks.add(from, len);
            assert_eq!(blocks.count, wanted);
        }
    }
}
