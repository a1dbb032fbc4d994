//! The adapters of the catalogue's models.

use metadata_store::{PutAdapterError, RegistryStore, StoreError};
use protocol::control::{AdapterAdd, AdapterRemove, AdapterRemoved};
use protocol::model::{AdapterEntry, AdapterKey, ModelKey};
use protocol::{ErrorCode, ModelName, ModelVersion, UnixMillis, WireError};

/// Why an adapter could not be registered or removed.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// There is no such model.
    #[error("the model {0} does not exist")]
    NoModel(ModelName),
    /// It could not be registered.
    #[error(transparent)]
    Put(#[from] PutAdapterError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<AdapterError> for WireError {
    fn from(error: AdapterError) -> Self {
        match &error {
            AdapterError::NoModel(_) | AdapterError::Put(PutAdapterError::NoModel { .. }) => {
                Self::new(ErrorCode::ModelNotFound, error.to_string()).with_param("model")
            }
            AdapterError::Put(PutAdapterError::Conflict { .. }) => {
                Self::new(ErrorCode::InvalidValue, error.to_string()).with_param("adapter")
            }
            AdapterError::Put(PutAdapterError::Store(_)) | AdapterError::Store(_) => {
                Self::new(ErrorCode::Unavailable, "the registry cannot use its store, try again")
            }
        }
    }
}

/// Registers an adapter of a model. A name never changes its artifact.
pub async fn add(store: &dyn RegistryStore, new: AdapterAdd, now: UnixMillis) -> Result<AdapterEntry, AdapterError> {
    let AdapterAdd { model_id, version, adapter, digest, bytes, description } = new;
    let model = find(store, model_id, version).await?;
    let key = AdapterKey { model, adapter };
    let entry = AdapterEntry { key, digest, bytes, description, created_at: now };
    store.put_adapter(entry.clone()).await?;
    Ok(entry)
}

/// Removes an adapter of a model.
pub async fn remove(store: &dyn RegistryStore, old: AdapterRemove) -> Result<AdapterRemoved, AdapterError> {
    let AdapterRemove { model_id, version, adapter } = old;
    let model = find(store, model_id, version).await?;
    let found = store.remove_adapter(&AdapterKey { model, adapter }).await?;
    Ok(AdapterRemoved { found })
}

/// Returns the requested version of a model, or the newest if none is requested.
async fn find(
    store: &dyn RegistryStore,
    model_id: ModelName,
    version: Option<ModelVersion>,
) -> Result<ModelKey, AdapterError> {
    if let Some(version) = version {
        return Ok(ModelKey { model_id, version });
    }
    let models = store.models().await?;
    let newest = models.into_iter().map(|entry| entry.key).filter(|key| key.model_id == model_id).max();
    newest.ok_or(AdapterError::NoModel(model_id))
}
