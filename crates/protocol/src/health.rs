//! `Health.Report`: a worker's state, sent every five seconds and on change.

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::clock::UnixMillis;
use crate::id::{AdapterName, Digest, PrefixDigest, PublicKey, Region, WorkerId};
use crate::infer::is_zero;
use crate::model::{AdapterKey, ModelKey};

/// The kind under which reports are signed.
pub const KIND: &str = "health-report";
/// How often a worker reports.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// A worker counts as gone when it has not reported for this long.
pub const EXPIRY: Duration = Duration::from_secs(15);
/// The maximum size of a report in bytes, enough for about a thousand models. Workers omit what does not fit.
pub const REPORT_BYTES_MAX: usize = 256 * 1024;
/// The maximum number of prompt prefixes of one model. Workers report no more, and receivers ignore the others.
pub const PREFIXES_MAX: usize = 64;

/// The maximum length of the reason for a model's failure, in bytes.
pub const REASON_BYTES_MAX: usize = 300;

/// The maximum length of a text that names a model's devices, in bytes.
pub const DEVICE_BYTES_MAX: usize = 200;

/// The state of a worker. The arrival of a report also shows that the worker is alive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Health.Report")]
pub struct HealthReport {
    /// The contract's version: 1.
    pub v: u32,
    /// The worker's public key in hex.
    pub worker_id: WorkerId,
    /// Public key that signs the report; equal to `worker_id`.
    pub pub_key: PublicKey,
    /// Region of the worker.
    pub region: Region,
    /// Class of the accelerators, such as `a100`; `cpu` without one.
    pub gpu_class: String,
    /// Memory of the accelerators in GiB, despite the field's name.
    #[serde(rename = "vramGB")]
    pub vram_gb: u32,
    /// Accelerators, and the CPU features that matter, such as `avx512-vnni`.
    pub accelerators: Vec<String>,
    /// Maximum and current number of jobs.
    pub capacity: Capacity,
    /// Models that the worker serves.
    pub supported: Vec<ModelKey>,
    /// Supported models whose file the worker does not have yet. It fetches the file when a job needs the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to_fetch: Vec<ModelKey>,
    /// Adapters with which it serves the models.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterKey>,
    /// Adapters without which the worker does not serve their models.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<AdapterKey>,
    /// Models that are loaded, are being loaded, or failed.
    pub model_cache: Vec<CachedModel>,
    /// Number of network hops to the region's centre, from the settings. Fewer is nearer.
    pub latency_hops: u32,
    /// The worker finishes its jobs and takes no new ones. If no jobs are running or waiting, this is its last report.
    #[serde(default)]
    pub draining: bool,
    /// Whether the worker takes jobs, as far as the people who use its machine let it.
    #[serde(default, skip_serializing_if = "Activity::is_accepting")]
    pub activity: Activity,
    /// The worker continues answers of its own engine that another worker began.
    #[serde(default)]
    pub continues: bool,
    /// Number that increases with each start of the worker.
    pub epoch: u64,
    /// Number of the report within the epoch. It increases with each report.
    pub seq: u64,
    /// Time of the signature.
    pub issued_at: UnixMillis,
    /// Expiry of the report, at most 15 seconds after `issuedAt`.
    pub not_after: UnixMillis,
}

/// Whether a worker on a machine that people work on takes jobs. Says nothing of the reason. A word that this version
/// does not know reads as `paused`, so that a later version's report is not lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// It takes jobs.
    #[default]
    Accepting,
    /// It takes jobs that find room on no other worker.
    Deprioritised,
    /// It takes no new jobs, and other workers continue its answers. It stays in the network.
    #[serde(other)]
    Paused,
}

impl Activity {
    /// Returns whether this is the state of a worker without restrictions.
    pub fn is_accepting(&self) -> bool {
        *self == Self::Accepting
    }

    /// Returns the state's name in reports and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepting => "accepting",
            Self::Deprioritised => "deprioritised",
            Self::Paused => "paused",
        }
    }
}

/// Maximum and current number of a worker's jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// Maximum number of jobs that run concurrently.
    pub slots: u32,
    /// Number of running jobs.
    pub running: u32,
    /// Number of queued jobs.
    pub waiting: u32,
    /// Maximum number of queued jobs.
    pub queue_max: u32,
}

