//! The program as its users meet it.

mod admission;
mod commands;
mod network;
mod program;
