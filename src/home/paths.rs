//! Where things are in a home, and who owns them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::catalog::{Catalog, has_table, read_bases};
use super::catalog_reader::CatalogReader;
use super::connection::failed;
use super::kept::is_kept_id;
use super::kept_reader::KeptReader;
use super::queries::Queries;
use super::read_connection::{connect_for_reading, may_write};
use super::records::BaseRecord;
use crate::{Context, Error, Result};

/// The directory of our own files in a home: on the same file system, and BoxLite leaves it alone
/// (at its start it wipes `tmp/` and deletes directories of `boxes/` without a row).
const STAGING: &str = ".boxlitefs";

/// The owner of a home; new files in it are given to the same user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits of the home directory (07777).
    pub mode: u32,
}

/// A BoxLite home: a directory with `db/boxlite.db`, `boxes/` and `bases/`.
pub struct Home {
    root: PathBuf,
    /// The directories of layers, as BoxLite names them: each may be a link, and BoxLite writes the
    /// path it leads to.
    boxes: PathBuf,
    bases: PathBuf,
    images: PathBuf,
    owner: Owner,
    pub(super) catalog: Mutex<CatalogReader>,
    kept: Mutex<KeptReader>,
    /// One change at a time in this process; the lock file keeps other processes out.
    pub(super) changing: Mutex<()>,
    /// Inode number and creation time of the -wal file whose directory entry was last flushed.
    pub(super) flushed_wal: Mutex<Option<(u64, SystemTime)>>,
    /// The boxes with an open and writable `disk.img`, and the process that opened each.
    pub(super) writers: Mutex<HashMap<String, String>>,
}

impl Home {
    /// Opens the home at `path` and reads its database once.
    ///
    /// # Errors
    /// ENOENT or ENOTDIR when there is no such directory, EINVAL when it is not a BoxLite home,
    /// EIO when its database is damaged.
    pub fn open(path: &Path) -> Result<Home> {
        let root = fs::canonicalize(path).context(|| {
            format!(
                "there is no BoxLite home at {}; name another, or run BoxLite once to make it",
                path.display()
            )
        })?;
        let meta = fs::metadata(&root).context(|| format!("cannot look at {}", root.display()))?;
        if !meta.is_dir() {
            return Err(Error::new(
                libc::ENOTDIR,
                format!(
                    "{} is not a directory; name the directory BoxLite keeps its boxes in (usually ~/.boxlite)",
                    root.display()
                ),
            ));
        }
        if let Some(error) = refused_to_user(&root, meta.uid(), &root.join("db/boxlite.db")) {
            return Err(error);
        }
        if !root.join("db/boxlite.db").is_file() {
            let shown = root.display();
            let is_empty = std::fs::read_dir(&root).is_ok_and(|mut names| names.next().is_none());
            let instead = if is_empty {
                format!("it is empty: `boxlitefs init {shown}` makes an empty home of it, or")
            } else {
                "it has no db/boxlite.db;".to_owned()
            };
            return Err(Error::new(
                libc::EINVAL,
                format!(
                    "{shown} is not a BoxLite home, {instead} name the directory BoxLite keeps its boxes in (usually ~/.boxlite)"
                ),
            ));
        }
        let home = Home {
            catalog: Mutex::new(CatalogReader::new(root.join("db/boxlite.db"))),
            kept: Mutex::default(),
            changing: Mutex::new(()),
            flushed_wal: Mutex::default(),
            writers: Mutex::default(),
            owner: Owner {
                uid: meta.uid(),
                gid: meta.gid(),
                mode: meta.mode() & 0o7777,
            },
            boxes: where_it_leads(root.join("boxes")),
            bases: where_it_leads(root.join("bases")),
            images: where_it_leads(root.join("images")),
            root,
        };
        home.catalog()?;
        Ok(home)
    }

    /// Returns the rows as they are now. While nothing changed, this costs one stat and one pragma.
    ///
    /// # Errors
    /// EIO when the database is gone, damaged or has no boxes table.
    pub fn catalog(&self) -> Result<Arc<Catalog>> {
        let rows = self.catalog.lock().current()?;
        let mut kept = self.kept.lock();
        Ok(kept.combine(&self.undo_dir(), self.owner.uid, rows))
    }

