//! Loads models and runs jobs.
//!
//! [`BaseWorker`] answers `infer.start`. Its quota guard decides whether there is capacity for the job, and the model
//! loader brings the model into memory. If the model's file is not here, the fetcher gets it from another node. The
//! execution engine runs the job, and the health reporter keeps the orchestrators informed.

pub mod activity;
mod adoption;
mod announcer;
mod base_worker;
mod capabilities;
mod catalog_watch;
mod config;
mod device_report;
mod disk_calls;
mod engine_meter;
mod execution_engine;
mod fetcher;
mod health_reporter;
mod hearing;
mod listed;
pub mod metrics;
pub mod model_facts;
mod model_loader;
mod offers;
mod own_server;
mod quota_guard;
mod remote_models;
mod runtimes;
mod standing;
mod transcript;

pub use adoption::{Adoption, AdoptionError};
pub use base_worker::{BaseWorker, NotReady, WorkerHandle, WorkerParts};
pub use capabilities::Capabilities;
pub use config::{CatalogUse, Config, ConfigError, RemoteServer, ServedAdapter, ServedModel};
pub use disk_calls::DiskCalls;
pub use metrics::Metrics;
pub use quota_guard::{Demand, JobLimits, Occupancy, Refusal, admit};
