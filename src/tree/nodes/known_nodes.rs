//! The inodes that the kernel knows: it may ask for each by number until it forgets it.

use std::collections::HashMap;
use std::sync::Arc;

use crate::tree::nodes::guest_numbers::GuestVolume;
use crate::tree::nodes::node::{GuestFile, Node, guest_number, next_number};

/// The nodes that the kernel knows, by their inode numbers.
#[derive(Default)]
pub struct KnownNodes {
    /// By inode number, each with how often the kernel was told.
    nodes: HashMap<u64, (Node, u64)>,
    /// Nodes whose own number was taken, with the number that they have instead.
    moved: HashMap<Node, u64>,
    /// The volumes that guests' files are of, by slot, each with how often the kernel was told. Of
    /// the files, of which there may be millions, nothing is kept: a number says which file it is.
    volumes: HashMap<u32, (Arc<GuestVolume>, u64)>,
}

impl KnownNodes {
    /// Returns the node that has a number.
    pub fn node(&self, ino: u64) -> Option<Node> {
        let Some((slot, inode)) = guest_number(ino) else {
            return self.nodes.get(&ino).map(|(node, _)| node.clone());
        };
        let (volume, _) = self.volumes.get(&slot)?;
        Some(Node::Guest(GuestFile {
            volume: volume.clone(),
            inode,
        }))
    }

    /// Returns the number that the kernel knows a node by, or would know it by.
    pub fn number(&self, node: &Node) -> u64 {
        self.moved.get(node).copied().unwrap_or_else(|| node.ino())
    }

    /// Records that the kernel is told of a node. Returns the number that the node has until the
    /// kernel forgets it.
    pub fn tell(&mut self, node: &Node) -> u64 {
        let ino = node.ino();
        if let Node::Guest(GuestFile { volume, .. }) = node {
            let entry = self.volumes.entry(volume.slot());
            entry.or_insert_with(|| (volume.clone(), 0)).1 += 1;
            return ino;
        }
        self.tell_as(node, ino)
    }

    /// Does the same for a node that wants this number.
    fn tell_as(&mut self, node: &Node, wanted: u64) -> u64 {
        let mut ino = self.moved.get(node).copied().unwrap_or(wanted);
        while self.nodes.get(&ino).is_some_and(|(other, _)| other != node) {
            ino = next_number(ino);
        }
        if ino != wanted {
            self.moved.insert(node.clone(), ino);
        }
        let entry = self.nodes.entry(ino);
        entry.or_insert_with(|| (node.clone(), 0)).1 += 1;
        ino
    }

    /// Records that the kernel forgets `times` of what it was told. Returns the node if the kernel
    /// does not know it any more; for guests' files, None.
    pub fn forget(&mut self, ino: u64, times: u64) -> Option<Node> {
        if let Some((slot, _)) = guest_number(ino) {
            if let Some((_, told)) = self.volumes.get_mut(&slot) {
                *told = told.saturating_sub(times);
                if *told == 0 {
                    self.volumes.remove(&slot);
                }
            }
            return None;
        }
        let (_, told) = self.nodes.get_mut(&ino)?;
        *told = told.saturating_sub(times);
        if *told > 0 {
            return None;
        }
        let (node, _) = self.nodes.remove(&ino)?;
        self.moved.remove(&node);
        Some(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_that_want_one_number_have_different_ones_until_they_are_forgotten() {
        let mut known = KnownNodes::default();
        let nodes: Vec<Node> = ["a", "b", "c"].map(|id| Node::Box(id.into())).into();
        let numbers: Vec<u64> = nodes.iter().map(|node| known.tell_as(node, 0x51)).collect();
        assert_eq!(numbers, [0x51, 0x61, 0x71]);
        for (node, number) in nodes.iter().zip(&numbers) {
            assert_eq!(known.node(*number).as_ref(), Some(node));
            assert_eq!(known.tell_as(node, 0x51), *number);
        }
        assert_eq!(known.forget(0x61, 1), None);
        assert_eq!(known.forget(0x61, 1), Some(nodes[1].clone()));
        assert_eq!(known.node(0x61), None);
        // The number that another keeps is not given up for one that is free by now.
        assert_eq!(known.forget(0x51, 2), Some(nodes[0].clone()));
        assert_eq!(known.tell_as(&nodes[2], 0x51), 0x71);
        assert_eq!(known.tell_as(&nodes[1], 0x51), 0x51);
        assert!(known.moved.len() == 1);
    }

    #[test]
    fn the_next_number_keeps_the_place_and_stays_below_those_of_guests() {
        let last = (1 << 52) - 0x10 + 5;
        assert_eq!(next_number(last), 0x15);
        assert_eq!(next_number(0x15), 0x25);
        assert!(guest_number(next_number(last - 0x10)).is_none());
    }
}
