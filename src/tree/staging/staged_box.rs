//! A box being made, or what is being put into one that exists.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use crate::home::Owner;
use crate::process::{Caller, ProcessGroup};
use crate::tree::nodes::attr::{Attr, DirEntry, Kept, Kind};
use crate::tree::nodes::names::{BOX_JSON, EXPORT};
use crate::tree::nodes::node::Node;
use crate::tree::staging::program::Program;
use crate::tree::staging::staged_file::StagedFile;
use crate::{Error, Result};

/// How long a maker that lives on, and does not only copy, may go on putting parts of a backup into
/// the box that it has made. What it brings later is refused.
const LINGER: Duration = Duration::from_secs(60);

/// What is in a directory being made.
pub enum Staged {
    /// A directory.
    Directory,
    /// A file being written.
    File(Arc<StagedFile>),
    /// A symbolic link, with its target.
    Link(PathBuf),
}

impl Staged {
    fn kind(&self) -> Kind {
        match self {
            Staged::Directory => Kind::Directory,
            Staged::File(_) => Kind::File,
            Staged::Link(_) => Kind::Symlink,
        }
    }
}

/// A name in a directory being made.
pub struct StagedChild {
    /// Its node.
    pub node: Node,
    /// What it is.
    pub what: Staged,
}

impl StagedChild {
    /// Returns its file, if it is one.
    pub fn file(&self) -> Option<&Arc<StagedFile>> {
        match &self.what {
            Staged::File(file) => Some(file),
            _ => None,
        }
    }
}

/// A box being made.
pub struct StagedBox {
    /// The id that the box has, or will have.
    pub id: String,
    /// The processes that make it.
    pub makers: ProcessGroup,
    /// The copy programs among the makers. They are shown only what they have made, and so find the
    /// other names free. In all else they see what everyone sees.
    copiers: ProcessGroup,
    /// Whether one of the makers is a program that only copies.
    is_by_copier: bool,
    /// Whether the box exists.
    pub committed: bool,
    /// Whether the whole box is made here, and not only something put into one that exists.
    is_new: bool,
    /// Whether a part of it was refused.
    failed: bool,
    /// The processes that got such a refusal.
    failed_by: HashSet<u32>,
    /// Directories of snapshots, by inode, that something other than a snapshot is copied into.
    pub refused: HashSet<u64>,
    /// Snapshots, by id, that a file server has taken and not listed since.
    pub unlisted: HashMap<String, UnlistedSnapshot>,
    /// Snapshots of it that were copied in and exist now, by id.
    pub arrived: HashSet<String>,
    /// The options that it was made with, not normalized, and the version of its archive.
    pub original_options: Option<(Value, Option<u64>)>,
    /// Whether the log has that its makers ended without its export.
    lack_was_logged: bool,
    created: SystemTime,
    used: Instant,
    /// Children by the inode of their directory. A directory has an entry from when it is made.
    pub children: HashMap<u64, BTreeMap<String, StagedChild>>,
}

/// A snapshot that a file server has taken. A program behind the server may be copying one, and
/// would leave out what it finds. So to that server the names in it are free, but for those that
/// the server has made there.
pub struct UnlistedSnapshot {
    server: ProcessGroup,
    made: HashSet<String>,
}

impl UnlistedSnapshot {
    /// Returns a snapshot that the caller has taken.
    pub fn taken_by(server: Caller) -> UnlistedSnapshot {
        UnlistedSnapshot {
            server: ProcessGroup::begin(server),
            made: HashSet::new(),
        }
    }

    /// Returns whether a name is free to the server.
    pub fn is_free(&self, name: &str) -> bool {
        !self.made.contains(name)
    }

    /// Records that the server has made a name.
    pub fn make(&mut self, name: &str) {
        self.made.insert(name.to_owned());
    }
}

impl StagedBox {
    /// Returns a box that the caller begins to make.
    pub fn new(id: String, caller: Caller) -> StagedBox {
        let children = HashMap::from([(Node::Box(id.clone()).ino(), BTreeMap::new())]);
        StagedBox {
            id,
            makers: ProcessGroup::begin(caller),
            copiers: ProcessGroup::default(),
            is_by_copier: false,
            committed: false,
            is_new: true,
            failed: false,
            failed_by: HashSet::new(),
            refused: HashSet::new(),
            unlisted: HashMap::new(),
            arrived: HashSet::new(),
            original_options: None,
            lack_was_logged: false,
            created: SystemTime::now(),
            used: Instant::now(),
            children,
        }
    }

    /// Returns what the caller is putting into a box that exists.
    pub fn existing(id: String, caller: Caller) -> StagedBox {
        let mut staged = StagedBox::new(id, caller);
        staged.committed = true;
        staged.is_new = false;
        staged
    }

