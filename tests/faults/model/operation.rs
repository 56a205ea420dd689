//! Operations on a home, and random sequences of them.
//!
//! An operation selects its objects by numbers, modulo the number of objects that exist when it
//! runs. So any part of a sequence is a valid sequence, and a failing one can be shortened.

use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// Selects one of the existing objects.
pub type Pick = u16;

/// A guest's writes: where, how many blocks, what.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub at: Pick,
    pub blocks: u8,
    pub fill: Fill,
}

/// The contents of a guest write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fill {
    /// The same byte everywhere, which may be zero.
    Byte(u8),
    /// A whole cluster that is marked as zero, which hides the backing file: a guest's trim.
    ZeroCluster,
}

/// A program that copies one file.
#[derive(Clone, Copy, Debug)]
pub enum Tool {
    /// `cp`, which uses copy_file_range.
    Cp,
    /// `cat` with a shell redirection, which truncates first.
    Cat,
    /// `rsync`, which writes under a temporary name.
    Rsync,
    /// The copy of a file manager, which also writes under a temporary name.
    Gio,
}

/// How a snapshot is deleted.
#[derive(Clone, Copy, Debug)]
pub enum Removal {
    Rmdir,
    Rm,
}

/// How a disk state becomes a box.
#[derive(Clone, Copy, Debug)]
pub enum Promotion {
    /// A copy of its export to NEW.boxlite.
    Export(Tool),
    /// A copy of its export into a new directory.
    Directory,
    /// `cp -r` of the snapshot's directory.
    CopyDirectory,
    /// `mv` of the snapshot's directory, which copies and removes.
    Move,
}

/// How a directory is copied.
#[derive(Clone, Copy, Debug)]
pub enum TreeTool {
    Cp,
    Rsync,
}

/// An operation that must fail with the documented error and without any change.
#[derive(Clone, Copy, Debug)]
pub enum Refusal {
    SnapshotTaken,
    SnapshotName(Pick),
    BoxTaken,
    BoxName(Pick),
    DirectoryInBox,
    FileInBox,
    RmdirBox,
    RmdirSnapshots,
    RmdirNothing,
    RenameBoxOntoBox { keep: bool },
    RenameBoxName(Pick),
    Exchange,
    BoxIntoBox,
    RenameSnapshotOntoSnapshot { keep: bool },
    RenameSnapshotName(Pick),
    SnapshotToOtherBox,
    SnapshotIntoRoot,
    ImportTaken,
    ImportName(Pick),
    ImportGarbage,
    ImportHalf,
    RestoreGarbage,
    RestoreHalf,
    RestoreNothing,
    RestoreItself,
    WriteSnapshotExport,
    AppendToExport,
    CopyBoxIntoBox,
    RemoveJsonAlone,
    HardLink,
}

/// One operation on the home.
#[derive(Clone, Debug)]
pub enum Operation {
    /// The guest of a box writes.
    Guest { of: Pick, writes: Vec<Write> },
    /// `mkdir`.
    Snapshot { of: Pick, name: Pick },
    /// `rmdir` or `rm -r`.
    RemoveSnapshot { which: Pick, by: Removal },
    /// `mv` within `snapshots`.
    RenameSnapshot { which: Pick, name: Pick },
    /// `mv` within the root.
    RenameBox { of: Pick, name: Pick },
    /// `rm -r`.
    RemoveBox { of: Pick },
    /// `cp -r` of a box.
    Clone { of: Pick, name: Pick, by: TreeTool },
    /// A live disk or a snapshot becomes a box.
    Promote {
        state: Pick,
        name: Pick,
        by: Promotion,
    },
    /// Copies an export of the mount over the export of a box.
    Restore { of: Pick, state: Pick, by: Tool },
    /// Copies a backup over the export of a box.
    RestoreBackup { of: Pick, backup: Pick, by: Tool },
    /// Copies an export out of the mount; it becomes a backup.
    Export { state: Pick, zst: bool, by: Tool },
    /// `cp -r` of a box out of the mount.
    BackUp { of: Pick, by: TreeTool },
    /// A backup becomes a box: an archive, or a directory with all its snapshots.
    Import {
        backup: Pick,
        name: Pick,
        by: Tool,
        into_directory: bool,
    },
    /// An operation that must be refused.
    Refused {
        of: Pick,
        other: Pick,
        what: Refusal,
    },
    /// Changes to a running box, which must be refused.
    Running { of: Pick },
    /// Opens an export and reads its rest after later operations.
    Reader { state: Pick },
    /// `boxlitefs compact` during the mount. Readers may finish first; the program may be killed.
    Compact {
        at_rest: bool,
        killed_at: Option<Pick>,
    },
    /// `mv` of what was removed or restored over to where it was, or `cp -r`.
    HaveBack { which: Pick, name: Pick },
    /// `rm -r` of what was removed or restored over.
    EndKeeping { which: Pick },
    /// Unmounts and mounts.
    Remount,
    /// BoxLite starts, runs operations, and ends.
    BoxLite {
        does: Vec<ByBoxLite>,
        try_meanwhile: bool,
    },
}

