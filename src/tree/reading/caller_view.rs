//! What a caller sees: what exists, what is being copied in, and without what the caller removed.

use std::sync::Arc;

use crate::home::Owner;
use crate::process::Caller;
use crate::store;
use crate::tree::nodes::attr::{Attr, DirEntry, Kept};
use crate::tree::nodes::names::not_there;
use crate::tree::nodes::node::Node;
use crate::tree::reading::home_view::HomeView;
use crate::tree::staging::caller_history::{BoxNow, CallerHistory};
use crate::tree::staging::program::Program;
use crate::tree::staging::staging_area::StagingArea;
use crate::{Error, Result};

/// The files of a home as each caller sees them.
pub struct CallerView {
    /// The files as they are without what is being copied in.
    pub home: HomeView,
    staging: Arc<StagingArea>,
    history: Arc<CallerHistory>,
}

impl CallerView {
    /// Returns the view of a home with what is being copied in, and without what was removed.
    pub fn new(
        home: HomeView,
        staging: Arc<StagingArea>,
        history: Arc<CallerHistory>,
    ) -> CallerView {
        CallerView {
            home,
            staging,
            history,
        }
    }

    fn owner(&self) -> Owner {
        self.home.store.home().owner()
    }

    /// Returns what a name in a directory stands for.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home.
    pub fn child(&self, caller: Caller, parent: &Node, name: &str) -> Result<Node> {
        if let Some(aside) = self.staging.aside_child(parent, name) {
            return Ok(aside);
        }
        // A box that exists is seen in place of one of its name that is being made: BoxLite or
        // another mount was faster.
        let exists = *parent == Node::Root && self.is_box(caller, name)?;
        if !exists && let Some(answer) = self.staging.child(caller, parent, name) {
            return answer;
        }
        if self.history.has_removed(caller, parent, name)
            || self.staging.hide_for_exclusive_create(caller, parent, name)
            || self.staging.is_unlisted(caller, parent, name)
        {
            return Err(not_there());
        }
        self.home.child(parent, name).or_else(|error| {
            let arriving = self.staging.arriving_child(caller, parent, name);
            arriving
                .filter(|_| error.errno() == libc::ENOENT)
                .ok_or(error)
        })
    }

    /// Returns what a process that begins to read or to remove a box can see of it.
    pub fn see_box(&self, id: &str) -> BoxNow {
        let names = self.home.boxes.names().ok();
        let rows = names
            .iter()
            .flat_map(|names| names.catalog().snapshots_of(id));
        BoxNow {
            snapshots: rows.map(|row| (row.id.clone(), row.name.clone())).collect(),
            disk: store::see_disk(&self.home.store, id),
        }
    }

    /// Records that a process begins to read the export of a box, which it may remove afterwards.
    pub fn note_reading(&self, caller: Caller, id: &str) {
        if !caller.is_outside() {
            let copies = Program::of(caller).copies();
            self.history.read(caller, id, copies, || self.see_box(id));
        }
    }

    /// Returns whether there is a box of this name. Forgets an archive of the name that the caller
    /// wrote if the box that was made of it is gone, by whomever.
    fn is_box(&self, caller: Caller, name: &str) -> Result<bool> {
        let names = self.home.boxes.names()?;
        if let Some(id) = self.staging.loose.box_of(caller, name)
            && names.of_id(&id).is_none()
        {
            self.staging.loose.forget_box(&id);
        }
        Ok(names.id_of(name).is_some())
    }

    /// Returns attributes as staging has them.
    pub fn staged_attr(&self, caller: Caller, node: &Node) -> Option<Attr> {
        self.staging.attr(caller, self.owner(), node)
    }

    /// Returns attributes.
    ///
    /// # Errors
    /// ENOENT, and those of reading the home and of planning exports.
    pub fn attr(&self, caller: Caller, node: &Node) -> Result<Attr> {
        let aside = self.staging.aside_attr(self.owner(), node);
        if let Some(attr) = aside.or_else(|| self.staged_attr(caller, node)) {
            return Ok(attr);
        }
        let mut attr = self.home.attr(node)?;
        if let Node::Root = node {
            let staged = u32::try_from(self.staging.boxes.len()).unwrap_or(u32::MAX);
            attr.nlink = attr.nlink.saturating_add(staged);
        }
        // The kernel keeps one answer for all processes: none while callers see different ones.
        if self.differs_by_caller(node) {
            attr.kept = Kept::Not;
        }
        Ok(attr)
    }

    /// Returns whether a process that makes a box, or removes it, sees something else than all
    /// others.
    fn differs_by_caller(&self, node: &Node) -> bool {
        node.box_id()
            .is_some_and(|id| self.staging.boxes.contains(id) || self.history.has_entries_for(id))
    }

    /// Returns every name in a directory, in the order it is listed.
    ///
    /// # Errors
    /// ENOENT, ENOTDIR, and those of reading the home.
    pub fn list(&self, caller: Caller, node: &Node) -> Result<Vec<DirEntry>> {
        if let Node::Made(_) = node {
            return self.staging.list_aside(node);
        }
        self.staging.was_listed(caller, node);
        let mut entries = self.list_all(caller, node)?;
        self.staging.complete_listing(node, &mut entries);
        Ok(entries)
    }

    fn list_all(&self, caller: Caller, node: &Node) -> Result<Vec<DirEntry>> {
        if let Node::Guest(directory) = node {
            return self.home.guests.list_partitions(directory);
        }
        if let Some(entries) = self.staging.list(caller, node) {
            return Ok(entries);
        }
        let mut children = self.home.list(node)?;
        if let Node::Snapshots(id) = node {
            children.extend(self.staging.arriving_in(id));
        }
        let mut entries: Vec<DirEntry> = children
            .into_iter()
            .filter(|(name, ..)| !self.history.has_removed(caller, node, name))
            .map(|(name, node, kind)| DirEntry {
                ino: node.ino(),
                name: name.into(),
                kind,
            })
            .collect();
        if *node == Node::Root {
            let names = self.home.boxes.names()?;
            let mut staged = self.staging.list_root();
            staged.retain(|entry| {
                let name = entry.name.to_str();
                name.is_none_or(|name| names.id_of(name).is_none())
            });
            entries.extend(staged);
        }
        Ok(entries)
    }

    /// Returns where a symbolic link points.
    ///
    /// # Errors
    /// EINVAL for what is no link, ENOENT, and those of reading the home.
    pub fn link_target(&self, caller: Caller, node: &Node) -> Result<std::path::PathBuf> {
        match node {
            Node::Link(derived, source) => self.home.boxes.link_target(*derived, source),
            Node::Guest(file) => self.home.guests.link(file),
            _ => self
                .staging
                .link_target(caller, node)
                .ok_or_else(|| Error::new(libc::EINVAL, "that is not a symbolic link")),
        }
    }
}
