//! The program as its users meet it.

mod commands;
mod network;
mod program;
