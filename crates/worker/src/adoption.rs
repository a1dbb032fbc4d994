//! Adopts the models of OpenAI-compatible servers as they appear, and drops those that are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use engine::remote::dialect::{Dialect, Listed};
use engine::remote::{AddressError, MODELS_MAX, RemoteRuntime, ServerAddress, Survey};
use futures_util::future::join_all;
use protocol::control::{CATALOG_LIST, Catalog, Empty, NodeRole};
use protocol::model::{ModelKey, remote_digest};
use protocol::{ModelName, ModelVersion};
use rpc::{Client, Directory};
use tokio::sync::watch;
use tokio::time::{self, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::{RemoteServer, ServedModel};
use crate::model_loader::ModelLoader;
use crate::model_loader::cache::Status;

/// Default ports of Ollama, LM Studio, vLLM, SGLang, and (two) of llama-server.
const PORTS: [u16; 6] = [11_434, 1_234, 8_000, 30_000, 8_080, 8_081];
/// Timeout of each request to a server of this machine.
const HERE_WITHIN: Duration = Duration::from_millis(500);
/// Timeout of each request to any other server.
const ELSEWHERE_WITHIN: Duration = Duration::from_secs(5);
/// How often servers are polled.
const EVERY: Duration = Duration::from_secs(5);
/// How long to wait for a registry to be found at the start, and for its response.
const REGISTRY_WITHIN: Duration = Duration::from_secs(2);
/// A model is dropped after this many polls in a row in which its server responds but does not list it.
const UNLISTED_MAX: u32 = 2;
/// A model is dropped after this many polls in a row without a response from its server, which may only be restarting.
const SILENT_MAX: u32 = 12;
/// The most models of one server that are given names over time: the registry keeps each of them.
const NAMED_MAX: usize = 2 * MODELS_MAX;
/// The version under which servers' models are listed.
const VERSION: ModelVersion = ModelVersion { major: 1, minor: 0 };

/// OpenAI-compatible servers whose models a worker serves as well.
pub struct Adoption {
    servers: Vec<ServerAddress>,
    within: Duration,
    runtime: RemoteRuntime,
}

/// A server's URL cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{url} cannot be adopted")]
pub struct AdoptionError {
    url: String,
    source: AddressError,
}

impl Adoption {
    /// Adopts the servers at these URLs, or those on the default ports of this machine if none is given.
    pub fn new(urls: &[String]) -> Result<Self, AdoptionError> {
        let usual: Vec<String> = PORTS.map(|port| format!("http://127.0.0.1:{port}")).into();
        let (urls, within) = if urls.is_empty() { (&usual[..], HERE_WITHIN) } else { (urls, ELSEWHERE_WITHIN) };
        let server =
            |url: &String| ServerAddress::new(url, None).map_err(|source| AdoptionError { url: url.clone(), source });
        let servers = urls.iter().map(server).collect::<Result<_, _>>()?;
        Ok(Self { servers, within, runtime: RemoteRuntime::default() })
    }

    /// Returns the servers' addresses, for display.
    pub fn addresses(&self) -> String {
        self.servers.iter().map(ServerAddress::as_str).collect::<Vec<_>>().join(", ")
    }

    /// Asks every server for its models. The result is `None` for a server that does not respond.
    async fn look(&self) -> Vec<(&ServerAddress, Option<Survey>)> {
        let surveys = self.servers.iter().map(|server| self.runtime.survey(server, self.within));
        let surveys = join_all(surveys).await.into_iter().map(Result::ok);
        self.servers.iter().zip(surveys).collect()
    }
}

/// A model of a server: the server's address, and the model's name there.
type Source = (String, String);

#[derive(Debug, PartialEq, Eq)]
struct Adopted {
    key: ModelKey,
    /// Polls in a row in which the server responded and did not list it.
    unlisted: u32,
    /// Polls in a row in which the server did not respond.
    silent: u32,
}

/// Keeps a worker's adopted models equal to those of the servers. Models of its configuration are left alone.
pub(crate) struct AdoptionWatch {
    adoption: Adoption,
    client: Client,
    directory: Directory,
    loader: Arc<ModelLoader>,
    adopted: BTreeMap<Source, Adopted>,
    /// Every model that was ever given a name.
    named: BTreeSet<Source>,
    /// Models that could not be named, so that each is reported once.
    nameless: BTreeSet<Source>,
    /// How many models the last poll found; `None` before the first poll.
    looked: watch::Sender<Option<usize>>,
}

impl AdoptionWatch {
    /// Creates a watch that publishes how many models it found.
    pub(crate) fn new(
        adoption: Adoption,
        client: Client,
        directory: Directory,
        loader: Arc<ModelLoader>,
        looked: watch::Sender<Option<usize>>,
    ) -> Self {
        let (adopted, named, nameless) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { adoption, client, directory, loader, adopted, named, nameless, looked }
    }

    /// Polls the servers until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let watching = async {
            let mut ticks = time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            self.directory.wait_for(NodeRole::Registry, REGISTRY_WITHIN).await;
            loop {
                ticks.tick().await;
                self.reconcile().await;
                if self.looked.send_replace(Some(self.adopted.len())).is_none() && self.adopted.is_empty() {
                    let at = self.adoption.addresses();
                    warn!(at, "no server to adopt answers, or none has a model; looking again every 5 s");
                }
            }
        };
        stop.run_until_cancelled(watching).await;
    }

    async fn reconcile(&mut self) {
        let found = self.adoption.look().await;
        let found: Vec<(String, Option<Survey>)> =
            found.into_iter().map(|(server, survey)| (server.as_str().to_owned(), survey)).collect();
        for source in gone(&mut self.adopted, &found) {
            if let Some(adopted) = self.adopted.remove(&source) {
                info!(server = source.0, model = source.1, name = %adopted.key, "the server no longer has the model");
                self.loader.let_go(&adopted.key);
            }
        }
        let new: Vec<(String, Dialect, Listed)> = new(&self.adopted, &found);
        let is_seen = |(server, model): &Source| {
            let survey = found.iter().find(|(url, _)| url == server).and_then(|(_, survey)| survey.as_ref());
            survey.is_some_and(|survey| survey.models.iter().any(|listed| listed.name == *model))
        };
        self.nameless.retain(is_seen);
        let failed: Vec<Source> = self.failed();
        if new.is_empty() && failed.is_empty() {
            return;
        }
        // Without a registry no model is listed, and no name can be chosen.
        let Some(catalog) = self.catalog().await else { return };
        for source in failed {
            self.let_go_of_reused_name(&source, &catalog);
        }
        for (server, dialect, listed) in new {
            self.take_up(server, dialect, listed, &catalog);
        }
    }

    /// Returns the models that could not be attached, for whatever reason.
    fn failed(&self) -> Vec<Source> {
        let has_failed = |key: &ModelKey| {
            let entry = self.loader.cache().find(key);
            entry.is_some_and(|entry| matches!(*entry.status.borrow(), Status::Failed(_)))
        };
        self.adopted.iter().filter(|(_, adopted)| has_failed(&adopted.key)).map(|(source, _)| source.clone()).collect()
    }

    /// Drops a model whose name another model has taken since it was chosen. The next poll gives it a free name.
    fn let_go_of_reused_name(&mut self, source: &Source, catalog: &Catalog) {
        let Some(adopted) = self.adopted.get(source) else { return };
        if !is_free(&adopted.key.model_id, &source.1, catalog, &BTreeSet::new()) {
            info!(server = source.0, model = source.1, name = %adopted.key, "the name is another model's now");
            self.loader.let_go(&adopted.key);
            self.adopted.remove(source);
        }
    }

    fn take_up(&mut self, server: String, dialect: Dialect, listed: Listed, catalog: &Catalog) {
        let source = (server.clone(), listed.name.clone());
        let model = listed.name.as_str();
        let of_server = self.named.iter().filter(|(url, _)| *url == server).count();
        if of_server >= NAMED_MAX && !self.named.contains(&source) {
            if self.nameless.insert(source) {
                warn!(server, model, "not adopted: the server has had {NAMED_MAX} models since this worker started");
            }
            return;
        }
        let here: BTreeSet<ModelName> =
            self.loader.cache().entries().iter().map(|entry| entry.key.model_id.clone()).collect();
        let Some((name, wanted)) = name_of(model, dialect, |name| is_free(name, model, catalog, &here)) else {
            if self.nameless.insert(source) {
                warn!(server, model, "not adopted: no name that is free can be made of the model's");
            }
            return;
        };
        info!(server, dialect = dialect.as_str(), model, %name, "adopted");
        if name != wanted {
            info!(
                "{wanted} is another model's name already; if it is the same model, \
                 `tether model alias {wanted} {wanted} {name}` has both answer under it"
            );
        }
        let key = ModelKey { model_id: name, version: VERSION };
        let remote = RemoteServer { base_url: server, model: listed.name, api_key_file: None };
        self.loader.take_up(ServedModel::on_server(key.clone(), remote));
        self.named.insert(source.clone());
        self.adopted.insert(source, Adopted { key, unlisted: 0, silent: 0 });
    }

    /// Returns the registry's catalogue, or `None` if no registry responds.
    async fn catalog(&self) -> Option<Catalog> {
        for registry in self.directory.find(NodeRole::Registry) {
            if let Ok(catalog) = self.client.call(registry, CATALOG_LIST, &Empty {}, REGISTRY_WITHIN).await {
                return Some(catalog);
            }
        }
        None
    }
}

