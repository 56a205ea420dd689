//! Every program that people use on a mount: copy tools, file managers, services, documents.

#[path = "../common/mod.rs"]
mod common;

mod desktop;
mod documents;
mod first_contact;
mod matrix;
mod operating;
mod servers;
