//! Files that are written where no box is being made: archives dropped into the root, those that
//! come in place of an export, and temporary files for either.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::Result;
use crate::home::Owner;
use crate::process::{Caller, ProcessGroup};
use crate::tree::nodes::attr::Attr;
use crate::tree::nodes::names::{BOX_JSON, EXPORT, exists, not_there};
use crate::tree::nodes::node::Node;
use crate::tree::staging::role::ASIDE_PREFIX;
use crate::tree::staging::staged_file::StagedFile;

/// How long a file that was closed and became nothing stays while its maker lives on.
const LINGER: Duration = Duration::from_secs(60);

/// A file that is written where no box is being made.
struct LooseFile {
    /// The root, or the directory of a box or a snapshot.
    dir: Node,
    /// Its name there.
    name: String,
    file: Arc<StagedFile>,
    makers: ProcessGroup,
    /// Its final name was refused.
    failed: bool,
    used: Instant,
}

impl LooseFile {
    /// Returns whether it is open, and nothing has become of it yet.
    fn is_written(&self) -> bool {
        !self.file.is_committed() && Arc::strong_count(&self.file) > 1
    }

    fn is_at(&self, dir: &Node, name: &str) -> bool {
        self.dir == *dir && self.name == name
    }

    /// Returns whether it is written in place of an export or of box.json, under that name. Its
    /// writer sees it, and all others see what there is.
    fn is_in_place(&self) -> bool {
        (self.file.is_over_export() && self.name == EXPORT)
            || (self.file.is_edit() && self.name == BOX_JSON)
    }

    /// Returns whether the caller sees it. One that has become a box's disk is the box's export,
    /// also for its writer. One that has become a box is seen by the process that wrote it, which may
    /// still set its times, and not by its children: for a shell these are other programs.
    fn is_seen_by(&mut self, caller: Caller) -> bool {
        if self.file.is_committed() {
            !self.file.is_over_export() && !self.file.is_edit() && self.makers.has(caller)
        } else {
            !self.is_in_place() || self.makers.includes(caller)
        }
    }

    /// Returns whether it is done with. A temporary file goes if its writer was killed half way. A
    /// complete one waits for its final name, which another program may give it (curl, then mv); mv
    /// may have deleted its source. A copy by a program that leaves its sources goes with that
    /// program where its name was refused.
    fn is_over(&self) -> bool {
        if self.file.is_waiting() {
            return self.failed && self.file.source_keeper.is_some() && !self.makers.any_alive();
        }
        let is_committed = self.file.is_committed();
        let is_open = Arc::strong_count(&self.file) > 1;
        let waits_for_name = !is_committed && !self.is_in_place();
        if self.makers.any_alive() {
            !waits_for_name && !is_open && self.used.elapsed() > LINGER
        } else {
            is_committed || !is_open
        }
    }
}

/// All loose files.
#[derive(Default)]
pub struct LooseFiles {
    files: Mutex<Vec<LooseFile>>,
}

