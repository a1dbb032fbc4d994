//! The models that exist.

use metadata_store::{MetadataStore, PutModelError, StoreError};
use protocol::control::Catalog;
use protocol::model::ModelEntry;

/// Returns every version of every model.
pub async fn list(store: &dyn MetadataStore) -> Result<Catalog, StoreError> {
    Ok(Catalog { models: store.models().await? })
}

/// Registers model versions. A version never changes its artifact.
pub async fn register(store: &dyn MetadataStore, models: Vec<ModelEntry>) -> Result<(), PutModelError> {
    for model in models {
        store.put_model(model).await?;
    }
    Ok(())
}
