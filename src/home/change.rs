//! The right to change a home: the locks, a fresh connection, and the transactions.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::MutexGuard;

use super::catalog::read_schema;
use super::catalog_reader::database_id;
use super::connection::{connect, failed};
use super::lock::{LOCK_PATIENCE, holder_of, lock_file, shows_all_locks, take_lock, take_turn};
use super::paths::Home;
use super::queries::Queries;
use super::records::BoxRecord;
use super::shared_access::SharedAccess;
use super::transactions::Transaction;
use crate::process::control::{is_stopped, named};
use crate::{Context, Error, Result};

/// The first lock number we hand out. A running runtime hands out the lowest unused number it knows
/// of, and fails when that was taken meanwhile.
const FIRST_LOCK_ID: u32 = 1_000_000;

/// The right to change a home. It keeps a fresh connection open. As long as it lives, no other
/// process changes the home, except as [`Home::change_shared`] allows. Hold it for milliseconds.
///
/// It dereferences to the [`Queries`] that read the rows as they are now.
pub struct Change<'h> {
    home: &'h Home,
    rows: Queries,
    epoch: Cell<u64>,
    /// Present in a change without the runtime lock.
    shared: Option<SharedAccess>,
    /// The runtime lock, unless the change is shared.
    _lock: Option<File>,
    _ours: File,
    _serial: MutexGuard<'h, ()>,
}

impl Home {
    /// Takes the runtime lock and opens the database afresh.
    ///
    /// # Errors
    /// EBUSY when a BoxLite runtime holds the lock, EROFS when we do not know how to change the
    /// schema.
    pub fn change(&self) -> Result<Change<'_>> {
        let serial = self.changing.lock();
        let ours = take_turn(self)?;
        let lock = take_lock(self, LOCK_PATIENCE)?.ok_or_else(|| {
            let holder = holder_of(self).ok().flatten();
            let who = holder.map_or_else(|| "a process that can't be seen from here".to_owned(), named);
            Error::busy(format!(
                "a BoxLite runtime is using {}: {who} has it open; this change waits until that program is done",
                self.root().display()
            ))
        })?;
        self.change_with(serial, ours, Some(lock), None)
    }

    /// Begins a change that keeps all others from writing to the database and does not take the
    /// runtime lock: a BoxLite runtime that holds it is not disturbed, and one can start at any
    /// moment. A runtime tries the lock once, and gives up if it is taken.
    ///
    /// # Errors
    /// EBUSY when another writer takes too long; EROFS.
    pub fn change_shared(&self) -> Result<Change<'_>> {
        let serial = self.changing.lock();
        // While it is our turn, the holder of the lock is a BoxLite runtime.
        let ours = take_turn(self)?;
        let shared = SharedAccess::beside(holder_of(self)?);
        let change = self.change_with(serial, ours, None, Some(shared))?;
        if let Some(shared) = &change.shared {
            shared.begin(&change.rows)?;
        }
        Ok(change)
    }

    fn change_with<'h>(
        &'h self,
        serial: MutexGuard<'h, ()>,
        ours: File,
        lock: Option<File>,
        shared: Option<SharedAccess>,
    ) -> Result<Change<'h>> {
        let database = self.database();
        let before = database_id(&database)?;
        let connection = connect(&database)?;
        let schema = read_schema(&connection).map_err(|e| failed(&connection, &database, e))?;
        if let Some(why) = schema.read_only {
            return Err(Error::new(libc::EROFS, why));
        }
        // SQLite opens by name; make sure it is the file we looked at.
        if database_id(&database)? != before {
            return Err(Error::busy(
                "the database was replaced while it was being opened; try again",
            ));
        }
        // Reading the schema makes SQLite create the -wal file if there is none. SQLite flushes its
        // name with the first commit and does not report a failure: a power loss would lose that
        // commit.
        self.flush_wal_name(&database)?;
        Ok(Change {
            home: self,
            rows: Queries {
                connection,
                database,
            },
            epoch: Cell::default(),
            shared,
            _lock: lock,
            _ours: ours,
            _serial: serial,
        })
    }

    /// Flushes the name of the -wal file, unless this process has flushed the name of this very file.
    fn flush_wal_name(&self, database: &Path) -> Result<()> {
        let wal = database.with_extension("db-wal");
        let meta = fs::symlink_metadata(&wal).ok();
        let wal = meta.and_then(|meta| Some((meta.ino(), meta.created().ok()?)));
        let mut flushed = self.flushed_wal.lock();
        if wal.is_some() && *flushed == wal {
            return Ok(());
        }
        let dir = database.parent().unwrap_or(self.root());
        let synced = File::open(dir).and_then(|dir| dir.sync_all());
        synced.context(|| format!("cannot flush {}", dir.display()))?;
        *flushed = wal;
        Ok(())
    }
}

