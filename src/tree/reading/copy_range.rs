//! Copies within the mount, by which no byte moves.

use crate::store::Store;
use crate::tree::reading::open_files::Handle;
use crate::tree::staging::role::FileRole;
use crate::tree::staging::staged_file::StagedContent;
use crate::{Error, Result};

/// Most bytes one copy may report: the reply has 32 bits, and this is a multiple of a page.
const MOST_COPIED: u64 = 0x7fff_f000;

/// Copies a range from an open file to one being made without moving bytes: what is copied says
/// what is meant. Returns how many bytes were copied.
///
/// # Errors
/// EOPNOTSUPP where a tool should read and write instead.
pub fn copy_range(
    store: &Store,
    (from, from_offset): (&Handle, u64),
    (to, to_offset): (&Handle, u64),
    length: u64,
) -> Result<u32> {
    let unfit = || {
        Error::new(
            libc::EOPNOTSUPP,
            "this range can't be shared; read it and write it",
        )
    };
    let Handle::Writing(file) = to else {
        return Err(unfit());
    };
    let mut state = file.state();
    state.refused()?;
    if file.is_committed() || file.is_edit() || from_offset != to_offset {
        return Err(unfit());
    }
    let length = length.min(MOST_COPIED);
    let copied = match from {
        Handle::Export {
            source,
            export,
            contents,
            ..
        } => state
            .share((source, export, contents), from_offset, length)
            .ok_or_else(unfit)?,
        Handle::Bytes { node, bytes }
            if state.role() == FileRole::Json && state.describes(node) =>
        {
            let source = node.source().ok_or_else(unfit)?;
            if !store.exports().disks.has_disk(&source) {
                // It is to be read: what it says is refused then.
                return Err(unfit());
            }
            state.content = StagedContent::JsonFromHome(source);
            length.min((bytes.len() as u64).saturating_sub(from_offset))
        }
        _ => return Err(unfit()),
    };
    file.reaches(to_offset.saturating_add(copied));
    u32::try_from(copied).map_err(|_| unfit())
}
