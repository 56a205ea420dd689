//! What changes names: create, rename, remove.

pub(super) mod create;
pub(super) mod remove;
pub(super) mod rename;
