//! What a worker serves, and within which limits.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use protocol::model::{AdapterKey, ModelKey, remote_digest};
use protocol::{AdapterName, Digest, ModelName, ModelVersion, Region};
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// The configuration of one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the worker stands; it serves the orchestrators of this region. The program sets it.
    #[serde(skip)]
    pub region: Region,
    /// The models it serves.
    pub models: Vec<ServedModel>,
    /// The models that `tether model add` brought, each loaded when somebody asks for it: `fetch` serves all that this
    /// node could hold and fetches their files from other nodes, `local` those whose files are in its store, `off`
    /// none.
    pub catalog: CatalogUse,
    /// Disk that files may take together which were fetched from other nodes, in MiB; 0 takes what is free. The least
    /// recently used make room, and a GiB of the disk always stays free.
    pub disk_max_mib: u64,
    /// Jobs that run side by side at most; each model is loaded with as many sequences.
    pub slots: u32,
    /// Jobs that may wait; one more is refused.
    pub queue_max: u32,
    /// Jobs of one tenant, running and waiting, at most; missing for no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_jobs_max: Option<u32>,
    /// Loads the models at the start, as far as they fit, and not at their first job.
    pub preload: bool,
    /// Memory that the models may take together, in MiB; 0 takes what the machine has free. What is not in use makes
    /// room for what is asked for.
    pub memory_max_mib: u64,
    /// Memory of GPUs that all models may take together, in MiB; 0 takes what is free when the worker starts.
    pub vram_max_mib: u64,
    /// The shortest and the longest `keep_alive` of a request that is followed, in seconds; -1 for any. Other requests
    /// get the nearest of the two.
    pub keep_alive_secs_min: i64,
    /// The longest; see the shortest.
    pub keep_alive_secs_max: i64,
    /// Seconds that jobs have to end when the worker stops.
    pub drain_secs: u64,
    /// Seconds that a server which answers for a model may be silent before the first token of an answer. It fails the
    /// job then, which goes to another worker where there is one. A server says nothing while a request waits its turn
    /// there or its prompt is read, so busy servers with long prompts need more.
    pub server_stall_secs: u64,
    /// Network hops to the region's centre; fewer is nearer.
    pub latency_hops: u32,
}

/// What a worker does with models that operators added. `true` and `false` stand for `fetch` and `off`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CatalogUse {
    /// Serves them, and fetches their files where they are asked for.
    #[default]
    Fetch,
    /// Serves those whose files are here.
    Local,
    /// Keeps to the models of its settings.
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
    /// Its name.
    pub model_id: ModelName,
    /// Its version, as `MAJOR.MINOR`.
    #[serde(default = "first_version")]
    pub version: ModelVersion,
    /// A GGUF file of this machine. It is copied into the artifact store at the start, unless it is there already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// SHA-256 of its artifact. Where a file is named, it need not be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// A server that runs already and answers for it, in place of an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteServer>,
    /// A program that serves its artifact in place of the engine, and its arguments. `{model}` stands for the file and
    /// `{port}` for the port to listen on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub server_command: Vec<String>,
    /// Tokens of context per job; 0 takes what the model was trained with, at most 8192 and less where memory is short.
    #[serde(default)]
    pub context_length: u32,
    /// Threads for decoding, no more than there are cores; 0 takes all cores, or all but one where there are more than
    /// two.
    #[serde(default)]
    pub threads: u32,
    /// Layers to place on a GPU; 0 keeps all on the CPU, and where it is missing as many are placed as fit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_layers: Option<u32>,
    /// Tokens that all jobs together can hold; 0 takes 8192, at least one context and at most one for each slot. More
    /// lets more long jobs run side by side.
    #[serde(default)]
    pub kv_tokens: u32,
    /// Memory for conversations that lost their place in the engine, in MiB; they need not be evaluated again.
    #[serde(default = "prompt_cache_mib")]
    pub prompt_cache_mib: u64,
    /// Tokens that a repeated passage may suggest at once, at most 16; 0 does not speculate. Answers stay the same.
    #[serde(default = "draft_tokens")]
    pub draft_tokens: u32,
    /// Seconds without work after which it is unloaded; it is loaded again when somebody asks for it. -1 keeps it for
    /// ever. Where it is missing, it is what the network says of the model, and else 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
    /// Loads it at the start, and never unloads it to make room for others or because nobody uses it. Where it is
    /// missing, `tether model pin` decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin: Option<bool>,
    /// Whose kernels compute it on a CPU: `auto` takes Tether's where the processor has AVX-512 and VNNI, `off` leaves
    /// all to ggml, slower, and then an answer at temperature 0 may change in a rare word when it is asked for again.
    #[serde(default)]
    pub kernels: Kernels,
    /// The LoRA adapters it is served with; each is attached at its first job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<ServedAdapter>,
    /// The name of its one adapter, where it serves it with that and no longer without: jobs with it go here, all
    /// others elsewhere. It is merged into the weights at the load where these are of 8 bits and more, and costs
    /// nothing then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned_adapter: Option<AdapterName>,
    /// Adapters attached at once, at most; the one unused for longest makes room.
    #[serde(default = "adapters_max")]
    pub adapters_max: u32,
    /// The registry listed it, so that it need not be offered. The program sets it.
    #[serde(skip)]
    pub is_listed: bool,
}

