//! The names that boxes are shown by.

use std::collections::HashMap;
use std::sync::Arc;

use crate::home::{BoxRecord, Catalog};
use crate::tree::nodes::names::encode;

/// The names of all boxes at one moment.
pub struct BoxNames {
    catalog: Arc<Catalog>,
    by_name: HashMap<String, String>,
    by_id: HashMap<String, String>,
    shown: Vec<(String, String)>,
}

impl BoxNames {
    /// Gives each box the name that it is shown by: its own, or its id where its own is impossible
    /// or taken.
    pub fn of(catalog: Arc<Catalog>) -> BoxNames {
        let mut by_name = HashMap::new();
        let mut shown = Vec::new();
        let (unnamed, named): (Vec<&BoxRecord>, Vec<&BoxRecord>) = catalog
            .boxes()
            .iter()
            .partition(|record| record.name.as_deref().and_then(encode).is_none());
        // Ids first: a box without a usable name can be shown by nothing else.
        for record in unnamed.into_iter().chain(named) {
            let wanted = record.name.as_deref().and_then(encode);
            let name = match wanted {
                Some(name) if !by_name.contains_key(&name) => name,
                _ => record.id.clone(),
            };
            by_name.insert(name.clone(), record.id.clone());
            shown.push((name, record.id.clone()));
        }
        shown.sort();
        let by_id = shown.iter().map(|(name, id)| (id.clone(), name.clone()));
        BoxNames {
            catalog,
            by_id: by_id.collect(),
            by_name,
            shown,
        }
    }

    /// Returns the rows that the names are of.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Returns the id of the box that is shown by this name.
    pub fn id_of(&self, shown: &str) -> Option<&str> {
        self.by_name.get(shown).map(String::as_str)
    }

    /// Returns the name that a box is shown by.
    pub fn of_id(&self, id: &str) -> Option<&str> {
        self.by_id.get(id).map(String::as_str)
    }

    /// Returns the shown name and the id of every box, in the order of names.
    pub fn all(&self) -> &[(String, String)] {
        &self.shown
    }
}