/// Returns the loaded models of the servers that are not adopted yet.
fn new(adopted: &BTreeMap<Source, Adopted>, found: &[(String, Option<Survey>)]) -> Vec<(String, Dialect, Listed)> {
    let surveys = found.iter().filter_map(|(server, survey)| Some((server, survey.as_ref()?)));
    let listed = surveys.flat_map(|(server, Survey { dialect, models })| {
        models.iter().map(|listed| (server.clone(), *dialect, listed.clone()))
    });
    let is_new = |server: &String, name: &String| !adopted.contains_key(&(server.clone(), name.clone()));
    listed.filter(|(server, _, listed)| listed.is_loaded && is_new(server, &listed.name)).collect()
}

/// Counts the polls that did not find a model, and returns the models that were missed too often.
fn gone(adopted: &mut BTreeMap<Source, Adopted>, found: &[(String, Option<Survey>)]) -> Vec<Source> {
    let mut gone = Vec::new();
    for (source, adopted) in adopted.iter_mut() {
        let survey = found.iter().find(|(server, _)| *server == source.0).and_then(|(_, survey)| survey.as_ref());
        let is_listed = survey.map(|survey| survey.models.iter().any(|listed| listed.name == source.1));
        (adopted.unlisted, adopted.silent) = match is_listed {
            Some(true) => (0, 0),
            Some(false) => (adopted.unlisted + 1, 0),
            None => (0, adopted.silent + 1),
        };
        if adopted.unlisted >= UNLISTED_MAX || adopted.silent >= SILENT_MAX {
            gone.push(source.clone());
        }
    }
    gone
}

