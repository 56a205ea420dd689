//! `cp web/snapshots/NAME/export.boxlite web/export.boxlite`: the live disk becomes another state, one
//! that is kept in the home or one that arrived as an archive.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use super::crash::crash_point;
use super::freeze::open_disk;
use super::layers::{ImageFile, Layers};
use super::prepare::Prepared;
use super::{Arrival, Contents, Source, Store, display_name, durable};
use crate::disk::FileId;
use crate::home::BaseRecord;
use crate::{Error, Result};

impl Store {
    /// Makes the live disk of a box a copy-on-write copy of `source`: no data moves, whatever its size,
    /// and snapshots stay, also later ones. `read` is what was read of the source.
    ///
    /// # Errors
    /// EBUSY, ENODATA for a box that has no disk, EIO when the source is not as it was read.
    pub fn restore(&self, box_id: &str, source: &Source, read: &Contents) -> Result<()> {
        let what = format!(
            "restore of box {} from {}",
            self.name_of(box_id),
            self.describe(source)
        );
        let result = self.restore_state(box_id, source, read);
        self.events.log_outcome(&what, result)
    }

    /// Order: freeze the source (or adopt the snapshot's layer), an overlay on it in the workspace, the
    /// references, the overlay over the live name. A crash before the last step leaves surplus
    /// references, which recovery drops.
    fn restore_state(&self, box_id: &str, source: &Source, read: &Contents) -> Result<()> {
        let is_itself = matches!(source, Source::Live { box_id: other } if other == box_id);
        if is_itself {
            return self.refuse_changed(source, read);
        }
        let draft = self.draft_of(source, read, &|| self.draft_clone(source))?;
        let mut prepared = self.prepare_beside(box_id)?;
        let live = prepared.replaceable()?;
        let (file, old) = open_disk(&live)?;
        let target = prepared.record.clone();
        if source.box_id() != box_id {
            prepared.turn_to_source(source.box_id())?;
        }
        self.refuse_changed(source, read)?;
        let frozen = prepared.frozen(source, &draft)?;
        crash_point("restore.frozen");
        prepared.record = target;
        prepared.refuse_other_size(&live, frozen.virtual_size)?;
        let overlay = self.scratch("overlay")?;
        prepared.make_overlay(&frozen, &overlay)?;
        let bases = prepared.bases_reached(&overlay)?;
        prepared.change.transaction(|rows| {
            bases
                .iter()
                .try_for_each(|base| rows.insert_ref(base, box_id))
        })?;
        crash_point("restore.referred");
        prepared.replace_live(&overlay, &live, old)?;
        drop(file);
        crash_point("restore.replaced");
        prepared.live_was_replaced();
        Ok(())
    }

    /// Makes the disk of a complete archive the live disk of a box; the box's identity, name and
    /// configuration stay.
    ///
    /// # Errors
    /// EBADMSG when it is not complete, EBUSY, ENODATA for a box that has no disk.
    pub fn restore_archive(&self, box_id: &str, arrival: &Arrival) -> Result<()> {
        let result = self.restore_arrived(box_id, arrival);
        self.events.log_outcome(
            &format!("restore of box {} from an archive", self.name_of(box_id)),
            result,
        )
    }

    /// Order: the disk was unpacked and checked in the workspace; it is moved over the live name. A
    /// crash leaves the one or the other, and surplus references, which recovery drops.
    fn restore_arrived(&self, box_id: &str, arrival: &Arrival) -> Result<()> {
        if !arrival.is_complete() {
            return Err(Error::bad_archive("the archive is incomplete"));
        }
        self.home.give_to_owner(arrival.disk())?;
        durable::sync_file(arrival.disk())?;
        let mut prepared = self.prepare_beside(box_id)?;
        let live = prepared.replaceable()?;
        let (file, old) = open_disk(&live)?;
        prepared.refuse_other_size(&live, arrival.virtual_size())?;
        crash_point("restore.arrived");
        prepared.replace_live(arrival.disk(), &live, old)?;
        drop(file);
        crash_point("restore.replaced");
        prepared.live_was_replaced();
        Ok(())
    }

    /// EIO when a disk state is not what was read of it: what was copied would not be what is made.
    pub(super) fn refuse_changed(&self, source: &Source, read: &Contents) -> Result<()> {
        let is_copied = || self.running_export(source, read).is_some();
        if is_copied() || self.contents_now(source)? == Some(*read) {
            return Ok(());
        }
        Err(Error::new(
            libc::EIO,
            format!(
                "{} changed while it was copied; copy it again",
                self.describe(source)
            ),
        ))
    }
}

