//! Settings of a worker: its models and its limits.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use protocol::model::{AdapterKey, ModelKey, remote_digest};
use protocol::{AdapterName, Digest, ModelName, ModelVersion, Region};
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::activity::ActivityConfig;

/// Settings of one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Region of the worker, whose orchestrators it serves. The program sets it.
    #[serde(skip)]
    pub region: Region,
    /// Models that the worker serves.
    pub models: Vec<ServedModel>,
    /// Which models of `tether model add` the worker serves. They are loaded when a request needs them. `fetch` serves
    /// all that this node can hold and fetches their files from other nodes, `local` serves those whose files are in
    /// its store, and `off` serves none.
    pub catalog: CatalogUse,
    /// Maximum disk space in MiB for files from other nodes; 0 uses all free space. The least recently used files are
    /// deleted first. One GiB of the disk always stays free.
    pub disk_max_mib: u64,
    /// Maximum number of jobs that run concurrently. Each model is loaded with as many sequences.
    pub slots: u32,
    /// Maximum number of queued jobs. Further ones are refused.
    pub queue_max: u32,
    /// Maximum number of running and queued jobs of one tenant; no limit if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_jobs_max: Option<u32>,
    /// Loads the models at startup, as far as they fit, instead of at their first job.
    pub preload: bool,
    /// Maximum memory in MiB of all models together; 0 uses the machine's free memory. Idle models are unloaded when
    /// others are needed.
    pub memory_max_mib: u64,
    /// Maximum GPU memory in MiB of all models together; 0 uses what is free when the worker starts.
    pub vram_max_mib: u64,
    /// Minimum of a request's `keep_alive` in seconds. Shorter times are raised to it; 0 means no minimum.
    pub keep_alive_secs_min: i64,
    /// Maximum of a request's `keep_alive` in seconds. Longer times are lowered to it; -1 means no maximum.
    pub keep_alive_secs_max: i64,
    /// Closes each engine off from files, the network and other processes before it reads its model (Linux only). Turn
    /// it off only for a GPU driver that does not work that way: a malicious model file can then read what this program
    /// can read. `tether doctor` shows what this machine supports.
    pub engine_sandbox: bool,
    /// Seconds that jobs have to finish when the worker stops. After that, other workers continue them.
    pub drain_secs: u64,
    /// Seconds for which a model's server may be silent before the first token of an answer. After that the attempt
    /// fails, and the job goes to another worker if there is one. A server is silent while a request is queued or its
    /// prompt is evaluated, so busy servers with long prompts need more time.
    pub server_stall_secs: u64,
    /// Number of network hops to the region's centre. Fewer is nearer.
    pub latency_hops: u32,
    /// How much of this worker one tenant may take, whatever orchestrators send.
    pub quota: QuotaConfig,
    /// What the worker does while people use its machine. Without rules it takes jobs at all times.
    pub activity: ActivityConfig,
}

/// How much of a worker one tenant may take. A job beyond it goes to another worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaConfig {
    /// Maximum percent of the queue for jobs of one tenant. The rest stays free for other tenants. All slots are open
    /// to each tenant.
    pub tenant_queue_percent: u32,
    /// Maximum tokens of all running and queued jobs of one tenant, estimated from their prompts and `max_tokens`; no
    /// limit if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_tokens_max: Option<u64>,
}

impl Default for QuotaConfig {
    fn default() -> Self {
        Self { tenant_queue_percent: 75, tenant_tokens_max: None }
    }
}

/// What a worker does with models that operators added. `true` and `false` stand for `fetch` and `off`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CatalogUse {
    /// Serves them, and fetches their files when they are needed.
    #[default]
    Fetch,
    /// Serves those whose files are in the store.
    Local,
    /// Serves only the models in the settings.
    Off,
}

impl<'de> Deserialize<'de> for CatalogUse {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Flag(bool),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Flag(true) => Ok(Self::Fetch),
            Written::Flag(false) => Ok(Self::Off),
            Written::Word(word) => match word.as_str() {
                "fetch" | "true" => Ok(Self::Fetch),
                "local" => Ok(Self::Local),
                "off" | "false" => Ok(Self::Off),
                _ => Err(D::Error::custom(format!("catalog is `fetch`, `local` or `off`, and not {word:?}"))),
            },
        }
    }
}

