//! The `tether` program: its settings, its commands, the nodes that it runs, and the whole network in one process.

pub mod addresses;
pub mod args;
pub mod client;
pub mod clock;
pub mod commands;
pub mod data_folder;
pub mod download;
pub mod kept_flags;
pub mod local_models;
pub mod metrics;
pub mod metrics_server;
pub mod model_caches;
pub mod model_file;
pub mod model_names;
pub mod network;
pub mod node;
pub mod operator;
pub mod output;
pub mod processes;
pub mod services;
pub mod settings;
pub mod tiny_model;
pub mod voice;
