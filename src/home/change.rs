//! Changing a home: the runtime lock, a fresh connection, and the transactions; and what serialises us
//! with a BoxLite runtime that has the lock.

use std::cell::{Cell, RefCell};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use rusqlite::{Connection, params};
use serde_json::{Value, json};

use super::catalog::{
    database_id, read_bases, read_bases_at, read_bases_of, read_boxes, read_schema, read_snapshots,
};
use super::connection::{connect, data_version, failed};
use super::identity::rfc3339;
use super::paths::Home;
use super::records::{
    BaseRecord, BoxRecord, NewBase, NewBox, NewSnapshot, OUR_SOURCE_BOX, SnapshotRecord,
};
use crate::{Context, Error, Result};

/// How long another boxlitefs, which holds the lock for milliseconds, is waited for. A BoxLite
/// runtime holds it for its whole life.
const LOCK_PATIENCE: Duration = Duration::from_millis(150);

/// First lock number of ours: a running runtime hands out the lowest unused one it knows of, and
/// fails when one was taken behind its back.
const FIRST_LOCK_ID: u32 = 1_000_000;

/// The right to change a home: a fresh connection is open for as long as this lives, and nobody else
/// changes anything, or what he can change is known ([`Home::change_beside`]). Hold it for milliseconds.
pub struct Change<'h> {
    home: &'h Home,
    pub(super) connection: Connection,
    runtime: Runtime,
    _ours: File,
    _serial: MutexGuard<'h, ()>,
}

/// Who has the runtime lock.
enum Runtime {
    /// This change.
    Kept { _lock: File },
    /// A BoxLite runtime.
    Beside(Beside),
}

/// What a change knows of while a BoxLite runtime has the lock. SQLite lets one write at a time, so from
/// [`Change::hold`] to the commit that runtime records nothing; what it does to files before it records
/// them, and what it never records, is for the change to notice.
struct Beside {
    /// The process that has the lock.
    holder: u32,
    /// SQLite's count of commits by others, as of the last look at the rows below.
    version: Cell<i64>,
    /// Rows that must stay as they are: of boxes whose files this change touches.
    watched: RefCell<Vec<(BoxRecord, Vec<SnapshotRecord>)>>,
    /// What BoxLite takes while it starts one of these boxes: the path and the locked file.
    locks: RefCell<Vec<(PathBuf, File)>>,
    /// The runtime lock, taken once that runtime had ended: no other begins meanwhile.
    lock: RefCell<Option<File>>,
}

impl Home {
    /// Takes the runtime lock and opens the database afresh.
    ///
    /// # Errors
    /// EBUSY when a BoxLite runtime holds the lock, EROFS when the schema is not one we change.
    pub fn change(&self) -> Result<Change<'_>> {
        let serial = self.changing.lock();
        let ours = take_turn(self)?;
        let lock = take_lock(self, LOCK_PATIENCE)?.ok_or_else(|| {
            Error::busy(format!(
                "a BoxLite runtime is using {}; changes wait until the program that has it open is done",
                self.root().display()
            ))
        })?;
        self.change_with(serial, ours, Runtime::Kept { _lock: lock })
    }

    /// Likewise, also while a BoxLite runtime has the lock: then everybody else is kept from writing to
    /// the database.
    ///
    /// # Errors
    /// EBUSY when it can't be told who has the lock, or somebody writes for too long; EROFS.
    pub fn change_beside(&self) -> Result<Change<'_>> {
        let serial = self.changing.lock();
        // While it is our turn, who has the lock is a BoxLite runtime.
        let ours = take_turn(self)?;
        if let Some(lock) = take_lock(self, Duration::ZERO)? {
            return self.change_with(serial, ours, Runtime::Kept { _lock: lock });
        }
        let holder = holder_of(self)?.ok_or_else(|| {
            Error::busy(format!(
                "somebody has the lock of {}, and it can't be told who; try again, or end that program",
                self.root().display()
            ))
        })?;
        let beside = Beside {
            holder,
            version: Cell::new(0),
            watched: RefCell::default(),
            locks: RefCell::default(),
            lock: RefCell::default(),
        };
        let change = self.change_with(serial, ours, Runtime::Beside(beside))?;
        change.begin()?;
        if let Runtime::Beside(beside) = &change.runtime {
            beside
                .version
                .set(change.sql(data_version(&change.connection))?);
        }
        Ok(change)
    }

    fn change_with<'h>(
        &'h self,
        serial: MutexGuard<'h, ()>,
        ours: File,
        runtime: Runtime,
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
        // SQLite made the -wal file for what was read, if there was none. It flushes its name with the first
        // commit, and does not say if that fails: that commit would be lost with the power.
        let dir = database.parent().unwrap_or(self.root());
        let flushed = File::open(dir).and_then(|dir| dir.sync_all());
        flushed.context(|| format!("cannot flush {}", dir.display()))?;
        Ok(Change {
            home: self,
            connection,
            runtime,
            _ours: ours,
            _serial: serial,
        })
    }
}