/// Returns whether a server's model can have a name: no model here and no other model in the registry has it.
fn is_free(name: &ModelName, served_as: &str, catalog: &Catalog, here: &BTreeSet<ModelName>) -> bool {
    let digest = remote_digest(served_as);
    let is_other = |key: &ModelKey| key.model_id == *name && key.version == VERSION;
    let is_alias = catalog.aliases.iter().any(|entry| entry.alias == *name && !entry.is_own_name());
    !here.contains(name)
        && !is_alias
        && !catalog.models.iter().any(|entry| is_other(&entry.key) && entry.digest != digest)
}

/// Chooses a name for a server's model: its own name there or, if that is taken, one with the kind of server appended.
/// Also returns the name that was preferred.
fn name_of(served_as: &str, dialect: Dialect, is_free: impl Fn(&ModelName) -> bool) -> Option<(ModelName, ModelName)> {
    /// The most servers of one kind that serve the same model on one machine.
    const LIKE_IT_MAX: usize = 9;
    let wanted = ModelName::made_of(served_as)?;
    if is_free(&wanted) {
        return Some((wanted.clone(), wanted));
    }
    let kind = match dialect {
        Dialect::Vllm => "vllm",
        Dialect::Sglang => "sglang",
        Dialect::LlamaServer => "llama-server",
        Dialect::Ollama => "ollama",
        Dialect::LmStudio => "lm-studio",
        Dialect::Other => "server",
    };
    let numbered = (1..=LIKE_IT_MAX).map(|number| match number {
        1 => format!("{wanted}-{kind}"),
        number => format!("{wanted}-{kind}-{number}"),
    });
    let name = numbered.filter_map(|name| name.parse().ok()).find(|name| is_free(name))?;
    Some((name, wanted))
}

#[cfg(test)]
mod tests {
    use engine::remote::dialect::Kind;
    use protocol::model::{AliasEntry, ModelEntry};
    use protocol::{Digest, UnixMillis};

    use super::*;

    fn listed(name: &str) -> Listed {
        let (context_length, kind, is_loaded) = (None, Kind::Unknown, !name.ends_with("cold"));
        Listed { name: name.to_owned(), context_length, kind, is_loaded, facts: None }
    }

