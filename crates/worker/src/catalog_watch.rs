//! Takes up the models that operators added and whose files are here, and lets go of those that were removed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use protocol::control::{CATALOG_LIST, Catalog, Empty, NodeRole};
use protocol::model::{AdapterEntry, ModelEntry, ModelKey};
use rpc::{Client, Directory, Membership};
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::config::{ServedAdapter, ServedModel};
use crate::model_loader::ModelLoader;

/// How often the list is read.
const EVERY: Duration = Duration::from_secs(3);
/// How long a registry may take to be found at the start.
const FOUND_WITHIN: Duration = Duration::from_secs(2);
/// How long a registry may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Keeps the models of a worker equal to those that operators added, beside those of its configuration.
pub(crate) struct CatalogWatch {
    client: Client,
    directory: Directory,
    membership: Membership,
    loader: Arc<ModelLoader>,
    /// The models that were taken up.
    taken: BTreeMap<ModelKey, ServedModel>,
    /// When the list was first read.
    read: watch::Sender<Option<Instant>>,
}

impl CatalogWatch {
    /// Makes a watch that says when it first read the list.
    pub(crate) fn new(
        client: Client,
        directory: Directory,
        membership: Membership,
        loader: Arc<ModelLoader>,
        read: watch::Sender<Option<Instant>>,
    ) -> Self {
        Self { client, directory, membership, loader, taken: BTreeMap::new(), read }
    }

    /// Watches until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let watching = async {
            let mut ticks = time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // A registry that is being found is asked as soon as it is.
            self.directory.wait_for(NodeRole::Registry, FOUND_WITHIN).await;
            loop {
                ticks.tick().await;
                if let Some(catalog) = self.list().await {
                    self.reconcile(&catalog);
                    self.read.send_if_modified(|read| read.replace(read.unwrap_or_else(Instant::now)).is_none());
                }
            }
        };
        stop.run_until_cancelled(watching).await;
    }

    /// Reads the list. Without a registry nothing changes.
    async fn list(&self) -> Option<Catalog> {
        for registry in self.directory.find(NodeRole::Registry) {
            match self.client.call::<_, Catalog>(registry, CATALOG_LIST, &Empty {}, ANSWER_WITHIN).await {
                Ok(catalog) => return Some(catalog),
                Err(error) => debug!(registry = registry.short(), %error, "the list of models could not be read"),
            }
        }
        None
    }

    fn reconcile(&mut self, catalog: &Catalog) {
        let own = self.membership.own();
        let may_serve = |model: &ModelEntry| own.as_ref().is_none_or(|own| own.allows_model(&model.key.model_id));
        // What a worker offered is that worker's to serve.
        let here = catalog.models.iter().filter(|model| model.added && self.loader.has_artifact(&model.digest));
        let wanted: BTreeMap<ModelKey, ServedModel> = here
            .filter(|model| may_serve(model))
            .map(|model| (model.key.clone(), self.served(model, &catalog.adapters)))
            .collect();
        let is_over = |(key, model): &(&ModelKey, &ServedModel)| match wanted.get(*key) {
            None => true,
            Some(wanted) if wanted == *model => false,
            // Its adapters have changed: nobody's job is to suffer from that.
            Some(wanted) => wanted.digest != model.digest || self.loader.is_unused(key),
        };
        let gone: Vec<ModelKey> = self.taken.iter().filter(is_over).map(|(key, _)| key.clone()).collect();
        for key in gone {
            info!(model = %key, "the registry lists the model no more, or otherwise");
            self.loader.let_go(&key);
            self.taken.remove(&key);
        }
        for (key, model) in wanted {
            // What the configuration says of a model wins.
            if self.loader.cache().find(&key).is_none() {
                info!(model = %key, "the registry lists the model, and its file is here: it is served");
                self.loader.take_up(model.clone());
                self.taken.insert(key, model);
            }
        }
    }

    fn served(&self, model: &ModelEntry, adapters: &[AdapterEntry]) -> ServedModel {
        let of_it = adapters.iter().filter(|adapter| adapter.key.model == model.key);
        let here = of_it.filter(|adapter| self.loader.has_artifact(&adapter.digest));
        let adapters = here.map(|adapter| ServedAdapter { name: adapter.key.adapter.clone(), digest: adapter.digest });
        ServedModel {
            adapters: adapters.collect(),
            is_listed: true,
            ..ServedModel::new(model.key.clone(), model.digest)
        }
    }
}