    /// Returns whether the caller sees what is staged in place of the node's real box. A file or a
    /// link beside what the box has is always seen: only its maker was told of it.
    pub fn is_view_of(&mut self, caller: Caller, node: &Node) -> bool {
        !self.committed
            || matches!(node, Node::Made(_))
            || self.is_arriving(node)
            || (self.is_made_here(node)
                && self.copiers.includes(caller)
                && Program::of(caller).may_copy())
    }

    /// Returns whether the caller may put parts of a backup into it.
    pub fn may_be_filled_by(&mut self, caller: Caller, node: &Node) -> bool {
        // What copies snapshots into a box that exists has not made the box.
        let is_another = !self.is_new && matches!(node, Node::Box(_));
        !self.committed || self.is_arriving(node) || (!is_another && self.makers.includes(caller))
    }

    /// Returns whether the caller has made the whole box.
    pub fn is_new_by(&mut self, caller: Caller) -> bool {
        self.is_new && self.makers.includes(caller)
    }

    /// Returns whether the directory that a node is, or is in, was made by what is recorded here.
    fn is_made_here(&self, node: &Node) -> bool {
        let snapshot = node.snapshot_id();
        self.is_new
            || snapshot.is_some_and(|snapshot| {
                let directory = Node::Snapshot(self.id.clone(), snapshot.to_owned());
                self.children.contains_key(&directory.ino())
            })
    }

    /// Returns whether a node is, or is in, a snapshot that is being copied in and does not exist
    /// yet.
    fn is_arriving(&self, node: &Node) -> bool {
        let directory = match node {
            Node::Made(_) => {
                let holds = |(ino, names): (&u64, &BTreeMap<String, StagedChild>)| {
                    names
                        .values()
                        .any(|child| child.node == *node)
                        .then_some(*ino)
                };
                self.children.iter().find_map(holds)
            }
            node => node
                .snapshot_id()
                .map(|snapshot| Node::Snapshot(self.id.clone(), snapshot.to_owned()).ino()),
        };
        directory.is_some_and(|ino| self.arriving().any(|(_, child)| child.node.ino() == ino))
    }

    /// Returns the snapshots that are being copied in and do not exist yet, by name.
    pub fn arriving(&self) -> impl Iterator<Item = (&String, &StagedChild)> {
        let snapshots = Node::Snapshots(self.id.clone()).ino();
        let names = self.children.get(&snapshots).into_iter().flatten();
        names.filter(|(_, child)| {
            let id = child.node.snapshot_id();
            id.is_none_or(|id| !self.arrived.contains(id))
        })
    }

    /// Returns whether it has a description and no disk, so that no box is made of it.
    pub fn lacks_export(&self) -> bool {
        let directory = Node::Box(self.id.clone());
        !self.committed
            && self.child(&directory, BOX_JSON).is_some()
            && self.child(&directory, EXPORT).is_none()
    }

    /// Returns the same once its makers have ended, and only the first time.
    pub fn begins_to_lack_export(&mut self) -> bool {
        let begins = !self.lack_was_logged && self.lacks_export() && !self.makers.any_alive();
        self.lack_was_logged |= begins;
        begins
    }

    /// Returns the child of this name.
    pub fn child(&self, parent: &Node, name: &str) -> Option<&StagedChild> {
        self.children.get(&parent.ino())?.get(name)
    }

    /// Returns the name of a node in its directory, and the child.
    pub fn find(&self, node: &Node) -> Option<(&str, &StagedChild)> {
        self.children
            .values()
            .flatten()
            .find(|(_, child)| child.node == *node)
            .map(|(name, child)| (name.as_str(), child))
    }

    /// Returns the files being written in it, or waiting.
    pub fn files(&self) -> impl Iterator<Item = &Arc<StagedFile>> {
        let children = self.children.values().flat_map(BTreeMap::values);
        children.filter_map(StagedChild::file)
    }

    /// Returns the snapshot of this id, if the caller is a file server that has taken it and not
    /// listed it since.
    pub fn unlisted_by(&mut self, caller: Caller, snapshot: &str) -> Option<&mut UnlistedSnapshot> {
        let unlisted = self.unlisted.get_mut(snapshot)?;
        unlisted.server.includes(caller).then_some(unlisted)
    }

    /// Records that something was made in it, or a file of it closed.
    pub fn touch(&mut self) {
        self.used = Instant::now();
    }

    /// Records that the caller makes something in it. Returns false where another process makes it.
    pub fn make_by(&mut self, caller: Caller) -> bool {
        let may = self.makers.take_over(caller);
        let program = Program::of(caller);
        self.is_by_copier |= may && program.copies();
        if may && program.may_copy() {
            self.copiers.join(caller);
        }
        may
    }

    /// Records that a part of it was refused, to this process if it is known.
    pub fn fail(&mut self, process: Option<u32>) {
        self.failed = true;
        self.failed_by.extend(process);
    }