/// Whose kernels compute a model on a CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kernels {
    /// Tether's where they can.
    #[default]
    Auto,
    /// Those of ggml.
    Off,
}

/// A server of OpenAI's API that was started by somebody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RemoteServer {
    /// Its address, such as `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// The model's name on that server.
    pub model: String,
    /// File that holds the server's API key; missing where it asks for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
}

/// An adapter of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServedAdapter {
    /// Its name.
    pub name: AdapterName,
    /// SHA-256 of its artifact.
    pub digest: Digest,
}

fn first_version() -> ModelVersion {
    ModelVersion { major: 1, minor: 0 }
}

/// Five minutes, as Ollama does.
const KEEP_ALIVE_SECS: i64 = 300;

fn prompt_cache_mib() -> u64 {
    256
}

/// As many rows as are evaluated at nearly the price of one.
fn draft_tokens() -> u32 {
    3
}

fn adapters_max() -> u32 {
    4
}

/// The most adapters of all models together; health reports name each.
const ADAPTERS_TOLD_MAX: usize = 256;

/// Why a configuration makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Nothing could ever run.
    #[error("slots must be at least 1")]
    NoSlots,
    /// A tenant could never run anything.
    #[error("tenant_jobs_max must be at least 1, or missing for no limit")]
    NoTenantJobs,
    /// Every server would count as hung.
    #[error("server_stall_secs must be at least 1")]
    NoServerStall,
    /// Nothing, or two things, would answer for a model.
    #[error("{0} needs either a file (or the digest of one in the store) or a remote server")]
    Source(ModelKey),
    /// A command that cannot serve an artifact.
    #[error("server_command of {0} needs a file or a digest, and must say where {{port}} goes")]
    Command(ModelKey),
    /// A model stands in the list twice.
    #[error("models has {0} more than once")]
    ModelTwice(ModelKey),
    /// An adapter stands in the list of its model twice.
    #[error("{0} has the adapter {1} more than once")]
    AdapterTwice(ModelKey, AdapterName),
    /// There are more adapters than a health report can name.
    #[error("models has more than {ADAPTERS_TOLD_MAX} adapters")]
    TooManyAdapters,
    /// A pinned adapter that is not the one its model has.
    #[error(
        "pinned_adapter of {0} must be the one adapter in its list, of a model with a file or digest and no server_command"
    )]
    Pinned(ModelKey),
    /// An adapter could never be attached.
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
            drain_secs: 30,
            server_stall_secs: 120,
            latency_hops: 0,
        }
    }
}

impl Config {
    /// Checks what types cannot.
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

    /// Returns the `keep_alive` of a request within the bounds.
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

    /// Returns how long jobs have to end when the worker stops.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_secs)
    }
}

impl ServedModel {
    /// Returns a model of an artifact, loaded as it was made and without adapters.
    pub fn new(key: ModelKey, digest: Digest) -> Self {
        Self { digest: Some(digest), ..Self::named(key) }
    }

    /// Returns a model of a file that has yet to be taken into the store.
    pub fn of_file(model_id: ModelName, file: PathBuf) -> Self {
        Self { file: Some(file), ..Self::named(ModelKey { model_id, version: first_version() }) }
    }

    /// Returns a model that a server answers for.
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

    /// Returns an adapter that it is served with.
    pub fn adapter(&self, name: &AdapterName) -> Option<&ServedAdapter> {
        self.adapters.iter().find(|adapter| adapter.name == *name)
    }

    /// Returns whether a server answers for it, and not an engine of ours.
    pub(crate) fn is_server(&self) -> bool {
        self.remote.is_some() || !self.server_command.is_empty()
    }

    /// Returns whether it stays in memory whatever happens, where the network pins it or not. A model on another
    /// program's server is not ours to unload.
    pub(crate) fn is_pinned(&self, by_network: bool) -> bool {
        self.pin.unwrap_or(by_network) || self.remote.is_some()
    }

    /// Returns how long it stays in memory without work, unless a request or an operator says otherwise; `None` for
    /// ever.
    pub(crate) fn keep_alive(&self, by_network: Option<i64>) -> Option<Duration> {
        duration_of(self.keep_alive_secs.or(by_network).unwrap_or(KEEP_ALIVE_SECS))
    }

    /// Returns the adapter that it is always served with.
    pub(crate) fn pinned(&self) -> Option<&ServedAdapter> {
        self.adapter(self.pinned_adapter.as_ref()?)
    }

    /// Returns whether it is served with this adapter, or without one.
    pub(crate) fn serves(&self, adapter: Option<&AdapterName>) -> bool {
        match &self.pinned_adapter {
            Some(pinned) => adapter == Some(pinned),
            None => adapter.is_none_or(|name| self.adapter(name).is_some()),
        }
    }

    /// Returns the name of the adapter that it is always served with, its own name with it.
    pub(crate) fn pinned_key(&self) -> Option<AdapterKey> {
        Some(AdapterKey { model: self.key(), adapter: self.pinned_adapter.clone()? })
    }

    /// Returns the names of its adapters, its own name with each.
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

    /// Returns what it is registered under: its artifact's digest, or what stands for it where a server answers.
    pub fn digest(&self) -> Digest {
        let served_as = self.remote.as_ref().map_or(self.model_id.as_str(), |remote| &remote.model);
        self.digest.unwrap_or_else(|| remote_digest(served_as))
    }
}

/// Returns a time in seconds; `None` for ever, which all negative ones stand for.
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
