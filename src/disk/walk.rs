//! Walks along the guest's bytes: which layer each run of them comes from.

use super::Layer;
use super::layer::Run;
use crate::Result;
use std::ops::Range;

/// A run of guest bytes that come from one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Guest offset in bytes.
    pub guest: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// Where the bytes come from.
    pub source: DataSource,
}

/// Where guest bytes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DataSource {
    /// Nowhere: they are zeros.
    Zero,
    /// From the file of a layer, from this host offset on; zeros past the end of that file.
    Data {
        /// Index into [`Chain::layers`](super::Chain::layers).
        layer: usize,
        /// Byte offset in that layer's file.
        host: u64,
    },
    /// From compressed clusters of a layer.
    Compressed {
        /// Index into [`Chain::layers`](super::Chain::layers).
        layer: usize,
    },
}

impl DataSource {
    /// Returns the source after `len` bytes, if it continues in the same way.
    pub(super) fn after(self, len: u64) -> DataSource {
        match self {
            DataSource::Data { layer, host } => DataSource::Data {
                layer,
                host: host.saturating_add(len),
            },
            same => same,
        }
    }
}

/// A walk along the guest's bytes. It keeps a layer's answer about a run until it has passed the
/// run. Otherwise each fragment of the layers below would have the same table entries read again.
pub(super) struct Walk<'a> {
    layers: &'a [Layer],
    at: u64,
    end: u64,
    /// The last run of each layer that is asked, with the guest bytes it covers.
    runs: Vec<Option<(Range<u64>, Run)>>,
}

impl<'a> Walk<'a> {
    /// A walk along `range` that asks only the `upper` layers on top.
    pub(super) fn new(layers: &'a [Layer], range: Range<u64>, upper: usize) -> Walk<'a> {
        Walk {
            layers,
            at: range.start,
            end: range.end,
            runs: vec![None; upper.min(layers.len())],
        }
    }

    /// Returns the next run of bytes from one source (the run after it may continue it); None at
    /// the end of the range. EIO when a layer's tables are damaged.
    pub(super) fn next_extent(&mut self) -> Result<Option<Extent>> {
        let run = self.next_run()?;
        // Bytes that no layer has are zeros.
        Ok(run.map(|(guest, source)| Extent {
            guest: guest.start,
            len: guest.end - guest.start,
            source: source.unwrap_or(DataSource::Zero),
        }))
    }

    /// Returns the next run as [`Walk::next_extent`] does; the source is None if no layer that is
    /// asked has the bytes.
    pub(super) fn next_run(&mut self) -> Result<Option<(Range<u64>, Option<DataSource>)>> {
        let guest = self.at;
        if guest >= self.end {
            return Ok(None);
        }
        let mut end = self.end;
        let mut source = None;
        for layer in 0..self.runs.len() {
            let (run, run_end) = self.run_of(layer)?;
            end = end.min(run_end);
            source = match run {
                Run::Unallocated => continue,
                Run::Zero => Some(DataSource::Zero),
                Run::Data { host } => Some(DataSource::Data { layer, host }),
                Run::Compressed => Some(DataSource::Compressed { layer }),
            };
            break;
        }
        self.at = end;
        Ok(Some((guest..end, source)))
    }

    /// Continues at guest offset `at`, if that is further on.
    pub(super) fn skip_to(&mut self, at: u64) {
        self.at = self.at.max(at);
    }

    /// Returns what a layer has at the position of the walk, and where that ends.
    fn run_of(&mut self, layer: usize) -> Result<(Run, u64)> {
        let at = self.at;
        let (Some(image), Some(known)) = (self.layers.get(layer), self.runs.get_mut(layer)) else {
            return Ok((Run::Unallocated, self.end));
        };
        let (range, run) = match known {
            Some(known) if known.0.contains(&at) => known,
            known => {
                let (run, len) = image.run_at(at, self.end - at)?;
                known.insert((at..at + len, run))
            }
        };
        let run = match *run {
            Run::Data { host } => Run::Data {
                host: host.saturating_add(at - range.start),
            },
            same => same,
        };
        Ok((run, range.end))
    }
}
