//! Copies the disk of a running box, as it is at one moment.
//!
//! The virtual machine stands still as briefly as possible. Where the file system can share blocks,
//! the copy is made while it is paused. Elsewhere most of it is copied before; during the pause
//! only what has changed since is found, by comparing both files, and copied again.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disk::{self, FileId};
use crate::exports::disks::{Disks, Source};
use crate::exports::production::interrupted;
use crate::exports::states::{LayerStates, States};
use crate::files::copies::{can_share, copy_contents, refresh_copy};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::workspace::Workspace;
use crate::home::{BoxRecord, Home, Paused, Space, VmProcess};
use crate::{Context, Error, Result};

/// A copy of the top layer of a running box.
pub(crate) struct DiskCopy {
    /// The copy, an unnamed file with the modification time of the original.
    pub file: File,
    /// The layer that it is a copy of.
    pub top: PathBuf,
    /// How long the virtual machine was paused.
    pub pause: Duration,
    /// The layers from before the copy began. While they are current, so is the copy.
    pub before: Option<LayerStates>,
}

/// Copies the disks of running boxes.
pub(crate) struct RunningDisks {
    home: Arc<Home>,
    disks: Arc<Disks>,
    states: Arc<States>,
    workspace: Arc<Workspace>,
}

impl RunningDisks {
    /// Returns the disks of a home.
    pub fn new(
        home: Arc<Home>,
        disks: Arc<Disks>,
        states: Arc<States>,
        workspace: Arc<Workspace>,
    ) -> RunningDisks {
        RunningDisks {
            home,
            disks,
            states,
            workspace,
        }
    }

    /// Copies the layer that the virtual machine of a box writes to, as of one moment. Where the file
    /// system can't share blocks, copies no layer with more than `largest` bytes allocated.
    ///
    /// # Errors
    /// EBUSY when the layer is larger, and when the virtual machine can't be paused, or did not stay so; EINTR once `go_on`
    /// returns false; ENOSPC; those of copying.
    pub fn copy(
        &self,
        source: &Source,
        record: &BoxRecord,
        vm: VmProcess,
        largest: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Result<DiskCopy> {
        let top = self.written_layer(source, record, vm)?;
        let message = || format!("cannot copy {}", top.display());
        let original = File::open(&top).context(message)?;
        let copy = self.workspace.unnamed_file("running")?;
        let shares = can_share(&original, &copy);
        // While these states are current, the disk is as it was before the copy began.
        let before = self.states.open_now(&top).ok().map(|(_, states)| states);
        if !shares {
            self.require_space(&original, largest)?;
            let mut check = || if go_on() { Ok(()) } else { Err(interrupted()) };
            copy_contents(&original, &copy, &top, &mut check)?;
        }
        crash_point("running.begun");
        let began = Instant::now();
        let paused = vm.pause(&top)?;
        crash_point("running.paused");
        let is_replaced = FileId::of_open(&original, &top)? != FileId::at(&top)?;
        if is_replaced || self.written_layer(source, record, vm)? != top {
            return Err(Error::busy("the disk was replaced just now; try again"));
        }
        let mut check = || check_paused(&paused, go_on);
        let is_unchanged = |states: &LayerStates| states.is_settled() && states.are_current(&top);
        if shares {
            copy_contents(&original, &copy, &top, &mut check)?;
        } else if !before.as_ref().is_some_and(is_unchanged) {
            refresh_copy(&original, &copy, &top, &mut check)?;
        }
        paused.still()?;
        let meta = original.metadata().context(message)?;
        drop(paused);
        let pause = began.elapsed();
        crash_point("running.copied");
        disk::clear_dirty(&copy, &top)?;
        durable::set_times(&copy, &meta).context(message)?;
        Ok(DiskCopy {
            file: copy,
            top,
            pause,
            before,
        })
    }

    /// Returns the layer that the virtual machine has open for writing: the live disk, or one below
    /// it. BoxLite up to 0.11.0 takes a snapshot of a running box by renaming the live disk, and
    /// the machine goes on writing to that file. The live disk if the machine has none open.
    fn written_layer(&self, source: &Source, record: &BoxRecord, vm: VmProcess) -> Result<PathBuf> {
        let live = self.disks.existing_top(source, record)?;
        let chain = disk::chain_paths(&live)?;
        let mut written = chain.iter().filter(|layer| vm.writes_to(layer));
        Ok(written.next().cloned().unwrap_or(live))
    }

    /// Fails if a copy that shares no blocks does not fit, before anything is paused.
    ///
    /// # Errors
    /// EBUSY when it would be larger than `largest` bytes; ENOSPC; those of looking at the disk and
    /// the file system.
    fn require_space(&self, original: &File, largest: u64) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let needed = original
            .metadata()
            .context(|| "cannot look at the disk")?
            .blocks()
            * 512;
        if needed > largest {
            return Err(Error::busy(format!(
                "its top layer has {} MiB, too many to be copied for a look; take a snapshot and look into that",
                needed >> 20
            )));
        }
        let space = Space::of(&self.home)?;
        if space.available_bytes() >= needed {
            return Ok(());
        }
        Err(Error::new(
            libc::ENOSPC,
            format!(
                "a copy takes {needed} bytes, more than is free where the home is; free some space"
            ),
        ))
    }
}

/// Fails with EBUSY when the virtual machine runs on, and with EINTR once `go_on` returns false.
fn check_paused(paused: &Paused, go_on: &dyn Fn() -> bool) -> Result<()> {
    paused.still()?;
    if go_on() { Ok(()) } else { Err(interrupted()) }
}
