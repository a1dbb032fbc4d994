//! The models that exist.

use metadata_store::{MetadataStore, PutModelError, StoreError};
use protocol::UnixMillis;
use protocol::control::Catalog;
use protocol::model::{ModelEntry, ModelKey, ModelOffer, SERVED_AS_BYTES_MAX, remote_digest};

/// How many models of adopted servers are listed at most: any worker may offer some.
pub const OFFERED_MAX: usize = 1_000;

/// Why an offered model is not listed.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// Another model has its name and version.
    #[error("{0} is another model already, choose another name")]
    Taken(ModelKey),
    /// Its name on its server is none, or too long.
    #[error("the model's name on its server must have 1 to {SERVED_AS_BYTES_MAX} bytes")]
    Nameless,
    /// There are too many already.
    #[error("no more than {OFFERED_MAX} models of adopted servers are listed")]
    TooMany,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Returns every version of every model.
pub async fn list(store: &dyn MetadataStore) -> Result<Catalog, StoreError> {
    Ok(Catalog { models: store.models().await?, adapters: store.adapters().await? })
}

/// Registers model versions. A version never changes its artifact.
pub async fn register(store: &dyn MetadataStore, models: Vec<ModelEntry>) -> Result<(), PutModelError> {
    for model in models {
        store.put_model(model).await?;
    }
    Ok(())
}

/// Lists a model of an adopted server, unless it is listed already.
pub async fn offer(store: &dyn MetadataStore, offer: ModelOffer, now: UnixMillis) -> Result<(), OfferError> {
    let ModelOffer { key, served_as, context_length } = offer;
    if served_as.is_empty() || served_as.len() > SERVED_AS_BYTES_MAX {
        return Err(OfferError::Nameless);
    }
    let digest = remote_digest(&served_as);
    let models = store.models().await?;
    if let Some(listed) = models.iter().find(|listed| listed.key == key) {
        return if listed.digest == digest { Ok(()) } else { Err(OfferError::Taken(key)) };
    }
    if models.iter().filter(|listed| listed.bytes == 0).count() >= OFFERED_MAX {
        return Err(OfferError::TooMany);
    }
    let description = format!("{served_as}, on a server that a worker has adopted.");
    let entry = ModelEntry { key, digest, bytes: 0, context_length, description, created_at: now };
    store.put_model(entry).await.map_err(|error| match error {
        PutModelError::Conflict { key, .. } => OfferError::Taken(key),
        PutModelError::Store(error) => OfferError::Store(error),
    })
}
