//! The state of a chain of layers, and whether it can change without showing another: what plans,
//! sizes, digests, inodes and the kernel's pages go by. Which is which is told by a
//! [`crate::disk::FileClock`].
//!
//! A state that can change unseen is shown (`ls` and `stat` never wait), and nothing else: no bytes
//! of it are handed out, it is not remembered, and the next look does not go by it. Whoever opens
//! something waits until the file system's clock has moved on.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use crate::disk::{Chain, FileClock, FileState, LONGEST_TICK, Moment, Stamped};
use crate::exports::disks::{Disks, Source};
use crate::files::workspace::Workspace;
use crate::{Context, Error, Result};

/// How long to wait for a disk that changes again and again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Images written from others that it is known of; more are not made while somebody reads.
const MOST_STAND_INS: usize = 256;

/// The files of a chain as they were when it was opened, top first.
#[derive(Clone, Debug)]
pub struct LayerStates {
    files: Vec<(PathBuf, FileState)>,
    is_settled: bool,
}

impl LayerStates {
    /// Those of a chain that was opened after `moment`.
    fn of(chain: &Chain, moment: &Moment) -> LayerStates {
        let paths = chain.layers().iter().map(|layer| layer.path().to_owned());
        LayerStates {
            is_settled: chain.states().all(|state| moment.is_after_state(&state)),
            files: paths.zip(chain.states()).collect(),
        }
    }

    /// Whether it can't change unseen: as long as it [holds](LayerStates::hold), so do the disk's
    /// bytes.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// It was seen to be the same, time and again, for the longest tick there is.
    pub fn was_watched(&mut self) {
        self.is_settled = true;
    }

    /// Whether the files and what is known of them are the same.
    pub fn is_same(&self, other: &LayerStates) -> bool {
        self.files == other.files
    }

    /// Whether a chain opened at `top` now would have the same: a stat for each layer, no file
    /// opened. Says something of the bytes only if it is [settled](LayerStates::is_settled).
    pub fn hold(&self, top: &Path) -> bool {
        self.files.first().is_some_and(|(path, _)| path == top)
            && self
                .files
                .iter()
                .all(|(path, state)| fs::metadata(path).is_ok_and(|meta| state.is_of(&meta)))
    }

    /// The files with the times they have.
    fn stamped(&self) -> Vec<Stamped> {
        let files = self.files.iter();
        let stamped = files.map(|(path, state)| Stamped {
            path: path.clone(),
            dev: state.id.dev,
            time: state.modified,
        });
        stamped.collect()
    }
}

/// Images that were written from other layers, each with the states of those: they read the same.
#[derive(Default)]
pub struct StandIns(VecDeque<(FileState, Vec<FileState>)>);

impl StandIns {
    fn add(&mut self, image: FileState, of: Vec<FileState>) {
        if self.0.len() >= MOST_STAND_INS {
            self.0.pop_front();
        }
        self.0.push_back((image, of));
    }

    /// The states that one stands for: its own, unless it was written from others.
    fn original(&self, state: FileState) -> Vec<FileState> {
        let known = self.0.iter().find(|(image, _)| *image == state);
        known.map_or_else(|| vec![state], |(_, of)| of.clone())
    }
}

/// Opens chains of layers in states that can be told apart.
pub(crate) struct States {
    disks: Arc<Disks>,
    workspace: Arc<Workspace>,
    is_read_only: bool,
    clock: FileClock,
    stand_ins: Mutex<StandIns>,
}

impl States {
    /// Returns the states of these disks. Where a home is only looked at, nothing is made in its workspace.
    pub fn new(disks: Arc<Disks>, workspace: Arc<Workspace>, is_read_only: bool) -> States {
        States {
            disks,
            workspace,
            is_read_only,
            clock: FileClock::default(),
            stand_ins: Mutex::default(),
        }
    }

    /// Opens a chain in a state that can't change unseen. Where it was written to within the tick
    /// of its file system's clock, that is waited for: some milliseconds, or a second.
    ///
    /// # Errors
    /// EBUSY when it is written to all the time; as [`Disks::open_chain`].
    pub fn open_settled(&self, top: &Path) -> Result<(Chain, LayerStates)> {
        let began = Instant::now();
        let mut watched: Option<(LayerStates, Instant)> = None;
        loop {
            let (chain, mut layers) = self.open_as_it_is(top)?;
            match &watched {
                _ if layers.is_settled => return Ok((chain, layers)),
                Some((same, since)) if same.is_same(&layers) => {
                    if since.elapsed() >= LONGEST_TICK {
                        layers.was_watched();
                        return Ok((chain, layers));
                    }
                }
                _ => watched = Some((layers.clone(), Instant::now())),
            }
            if began.elapsed() > PATIENCE {
                return Err(Error::busy(format!(
                    "{} is written to all the time; try again, or end what writes to it",
                    top.display()
                )));
            }
            self.clock.wait(&layers.stamped(), &|| self.make_probe());
        }
    }

    /// Opens a chain without waiting.
    ///
    /// # Errors
    /// As [`Disks::open_chain`].
    pub fn open_now(&self, top: &Path) -> Result<(Chain, LayerStates)> {
        let (chain, layers) = self.open_as_it_is(top)?;
        if layers.is_settled || !self.clock.advance(&layers.stamped(), &|| self.make_probe()) {
            return Ok((chain, layers));
        }
        // The clock has moved on: what is there now can't change unseen any more.
        self.open_as_it_is(top)
    }