/// One operation of BoxLite.
#[derive(Clone, Debug)]
pub enum ByBoxLite {
    Snapshot { of: Pick, name: Pick },
    RestoreSnapshot { which: Pick },
    RemoveSnapshot { which: Pick },
    Clone { of: Pick, name: Pick },
    Export { of: Pick },
    Import { backup: Pick, name: Pick },
    Remove { of: Pick },
}

/// The operations that are more frequent in a sequence.
#[derive(Clone, Copy, Debug)]
pub enum Emphasis {
    /// Snapshots and restores, which make long chains.
    Histories,
    /// Clones and removals of boxes.
    Families,
}

fn pick() -> impl Strategy<Value = Pick> {
    any::<Pick>()
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let fill = prop_oneof![
        8 => (1u8..=255).prop_map(Fill::Byte),
        1 => Just(Fill::Byte(0)),
        1 => Just(Fill::ZeroCluster),
    ];
    // Prefer the start of the disk, so that layers overlap.
    let at = prop_oneof![1 => pick(), 2 => 0u16..64];
    let write = (at, 1u8..6, fill).prop_map(|(at, blocks, fill)| Write { at, blocks, fill });
    prop::collection::vec(write, 1..6)
}

fn tool() -> impl Strategy<Value = Tool> {
    prop_oneof![
        5 => Just(Tool::Cp),
        2 => Just(Tool::Cat),
        2 => Just(Tool::Rsync),
        1 => Just(Tool::Gio),
    ]
}

fn tree_tool() -> impl Strategy<Value = TreeTool> {
    prop_oneof![3 => Just(TreeTool::Cp), 1 => Just(TreeTool::Rsync)]
}

fn promotion() -> impl Strategy<Value = Promotion> {
    prop_oneof![
        3 => tool().prop_map(Promotion::Export),
        1 => Just(Promotion::Directory),
        3 => Just(Promotion::CopyDirectory),
        1 => Just(Promotion::Move),
    ]
}

fn refusal() -> impl Strategy<Value = Refusal> {
    let plain = prop::sample::select(vec![
        Refusal::SnapshotTaken,
        Refusal::BoxTaken,
        Refusal::DirectoryInBox,
        Refusal::FileInBox,
        Refusal::RmdirBox,
        Refusal::RmdirSnapshots,
        Refusal::RmdirNothing,
        Refusal::RenameBoxOntoBox { keep: false },
        Refusal::RenameBoxOntoBox { keep: true },
        Refusal::Exchange,
        Refusal::BoxIntoBox,
        Refusal::RenameSnapshotOntoSnapshot { keep: false },
        Refusal::RenameSnapshotOntoSnapshot { keep: true },
        Refusal::SnapshotToOtherBox,
        Refusal::SnapshotIntoRoot,
        Refusal::ImportTaken,
        Refusal::ImportGarbage,
        Refusal::ImportHalf,
        Refusal::RestoreGarbage,
        Refusal::RestoreHalf,
        Refusal::RestoreNothing,
        Refusal::RestoreItself,
        Refusal::WriteSnapshotExport,
        Refusal::AppendToExport,
        Refusal::CopyBoxIntoBox,
        Refusal::RemoveJsonAlone,
        Refusal::HardLink,
    ]);
    prop_oneof![
        26 => plain,
        1 => pick().prop_map(Refusal::SnapshotName),
        1 => pick().prop_map(Refusal::BoxName),
        1 => pick().prop_map(Refusal::RenameBoxName),
        1 => pick().prop_map(Refusal::RenameSnapshotName),
        1 => pick().prop_map(Refusal::ImportName),
    ]
}

fn by_boxlite() -> impl Strategy<Value = ByBoxLite> {
    prop_oneof![
        4 => (pick(), pick()).prop_map(|(of, name)| ByBoxLite::Snapshot { of, name }),
        3 => pick().prop_map(|which| ByBoxLite::RestoreSnapshot { which }),
        2 => pick().prop_map(|which| ByBoxLite::RemoveSnapshot { which }),
        2 => (pick(), pick()).prop_map(|(of, name)| ByBoxLite::Clone { of, name }),
        1 => pick().prop_map(|of| ByBoxLite::Export { of }),
        1 => (pick(), pick()).prop_map(|(backup, name)| ByBoxLite::Import { backup, name }),
        1 => pick().prop_map(|of| ByBoxLite::Remove { of }),
    ]
}