impl Prepared<'_> {
    /// The live disk that another is to take the place of. EPERM where something reads from it: that
    /// would become another disk, too.
    fn replaceable(&self) -> Result<PathBuf> {
        let name = display_name(&self.record);
        let live = self.live().ok_or_else(|| {
            Error::new(
                libc::ENODATA,
                format!(
                    "box {name} has no disk yet; start it once with BoxLite, or import under a new name"
                ),
            )
        })?;
        if let Some(reader) = self.layers()?.readers_of(&live).next() {
            return Err(Error::new(
                libc::EPERM,
                format!(
                    "{} reads from the disk of box {name}, and would change with it; export what still reads right and import it again",
                    reader.path.display()
                ),
            ));
        }
        Ok(live)
    }

    /// What is to be tidied up after the live disk became another; none of it takes that back.
    fn live_was_replaced(&mut self) {
        let rootfs = self.store.home.guest_rootfs(&self.record.id);
        let tidied = durable::unlink(&rootfs).and_then(|()| self.free_surplus());
        if let Err(error) = tidied {
            let name = display_name(&self.record);
            let message = format!("box {name} was restored, but {error}");
            self.store.events.info(&message);
        }
    }

    /// Drops what references of the box nothing in it needs any more, and frees the bases that nobody
    /// needs now; also BoxLite's, which goes by references and would keep them for ever.
    /// Beside a runtime that waits: BoxLite's next step may need what nothing needs now.
    pub(super) fn free_surplus(&mut self) -> Result<()> {
        if self.change.is_shared() {
            return Ok(());
        }
        let surplus = self.drop_surplus_refs(&self.layers()?)?;
        let may_go = |row: &BaseRecord| row.is_ours() || surplus.iter().any(|it| it.id == row.id);
        self.store.free_bases(&mut self.change, &may_go)
    }

    /// Drops all references of the box that nothing in it needs any more. Returns the bases.
    pub(super) fn drop_surplus_refs(&mut self, layers: &Layers) -> Result<Vec<BaseRecord>> {
        let referred = self.change.bases_of(&self.record.id)?;
        let surplus = self.surplus_refs(layers, referred)?;
        self.drop_refs(&surplus)?;
        Ok(surplus)
    }

    /// Drops surplus references that a crash left, as far as they would keep BoxLite from removing
    /// another box. Those to what BoxLite made of this one are how it frees that. Returns the bases.
    /// `thorough`: those, too.
    pub(super) fn drop_leftover_refs(
        &mut self,
        layers: &Layers,
        referred: Vec<BaseRecord>,
        thorough: bool,
    ) -> Result<Vec<BaseRecord>> {
        let mut surplus = self.surplus_refs(layers, referred)?;
        surplus.retain(|row| thorough || row.source_box_id != self.record.id);
        self.drop_refs(&surplus)?;
        Ok(surplus)
    }

    fn drop_refs(&mut self, surplus: &[BaseRecord]) -> Result<()> {
        if surplus.is_empty() {
            return Ok(());
        }
        let box_id = self.record.id.clone();
        self.change.transaction(|rows| {
            surplus
                .iter()
                .try_for_each(|row| rows.delete_ref(&row.id, &box_id))
        })
    }

    /// The bases that the box refers to (`referred`), and that none of its files reads from any more or is another name
    /// of: a snapshot of a clone that did not change is one of BoxLite's base, which frees that with the
    /// last reference only. None while what the box reads from can't be told for certain.
    fn surplus_refs(&self, layers: &Layers, referred: Vec<BaseRecord>) -> Result<Vec<BaseRecord>> {
        if referred.is_empty() || self.live().is_none() {
            return Ok(Vec::new());
        }
        let mut tops: Vec<PathBuf> = Vec::new();
        for snapshot in self.snapshots()? {
            tops.push(self.store.snapshot_layer(&snapshot));
        }
        if layers.damaged().is_some() || tops.iter().any(|top| layers.at(top).is_none()) {
            return Ok(Vec::new());
        }
        let own = layers.of_box(&self.record.id);
        tops.extend(own.map(|file| file.path.clone()));
        let reached: BTreeSet<&Path> = tops.iter().flat_map(|top| layers.chain(top)).collect();
        let named = tops.iter().filter_map(|top| layers.at(top));
        let named: HashSet<FileId> = named.map(|file| file.id).collect();
        let is_needed = |path: &Path| {
            let is_named = |file: &ImageFile| named.contains(&file.id);
            reached.contains(path) || layers.at(path).is_some_and(is_named)
        };
        let mut surplus = referred;
        // A cache of images is read through files that are none of the layers.
        surplus.retain(|row| {
            row.kind != "rootfs"
                && self
                    .store
                    .path_of_base(row)
                    .is_ok_and(|path| !is_needed(&path))
        });
        Ok(surplus)
    }
}
