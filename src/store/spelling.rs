//! Paths in rows and headers that lead to a file of the home by another way than its canonical path.
//!
//! BoxLite canonicalizes `bases/` and compares it, as text, with what rows and headers say; its start deletes
//! every base that neither names. After a home was moved and a link put in its place, none do. So what we write
//! is the canonical path, and what is found otherwise is put right before anything else is changed.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::Ordering;

use super::crash::crash_point;
use super::layers::{ImageFile, Layers, Role};
use super::{Store, durable};
use crate::disk::{self, FileId};
use crate::home::{Activity, Change, RecordedIn, RecordedPath};
use crate::{Error, Result};

/// Headers put right with the lock held once: each takes two flushes, and a program with BoxLite may want to
/// start.
const HEADERS_AT_ONCE: usize = 16;

/// How a path stands to the home.
#[derive(Debug, PartialEq, Eq)]
enum Spelling {
    /// It is as BoxLite computes it, or leads out of the home.
    Right,
    /// It leads to this path of the home, through a link.
    Otherwise(PathBuf),
    /// It is canonical itself, and its directory is this one of the home: mounted in two places.
    Twice(PathBuf),
}

/// A row or a header that names a file of the home by another path.
#[derive(Debug)]
pub(super) struct Misspelled {
    what: What,
    /// As it is written.
    pub stored: PathBuf,
    /// As it has to be.
    pub right: PathBuf,
}

#[derive(Debug)]
enum What {
    Row(RecordedPath),
    Header { image: PathBuf, id: FileId },
}

impl Misspelled {
    /// Whether BoxLite may delete a file because of it.
    pub fn is_dangerous(&self) -> bool {
        match &self.what {
            What::Header { .. } => true,
            What::Row(row) => matches!(row.place, RecordedIn::BaseColumn | RecordedIn::BaseJson),
        }
    }

    fn is_row(&self) -> bool {
        matches!(self.what, What::Row(_))
    }
}

impl std::fmt::Display for Misspelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.what {
            What::Header { image, .. } => write!(f, "the header of {}", image.display())?,
            What::Row(row) => match row.place {
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

/// Looks paths up, each directory once.
struct Speller<'s> {
    store: &'s Store,
    directories: HashMap<PathBuf, Option<PathBuf>>,
    /// The directories that layers lie in.
    own: Vec<(FileId, PathBuf)>,
}

impl<'s> Speller<'s> {
    fn of(store: &'s Store) -> Speller<'s> {
        let dirs = store.home.directories();
        let own = dirs.filter_map(|dir| Some((FileId::at(dir).ok()?, dir.to_owned())));
        Speller {
            store,
            directories: HashMap::new(),
            own: own.collect(),
        }
    }

    /// How a path is spelled. A relative one counts from the directory of the image, as BoxLite does not
    /// write it: it is left alone.
    fn spelling(&mut self, path: &Path) -> Spelling {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Spelling::Right;
        };
        if !path.is_absolute() {
            return Spelling::Right;
        }
        // As nearly all are, and nothing to be resolved: there may be thousands.
        let plain: PathBuf = path.components().collect();
        let is_plain = plain.as_os_str() == path.as_os_str()
            && !path.components().any(|part| part == Component::ParentDir);
        let (boxes, bases) = (self.store.home.boxes_dir(), self.store.home.bases_dir());
        if is_plain && (path.starts_with(boxes) || path.starts_with(bases)) {
            return Spelling::Right;
        }
        let known = self.directories.entry(dir.to_owned());
        let resolved = known.or_insert_with(|| std::fs::canonicalize(dir).ok());
        let Some(resolved) = resolved else {
            return Spelling::Right;
        };
        let right = resolved.join(name);
        if self.store.home.contains(&right) {
            // Compared as text, for `//` and `/./` count.
            return match right.as_os_str() == path.as_os_str() {
                true => Spelling::Right,
                false => Spelling::Otherwise(right),
            };
        }
        // The same directories at another place of the tree: one of them is that of the home itself.
        for above in resolved.ancestors() {
            let Ok(id) = FileId::at(above) else { continue };
            if let Some((_, dir)) = self.own.iter().find(|(own, _)| *own == id)
                && let Ok(rest) = right.strip_prefix(above)
            {
                return Spelling::Twice(dir.join(rest));
            }
        }
        Spelling::Right
    }
}

impl Store {
    /// What rows and headers name by another path. `layers` are the headers to look at, if any.
    ///
    /// # Errors
    /// EPERM when the home is mounted in two places, and the rows are those of the other one.
    fn misspelled(
        &self,
        rows: Vec<RecordedPath>,
        layers: Option<&Layers>,
    ) -> Result<Vec<Misspelled>> {
        let mut speller = Speller::of(self);
        let mut found = Vec::new();
        for row in rows {
            let stored = PathBuf::from(&row.path);
            match speller.spelling(&stored) {
                Spelling::Right => {}
                Spelling::Otherwise(right) => found.push(Misspelled {
                    what: What::Row(row),
                    stored,
                    right,
                }),
                Spelling::Twice(here) => return Err(self.mounted_twice(&stored, &here)),
            }
        }
        for file in layers.map_or(&[][..], Layers::files) {
            let Some(stored) = &file.stored else { continue };
            if let Spelling::Otherwise(right) = speller.spelling(stored) {
                found.push(Misspelled {
                    what: What::Header {
                        image: file.path.clone(),
                        id: file.id,
                    },
                    stored: stored.clone(),
                    right,
                });
            }
        }
        Ok(found)
    }