fn operation(emphasis: Emphasis) -> impl Strategy<Value = Operation> {
    let (histories, families) = match emphasis {
        Emphasis::Histories => (2, 1),
        Emphasis::Families => (1, 2),
    };
    let session = (prop::collection::vec(by_boxlite(), 3..9), any::<bool>());
    prop_oneof![
        8 => (pick(), writes()).prop_map(|(of, writes)| Operation::Guest { of, writes }),
        4 * histories => (pick(), pick()).prop_map(|(of, name)| Operation::Snapshot { of, name }),
        2 * histories => (pick(), prop_oneof![Just(Removal::Rmdir), Just(Removal::Rm)])
            .prop_map(|(which, by)| Operation::RemoveSnapshot { which, by }),
        2 => (pick(), pick()).prop_map(|(which, name)| Operation::RenameSnapshot { which, name }),
        2 => (pick(), pick()).prop_map(|(of, name)| Operation::RenameBox { of, name }),
        families => pick().prop_map(|of| Operation::RemoveBox { of }),
        2 * families => (pick(), pick(), tree_tool())
            .prop_map(|(of, name, by)| Operation::Clone { of, name, by }),
        2 * families => (pick(), pick(), promotion())
            .prop_map(|(state, name, by)| Operation::Promote { state, name, by }),
        3 * histories => (pick(), pick(), tool())
            .prop_map(|(of, state, by)| Operation::Restore { of, state, by }),
        2 => (pick(), pick(), tool())
            .prop_map(|(of, backup, by)| Operation::RestoreBackup { of, backup, by }),
        2 => (pick(), any::<bool>(), tool())
            .prop_map(|(state, zst, by)| Operation::Export { state, zst, by }),
        1 => (pick(), tree_tool()).prop_map(|(of, by)| Operation::BackUp { of, by }),
        2 * families => (pick(), pick(), tool(), any::<bool>()).prop_map(
            |(backup, name, by, into_directory)| Operation::Import {
                backup, name, by, into_directory,
            }
        ),
        5 => (pick(), pick(), refusal())
            .prop_map(|(of, other, what)| Operation::Refused { of, other, what }),
        1 => pick().prop_map(|of| Operation::Running { of }),
        2 => pick().prop_map(|state| Operation::Reader { state }),
        2 => (any::<bool>(), prop::option::weighted(0.4, pick()))
            .prop_map(|(at_rest, killed_at)| Operation::Compact { at_rest, killed_at }),
        3 => (pick(), pick()).prop_map(|(which, name)| Operation::HaveBack { which, name }),
        1 => pick().prop_map(|which| Operation::EndKeeping { which }),
        1 => Just(Operation::Remount),
        2 => session.prop_map(|(does, try_meanwhile)| Operation::BoxLite { does, try_meanwhile }),
    ]
}

/// A sequence that proptest shortens when it fails. It leaves out halves first, then smaller parts,
/// single operations last. It does not simplify operations, because each attempt takes seconds.
pub struct Sequence {
    operations: Vec<Operation>,
    /// The index of the last operation that ran. Later ones cannot have caused the failure.
    reached: Rc<Cell<usize>>,
    /// How many operations to leave out at once, and where next.
    length: usize,
    at: usize,
    left_out: Vec<Operation>,
    begun: bool,
}

impl Sequence {
    /// Makes a random sequence.
    pub fn of(emphasis: Emphasis, runner: &mut TestRunner, reached: Rc<Cell<usize>>) -> Sequence {
        let operations = prop::collection::vec(operation(emphasis), 80..=100)
            .new_tree(runner)
            .expect("no strategy here refuses a value")
            .current();
        Sequence {
            operations,
            reached,
            length: 0,
            at: 0,
            left_out: Vec::new(),
            begun: false,
        }
    }

    fn leave_out(&mut self) -> bool {
        while self.length > 0 {
            if self.at < self.operations.len() {
                let end = (self.at + self.length).min(self.operations.len());
                self.left_out = self.operations.drain(self.at..end).collect();
                return true;
            }
            self.length /= 2;
            self.at = 0;
        }
        false
    }
}

impl ValueTree for Sequence {
    type Value = Vec<Operation>;

    fn current(&self) -> Vec<Operation> {
        self.operations.clone()
    }

    fn simplify(&mut self) -> bool {
        self.left_out.clear();
        self.operations.truncate(self.reached.get() + 1);
        if !self.begun {
            self.begun = true;
            self.length = self.operations.len() / 2;
        }
        self.leave_out()
    }

    fn complicate(&mut self) -> bool {
        let restored = self.left_out.len();
        let at = self.at.min(self.operations.len());
        self.operations.splice(at..at, self.left_out.drain(..));
        self.at += restored;
        restored > 0 && self.leave_out()
    }
}
