//! `Health.Report`: what a worker says of itself every five seconds and on change (T5, T6).

use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::clock::UnixMillis;
use crate::id::{AdapterName, Digest, PrefixDigest, PublicKey, Region, WorkerId};
use crate::model::{AdapterKey, ModelKey};

/// The kind under which reports are signed.
pub const KIND: &str = "health-report";
/// How often a worker reports.
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// A worker silent for this long is gone.
pub const EXPIRY: Duration = Duration::from_secs(15);
/// The largest report taken, in bytes: room for some thousand models. Workers leave out what goes beyond.
pub const REPORT_BYTES_MAX: usize = 256 * 1024;
/// The most beginnings of prompts that are told, and believed, of one model.
pub const PREFIXES_MAX: usize = 64;

/// The longest reason that is told of a failed model, in bytes.
pub const REASON_BYTES_MAX: usize = 300;

/// The longest text that names the devices of a model, in bytes.
pub const DEVICE_BYTES_MAX: usize = 200;

/// What a worker says of itself. Health report and presence are this one message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Health.Report")]
pub struct HealthReport {
    /// The contract's version: 1.
    pub v: u32,
    /// The worker's public key in hex.
    pub worker_id: WorkerId,
    /// The key that signs the report; equal to `worker_id`.
    pub pub_key: PublicKey,
    /// Where the worker stands.
    pub region: Region,
    /// What kind of accelerator it has, such as `a100`; `cpu` for none.
    pub gpu_class: String,
    /// Memory of its accelerators, in GiB.
    #[serde(rename = "vramGB")]
    pub vram_gb: u32,
    /// Its accelerators and the CPU features that matter, such as `avx512-vnni`.
    pub accelerators: Vec<String>,
    /// How much it can take, and how much it has.
    pub capacity: Capacity,
    /// The models it serves.
    pub supported: Vec<ModelKey>,
    /// Of those, the models whose file it does not have yet: it fetches it when somebody asks for one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to_fetch: Vec<ModelKey>,
    /// The adapters it serves them with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterKey>,
    /// Of the adapters, those without which it serves their models no more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<AdapterKey>,
    /// The models it holds in memory.
    pub model_cache: Vec<CachedModel>,
    /// Network hops to the region's centre, as configured; fewer is nearer.
    pub latency_hops: u32,
    /// It finishes what it has and takes nothing new. With nothing running or waiting, this is its last report.
    #[serde(default)]
    pub draining: bool,
    /// Grows at each start of the worker.
    pub epoch: u64,
    /// Grows at each report.
    pub seq: u64,
    /// When it was signed.
    pub issued_at: UnixMillis,
    /// When it is void.
    pub not_after: UnixMillis,
}

/// How much a worker can take, and how much it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Capacity {
    /// Jobs that run side by side at most.
    pub slots: u32,
    /// Running jobs.
    pub running: u32,
    /// Queued jobs.
    pub waiting: u32,
    /// Jobs that may wait at most.
    pub queue_max: u32,
}

impl HealthReport {
    /// Returns whether the worker can answer something: a model is ready, or is loaded as soon as somebody asks for it.
    pub fn can_serve(&self) -> bool {
        let is_at_hand = |key: &ModelKey| {
            let cached = self.model_cache.iter().find(|cached| cached.key == *key);
            cached.is_none_or(|cached| cached.state == ModelState::Ready)
        };
        !self.draining && self.supported.iter().any(is_at_hand)
    }

    /// Returns whether the worker reports a file of one of these models: the model's own or an adapter's. It may turn out
    /// not to have the adapter's.
    pub fn has_file(&self, digest: &Digest, models: &[ModelKey]) -> bool {
        models.iter().filter(|key| self.supported.contains(key) && !self.to_fetch.contains(key)).any(|key| {
            // A model of the same name on an adopted server has no file.
            let cached = self.model_cache.iter().find(|cached| cached.key == *key);
            cached.is_none_or(|cached| cached.attested || cached.digest == *digest)
        })
    }

    /// Returns whether the worker takes jobs of a model, with an adapter or without one.
    pub fn serves(&self, model: &ModelKey, adapter: Option<&AdapterName>) -> bool {
        !self.draining && self.supported.contains(model) && self.serves_adapter(model, adapter)
    }

    /// Returns whether a supported model is served with this adapter, or without one.
    pub fn serves_adapter(&self, model: &ModelKey, adapter: Option<&AdapterName>) -> bool {
        if let Some(pinned) = self.pinned.iter().find(|key| key.model == *model) {
            return adapter == Some(&pinned.adapter);
        }
        let served = |name: &AdapterName| self.adapters.iter().any(|key| key.adapter == *name && key.model == *model);
        adapter.is_none_or(served)
    }

    /// Returns whether the worker is gone after this report: it takes nothing new and has nothing left.
    pub fn is_last(&self) -> bool {
        self.draining && self.capacity.running == 0 && self.capacity.waiting == 0
    }
}

impl Capacity {
    /// Returns the jobs it may hold at once, running and waiting.
    pub fn total(&self) -> u32 {
        self.slots.saturating_add(self.queue_max)
    }
}

/// A model in a worker's memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CachedModel {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// SHA-256 of the artifact it was loaded from.
    pub digest: Digest,
    /// How far it is.
    pub state: ModelState,
    /// Whether the worker itself checked the bytes that answer. False where another's server answers.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub attested: bool,
    /// Tokens of context that it has there; 0 where that is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub context_length: u32,
    /// Generated tokens a second, smoothed; 0 before the first answer.
    #[serde(default, deserialize_with = "finite")]
    pub tokens_per_second: f32,
    /// Adapters at hand: a job with one of them need not wait for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<AdapterName>,
    /// How far its load is, while it is loading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<LoadProgress>,
    /// Why it failed, for those who operate the network; at most [`REASON_BYTES_MAX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Beginnings of prompts whose keys and values are likely at hand, the latest first; see [`crate::prefix`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<PrefixDigest>,
    /// What computes it, once it is loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<DevicePlacement>,
}

/// What computes a loaded model, and the context that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DevicePlacement {
    /// The device or devices, such as `NVIDIA H200 (CUDA0)`; at most [`DEVICE_BYTES_MAX`].
    pub device: String,
    /// Its layers, with the output as one more.
    pub layers: u32,
    /// Those of them that are on GPUs; the processor computes the others.
    pub gpu_layers: u32,
    /// Tokens of context of a job.
    pub context_length: u32,
    /// Tokens of context that it would have with more memory; the same where memory was no limit.
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
    /// Returns an attested model of which no more is known than how far it is.
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
        }
    }
}

/// How far the load of a model is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadProgress {
    /// What is done of it, 0 to 100.
    pub percent: u8,
    /// Milliseconds that it has taken so far.
    pub elapsed_ms: u64,
    /// Length of the artifact in bytes; 0 before it was opened.
    pub bytes: u64,
    /// Its file comes from another node yet, and the rest speaks of that; it is loaded afterwards.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fetching: bool,
}

impl LoadProgress {
    /// Returns how long it takes yet, if it goes on as it has; nothing is known of one that has only begun.
    pub fn remaining(&self) -> Option<Duration> {
        let done = u64::from(self.percent.min(100));
        self.elapsed_ms.saturating_mul(100 - done).checked_div(done).map(Duration::from_millis)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_true(flag: &bool) -> bool {
    *flag
}

/// How far a model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelState {
    /// On its way into memory.
    Loading,
    /// Loaded and ready for jobs.
    Ready,
    /// Failed to load or died; it is tried again.
    Error,
}

/// Reads a number that JSON can say again; 1e39 would become infinite, and then `null`.
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
