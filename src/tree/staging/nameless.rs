//! `cp /backup/web/export.boxlite MNT/`: an archive in the root that has the name of every export.
//! The box that it becomes is called by its manifest.

use crate::Result;
use crate::store::Store;
use crate::tree::nodes::boxes::Boxes;
use crate::tree::nodes::names::{EXPORT, archive_stem, encode};
use crate::tree::nodes::refusal::refuse;
use crate::tree::staging::staged_file::StagedContent;
use crate::tree::staging::staging_area::StagingArea;

/// Returns the name by which the box is shown that is made of such an archive, which is complete.
///
/// # Errors
/// EEXIST, and those of reading the home.
pub fn name_in_archive(
    (store, boxes, staging): (&Store, &Boxes, &StagingArea),
    content: &StagedContent,
) -> Result<String> {
    let name = match content {
        StagedContent::Archive(arrival) => arrival.manifest()?.box_name.clone(),
        StagedContent::FromHome { source, .. } => boxes.record(source.box_id())?.name,
        _ => None,
    };
    let shown = shown_name(name.as_deref());
    if boxes.names()?.id_of(&shown).is_some() || staging.boxes.id_of(&shown).is_some() {
        return Err(refuse(store, libc::EEXIST, taken_message(&shown)));
    }
    Ok(shown)
}

/// Returns the name by which a box of this name is shown; one without a name is called `export`.
pub fn shown_name(box_name: Option<&str>) -> String {
    let shown = box_name.and_then(encode);
    shown.unwrap_or_else(|| archive_stem(EXPORT).unwrap_or(EXPORT).to_owned())
}

fn taken_message(shown: &str) -> String {
    format!(
        "{EXPORT}: there is a box {shown} already, which is the name in its manifest; copy it to \
         NEW.boxlite for another name, or over {shown}/{EXPORT} to restore"
    )
}