fn file_id(path: &Path) -> Result<(u64, u64)> {
    let meta = fs::metadata(path).context(|| format!("cannot look at {}", path.display()))?;
    Ok((meta.dev(), meta.ino()))
}

/// Keeps other boxlitefs from changing the home: those that don't go by the runtime lock, too. It is the
/// flock of our own directory.
fn take_turn(home: &Home) -> Result<File> {
    if let Some(error) = home.unwritable() {
        return Err(error);
    }
    let dir = home.make_staging_dir()?;
    home.refuse_scattered()?;
    let message = || format!("cannot lock {}", dir.display());
    let file = File::open(&dir).context(message)?;
    match flock_within(&file, LOCK_PATIENCE).context(message)? {
        true => Ok(file),
        false => Err(Error::busy(format!(
            "another boxlitefs is changing {}; try again",
            home.root().display()
        ))),
    }
}

/// flock(LOCK_EX | LOCK_NB) on a descriptor of our own, as a runtime does (runtime/lock.rs); None when
/// somebody has it for longer than `patience`.
fn take_lock(home: &Home, patience: Duration) -> Result<Option<File>> {
    let path = home.runtime_lock();
    let fresh = !path.exists();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .context(|| format!("cannot open the runtime lock {}", path.display()))?;
    if fresh {
        home.give_to_owner(&path)?;
    }
    let is_taken = flock_within(&file, patience).context(|| "cannot take the runtime lock")?;
    Ok(is_taken.then_some(file))
}

/// Takes a file's flock; false when somebody else has it for longer than `patience`.
fn flock_within(file: &File, patience: Duration) -> std::io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match flock_exclusive(file) {
            Ok(()) => return Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => {
                if Instant::now() >= deadline {
                    return Ok(false);
                }
                std::thread::sleep(Duration::from_millis(3));
            }
            Err(e) => return Err(e),
        }
    }
}

/// The process that has the runtime lock, by the kernel's list; None where it is not in it (a process
/// that can't be seen from here, say).
fn holder_of(home: &Home) -> Result<Option<u32>> {
    let path = home.runtime_lock();
    let meta = fs::metadata(&path).context(|| format!("cannot look at {}", path.display()))?;
    let table = fs::read_to_string("/proc/locks").context(|| "cannot read /proc/locks")?;
    // 1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF; who waits has an arrow in front.
    let flocks = table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let kind = fields.next()?;
        let (pid, place) = (fields.nth(2)?, fields.next()?);
        let (device, inode) = place.rsplit_once(':')?;
        let is_flock = kind == "FLOCK" && inode.parse() == Ok(meta.ino());
        is_flock.then_some((pid.parse::<u32>().ok()?, device))
    });
    let flocks: Vec<(u32, &str)> = flocks.collect();
    let device = format!(
        "{:02x}:{:02x}",
        libc::major(meta.dev()),
        libc::minor(meta.dev())
    );
    let exact = flocks.iter().find(|(_, of)| *of == device);
    // Some file systems (btrfs) have one device for stat and another for this list.
    Ok(match (exact, &flocks[..]) {
        (Some((pid, _)), _) | (None, [(pid, _)]) => Some(*pid),
        _ => None,
    })
}