impl LooseFiles {
    /// Locks the files, without those that are done with.
    fn swept(&self) -> MutexGuard<'_, Vec<LooseFile>> {
        let mut files = self.files.lock();
        files.retain(|file| !file.is_over());
        files
    }

    /// Lets go of files that are done with.
    pub fn sweep(&self) {
        drop(self.swept());
    }

    /// Adds a file that the caller writes. In the root a name is for one file. Elsewhere several
    /// files may have the same name, if only their writers see them.
    pub fn add(&self, caller: Caller, dir: &Node, name: &str, file: Arc<StagedFile>) -> Result<()> {
        let mut files = if *dir == Node::Root {
            self.files.lock()
        } else {
            self.swept()
        };
        let is_taken = if *dir == Node::Root {
            // It is of another maker: this caller would have found its own.
            files.iter().any(|loose| loose.is_at(dir, name))
        } else {
            is_written(&files, dir, name)
        };
        if is_taken {
            return Err(exists(name));
        }
        files.push(LooseFile {
            dir: dir.clone(),
            name: name.to_owned(),
            file,
            makers: ProcessGroup::begin(caller),
            failed: false,
            used: Instant::now(),
        });
        Ok(())
    }

    /// Returns the node of the file that this caller sees by this name.
    pub fn node_for(&self, caller: Caller, dir: &Node, name: &str) -> Option<Node> {
        let mut files = self.swept();
        let index = position(&mut files, caller, dir, name)?;
        files.get(index).map(|loose| loose.file.node.clone())
    }

    /// Takes out the file that this caller sees by this name.
    pub fn take(&self, caller: Caller, dir: &Node, name: &str) -> Option<Arc<StagedFile>> {
        let mut files = self.swept();
        let index = position(&mut files, caller, dir, name)?;
        Some(files.swap_remove(index).file)
    }

    /// Renames the file that this caller sees by a name, in the same directory. Returns it, and the
    /// file that had the new name before.
    pub fn rename(
        &self,
        caller: Caller,
        dir: &Node,
        (from, to): (&str, &str),
    ) -> Result<(Arc<StagedFile>, Option<Arc<StagedFile>>)> {
        let mut files = self.swept();
        let is_root = *dir == Node::Root && !to.starts_with(ASIDE_PREFIX);
        if is_written(&files, dir, to)
            || (is_root && files.iter().any(|loose| loose.is_at(dir, to)))
        {
            return Err(exists(to));
        }
        let index = position(&mut files, caller, dir, from).ok_or_else(not_there)?;
        let mut loose = files.swap_remove(index);
        let file = loose.file.clone();
        // gio opens what it is about to replace.
        let replaced = position(&mut files, caller, dir, to).map(|at| files.swap_remove(at).file);
        loose.name = to.to_owned();
        files.push(loose);
        Ok((file, replaced))
    }

    /// Gives a file its old name back.
    pub fn rename_back(&self, file: &Arc<StagedFile>, name: &str) {
        for loose in self.files.lock().iter_mut() {
            if Arc::ptr_eq(&loose.file, file) {
                loose.name = name.to_owned();
            }
        }
    }

    /// Records that a maker of the file of this name could not give it its final one. A rename by
    /// another process says nothing about the copy, which had ended with success.
    pub fn fail(&self, caller: Caller, dir: &Node, name: &str) {
        for loose in self.files.lock().iter_mut() {
            loose.failed |= loose.is_at(dir, name) && loose.makers.includes(caller);
        }
    }

    /// Records that a file could not become what its name says.
    pub fn fail_file(&self, file: &StagedFile) {
        for loose in self.files.lock().iter_mut() {
            loose.failed |= std::ptr::eq(&*loose.file, file);
        }
    }

    /// Records that a descriptor of a file was closed, which postpones its sweep.
    pub fn note_close(&self, file: &Arc<StagedFile>) {
        for loose in self.files.lock().iter_mut() {
            if Arc::ptr_eq(&loose.file, file) {
                loose.used = Instant::now();
            }
        }
    }

    /// Takes out the file that a box was made of: the box is gone, or has another name.
    pub fn forget_box(&self, box_id: &str) {
        self.files
            .lock()
            .retain(|loose| !loose.file.is_committed() || loose.file.box_id != box_id);
    }

    /// Returns the id of the box that was made of the file that this caller sees by this name in the
    /// root.
    pub fn box_of(&self, caller: Caller, name: &str) -> Option<String> {
        let mut files = self.swept();
        let index = position(&mut files, caller, &Node::Root, name)?;
        let file = &files.get(index)?.file;
        file.is_committed().then(|| file.box_id.clone())
    }

    /// Takes out a file that became nothing.
    pub fn drop_file(&self, file: &StagedFile) {
        self.files
            .lock()
            .retain(|loose| !std::ptr::eq(&*loose.file, file));
    }

    /// Returns the file that is this node, for any caller.
    pub fn file_at(&self, node: &Node) -> Option<Arc<StagedFile>> {
        let files = self.files.lock();
        let loose = files.iter().find(|loose| loose.file.node == *node)?;
        Some(loose.file.clone())
    }

    /// Returns whether a node is one of these files.
    pub fn contains(&self, node: &Node) -> bool {
        let files = self.files.lock();
        files.iter().any(|loose| loose.file.node == *node)
    }

    /// Returns the attributes of the file that is this node, for any caller.
    pub fn attr(&self, owner: Owner, node: &Node) -> Option<Attr> {
        let files = self.files.lock();
        let file = &files.iter().find(|loose| loose.file.node == *node)?.file;
        Some(Attr::of_arriving_file(
            owner,
            node,
            file.size(),
            file.created,
        ))
    }

    /// Returns whether the file that this caller sees by this name is an edit of box.json.
    pub fn is_edit(&self, caller: Caller, dir: &Node, name: &str) -> bool {
        let mut files = self.swept();
        let index = position(&mut files, caller, dir, name);
        let loose = index.and_then(|index| files.get(index));
        loose.is_some_and(|loose| loose.file.is_edit())
    }

    /// Returns whether an archive is being written over the disk of a box.
    pub fn is_written_over(&self, box_id: &str) -> bool {
        let files = self.files.lock();
        let mut over = files.iter().filter(|loose| loose.file.is_over_export());
        over.any(|loose| loose.file.box_id == box_id && loose.is_written())
    }

    /// Returns the archives in the root that have not become boxes yet.
    pub fn in_root(&self) -> Vec<(String, Node)> {
        let files = self.swept();
        let files = files.iter();
        names(files.filter(|loose| loose.dir == Node::Root && !loose.file.is_committed()))
    }

    /// Returns the archives that wait in a directory of a box that exists, for their final name.
    pub fn waiting_in(&self, dir: &Node) -> Vec<(String, Node)> {
        let files = self.files.lock();
        names(
            files.iter().filter(|loose| {
                loose.dir == *dir && !loose.is_in_place() && loose.file.is_waiting()
            }),
        )
    }

    /// Returns all files in a directory.
    pub fn in_directory(&self, dir: &Node) -> Vec<(String, Node)> {
        let files = self.files.lock();
        names(files.iter().filter(|loose| loose.dir == *dir))
    }

    /// Returns all files.
    pub fn files(&self) -> Vec<Arc<StagedFile>> {
        let files = self.files.lock();
        files.iter().map(|loose| loose.file.clone()).collect()
    }
}

fn position(files: &mut [LooseFile], caller: Caller, dir: &Node, name: &str) -> Option<usize> {
    let mut files = files.iter_mut();
    files.position(|loose| loose.is_at(dir, name) && loose.is_seen_by(caller))
}

/// Returns whether a file of this name, which all see, is being written.
fn is_written(files: &[LooseFile], dir: &Node, name: &str) -> bool {
    let mut files = files.iter().filter(|loose| loose.is_at(dir, name));
    files.any(|loose| !loose.file.is_committed() && !loose.is_in_place())
}

fn names<'l>(files: impl Iterator<Item = &'l LooseFile>) -> Vec<(String, Node)> {
    files
        .map(|loose| (loose.name.clone(), loose.file.node.clone()))
        .collect()
}
