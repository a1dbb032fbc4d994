//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::State;
use protocol::control::Scope;

use super::errors::ApiError;
use super::extract::{Bridge, Inquiry, Segment};
use crate::catalog;
use crate::openai::response::models::{Model, ModelList};

/// Lists the models that a worker serves and this API key may use.
#[utoipa::path(
    get, path = "/v1/models", tag = "openai", operation_id = "listModels", security(("bearer" = [])),
    responses((status = 200, description = "The models", body = ModelList), ApiError),
)]
pub(super) async fn list(State(bridge): State<Bridge>, inquiry: Inquiry) -> Result<Json<ModelList>, ApiError> {
    let gateway = &bridge.gateway;
    let grant = gateway.authenticate(inquiry.token.as_deref(), inquiry.context.origin, Scope::Infer).await?;
    let (models, fleet) = (gateway.models().await?, gateway.fleet().await?);
    Ok(Json(ModelList::served(&models, &fleet, &grant.policy)))
}

/// Returns one model of the list.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "openai", operation_id = "retrieveModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` for the newest version, or `name@MAJOR.MINOR`")),
    responses((status = 200, description = "The model", body = Model), ApiError),
)]
pub(super) async fn get(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    inquiry: Inquiry,
) -> Result<Json<Model>, ApiError> {
    let gateway = &bridge.gateway;
    let grant = gateway.authenticate(inquiry.token.as_deref(), inquiry.context.origin, Scope::Infer).await?;
    let named = catalog::parse_ref(&id)?;
    let meant = gateway.meant(&named).await?;
    for target in &meant {
        // Refreshes the cached catalogue if the model is missing, since it may have just been registered.
        let _ = gateway.model(target).await;
    }
    let (models, fleet) = (gateway.models().await?, gateway.fleet().await?);
    let model = Model::named(&named, &meant, &models, &fleet, &grant.policy);
    let model = model.ok_or_else(|| catalog::not_found(&id))?;
    if !model.is_served() {
        return Err(catalog::not_served(&id).into());
    }
    Ok(Json(model))
}
