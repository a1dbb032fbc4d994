//! `/v1/batches`: many requests at once, which run while nothing more urgent does.

use axum::body::Body;
use axum::extract::{Request, State};
use http::Response;
use protocol::batches::{BATCHES_PAGE_MAX, BatchId, BatchRef};
use protocol::policy::ServiceClass;
use protocol::{ErrorCode, TenantId, WireError};

use super::errors::{self, ApiError};
use super::extract::{Bridge, Query, Segment};
use super::files::limit;
use super::request_body;
use super::tenant_request::TenantRequest;
use crate::config::seconds;
use crate::openai::batch::{BatchObject, BatchRequest, Page, parse_batch};

/// How many batches a page has by default.
const LIMIT: u32 = 20;

/// Creates a batch from an uploaded file. Its requests run within 24 hours, whenever workers have nothing more urgent.
#[utoipa::path(
    post, path = "/v1/batches", tag = "openai", operation_id = "createBatch", security(("bearer" = [])),
    request_body = BatchRequest,
    responses((status = 200, description = "The batch", body = BatchObject), ApiError),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: TenantRequest, body: Request) -> Response<Body> {
    let created = create_batch(&bridge, &request, body).await;
    request.answer(created)
}

async fn create_batch(bridge: &Bridge, request: &TenantRequest, body: Request) -> Result<Response<Body>, WireError> {
    let grant = &request.admitted.grant;
    if !grant.policy.allows_class(ServiceClass::Batch) {
        let message = "the tenant's policy does not allow the class batch";
        return Err(WireError::new(ErrorCode::ClassNotAllowed, message));
    }
    let (parts, mut body) = body.into_parts();
    let config = bridge.gateway.config();
    request_body::check_head(&parts.headers, config.body_bytes_max)?;
    let bytes = request_body::read(&mut body, config.body_bytes_max, seconds(config.body_idle_secs)).await?;
    let batch = bridge.gateway.create_batch(grant, parse_batch(&bytes)?).await?;
    Ok(errors::json(&BatchObject::from(batch)))
}

/// Lists the batches of the tenant, the newest first.
#[utoipa::path(
    get, path = "/v1/batches", tag = "openai", operation_id = "listBatches", security(("bearer" = [])),
    params(
        ("limit" = Option<u32>, Query, description = "The most batches to return, 1 to 100; 20 if omitted"),
        ("after" = Option<String>, Query, description = "Id of the last batch of the page before"),
    ),
    responses((status = 200, description = "A page of batches", body = Page<BatchObject>), ApiError),
)]
pub(super) async fn list(State(bridge): State<Bridge>, query: Query, request: TenantRequest) -> Response<Body> {
    let page = page(&bridge, &query, request.tenant_id()).await;
    request.answer(page.map(|page| errors::json(&page)))
}

async fn page(bridge: &Bridge, query: &Query, tenant_id: TenantId) -> Result<Page<BatchObject>, WireError> {
    let limit = limit(query, LIMIT, BATCHES_PAGE_MAX)?;
    let batches = bridge.gateway.list_batches(tenant_id, query.get("after")?, limit + 1).await?;
    Ok(Page::new(batches.into_iter().map(BatchObject::from).collect(), limit, |batch| &batch.id))
}

/// Returns a batch with its counts and, once there are results, the ids of its result files.
#[utoipa::path(
    get, path = "/v1/batches/{id}", tag = "openai", operation_id = "retrieveBatch", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, description = "The batch", body = BatchObject), ApiError),
)]
pub(super) async fn get(State(bridge): State<Bridge>, Segment(id): Segment, request: TenantRequest) -> Response<Body> {
    let found = match named(&request, &id) {
        Ok(batch) => bridge.gateway.batch(&batch).await.map_err(|error| missing_as(error, &id)),
        Err(error) => Err(error),
    };
    request.answer(found.map(|batch| errors::json(&BatchObject::from(batch))))
}

/// Cancels a batch. Requests that have an answer keep it, and the others do not run. A batch that has ended stays as it
/// is.
#[utoipa::path(
    post, path = "/v1/batches/{id}/cancel", tag = "openai", operation_id = "cancelBatch", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the batch")),
    responses((status = 200, description = "The batch", body = BatchObject), ApiError),
)]
pub(super) async fn cancel(
    State(bridge): State<Bridge>,
    Segment(id): Segment,
    request: TenantRequest,
) -> Response<Body> {
    let cancelled = match named(&request, &id) {
        Ok(batch) => bridge.gateway.cancel_batch(&batch).await.map_err(|error| missing_as(error, &id)),
        Err(error) => Err(error),
    };
    request.answer(cancelled.map(|batch| errors::json(&BatchObject::from(batch))))
}

fn named(request: &TenantRequest, id: &str) -> Result<BatchRef, WireError> {
    let id: BatchId = id.parse().map_err(|_| no_batch(id))?;
    Ok(BatchRef { tenant_id: request.tenant_id(), id })
}

fn missing_as(error: WireError, id: &str) -> WireError {
    if error.code == ErrorCode::NotFound { no_batch(id) } else { error }
}

fn no_batch(id: &str) -> WireError {
    let shown: String = id.chars().take(64).collect();
    WireError::new(ErrorCode::NotFound, format!("there is no batch {shown:?}, or no longer")).with_param("id")
}
