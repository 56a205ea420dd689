//! Changing a home without BoxLite's runtime lock: beside a runtime that holds it, or while nobody
//! does, so that a runtime can start at any moment.
//!
//! SQLite lets one connection write at a time. From [`SharedAccess::begin_exclusive`] to the commit
//! the runtime records nothing. What BoxLite does to files before it records them, and what it
//! never records, the change has to notice by itself.

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::connection::data_version;
use super::lock::{holder_of, lock_file};
use super::paths::Home;
use super::queries::Queries;
use super::records::{BoxRecord, SnapshotRecord};
use crate::{Context, Error, Result};

/// What one change knows about the BoxLite runtime it shares the home with.
pub(super) struct SharedAccess {
    /// The process that held the runtime lock when the change began; None if nobody did, as far as
    /// can be seen from here.
    holder: Option<u32>,
    /// SQLite's count of commits by others when the watched rows were last compared.
    version: Cell<i64>,
    /// Rows that must not change: those of the boxes whose files this change touches.
    watched: RefCell<Vec<(BoxRecord, Vec<SnapshotRecord>)>>,
    /// The locks that BoxLite takes to start one of these boxes: the path and the open file. A
    /// runtime that starts removes all of these files before it looks for directories without a
    /// row, and makes them again after it.
    locks: RefCell<Vec<(PathBuf, File)>>,
    /// The runtime lock, if the change took it.
    lock: RefCell<Option<File>>,
}

impl SharedAccess {
    /// Access beside the runtime that process `holder` runs, or with nobody.
    pub fn beside(holder: Option<u32>) -> SharedAccess {
        SharedAccess {
            holder,
            version: Cell::new(0),
            watched: RefCell::default(),
            locks: RefCell::default(),
            lock: RefCell::default(),
        }
    }

    /// Returns the process that held the runtime lock when the change began.
    pub fn holder(&self) -> Option<u32> {
        self.holder
    }

    /// Returns whether nobody held the runtime lock when the change began.
    pub fn is_alone(&self) -> bool {
        self.holder.is_none()
    }

    /// Keeps the runtime lock, which was taken after the change began.
    pub fn keep_lock(&self, lock: File) {
        self.lock.replace(Some(lock));
    }

    /// Returns the runtime lock, if it was taken.
    pub fn into_lock(self) -> Option<File> {
        self.lock.into_inner()
    }

    /// Notices when a runtime that starts removes this lock file, which was just made.
    pub fn notice_removal(&self, path: PathBuf, file: File) {
        self.locks.borrow_mut().push((path, file));
    }

    /// Keeps all others from writing until the first transaction ends.
    pub fn begin(&self, rows: &Queries) -> Result<()> {
        begin_immediate(rows)?;
        self.version.set(rows.sql(data_version(&rows.connection))?);
        Ok(())
    }

    /// Locks the box against a start by BoxLite, and remembers its rows.
    ///
    /// # Errors
    /// EBUSY while BoxLite starts the box, or if it can't be kept from starting it.
    pub fn watch(&self, home: &Home, rows: &Queries, record: &BoxRecord) -> Result<()> {
        let mut watched = self.watched.borrow_mut();
        if watched.iter().any(|(known, _)| known.id == record.id) {
            return Ok(());
        }
        let name = record.name.as_deref().unwrap_or(&record.id);
        let path = home.box_lock(record.lock_id()?.ok_or_else(|| {
            Error::busy(format!(
                "box {name} has no lock of its own, so BoxLite can't be kept from starting it; end the program that has the home open"
            ))
        })?);
        // BoxLite opens the file by its name each time and does not create it: without the file
        // BoxLite can't start the box either.
        let file = lock_file(&path).map_err(|e| match e.kind() {
            // A runtime that starts makes it again.
            ErrorKind::NotFound => Error::busy(format!(
                "the lock of box {name}, {}, is gone, so BoxLite can't be kept from starting it; end the program that has the home open",
                path.display()
            ))
            .for_a_moment(),
            ErrorKind::WouldBlock => {
                Error::busy(format!("BoxLite is starting box {name}; stop it first"))
            }
            _ => Error::io(format!("cannot lock {}", path.display()), e),
        })?;
        self.locks.borrow_mut().push((path, file));
        watched.push((record.clone(), rows.snapshots_of(&record.id)?));
        Ok(())
    }

    /// Returns the lock by which BoxLite is kept from starting a watched box. It is held until the
    /// last of its copies is closed.
    pub fn box_lock(&self, path: &Path) -> Option<std::io::Result<File>> {
        let locks = self.locks.borrow();
        let found = locks.iter().find(|(of, _)| of == path);
        found.map(|(_, file)| file.try_clone())
    }

    /// Begins a transaction unless one is open, and verifies that nothing this change depends on
    /// has changed.
    ///
    /// # Errors
    /// EBUSY when BoxLite was faster.
    pub fn begin_exclusive(&self, home: &Home, rows: &Queries) -> Result<()> {
        begin_immediate(rows)?;
        let version = rows.sql(data_version(&rows.connection))?;
        if version != self.version.get() {
            self.compare_watched(rows)?;
            self.version.set(version);
        }
        self.refuse_other_runtime(home)
    }

    /// EBUSY unless the watched rows are as they were.
    fn compare_watched(&self, rows: &Queries) -> Result<()> {
        for (known, snapshots) in &*self.watched.borrow() {
            let name = known.name.as_deref().unwrap_or(&known.id);
            let faster = || {
                Error::busy(format!(
                    "BoxLite changed box {name} at the same moment; try again"
                ))
                .for_a_moment()
            };
            let now = rows.box_by_id(&known.id).map_err(|_| faster())?;
            if now != *known || rows.snapshots_of(&known.id)? != *snapshots {
                return Err(faster());
            }
        }
        Ok(())
    }

    /// Refuses when a runtime has started since the change began, even one that has ended again.
    /// Its holder is told by the kernel, and that it has begun by the lock files it removed.
    ///
    /// Without a lock file of an earlier box, as in a home without boxes, a runtime that began just
    /// before the change is not told from one that has been there for long.
    ///
    /// # Errors
    /// EBUSY, for a moment.
    pub fn refuse_other_runtime(&self, home: &Home) -> Result<()> {
        let is_ours = self.lock.borrow().is_some();
        if let Some(holder) = holder_of(home)?
            && !is_ours
            && Some(holder) != self.holder
        {
            return Err(other_runtime());
        }
        for (path, file) in &*self.locks.borrow() {
            let meta = file.metadata().context(|| "cannot look at a lock")?;
            if file_id(path).ok() != Some((meta.dev(), meta.ino())) {
                return Err(other_runtime());
            }
        }
        Ok(())
    }
}

/// Keeps all others from writing, unless a transaction of ours does already.
fn begin_immediate(rows: &Queries) -> Result<()> {
    if rows.connection.is_autocommit() {
        rows.execute("BEGIN IMMEDIATE")
    } else {
        Ok(())
    }
}

fn file_id(path: &Path) -> Result<(u64, u64)> {
    let meta = fs::metadata(path).context(|| format!("cannot look at {}", path.display()))?;
    Ok((meta.dev(), meta.ino()))
}

fn other_runtime() -> Error {
    Error::busy("a BoxLite runtime started at the same moment; try again").for_a_moment()
}
