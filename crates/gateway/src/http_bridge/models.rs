//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::body::Body;
use axum::extract::State;
use http::Response;
use protocol::WireError;
use protocol::control::Scope;
use protocol::model::ModelRef;
use utoipa::{IntoParams, ToSchema};

use super::dialect::Dialect;
use super::errors::{self, ApiError, EitherError};
use super::extract::{Bridge, Inquiry, Query, Segment};
use crate::anthropic::response::models::{ModelInfo, ModelPage, PageQuery};
use crate::catalog;
use crate::openai::response::models::{Model, ModelList};

/// The header that chooses between two formats, for the API's description.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "only its description is used")]
struct DialectHeader {
    /// Makes the response one in Anthropic's format. Every client of Anthropic's API sends it.
    #[param(rename = "anthropic-version")]
    anthropic_version: Option<String>,
}

/// The models, in the format of the client's API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used")]
enum AnyModelList {
    OpenAi(ModelList),
    Anthropic(ModelPage<'static>),
}

/// A model, in the format of the client's API.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used")]
enum AnyModel {
    OpenAi(Box<Model>),
    Anthropic(ModelInfo<'static>),
}

/// Lists the models that a worker serves and this API key may use.
#[utoipa::path(
    get, path = "/v1/models", tag = "openai", operation_id = "listModels", security(("bearer" = [])),
    params(
        DialectHeader,
        ("limit" = Option<u32>, Query, description = "The most models to list, 1 to 1000. In Anthropic's format \
                                                  only, as the next two."),
        ("after_id" = Option<String>, Query, description = "Id of the last model of the page before"),
        ("before_id" = Option<String>, Query, description = "Id of the first model of the page after"),
    ),
    responses((status = 200, description = "The models", body = AnyModelList), EitherError),
)]
pub(super) async fn list(
    State(bridge): State<Bridge>,
    dialect: Dialect,
    query: Query,
    inquiry: Inquiry,
) -> Result<Response<Body>, ApiError> {
    let list = served(&bridge, &inquiry).await?;
    Ok(match dialect {
        Dialect::Anthropic => errors::json(&ModelPage::of(&list, &page(&query)?)?),
        Dialect::OpenAi | Dialect::Ollama => errors::json(&list),
    })
}

fn page(query: &Query) -> Result<PageQuery, WireError> {
    let id = |name| Ok::<_, WireError>(query.get::<String>(name)?.map(|id| decoded(&id)));
    Ok(PageQuery { after_id: id("after_id")?, before_id: id("before_id")?, limit: query.get("limit")? })
}

/// Decodes the only two characters of a model's id that clients encode.
fn decoded(id: &str) -> String {
    id.replace("%40", "@").replace("%3A", ":").replace("%3a", ":")
}

/// Returns the models that a worker serves and an API key may use.
pub(super) async fn served(bridge: &Bridge, inquiry: &Inquiry) -> Result<ModelList, WireError> {
    let gateway = &bridge.gateway;
    let grant = gateway.authenticate(inquiry.token.as_deref(), inquiry.context.origin, Scope::Infer).await?;
    let (models, fleet) = (gateway.models().await?, gateway.fleet().await?);
    Ok(ModelList::served(&models, &fleet, &grant.policy))
}

/// Returns one model of the list.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "openai", operation_id = "retrieveModel", security(("bearer" = [])),
    params(("id" = String, Path, description = "`name` for the newest version, or `name@MAJOR.MINOR`"), DialectHeader),
    responses((status = 200, description = "The model", body = AnyModel), EitherError),
)]
pub(super) async fn get(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    dialect: Dialect,
    inquiry: Inquiry,
) -> Result<Response<Body>, ApiError> {
    let model = named(&bridge, &inquiry, &catalog::parse_ref(&id)?).await?;
    Ok(match dialect {
        Dialect::Anthropic => errors::json(&ModelInfo::of(&model)),
        Dialect::OpenAi | Dialect::Ollama => errors::json(&model),
    })
}

/// Returns the model of a name, if a worker serves it and the API key may use it.
pub(super) async fn named(bridge: &Bridge, inquiry: &Inquiry, named: &ModelRef) -> Result<Model, WireError> {
    let gateway = &bridge.gateway;
    let grant = gateway.authenticate(inquiry.token.as_deref(), inquiry.context.origin, Scope::Infer).await?;
    let meant = gateway.meant(named).await?;
    for target in &meant {
        // Refreshes the cached catalogue if the model is missing, since it may have just been registered.
        let _ = gateway.model(target).await;
    }
    let (models, fleet) = (gateway.models().await?, gateway.fleet().await?);
    let model = Model::named(named, &meant, &models, &fleet, &grant.policy);
    let model = model.ok_or_else(|| catalog::not_found(&named.to_string()))?;
    if model.is_served() { Ok(model) } else { Err(catalog::not_served(&named.to_string())) }
}