    /// Gives a child another name, and maybe another directory. Returns false if either directory
    /// is gone.
    pub fn move_child(&mut self, from: (&Node, &str), to: (&Node, &str)) -> bool {
        if !self.children.contains_key(&to.0.ino()) {
            return false;
        }
        let names = self.children.get_mut(&from.0.ino());
        let Some(child) = names.and_then(|names| names.remove(from.1)) else {
            return false;
        };
        let names = self.children.entry(to.0.ino()).or_default();
        names.insert(to.1.to_owned(), child);
        true
    }

    /// Refuses a directory with names in it.
    ///
    /// # Errors
    /// ENOTEMPTY.
    pub fn refuse_full(&self, directory: u64, name: &str) -> Result<()> {
        let names = self.children.get(&directory);
        if names.is_some_and(|names| !names.is_empty()) {
            return Err(Error::new(libc::ENOTEMPTY, format!("{name} is not empty")));
        }
        Ok(())
    }

    /// Returns the names in a directory being made.
    pub fn list(&self, directory: &Node) -> Option<Vec<DirEntry>> {
        let children = self.children.get(&directory.ino())?;
        let entries = children.iter().map(|(name, child)| DirEntry {
            name: name.into(),
            kind: child.what.kind(),
            ino: child.node.ino(),
        });
        Some(entries.collect())
    }

    /// Returns the attributes of a node in it; None for a file that was committed, whose attributes
    /// are those of what it has become.
    pub fn attr(&self, owner: Owner, node: &Node) -> Option<Attr> {
        if let Node::Box(_) = node {
            return Some(self.directory_attr(owner, node));
        }
        match &self.find(node)?.1.what {
            Staged::Directory => Some(self.directory_attr(owner, node)),
            Staged::File(file) if file.is_committed() => None,
            Staged::File(file) => Some(Attr::of_arriving_file(
                owner,
                node,
                file.size(),
                file.created,
            )),
            Staged::Link(target) => {
                let size = target.as_os_str().len() as u64;
                Some(Attr::of_link(owner, node, size, self.created))
            }
        }
    }

    fn directory_attr(&self, owner: Owner, node: &Node) -> Attr {
        let directories = self.children.get(&node.ino()).map_or(0, |children| {
            children
                .values()
                .filter(|child| child.what.kind() == Kind::Directory)
                .count()
        });
        let mut attr = Attr::of_directory(owner, node, directories, self.created);
        attr.kept = Kept::Not;
        attr
    }

    /// Returns whether what was made is done with: no process that would see it is left, or a maker
    /// that lives on has not come back for a while. What failed goes with its makers, so that the
    /// next try starts anew. Archives that were taken stay: they wait for their box, or until they
    /// are removed. A directory that was made and not filled waits for what will be put into it.
    pub fn is_over(&self) -> bool {
        if self.has_waiting() {
            return false;
        }
        if !self.committed {
            return (self.failed || self.is_hollow()) && !self.makers.any_alive();
        }
        let has_makers = self.makers.any_alive();
        !self.is_written() && (!has_makers || (self.used.elapsed() > LINGER && !self.is_copied()))
    }

    /// Returns whether a program that copies is still at it, even if it was stopped for hours.
    fn is_copied(&self) -> bool {
        self.is_by_copier && self.copiers.any_alive()
    }

    /// Returns whether files were made in it and not one of them got a byte.
    fn is_hollow(&self) -> bool {
        let mut files = self.files();
        let is_empty = |file: &Arc<StagedFile>| file.size() == 0 && Arc::strong_count(file) == 1;
        files.next().is_some_and(is_empty) && files.all(is_empty)
    }

    /// Returns whether a complete archive waits in it, or a snapshot.json without the export that
    /// it describes, in a box that exists. One of a program that leaves its sources does not count.
    pub fn has_waiting(&self) -> bool {
        // The user of a cp that failed still has the source.
        let is_copy = |file: &StagedFile| {
            let source_keeper = file.source_keeper;
            source_keeper.is_some_and(|source_keeper| self.failed_by.contains(&source_keeper))
        };
        let has_archive = self.files().any(|file| file.is_waiting() && !is_copy(file));
        let is_described = |directory: &StagedChild| {
            let names = self.children.get(&directory.node.ino()).into_iter();
            let mut files = names
                .flat_map(BTreeMap::values)
                .filter_map(StagedChild::file);
            files.any(|file| file.size() > 0 && file.source_keeper.is_none())
        };
        has_archive || (!self.is_new && self.arriving().any(|(_, child)| is_described(child)))
    }

    /// Returns whether a file of it is open.
    pub fn is_written(&self) -> bool {
        self.files().any(|file| Arc::strong_count(file) > 1)
    }
}
