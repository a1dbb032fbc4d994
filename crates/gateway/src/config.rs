//! Settings of a gateway.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use protocol::Region;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of a gateway. Every field is optional.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address on which HTTP is served. Port 0 picks a free port.
    pub bind: SocketAddr,
    /// Another address, for clients of Ollama that insist on its port, such as `127.0.0.1:11434`. It serves the same as
    /// `bind`, without TLS. None by default.
    pub ollama_bind: Option<SocketAddr>,
    /// Whether requests to `ollama_bind` need an API key. If not, those without one count as this machine's own: they
    /// use the key in the data folder. Only for a loopback address.
    pub ollama_needs_key: bool,
    /// Region whose orchestrators and registries the gateway uses. The program sets it.
    #[serde(skip)]
    pub region: Region,
    /// How long the gateway uses cached tokens, models and rules while no registry responds. The program sets it.
    #[serde(skip)]
    pub registry_absence: Duration,
    /// PEM file of the TLS certificate and its chain. TLS is enabled if this and `tls_key` are set.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    pub tls_key: Option<PathBuf>,
    /// Interval in seconds at which the TLS files are checked for changes.
    pub tls_reload_secs: u64,
    /// Web origins that may send requests (CORS), such as `https://app.example.com`; `*` allows all. None by default.
    pub cors_origins: Vec<String>,
    /// Maximum size of a request body in bytes.
    pub body_bytes_max: usize,
    /// Maximum number of messages in a conversation; the default is OpenAI's limit. 0 means no limit.
    pub messages_max: usize,
    /// Maximum number of connections. Further ones are refused.
    pub connections_max: usize,
    /// Maximum number of connections from one IPv4 address or IPv6 /64 network, and of concurrent requests from one
    /// behind a trusted proxy. An IPv6 /48 network may have eight times as many. Further ones get status 429. 0 means
    /// no limit.
    pub connections_per_address_max: usize,
    /// Networks of the reverse proxies in front of the gateway, such as `10.0.0.0/8` or `192.0.2.7`. From these alone,
    /// the headers `X-Forwarded-For` and `Forwarded` say whose request it is.
    pub trusted_proxies: Vec<ProxyNetwork>,
    /// Which header of these proxies counts: `x_forwarded_for`, `forwarded`, or `either`. With `either`, a request
    /// whose two headers disagree counts as the proxy's own. Name the header if your proxy writes one and passes the
    /// other on as its client wrote it.
    pub proxy_header: ProxyHeader,
    /// Maximum number of concurrent jobs. Further ones get status 503.
    pub jobs_max: usize,
    /// Maximum number of lines of batches that this gateway runs at the same time. They wait behind all other work, so
    /// the number may exceed the slots of the workers, which are then never empty between two lines.
    pub batch_lines_max: usize,
    /// Timeout in seconds for receiving a request's head, and for the TLS handshake.
    pub header_timeout_secs: u64,
    /// Maximum pause in seconds while a client sends a body.
    pub body_idle_secs: u64,
    /// Maximum idle time in seconds of a connection between requests.
    pub idle_timeout_secs: u64,
    /// Maximum time in seconds for which a client may leave an answer unread.
    pub write_timeout_secs: u64,
    /// Silence in milliseconds after which a streamed answer sends a keep-alive comment.
    pub keep_alive_ms: u64,
    /// Seconds that requests have to finish when the gateway stops.
    pub drain_secs: u64,
    /// Seconds within which a job's first token must come, unless the client sets a shorter deadline. An answer that
    /// has begun continues for as long as its client reads it.
    pub request_deadline_secs: u64,
    /// Seconds for which an answer may be silent before it is abandoned. A job is not silent while it is queued or its
    /// prompt is evaluated.
    pub stall_timeout_secs: u64,
    /// Seconds for which a job with an idempotency key goes on when its client has disconnected. A client that asks
    /// again gets the same answer. At most 300.
    pub reconnect_secs: u64,
    /// Seconds for which a token's check is cached, with the policy of its tenant. A revoked token works this much
    /// longer, and a changed policy applies this much later. At most 5.
    pub token_cache_secs: u64,
    /// Seconds for which the list of models is cached.
    pub catalog_cache_secs: u64,
    /// Who may read `/metrics` on the gateway's address: `local` for clients that connect over loopback, except trusted
    /// proxies, and for operators; `operators`; or `anyone`. Operators show their API key. Choose `operators` behind a
    /// proxy on this machine that is not listed in `trusted_proxies`.
    pub metrics_access: MetricsAccess,
    /// Rate limit of each tenant.
    pub rate_limit: RateLimitConfig,
}

