//! What an operator may set.

use std::time::Duration;

use protocol::Region;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::circuit_breaker::BreakerConfig;
use crate::scheduler::affinity::Weights;

/// The orchestrator's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Regions close enough that their workers may help out.
    pub near_regions: Vec<Region>,
    /// How long rules that are known stand while no registry answers. The program sets it.
    #[serde(skip)]
    pub registry_absence: Duration,
    /// Milliseconds a worker has to acknowledge a job before it is set aside; long requests get more.
    pub dispatch_ack_ms: u64,
    /// Milliseconds that opening a new connection to a worker may take.
    pub dispatch_connect_ms: u64,
    /// Seconds a worker that did not acknowledge a job gets no other, unless there is no other worker.
    pub set_aside_secs: u64,
    /// Tries of a job before its first token, each on another worker.
    pub attempts_max: u32,
    /// Seconds without a chunk, which may bring progress alone, after which an attempt has failed.
    pub stall_secs: u64,
    /// Seconds a caller may leave a chunk unread before it counts as gone.
    pub caller_stall_secs: u64,
    /// Seconds a job may wait for its first token where its caller sets no deadline.
    pub deadline_secs: u64,
    /// Seconds a reservation lasts unless it is renewed; it is renewed at a third of this.
    pub lease_secs: u64,
    /// Seconds for which a request on which engines crashed is remembered; after two crashes it is refused. 0 remembers
    /// none beyond its own job.
    pub crashes_kept_secs: u64,
    /// Seconds for which a tenant's rules are believed before the registry is asked again.
    pub policy_cache_secs: u64,
    /// Jobs whose placement can be explained; the oldest are forgotten.
    pub decisions_kept: usize,
    /// How much each term of the affinity score counts.
    pub weights: Weights,
    /// When the circuit breaker of a model and region opens and closes.
    pub breaker: BreakerConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            near_regions: vec![],
            registry_absence: Duration::from_mins(10),
            dispatch_ack_ms: 500,
            dispatch_connect_ms: 2_000,
            set_aside_secs: 15,
            attempts_max: 3,
            stall_secs: 120,
            caller_stall_secs: 60,
            deadline_secs: 1_800,
            lease_secs: 30,
            crashes_kept_secs: 600,
            policy_cache_secs: 5,
            decisions_kept: 1024,
            weights: Weights::default(),
            breaker: BreakerConfig::default(),
        }
    }
}