impl Deref for Change<'_> {
    type Target = Queries;

    fn deref(&self) -> &Queries {
        &self.rows
    }
}

impl Change<'_> {
    /// The home being changed.
    pub fn home(&self) -> &Home {
        self.home
    }

    /// Returns a number that differs after every transaction of this change, and after each step that
    /// restricts what others can do meanwhile. What was seen of the home before such a step proves
    /// nothing after it.
    pub fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    fn next_epoch(&self) {
        self.epoch.set(self.epoch.get() + 1);
    }

    /// Returns whether the change has no runtime lock. Then an apparent leftover of a crash may be a
    /// BoxLite operation in progress.
    pub fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Returns whether a shared change began while nobody held the runtime lock, as far as can be
    /// seen from here.
    pub fn is_alone(&self) -> bool {
        self.shared.as_ref().is_some_and(SharedAccess::is_alone)
    }

    /// Returns whether it is certain that no runtime has had the home since the change began. A
    /// runtime that starts later reads what was committed. Where the kernel may not show who holds
    /// the runtime lock, this takes the lock and releases it at once.
    ///
    /// # Errors
    /// Those of reading the kernel's list of locks and of opening the lock.
    pub fn is_surely_alone(&self) -> Result<bool> {
        let Some(shared) = &self.shared else {
            return Ok(true);
        };
        if !shared.is_alone()
            || holder_of(self.home)?.is_some()
            || shared.refuse_other_runtime(self.home).is_err()
        {
            return Ok(false);
        }
        Ok(shows_all_locks(self.home) || take_lock(self.home, Duration::ZERO)?.is_some())
    }

    /// Refuses a change that a runtime would not see: one that has the home may go on with what it
    /// has read of a box.
    ///
    /// # Errors
    /// EBUSY naming the process; those of [`Change::is_surely_alone`].
    pub fn refuse_runtime(&self) -> Result<()> {
        if self.is_surely_alone()? {
            return Ok(());
        }
        let holder = holder_of(self.home)?;
        let who = holder.map_or_else(
            || "a process that can't be seen from here".to_owned(),
            named,
        );
        Err(Error::busy(format!(
            "a BoxLite runtime is using {}: {who} has it open, and may go on with the options that it \
             has read; edit box.json when that program is done",
            self.home.root().display()
        )))
    }

    /// Returns whether a thread of the runtime that this change is beside is stopped.
    pub fn is_runtime_stopped(&self) -> bool {
        let holder = self.shared.as_ref().and_then(SharedAccess::holder);
        holder.is_some_and(is_stopped)
    }

    /// Takes the runtime lock for the rest of the change, if nobody holds it. Returns whether the
    /// change has the lock now.
    ///
    /// # Errors
    /// Those of opening the lock; EBUSY when a runtime changed the watched boxes, or only started,
    /// since the change began.
    pub fn take_lock(&mut self) -> Result<bool> {
        if self.shared.is_none() {
            return Ok(true);
        }
        self.next_epoch();
        if !self.is_alone() {
            return Ok(false);
        }
        let Some(lock) = take_lock(self.home, Duration::ZERO)? else {
            return Ok(false);
        };
        if let Some(shared) = &self.shared {
            shared.keep_lock(lock);
            shared.begin_exclusive(self.home, &self.rows)?;
            // It only kept others from writing: what was recorded is committed.
            self.rows.execute("ROLLBACK")?;
        }
        self._lock = self.shared.take().and_then(SharedAccess::into_lock);
        Ok(true)
    }

    /// In shared access, keeps BoxLite from starting this box, and makes the change fail if the
    /// rows of the box change meanwhile. Call it before looking at anything of the box.
    ///
    /// # Errors
    /// EBUSY while BoxLite starts the box.
    pub fn watch(&self, record: &BoxRecord) -> Result<()> {
        self.next_epoch();
        match &self.shared {
            Some(shared) => shared.watch(self.home, &self.rows, record),
            None => Ok(()),
        }
    }

    /// Returns the lock that keeps BoxLite from starting a box, and its path. It is held until the
    /// file is closed, longer than this change.
    ///
    /// # Errors
    /// EBUSY while BoxLite starts the box, or if it has no lock of its own.
    pub fn lock_start(&self, record: &BoxRecord) -> Result<(PathBuf, File)> {
        let path = self.home.box_lock(record.lock_id()?.ok_or_else(|| {
            Error::busy(
                "the box has no lock of its own, so BoxLite can't be kept from starting it; start and \
                 stop it once with BoxLite",
            )
        })?);
        let watched = self
            .shared
            .as_ref()
            .and_then(|shared| shared.box_lock(&path));
        let file = match watched {
            Some(file) => file.context(|| "cannot keep the lock of the box")?,
            None => lock_file(&path).map_err(|error| {
                let shown = path.display();
                if error.kind() == ErrorKind::WouldBlock {
                    let message = format!("BoxLite is starting the box: {shown} is taken");
                    return Error::busy(message).caused_by(error);
                }
                Error::io(format!("cannot open the lock {shown}"), error)
            })?,
        };
        Ok((path, file))
    }

    /// In shared access, begins a transaction that keeps all others from recording anything until
    /// it ends, and verifies that the watched rows are as they were when this change began. Call it
    /// before moving a file. With the runtime lock held, does nothing.
    ///
    /// # Errors
    /// EBUSY when BoxLite was faster.
    pub fn begin_exclusive(&self) -> Result<()> {
        self.next_epoch();
        match &self.shared {
            Some(shared) => shared.begin_exclusive(self.home, &self.rows),
            None => Ok(()),
        }
    }

    /// Refuses to go on when a runtime has started since the change began: it removes whatever has
    /// no row yet. A runtime that begins after this check finds what was recorded before it.
    ///
    /// # Errors
    /// EBUSY for that, or those of reading the kernel's list of locks.
    pub fn refuse_other_runtime(&self) -> Result<()> {
        match &self.shared {
            Some(shared) => shared.refuse_other_runtime(self.home),
            None => Ok(()),
        }
    }

    /// Returns an unused lock number from 1,000,000 up, and creates its file.
    ///
    /// # Errors
    /// Those of SQLite and the file system.
    pub fn new_lock_id(&self) -> Result<u32> {
        let taken = self.lock_ids()?;
        let id = (FIRST_LOCK_ID..u32::MAX)
            .find(|id| !taken.contains(&i64::from(*id)) && !self.home.box_lock(*id).exists())
            .ok_or_else(|| Error::new(libc::ENOSPC, "every lock number is taken"))?;
        let path = self.home.box_lock(id);
        if let Some(dir) = path.parent()
            && !dir.is_dir()
        {
            self.home.make_dir(dir)?;
        }
        let file = File::create_new(&path).context(|| format!("cannot make {}", path.display()))?;
        self.home.give_to_owner(&path)?;
        if let Some(shared) = &self.shared {
            shared.notice_removal(path, file);
        }
        Ok(id)
    }

    /// Runs `edit` in one transaction: either all of it is recorded and durable, or nothing is.
    ///
    /// # Errors
    /// Those of `edit` and SQLite, with nothing changed; those of
    /// [`begin_exclusive`](Change::begin_exclusive).
    pub fn transaction<T>(&mut self, edit: impl FnOnce(&Transaction) -> Result<T>) -> Result<T> {
        if self.is_shared() {
            self.begin_exclusive()?;
        } else {
            self.rows.execute("BEGIN IMMEDIATE")?;
        }
        self.commit(edit)
    }

    /// Takes back what this change recorded, in one transaction, whoever has started or changed
    /// something meanwhile.
    ///
    /// # Errors
    /// Those of `edit` and SQLite, with nothing changed.
    pub fn withdraw<T>(&mut self, edit: impl FnOnce(&Transaction) -> Result<T>) -> Result<T> {
        if self.rows.connection.is_autocommit() {
            self.rows.execute("BEGIN IMMEDIATE")?;
        }
        self.commit(edit)
    }

    fn commit<T>(&mut self, edit: impl FnOnce(&Transaction) -> Result<T>) -> Result<T> {
        self.next_epoch();
        let before = self
            .home
            .catalog
            .lock()
            .before_commit(&self.rows.connection);
        let transaction = Transaction::of(&self.rows);
        let ended = edit(&transaction).and_then(|value| {
            self.rows.execute("COMMIT")?;
            Ok(value)
        });
        if let (Ok(_), Some(before), Some(boxes)) = (&ended, before, transaction.boxes()) {
            let mut catalog = self.home.catalog.lock();
            catalog.after_commit(&before, &self.rows.connection, &boxes);
        }
        if ended.is_err() && !self.rows.connection.is_autocommit() {
            // An error here does not matter: without a commit nothing is recorded.
            let _ = self.rows.execute("ROLLBACK");
        }
        ended
    }
}
