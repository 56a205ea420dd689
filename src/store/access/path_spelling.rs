//! Rows and headers that name a file of the home by another path than its canonical one.
//!
//! BoxLite canonicalizes `bases/` and compares it, as text, with the paths in rows and headers. Its
//! start deletes every base that none of them names. After a home was moved and a symlink put in
//! its place, none of them match. So we write canonical paths only, and correct all others before
//! any other change.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::Ordering;

use crate::disk::FileId;
use crate::files::crash_points::crash_point;
use crate::files::durable;
use crate::home::{Activity, Change, RecordedIn, RecordedPath};
use crate::store::Store;
use crate::store::layers::graph::{ImageFile, LayerGraph, Role};
use crate::{Error, Result, disk};

/// Headers corrected while the lock is held once. Each takes two flushes, and a BoxLite program may
/// be waiting to start.
const HEADERS_AT_ONCE: usize = 16;

/// How the spelling of a path relates to the home.
#[derive(Debug, PartialEq, Eq)]
enum Spelling {
    /// The path is as BoxLite computes it, or leads out of the home.
    Canonical,
    /// The path leads through a symlink; this is the canonical path of the file.
    Aliased(PathBuf),
    /// The path is canonical, but the home is mounted a second time; this is the file's path in our
    /// mount of the home.
    SecondMount(PathBuf),
}

/// A row or a header that names a file of the home by another path than the canonical one.
#[derive(Debug)]
pub struct Misspelled {
    place: SpelledIn,
    /// The path that is stored.
    pub stored: PathBuf,
    /// The canonical path of the same file.
    pub right: PathBuf,
}

/// Where a path is stored.
#[derive(Debug)]
enum SpelledIn {
    Row(RecordedPath),
    Header { image: PathBuf, id: FileId },
}

impl Misspelled {
    /// Returns whether BoxLite may delete the file because of this path.
    pub fn is_dangerous(&self) -> bool {
        match &self.place {
            SpelledIn::Header { .. } => true,
            SpelledIn::Row(row) => {
                matches!(row.place, RecordedIn::BaseColumn | RecordedIn::BaseJson)
            }
        }
    }

    fn is_row(&self) -> bool {
        matches!(self.place, SpelledIn::Row(_))
    }
}

impl std::fmt::Display for Misspelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.place {
            SpelledIn::Header { image, .. } => write!(f, "the header of {}", image.display())?,
            SpelledIn::Row(row) => match row.place {
                RecordedIn::BaseColumn => write!(f, "the row of base {}", row.id)?,
                RecordedIn::BaseJson => write!(f, "the JSON of base {}", row.id)?,
                RecordedIn::Snapshot => write!(f, "the row of snapshot {}", row.id)?,
                RecordedIn::BoxHome => write!(f, "the configuration of box {}", row.id)?,
            },
        }
        write!(
            f,
            " names {} by another path, {}",
            self.right.display(),
            self.stored.display()
        )
    }
}

/// Compares paths with their canonical form; resolves each directory once.
struct Speller<'s> {
    store: &'s Store,
    /// Directory → its canonical path; None if it cannot be resolved.
    resolved: HashMap<PathBuf, Option<PathBuf>>,
    /// The directories of the home that hold layers.
    own: Vec<(FileId, PathBuf)>,
}

