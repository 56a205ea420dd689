//! The part of the layer graph that a change of one box touches. Its cost depends on the box, not on
//! the home.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::home::{BaseRecord, Queries};
use crate::store::layers::graph::{LayerGraph, LayerScanner, Scan};

/// A scan that follows rows and headers from one box.
struct NearScan<'s> {
    scanner: &'s LayerScanner,
    rows: &'s Queries,
    scan: Scan,
    /// The boxes that are known, of which `next` are to be added.
    boxes: HashSet<String>,
    next: Vec<String>,
    bases: HashSet<PathBuf>,
    /// The number of files whose headers were followed.
    followed: usize,
}

impl LayerScanner {
    /// Scans the files that a change of this box touches:
    ///
    /// * its own, all bases below them, and the bases it refers to;
    /// * the bases that BoxLite made of it for clones, and the boxes that refer to those;
    /// * each box inside which one of these reads a layer, in the same way.
    ///
    /// These are all readers of the layers inside the box. Who else reads a base is not known from
    /// this, nor are all names of a layer that boxes share. If a scan of the whole home has found
    /// another reader of a layer inside the box, the whole home is scanned.
    ///
    /// # Errors
    /// Those of reading the directories and of SQLite.
    pub fn near(&self, rows: &Queries, box_id: &str) -> Result<LayerGraph> {
        if self.is_read_from_outside(box_id) == Some(true) {
            return self.scan();
        }
        let mut near = NearScan {
            scanner: self,
            rows,
            scan: self.begin(),
            boxes: HashSet::from([box_id.to_owned()]),
            next: vec![box_id.to_owned()],
            bases: HashSet::new(),
            followed: 0,
        };
        while let Some(box_id) = near.next.pop() {
            near.add_box(&box_id)?;
        }
        Ok(near.scan.into_graph())
    }
}

impl NearScan<'_> {
    fn add_box(&mut self, box_id: &str) -> Result<()> {
        self.scanner.add_box(box_id, &mut self.scan)?;
        for row in self.rows.bases_of(box_id)? {
            self.add_base_of(&row);
        }
        for row in self.rows.bases_from(box_id)? {
            self.add_base_of(&row);
            for other in self.rows.boxes_referring_to(&row.id)? {
                self.add_later(&other);
            }
        }
        self.follow_headers();
        Ok(())
    }

    fn add_base_of(&mut self, row: &BaseRecord) {
        if let Ok(path) = self.scanner.path_of_base(row) {
            self.add_base(&path);
        }
    }

    fn add_base(&mut self, path: &Path) {
        let is_base = path.parent() == Some(self.scanner.home.bases_dir().as_path());
        if is_base && self.bases.insert(path.to_owned()) {
            self.scanner.add_base(path, &mut self.scan);
        }
    }

    fn add_later(&mut self, box_id: &str) {
        if self.boxes.insert(box_id.to_owned()) {
            self.next.push(box_id.to_owned());
        }
    }

    /// Adds what the headers name that were not followed yet.
    fn follow_headers(&mut self) {
        while let Some(file) = self.scan.files().get(self.followed) {
            self.followed += 1;
            let Some(backing) = file.backing.clone() else {
                continue;
            };
            self.add_base(&backing);
            if let Some(other) = self.scanner.home.box_of(&backing) {
                let other = other.to_owned();
                self.add_later(&other);
            }
        }
    }
}