    /// Opens the database for reading, without the lock. Queries that follow each other may see
    /// different states.
    ///
    /// # Errors
    /// EIO when the database is damaged.
    pub fn queries(&self) -> Result<Queries> {
        let database = self.database();
        Ok(Queries {
            connection: connect_for_reading(&database)?.into_connection(),
            database,
        })
    }

    /// Reads every base disk as it is now, without the lock.
    ///
    /// # Errors
    /// EIO when the database is damaged.
    pub fn bases(&self) -> Result<Vec<BaseRecord>> {
        let database = self.database();
        let connection = connect_for_reading(&database)?;
        if !has_table(&connection, "base_disk") {
            return Ok(Vec::new());
        }
        read_bases(&connection).map_err(|e| failed(&connection, &database, e))
    }

    /// The canonical path of the home.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Refuses a look at all of the home if this process may not look into our own directory.
    ///
    /// # Errors
    /// EACCES.
    pub fn refuse_hidden(&self) -> Result<()> {
        let inside = self.staging_dir().join("layers");
        refused_to_user(&self.root, self.owner.uid, &inside).map_or(Ok(()), Err)
    }

    /// Returns why this process can't change the home where it is; None if it can.
    pub fn unwritable(&self) -> Option<Error> {
        let db = self.root.join("db");
        let dirs = [&self.root, &db, &self.boxes, &self.bases];
        let mut dirs = dirs.into_iter().filter(|dir| dir.is_dir());
        dirs.find_map(|dir| {
            let error = may_write(dir).err()?;
            let message = format!("{} can't be written", dir.display());
            Some(Error::io(message, error))
        })
    }

    /// The owner of the home.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Returns whether a path (absolute, links resolved) is in this home.
    pub fn contains(&self, path: &Path) -> bool {
        self.directories().any(|dir| path.starts_with(dir))
    }

