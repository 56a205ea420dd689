//! Boxes being made: what copy tools see of them, and for how long.
//!
//! `mkdir NEW` reserves an id, so the directory has the inode of the box it will be. Until the box
//! is committed everyone sees what was made so far; after that the makers go on seeing only what
//! they made (cp and rsync create with O_EXCL what the finished box has already), everyone else
//! sees the box.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use crate::tree::Tree;
use crate::tree::nodes::attr::{Attr, DirEntry, Kept, Kind};
use crate::tree::nodes::names::{BOX_JSON, EXPORT, SNAPSHOT_JSON, SNAPSHOTS};
use crate::tree::nodes::node::{Derived, Node};
use crate::tree::staging::aside::{ASIDE_PREFIX, AsideDirectory};
use crate::tree::staging::caller::{Caller, Makers};
use crate::tree::staging::staged_file::StagedFile;
use crate::{Error, Result};

/// How long a maker that lives on, and is no program that copies, may go on putting parts of a
/// backup into the box it has made: what it brings later is refused.
const LINGER: Duration = Duration::from_secs(60);

/// What is in a directory being made.
pub(in crate::tree) enum What {
    Directory,
    File(Arc<StagedFile>),
    Link(PathBuf),
}

impl What {
    fn kind(&self) -> Kind {
        match self {
            What::Directory => Kind::Directory,
            What::File(_) => Kind::File,
            What::Link(_) => Kind::Symlink,
        }
    }
}

/// A name in a directory being made.
pub(in crate::tree) struct Child {
    pub node: Node,
    pub what: What,
}

/// A box being made.
pub(in crate::tree) struct StagedBox {
    pub id: String,
    pub makers: Makers,
    /// Those of them that are programs that copy: they are shown what they have made, and so find the
    /// other names free. Nothing else of the mount is another to them.
    copiers: Makers,
    /// One of those does nothing else.
    is_by_copier: bool,
    pub committed: bool,
    /// The whole box is made here, and not only something put into one that exists.
    is_new: bool,
    /// A part of it was refused.
    failed: bool,
    /// The processes that got such a refusal.
    failed_by: HashSet<u32>,
    /// Directories of snapshots that something else than a snapshot is copied into, by inode.
    pub refused: HashSet<u64>,
    /// Snapshots, by id, that a file server has taken and not listed since.
    pub unlisted: HashMap<String, Unlisted>,
    /// Snapshots of it that were copied in and are there now, by id.
    pub arrived: HashSet<String>,
    pub created: SystemTime,
    used: Instant,
    /// Children by the inode of their directory; a directory has an entry from its making on.
    pub children: HashMap<u64, BTreeMap<String, Child>>,
}

/// A snapshot that a file server has taken. A program behind it may be copying one, and would leave out what
/// it finds: to that server the names in it are free, but for those that it has made there.
pub(in crate::tree) struct Unlisted {
    server: Makers,
    made: HashSet<String>,
}

impl Unlisted {
    pub fn by(server: Caller) -> Unlisted {
        Unlisted {
            server: Makers::begin(server),
            made: HashSet::new(),
        }
    }
}

impl StagedBox {
    pub fn new(id: String, caller: Caller) -> StagedBox {
        let children = HashMap::from([(Node::Box(id.clone()).ino(), BTreeMap::new())]);
        StagedBox {
            id,
            makers: Makers::begin(caller),
            copiers: Makers::default(),
            is_by_copier: false,
            committed: false,
            is_new: true,
            failed: false,
            failed_by: HashSet::new(),
            refused: HashSet::new(),
            unlisted: HashMap::new(),
            arrived: HashSet::new(),
            created: SystemTime::now(),
            used: Instant::now(),
            children,
        }
    }

    /// What is being put into a box that exists.
    pub fn existing(id: String, caller: Caller) -> StagedBox {
        let mut staged = StagedBox::new(id, caller);
        staged.committed = true;
        staged.is_new = false;
        staged
    }

