//! How a gateway is set up.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use protocol::Region;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a gateway is set up. Every field may be left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where HTTP is served. Port 0 takes any free port.
    pub bind: SocketAddr,
    /// The region whose orchestrators and registries are asked. The program sets it.
    #[serde(skip)]
    pub region: Region,
    /// How long the gateway goes on with tokens, models and rules that it knows while no registry answers. The program
    /// sets it.
    #[serde(skip)]
    pub registry_absence: Duration,
    /// PEM file of the TLS certificate and its chain. TLS is on where this and `tls_key` are given.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    pub tls_key: Option<PathBuf>,
    /// How often the TLS files are looked at for a change, in seconds.
    pub tls_reload_secs: u64,
    /// Web origins whose pages may call, such as `https://app.example.com`; `*` for all. None by default.
    pub cors_origins: Vec<String>,
    /// The largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Messages that a conversation may have; OpenAI's limit by default. 0 does not limit.
    pub messages_max: usize,
    /// Connections held at once; one more is turned away.
    pub connections_max: usize,
    /// Jobs held at once; one more gets 503.
    pub jobs_max: usize,
    /// How long a client may take to send a request's head, or to do a TLS handshake, in seconds.
    pub header_timeout_secs: u64,
    /// How long a client may pause while it sends a body, in seconds.
    pub body_idle_secs: u64,
    /// How long a connection may lie idle between requests, in seconds.
    pub idle_timeout_secs: u64,
    /// How long a client may leave an answer unread, in seconds.
    pub write_timeout_secs: u64,
    /// How long a streamed answer may be silent before the client gets a keep-alive comment, in milliseconds.
    pub keep_alive_ms: u64,
    /// How long requests may go on once the gateway is asked to stop, in seconds.
    pub drain_secs: u64,
    /// How long a job may wait for its first token where the client sets no shorter limit, in seconds. An answer that
    /// has begun runs on as long as its client listens.
    pub request_deadline_secs: u64,
    /// How long an answer may be silent before it is given up, in seconds. Jobs that are read or wait their turn are
    /// not silent.
    pub stall_timeout_secs: u64,
    /// How long a token's check is believed, in seconds; a revoked token works this much longer. At most 5.
    pub token_cache_secs: u64,
    /// How long the list of models is believed, in seconds.
    pub catalog_cache_secs: u64,
    /// How many requests a tenant may make.
    pub rate_limit: RateLimitConfig,
}

/// How many requests a tenant may make where its policy says nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimitConfig {
    /// Requests a minute in the long run; a tenant's policy may say otherwise. 0 does not limit.
    pub requests_per_minute: u32,
    /// Requests that may come at once.
    pub burst: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 7070)),
            region: "local".parse().expect("`local` is a region's slug"),
            registry_absence: Duration::from_mins(10),
            tls_cert: None,
            tls_key: None,
            tls_reload_secs: 30,
            cors_origins: vec![],
            body_bytes_max: 8 * 1024 * 1024,
            messages_max: 2048,
            connections_max: 4096,
            jobs_max: 8192,
            header_timeout_secs: 10,
            body_idle_secs: 30,
            idle_timeout_secs: 75,
            write_timeout_secs: 60,
            keep_alive_ms: 10_000,
            drain_secs: 20,
            request_deadline_secs: 1_800,
            stall_timeout_secs: 120,
            token_cache_secs: 5,
            catalog_cache_secs: 5,
            rate_limit: RateLimitConfig::default(),
        }
    }
}

impl Default for RateLimitConfig {
    fn default() -> Self {
        Self { requests_per_minute: 600, burst: 60 }
    }
}

/// The longest time that makes sense; more could overflow the clock.
const LONGEST_SECS: u64 = 365 * 24 * 3600;

/// Returns a configured time.
pub(crate) fn seconds(count: u64) -> Duration {
    Duration::from_secs(count.min(LONGEST_SECS))
}

impl Config {
    /// Returns how long a stream may be silent. Less than 10 ms would cost more than the answers themselves.
    pub(crate) fn keep_alive(&self) -> Duration {
        Duration::from_millis(self.keep_alive_ms.clamp(10, LONGEST_SECS * 1000))
    }

    /// Returns how long a token's check is believed: at most the five seconds within which a revocation takes effect.
    pub(crate) fn token_cache(&self) -> Duration {
        Duration::from_secs(self.token_cache_secs.min(5))
    }
}
