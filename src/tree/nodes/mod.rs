//! What a node is: its number, its names, its attributes and its texts.

pub(super) mod attr;
pub(super) mod box_json;
pub(super) mod box_names;
pub(super) mod boxes;
pub(super) mod guest_numbers;
pub(super) mod kept_names;
pub(super) mod kernel_view;
pub(super) mod known_nodes;
pub(super) mod names;
pub(super) mod node;
pub(super) mod refusal;
pub(super) mod shown_path;
pub(super) mod status_file;
pub(super) mod xattr;
