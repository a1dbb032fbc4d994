//! Says which models exist, in which versions, under which policies, and whose tokens are good.

pub mod catalog;
pub mod policies;
pub mod registry;
pub mod tokens;

pub use registry::{Registry, RegistryParts};
pub use tokens::{IssueError, Pepper, TokenOffice};
