//! The right to change a home or a box: locks, checks that refuse a change, and recovery before it.

pub(super) mod beside_runtime;
pub(super) mod deletion_space;
pub(super) mod home_recovery;
pub(super) mod lock;
pub(super) mod locked_box;
pub(super) mod names;
pub(super) mod path_spelling;
pub(super) mod preflight;
pub(super) mod recovery;
pub(super) mod reserve;
pub(super) mod settled;
