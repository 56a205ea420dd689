//! What changes names: create, rename, remove.

pub(super) mod checks;
pub(super) mod create;
pub(super) mod make;
pub(super) mod overwrite;
pub(super) mod remove;
pub(super) mod rename;

use std::sync::Arc;

use crate::store::Store;
use crate::tree::nodes::kernel_view::KernelView;
use crate::tree::reading::caller_view::CallerView;
use crate::tree::staging::box_edit::BoxEdits;
use crate::tree::staging::caller_history::CallerHistory;
use crate::tree::staging::commit::Committer;
use crate::tree::staging::staging_area::StagingArea;

use checks::Checks;
use create::Creator;
use make::Maker;
use overwrite::Overwriter;
use remove::Remover;
use rename::Renamer;

/// What changes names.
pub struct Changes {
    /// Makes directories and links.
    pub maker: Maker,
    /// Creates files.
    pub creator: Creator,
    /// Begins to write over exports.
    pub overwriter: Arc<Overwriter>,
    /// Renames.
    pub renamer: Renamer,
    /// Removes.
    pub remover: Remover,
}

impl Changes {
    /// Returns the changes of what callers see of a home.
    pub fn new(
        kernel: &Arc<KernelView>,
        view: &Arc<CallerView>,
        (staging, history): (&Arc<StagingArea>, &Arc<CallerHistory>),
        committer: &Arc<Committer>,
        edits: &Arc<BoxEdits>,
    ) -> Changes {
        let store: &Arc<Store> = &view.home.store;
        let boxes = &view.home.boxes;
        let checks = Arc::new(Checks::new(
            store.clone(),
            boxes.clone(),
            staging.clone(),
            history.clone(),
        ));
        let overwriter = Arc::new(Overwriter::new(
            store.clone(),
            staging.clone(),
            checks.clone(),
            edits.clone(),
        ));
        Changes {
            maker: Maker::new(
                store.clone(),
                staging.clone(),
                history.clone(),
                checks.clone(),
            ),
            creator: Creator::new(
                boxes.clone(),
                staging.clone(),
                checks.clone(),
                overwriter.clone(),
            ),
            overwriter,
            renamer: Renamer::new(
                store.clone(),
                view.clone(),
                staging.clone(),
                checks,
                committer.clone(),
            ),
            remover: Remover::new(
                store.clone(),
                kernel.clone(),
                view.clone(),
                staging.clone(),
                history.clone(),
            ),
        }
    }
}
