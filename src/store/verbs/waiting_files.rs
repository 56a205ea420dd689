//! Complete archives that wait for their box or their final name.
//!
//! The program that copied such an archive got success from close and may have removed its source.
//! So each has a note beside its disk in the workspace and survives the death of the mount: the
//! next mount makes a box from it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use crate::disk::FileId;
use crate::exports::{Contents, Source};
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::files::waiting_archive::{WaitingArchive, waiting_in};
use crate::files::workspace::{Abandoned, discard, remove_but_waiting};
use crate::home::{Catalog, box_id};
use crate::store::Store;
use crate::store::access::lock::made_again;
use crate::store::layers::graph::{ImageFile, Role};
use crate::store::verbs::clone::clone_box;
use crate::store::verbs::import::import_disk;
use crate::store::verbs::import_stream::ImportStream;
use crate::store::verbs::install::NewBoxIdentity;
use crate::{Context, Error, Result};

/// Whether a disk in the workspace is in use elsewhere, as its further names tell.
#[derive(PartialEq, Eq)]
enum DiskUse {
    /// It is the disk of a box or a snapshot.
    Recorded,
    /// It has no other name.
    Unused,
    /// It has another name without a row: that of a change that was cut off.
    Unclear,
}

/// Writes a note that a complete archive waits, and which name a box made from it gets. The note is
/// durable on return.
///
/// `made` is the modification time that the archive's file shows. The disk gets it, too, so that a
/// box or a snapshot made from it shows the same time: copy tools compare times.
///
/// # Errors
/// EBADMSG while the archive is incomplete; ENOSPC, EIO.
pub fn note_waiting(stream: &mut ImportStream, name: &str, made: SystemTime) -> Result<()> {
    if stream.note() == Some(name) {
        return Ok(());
    }
    match write_note(stream, name, made) {
        Ok(()) => {
            stream.set_note(name);
            crash_point("waiting.noted");
            Ok(())
        }
        // It was accepted with its earlier note, which is still there.
        Err(error) if stream.note().is_some() => {
            log::warn!("the waiting archive {name} keeps its earlier name: {error}");
            Ok(())
        }
        Err(error) => {
            discard(&WaitingArchive::note_of(stream.place()));
            Err(error)
        }
    }
}

fn write_note(stream: &ImportStream, name: &str, made: SystemTime) -> Result<()> {
    durable::set_modified(stream.disk()?, made)?;
    stream.as_waiting(name)?.write_note()
}

/// Makes a box from a waiting archive when the mount ends, and returns the box's name. If that
/// fails, the archive stays for the next mount.
///
/// # Errors
/// Those of importing a box.
pub fn keep_archive(store: &Store, stream: &mut ImportStream, name: &str) -> Result<String> {
    note_waiting(stream, name, SystemTime::now())?;
    // From here on the note decides what becomes of the disk.
    stream.leave();
    let archive = stream.as_waiting(name)?;
    let box_name = make_box_from(store, &archive)?;
    discard_archive(&archive);
    Ok(box_name)
}

/// Makes a box from a waiting copy of a state of this home when the mount ends, and returns the
/// box's name.
///
/// # Errors
/// Those of cloning a box.
pub fn keep_copy(store: &Store, source: &Source, read: &Contents, name: &str) -> Result<String> {
    let new = new_box(store, name)?;
    clone_box(store, source, read, &new)?;
    Ok(new.name)
}

/// Makes a box from each archive that waited when a mount was killed. `has_recovered` says that the
/// home was recovered since. Failures are logged, and the archive waits for the next mount.
pub fn keep_left_archives(store: &Store, abandoned: Vec<Abandoned>, has_recovered: bool) {
    for workspace in abandoned {
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
    if has_become(store, archive) {
        discard_archive(archive);
        return;
    }
    let made = match disk_use(store, &archive.disk) {
        Ok(DiskUse::Recorded) => {
            discard_archive(archive);
            return;
        }
        Ok(DiskUse::Unclear) if !has_recovered => Err(Error::busy(
            "its disk may already belong to a box, and only recovery can tell",
        )),
        Ok(DiskUse::Unclear) => Err(Error::busy("a change with its disk was cut off")),
        Ok(DiskUse::Unused) => make_box_from(store, archive),
        Err(error) => Err(error),
    };
    match made {
        Ok(box_name) => {
            store.events().info(&format!(
                "the archive {name} waited when its mount was killed; it is now the box {box_name}"
            ));
            discard_archive(archive);
        }
        Err(error) => store.events().warn(&format!(
            "the archive {name} waited when its mount was killed, and waits for the next mount: {error}"
        )),
    }
}

/// Returns whether there is the snapshot that the archive was about to become.
fn has_become(store: &Store, archive: &WaitingArchive) -> bool {
    let (Some(id), Ok(catalog)) = (&archive.becomes, store.home().catalog()) else {
        return false;
    };
    let mut boxes = catalog.boxes();
    boxes.any(|record| catalog.snapshot_by_id(&record.id, id).is_some())
}

/// Makes a box from an archive and returns its name: that of the archive, with a number appended if
/// the name is taken.
fn make_box_from(store: &Store, archive: &WaitingArchive) -> Result<String> {
    let new = new_box(store, &archive.name)?;
    made_again(store, &|| {
        import_disk(store, &archive.disk, archive.options.clone(), &new)
    })?;
    Ok(new.name)
}

/// Chooses the id and the name of a new box: `name`, with a number appended if it is taken.
fn new_box(store: &Store, name: &str) -> Result<NewBoxIdentity> {
    let catalog = store.home().catalog()?;
    let is_free = |name: &String| {
        let mut boxes = catalog.boxes();
        !boxes.any(|record| record.name.as_deref() == Some(name) || record.id == *name)
    };
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    let name = std::iter::once(name.to_owned())
        .chain(numbered)
        .find(is_free)
        .ok_or_else(|| Error::new(libc::EEXIST, format!("every name like {name} is taken")))?;
    Ok(NewBoxIdentity {
        id: box_id()?,
        name,
        description: None,
    })
}

/// Returns whether the disk of an archive has become the disk of a box or a snapshot.
fn disk_use(store: &Store, disk: &Path) -> Result<DiskUse> {
    let meta = fs::metadata(disk).context(|| format!("cannot look at {}", disk.display()))?;
    if meta.nlink() == 1 {
        return Ok(DiskUse::Unused);
    }
    let layers = store.layers.scan()?;
    let catalog = store.home().catalog()?;
    let mut names = layers.names_of(FileId::of(&meta));
    if names.any(|file| is_recorded(store, file, &catalog)) {
        Ok(DiskUse::Recorded)
    } else {
        Ok(DiskUse::Unclear)
    }
}

/// Returns whether an image file belongs to a box or a snapshot with a row. Bases always count.
fn is_recorded(store: &Store, file: &ImageFile, catalog: &Catalog) -> bool {
    match &file.role {
        Role::Live { box_id } => catalog.box_by_id(box_id).is_some(),
        Role::Snapshot { box_id, .. } => {
            let mut rows = catalog.snapshots_of(box_id).iter();
            rows.any(|row| store.exports.disks.snapshot_layer(row) == file.path)
        }
        Role::Base { .. } | Role::Kept { .. } => true,
    }
}

/// Removes an archive that has become a box: first its note, then its disk.
fn discard_archive(archive: &WaitingArchive) {
    discard(&WaitingArchive::note_of(&archive.disk));
    discard(&archive.disk);
}
