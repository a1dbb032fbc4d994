//! Serves the models that operators added and that this node has or could fetch, and drops those that were removed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use protocol::Digest;
use protocol::control::{CATALOG_LIST, Catalog, Empty, NodeRole};
use protocol::model::{AdapterEntry, ModelEntry, ModelKey};
use rpc::{Client, Directory, Membership};
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::config::{CatalogUse, ServedAdapter, ServedModel};
use crate::listed::Listed;
use crate::model_loader::ModelLoader;

/// How often the catalogue is read.
const EVERY: Duration = Duration::from_secs(3);
/// How long to wait for a registry to be found at the start.
const FOUND_WITHIN: Duration = Duration::from_secs(2);
/// How long a registry may take to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a fetched file is kept after no listed model has it any more. A registry may be set up anew, or a model
/// removed by mistake.
const UNLISTED_FOR: Duration = Duration::from_mins(1);

/// Adds and removes a worker's models as the catalogue changes. Models of its configuration stay; only their residency
/// settings follow the catalogue where the configuration has none.
pub(crate) struct CatalogWatch {
    client: Client,
    directory: Directory,
    membership: Membership,
    loader: Arc<ModelLoader>,
    use_of: CatalogUse,
    listed: Listed,
    /// Since when each file has not been listed.
    unlisted: BTreeMap<Digest, Instant>,
    /// The models that this watch added.
    added: BTreeMap<ModelKey, ServedModel>,
    /// When the catalogue was first read.
    read: watch::Sender<Option<Instant>>,
}

impl CatalogWatch {
    /// Creates a watch that publishes when it first read the catalogue.
    pub(crate) fn new(
        client: Client,
        directory: Directory,
        membership: Membership,
        loader: Arc<ModelLoader>,
        use_of: CatalogUse,
        listed: Listed,
        read: watch::Sender<Option<Instant>>,
    ) -> Self {
        let (unlisted, added) = (BTreeMap::new(), BTreeMap::new());
        Self { client, directory, membership, loader, use_of, listed, unlisted, added, read }
    }

    /// Follows the catalogue until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let watching = async {
            let mut ticks = time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // Wait for the registry, so that its catalogue is read as soon as it is found.
            self.directory.wait_for(NodeRole::Registry, FOUND_WITHIN).await;
            loop {
                ticks.tick().await;
                if let Some(catalog) = self.list().await {
                    self.reconcile(&catalog);
                    self.clear().await;
                    self.read.send_if_modified(|read| read.replace(read.unwrap_or_else(Instant::now)).is_none());
                }
            }
        };
        stop.run_until_cancelled(watching).await;
    }

    /// Reads the catalogue. Without a registry nothing changes.
    async fn list(&self) -> Option<Catalog> {
        for registry in self.directory.find(NodeRole::Registry) {
            match self.client.call::<_, Catalog>(registry, CATALOG_LIST, &Empty {}, RESPONSE_TIMEOUT).await {
                Ok(catalog) => return Some(catalog),
                Err(error) => debug!(registry = registry.short(), %error, "the list of models could not be read"),
            }
        }
        None
    }

    fn reconcile(&mut self, catalog: &Catalog) {
        self.listed.update(catalog);
        let own = self.membership.own();
        let may_serve = |model: &ModelEntry| own.as_ref().is_none_or(|own| own.allows_model(&model.key.model_id));
        // A model that a worker offered is served by that worker only.
        let added = catalog.models.iter().filter(|model| model.added && may_serve(model));
        // A model that was added stays: a temporary shortage of memory is no reason to drop it.
        let can_serve = |model: &ModelEntry| {
            self.loader.has_artifact(&model.digest)
                || self.loader.could_fetch(&model.digest)
                || self.use_of == CatalogUse::Fetch && self.added.contains_key(&model.key)
        };
        let wanted: BTreeMap<ModelKey, ServedModel> = added
            .filter(|model| can_serve(model))
            .map(|model| (model.key.clone(), self.served(model, &catalog.adapters)))
            .collect();
        let is_over = |(key, model): &(&ModelKey, &ServedModel)| match wanted.get(*key) {
            None => true,
            Some(wanted) if wanted == *model => false,
            // Its adapters have changed: wait until no job uses it.
            Some(wanted) => wanted.digest != model.digest || self.loader.is_unused(key),
        };
        let gone: Vec<ModelKey> = self.added.iter().filter(is_over).map(|(key, _)| key.clone()).collect();
        for key in gone {
            info!(model = %key, "the registry no longer lists the model, or lists another version of it");
            self.loader.let_go(&key);
            self.added.remove(&key);
        }
        for (key, model) in wanted {
            // The configuration's settings of a model take precedence.
            if self.loader.cache().find(&key).is_none() {
                info!(model = %key, "the registry lists the model: it is served");
                self.loader.take_up(model.clone());
                self.added.insert(key, model);
            }
        }
        for listed in &catalog.models {
            if let Some(entry) = self.loader.cache().find(&listed.key)
                && entry.model.digest() == listed.digest
                && entry.follow(listed.pin, listed.keep_alive_secs)
            {
                info!(model = %listed.key, "the model is pinned: it is loaded, and stays");
                self.loader.bring(&entry, None);
            }
        }
        self.loader.look_at_files();
    }

    /// Deletes the fetched files of models that were removed some time ago.
    async fn clear(&mut self) {
        let (listed, now) = (self.listed.all(), Instant::now());
        self.unlisted.retain(|digest, _| !listed.contains_key(digest));
        for digest in self.loader.fetched_files().into_iter().filter(|digest| !listed.contains_key(digest)) {
            self.unlisted.entry(digest).or_insert(now);
        }
        let is_over =
            |digest: &Digest| self.unlisted.get(digest).is_some_and(|since| now.duration_since(*since) >= UNLISTED_FOR);
        self.loader.clear_files(is_over).await;
    }

    fn served(&self, model: &ModelEntry, adapters: &[AdapterEntry]) -> ServedModel {
        let of_it = adapters.iter().filter(|adapter| adapter.key.model == model.key);
        let can_serve =
            |adapter: &&AdapterEntry| self.use_of == CatalogUse::Fetch || self.loader.has_artifact(&adapter.digest);
        let adapters = of_it
            .filter(can_serve)
            .map(|adapter| ServedAdapter { name: adapter.key.adapter.clone(), digest: adapter.digest });
        ServedModel {
            adapters: adapters.collect(),
            is_listed: true,
            ..ServedModel::new(model.key.clone(), model.digest)
        }
    }
}
