//! Settings, which are read once. Flags take precedence over `TETHER_*` variables, these over the file, and the file
//! over the defaults.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use config::{Environment, File, FileFormat};
use observability::logs::LogFormat;
use protocol::Region;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::args::Common;
use crate::kept_flags::KeptFlags;
use crate::output::{self, nearest};
use crate::tiny_model;

mod example;

pub use example::example;

/// All settings of the program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Version of the file format: 1.
    pub version: u32,
    /// Region of this machine.
    pub region: Region,
    /// Folder for keys, stores and models; the user's data folder by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,
    /// Number of workers that `tether up` runs.
    pub workers: u32,
    /// Model files that the workers of this machine serve in addition to `worker.models`, each as `FILE` or
    /// `NAME=FILE`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// URLs of running servers whose models the workers of this machine also serve. An empty list searches this
    /// machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adopt: Option<Vec<String>>,
    /// Number of threads for the network; 0 uses half of the cores, because engines need the others.
    pub threads: u32,
    /// HTTP address on which a service of this machine serves its Prometheus metrics under /metrics, such as
    /// 127.0.0.1:9100. A gateway also serves them on its own address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// How nodes find and reach each other.
    pub network: NetworkSettings,
    /// What to log, and in which format.
    pub log: LogSettings,
    /// Settings of gateways, which accept requests.
    pub gateway: gateway::Config,
    /// Settings of orchestrators, which place jobs on workers.
    pub orchestrator: orchestrator::Config,
    /// Settings of workers, which load models and run jobs.
    pub worker: worker::Config,
}

/// How nodes find and reach each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkSettings {
    /// IPv4 UDP address that this node listens on; port 0 picks a free port.
    #[serde(deserialize_with = "udp_address")]
    pub listen: SocketAddrV4,
    /// UDP address on which other machines may join the network of `tether up`. If omitted, none can join.
    #[serde(deserialize_with = "some_udp_address", skip_serializing_if = "Option::is_none")]
    pub up_listen: Option<SocketAddrV4>,
    /// Bootstrap nodes, as `host:port`. A node that joined with an invite knows those of its network.
    pub bootstrap: Vec<String>,
    /// IPv4 address at which other machines reach this node, such as 203.0.113.7, if the machine does not have it
    /// itself: behind a router that forwards the port, or in a cloud. It wins over what other nodes report. The port
    /// is the one that the node listens on.
    #[serde(deserialize_with = "some_public_address", skip_serializing_if = "Option::is_none")]
    pub public_address: Option<Ipv4Addr>,
    /// Seconds for which gateways and orchestrators use cached keys, models and rules while no registry responds. After
    /// that they refuse all requests until one does.
    pub registry_absence_secs: u64,
}

/// Reads a UDP address. The error shows an example.
fn udp_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SocketAddrV4, D::Error> {
    let text = String::deserialize(deserializer)?;
    let malformed = |what: &str| {
        serde::de::Error::custom(format!(
            "{text:?} {what}; write ADDRESS:PORT with an IPv4 address, such as 0.0.0.0:49737"
        ))
    };
    match text.parse() {
        Ok(SocketAddr::V4(address)) => Ok(address),
        Ok(SocketAddr::V6(_)) => Err(malformed("is an IPv6 address, and nodes speak IPv4 with each other")),
        Err(_) => Err(malformed("is not a UDP address")),
    }
}

fn some_udp_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddrV4>, D::Error> {
    udp_address(deserializer).map(Some)
}

/// Reads an address at which others can reach a node. The error shows an example.
fn some_public_address<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Ipv4Addr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let address = text
        .parse()
        .ok()
        .filter(|address: &Ipv4Addr| !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast());
    let malformed = || {
        let example = "write an IPv4 address without a port, such as 203.0.113.7";
        serde::de::Error::custom(format!("{text:?} is not an address of one machine; {example}"))
    };
    address.map(Some).ok_or_else(malformed)
}

/// Returns the address with port 0, for which the system picks a free port.
pub fn any_port(address: SocketAddrV4) -> SocketAddrV4 {
    SocketAddrV4::new(*address.ip(), 0)
}

/// What to log, and in which format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// Log format: `pretty` or `json`.
    pub format: String,
    /// Log filter, such as `info` or `info,tether_gateway=debug`.
    pub filter: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            version: 1,
            region: "local".parse().expect("a well-formed region"),
            data_dir: None,
            workers: 1,
            models: vec![],
            adopt: None,
            threads: 0,
            metrics_listen: None,
            network: NetworkSettings::default(),
            log: LogSettings::default(),
            gateway: gateway::Config::default(),
            orchestrator: orchestrator::Config::default(),
            worker: worker::Config { models: vec![tiny_model::served()], ..worker::Config::default() },
        }
    }
}