/// The header that says whose request a proxy passes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyHeader {
    /// Either header, or both if they agree.
    #[default]
    Either,
    /// `X-Forwarded-For` alone.
    XForwardedFor,
    /// `Forwarded` alone (RFC 7239).
    Forwarded,
}

/// Who may read a gateway's metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MetricsAccess {
    /// Clients on this machine, and operators.
    #[default]
    Local,
    /// Operators, by their API key.
    Operators,
    /// Everybody who reaches the gateway's address.
    Anyone,
}

/// Rate limit of each tenant whose policy sets none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimitConfig {
    /// Sustained number of requests per minute. A tenant's policy takes precedence. 0 means no limit.
    pub requests_per_minute: u32,
    /// Maximum number of requests at once.
    pub burst: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 7070)),
            ollama_bind: None,
            ollama_needs_key: true,
            region: "local".parse().expect("`local` is a region's slug"),
            registry_absence: Duration::from_mins(10),
            tls_cert: None,
            tls_key: None,
            tls_reload_secs: 30,
            cors_origins: vec![],
            body_bytes_max: 8 * 1024 * 1024,
            messages_max: 2048,
            connections_max: 4096,
            connections_per_address_max: 64,
            trusted_proxies: vec![],
            proxy_header: ProxyHeader::default(),
            jobs_max: 8192,
            batch_lines_max: 64,
            header_timeout_secs: 10,
            body_idle_secs: 30,
            idle_timeout_secs: 75,
            write_timeout_secs: 60,
            keep_alive_ms: 10_000,
            drain_secs: 20,
            request_deadline_secs: 1_800,
            stall_timeout_secs: 120,
            reconnect_secs: 30,
            token_cache_secs: 1,
            catalog_cache_secs: 5,
            metrics_access: MetricsAccess::Local,
            rate_limit: RateLimitConfig::default(),
        }
    }
}

/// A network whose hosts are trusted proxies. A single address is a network of one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct ProxyNetwork(IpNet);

impl ProxyNetwork {
    /// Returns whether an address is in the network. An IPv4-mapped IPv6 address counts as its IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for ProxyNetwork {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
        network.map(Self).map_err(|_| format!("{text:?} is not a network such as 10.0.0.0/8, or an address"))
    }
}

impl TryFrom<String> for ProxyNetwork {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<ProxyNetwork> for String {
    fn from(network: ProxyNetwork) -> Self {
        network.to_string()
    }
}

impl fmt::Display for ProxyNetwork {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl Default for RateLimitConfig {
    fn default() -> Self {
        Self { requests_per_minute: 600, burst: 60 }
    }
}

/// The maximum of a configured time. A longer one could overflow the clock.
const LONGEST_SECS: u64 = 365 * 24 * 3600;

/// How long a stream that is cut off because the gateway stops has to send its error.
pub(crate) const CUT_WITHIN: Duration = Duration::from_secs(1);

/// Returns a configured time, at most [`LONGEST_SECS`].
pub(crate) fn seconds(count: u64) -> Duration {
    Duration::from_secs(count.min(LONGEST_SECS))
}

impl Config {
    /// Returns how long a stream may be silent, at least 10 ms. More frequent comments would cost more than the
    /// answers.
    pub(crate) fn keep_alive(&self) -> Duration {
        Duration::from_millis(self.keep_alive_ms.clamp(10, LONGEST_SECS * 1000))
    }

    /// Returns how long a token's check is cached: at most the five seconds within which a revocation takes effect.
    pub(crate) fn token_cache(&self) -> Duration {
        Duration::from_secs(self.token_cache_secs.min(5))
    }
}