/// One model that a worker serves, and how it is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServedModel {
    /// Name.
    pub model_id: ModelName,
    /// Version, as `MAJOR.MINOR`.
    #[serde(default = "first_version")]
    pub version: ModelVersion,
    /// GGUF file on this machine. It is copied into the artifact store at startup, unless it is there already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// SHA-256 of the artifact. It may be omitted if `file` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Running server that serves the model, instead of an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteServer>,
    /// Program that serves the artifact instead of the engine, with its arguments. `{model}` stands for the file and
    /// `{port}` for the port to listen on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub server_command: Vec<String>,
    /// Closes the program of `server_command` off from files, connections to others and other processes (Linux only).
    /// It can read its libraries, use GPUs, start programs, and listen on its port.
    #[serde(default = "yes")]
    pub server_sandbox: bool,
    /// Further files and folders that the program of `server_command` may read, write and run, such as a log file that
    /// exists or a folder of Python packages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub server_paths: Vec<PathBuf>,
    /// Context length of a job in tokens; 0 uses the length that the model was trained with, at most 8192, and less if
    /// memory is short.
    #[serde(default)]
    pub context_length: u32,
    /// Number of threads for decoding, at most the number of cores; 0 uses all cores, or all but one if there are more
    /// than two.
    #[serde(default)]
    pub threads: u32,
    /// Number of layers on a GPU; 0 keeps all on the CPU. If omitted, as many as fit are on a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_layers: Option<u32>,
    /// Size of the KV cache in tokens, for all jobs together; 0 uses 8192, but at least one context and at most one for
    /// each slot. A larger cache lets more long jobs run concurrently.
    #[serde(default)]
    pub kv_tokens: u32,
    /// Memory in MiB for conversations that were removed from the KV cache. They are not evaluated again.
    #[serde(default = "prompt_cache_mib")]
    pub prompt_cache_mib: u64,
    /// Maximum number of draft tokens from a repeated passage, at most 16; 0 disables speculative decoding. Answers
    /// stay the same.
    #[serde(default = "draft_tokens")]
    pub draft_tokens: u32,
    /// Seconds without work after which the model is unloaded; -1 for never. The next request loads it again. If
    /// omitted, the network's setting for the model applies, or else 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
    /// Loads the model at startup and never unloads it, neither for other models nor because it is idle. If omitted,
    /// `tether model pin` decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Kernels that compute the model on a CPU: `auto` uses Tether's if the CPU has AVX-512 and VNNI, and `off` uses
    /// only ggml's. `off` is slower, and a repeated answer at temperature 0 may differ in a rare word.
    #[serde(default)]
    pub kernels: Kernels,
    /// LoRA adapters of the model. Each is attached at its first job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<ServedAdapter>,
    /// Name of the model's only adapter, if the worker serves the model with this adapter only. Jobs with it run here,
    /// all others elsewhere. If the weights have 8 bits or more, the adapter is merged into them at the load, and then
    /// costs nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_adapter: Option<AdapterName>,
    /// Maximum number of attached adapters. The least recently used one is detached first.
    #[serde(default = "adapters_max")]
    pub adapters_max: u32,
    /// Whether the registry lists the model already, so that it need not be offered. The program sets it.
    #[serde(skip)]
    pub is_listed: bool,
}

/// Kernels that compute a model on a CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kernels {
    /// Tether's, if the CPU supports them.
    #[default]
    Auto,
    /// ggml's only.
    Off,
}

/// A running server with OpenAI's API that Tether did not start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteServer {
    /// Address, such as `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// The model's name on that server.
    pub model: String,
    /// File with the server's API key. It may be omitted if the server needs none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
}

/// An adapter of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServedAdapter {
    /// Name.
    pub name: AdapterName,
    /// SHA-256 of the artifact.
    pub digest: Digest,
}

fn yes() -> bool {
    true
}

fn first_version() -> ModelVersion {
    ModelVersion { major: 1, minor: 0 }
}

/// Five minutes, as in Ollama.
const KEEP_ALIVE_SECS: i64 = 300;

