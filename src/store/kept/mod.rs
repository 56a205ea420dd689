//! What was removed or restored over, and can be had back for a while: entries of
//! `.boxlitefs/undo`.
//!
//! Each disk of an entry is a hard link of a layer in `bases/` that has a row of ours. So everything
//! that frees or merges layers leaves it alone, as a layer with a further name. `docs/design/undo.md`
//! has the order of each step.
//!
//! * `entries`: the files of entries, and what recovery does with them.
//! * `keep`: makes entries.
//! * `expire`: drops entries.

pub(super) mod entries;
pub(super) mod expire;
pub(super) mod keep;
