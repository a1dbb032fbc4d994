//! The registry: keeps the catalogue of models, the tenants' policies and API tokens, and the membership of the pool.

pub mod adapters;
pub mod catalog;
pub mod certificate_authority;
pub mod models;
pub mod policies;
pub mod registry;
mod secret_checks;
pub mod tokens;

pub use certificate_authority::{AuthorityError, CertificateAuthority, CertificateAuthorityParts, Grant};
pub use registry::{Registry, RegistryParts};
pub use tokens::{IssueError, Pepper, TokenIssuer};