    fn mounted_twice(&self, stored: &Path, here: &Path) -> Error {
        Error::new(
            libc::EPERM,
            format!(
                "{} is the same directory as one at {}, mounted a second time, and the rows name its files by that path ({}): what is written by one path BoxLite would delete when it starts by the other. Mount the home by the path BoxLite uses",
                self.home.root().display(),
                stored.parent().unwrap_or(stored).display(),
                here.display()
            ),
        )
    }

    /// What rows and headers name by another path, looked at without the lock.
    ///
    /// # Errors
    /// Those of looking; as [`Store::put_paths_right`].
    pub(super) fn misspelled_now(&self, layers: Option<&Layers>) -> Result<Vec<Misspelled>> {
        self.misspelled(RecordedPath::all(&self.home)?, layers)
    }

    /// Says in the log that BoxLite's next start would delete layers, where that can't be mended now.
    pub(super) fn warn_of_paths(&self, why: &str) {
        match self.misspelled_now(None) {
            Ok(found) => {
                let count = found.iter().filter(|it| it.is_dangerous()).count();
                if let Some(one) = found.iter().find(|it| it.is_dangerous()) {
                    self.events.warn(&format!(
                        "BoxLite's next start may delete layers of this home: it was moved or is reached through a link, and {count} rows name layers by other paths ({one}). This can't be mended now, for {why}"
                    ));
                }
            }
            Err(error) => self.events.warn(&error.to_string()),
        }
    }

    /// Whether it was done since the mount began.
    pub(super) fn has_right_paths(&self) -> bool {
        self.paths_are_right.load(Ordering::Acquire)
    }

    /// Refuses changes beside a runtime, where paths can't be put right, if the rows are those of another place
    /// the home is mounted at. Looked at once.
    ///
    /// # Errors
    /// EPERM, what SQLite says.
    pub(super) fn refuse_mounted_twice(&self, change: &Change<'_>) -> Result<()> {
        if self.has_right_paths() || self.is_mounted_once.load(Ordering::Acquire) {
            return Ok(());
        }
        self.misspelled(change.recorded_paths()?, None)?;
        self.is_mounted_once.store(true, Ordering::Release);
        Ok(())
    }

    /// Has all rows and headers name the home's files by their canonical paths, unless this was done since
    /// the mount began.
    ///
    /// Order: all rows in one transaction, then the headers, each by a rebase. BoxLite keeps a base that a
    /// row or a header names: from the first step on all bases with rows are safe, and a crash after it
    /// leaves headers with the old path, which lead to the same files and are put right the next time.
    ///
    /// # Errors
    /// EBUSY when a runtime has the lock, EPERM when the home is mounted in two places, what SQLite says.
    pub(super) fn put_paths_right(&self) -> Result<()> {
        if self.has_right_paths() {
            return Ok(());
        }
        let mut count = 0;
        loop {
            let mut change = self.home.change()?;
            durable::sync_unflushed()?;
            let layers = self.scan_layers()?;
            let found = self.misspelled(change.recorded_paths()?, Some(&layers))?;
            count += self.put_rows_right(&mut change, &found)?;
            let done = self.put_headers_right(&change, &layers, &found)?;
            count += done;
            if done < HEADERS_AT_ONCE {
                break;
            }
        }
        if count > 0 {
            self.events.info(&format!(
                "{count} rows and headers named files of this home by another path, as after it was moved; they name {} now",
                self.home.root().display()
            ));
        }
        self.paths_are_right.store(true, Ordering::Release);
        Ok(())
    }

    fn put_rows_right(&self, change: &mut Change<'_>, found: &[Misspelled]) -> Result<usize> {
        let rows = || found.iter().filter(|it| it.is_row());
        if rows().next().is_none() {
            return Ok(0);
        }
        change.transaction(|transaction| {
            rows().try_for_each(|it| match &it.what {
                What::Row(row) => transaction.record_path(row, &it.right),
                What::Header { .. } => Ok(()),
            })
        })?;
        crash_point("paths.recorded");
        Ok(rows().count())
    }

    /// Some of the headers; how many were put right. Left as they are: what runs, what has more names than the
    /// home knows (a backup keeps the header it has), and what has no room for the path. Their bases have
    /// rows, or get them with the next change of the box.
    fn put_headers_right(
        &self,
        change: &Change<'_>,
        layers: &Layers,
        found: &[Misspelled],
    ) -> Result<usize> {
        let mut done = 0;
        for it in found {
            let What::Header { image, id } = &it.what else {
                continue;
            };
            let Some(file) = layers.at(image) else {
                continue;
            };
            let is_known = file.names <= layers.names_of(*id).count() as u64;
            if done == HEADERS_AT_ONCE || !is_known || !self.may_rebase(change, file)? {
                continue;
            }
            match disk::rebase_this(image, *id, &it.right) {
                Ok(()) => done += 1,
                Err(error) if error.errno() == libc::EOPNOTSUPP => {
                    self.events.info(&error.to_string());
                }
                Err(error) => return Err(error),
            }
            crash_point("paths.rebased");
        }
        Ok(done)
    }

    /// Whether nobody may be writing to a file, and its box is BoxLite's at all.
    fn may_rebase(&self, change: &Change<'_>, file: &ImageFile) -> Result<bool> {
        let Some(box_id) = file.box_id() else {
            return Ok(true);
        };
        match change.box_by_id(box_id) {
            Ok(record) => Ok(!matches!(file.role, Role::Live { .. })
                || self.home.activity(&record) == Activity::Idle),
            Err(error) if error.errno() == libc::ENOENT => Ok(false),
            Err(error) => Err(error),
        }
    }
}