/// Takes a file's flock if nobody has it; the kernel gives it back when the process dies, however.
///
/// # Errors
/// EWOULDBLOCK when somebody has it.
pub fn flock_exclusive(file: &File) -> std::io::Result<()> {
    // std's try_lock is not promised to be flock, and BoxLite uses flock.
    let operation = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(file, operation).map_err(std::io::Error::from)
}

impl Change<'_> {
    /// The home being changed.
    pub fn home(&self) -> &Home {
        self.home
    }

    pub(super) fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T> {
        result.map_err(|e| failed(&self.connection, &self.home.database(), e))
    }

    /// Whether a BoxLite runtime has the home, too: what looks like a crash's leftover may be what it is
    /// doing.
    pub fn is_beside_a_runtime(&self) -> bool {
        matches!(self.runtime, Runtime::Beside(_))
    }

    /// Beside a runtime: keeps it from starting this box, and goes on only as long as its rows are these.
    /// Before anything of the box is looked at.
    ///
    /// # Errors
    /// EBUSY while BoxLite starts the box.
    pub fn keep(&self, record: &BoxRecord) -> Result<()> {
        let Runtime::Beside(beside) = &self.runtime else {
            return Ok(());
        };
        let mut watched = beside.watched.borrow_mut();
        if watched.iter().any(|(known, _)| known.id == record.id) {
            return Ok(());
        }
        let name = record.name.as_deref().unwrap_or(&record.id);
        let number = record.state()?["lock_id"].as_u64();
        let number = number.and_then(|number| u32::try_from(number).ok());
        let path = self.home.box_lock(number.ok_or_else(|| {
            Error::busy(format!(
                "box {name} has no lock of its own, so BoxLite can't be kept from starting it; end the program that has the home open"
            ))
        })?);
        // BoxLite opens it by its name each time, and makes none where there is none: it can't start
        // such a box either.
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
        beside.locks.borrow_mut().push((path, file));
        watched.push((record.clone(), self.snapshots_of(&record.id)?));
        Ok(())
    }

    /// Beside a runtime: keeps all others from writing, until the transaction ends.
    fn begin(&self) -> Result<()> {
        match self.connection.is_autocommit() {
            true => self.sql(self.connection.execute_batch("BEGIN IMMEDIATE")),
            // One of ours is open.
            false => Ok(()),
        }
    }

    /// From here to the next transaction's end nobody records anything, and all rows that matter are as
    /// they were when this change began. To be called before a file is moved. Alone with the home there
    /// is nothing to do.
    ///
    /// # Errors
    /// EBUSY when BoxLite was faster.
    pub fn hold(&self) -> Result<()> {
        let Runtime::Beside(beside) = &self.runtime else {
            return Ok(());
        };
        self.begin()?;
        let version = self.sql(data_version(&self.connection))?;
        if version != beside.version.get() {
            for (known, snapshots) in &*beside.watched.borrow() {
                let name = known.name.as_deref().unwrap_or(&known.id);
                let faster = || {
                    Error::busy(format!(
                        "BoxLite changed box {name} at the same moment; try again"
                    ))
                };
                let now = self.box_by_id(&known.id).map_err(|_| faster())?;
                if now != *known || self.snapshots_of(&known.id)? != *snapshots {
                    return Err(faster());
                }
            }
            beside.version.set(version);
        }
        self.refuse_other_runtime()?;
        if beside.lock.borrow().is_none()
            && let Some(lock) = take_lock(self.home, Duration::ZERO)?
        {
            beside.lock.replace(Some(lock));
        }
        for (path, file) in &*beside.locks.borrow() {
            let meta = file.metadata().context(|| "cannot look at a lock")?;
            if file_id(path).ok() != Some((meta.dev(), meta.ino())) {
                return Err(other_runtime());
            }
        }
        Ok(())
    }

    /// EBUSY when the runtime that had the lock ended and another began: at its start it removes whatever
    /// has no row yet. With what was recorded before this was asked, such a runtime has begun too late to
    /// miss it.
    ///
    /// # Errors
    /// That, or those of reading the kernel's list.
    pub fn refuse_other_runtime(&self) -> Result<()> {
        let Runtime::Beside(beside) = &self.runtime else {
            return Ok(());
        };
        let is_ours = beside.lock.borrow().is_some();
        match holder_of(self.home)? {
            Some(holder) if !is_ours && holder != beside.holder => Err(other_runtime()),
            _ => Ok(()),
        }
    }

    /// Every box as it is now.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn boxes(&self) -> Result<Vec<BoxRecord>> {
        self.sql(read_boxes(&self.connection, None))
    }

    /// The box with this id as it is now.
    ///
    /// # Errors
    /// ENOENT when it is gone.
    pub fn box_by_id(&self, id: &str) -> Result<BoxRecord> {
        self.sql(read_boxes(&self.connection, Some(id)))?
            .pop()
            .ok_or_else(|| Error::new(libc::ENOENT, format!("box {id} is gone")))
    }

    /// Whether a box has this name.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn is_name_taken(&self, name: &str) -> Result<bool> {
        self.sql(self.connection.query_row(
            "SELECT EXISTS (SELECT 1 FROM box_config WHERE name = ?1 OR id = ?1)",
            [name],
            |row| row.get(0),
        ))
    }

    /// The snapshots of a box as they are now, oldest first.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn snapshots_of(&self, box_id: &str) -> Result<Vec<SnapshotRecord>> {
        self.sql(read_snapshots(&self.connection, Some(box_id)))
    }

    /// The snapshots of all boxes as they are now, oldest first.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn snapshots(&self) -> Result<Vec<SnapshotRecord>> {
        self.sql(read_snapshots(&self.connection, None))
    }

    /// The ids of the boxes that refer to any base.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn referring_boxes(&self) -> Result<std::collections::HashSet<String>> {
        let rows = || -> rusqlite::Result<_> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT DISTINCT box_id FROM base_disk_ref")?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// Every base disk as it is now.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn bases(&self) -> Result<Vec<BaseRecord>> {
        self.sql(read_bases(&self.connection))
    }

    /// The bases whose row names this path, or (spelled otherwise, say) a file of that name.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn bases_at(&self, path: &Path) -> Result<Vec<BaseRecord>> {
        let (Some(text), Some(name)) = (path.to_str(), path.file_name().and_then(|n| n.to_str()))
        else {
            return Ok(Vec::new());
        };
        self.sql(read_bases_at(&self.connection, text, name))
    }

    /// The bases that a box refers to.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn bases_of(&self, box_id: &str) -> Result<Vec<BaseRecord>> {
        self.sql(read_bases_of(&self.connection, box_id))
    }

    /// Every reference: the bases that each box refers to, by its id.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn refs(&self) -> Result<std::collections::HashMap<String, Vec<String>>> {
        let rows = || -> rusqlite::Result<Vec<(String, String)>> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT box_id, base_disk_id FROM base_disk_ref")?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        };
        let mut refs = std::collections::HashMap::<String, Vec<String>>::new();
        for (box_id, base) in self.sql(rows())? {
            refs.entry(box_id).or_default().push(base);
        }
        Ok(refs)
    }

    /// The ids of the bases that a box refers to.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn refs_of(&self, box_id: &str) -> Result<Vec<String>> {
        let rows = || -> rusqlite::Result<Vec<String>> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT base_disk_id FROM base_disk_ref WHERE box_id = ?1")?;
            statement.query_map([box_id], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// The ids of the bases that any box refers to.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn referred_bases(&self) -> Result<std::collections::HashSet<String>> {
        let rows = || -> rusqlite::Result<_> {
            let mut statement = self
                .connection
                .prepare_cached("SELECT DISTINCT base_disk_id FROM base_disk_ref")?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        self.sql(rows())
    }

    /// Whether a row vouches for the very bytes of a base's file, as those of some builds do.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn has_digest(&self, base_id: &str) -> Result<bool> {
        let has_column = self.connection.column_exists(None, "base_disk", "digest");
        if !self.sql(has_column)? {
            return Ok(false);
        }
        self.sql(self.connection.query_row(
            "SELECT EXISTS (SELECT 1 FROM base_disk WHERE id = ?1 AND digest IS NOT NULL)",
            [base_id],
            |row| row.get(0),
        ))
    }

    /// A lock number nobody has, from 1,000,000 up; its file is made.
    ///
    /// # Errors
    /// What SQLite or the file system says.
    pub fn new_lock_id(&self) -> Result<u32> {
        let taken: std::collections::HashSet<u64> = self
            .boxes()?
            .iter()
            .filter_map(|record| record.state().ok()?["lock_id"].as_u64())
            .collect();
        let id = (FIRST_LOCK_ID..u32::MAX)
            .find(|id| !taken.contains(&u64::from(*id)) && !self.home.box_lock(*id).exists())
            .ok_or_else(|| Error::new(libc::ENOSPC, "every lock number is taken"))?;
        let path = self.home.box_lock(id);
        if let Some(dir) = path.parent()
            && !dir.is_dir()
        {
            self.home.make_dir(dir)?;
        }
        File::create_new(&path).context(|| format!("cannot make {}", path.display()))?;
        self.home.give_to_owner(&path)?;
        Ok(id)
    }

    /// Runs `edit` in one transaction: all of it is recorded and durable, or nothing.
    ///
    /// # Errors
    /// What `edit` or SQLite says; nothing is changed then. Those of [`Change::hold`].
    pub fn transaction<T>(&mut self, edit: impl FnOnce(&Transaction) -> Result<T>) -> Result<T> {
        let database = self.home.database();
        match &self.runtime {
            Runtime::Kept { .. } => self.sql(self.connection.execute_batch("BEGIN IMMEDIATE"))?,
            Runtime::Beside(_) => self.hold()?,
        }
        let transaction = Transaction {
            sql: &self.connection,
            database: &database,
        };
        let ended = edit(&transaction).and_then(|value| {
            self.sql(self.connection.execute_batch("COMMIT"))?;
            Ok(value)
        });
        if ended.is_err() && !self.connection.is_autocommit() {
            // What it says does not count: without a commit nothing is recorded.
            let _ = self.connection.execute_batch("ROLLBACK");
        }
        ended
    }
}