impl HealthReport {
    /// Returns whether the worker can run any job: a model is ready, or is loaded when a job needs it.
    pub fn can_serve(&self) -> bool {
        let is_at_hand = |key: &ModelKey| {
            let cached = self.model_cache.iter().find(|cached| cached.key == *key);
            cached.is_none_or(|cached| cached.state == ModelState::Ready)
        };
        self.takes_jobs() && self.supported.iter().any(is_at_hand)
    }

    /// Returns whether the worker takes new jobs at all.
    pub fn takes_jobs(&self) -> bool {
        !self.draining && self.activity != Activity::Paused
    }

    /// Returns whether the worker probably has the file with this digest, which belongs to one of `models` or to one of
    /// their adapters, and gives it to others. Adapter files are not reported, so the worker may lack one.
    pub fn has_file(&self, digest: &Digest, models: &[ModelKey]) -> bool {
        let is_here = |key: &&ModelKey| self.supported.contains(key) && !self.to_fetch.contains(key);
        self.activity != Activity::Paused
            && models.iter().filter(is_here).any(|key| {
                // A model of the same name on an adopted server has no file.
                let cached = self.model_cache.iter().find(|cached| cached.key == *key);
                cached.is_none_or(|cached| cached.attested || cached.digest == *digest)
            })
    }

    /// Returns whether the worker takes jobs of a model, with an adapter or without one.
    pub fn serves(&self, model: &ModelKey, adapter: Option<&AdapterName>) -> bool {
        self.takes_jobs() && self.supported.contains(model) && self.serves_adapter(model, adapter)
    }

    /// Returns whether a supported model is served with this adapter, or without one.
    pub fn serves_adapter(&self, model: &ModelKey, adapter: Option<&AdapterName>) -> bool {
        if let Some(pinned) = self.pinned.iter().find(|key| key.model == *model) {
            return adapter == Some(&pinned.adapter);
        }
        let served = |name: &AdapterName| self.adapters.iter().any(|key| key.adapter == *name && key.model == *model);
        adapter.is_none_or(served)
    }

    /// Returns whether this is the worker's last report: it takes no new jobs and has none left.
    pub fn is_last(&self) -> bool {
        self.draining && self.capacity.running == 0 && self.capacity.waiting == 0
    }
}

impl Capacity {
    /// Returns the maximum number of jobs, running and waiting.
    pub fn total(&self) -> u32 {
        self.slots.saturating_add(self.queue_max)
    }
}

/// A model that a worker has loaded, is loading, or failed to load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CachedModel {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// State of the model.
    pub state: ModelState,
    /// Whether the worker checked the SHA-256 of the model's file (no hardware attestation). False for a model of an
    /// adopted server.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub attested: bool,
    /// Context length on this worker in tokens; 0 if unknown.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub context_length: u32,
    /// Generated tokens per second, smoothed; 0 before the first answer.
    #[serde(default, deserialize_with = "finite")]
    pub tokens_per_second: f32,
    /// Attached adapters. A job with one of them does not wait for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterName>,
    /// Progress of the load, while the model is loading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<LoadProgress>,
    /// Why the model failed, for operators; at most [`REASON_BYTES_MAX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Prompt prefixes that are probably in the prefix cache, the latest first; see [`crate::prefix`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<PrefixDigest>,
    /// Devices that compute the model, once it is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<DevicePlacement>,
    /// The server that runs the model, if it does not run in the worker's own engine. The worker continues answers that
    /// another server of this kind began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ModelServer>,
}

/// A server that runs a model for a worker. It lists no tokens, so it continues an answer after its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelServer {
    /// Software that serves the model.
    pub kind: ServerKind,
    /// Whether it continues the last message of a conversation. Every server continues a text prompt.
    #[serde(default)]
    pub prefills: bool,
}

/// The software of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ServerKind {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// llama.cpp's own server.
    LlamaServer,
    /// Ollama.
    Ollama,
    /// LM Studio.
    LmStudio,
    /// Any other software.
    #[serde(other)]
    Other,
}

/// Devices that compute a loaded model, and its context length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DevicePlacement {
    /// Name of the device or devices, such as `NVIDIA H200 (CUDA0)`; at most [`DEVICE_BYTES_MAX`].
    pub device: String,
    /// Number of layers, counting the output as one.
    pub layers: u32,
    /// Number of layers on GPUs. The CPU computes the others.
    pub gpu_layers: u32,
    /// Context length of a job in tokens.
    pub context_length: u32,
    /// Context length in tokens that the model would have with more memory; equal to `contextLength` if memory was
    /// sufficient.
    pub context_wanted: u32,
}

