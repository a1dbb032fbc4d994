//! The `tether` program: its settings, its commands, and the whole network in one process.

pub mod args;
pub mod client;
pub mod commands;
pub mod data_folder;
pub mod network;
pub mod output;
pub mod settings;
pub mod tiny_model;
