//! Proofs by machine: the model of a job's life, and what the stores do beside it.

mod job_model;
mod life_of_jobs;
mod linearizability;
mod reference;
mod seeds;
mod store_calls;
