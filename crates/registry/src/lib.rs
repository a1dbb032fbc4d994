//! Says which models exist, in which versions, under which policies, whose tokens are good, and which nodes belong to
//! the pool.

pub mod adapters;
pub mod admission;
pub mod catalog;
pub mod models;
pub mod policies;
pub mod registry;
pub mod tokens;

pub use admission::{AdmissionError, AdmissionOffice, AdmissionParts, Grant};
pub use registry::{Registry, RegistryParts};
pub use tokens::{IssueError, Pepper, TokenOffice};
