//! The catalogue: registered models, and those that workers offer.

use metadata_store::{PutModelError, RegistryStore, StoreError};
use protocol::control::Catalog;
use protocol::model::{
    ModelEntry, ModelFacts, ModelKey, ModelOffer, OfferedSource, SERVED_AS_BYTES_MAX, remote_digest,
};
use protocol::{ModelName, UnixMillis};

/// Maximum number of offered models, and of models that operators added. Any worker may make offers, so these leave
/// operators theirs.
pub const OFFERED_MAX: usize = 1_000;
/// Maximum number of models that one worker may have listed since the registry's start. It leaves other workers theirs.
pub const OFFERED_PER_WORKER_MAX: usize = 250;

/// Why an offered model is not listed.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// Another model has its name and version.
    #[error("{0} is another model already, choose another name or version")]
    Taken(ModelKey),
    /// Its name stands for another model.
    #[error("{0} is an alias of another model, choose another name")]
    IsAlias(ModelName),
    /// The model's name on its server is empty or too long.
    #[error("the model's name on its server must have 1 to {SERVED_AS_BYTES_MAX} bytes")]
    Nameless,
    /// The offer gives its file a size of zero.
    #[error("the model's file must have at least 1 byte")]
    Empty,
    /// Too many models are listed.
    #[error("no more than {OFFERED_MAX} models of workers are listed; an operator adds others by `tether model add`")]
    TooMany,
    /// The worker had too many models listed.
    #[error(
        "no more than {OFFERED_PER_WORKER_MAX} models of one worker are listed; an operator adds others by \
         `tether model add`"
    )]
    TooManyOfWorker,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl OfferError {
    fn of(error: PutModelError) -> Self {
        match error {
            PutModelError::Conflict { key, .. } => Self::Taken(key),
            PutModelError::Store(error) => Self::Store(error),
        }
    }
}

/// Returns every model version, adapter and alias.
pub async fn list(store: &dyn RegistryStore) -> Result<Catalog, StoreError> {
    Ok(Catalog { models: store.models().await?, adapters: store.adapters().await?, aliases: store.aliases().await? })
}

/// Registers model versions. A version never changes its artifact.
pub async fn register(store: &dyn RegistryStore, models: Vec<ModelEntry>) -> Result<(), PutModelError> {
    for model in models {
        store.put_model(model).await?;
    }
    Ok(())
}

/// Lists a model that a worker serves, unless it is listed already. Counts it in `of_worker`, the number of models that
/// the worker had listed.
pub async fn offer(
    store: &dyn RegistryStore,
    offer: ModelOffer,
    of_worker: &mut usize,
    now: UnixMillis,
) -> Result<(), OfferError> {
    let ModelOffer { key, source, context_length, facts } = offer;
    let facts = facts.map(ModelFacts::bounded);
    let (digest, bytes, description) = match source {
        OfferedSource::Artifact { bytes: 0, .. } => return Err(OfferError::Empty),
        OfferedSource::Artifact { digest, bytes } => (digest, bytes, "A file that a worker brought.".to_owned()),
        OfferedSource::Server { served_as } if served_as.is_empty() || served_as.len() > SERVED_AS_BYTES_MAX => {
            return Err(OfferError::Nameless);
        }
        OfferedSource::Server { served_as } => {
            (remote_digest(&served_as), 0, format!("{served_as}, on a server that a worker has adopted."))
        }
    };
    let models = store.models().await?;
    if let Some(listed) = models.iter().find(|listed| listed.key == key) {
        if listed.digest != digest {
            return Err(OfferError::Taken(key));
        }
        // If workers serve it with different context lengths, the longest is listed: a job is retried on a worker whose
        // context is long enough.
        let known = ModelEntry {
            facts: listed.facts.clone().or(facts),
            context_length: listed.context_length.max(context_length),
            ..listed.clone()
        };
        if known == *listed {
            return Ok(());
        }
        return store.put_model(known).await.map_err(OfferError::of);
    }
    if store.aliases().await?.iter().any(|entry| entry.alias == key.model_id && !entry.is_own_name()) {
        return Err(OfferError::IsAlias(key.model_id));
    }
    if *of_worker >= OFFERED_PER_WORKER_MAX {
        return Err(OfferError::TooManyOfWorker);
    }
    if models.iter().filter(|listed| !listed.added).count() >= OFFERED_MAX {
        return Err(OfferError::TooMany);
    }
    let (created_at, added, pin, keep_alive_secs) = (now, false, false, None);
    let entry =
        ModelEntry { key, digest, bytes, context_length, description, created_at, facts, added, pin, keep_alive_secs };
    store.put_model(entry).await.map_err(OfferError::of)?;
    *of_worker += 1;
    Ok(())
}