fn prompt_cache_mib() -> u64 {
    256
}

/// As many tokens as are evaluated at nearly the cost of one.
fn draft_tokens() -> u32 {
    3
}

fn adapters_max() -> u32 {
    4
}

/// The maximum number of adapters of all models together. Health reports list each of them.
const ADAPTERS_TOLD_MAX: usize = 256;

/// Why a configuration is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No job could run.
    #[error("slots must be at least 1")]
    NoSlots,
    /// No tenant could run a job.
    #[error("tenant_jobs_max must be at least 1, or missing for no limit")]
    NoTenantJobs,
    /// Every server would count as hung.
    #[error("server_stall_secs must be at least 1")]
    NoServerStall,
    /// The operating system knows no such priority.
    #[error("nice must be at most 19")]
    TooNice,
    /// A model has no source, or two.
    #[error("{0} needs either a file (or the digest of one in the store) or a remote server")]
    Source(ModelKey),
    /// The command cannot serve an artifact.
    #[error("server_command of {0} needs a file or a digest, and must say where {{port}} goes")]
    Command(ModelKey),
    /// A model is in the list twice.
    #[error("models has {0} more than once")]
    ModelTwice(ModelKey),
    /// An adapter is in the list of its model twice.
    #[error("{0} has the adapter {1} more than once")]
    AdapterTwice(ModelKey, AdapterName),
    /// There are more adapters than a health report can list.
    #[error("models has more than {ADAPTERS_TOLD_MAX} adapters")]
    TooManyAdapters,
    /// The pinned adapter is not the only adapter of a model with an artifact and without a server command.
    #[error(
        "pinned_adapter of {0} must be the one adapter in its list, of a model with a file or digest and no server_command"
    )]
    Pinned(ModelKey),
    /// No adapter could be attached.
    #[error("adapters_max of {0} must be at least 1")]
    NoAdapters(ModelKey),
}

impl Default for Config {
    fn default() -> Self {
        Self {
            region: "local".parse().expect("a region's slug"),
            models: Vec::new(),
            catalog: CatalogUse::default(),
            disk_max_mib: 0,
            slots: 4,
            queue_max: 64,
            tenant_jobs_max: None,
            preload: true,
            memory_max_mib: 0,
            vram_max_mib: 0,
            keep_alive_secs_min: 0,
            keep_alive_secs_max: -1,
            engine_sandbox: true,
            drain_secs: 20,
            server_stall_secs: 120,
            latency_hops: 0,
            quota: QuotaConfig::default(),
            activity: ActivityConfig::default(),
        }
    }
}

impl Config {
    /// Checks what the types cannot.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.slots == 0 {
            return Err(ConfigError::NoSlots);
        }
        if self.server_stall_secs == 0 {
            return Err(ConfigError::NoServerStall);
        }
        if self.tenant_jobs_max == Some(0) {
            return Err(ConfigError::NoTenantJobs);
        }
        if self.activity.nice > 19 {
            return Err(ConfigError::TooNice);
        }
        if let Some(model) = self.models.iter().find(|model| model.has_artifact() == model.remote.is_some()) {
            return Err(ConfigError::Source(model.key()));
        }
        let cannot_serve = |model: &&ServedModel| {
            let command = &model.server_command;
            !command.is_empty() && (!model.has_artifact() || !command.iter().any(|word| word.contains("{port}")))
        };
        if let Some(model) = self.models.iter().find(cannot_serve) {
            return Err(ConfigError::Command(model.key()));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.models.iter().map(ServedModel::key).find(|key| !seen.insert(key.clone())) {
            return Err(ConfigError::ModelTwice(twice));
        }
        if self.models.iter().map(|model| model.adapters.len()).sum::<usize>() > ADAPTERS_TOLD_MAX {
            return Err(ConfigError::TooManyAdapters);
        }
        self.models.iter().try_for_each(ServedModel::check)
    }

    /// Returns a request's `keep_alive`, clamped to the minimum and the maximum.
    pub(crate) fn bounded_keep_alive(&self, secs: i64) -> i64 {
        // For ever is the longest.
        let rank = |secs: i64| if secs < 0 { i64::MAX } else { secs };
        let (min, max) = (self.keep_alive_secs_min.max(0), rank(self.keep_alive_secs_max));
        let bounded = rank(secs).max(min).min(max);
        if bounded == i64::MAX { -1 } else { bounded }
    }

    /// Returns how long servers may be silent before an answer begins.
    pub fn server_stall(&self) -> Duration {
        Duration::from_secs(self.server_stall_secs)
    }

    /// Returns how long jobs have to finish when the worker stops.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_secs)
    }
}

