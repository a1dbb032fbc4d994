//! Settings of an orchestrator.

use std::path::PathBuf;
use std::time::Duration;

use protocol::Region;
use redis::IntoConnectionInfo as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::circuit_breaker::BreakerConfig;
use crate::scheduler::affinity::Weights;

/// The orchestrator's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Other regions whose workers may be used, because they are close enough.
    pub near_regions: Vec<Region>,
    /// How long the orchestrator uses cached rules while no registry responds. The program sets it.
    #[serde(skip)]
    pub registry_absence: Duration,
    /// Milliseconds within which a worker must acknowledge a job, or it is set aside. Long requests get more time.
    pub dispatch_ack_ms: u64,
    /// Timeout in milliseconds for a new connection to a worker.
    pub dispatch_connect_ms: u64,
    /// Seconds for which a worker that did not acknowledge a job gets no further job, unless there is no other worker.
    pub set_aside_secs: u64,
    /// Maximum number of attempts of a job before its first token, each on another worker.
    pub attempts_max: u32,
    /// How often a tenant's jobs may go from a full worker to the next, for each hundred of its jobs. A hundred at once
    /// and one a second are always allowed. Without a limit, workers that are all full would get a multiple of the
    /// jobs.
    pub retry_budget_percent: u32,
    /// Whether a second worker gets a job when the first is silent for three times the 95th percentile of its times to
    /// the first token. The first of the two to answer goes on; the other is cancelled and not billed. It counts
    /// against the retry budget.
    pub hedge: bool,
    /// Number of jobs that may wait for a free slot. Beyond that, the newest jobs of the tenants with the most waiting
    /// jobs for their weight are refused, batch jobs first. With 0 no job waits.
    pub queue_max: usize,
    /// Number of waiting jobs of one tenant.
    pub tenant_queue_max: usize,
    /// A job that would have to wait longer than so many seconds is refused at once, unless it is a batch job.
    pub queue_wait_secs: u64,
    /// Expected seconds of waiting from which a job is made cheaper, if its tenant's policy says how.
    pub degrade_wait_secs: u64,
    /// Maximum number of jobs beyond its slots that a worker gets while others wait. It gets them only if its jobs are
    /// so short that its slots would be empty between two.
    pub worker_backlog_max: u32,
    /// Seconds without a chunk after which an attempt has failed. A chunk that only has progress counts.
    pub stall_secs: u64,
    /// Seconds after which an attempt has failed if its worker only reports progress: no further token of the prompt is
    /// evaluated, and none of the answer arrives. It includes the wait in the worker's queue; 0 means no limit. Jobs of
    /// batches have none, because they give way to others.
    pub token_stall_secs: u64,
    /// Seconds for which a caller may leave a chunk unread before it counts as gone.
    pub caller_stall_secs: u64,
    /// Seconds within which a job's first token must come, if the caller sets no deadline.
    pub deadline_secs: u64,
    /// Seconds that running jobs have to finish when the orchestrator stops.
    pub drain_secs: u64,
    /// Seconds after which a reservation expires unless it is renewed. It is renewed after a third of this time.
    pub lease_secs: u64,
    /// Hours for which the answer of a request with an idempotency key is kept, encrypted, and given to repeats of the
    /// request. Stored responses are kept as long. With 0 no answer is kept.
    pub answers_kept_hours: u64,
    /// Mebibytes of all answers that are kept, and as many of the requests of stored responses. If there are more,
    /// those of the tenant that has most give way first.
    pub answers_kept_mib: u64,
    /// Maximum size in MiB of a file that is uploaded for a batch; the default is OpenAI's limit.
    pub file_mib_max: u64,
    /// Maximum number of files of a tenant. A batch adds two, for its results.
    pub tenant_files_max: u32,
    /// Maximum size in MiB of all files of a tenant. Results of batches count, and are kept if they exceed it.
    pub tenant_files_mib: u64,
    /// Days for which files are kept, unless their client wants them deleted earlier.
    pub files_kept_days: u32,
    /// Hours that a batch has. Lines without a result then fail with `batch_expired`. OpenAI's API calls it 24 h.
    pub batch_window_hours: u32,
    /// Seconds after which another gateway takes over a batch whose gateway has gone silent.
    pub batch_lease_secs: u64,
    /// Seconds for which a request that crashed an engine is remembered. After two crashes it is refused. With 0 it is
    /// forgotten when its job ends.
    pub crashes_kept_secs: u64,
    /// Seconds for which a tenant's policy is cached. A change applies after this time.
    pub policy_cache_secs: u64,
    /// Maximum tokens of each answer to a request without `max_tokens`, if its tenant has a limit of tokens and the
    /// model's context is longer. As many are reserved from the limit until the answer has ended.
    pub quota_answer_tokens: u32,
    /// Number of jobs whose placement can be explained. The oldest are dropped.
    pub decisions_kept: usize,
    /// Hours for which settled jobs are kept: a retry token that comes again within this time never runs twice. 0 keeps
    /// them for ever. Usage is always kept. A job is kept for at least an hour longer than its answer
    /// (`answers_kept_hours`).
    pub jobs_kept_hours: u64,
    /// Number of dead letters that are kept: failed jobs with their requests, encrypted. The oldest are deleted; 0
    /// keeps none.
    pub dead_letters_max: u32,
    /// Maximum disk space in MiB for the requests of dead letters.
    pub dead_letters_mib: u64,
    /// Days after which a dead letter is deleted.
    pub dead_letters_days: u32,
    /// A Redis that also gets the dead letters.
    pub redis: RedisConfig,
    /// Weights of the terms of a worker's affinity score.
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
            retry_budget_percent: 10,
            hedge: false,
            queue_max: 1_024,
            tenant_queue_max: 256,
            queue_wait_secs: 60,
            degrade_wait_secs: 10,
            worker_backlog_max: 8,
            stall_secs: 120,
            token_stall_secs: 600,
            caller_stall_secs: 60,
            deadline_secs: 1_800,
            drain_secs: 30,
            lease_secs: 30,
            answers_kept_hours: 24,
            answers_kept_mib: 256,
            file_mib_max: 200,
            tenant_files_max: 1_000,
            tenant_files_mib: 2_048,
            files_kept_days: 30,
            batch_window_hours: 24,
            batch_lease_secs: 30,
            crashes_kept_secs: 600,
            policy_cache_secs: 1,
            quota_answer_tokens: 4_096,
            decisions_kept: 1024,
            jobs_kept_hours: 24,
            dead_letters_max: 1_000,
            dead_letters_mib: 64,
            dead_letters_days: 30,
            redis: RedisConfig::default(),
            weights: Weights::default(),
            breaker: BreakerConfig::default(),
        }
    }
}