fn other_runtime() -> Error {
    Error::busy("a BoxLite runtime ended and another began at the same moment; try again")
}

/// The rows of one transaction.
pub struct Transaction<'t> {
    sql: &'t Connection,
    database: &'t Path,
}

impl Transaction<'_> {
    pub(super) fn run(&self, statement: &str, params: impl rusqlite::Params) -> Result<usize> {
        self.sql
            .prepare_cached(statement)
            .and_then(|mut statement| statement.execute(params))
            .map_err(|e| failed(self.sql, self.database, e))
    }

    /// Records a base of ours. Its name stays NULL and its source is nobody's id, so BoxLite never
    /// collects it, not even when a box is removed by force.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn insert_base(&self, base: &NewBase) -> Result<()> {
        let json = json!({
            "id": base.id,
            "source_box_id": OUR_SOURCE_BOX,
            "kind": "snapshot",
            "base_path": base.path,
            "container_disk_bytes": base.virtual_size,
            "size_bytes": base.file_size,
            "created_at": base.created_at,
        });
        self.run(
            "INSERT INTO base_disk (id, source_box_id, name, kind, base_path, created_at, json)
             VALUES (?1, ?2, NULL, 'snapshot', ?3, ?4, ?5)",
            params![
                base.id,
                OUR_SOURCE_BOX,
                base.path,
                base.created_at,
                json.to_string()
            ],
        )?;
        Ok(())
    }

    /// Removes a base and every reference to it.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn delete_base(&self, base_id: &str) -> Result<()> {
        self.run(
            "DELETE FROM base_disk_ref WHERE base_disk_id = ?1",
            [base_id],
        )?;
        self.run("DELETE FROM base_disk WHERE id = ?1", [base_id])?;
        Ok(())
    }

    /// Makes a base ours, whoever made it: BoxLite does not collect it any more, and a crash leaves
    /// nothing of it that could be taken for BoxLite's.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn claim_base(&self, base_id: &str) -> Result<()> {
        self.run(
            "UPDATE base_disk SET source_box_id = ?2, kind = 'snapshot',
                 json = json_set(json, '$.source_box_id', ?2, '$.kind', 'snapshot')
             WHERE id = ?1",
            [base_id, OUR_SOURCE_BOX],
        )?;
        Ok(())
    }

    /// Records that the file of a base or a snapshot has another length.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn resize_layer(&self, path: &str, file_size: u64) -> Result<()> {
        let file_size = i64::try_from(file_size).unwrap_or(i64::MAX);
        for (table, at) in [
            ("base_disk", "base_path = ?1"),
            (
                "snapshot",
                "json_valid(json) AND json_extract(json, '$.base_path') = ?1",
            ),
        ] {
            let statement =
                format!("UPDATE {table} SET json = json_set(json, '$.size_bytes', ?2) WHERE {at}");
            self.run(&statement, params![path, file_size])?;
        }
        Ok(())
    }

    /// Records that a chain of the box reaches the base. The box's own row must exist, or be made
    /// in this transaction: a reference of nobody makes BoxLite refuse to remove the source.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn insert_ref(&self, base_id: &str, box_id: &str) -> Result<()> {
        self.run(
            "INSERT OR IGNORE INTO base_disk_ref (base_disk_id, box_id) VALUES (?1, ?2)",
            [base_id, box_id],
        )?;
        Ok(())
    }

    /// Records that no chain of the box reaches the base any more.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn delete_ref(&self, base_id: &str, box_id: &str) -> Result<()> {
        self.run(
            "DELETE FROM base_disk_ref WHERE base_disk_id = ?1 AND box_id = ?2",
            [base_id, box_id],
        )?;
        Ok(())
    }

    /// Gives a box another name, in the column and in the JSON.
    ///
    /// # Errors
    /// EEXIST when a box has that name, ENOENT when the box is gone.
    pub fn rename_box(&self, id: &str, name: &str) -> Result<()> {
        let renamed = self.run(
            "UPDATE box_config SET name = ?2, json = json_set(json, '$.name', ?2) WHERE id = ?1",
            [id, name],
        );
        match renamed.map_err(|e| taken(e, "a box has that name"))? {
            0 => Err(Error::new(libc::ENOENT, "the box is gone")),
            _ => Ok(()),
        }
    }

    /// Removes every row of a box: its snapshots, its references, its state, its configuration.
    ///
    /// # Errors
    /// ENOENT when it is gone, or what SQLite says.
    pub fn delete_box(&self, id: &str) -> Result<()> {
        self.run("DELETE FROM snapshot WHERE box_id = ?1", [id])?;
        self.run("DELETE FROM base_disk_ref WHERE box_id = ?1", [id])?;
        self.run("DELETE FROM box_state WHERE id = ?1", [id])?;
        match self.run("DELETE FROM box_config WHERE id = ?1", [id])? {
            0 => Err(Error::new(libc::ENOENT, "the box is gone")),
            _ => Ok(()),
        }
    }

    /// Records a snapshot, as BoxLite's snapshot_mgr does.
    ///
    /// # Errors
    /// EEXIST when the box has one of that name.
    pub fn insert_snapshot(&self, snapshot: &NewSnapshot) -> Result<()> {
        let json = json!({
            "id": snapshot.id,
            "box_id": snapshot.box_id,
            "name": snapshot.name,
            "created_at": snapshot.created_at,
            "base_path": snapshot.path,
            "container_disk_bytes": snapshot.virtual_size,
            "size_bytes": snapshot.file_size,
        });
        self.run(
            "INSERT INTO snapshot (id, box_id, name, created_at, json) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                snapshot.id,
                snapshot.box_id,
                snapshot.name,
                snapshot.created_at,
                json.to_string()
            ],
        )
        .map_err(|e| taken(e, "the box has a snapshot of that name"))?;
        Ok(())
    }

    /// Gives a snapshot another creation time, in the column and in the JSON.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn date_snapshot(&self, box_id: &str, id: &str, created_at: i64) -> Result<()> {
        self.run(
            "UPDATE snapshot SET created_at = ?3, json = json_set(json, '$.created_at', ?3)
             WHERE box_id = ?1 AND id = ?2",
            params![box_id, id, created_at],
        )?;
        Ok(())
    }

    /// Gives a snapshot another name and its layer another path, in the columns and in the JSON.
    ///
    /// # Errors
    /// EEXIST when the box has one of that name, ENOENT when it is gone.
    pub fn rename_snapshot(&self, box_id: &str, id: &str, name: &str, path: &str) -> Result<()> {
        let renamed = self.run(
            "UPDATE snapshot
             SET name = ?3, json = json_set(json, '$.name', ?3, '$.base_path', ?4)
             WHERE box_id = ?1 AND id = ?2",
            [box_id, id, name, path],
        );
        match renamed.map_err(|e| taken(e, "the box has a snapshot of that name"))? {
            0 => Err(Error::new(libc::ENOENT, "the snapshot is gone")),
            _ => Ok(()),
        }
    }

    /// Removes a snapshot's row; ENOENT when it is gone.
    ///
    /// # Errors
    /// What SQLite says.
    pub fn delete_snapshot(&self, box_id: &str, id: &str) -> Result<()> {
        match self.run(
            "DELETE FROM snapshot WHERE box_id = ?1 AND id = ?2",
            [box_id, id],
        )? {
            0 => Err(Error::new(libc::ENOENT, "the snapshot is gone")),
            _ => Ok(()),
        }
    }

    /// Records a stopped box.
    ///
    /// # Errors
    /// EEXIST when a box has that name.
    pub fn insert_box(&self, new: &NewBox) -> Result<()> {
        let config = config_of(new);
        let state = state_of(new);
        self.run(
            "INSERT INTO box_config (id, name, created_at, json) VALUES (?1, ?2, ?3, ?4)",
            params![new.id, new.name, new.created_at, config.to_string()],
        )
        .map_err(|e| taken(e, "a box has that name"))?;
        self.run(
            "INSERT INTO box_state (id, status, pid, json) VALUES (?1, 'stopped', NULL, ?2)",
            params![new.id, state.to_string()],
        )?;
        Ok(())
    }
}