    fn open_as_it_is(&self, top: &Path) -> Result<(Chain, LayerStates)> {
        let moment = self.clock.latest();
        let chain = self.disks.open_chain(top)?;
        let layers = LayerStates::of(&chain, &moment);
        Ok((chain, layers))
    }

    /// Whether opening what is shown of a disk state may have to wait for its file system's clock.
    pub fn may_wait(&self, source: &Source) -> bool {
        let Ok(top) = self.disks.top_of(source) else {
            return false;
        };
        // What lies below the top is no newer.
        let Ok(meta) = fs::metadata(&top) else {
            return false;
        };
        let state = FileState::of(&meta);
        let stamped = Stamped {
            path: top,
            dev: state.id.dev,
            time: state.modified,
        };
        !self.clock.advance(&[stamped], &|| self.make_probe())
    }

    /// Whether the state that a chain was opened in, and is in, can be remembered for good: no
    /// other will look like it.
    pub fn is_lasting(&self, chain: &Chain) -> bool {
        let paths = chain.layers().iter().map(|layer| layer.path().to_owned());
        let stamped = paths.zip(chain.states()).map(|(path, state)| Stamped {
            path,
            dev: state.id.dev,
            time: state.modified,
        });
        let stamped: Vec<Stamped> = stamped.collect();
        self.clock.advance(&stamped, &|| self.make_probe())
    }

    /// A number for what a chain in a settled state has, the same after a snapshot and a remount,
    /// and that no other has: a hash of the states of its files, without overlays on top that hold
    /// nothing.
    ///
    /// # Errors
    /// EIO when a layer's tables are damaged.
    pub fn state_number(&self, chain: &Chain) -> Result<u64> {
        let mut hasher = Sha256::new();
        hasher.update(chain.virtual_size().to_le_bytes());
        for state in self.originals(chain, chain.layers().len())? {
            hasher.update(state.bytes());
        }
        let mut number = [0; 8];
        number.copy_from_slice(&hasher.finalize()[..8]);
        Ok(u64::from_le_bytes(number))
    }

    /// Notes that an image was written from the `upper` layers on top of a chain.
    ///
    /// # Errors
    /// Those of looking at it.
    pub fn note_stand_in(&self, image: &fs::File, chain: &Chain, upper: usize) -> Result<()> {
        let meta = image.metadata().context(|| "cannot look at an image")?;
        let of = self.originals(chain, upper)?;
        let state = FileState::of_open(image, &meta);
        self.stand_ins.lock().add(state, of);
        Ok(())
    }

    /// The states of the files that the `upper` layers on top of a chain stand for, without those
    /// above all others that hold nothing.
    fn originals(&self, chain: &Chain, upper: usize) -> Result<Vec<FileState>> {
        let layers = chain.layers();
        let mut skipped = 0;
        for (layer, below) in layers
            .iter()
            .zip(layers.iter().skip(1))
            .take(upper.saturating_sub(1))
        {
            let is_same_size = layer.virtual_size() == below.virtual_size();
            if !is_same_size || layer.holds_data()? {
                break;
            }
            skipped += 1;
        }
        let stand_ins = self.stand_ins.lock();
        let states = chain.states().take(upper).skip(skipped);
        Ok(states.flat_map(|state| stand_ins.original(state)).collect())
    }

    /// What the clock needs where a file system makes no file without a name by itself.
    pub fn make_probe(&self) -> Option<fs::File> {
        let made = (!self.is_read_only).then(|| self.workspace.unnamed_file("clock"));
        made.and_then(Result::ok)
    }

    /// Waits until whatever changes these files shows.
    pub fn wait_for_clock(&self, files: &[Stamped]) {
        self.clock.wait(files, &|| self.make_probe());
    }

    /// A moment of now: what is looked at from here on, and has an older time, shows each change.
    pub fn moment_now(&self, dir: &Path) -> Moment {
        if let Ok(meta) = fs::metadata(dir) {
            let now = Stamped {
                path: dir.join("now"),
                dev: meta.dev(),
                time: i128::MAX,
            };
            self.clock.advance(&[now], &|| self.make_probe());
        }
        self.clock.latest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::FileId;

    fn state(ino: u64) -> FileState {
        FileState {
            id: FileId { dev: 1, ino },
            len: 7,
            modified: 8,
            born: 0,
        }
    }

    #[test]
    fn an_image_stands_for_the_layers_it_was_written_from_until_too_many_others_were() {
        let mut stand_ins = StandIns::default();
        assert_eq!(stand_ins.original(state(1)), [state(1)]);
        stand_ins.add(state(1), vec![state(2), state(3)]);
        assert_eq!(stand_ins.original(state(1)), [state(2), state(3)]);
        let changed = FileState {
            modified: 9,
            ..state(1)
        };
        assert_eq!(stand_ins.original(changed), [changed]);
        for other in 0..MOST_STAND_INS as u64 {
            stand_ins.add(state(10 + other), Vec::new());
        }
        assert_eq!(stand_ins.original(state(1)), [state(1)]);
    }
}
