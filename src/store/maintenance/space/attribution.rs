//! Attributes the space of each file of a home to its owner.

use std::collections::HashMap;
use std::path::Path;

use crate::disk::FileId;
use crate::store::layers::graph::{LayerGraph, Role};
use crate::store::maintenance::usage::State;

/// A part of a home's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// One box and its snapshots.
    Boxes,
    /// Layers that several boxes read.
    Shared,
    /// What only entries need that can be had back.
    Undo,
    /// Layers that no box, snapshot or entry reads.
    Unread,
    /// BoxLite's images, and what it caches of them.
    Images,
    /// Data of anonymous volumes.
    Volumes,
    /// BoxLite's database.
    Database,
    /// Caches, spare names and unfinished work of boxlitefs.
    Caches,
    /// Everything else.
    Other,
}

impl Owner {
    /// All of them, in the order they are shown.
    pub const ALL: [Owner; 9] = [
        Owner::Boxes,
        Owner::Shared,
        Owner::Undo,
        Owner::Unread,
        Owner::Images,
        Owner::Volumes,
        Owner::Database,
        Owner::Caches,
        Owner::Other,
    ];

    /// Returns its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Owner::Boxes => "boxes",
            Owner::Shared => "shared",
            Owner::Undo => "undo",
            Owner::Unread => "unread",
            Owner::Images => "images",
            Owner::Volumes => "volumes",
            Owner::Database => "database",
            Owner::Caches => "caches",
            Owner::Other => "other",
        }
    }

    /// Returns the owner of a file that is not a layer, by its path in the home.
    pub(super) fn by_place(inside: &Path) -> Owner {
        let mut names = inside.iter().filter_map(|name| name.to_str());
        let (first, second) = (names.next(), names.next());
        let is_image = inside.extension().is_some_and(|it| it == "ext4");
        match (first, second) {
            (Some("bases"), Some(_)) if is_image => Owner::Images,
            (Some("images"), _) => Owner::Images,
            (Some("volumes"), _) => Owner::Volumes,
            (Some("db"), Some(name)) if name.starts_with("boxlitefs.db") => Owner::Caches,
            (Some("db"), _) => Owner::Database,
            (Some(".boxlitefs"), Some("undo")) => Owner::Undo,
            (Some(".boxlitefs"), _) => Owner::Caches,
            _ => Owner::Other,
        }
    }
}

/// The owner of each layer.
pub(super) struct Attribution {
    layers: HashMap<FileId, Owner>,
}

impl Attribution {
    /// Attributes each layer to its owner, by the states of all boxes.
    pub fn of(layers: &LayerGraph, states: &[State]) -> Attribution {
        // File → the only box that reads it; None for several.
        let mut readers: HashMap<FileId, Option<&str>> = HashMap::new();
        for (source, files) in states {
            let box_id = source.box_id();
            for id in files.keys() {
                let reader = readers.entry(*id).or_insert(Some(box_id));
                if *reader != Some(box_id) {
                    *reader = None;
                }
            }
        }
        let mut owners: HashMap<FileId, Owner> = HashMap::new();
        for file in layers.files() {
            if matches!(file.role, Role::Kept { .. }) {
                let chain = layers.chain(&file.path).into_iter();
                let below = chain.filter_map(|path| layers.at(path));
                owners.extend(below.map(|file| (file.id, Owner::Undo)));
            }
        }
        for file in layers.files() {
            owners.entry(file.id).or_insert(Owner::Unread);
        }
        for (id, reader) in readers {
            owners.insert(id, reader.map_or(Owner::Shared, |_| Owner::Boxes));
        }
        Attribution { layers: owners }
    }

    /// Returns the owner of a layer; None for a file that is not a layer.
    pub fn of_layer(&self, id: FileId) -> Option<Owner> {
        self.layers.get(&id).copied()
    }
}
