//! Archives that were copied whole and wait for their box or their final name. The program that copied
//! one got success from close, and may have removed its source. So each has a note beside its disk in the
//! workspace, and outlives a mount that is killed: the next mount makes a box of it.

use std::fs;
use std::fs::{File, FileTimes};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use crate::disk::FileId;
use crate::exports::{Contents, Source};
use crate::files::crash_points::crash_point;
use crate::files::waiting_archive::{WaitingArchive, waiting_in};
use crate::files::workspace::{Abandoned, discard, remove_but_waiting};
use crate::home::{Catalog, box_id};
use crate::store::Store;
use crate::store::layers::graph::{ImageFile, Role};
use crate::store::verbs::clone::clone_box;
use crate::store::verbs::import::import_disk;
use crate::store::verbs::import_stream::ImportStream;
use crate::store::verbs::install::NewClone;
use crate::{Context, Error, Result};

/// What a further name of a disk in the workspace says.
#[derive(PartialEq, Eq)]
enum Taken {
    /// It is the disk of a box or a snapshot.
    Yes,
    /// It is nobody else's.
    No,
    /// It has another name, which no row knows: that of a change that did not end.
    Perhaps,
}

/// Notes that a complete archive waits, and which name a box made of it gets. Durable when this
/// returns. `made` is the time that its file shows: so it does when it has become a box or a snapshot,
/// and a tool that compares finds what it has copied.
///
/// # Errors
/// EBADMSG for an archive that is not complete; ENOSPC, EIO.
pub fn note_waiting(arrival: &mut ImportStream, name: &str, made: SystemTime) -> Result<()> {
    if arrival.note() == Some(name) {
        return Ok(());
    }
    let times = FileTimes::new().set_modified(made);
    File::options()
        .write(true)
        .open(arrival.disk())
        .and_then(|disk| disk.set_times(times))
        .context(|| format!("cannot set the times of {}", arrival.disk().display()))?;
    let archive = arrival.as_waiting(name)?;
    match archive.write_note() {
        Err(error) if arrival.note().is_some() => {
            log::warn!("the archive {name} keeps the name that it had: {error}");
            return Ok(());
        }
        noted => noted.inspect_err(|_| discard(&WaitingArchive::note_of(&archive.disk)))?,
    }
    arrival.set_note(name);
    crash_point("waiting.noted");
    Ok(())
}

/// Makes a box of an archive that waits, as the mount ends; returns the box's name. Where that fails,
/// the archive stays for the next mount.
///
/// # Errors
/// Those of importing a box.
pub fn keep_archive(store: &Store, arrival: &mut ImportStream, name: &str) -> Result<String> {
    note_waiting(arrival, name, SystemTime::now())?;
    let archive = arrival.as_waiting(name)?;
    // From here on the note decides.
    arrival.leave();
    let made = make_box_of(store, &archive)?;
    discard_archive(&archive);
    Ok(made)
}

/// Makes a box of a copy of a state of this home that waits, as the mount ends; returns the box's name.
///
/// # Errors
/// Those of cloning a box.
pub fn keep_copy(store: &Store, source: &Source, read: &Contents, name: &str) -> Result<String> {
    let new = new_box(store, name)?;
    clone_box(store, source, read, &new)?;
    Ok(new.name)
}

/// Makes a box of each archive that waited when a mount was killed. `has_recovered`: what a killed
/// process left elsewhere was looked at.
pub fn keep_left_archives(store: &Store, left: Vec<Abandoned>, has_recovered: bool) {
    for workspace in left {
        for archive in waiting_in(workspace.dir()) {
            keep_left_archive(store, &archive, has_recovered);
        }
        if let Err(error) = remove_but_waiting(workspace.dir()) {
            store.events().info(&error.to_string());
        }
    }
}

fn keep_left_archive(store: &Store, archive: &WaitingArchive, has_recovered: bool) {
    let name = &archive.name;
    let made = match is_taken(store, &archive.disk) {
        Ok(Taken::Yes) => {
            discard_archive(archive);
            return;
        }
        Ok(Taken::Perhaps) if !has_recovered => Err(Error::busy(
            "it may be a box's already, which recovery has to tell",
        )),
        Ok(Taken::Perhaps) => Err(Error::busy("a change to its disk did not end")),
        Ok(Taken::No) => make_box_of(store, archive),
        Err(error) => Err(error),
    };
    match made {
        Ok(made) => {
            store.events().info(&format!(
                "the archive {name} waited when its mount was killed; it is the box {made} now"
            ));
            discard_archive(archive);
        }
        Err(error) => store.events().warn(&format!(
            "the archive {name} waited when its mount was killed, and waits for the next mount: {error}"
        )),
    }
}

/// Makes a box of an archive, under its name or, where that is taken, with a number after it.
fn make_box_of(store: &Store, archive: &WaitingArchive) -> Result<String> {
    let new = new_box(store, &archive.name)?;
    import_disk(store, &archive.disk, archive.options.clone(), &new)?;
    Ok(new.name)
}

/// Chooses the id and the name of a box: the wanted name, with a number after it if that is taken.
fn new_box(store: &Store, wanted: &str) -> Result<NewClone> {
    let catalog = store.home().catalog()?;
    let is_free = |name: &String| {
        let mut boxes = catalog.boxes().iter();
        !boxes.any(|record| record.name.as_deref() == Some(name) || record.id == *name)
    };
    let numbered = (2..).map(|number| format!("{wanted}-{number}"));
    let name = std::iter::once(wanted.to_owned())
        .chain(numbered)
        .find(is_free)
        .ok_or_else(|| Error::new(libc::EEXIST, "no name is free"))?;
    Ok(NewClone {
        id: box_id()?,
        name,
    })
}

/// Whether the disk of an archive has become a box's or a snapshot's.
fn is_taken(store: &Store, disk: &Path) -> Result<Taken> {
    let meta = fs::metadata(disk).context(|| format!("cannot look at {}", disk.display()))?;
    if meta.nlink() == 1 {
        return Ok(Taken::No);
    }
    let layers = store.layers.scan()?;
    let catalog = store.home().catalog()?;
    let mut names = layers.names_of(FileId::of(&meta));
    match names.any(|file| is_recorded(store, file, &catalog)) {
        true => Ok(Taken::Yes),
        false => Ok(Taken::Perhaps),
    }
}

fn is_recorded(store: &Store, file: &ImageFile, catalog: &Catalog) -> bool {
    match &file.role {
        Role::Live { box_id } => catalog.box_by_id(box_id).is_some(),
        Role::Snapshot { box_id, .. } => {
            let mut rows = catalog.snapshots_of(box_id).iter();
            rows.any(|row| store.exports.disks.snapshot_layer(row) == file.path)
        }
        Role::Base { .. } => true,
    }
}

/// Removes an archive that has become a box, and its note before it.
fn discard_archive(archive: &WaitingArchive) {
    discard(&WaitingArchive::note_of(&archive.disk));
    discard(&archive.disk);
}
