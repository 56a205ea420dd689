//! What a node is: its number, names, attributes and texts.

pub(super) mod attr;
pub(super) mod box_json;
pub(super) mod guest_numbers;
pub(super) mod known_nodes;
pub(super) mod names;
pub(super) mod node;
pub(super) mod status;
pub(super) mod xattr;