impl ServedModel {
    /// Makes a model from an artifact, with default settings and without adapters.
    pub fn new(key: ModelKey, digest: Digest) -> Self {
        Self { digest: Some(digest), ..Self::named(key) }
    }

    /// Makes a model from a file that is not in the store yet.
    pub fn of_file(model_id: ModelName, file: PathBuf) -> Self {
        Self { file: Some(file), ..Self::named(ModelKey { model_id, version: first_version() }) }
    }

    /// Makes a model that a server runs.
    pub fn on_server(key: ModelKey, server: RemoteServer) -> Self {
        Self { remote: Some(server), ..Self::named(key) }
    }

    fn named(key: ModelKey) -> Self {
        let ModelKey { model_id, version } = key;
        Self {
            model_id,
            version,
            file: None,
            digest: None,
            remote: None,
            server_command: Vec::new(),
            server_sandbox: true,
            server_paths: Vec::new(),
            context_length: 0,
            threads: 0,
            gpu_layers: None,
            kv_tokens: 0,
            prompt_cache_mib: prompt_cache_mib(),
            draft_tokens: draft_tokens(),
            keep_alive_secs: None,
            pin: None,
            kernels: Kernels::default(),
            adapters: Vec::new(),
            pinned_adapter: None,
            adapters_max: adapters_max(),
            is_listed: false,
        }
    }

    fn has_artifact(&self) -> bool {
        self.digest.is_some() || self.file.is_some()
    }

    /// Returns the model's adapter of this name.
    pub fn adapter(&self, name: &AdapterName) -> Option<&ServedAdapter> {
        self.adapters.iter().find(|adapter| adapter.name == *name)
    }

    /// Returns whether a server runs the model, instead of Tether's engine.
    pub(crate) fn is_server(&self) -> bool {
        self.remote.is_some() || !self.server_command.is_empty()
    }

    /// Returns whether a server that the worker starts is in no sandbox.
    pub(crate) fn has_open_server(&self) -> bool {
        !self.server_command.is_empty() && !self.server_sandbox
    }

    /// Returns whether the model is never unloaded, given whether the network pins it. Tether cannot unload a model of
    /// an adopted server.
    pub(crate) fn is_pinned(&self, by_network: bool) -> bool {
        self.pin.unwrap_or(by_network) || self.remote.is_some()
    }

    /// Returns how long the model stays in memory without work, unless a request or an operator sets another time;
    /// `None` for ever.
    pub(crate) fn keep_alive(&self, by_network: Option<i64>) -> Option<Duration> {
        duration_of(self.keep_alive_secs.or(by_network).unwrap_or(KEEP_ALIVE_SECS))
    }

    /// Returns the pinned adapter.
    pub(crate) fn pinned(&self) -> Option<&ServedAdapter> {
        self.adapter(self.pinned_adapter.as_ref()?)
    }

    /// Returns whether the model is served with this adapter, or without one.
    pub(crate) fn serves(&self, adapter: Option<&AdapterName>) -> bool {
        match &self.pinned_adapter {
            Some(pinned) => adapter == Some(pinned),
            None => adapter.is_none_or(|name| self.adapter(name).is_some()),
        }
    }

    /// Returns the key of the pinned adapter.
    pub(crate) fn pinned_key(&self) -> Option<AdapterKey> {
        Some(AdapterKey { model: self.key(), adapter: self.pinned_adapter.clone()? })
    }

