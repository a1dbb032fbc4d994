//! A whole network in one process, from one seed, with faults; and the reference of a job store.

pub mod faults;
pub mod faulty_store;
pub mod faulty_transport;
pub mod findings;
pub mod job_book;
pub mod network;
pub mod randomness;
pub mod scripted_engine;
pub mod simulation;
pub mod workload;
