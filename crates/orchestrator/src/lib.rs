//! Finds a worker for each job and follows the job until it is settled. Start reading at [`Orchestrator::submit`].
//!
//! Decisions are pure functions of the state and the current time ([`scheduler`], [`circuit_breaker`],
//! [`retry_manager`], [`retry_budget`], [`fair_queue`], [`job`], `journal`); only [`orchestrator`], [`dispatch`] and
//! [`reservation_manager`] act.

mod advance;
mod answers;
mod bounds;
pub mod circuit_breaker;
pub mod config;
pub mod crash_record;
mod dead_letter_relay;
mod dead_letters;
pub mod decision_log;
pub mod discovery_sub;
pub mod dispatch;
pub mod fair_queue;
mod first_tokens;
pub mod fleet;
mod history_keeper;
pub mod job;
mod job_gate;
mod journal;
pub mod journey;
pub mod metrics;
mod operations;
mod operator_check;
pub mod orchestrator;
pub mod policy_engine;
pub mod quotas;
mod receipts;
mod refusals;
pub mod registry_policies;
pub mod reservation_manager;
pub mod retry_budget;
pub mod retry_manager;
mod running_jobs;
pub mod scheduler;
mod sealing;
mod usual_wait;
mod worker_errors;
pub mod worker_record;

pub use config::Config;
pub use metrics::Metrics;
pub use orchestrator::{Orchestrator, OrchestratorParts};
pub use sealing::SealingKey;