impl Default for NetworkSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0),
            up_listen: None,
            bootstrap: vec![],
            public_address: None,
            registry_absence_secs: 600,
        }
    }
}

impl NetworkSettings {
    /// Adds bootstrap nodes.
    #[must_use]
    pub fn and(&self, bootstrap: &[String]) -> Self {
        let mut all = self.clone();
        for name in bootstrap {
            if !all.bootstrap.contains(name) {
                all.bootstrap.push(name.clone());
            }
        }
        all
    }

    /// Resolves the addresses of the bootstrap nodes. A name without an address is skipped and logged. If no name has
    /// one, this is an error.
    pub async fn bootstrap_addresses(&self) -> anyhow::Result<Vec<SocketAddrV4>> {
        let mut addresses = vec![];
        let mut failed = None;
        for name in &self.bootstrap {
            let found = tokio::net::lookup_host(name).await.map(|mut found| {
                found.find_map(|address| match address {
                    SocketAddr::V4(address) => Some(address),
                    SocketAddr::V6(_) => None,
                })
            });
            match found {
                Ok(Some(address)) => addresses.push(address),
                Ok(None) => failed = Some(anyhow!("bootstrap node {name} has no IPv4 address")),
                Err(error) => failed = Some(anyhow!("bootstrap node {name} cannot be found: {error}")),
            }
        }
        match failed {
            Some(error) if addresses.is_empty() => Err(error),
            Some(error) => {
                warn!("{error}");
                Ok(addresses)
            }
            None => Ok(addresses),
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { format: "pretty".to_owned(), filter: "info".to_owned() }
    }
}

impl LogSettings {
    /// Returns how logs are written.
    pub fn format(&self) -> anyhow::Result<LogFormat> {
        match self.format.as_str() {
            "pretty" => Ok(LogFormat::Pretty),
            "json" => Ok(LogFormat::Json),
            other => bail!("log.format is {other:?}; write \"pretty\" or \"json\""),
        }
    }
}

/// The part of the environment that settings come from.
#[derive(Debug, Clone, Default)]
pub struct Env(BTreeMap<String, String>);

/// Variables of this program that are not settings.
const NO_SETTINGS: [&str; 4] = ["TETHER_CONFIG", "TETHER_URL", "TETHER_API_KEY", "TETHER_CA"];

impl Env {
    /// Reads the environment of this process.
    pub fn of_process() -> Self {
        // Values that are not text cannot be settings.
        Self(
            std::env::vars_os()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
                .collect(),
        )
    }

    /// Returns a variable, unless it is empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn folder(&self, name: &str, below_home: &str) -> Option<PathBuf> {
        let folder =
            self.get(name).map(PathBuf::from).or_else(|| Some(Path::new(self.get("HOME")?).join(below_home)))?;
        Some(folder.join("tether"))
    }

    /// Returns the user's configuration folder for this program.
    pub fn config_folder(&self) -> Option<PathBuf> {
        self.folder("XDG_CONFIG_HOME", ".config")
    }

    /// Returns the user's data folder for this program.
    pub fn data_folder(&self) -> Option<PathBuf> {
        self.folder("XDG_DATA_HOME", ".local/share")
    }

    /// Returns the variables that are settings, and the other `TETHER_*` variables.
    fn settings(&self) -> (config::Map<String, String>, Vec<&str>) {
        let known: BTreeSet<String> = example::names().iter().map(|name| variable(name)).collect();
        let ours = |name: &str| name.starts_with("TETHER_") && !NO_SETTINGS.contains(&name);
        let (settings, unknown): (Vec<_>, Vec<_>) =
            self.0.iter().filter(|(name, _)| ours(name)).partition(|(name, _)| known.contains(*name));
        let settings = settings.into_iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        (settings, unknown.into_iter().map(|(name, _)| name.as_str()).collect())
    }
}

/// Returns the variable of a setting: `TETHER_GATEWAY__BIND` for `gateway.bind`.
fn variable(setting: &str) -> String {
    format!("TETHER_{}", setting.to_uppercase().replace('.', "__"))
}

/// Returns a note that a variable is not a setting, with the setting that may be meant.
fn unknown_variable(name: &str) -> String {
    let variables: Vec<String> = example::names().iter().map(|name| variable(name)).collect();
    // Most often two underscores are missing.
    let plain = |name: &str| name.replace('_', "");
    let meant = variables.iter().find(|known| plain(known) == plain(name)).map(String::as_str);
    let meant = meant.or_else(|| nearest(name, variables.iter().map(String::as_str)));
    let hint = meant.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
    format!("the variable {name} is not a setting and is ignored{hint}")
}

