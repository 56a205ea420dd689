//! Directories in which rsync puts files aside. With `--delay-updates` it makes `.~tmp~` beside the files
//! that it brings, moves each there as soon as it is complete, and all of them to their places at its end.
//! Where it can't make that directory, it drops the file, says so and exits with 0.
//!
//! What is in it is kept with the files beside it, under the name `.~tmp~/NAME`, which no caller can give:
//! a temporary name like others.

use crate::tree::nodes::node::Node;
use crate::tree::staging::caller::Makers;

/// The name of such a directory (rsync's options.c: `tmp_partialdir`).
pub(in crate::tree) const ASIDE: &str = ".~tmp~";

/// What a file in it is called beside it.
pub(in crate::tree) const ASIDE_PREFIX: &str = ".~tmp~/";

/// A directory for files put aside.
pub(in crate::tree) struct AsideDirectory {
    /// Its name: `.~tmp~`, or that of rsync's `--partial-dir`.
    pub name: String,
    pub node: Node,
    /// The root, a box or a snapshot: where its files will be.
    pub dir: Node,
    pub makers: Makers,
}
