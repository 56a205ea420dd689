//! The names that boxes are shown by.

use std::collections::HashMap;
use std::sync::Arc;

use crate::home::{BoxRecord, Catalog, ChangedBox};
use crate::tree::nodes::names::encode;

/// If more boxes than this have changed, all names are worked out anew.
const FEW: usize = 64;

/// Ids by names, names by ids, and both in the order of names.
type Names = (
    HashMap<Arc<str>, Arc<str>>,
    HashMap<Arc<str>, Arc<str>>,
    Vec<(Arc<str>, Arc<str>)>,
);

/// The names of all boxes at one moment.
pub struct BoxNames {
    catalog: Arc<Catalog>,
    by_name: HashMap<Arc<str>, Arc<str>>,
    by_id: HashMap<Arc<str>, Arc<str>>,
    /// In the order of names.
    shown: Vec<(Arc<str>, Arc<str>)>,
    /// Every box is shown by its own name.
    are_own: bool,
}

impl BoxNames {
    /// Gives each box the name that it is shown by: its own, or its id where its own is impossible
    /// or taken.
    pub fn of(catalog: Arc<Catalog>) -> BoxNames {
        let mut by_name = HashMap::<Arc<str>, Arc<str>>::new();
        let mut shown = Vec::new();
        let mut are_own = true;
        let (unnamed, named): (Vec<&BoxRecord>, Vec<&BoxRecord>) = catalog
            .boxes()
            .partition(|record| record.name.as_deref().and_then(encode).is_none());
        // Ids first: a box without a usable name can be shown by nothing else.
        for record in unnamed.into_iter().chain(named) {
            let wanted = record.name.as_deref().and_then(encode);
            let id: Arc<str> = record.id.as_str().into();
            let name = match wanted {
                Some(name) if !by_name.contains_key(name.as_str()) => name.into(),
                _ => {
                    are_own = false;
                    id.clone()
                }
            };
            by_name.insert(name.clone(), id.clone());
            shown.push((name, id));
        }
        shown.sort();
        let by_id = shown.iter().map(|(name, id)| (id.clone(), name.clone()));
        BoxNames {
            catalog,
            by_id: by_id.collect(),
            by_name,
            shown,
            are_own,
        }
    }

    /// Returns the names after something was recorded: `catalog` has the rows now.
    pub fn after(&self, catalog: Arc<Catalog>) -> BoxNames {
        let changes = catalog.changes_since(&self.catalog);
        let few = Some(changes).filter(|changes| changes.len() <= FEW);
        match few.and_then(|changes| self.with(&changes)) {
            Some((by_name, by_id, shown)) => BoxNames {
                catalog,
                by_name,
                by_id,
                shown,
                are_own: true,
            },
            None => BoxNames::of(catalog),
        }
    }

    /// Returns the names with those of some boxes changed. None if a box could not be shown by its
    /// own name, before or now: then the names of other boxes may be others, too.
    fn with(&self, changes: &[ChangedBox<'_>]) -> Option<Names> {
        self.are_own.then_some(())?;
        let (mut by_name, mut by_id) = (self.by_name.clone(), self.by_id.clone());
        let mut shown = self.shown.clone();
        for record in changes.iter().filter_map(|(was, _)| *was) {
            let name = by_id.remove(record.id.as_str())?;
            by_name.remove(&name)?;
            let at = shown.binary_search_by(|(other, _)| other.cmp(&name)).ok()?;
            shown.remove(at);
        }
        for record in changes.iter().filter_map(|(_, is)| *is) {
            let name: Arc<str> = encode(record.name.as_deref()?)?.into();
            let id: Arc<str> = record.id.as_str().into();
            let at = shown
                .binary_search_by(|(other, _)| other.cmp(&name))
                .err()?;
            shown.insert(at, (name.clone(), id.clone()));
            by_name.insert(name.clone(), id.clone());
            by_id.insert(id, name);
        }
        Some((by_name, by_id, shown))
    }

    /// Returns the ids of the boxes of `before` that may have been renamed or removed since, or whose
    /// snapshots may.
    pub fn changed_since(&self, before: &BoxNames) -> Vec<String> {
        if self.are_own && before.are_own {
            let changes = self.catalog.changes_since(&before.catalog).into_iter();
            let known = changes.filter_map(|(was, _)| was);
            return known.map(|record| record.id.clone()).collect();
        }
        before.shown.iter().map(|(_, id)| id.to_string()).collect()
    }

    /// Returns the rows that the names are of.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Returns the id of the box that is shown by this name.
    pub fn id_of(&self, shown: &str) -> Option<&str> {
        self.by_name.get(shown).map(AsRef::as_ref)
    }

    /// Returns the name that a box is shown by.
    pub fn of_id(&self, id: &str) -> Option<&str> {
        self.by_id.get(id).map(AsRef::as_ref)
    }

    /// Returns the shown name and the id of every box, in the order of names.
    pub fn all(&self) -> &[(Arc<str>, Arc<str>)] {
        &self.shown
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Ids of boxes, and names for them: some can't be shown, some are ids.
    const IDS: [&str; 5] = ["a", "b", "c", "d", "e"];
    const NAMES: [&str; 8] = ["one", "two", "three", "a", "e", "", ".hidden", "x/y"];

    proptest! {
        #[test]
        fn names_after_changes_are_those_of_all_rows(
            changes in prop::collection::vec((0..IDS.len(), prop::option::of(0..NAMES.len())), 1..40)
        ) {
            let mut catalog = Catalog::empty();
            let mut names = BoxNames::of(Arc::new(catalog.clone()));
            for (id, name) in changes {
                let name = name.and_then(|name| NAMES.get(name).copied());
                let is_free = catalog.boxes().all(|it| it.id == IDS[id] || it.name.as_deref() != name);
                if !is_free {
                    continue;
                }
                catalog.set_name(IDS[id], id as i64, name);
                let all = BoxNames::of(Arc::new(catalog.clone()));
                let after = names.after(all.catalog().clone());
                prop_assert_eq!(&after.shown, &all.shown);
                prop_assert_eq!(&after.by_name, &all.by_name);
                prop_assert_eq!(&after.by_id, &all.by_id);
                prop_assert_eq!(after.are_own, all.are_own);
                names = after;
            }
        }
    }
}
