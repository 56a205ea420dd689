//! Changing a home while a BoxLite runtime holds its lock.
//!
//! SQLite lets one connection write at a time. From [`SharedAccess::begin_exclusive`] to the commit
//! the runtime records nothing. What BoxLite does to files before it records them, and what it
//! never records, the change has to notice by itself.

use std::cell::{Cell, RefCell};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::connection::data_version;
use super::lock::{flock_exclusive, holder_of, take_lock};
use super::paths::Home;
use super::queries::Queries;
use super::records::{BoxRecord, SnapshotRecord};
use crate::{Context, Error, Result};

/// What one change knows about the BoxLite runtime it shares the home with.
pub(super) struct SharedAccess {
    /// The process that holds the runtime lock.
    holder: u32,
    /// SQLite's count of commits by others when the watched rows were last compared.
    version: Cell<i64>,
    /// Rows that must not change: those of the boxes whose files this change touches.
    watched: RefCell<Vec<(BoxRecord, Vec<SnapshotRecord>)>>,
    /// The locks that BoxLite takes to start one of these boxes: the path and the locked file.
    locks: RefCell<Vec<(PathBuf, File)>>,
    /// The runtime lock, taken once that runtime had ended, so that no other begins meanwhile.
    lock: RefCell<Option<File>>,
}

impl SharedAccess {
    /// Access beside the runtime that process `holder` runs.
    pub fn beside(holder: u32) -> SharedAccess {
        SharedAccess {
            holder,
            version: Cell::new(0),
            watched: RefCell::default(),
            locks: RefCell::default(),
            lock: RefCell::default(),
        }
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
        let number = record.state()?["lock_id"].as_u64();
        let number = number.and_then(|number| u32::try_from(number).ok());
        let path = home.box_lock(number.ok_or_else(|| {
            Error::busy(format!(
                "box {name} has no lock of its own, so BoxLite can't be kept from starting it; end the program that has the home open"
            ))
        })?);
        // BoxLite opens the file by its name each time and does not create it: without the file
        // BoxLite can't start the box either.
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Error::busy(format!(
                "the lock of box {name}, {}, is gone, so BoxLite can't be kept from starting it; end the program that has the home open",
                path.display()
            )),
            _ => Error::io(format!("cannot open {}", path.display()), e),
        })?;
        match flock_exclusive(&file) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => {
                return Err(Error::busy(format!(
                    "BoxLite is starting box {name}; stop it first"
                )));
            }
            Err(e) => return Err(Error::io(format!("cannot lock {}", path.display()), e)),
        }
        self.locks.borrow_mut().push((path, file));
        watched.push((record.clone(), rows.snapshots_of(&record.id)?));
        Ok(())
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
        self.refuse_other_runtime(home)?;
        if self.lock.borrow().is_none()
            && let Some(lock) = take_lock(home, Duration::ZERO)?
        {
            self.lock.replace(Some(lock));
        }
        for (path, file) in &*self.locks.borrow() {
            let meta = file.metadata().context(|| "cannot look at a lock")?;
            if file_id(path).ok() != Some((meta.dev(), meta.ino())) {
                return Err(other_runtime());
            }
        }
        Ok(())
    }

    /// EBUSY unless the watched rows are as they were.
    fn compare_watched(&self, rows: &Queries) -> Result<()> {
        for (known, snapshots) in &*self.watched.borrow() {
            let name = known.name.as_deref().unwrap_or(&known.id);
            let faster = || {
                Error::busy(format!(
                    "BoxLite changed box {name} at the same moment; try again"
                ))
            };
            let now = rows.box_by_id(&known.id).map_err(|_| faster())?;
            if now != *known || rows.snapshots_of(&known.id)? != *snapshots {
                return Err(faster());
            }
        }
        Ok(())
    }

    /// EBUSY when another runtime than the one this change began beside holds the lock.
    pub fn refuse_other_runtime(&self, home: &Home) -> Result<()> {
        let is_ours = self.lock.borrow().is_some();
        match holder_of(home)? {
            Some(holder) if !is_ours && holder != self.holder => Err(other_runtime()),
            _ => Ok(()),
        }
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
    Error::busy("a BoxLite runtime ended and another began at the same moment; try again")
}