    /// Returns the keys of the model's adapters.
    pub(crate) fn adapter_keys(&self) -> impl Iterator<Item = AdapterKey> {
        self.adapters.iter().map(|adapter| AdapterKey { model: self.key(), adapter: adapter.name.clone() })
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.adapters_max == 0 {
            return Err(ConfigError::NoAdapters(self.key()));
        }
        if let Some(pinned) = &self.pinned_adapter {
            let is_only = self.adapters.len() == 1 && self.adapters[0].name == *pinned;
            if !is_only || !self.has_artifact() || !self.server_command.is_empty() {
                return Err(ConfigError::Pinned(self.key()));
            }
        }
        let mut seen = BTreeSet::new();
        match self.adapters.iter().find(|adapter| !seen.insert(&adapter.name)) {
            Some(twice) => Err(ConfigError::AdapterTwice(self.key(), twice.name.clone())),
            None => Ok(()),
        }
    }

    /// Returns name and version.
    pub fn key(&self) -> ModelKey {
        ModelKey { model_id: self.model_id.clone(), version: self.version }
    }

    /// Returns the digest under which the model is registered: that of its artifact, or [`remote_digest`] if a server
    /// runs it.
    pub fn digest(&self) -> Digest {
        let served_as = self.remote.as_ref().map_or(self.model_id.as_str(), |remote| &remote.model);
        self.digest.unwrap_or_else(|| remote_digest(served_as))
    }
}