/// Where dead letters are mirrored, without their requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedisConfig {
    /// Address, such as `redis://127.0.0.1:6379/0`. Without it, dead letters are in the store only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<RedisUrl>,
    /// File with the password. It is read at each connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
    /// Key of the stream.
    pub stream: String,
}

impl Default for RedisConfig {
    fn default() -> Self {
        Self { url: None, password_file: None, stream: "tether:dlq".to_owned() }
    }
}

/// Address of a Redis server, without a password.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct RedisUrl(String);

impl RedisUrl {
    pub(crate) fn info(&self) -> redis::ConnectionInfo {
        self.0.as_str().into_connection_info().expect("it was checked when it was made")
    }
}

impl TryFrom<String> for RedisUrl {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_plain = text.starts_with("redis://") || text.starts_with("redis+unix://");
        match text.as_str().into_connection_info() {
            // The error shows no part of the text, which may contain a password.
            Ok(info) if info.redis_settings().password().is_some() => {
                Err("the URL of Redis contains a password: put it into a file, and name the file in password_file"
                    .into())
            }
            Ok(_) if is_plain => Ok(Self(text)),
            Ok(_) | Err(_) => {
                Err("the URL of Redis is not one such as redis://127.0.0.1:6379/0; TLS is not supported".into())
            }
        }
    }
}

impl From<RedisUrl> for String {
    fn from(url: RedisUrl) -> Self {
        url.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redis_url_has_no_password_and_no_tls_and_errors_do_not_quote_it() {
        let read = |url: &str| RedisUrl::try_from(url.to_owned());
        for good in ["redis://127.0.0.1:6379/0", "redis://user@cache.internal", "redis+unix:///run/redis.sock"] {
            read(good).expect(good);
        }
        for bad in ["redis://:secret@h", "redis://u:secret@h:1/0", "rediss://secret", "http://secret", "secret", ""] {
            let error = read(bad).expect_err(bad);
            assert!(!error.contains("secret"), "{bad}: {error}");
        }
    }
}