/// A violated UNIQUE constraint is a name that is taken.
fn taken(error: Error, message: &str) -> Error {
    let constraint = std::error::Error::source(&error)
        .and_then(|source| source.downcast_ref::<rusqlite::Error>())
        .and_then(rusqlite::Error::sqlite_error_code)
        == Some(rusqlite::ErrorCode::ConstraintViolation);
    if constraint {
        Error::new(libc::EEXIST, message)
    } else {
        error
    }
}

/// `box_config.json` of a new box: BoxLite's fields set, a cloned box's unknown ones kept.
fn config_of(new: &NewBox) -> Value {
    let mut config = new.config_of_source.clone().unwrap_or_else(|| json!({}));
    config["id"] = json!(new.id);
    config["name"] = json!(new.name);
    config["created_at"] = json!(rfc3339(new.created_at));
    if !config["container"].is_object() {
        config["container"] = json!({});
    }
    config["container"]["id"] = json!(new.container_id);
    config["options"] = new.options.clone();
    if !config["engine_kind"].is_string() {
        config["engine_kind"] = json!("Libkrun");
    }
    config["box_home"] = json!(new.box_home);
    config
}

/// `box_state.json` of a new box: stopped, with a lock number (null makes its start fail).
fn state_of(new: &NewBox) -> Value {
    let mut state = new.state_of_source.clone().unwrap_or_else(|| json!({}));
    for gone in [
        "container_id",
        "error_reason",
        "exit_code",
        "started_at",
        "pid",
    ] {
        state[gone] = Value::Null;
    }
    state["status"] = json!("stopped");
    state["last_updated"] = json!(rfc3339(new.created_at));
    state["lock_id"] = json!(new.lock_id);
    state["health_status"] = json!({"state": "None", "failures": 0, "last_check": null});
    state
}
