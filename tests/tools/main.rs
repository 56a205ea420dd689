//! Programs that people use on a mount: copy tools, file managers, services; and what the documents
//! say.

#[path = "../common/mod.rs"]
mod common;

mod desktop;
mod documents;
mod first_contact;
mod matrix;
mod operating;
mod real_guest;
mod servers;
