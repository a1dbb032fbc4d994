//! The registry: keeps the catalogue of models, the tenants' policies and API tokens, and the membership of the pool.

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