    fn server(url: &str, names: &[&str]) -> (String, Option<Survey>) {
        let models = names.iter().map(|name| listed(name)).collect();
        (url.to_owned(), Some(Survey { dialect: Dialect::Vllm, models }))
    }

    fn adopted(names: &[(&str, &str)]) -> BTreeMap<Source, Adopted> {
        let key = |name: &str| ModelKey { model_id: ModelName::made_of(name).expect("a name"), version: VERSION };
        let one = |(url, name): &(&str, &str)| {
            (((*url).to_owned(), (*name).to_owned()), Adopted { key: key(name), unlisted: 0, silent: 0 })
        };
        names.iter().map(one).collect()
    }

    #[test]
    fn what_a_server_has_loaded_is_new_once() {
        let found = [server("a", &["m", "n", "o-cold"]), ("b".to_owned(), None), server("c", &["m"])];
        let new = new(&adopted(&[("a", "n")]), &found);
        let new: Vec<_> = new.iter().map(|(server, _, listed)| (server.as_str(), listed.name.as_str())).collect();
        assert_eq!(new, [("a", "m"), ("c", "m")]);
    }

    #[test]
    fn a_model_leaves_soon_when_its_server_lists_it_no_more_and_late_when_the_server_is_silent() {
        let mut models = adopted(&[("a", "m"), ("a", "n"), ("b", "m")]);
        let found = [server("a", &["m"]), ("b".to_owned(), None)];
        let mut left_at = BTreeMap::new();
        for look in 1..=20 {
            for source in gone(&mut models, &found) {
                models.remove(&source);
                left_at.insert(source, look);
            }
        }
        let at = |url: &str, name: &str| left_at.get(&(url.to_owned(), name.to_owned())).copied();
        assert_eq!((at("a", "m"), at("a", "n"), at("b", "m")), (None, Some(UNLISTED_MAX), Some(SILENT_MAX)));
        let mut models = adopted(&[("a", "n")]);
        for _ in 0..20 {
            assert_eq!(gone(&mut models, &[server("a", &["m"])]).len(), 0, "it was seen in between");
            assert_eq!(gone(&mut models, &[server("a", &["n"])]).len(), 0);
        }
        for _ in 1..SILENT_MAX {
            assert_eq!(gone(&mut models, &[("a".to_owned(), None)]).len(), 0);
        }
        assert_eq!(gone(&mut models, &[server("a", &[])]).len(), 0, "it was started anew, and loads yet");
    }

    #[test]
    fn a_taken_name_has_the_servers_kind_behind_it() {
        let entry = |name: &str, digest| ModelEntry {
            key: ModelKey { model_id: name.parse().expect("a name"), version: VERSION },
            digest,
            bytes: 0,
            context_length: 1,
            description: String::new(),
            created_at: UnixMillis(0),
            facts: None,
            added: false,
            pin: false,
            keep_alive_secs: None,
        };
        let alias = AliasEntry {
            alias: "gpt".parse().expect("a name"),
            target: "m".parse().expect("a model"),
            alternatives: vec![],
            created_at: UnixMillis(0),
        };
        let catalog = Catalog {
            models: vec![entry("m", Digest::of(b"a file")), entry("same", remote_digest("org/same"))],
            aliases: vec![alias],
            ..Catalog::default()
        };
        let here = BTreeSet::from(["tiny", "tiny-vllm"].map(|name| name.parse().expect("a name")));
        for (served_as, name) in [
            ("org/m", Some("m-vllm")),
            ("org/same", Some("same")),
            ("other/same", Some("same-vllm")),
            ("gpt:latest", Some("gpt-vllm")),
            ("Tiny", Some("tiny-vllm-2")),
            ("New Model", Some("new-model")),
            ("模型", None),
        ] {
            let named = name_of(served_as, Dialect::Vllm, |name| is_free(name, served_as, &catalog, &here));
            assert_eq!(named.map(|(name, _)| name.to_string()).as_deref(), name, "{served_as}");
        }
    }

    #[test]
    fn a_url_that_cannot_be_used_is_named() {
        let refused = Adoption::new(&["ftp://x".to_owned()]).err().expect("no server of HTTP");
        assert_eq!(refused.to_string(), "ftp://x cannot be adopted");
        assert!(Adoption::new(&[]).expect("the usual ports").addresses().contains("127.0.0.1:11434"));
    }
}
