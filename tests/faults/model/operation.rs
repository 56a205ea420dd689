//! What can be done to a home, and random sequences of it.
//!
//! An operation names what it is about by a number, taken modulo what is there when its turn comes: so
//! any part of a sequence is a sequence, and a failing one can be made shorter.

use std::cell::Cell;
use std::rc::Rc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

/// Which of those that are there.
pub type Pick = u16;

/// A guest's writes: where, how many blocks, what.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub at: Pick,
    pub blocks: u8,
    pub fill: Fill,
}

/// What a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fill {
    /// Bytes, zeros too.
    Byte(u8),
    /// A whole cluster that is zero and not in the backing file: a guest that trims or zeroes.
    ZeroCluster,
}

/// A program that copies one file.
#[derive(Clone, Copy, Debug)]
pub enum Tool {
    /// Asks for copy_file_range.
    Cp,
    /// The shell's redirection, which truncates first.
    Cat,
    /// Reads and writes, under a temporary name.
    Rsync,
    /// A file manager's, likewise.
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
    /// Its export, to NEW.boxlite.
    Export(Tool),
    /// Its export, into a directory made before.
    Directory,
    /// `cp -r` of the snapshot's directory.
    CopyDirectory,
    /// `mv` of it, which copies and removes.
    Move,
}

/// How a directory is copied.
#[derive(Clone, Copy, Debug)]
pub enum TreeTool {
    Cp,
    Rsync,
}

/// What has to be refused, with what is documented, and without any change.
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

/// One thing done to the home.
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
    /// An export of the mount over one of a box.
    Restore { of: Pick, state: Pick, by: Tool },
    /// A backup over the export of a box.
    RestoreBackup { of: Pick, backup: Pick, by: Tool },
    /// An export becomes a backup.
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
    /// Something that is refused.
    Refused {
        of: Pick,
        other: Pick,
        what: Refusal,
    },
    /// Everything is refused while the box runs.
    Running { of: Pick },
    /// Somebody opens an export, and reads on after what comes next.
    Reader { state: Pick },
    /// `boxlitefs compact`, beside the mount: with all readers at their end, or not; killed, or not.
    Compact {
        at_rest: bool,
        killed_at: Option<Pick>,
    },
    /// Unmounts and mounts.
    Remount,
    /// BoxLite starts, does this, and ends.
    BoxLite {
        does: Vec<ByBoxLite>,
        try_meanwhile: bool,
    },
}

/// One thing done by BoxLite.
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

/// What a sequence has more of.
#[derive(Clone, Copy, Debug)]
pub enum Emphasis {
    /// Snapshots, restores: long chains.
    Histories,
    /// Boxes made of boxes, and removed.
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
    // Near the start, too, so that layers overlap.
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
        1 => Just(Operation::Remount),
        2 => session.prop_map(|(does, try_meanwhile)| Operation::BoxLite { does, try_meanwhile }),
    ]
}

/// A sequence that, where it fails, is made shorter by leaving out parts: halves first, then smaller
/// ones, single operations last. Nothing else of it is made simpler, for each try takes seconds.
pub struct Sequence {
    operations: Vec<Operation>,
    /// The operation that the last run came to: what follows it has no part in a failure.
    reached: Rc<Cell<usize>>,
    /// How much is left out at once, and where next.
    length: usize,
    at: usize,
    left_out: Vec<Operation>,
    begun: bool,
}

impl Sequence {
    /// A random one.
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