/// Converts seconds to a duration. Negative numbers mean for ever, for which it returns `None`.
pub(crate) fn duration_of(secs: i64) -> Option<Duration> {
    u64::try_from(secs).ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> ServedModel {
        let (model_id, version) = ("tether-tiny".parse().expect("name"), "1.0".parse().expect("version"));
        ServedModel::new(ModelKey { model_id, version }, Digest::of(b"model"))
    }

    #[test]
    fn a_model_is_computed_without_our_kernels_where_it_says_so() {
        let digest = Digest::of(b"model");
        let read = |more: &str| {
            let text = format!("model_id = \"tether-tiny\"\nversion = \"1.0\"\ndigest = \"{digest}\"\n{more}");
            toml::from_str::<ServedModel>(&text).map(|model| model.kernels)
        };
        assert_eq!(read(""), Ok(Kernels::Auto));
        assert_eq!(read("kernels = \"auto\""), Ok(Kernels::Auto));
        assert_eq!(read("kernels = \"off\""), Ok(Kernels::Off));
        assert!(read("kernels = \"fast\"").is_err());
    }

    #[test]
    fn what_is_done_with_added_models_is_said_by_a_word_or_by_a_flag() {
        let read = |text: &str| toml::from_str::<Config>(text).map(|config| config.catalog);
        for (text, expected) in [
            ("", CatalogUse::Fetch),
            ("catalog = true", CatalogUse::Fetch),
            ("catalog = \"fetch\"", CatalogUse::Fetch),
            ("catalog = \"local\"", CatalogUse::Local),
            ("catalog = \"off\"", CatalogUse::Off),
            ("catalog = false", CatalogUse::Off),
        ] {
            assert_eq!(read(text), Ok(expected), "{text}");
        }
        let error = read("catalog = \"some\"").expect_err("no such word").to_string();
        assert!(error.contains("`local`"), "{error}");
        assert!(toml::to_string(&Config::default()).expect("written").contains("catalog = \"fetch\""));
    }

    #[test]
    fn a_requests_keep_alive_is_kept_within_bounds() {
        let bounded = |min, max, secs| {
            Config { keep_alive_secs_min: min, keep_alive_secs_max: max, ..Config::default() }.bounded_keep_alive(secs)
        };
        for (min, max, secs, expected) in [
            (0, -1, -1, -1),
            (0, -1, 0, 0),
            (0, -1, 7, 7),
            (60, 600, 0, 60),
            (60, 600, 90, 90),
            (60, 600, 9_999, 600),
            (60, 600, -1, 600),
            (0, 0, -1, 0),
        ] {
            assert_eq!(bounded(min, max, secs), expected, "{secs} in {min} to {max}");
        }
    }

    #[test]
    fn a_model_needs_no_more_than_its_name_version_and_digest() {
        let text =
            format!("[[models]]\nmodel_id = \"tether-tiny\"\nversion = \"1.0\"\ndigest = \"{}\"", Digest::of(b"model"));
        let config: Config = toml::from_str(&text).expect("it reads");
        assert_eq!(config, Config { models: vec![model()], ..Config::default() });
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn a_model_comes_from_an_artifact_or_from_a_server_and_not_from_both() {
        let remote =
            RemoteServer { base_url: "http://127.0.0.1:8000".into(), model: "Org/M".into(), api_key_file: None };
        let served = ServedModel { digest: None, remote: Some(remote), ..model() };
        let text = "[[models]]\nmodel_id = \"tether-tiny\"\nversion = \"1.0\"\n[models.remote]\nbase_url = \"http://127.0.0.1:8000\"\nmodel = \"Org/M\"";
        let config: Config = toml::from_str(text).expect("it reads");
        assert_eq!((config.models.as_slice(), config.check()), ([served.clone()].as_slice(), Ok(())));
        assert_eq!(served.digest(), Digest::of(b"remote:Org/M"));
        for unclear in [ServedModel { digest: model().digest, ..served }, ServedModel { digest: None, ..model() }] {
            let config = Config { models: vec![unclear], ..Config::default() };
            assert_eq!(config.check(), Err(ConfigError::Source(model().key())));
        }
    }

    #[test]
    fn a_file_needs_neither_version_nor_digest() {
        let text = "[[models]]\nmodel_id = \"mine\"\nfile = \"/srv/mine.gguf\"";
        let config: Config = toml::from_str(text).expect("it reads");
        let served = ServedModel::of_file("mine".parse().expect("name"), "/srv/mine.gguf".into());
        assert_eq!((config.models.as_slice(), config.check()), ([served].as_slice(), Ok(())));
    }

    #[test]
    fn a_command_needs_an_artifact_and_a_port() {
        let with = |command: &[&str]| {
            let server_command = command.iter().map(|word| (*word).to_owned()).collect();
            Config { models: vec![ServedModel { server_command, ..model() }], ..Config::default() }.check()
        };
        assert_eq!(with(&["llama-server", "-m", "{model}", "--port", "{port}"]), Ok(()));
        assert_eq!(with(&["llama-server", "-m", "{model}"]), Err(ConfigError::Command(model().key())));
    }

    #[test]
    fn an_unknown_field_is_an_error_that_names_it() {
        let error = toml::from_str::<Config>("slot = 1").expect_err("it is called slots");
        assert!(error.to_string().contains("slot"), "{error}");
    }

    #[test]
    fn what_could_never_run_is_refused() {
        assert_eq!(Config { slots: 0, ..Config::default() }.check(), Err(ConfigError::NoSlots));
        let nobody = Config { tenant_jobs_max: Some(0), ..Config::default() };
        assert_eq!(nobody.check(), Err(ConfigError::NoTenantJobs));
        let too_nice = ActivityConfig { nice: 20, ..ActivityConfig::default() };
        assert_eq!(Config { activity: too_nice, ..Config::default() }.check(), Err(ConfigError::TooNice));
        let twice = Config { models: vec![model(), model()], ..Config::default() };
        assert_eq!(twice.check(), Err(ConfigError::ModelTwice(model().key())));
        let pirate = ServedAdapter { name: "pirate".parse().expect("name"), digest: Digest::of(b"adapter") };
        let with = |model| Config { models: vec![model], ..Config::default() }.check();
        let other = ServedAdapter { name: "other".parse().expect("name"), ..pirate.clone() };
        let pinned = |adapters: &[&ServedAdapter]| ServedModel {
            adapters: adapters.iter().map(|adapter| (*adapter).clone()).collect(),
            pinned_adapter: Some(pirate.name.clone()),
            ..model()
        };
        assert_eq!(with(pinned(&[&pirate])), Ok(()));
        for adapters in [&[][..], &[&other], &[&pirate, &other]] {
            assert_eq!(with(pinned(adapters)), Err(ConfigError::Pinned(model().key())));
        }
        let twice = ServedModel { adapters: vec![pirate.clone(), pirate.clone()], ..model() };
        assert_eq!(with(twice), Err(ConfigError::AdapterTwice(model().key(), pirate.name)));
        assert_eq!(with(ServedModel { adapters_max: 0, ..model() }), Err(ConfigError::NoAdapters(model().key())));
    }
}