impl fmt::Display for DevicePlacement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { device, layers, gpu_layers, context_length, context_wanted } = self;
        match gpu_layers {
            0 => write!(formatter, "computed by {device}")?,
            on_gpu => write!(formatter, "{on_gpu} of {layers} layers on {device}")?,
        }
        write!(formatter, ", {context_length} tokens of context")?;
        if context_length < context_wanted {
            write!(formatter, " ({context_wanted} do not fit into memory)")?;
        }
        Ok(())
    }
}

impl CachedModel {
    /// Makes an attested model of which only the state is known.
    pub fn new(key: ModelKey, digest: Digest, state: ModelState) -> Self {
        let (adapters, prefixes) = (Vec::new(), Vec::new());
        Self {
            key,
            digest,
            state,
            attested: true,
            context_length: 0,
            tokens_per_second: 0.0,
            adapters,
            loading: None,
            reason: None,
            prefixes,
            placement: None,
            server: None,
        }
    }
}

/// Progress of a model's load.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadProgress {
    /// Completed share in percent, 0 to 100.
    pub percent: u8,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
    /// Length of the artifact in bytes; 0 before it is opened.
    pub bytes: u64,
    /// The worker is still fetching the file from another node, and the other fields describe the fetch. The load
    /// follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fetching: bool,
}

impl LoadProgress {
    /// Estimates the remaining time from the average speed so far. Returns `None` at 0 percent.
    pub fn remaining(&self) -> Option<Duration> {
        let done = u64::from(self.percent.min(100));
        self.elapsed_ms.saturating_mul(100 - done).checked_div(done).map(Duration::from_millis)
    }
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_true(flag: &bool) -> bool {
    *flag
}

/// State of a model on a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// Being loaded or fetched.
    Loading,
    /// Loaded and ready for jobs.
    Ready,
    /// Failed to load, or its engine died. The worker tries again.
    Error,
}

/// Reads a number within the range of `f32`. 1e39 would become infinite, which JSON writes as `null`.
fn finite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
    let number = f32::deserialize(deserializer)?;
    if number.is_finite() { Ok(number) } else { Err(D::Error::custom("a number within the range of f32 was expected")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    #[test]
    fn a_model_is_attested_unless_its_worker_says_otherwise() {
        let model = |more: &str| {
            let digest = "ab".repeat(32);
            format!(r#"{{"modelId":"m","version":"1.0","digest":"{digest}","state":"ready"{more}}}"#)
        };
        let read = |more| codec::decode::<CachedModel>(model(more).as_bytes()).expect("it reads").attested;
        assert!(read(""));
        assert!(!read(r#","attested":false"#));
    }

    #[test]
    fn a_state_of_a_later_version_reads_as_paused() {
        let read = |word: &str| codec::decode::<Activity>(format!("{word:?}").as_bytes());
        for state in [Activity::Accepting, Activity::Deprioritised, Activity::Paused] {
            assert_eq!(read(state.as_str()), Ok(state));
            assert_eq!(codec::encode(&state), format!("{:?}", state.as_str()).into_bytes());
        }
        assert_eq!(read("dreaming"), Ok(Activity::Paused));
        assert!(codec::decode::<Activity>(b"7").is_err());
    }

    #[test]
    fn a_load_that_goes_on_as_it_has_ends_in_time() {
        let remaining =
            |percent, elapsed_ms| LoadProgress { percent, elapsed_ms, bytes: 0, fetching: false }.remaining();
        assert_eq!(remaining(25, 1000), Some(Duration::from_secs(3)));
        assert_eq!(remaining(0, 1000), None);
        assert_eq!((remaining(100, 1000), remaining(255, 1000)), (Some(Duration::ZERO), Some(Duration::ZERO)));
        assert!(remaining(1, u64::MAX).is_some(), "no number from outside does harm");
    }

    #[test]
    fn a_speed_beyond_all_numbers_is_malformed() {
        let model = |speed: &str| {
            format!(
                r#"{{"modelId":"m","version":"1.0","digest":"{}","state":"ready","tokensPerSecond":{speed}}}"#,
                "ab".repeat(32)
            )
        };
        assert!(codec::decode::<CachedModel>(model("12.5").as_bytes()).is_ok());
        assert!(codec::decode::<CachedModel>(model("1e39").as_bytes()).is_err());
    }
}