impl<'s> Speller<'s> {
    fn of(store: &'s Store) -> Speller<'s> {
        let dirs = store.home().directories();
        let own = dirs.filter_map(|dir| Some((FileId::at(dir).ok()?, dir.to_owned())));
        Speller {
            store,
            resolved: HashMap::new(),
            own: own.collect(),
        }
    }

    /// Returns how a path is spelled. Relative paths start at the directory of the image. BoxLite
    /// writes none, so they count as canonical and are left alone.
    fn spelling(&mut self, path: &Path) -> Spelling {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Spelling::Canonical;
        };
        if !path.is_absolute() {
            return Spelling::Canonical;
        }
        // Almost all paths are like this, and there may be thousands: avoid resolving them.
        let plain: PathBuf = path.components().collect();
        let is_plain = plain.as_os_str() == path.as_os_str()
            && !path.components().any(|part| part == Component::ParentDir);
        let (boxes, bases) = (self.store.home().boxes_dir(), self.store.home().bases_dir());
        if is_plain && (path.starts_with(boxes) || path.starts_with(bases)) {
            return Spelling::Canonical;
        }
        let entry = self.resolved.entry(dir.to_owned());
        let resolved = entry.or_insert_with(|| std::fs::canonicalize(dir).ok());
        let Some(resolved) = resolved else {
            return Spelling::Canonical;
        };
        let right = resolved.join(name);
        if self.store.home().contains(&right) {
            // BoxLite compares text, so `//` and `/./` matter.
            return if right.as_os_str() == path.as_os_str() {
                Spelling::Canonical
            } else {
                Spelling::Aliased(right)
            };
        }
        // A directory of the home may be mounted elsewhere as well: compare by identity, not by
        // path.
        for above in resolved.ancestors() {
            let Ok(id) = FileId::at(above) else { continue };
            if let Some((_, dir)) = self.own.iter().find(|(own, _)| *own == id)
                && let Ok(rest) = right.strip_prefix(above)
            {
                return Spelling::SecondMount(dir.join(rest));
            }
        }
        Spelling::Canonical
    }
}

/// Returns the rows and the headers that name files of the home by another path. Without `layers`,
/// only rows are checked.
///
/// # Errors
/// EPERM when the home is mounted in two places and the rows name the other one.
fn misspelled(
    store: &Store,
    rows: Vec<RecordedPath>,
    layers: Option<&LayerGraph>,
) -> Result<Vec<Misspelled>> {
    let mut speller = Speller::of(store);
    let mut misspelled = Vec::new();
    for row in rows {
        let stored = PathBuf::from(&row.path);
        match speller.spelling(&stored) {
            Spelling::Canonical => {}
            Spelling::Aliased(right) => misspelled.push(Misspelled {
                place: SpelledIn::Row(row),
                stored,
                right,
            }),
            Spelling::SecondMount(here) => return Err(mounted_twice(store, &stored, &here)),
        }
    }
    for file in layers.into_iter().flat_map(LayerGraph::files) {
        let Some(stored) = &file.stored else { continue };
        if let Spelling::Aliased(right) = speller.spelling(stored) {
            misspelled.push(Misspelled {
                place: SpelledIn::Header {
                    image: file.path.clone(),
                    id: file.id,
                },
                stored: stored.clone(),
                right,
            });
        }
    }
    Ok(misspelled)
}

fn mounted_twice(store: &Store, stored: &Path, here: &Path) -> Error {
    Error::new(
        libc::EPERM,
        format!(
            "{} is the same directory as one at {}, mounted a second time, and the rows name its files by that path ({}). BoxLite would delete, when it starts with one path, the layers that were recorded with the other. Mount the home by the path that BoxLite uses",
            store.home().root().display(),
            stored.parent().unwrap_or(stored).display(),
            here.display()
        ),
    )
}

/// Returns the rows, and the headers of `layers`, that name files of the home by another path.
/// Needs no lock.
///
/// # Errors
/// EPERM when the home is mounted in two places and the rows name the other one; those of the
/// database.
pub fn misspelled_now(store: &Store, layers: Option<&LayerGraph>) -> Result<Vec<Misspelled>> {
    misspelled(store, RecordedPath::all(store.home())?, layers)
}

/// Warns in the log if BoxLite's next start may delete layers. `why` says why the paths cannot be
/// corrected now.
pub fn warn_of_paths(store: &Store, why: &str) {
    match misspelled_now(store, None) {
        Ok(misspelled) => {
            let dangerous = || misspelled.iter().filter(|path| path.is_dangerous());
            let count = dangerous().count();
            if let Some(first) = dangerous().next() {
                store.events().warn(&format!(
                    "BoxLite's next start may delete layers of this home: the home was moved or is reached through a link, and {count} rows name layers by other paths ({first}). They cannot be corrected now: {why}"
                ));
            }
        }
        Err(error) => store.events().warn(&error.to_string()),
    }
}

/// Returns whether [`put_paths_right`] has succeeded since the mount began.
pub fn has_right_paths(store: &Store) -> bool {
    store.access.paths_are_right.load(Ordering::Acquire)
}

