//! The program as its users meet it.

mod added_models;
mod adoption;
mod batches;
#[cfg(feature = "llama")]
mod canary;
mod certificates;
#[cfg(target_os = "linux")]
mod chats;
mod commands;
mod continuation;
mod conversations;
mod documents;
mod downloads;
mod drill;
mod impostor;
mod membership;
mod memory_network;
#[cfg(feature = "llama")]
mod mesh;
mod network;
mod operations;
mod own_models;
mod processes;
mod program;
mod questions;
mod real_models;
#[cfg(feature = "llama")]
mod stranger;
#[cfg(target_os = "linux")]
mod terminal;
mod two_machines;
