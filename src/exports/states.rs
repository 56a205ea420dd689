//! The state of a chain of layers. Plans, sizes, digests, inodes and the kernel's cached pages are
//! valid for one state.
//!
//! A state is *settled* once every later write gives the files another state. A write within the
//! same tick of the file system's clock does not, so a [`FileClock`] tells whether the clock has
//! moved on.
//!
//! A state that is not settled is only shown, since `ls` and `stat` never wait. No bytes of it are
//! handed out, it is not remembered, and the next look does not rely on it. Opening a file waits
//! until the state is settled.

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

/// How long to wait for a disk that keeps changing.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Most images remembered as stand-ins. No more than this are written during one read.
const MOST_STAND_INS: usize = 256;

/// The files of a chain as they were when it was opened, top first.
#[derive(Clone, Debug)]
pub struct LayerStates {
    files: Vec<(PathBuf, FileState)>,
    is_settled: bool,
}

impl LayerStates {
    /// Returns the states of a chain that was opened after `moment`.
    fn of(chain: &Chain, moment: &Moment) -> LayerStates {
        let paths = chain.layers().iter().map(|layer| layer.path().to_owned());
        LayerStates {
            is_settled: chain.states().all(|state| moment.is_after_state(&state)),
            files: paths.zip(chain.states()).collect(),
        }
    }

    /// Returns whether the state is settled: while it is [current](LayerStates::are_current), the
    /// disk's bytes are unchanged.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// Marks the state as settled, because it was seen unchanged for the longest tick there is.
    /// Such a state is read, but not remembered.
    pub fn mark_settled(&mut self) {
        self.is_settled = true;
    }

    /// Returns whether both have the same files in the same states.
    pub fn is_same(&self, other: &LayerStates) -> bool {
        self.files == other.files
    }

    /// Returns whether a chain opened at `top` now would have the same states. Costs one stat per
    /// layer and opens no file. Says something about the bytes only if
    /// [settled](LayerStates::is_settled).
    pub fn are_current(&self, top: &Path) -> bool {
        self.files.first().is_some_and(|(path, _)| path == top)
            && self
                .files
                .iter()
                .all(|(path, state)| fs::metadata(path).is_ok_and(|meta| state.is_of(&meta)))
    }

    /// Returns the files with their modification times.
    fn stamped(&self) -> Vec<Stamped> {
        let files = self.files.iter();
        files
            .map(|(path, state)| stamp(path.clone(), state))
            .collect()
    }
}

/// Returns a file with its modification time.
fn stamp(path: PathBuf, state: &FileState) -> Stamped {
    Stamped {
        path,
        dev: state.id.dev,
        time: state.modified,
    }
}

/// Images that were written from other layers and read the same, each with the states of those
/// layers. The oldest entry is dropped when there are too many.
#[derive(Default)]
struct StandIns(VecDeque<(FileState, Vec<FileState>)>);

impl StandIns {
    fn add(&mut self, image: FileState, originals: Vec<FileState>) {
        if self.0.len() >= MOST_STAND_INS {
            self.0.pop_front();
        }
        self.0.push_back((image, originals));
    }

    /// Returns the states that an image stands for: its own, unless it was written from other
    /// layers.
    fn originals(&self, state: FileState) -> Vec<FileState> {
        let entry = self.0.iter().find(|(image, _)| *image == state);
        entry.map_or_else(|| vec![state], |(_, originals)| originals.clone())
    }
}

/// Opens chains of layers in states that can be told apart, and numbers these states.
pub(crate) struct States {
    disks: Arc<Disks>,
    workspace: Arc<Workspace>,
    is_read_only: bool,
    clock: FileClock,
    stand_ins: Mutex<StandIns>,
}

impl States {
    /// Returns the states of these disks. If `is_read_only`, no file is made in the workspace.
    pub fn new(disks: Arc<Disks>, workspace: Arc<Workspace>, is_read_only: bool) -> States {
        States {
            disks,
            workspace,
            is_read_only,
            clock: FileClock::default(),
            stand_ins: Mutex::default(),
        }
    }

    /// Opens a chain in a settled state. If the chain was written to within the current tick of its
    /// file system's clock, this waits for the next tick: some milliseconds, or a second.
    ///
    /// # Errors
    /// EBUSY when the disk keeps changing; as [`Disks::open_chain`].
    pub fn open_settled(&self, top: &Path) -> Result<(Chain, LayerStates)> {
        let began = Instant::now();
        let mut watched: Option<(LayerStates, Instant)> = None;
        loop {
            let (chain, mut layers) = self.open_once(top)?;
            match &watched {
                _ if layers.is_settled => return Ok((chain, layers)),
                Some((same, since)) if same.is_same(&layers) => {
                    if since.elapsed() >= LONGEST_TICK {
                        layers.mark_settled();
                        return Ok((chain, layers));
                    }
                }
                _ => watched = Some((layers.clone(), Instant::now())),
            }
            if began.elapsed() > SETTLE_TIMEOUT {
                return Err(Error::busy(format!(
                    "{} is written to all the time; try again, or stop the program that writes to it",
                    top.display()
                )));
            }
            self.clock.wait(&layers.stamped(), &|| self.make_probe());
        }
    }