/// Returns the setting that is likely meant by a field that an error calls unknown.
fn meant_setting(error: &str) -> Option<String> {
    let (_, rest) = error.split_once("unknown field `")?;
    let (mistyped, _) = rest.split_once('`')?;
    let names = example::names();
    let meant = nearest(mistyped, names.iter().flat_map(|name| name.split('.')))?;
    // The whole name, unless a table is meant.
    let whole = names.iter().find(|name| name.rsplit('.').next() == Some(meant));
    Some(whole.map_or(meant, String::as_str).to_owned())
}

/// Inserts the dot that the `config` crate omits after an index: `models[0]digest`.
fn dotted(error: &str) -> String {
    let mut text = String::new();
    for letter in error.chars() {
        if text.ends_with(']') && letter.is_ascii_alphabetic() {
            text.push('.');
        }
        text.push(letter);
    }
    text
}

/// A setting that was given on the command line.
pub type Flag = (&'static str, config::Value);

/// Reads all settings. `flags` are pairs such as `("gateway.bind", "127.0.0.1:0")`.
pub fn load(common: &Common, env: &Env, flags: &[Flag]) -> anyhow::Result<Settings> {
    load_with(common, env, None, flags)
}

/// Reads all settings of a node. The flags that it keeps from earlier starts count like flags.
pub fn load_with(common: &Common, env: &Env, kept: Option<&KeptFlags>, flags: &[Flag]) -> anyhow::Result<Settings> {
    let defaults = config::Config::try_from(&Settings::default()).context("the defaults do not read")?;
    let mut builder = config::Config::builder().add_source(defaults);
    let file = match &common.config {
        Some(file) if !file.exists() => bail!("there is no settings file {}", file.display()),
        Some(file) => Some(file.clone()),
        None => env.config_folder().map(|folder| folder.join("tether.toml")).filter(|file| file.exists()),
    };
    if let Some(file) = &file {
        let text = std::fs::read_to_string(file).with_context(|| format!("could not read {}", file.display()))?;
        builder = builder.add_source(File::from_str(&text, FileFormat::Toml));
    }
    let (variables, unknown) = env.settings();
    for name in unknown {
        output::note(unknown_variable(name));
    }
    let environment = Environment::with_prefix("TETHER")
        .prefix_separator("_")
        .separator("__")
        .list_separator(",")
        .with_list_parse_key("network.bootstrap")
        .with_list_parse_key("models")
        .with_list_parse_key("orchestrator.near_regions")
        .try_parsing(true)
        .source(Some(variables));
    builder = builder.add_source(environment);
    if let Some(kept) = kept {
        builder = builder.add_source(File::from_str(&kept.to_toml(), FileFormat::Toml));
    }
    if let Some(folder) = &common.data_dir {
        builder = builder.set_override("data_dir", folder.display().to_string())?;
    }
    if let Some(format) = common.log_format {
        builder = builder.set_override("log.format", format.as_str())?;
    }
    for (name, value) in flags {
        builder = builder.set_override(*name, value.clone())?;
    }
    let origin =
        file.map_or_else(|| "the settings".to_owned(), |file| format!("the settings (file {})", file.display()));
    let mut settings: Settings = builder.build().and_then(config::Config::try_deserialize).map_err(|error| {
        let context = match meant_setting(&error.to_string()) {
            Some(meant) => format!("{origin} cannot be used: did you mean {meant}?"),
            None => format!("{origin} cannot be used; `tether config example` shows every setting"),
        };
        anyhow!(dotted(&error.to_string())).context(context)
    })?;
    check(&settings).with_context(|| format!("{origin} cannot be used"))?;
    settings.gateway.region = settings.region.clone();
    settings.worker.region = settings.region.clone();
    let absence = Duration::from_secs(settings.network.registry_absence_secs);
    (settings.gateway.registry_absence, settings.orchestrator.registry_absence) = (absence, absence);
    Ok(settings)
}

fn check(settings: &Settings) -> anyhow::Result<()> {
    if settings.version != 1 {
        bail!("version is {}, and this program reads version 1", settings.version);
    }
    if settings.threads > 256 {
        bail!("threads is {}; at most 256 serve the network", settings.threads);
    }
    if settings.workers > 64 {
        bail!("workers is {}; one process runs at most 64", settings.workers);
    }
    for name in &settings.network.bootstrap {
        let port = name.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) {
            bail!("network.bootstrap has {name:?}; write host:port, such as 192.0.2.1:49737");
        }
    }
    settings.log.format()?;
    settings.worker.check().context("worker")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Env {
        Env(pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
    }

    fn file(text: &str) -> (tempfile::TempDir, Common) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tether.toml");
        std::fs::write(&path, text).expect("written");
        (folder, Common { config: Some(path), ..Common::default() })
    }

    #[test]
    fn flags_win_over_variables_over_the_file_over_defaults() {
        let (_folder, common) = file("workers = 3\nregion = \"eu-west\"\n[gateway]\nbind = \"127.0.0.1:1\"\n");
        let env = env(&[("TETHER_REGION", "us-east"), ("TETHER_GATEWAY__BIND", "127.0.0.1:2")]);
        let settings = load(&common, &env, &[("gateway.bind", "127.0.0.1:3".into())]).expect("good");
        assert_eq!(settings.workers, 3);
        assert_eq!(settings.region.as_str(), "us-east");
        assert_eq!(settings.worker.region, settings.region);
        assert_eq!(settings.gateway.bind.port(), 3);
        assert_eq!(settings.orchestrator, orchestrator::Config::default());
    }

    #[test]
    fn a_table_that_is_given_in_part_keeps_the_rest_of_its_defaults() {
        let (_folder, common) = file("[worker]\nslots = 2\n[gateway.rate_limit]\nburst = 5\n");
        let settings = load(&common, &Env::default(), &[]).expect("good");
        assert_eq!(settings.worker.slots, 2);
        assert_eq!(settings.worker.models, Settings::default().worker.models);
        assert_eq!(settings.gateway.rate_limit.requests_per_minute, 600);
    }

    #[test]
    fn a_setting_in_a_list_is_named_as_it_is_written() {
        assert_eq!(dotted("for key `worker.models[0]digest`"), "for key `worker.models[0].digest`");
        assert_eq!(dotted("no [table] here, a[0]"), "no [table] here, a[0]");
    }

    #[test]
    fn the_example_is_the_defaults() {
        let (_folder, common) = file(&example().expect("written"));
        assert_eq!(load(&common, &Env::default(), &[]).expect("good"), Settings::default());
    }

    #[test]
    fn a_variable_that_is_not_a_setting_is_ignored_and_named() {
        let (_folder, common) = file("");
        let env = env(&[("TETHER_GATEWAY_BIND", "127.0.0.1:9"), ("TETHER_REGION", "us-east")]);
        let settings = load(&common, &env, &[]).expect("an unknown variable does no harm");
        assert_eq!((settings.region.as_str(), settings.gateway.bind.port()), ("us-east", 7070));
        for (name, hint) in [
            ("TETHER_GATEWAY_BIND", "did you mean TETHER_GATEWAY__BIND?"),
            ("TETHER_REGOIN", "did you mean TETHER_REGION?"),
            ("TETHER_SOMETHING_ELSE", "is ignored"),
        ] {
            let message = unknown_variable(name);
            assert!(message.contains(name) && message.ends_with(hint), "{message}");
        }
    }

    #[test]
    fn bad_settings_are_errors_that_name_the_setting() {
        for (text, word) in [
            ("wrokers = 3", "wrokers"),
            ("wrokers = 3", "did you mean workers?"),
            ("[gateway]\nbnid = \"127.0.0.1:1\"", "did you mean gateway.bind?"),
            ("nothing_like_it = 3", "tether config example"),
            ("[gateway]\nbind = \"nowhere\"", "bind"),
            ("[gateway]\nbody_bytes_max = \"big\"", "body_bytes_max"),
            ("region = \"EU West\"", "region"),
            ("version = 2", "version"),
            ("[log]\nformat = \"xml\"", "format"),
            ("[worker]\nslots = 0", "slots"),
            ("workers = 1\nworkers = 2", "workers"),
            ("[gateway", "line"),
            ("[network]\nlisten = \"[::]:49737\"", "0.0.0.0:49737"),
            ("[network]\nlisten = \"[::]:49737\"", "IPv6"),
            ("[network]\nlisten = \"49737\"", "ADDRESS:PORT"),
            ("[network]\npublic_address = \"0.0.0.0\"", "203.0.113.7"),
            ("[network]\npublic_address = \"203.0.113.7:49737\"", "without a port"),
            ("[network]\nlisten = \"nas.local:49737\"", "IPv4"),
        ] {
            let (_folder, common) = file(text);
            let error = format!("{:#}", load(&common, &Env::default(), &[]).expect_err(text));
            assert!(error.contains(word), "{text:?} gave {error:?}");
        }
        let missing = Common { config: Some("/nowhere/tether.toml".into()), ..Common::default() };
        assert!(load(&missing, &Env::default(), &[]).is_err());
    }
}