    /// Whether the directory that a node is, or is in, was made by what is recorded here.
    fn is_made_here(&self, node: &Node) -> bool {
        let snapshot = node.snapshot_id();
        self.is_new
            || snapshot.is_some_and(|snapshot| {
                let directory = Node::Snapshot(self.id.clone(), snapshot.to_owned());
                self.children.contains_key(&directory.ino())
            })
    }

    /// Whether a node is, or is in, a snapshot that is being copied in and is none yet.
    fn is_arriving(&self, node: &Node) -> bool {
        let directory = match node {
            Node::Made(_) => {
                let holds = |(ino, names): (&u64, &BTreeMap<String, Child>)| {
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

    /// Snapshots that are being copied in and are none yet, by name.
    pub fn arriving(&self) -> impl Iterator<Item = (&String, &Child)> {
        let snapshots = Node::Snapshots(self.id.clone()).ino();
        let names = self.children.get(&snapshots).into_iter().flatten();
        names.filter(|(_, child)| {
            let id = child.node.snapshot_id();
            id.is_none_or(|id| !self.arrived.contains(id))
        })
    }

    pub fn child(&self, parent: &Node, name: &str) -> Option<&Child> {
        self.children.get(&parent.ino())?.get(name)
    }

    /// Something was made in it, or a file of it closed.
    pub fn touch(&mut self) {
        self.used = Instant::now();
    }

    /// Where a node is: its directory's inode and its name there.
    pub fn find(&self, node: &Node) -> Option<(&str, &Child)> {
        self.children
            .values()
            .flatten()
            .find(|(_, child)| child.node == *node)
            .map(|(name, child)| (name.as_str(), child))
    }

    /// Whether what was made is done with: nobody who would see it is left, or whoever lives on
    /// has not come back for a while. What failed goes with its makers, so that the next try starts
    /// anew, but for archives that were taken: they wait for their box, or until somebody removes them.
    /// A directory that only was made waits for what will be put into it.
    fn is_over(&self) -> bool {
        if self.has_waiting() {
            return false;
        }
        if !self.committed {
            return (self.failed || self.is_hollow()) && !self.makers.any_alive();
        }
        let has_makers = self.makers.any_alive();
        !self.is_written() && (!has_makers || (self.used.elapsed() > LINGER && !self.is_copied()))
    }

    /// Whether a program that copies is still at it, be it stopped for hours.
    fn is_copied(&self) -> bool {
        self.is_by_copier && self.copiers.any_alive()
    }

    /// The caller makes something in it.
    pub fn is_made_in_by(&mut self, caller: Caller) -> bool {
        let may = self.makers.take_over(caller);
        let copies = caller.copies();
        self.is_by_copier |= may && copies;
        if may && (copies || caller.looks_first()) {
            self.copiers.join(caller);
        }
        may
    }

    /// A part of it was refused, to this process if it is known.
    pub fn fail(&mut self, process: Option<u32>) {
        self.failed = true;
        self.failed_by.extend(process);
    }

    /// The files being written in it, or waiting.
    pub fn files(&self) -> impl Iterator<Item = &Arc<StagedFile>> {
        let children = self.children.values().flat_map(BTreeMap::values);
        children.filter_map(|child| match &child.what {
            What::File(file) => Some(file),
            _ => None,
        })
    }

    /// Gives a child another name, and maybe another directory; false if either directory is gone.
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

    /// ENOTEMPTY for a directory with names in it.
    pub fn refuse_full(&self, directory: u64, name: &str) -> Result<()> {
        let names = self.children.get(&directory);
        if names.is_some_and(|names| !names.is_empty()) {
            return Err(Error::new(libc::ENOTEMPTY, format!("{name} is not empty")));
        }
        Ok(())
    }

    /// Whether files were made in it and not one of them got a byte.
    fn is_hollow(&self) -> bool {
        let mut files = self.files();
        let is_empty = |file: &Arc<StagedFile>| file.size() == 0 && Arc::strong_count(file) == 1;
        files.next().is_some_and(is_empty) && files.all(is_empty)
    }

    /// Whether a complete archive waits in it, or a snapshot.json without the export that it describes, in
    /// a box that exists.
    fn has_waiting(&self) -> bool {
        // The user of a cp that failed still has the source.
        let is_copy = |file: &StagedFile| {
            let copier = file.copier;
            copier.is_some_and(|copier| self.failed_by.contains(&copier))
        };
        let mut files = self.files();
        let has_archive = files.any(|file| file.waits.load(Ordering::Relaxed) && !is_copy(file));
        let is_described = |directory: &Child| {
            let names = self.children.get(&directory.node.ino()).into_iter();
            let mut files = names.flat_map(BTreeMap::values);
            files.any(|child| matches!(&child.what, What::File(file) if file.size() > 0))
        };
        has_archive || (!self.is_new && self.arriving().any(|(_, child)| is_described(child)))
    }

    /// Whether a file of it is open.
    fn is_written(&self) -> bool {
        self.files().any(|file| Arc::strong_count(file) > 1)
    }
}

/// A file that is written where no box is being made: an archive dropped into the root, one that comes
/// in place of a box's export, or a temporary file for either.
pub(in crate::tree) struct LooseFile {
    /// The root or the directory of a box, and its name there.
    pub dir: Node,
    pub name: String,
    pub file: Arc<StagedFile>,
    pub makers: Makers,
    pub committed: bool,
    /// Its final name was refused.
    pub failed: bool,
    used: Instant,
}

impl LooseFile {
    pub fn new(dir: Node, name: &str, file: Arc<StagedFile>, caller: Caller) -> LooseFile {
        LooseFile {
            dir,
            name: name.to_owned(),
            file,
            makers: Makers::begin(caller),
            committed: false,
            failed: false,
            used: Instant::now(),
        }
    }

    /// Whether it is open, and nothing has become of it yet.
    pub fn is_written(&self) -> bool {
        !self.committed && Arc::strong_count(&self.file) > 1
    }

    fn is_at(&self, dir: &Node, name: &str) -> bool {
        self.dir == *dir && self.name == name
    }

    /// Whether it is written in place of a box's export, under that name: each writer sees his own, and
    /// everybody else the export.
    fn is_over_export(&self) -> bool {
        self.file.restores && self.name == EXPORT
    }

    /// Whether it is done with. A temporary file goes if its writer was killed half way. A complete one
    /// waits for its final name, which another program may give it (curl, then mv); mv may have deleted its
    /// source. What a program copied that leaves its sources, and whose name was refused, goes with it.
    fn is_over(&self) -> bool {
        if self.file.waits.load(Ordering::Relaxed) {
            return self.failed && self.file.copier.is_some() && !self.makers.any_alive();
        }
        let is_open = Arc::strong_count(&self.file) > 1;
        let waits_for_name = !self.committed && !self.is_over_export();
        match self.makers.any_alive() {
            false => self.committed || !is_open,
            true => !waits_for_name && !is_open && self.used.elapsed() > LINGER,
        }
    }
}

/// Everything being made.
#[derive(Default)]
pub(in crate::tree) struct Staging {
    /// By the id of the box to be.
    pub boxes: HashMap<String, StagedBox>,
    /// Boxes being made, by the name they are shown by: name → id. A committed one is among the
    /// real boxes and not here.
    pub names: HashMap<String, String>,
    /// Files written outside of those.
    pub files: Vec<LooseFile>,
    /// The box each made node is in.
    pub made_in: HashMap<u64, String>,
    /// Directories for files put aside.
    pub asides: Vec<AsideDirectory>,
}

impl Staging {
    /// Lets go of what is done with.
    pub fn sweep(&mut self) {
        let over: Vec<String> = self
            .boxes
            .values()
            .filter(|staged| staged.is_over())
            .map(|staged| staged.id.clone())
            .collect();
        for id in over {
            self.let_go(&id);
        }
        self.files.retain(|file| !file.is_over());
        self.sweep_asides();
    }

    /// The box being made that a node is in.
    pub fn box_of(&self, node: &Node) -> Option<String> {
        match node {
            Node::Made(_) => self.made_in.get(&node.ino()).cloned(),
            node => node.box_id().map(str::to_owned),
        }
    }

    /// The box being made that this caller sees in place of the node's real box.
    pub fn face(&mut self, caller: Caller, node: &Node) -> Option<&mut StagedBox> {
        self.sweep();
        let id = self.box_of(node)?;
        let staged = self.boxes.get_mut(&id)?;
        // A file or link that was made beside what the box has: only its maker was told of it.
        let is_staged = !staged.committed
            || matches!(node, Node::Made(_))
            || staged.is_arriving(node)
            || (staged.is_made_here(node)
                && staged.copiers.includes(caller)
                && (caller.copies() || caller.looks_first()));
        is_staged.then_some(staged)
    }

    /// The box, being made or made by this caller, that it may put parts of a backup into.
    pub fn made_by(&mut self, caller: Caller, node: &Node) -> Option<&mut StagedBox> {
        self.sweep();
        let id = self.box_of(node)?;
        let staged = self.boxes.get_mut(&id)?;
        // What copies snapshots into a box that exists has not made the box.
        let is_another = !staged.is_new && matches!(node, Node::Box(_));
        let may = !staged.committed
            || staged.is_arriving(node)
            || (!is_another && staged.makers.includes(caller));
        may.then_some(staged)
    }

    /// Whether the caller has made the whole box, a moment ago.
    pub fn is_new_by(&mut self, caller: Caller, id: &str) -> bool {
        self.sweep();
        let staged = self.boxes.get_mut(id);
        staged.is_some_and(|staged| staged.is_new && staged.makers.includes(caller))
    }

    /// The record of what is put into a box that exists.
    pub fn existing(&mut self, caller: Caller, id: &str) -> &mut StagedBox {
        self.sweep();
        let staged = self
            .boxes
            .entry(id.to_owned())
            .or_insert_with(|| StagedBox::existing(id.to_owned(), caller));
        staged.makers.join(caller);
        staged.touch();
        staged
    }

    /// What is known of a snapshot that this caller has taken and not listed.
    fn unlisted_by(&mut self, caller: Caller, directory: &Node) -> Option<&mut Unlisted> {
        let Node::Snapshot(id, snapshot) = directory else {
            return None;
        };
        let unlisted = self.boxes.get_mut(id)?.unlisted.get_mut(snapshot)?;
        unlisted.server.includes(caller).then_some(unlisted)
    }

    /// The caller is about to remove what has become a box: from now on he sees it as all do.
    pub fn end_face(&mut self, caller: Caller, node: &Node) {
        if let Some(staged) = self.face(caller, node)
            && staged.committed
            && !staged.is_written()
        {
            let id = staged.id.clone();
            self.let_go(&id);
        }
    }

    /// Whether a name is an empty file: tar makes one where a link will be, and removes it at its end.
    pub fn is_placeholder(&mut self, caller: Caller, parent: &Node, name: &str) -> bool {
        let child = self
            .face(caller, parent)
            .and_then(|staged| staged.child(parent, name));
        child.is_some_and(|child| matches!(&child.what, What::File(file) if file.size() == 0))
    }

    fn let_go(&mut self, id: &str) {
        self.boxes.remove(id);
        self.names.retain(|_, box_id| box_id != id);
        self.made_in.retain(|_, box_id| box_id != id);
    }

    /// A file being made was closed for the last time.
    pub fn touch(&mut self, file: &Arc<StagedFile>) {
        if let Some(staged) = self.boxes.get_mut(&file.box_id) {
            staged.touch();
        }
        for loose in &mut self.files {
            if Arc::ptr_eq(&loose.file, file) {
                loose.used = Instant::now();
            }
        }
    }

    /// The loose file that this caller sees by this name. One that has become a box's disk is the box's
    /// export, also for who wrote it; and while it is written, everybody else goes on seeing that.
    pub fn loose_file(&mut self, caller: Caller, dir: &Node, name: &str) -> Option<&mut LooseFile> {
        self.sweep();
        let mut files = self.files.iter_mut().filter(|file| file.is_at(dir, name));
        files.find_map(|loose| {
            let is_seen = match loose.committed {
                true => !loose.file.restores && loose.makers.includes(caller),
                false => !loose.is_over_export() || loose.makers.includes(caller),
            };
            is_seen.then_some(loose)
        })
    }

    /// Whether somebody is writing a loose file of this name, which all see.
    pub fn is_written(&mut self, dir: &Node, name: &str) -> bool {
        self.sweep();
        let mut files = self.files.iter().filter(|file| file.is_at(dir, name));
        files.any(|file| !file.committed && !file.is_over_export())
    }

    /// Whether there is a loose file of this name, whoever wrote it.
    pub fn has_loose_file(&self, dir: &Node, name: &str) -> bool {
        self.files.iter().any(|file| file.is_at(dir, name))
    }

    /// A loose file could not get its final name.
    pub fn fail_loose(&mut self, dir: &Node, name: &str) {
        for loose in self.files.iter_mut().filter(|file| file.is_at(dir, name)) {
            loose.failed = true;
        }
    }

    /// The archives that wait in a directory of a box that exists, for their final name.
    pub fn waiting_at(&self, dir: &Node) -> Vec<(String, Node)> {
        let waiting = self.files.iter().filter(|loose| {
            loose.dir == *dir && !loose.is_over_export() && loose.file.waits.load(Ordering::Relaxed)
        });
        waiting
            .map(|loose| (loose.name.clone(), loose.file.node.clone()))
            .collect()
    }

    /// Takes out the loose file that this caller sees by this name.
    pub fn take_loose_file(&mut self, caller: Caller, dir: &Node, name: &str) -> Option<LooseFile> {
        let file = self.loose_file(caller, dir, name)?.file.clone();
        let mut files = self.files.iter();
        let index = files.position(|loose| Arc::ptr_eq(&loose.file, &file))?;
        Some(self.files.swap_remove(index))
    }

    /// The loose file that is this node, whoever asks.
    pub fn loose_file_at(&self, node: &Node) -> Option<&LooseFile> {
        self.files.iter().find(|file| file.file.node == *node)
    }

    /// All files being written, or waiting.
    pub fn all_files(&self) -> Vec<Arc<StagedFile>> {
        let made = self.boxes.values().flat_map(StagedBox::files);
        let loose = self.files.iter().map(|loose| &loose.file);
        made.chain(loose).cloned().collect()
    }

    /// The file being written that is this node.
    pub fn file_at(&self, node: &Node) -> Option<Arc<StagedFile>> {
        if let Some(loose) = self.loose_file_at(node) {
            return Some(loose.file.clone());
        }
        let staged = self.boxes.get(&self.box_of(node)?)?;
        match &staged.find(node)?.1.what {
            What::File(file) => Some(file.clone()),
            _ => None,
        }
    }
}

impl Staging {
    /// The directory for files put aside in another.
    pub(in crate::tree) fn aside_in(&self, dir: &Node) -> Option<&AsideDirectory> {
        self.asides.iter().find(|aside| aside.dir == *dir)
    }

    /// Returns the directory that the files put aside in this one belong to.
    pub(in crate::tree) fn dir_of_aside(&self, node: &Node) -> Option<&Node> {
        let mut asides = self.asides.iter();
        asides
            .find(|aside| aside.node == *node)
            .map(|aside| &aside.dir)
    }

    /// Lets go of directories whose makers are gone and left nothing in them.
    pub(in crate::tree) fn sweep_asides(&mut self) {
        if self.asides.is_empty() {
            return;
        }
        let asides = std::mem::take(&mut self.asides);
        self.asides = asides
            .into_iter()
            .filter(|aside| aside.makers.any_alive() || !self.put_aside(&aside.dir).is_empty())
            .collect();
    }

    /// The files put aside in a directory, with the names that they will have.
    pub(in crate::tree) fn put_aside(&self, dir: &Node) -> Vec<(String, Node)> {
        let loose = self.files.iter().filter(|loose| loose.dir == *dir);
        let loose = loose.map(|loose| (loose.name.as_str(), &loose.file.node));
        let staged = self.box_of(dir).and_then(|id| self.boxes.get(&id));
        let names = staged.and_then(|staged| staged.children.get(&dir.ino()));
        let names = names.into_iter().flatten();
        let staged = names.map(|(name, child)| (name.as_str(), &child.node));
        let aside = loose.chain(staged).filter_map(|(name, node)| {
            let name = name.strip_prefix(ASIDE_PREFIX)?;
            Some((name.to_owned(), node.clone()))
        });
        aside.collect()
    }
}

fn not_made() -> Error {
    Error::new(libc::ENOENT, "there is no such file")
}

impl Tree {
    /// A name as staging has it; None when staging has no say.
    pub(in crate::tree) fn staged_child(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
    ) -> Option<Result<Node>> {
        let mut staging = self.staging.lock();
        staging.sweep();
        if let Some(loose) = staging.loose_file(caller, parent, name) {
            return Some(Ok(loose.file.node.clone()));
        }
        if *parent == Node::Root {
            let id = staging.names.get(name)?;
            return Some(Ok(Node::Box(id.clone())));
        }
        let staged = staging.face(caller, parent)?;
        Some(
            staged
                .child(parent, name)
                .map(|child| child.node.clone())
                .ok_or_else(not_made),
        )
    }

    /// What is being put into a box that exists, where the box has nothing of that name: all see a snapshot,
    /// and its maker a temporary file.
    pub(in crate::tree) fn arriving_child(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
    ) -> Option<Node> {
        let mut staging = self.staging.lock();
        staging.sweep();
        let Node::Snapshots(id) = parent else {
            let staged = staging.boxes.get_mut(parent.box_id()?)?;
            let is_maker = staged.makers.includes(caller);
            let child = staged.child(parent, name).filter(|_| is_maker);
            return child.map(|child| child.node.clone());
        };
        let mut arriving = staging.boxes.get(id)?.arriving();
        arriving.find_map(|(of, child)| (of == name).then(|| child.node.clone()))
    }

    /// Snapshots that are being copied into a box that exists.
    pub(in crate::tree) fn arriving_in(&self, id: &str) -> Vec<(String, Node, Kind)> {
        let mut staging = self.staging.lock();
        staging.sweep();
        let arriving = staging
            .boxes
            .get(id)
            .into_iter()
            .flat_map(StagedBox::arriving);
        arriving
            .map(|(name, child)| (name.clone(), child.node.clone(), Kind::Directory))
            .collect()
    }

    /// Whether the kernel has to be told that a name is not there, because the caller is about to make
    /// it, as a part of the backup it copies: the box that it has made has all of them already.
    pub(in crate::tree) fn is_made_by_copy(
        &self,
        caller: Caller,
        parent: &Node,
        name: &str,
    ) -> bool {
        let is_part = Derived::named(name).is_some()
            || matches!(
                (parent, name),
                (Node::Box(_), BOX_JSON | SNAPSHOT_JSON | SNAPSHOTS)
                    | (Node::Snapshot(..), SNAPSHOT_JSON | EXPORT)
            );
        if !is_part {
            return false;
        }
        {
            let mut staging = self.staging.lock();
            let Some(staged) = staging.made_by(caller, parent) else {
                return false;
            };
            if !staged.committed || staged.child(parent, name).is_some() {
                return false;
            }
        }
        caller.makes_exclusively(name) == Some(true)
    }

    /// Whether a name is free to the caller, a file server that has taken this snapshot and not listed it.
    pub(in crate::tree) fn is_unlisted(
        &self,
        caller: Caller,
        directory: &Node,
        name: &str,
    ) -> bool {
        if !matches!(directory, Node::Snapshot(..)) {
            return false;
        }
        let mut staging = self.staging.lock();
        let unlisted = staging.unlisted_by(caller, directory);
        unlisted.is_some_and(|unlisted| !unlisted.made.contains(name))
    }

    /// The caller has made a name, which is free to it no more.
    pub(in crate::tree) fn was_made(&self, caller: Caller, directory: &Node, name: &str) {
        if let Some(unlisted) = self.staging.lock().unlisted_by(caller, directory) {
            unlisted.made.insert(name.to_owned());
        }
    }

    /// The caller lists a directory: from now on it finds all that is in it.
    pub(in crate::tree) fn was_listed(&self, caller: Caller, directory: &Node) {
        let mut staging = self.staging.lock();
        if staging.unlisted_by(caller, directory).is_some()
            && let Node::Snapshot(id, snapshot) = directory
            && let Some(staged) = staging.boxes.get_mut(id)
        {
            staged.unlisted.remove(snapshot);
        }
    }

    /// Attributes as staging has them.
    pub(in crate::tree) fn staged_attr(&self, caller: Caller, node: &Node) -> Option<Attr> {
        let mut staging = self.staging.lock();
        if let Some(loose) = staging.loose_file_at(node) {
            return Some(self.file(node, loose.file.size(), loose.file.created));
        }
        let staged = staging.face(caller, node)?;
        if let Node::Box(_) = node {
            return Some(self.made_directory(staged, node));
        }
        match &staged.find(node)?.1.what {
            What::Directory => Some(self.made_directory(staged, node)),
            What::File(file) if file.is_there.load(Ordering::Relaxed) => None,
            What::File(file) => Some(self.file(node, file.size(), file.created)),
            What::Link(target) => {
                let size = target.as_os_str().len() as u64;
                let mut attr = self.file(node, size, staged.created);
                attr.kind = Kind::Symlink;
                attr.perm = 0o777;
                Some(attr)
            }
        }
    }

    fn made_directory(&self, staged: &StagedBox, node: &Node) -> Attr {
        let directories = staged.children.get(&node.ino()).map_or(0, |children| {
            children
                .values()
                .filter(|child| child.what.kind() == Kind::Directory)
                .count()
        });
        let mut attr = self.directory(node, directories, staged.created);
        attr.kept = Kept::Not;
        attr
    }

    /// A listing as staging has it.
    pub(in crate::tree) fn staged_list(
        &self,
        caller: Caller,
        node: &Node,
    ) -> Option<Vec<DirEntry>> {
        if *node == Node::Root {
            return None;
        }
        let mut staging = self.staging.lock();
        let staged = staging.face(caller, node)?;
        let children = staged.children.get(&node.ino())?;
        Some(
            children
                .iter()
                .map(|(name, child)| DirEntry {
                    name: name.into(),
                    kind: child.what.kind(),
                    ino: child.node.ino(),
                })
                .collect(),
        )
    }

    /// What is being made in the root: it is listed until it is a box.
    pub(in crate::tree) fn staged_in_root(&self) -> Vec<DirEntry> {
        let mut staging = self.staging.lock();
        staging.sweep();
        let directories = staging.names.iter().map(|(name, id)| DirEntry {
            name: name.into(),
            kind: Kind::Directory,
            ino: Node::Box(id.clone()).ino(),
        });
        let files = staging.files.iter();
        let files = files.filter(|loose| loose.dir == Node::Root && !loose.committed);
        let files = files.map(|loose| DirEntry {
            name: loose.name.clone().into(),
            kind: Kind::File,
            ino: loose.file.node.ino(),
        });
        directories.chain(files).collect()
    }

    /// Whether the makers of a box, or those who are removing it, see something else than everyone else
    /// does.
    pub(in crate::tree) fn has_two_faces(&self, node: &Node) -> bool {
        node.box_id().is_some_and(|id| {
            let is_made = self.staging.lock().boxes.contains_key(id);
            is_made || self.dealings.lock().concern(id)
        })
    }

    /// How many directories staging adds to the root.
    pub(in crate::tree) fn staged_directories(&self) -> usize {
        self.staging.lock().names.len()
    }

    /// Where a link being made points.
    ///
    /// # Errors
    /// EINVAL for what is no link.
    pub fn readlink(&self, caller: Caller, ino: u64) -> Result<PathBuf> {
        let node = self.node(ino)?;
        match &node {
            Node::Link(derived, source) => return self.link_target(*derived, source),
            Node::Guest(file) => return self.guest_link(file),
            _ => {}
        }
        let mut staging = self.staging.lock();
        match staging
            .face(caller, &node)
            .and_then(|staged| staged.find(&node).map(|(_, child)| &child.what))
        {
            Some(What::Link(target)) => Ok(target.clone()),
            _ => Err(Error::new(libc::EINVAL, "that is not a symbolic link")),
        }
    }
}