/// Refuses changes beside a runtime, where paths cannot be corrected, if the home is mounted in two
/// places and the rows name the other one. Checks only until the first success.
///
/// # Errors
/// EPERM; those of the database.
pub fn refuse_mounted_twice(store: &Store, change: &Change<'_>) -> Result<()> {
    if has_right_paths(store) || store.access.is_mounted_once.load(Ordering::Acquire) {
        return Ok(());
    }
    misspelled(store, change.recorded_paths()?, None)?;
    store.access.is_mounted_once.store(true, Ordering::Release);
    Ok(())
}

/// Makes all rows and headers name the home's files by their canonical paths. Does nothing if this
/// succeeded before in this mount.
///
/// Order: all rows in one transaction, then the headers, each by a rebase. BoxLite keeps a base
/// that a row or a header names, so all bases with rows are safe from the first step on. A crash
/// after it leaves headers with the old path. They still lead to the same files and are corrected
/// next time.
///
/// # Errors
/// EBUSY when a runtime has the lock, EPERM when the home is mounted in two places; those of the
/// database.
pub fn put_paths_right(store: &Store) -> Result<()> {
    if has_right_paths(store) {
        return Ok(());
    }
    let mut count = 0;
    loop {
        let mut change = store.home().change()?;
        durable::sync_unflushed()?;
        let layers = store.layers.scan()?;
        let misspelled = misspelled(store, change.recorded_paths()?, Some(&layers))?;
        count += put_rows_right(&mut change, &misspelled)?;
        let done = put_headers_right(store, &change, &layers, &misspelled)?;
        count += done;
        if done < HEADERS_AT_ONCE {
            break;
        }
    }
    if count > 0 {
        store.events().info(&format!(
            "{count} rows and headers named files of this home by another path, as after it was moved; they now name {}",
            store.home().root().display()
        ));
    }
    store.access.note_right_paths();
    Ok(())
}

fn put_rows_right(change: &mut Change<'_>, misspelled: &[Misspelled]) -> Result<usize> {
    let rows = || misspelled.iter().filter(|path| path.is_row());
    if rows().next().is_none() {
        return Ok(0);
    }
    change.transaction(|transaction| {
        rows().try_for_each(|path| match &path.place {
            SpelledIn::Row(row) => transaction.record_path(row, &path.right),
            SpelledIn::Header { .. } => Ok(()),
        })
    })?;
    crash_point("paths.recorded");
    Ok(rows().count())
}

/// Corrects up to [`HEADERS_AT_ONCE`] headers and returns how many. These are left as they are:
/// live disks of running boxes, images with more names than the home knows (a backup keeps its
/// header), and headers without space for the path. Their bases have rows, or get them with the
/// next change of the box.
fn put_headers_right(
    store: &Store,
    change: &Change<'_>,
    layers: &LayerGraph,
    misspelled: &[Misspelled],
) -> Result<usize> {
    let mut done = 0;
    for path in misspelled {
        let SpelledIn::Header { image, id } = &path.place else {
            continue;
        };
        let Some(file) = layers.at(image) else {
            continue;
        };
        let all_names_known = file.names <= layers.names_of(*id).count() as u64;
        if done == HEADERS_AT_ONCE || !all_names_known || !may_rebase(store, change, file)? {
            continue;
        }
        match disk::rebase_this(image, *id, &path.right) {
            Ok(()) => done += 1,
            Err(error) if error.errno() == libc::EOPNOTSUPP => {
                store.events().info(&error.to_string());
            }
            Err(error) => return Err(error),
        }
        crash_point("paths.rebased");
    }
    Ok(done)
}

/// Returns whether an image may be rebased: it is not the live disk of a running box, and its box
/// has a row.
fn may_rebase(store: &Store, change: &Change<'_>, file: &ImageFile) -> Result<bool> {
    let Some(box_id) = file.box_id() else {
        return Ok(true);
    };
    match change.box_by_id(box_id) {
        Ok(record) => Ok(!matches!(file.role, Role::Live { .. })
            || store.home().activity(&record) == Activity::Idle),
        Err(error) if error.errno() == libc::ENOENT => Ok(false),
        Err(error) => Err(error),
    }
}