    /// Opens a chain without waiting, in a state that may not be settled.
    ///
    /// # Errors
    /// As [`Disks::open_chain`].
    pub fn open_now(&self, top: &Path) -> Result<(Chain, LayerStates)> {
        let (chain, layers) = self.open_once(top)?;
        if layers.is_settled || !self.clock.advance(&layers.stamped(), &|| self.make_probe()) {
            return Ok((chain, layers));
        }
        // The clock has moved on, so the state is settled if it is opened again.
        self.open_once(top)
    }

    /// Opens a chain as it is now. Takes the moment first: only a state seen after it can be
    /// settled.
    fn open_once(&self, top: &Path) -> Result<(Chain, LayerStates)> {
        let moment = self.clock.latest();
        let chain = self.disks.open_chain(top)?;
        let layers = LayerStates::of(&chain, &moment);
        Ok((chain, layers))
    }

    /// Returns whether opening a file of a disk state may have to wait for the file system's clock.
    pub fn may_wait(&self, source: &Source) -> bool {
        let Ok(top) = self.disks.top_of(source) else {
            return false;
        };
        // The layers below the top are no newer.
        let Ok(meta) = fs::metadata(&top) else {
            return false;
        };
        let stamped = [stamp(top, &FileState::of(&meta))];
        !self.clock.advance(&stamped, &|| self.make_probe())
    }

    /// Returns whether the state that a chain was opened in, and still is in, may be remembered for
    /// good: no other state will look like it.
    pub fn is_lasting(&self, chain: &Chain) -> bool {
        let paths = chain.layers().iter().map(|layer| layer.path().to_owned());
        let files = paths.zip(chain.states());
        let stamped: Vec<Stamped> = files.map(|(path, state)| stamp(path, &state)).collect();
        self.clock.advance(&stamped, &|| self.make_probe())
    }

    /// Returns a number for the contents of a chain in a settled state. No other state has it, and
    /// a snapshot or a remount leaves it the same. It is a hash of the states of the chain's files,
    /// without empty overlays on top.
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

    /// Records that `image` was written from the `upper` topmost layers of a chain and reads the
    /// same, so that the chain keeps its [state number](States::state_number) when the image takes
    /// their place.
    ///
    /// # Errors
    /// Those of looking at the image; EIO when a layer's tables are damaged.
    pub fn note_stand_in(&self, image: &fs::File, chain: &Chain, upper: usize) -> Result<()> {
        let meta = image
            .metadata()
            .context(|| "cannot look at the image written from a box's layers")?;
        let originals = self.originals(chain, upper)?;
        let state = FileState::of_open(image, &meta);
        self.stand_ins.lock().add(state, originals);
        Ok(())
    }

    /// Returns the states that the `upper` topmost layers of a chain stand for, without empty
    /// overlays on top.
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
        Ok(states
            .flat_map(|state| stand_ins.originals(state))
            .collect())
    }

    /// Returns an unnamed file for the clock to touch, on file systems that have no `O_TMPFILE`.
    /// None in a read-only mount, or when the file can't be made.
    fn make_probe(&self) -> Option<fs::File> {
        let probe = (!self.is_read_only).then(|| self.workspace.unnamed_file("clock"));
        probe.and_then(Result::ok)
    }

    /// Waits until every later write to these files gives them another state, at most for the
    /// longest tick of a file system.
    pub fn wait_for_clock(&self, files: &[Stamped]) {
        self.clock.wait(files, &|| self.make_probe());
    }

    /// Asks the clock of the file system that `dir` is on, and returns the latest moment. A file
    /// that is looked at from now on, and has an older time, is in a settled state.
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
        assert_eq!(stand_ins.originals(state(1)), [state(1)]);
        stand_ins.add(state(1), vec![state(2), state(3)]);
        assert_eq!(stand_ins.originals(state(1)), [state(2), state(3)]);
        let changed = FileState {
            modified: 9,
            ..state(1)
        };
        assert_eq!(stand_ins.originals(changed), [changed]);
        for other in 0..MOST_STAND_INS as u64 {
            stand_ins.add(state(10 + other), Vec::new());
        }
        assert_eq!(stand_ins.originals(state(1)), [state(1)]);
    }
}
