//! Works out how much space a computed image will take, without reading data.

use super::layer::Run;
use super::write::ZERO_BLOCK;
use super::{DataSource, Extent, Flattened};
use crate::{Context, Error, Result};

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
        while done < extent.len {
            let run = image.sought_run_at(host + done, extent.len - done);
            let (run, len) =
                run.context(|| format!("cannot look for holes of {}", image.path().display()))?;
            if matches!(run, Run::Data { .. }) {
                blocks.add(from + done, len);
            }
            done += len;
        }
        Ok(())
    }
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