    /// The directories of the home's files: its own, and those that links in it lead to.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        [&self.root, &self.boxes, &self.bases, &self.images]
            .into_iter()
            .map(PathBuf::as_path)
    }

    /// `boxes/`; if that is a link, where it leads.
    pub fn boxes_dir(&self) -> PathBuf {
        self.boxes.clone()
    }

    /// `boxes/ID`, or the directory of an entry. `id` must be a safe component.
    pub fn box_dir(&self, id: &str) -> PathBuf {
        if is_kept_id(id) {
            self.undo_dir().join(id)
        } else {
            self.boxes_dir().join(id)
        }
    }

    /// `boxes/ID/disks/disk.qcow2`: the live disk; absent until the box has first started.
    pub fn live_disk(&self, id: &str) -> PathBuf {
        self.box_dir(id).join("disks/disk.qcow2")
    }

    /// Returns the id of the box whose directory contains this path.
    pub fn box_of<'p>(&self, path: &'p Path) -> Option<&'p str> {
        let inside = path.strip_prefix(&self.boxes).ok()?;
        inside.components().next()?.as_os_str().to_str()
    }

    /// `boxes/ID/snapshots`.
    pub fn snapshots_dir(&self, id: &str) -> PathBuf {
        self.box_dir(id).join("snapshots")
    }

    /// `boxes/ID/snapshots/NAME/disk.qcow2`.
    pub fn snapshot_disk(&self, id: &str, name: &str) -> PathBuf {
        self.snapshots_dir(id).join(name).join("disk.qcow2")
    }

    /// `boxes/ID/disks/guest-rootfs.qcow2`: of older versions of BoxLite, which recreates a missing
    /// one.
    pub fn guest_rootfs(&self, id: &str) -> PathBuf {
        self.box_dir(id).join("disks/guest-rootfs.qcow2")
    }

    /// `boxes/ID/.snapshot_pending`: BoxLite's own crash marker.
    pub fn pending_marker(&self, id: &str) -> PathBuf {
        self.box_dir(id).join(".snapshot_pending")
    }

    /// `bases/`; if that is a link, where it leads. BoxLite deletes every file in it that no row
    /// names by this very path.
    pub fn bases_dir(&self) -> PathBuf {
        self.bases.clone()
    }

    /// `bases/ID.qcow2`.
    pub fn base_disk(&self, id: &str) -> PathBuf {
        self.bases_dir().join(format!("{id}.qcow2"))
    }

    /// `locks/N`: the flock file BoxLite takes while it starts the box.
    pub fn box_lock(&self, lock_id: u32) -> PathBuf {
        self.root.join("locks").join(lock_id.to_string())
    }

    /// `.lock`: the runtime lock.
    pub fn runtime_lock(&self) -> PathBuf {
        self.root.join(".lock")
    }

    /// `db/boxlite.db`.
    pub fn database(&self) -> PathBuf {
        self.root.join("db/boxlite.db")
    }

    /// `db/boxlitefs.db`: the size cache, which may be deleted at any time.
    pub fn size_cache_file(&self) -> PathBuf {
        self.root.join("db/boxlitefs.db")
    }

    /// `.boxlitefs`: where changes are prepared.
    pub fn staging_dir(&self) -> PathBuf {
        self.root.join(STAGING)
    }

    /// `.boxlitefs/undo`: what can be had back, a directory for each entry.
    pub fn undo_dir(&self) -> PathBuf {
        self.staging_dir().join("undo")
    }

    /// Creates `.boxlitefs` if it is missing, and ensures that only its owner can enter.
    ///
    /// # Errors
    /// Those of mkdir and chown.
    pub fn make_staging_dir(&self) -> Result<PathBuf> {
        let dir = self.staging_dir();
        if !dir.is_dir() {
            self.make_dir(&dir)?;
        }
        let message = || format!("cannot set the mode of {}", dir.display());
        let mode = fs::metadata(&dir).context(message)?.mode() & 0o7777;
        // Its files may hold secrets.
        if mode & 0o077 != 0 {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).context(message)?;
        }
        Ok(dir)
    }

    /// Creates one directory and gives it to the owner of the home.
    ///
    /// # Errors
    /// Those of mkdir and chown.
    pub fn make_dir(&self, dir: &Path) -> Result<()> {
        fs::create_dir(dir).context(|| format!("cannot make the directory {}", dir.display()))?;
        self.give_to_owner(dir)
    }

    /// Gives a file that root created to the owner of the home, who could not use it otherwise.
    /// Does nothing for other users: their files are theirs.
    ///
    /// # Errors
    /// Those of chown.
    pub fn give_to_owner(&self, path: &Path) -> Result<()> {
        let meta =
            fs::symlink_metadata(path).context(|| format!("cannot look at {}", path.display()))?;
        if (meta.uid(), meta.gid()) == (self.owner.uid, self.owner.gid) || !rights_of_root() {
            return Ok(());
        }
        std::os::unix::fs::lchown(path, Some(self.owner.uid), Some(self.owner.gid))
            .context(|| format!("cannot give {} to the owner of the home", path.display()))
    }
}

/// Returns the error if the user may not look at a path in a home: it is unknown what is there.
fn refused_to_user(root: &Path, owner: u32, path: &Path) -> Option<Error> {
    let refused = fs::symlink_metadata(path).err()?;
    let shown = root.display();
    let message = format!(
        "this user may not look into {shown}, which belongs to uid {owner}: run the command as that user, or as root"
    );
    let is_refused = refused.kind() == std::io::ErrorKind::PermissionDenied;
    is_refused.then(|| Error::io(message, refused))
}

/// Resolves links in the path of a directory; a missing one stays as it is.
fn where_it_leads(dir: PathBuf) -> PathBuf {
    fs::canonicalize(&dir).unwrap_or(dir)
}

/// Returns whether this process may give files away.
fn rights_of_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_directory_is_no_home_and_the_sentence_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = Home::open(dir.path()).err().unwrap();
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.to_string().contains("is not a BoxLite home"));
        let error = Home::open(&dir.path().join("absent")).err().unwrap();
        assert_eq!(error.errno(), libc::ENOENT);
    }
}
