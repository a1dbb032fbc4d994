//! Stored responses: read, resume, cancel, delete, and list their input.

use axum::body::Body;
use axum::extract::{FromRequestParts, State};
use axum::response::IntoResponse as _;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Response, header};
use protocol::kept::{KeptRef, KeptStatus};
use protocol::{ErrorCode, WireError};
use serde::Serialize;
use utoipa::ToSchema;

use super::{answered, json, kept_ref};
use crate::http_bridge::errors::{self, ApiError};
use crate::http_bridge::extract::{Bridge, Query, Segment, context, token};
use crate::http_bridge::job::{self, ResponseHeaders, refused};
use crate::json_body::invalid;
use crate::request_context::AdmittedRequest;
use crate::responses::item_list::{ItemList, ItemQuery};
use crate::responses::note::{Note, not_found};
use crate::responses::response::events::Events;
use crate::responses::response::{self, Heading};

/// A response that was deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct ResponseDeleted {
    id: String,
    /// Kind of the object that was deleted: always `response`.
    object: &'static str,
    /// Always true, since failures have a status of their own.
    deleted: bool,
}

/// Returns a stored response. With `stream`, its events are sent again from the first one on, or after
/// `starting_after`, and go on while it is generated.
#[utoipa::path(
    get, path = "/v1/responses/{id}", tag = "openai", operation_id = "retrieveResponse", security(("bearer" = [])),
    params(
        ("id" = String, Path, description = "Id of the response"),
        ("stream" = Option<bool>, Query, description = "Whether to stream the events"),
        ("starting_after" = Option<u64>, Query, description = "With `stream`: the `sequence_number` of the last event \
          that the client has"),
    ),
    responses(
        (status = 200, description = "The response, as server-sent events if `stream` is true", content(
            (response::Response = "application/json"), (String = "text/event-stream"),
        )),
        ApiError,
    ),
)]
pub(crate) async fn get(State(bridge): State<Bridge>, query: Query, request: StoredRequest) -> Response<Body> {
    let wanted = query.get::<bool>("stream").and_then(|stream| Ok((stream, query.get::<u64>("starting_after")?)));
    let after = match wanted {
        Ok((Some(true), after)) => after,
        Ok((_, None)) => {
            let response = response_of(&bridge, &request.kept).await;
            return request.answer(&bridge, response);
        }
        Ok((_, Some(_))) => {
            let error = invalid("starting_after", "is only allowed when stream is true");
            return request.answer(&bridge, Err(error));
        }
        Err(error) => return request.answer(&bridge, Err(error)),
    };
    stream(&bridge, request, after).await
}

/// Deletes a stored response, with its input and its answer. One that is being generated is cancelled.
#[utoipa::path(
    delete, path = "/v1/responses/{id}", tag = "openai", operation_id = "deleteResponse", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the response")),
    responses((status = 200, description = "The response was deleted", body = ResponseDeleted), ApiError),
)]
pub(crate) async fn delete(State(bridge): State<Bridge>, request: StoredRequest) -> Response<Body> {
    let id = request.id.clone();
    let deleted = match bridge.gateway.remove_kept(&request.kept).await {
        Ok(true) => Ok(errors::json(&ResponseDeleted { id, object: "response", deleted: true })),
        Ok(false) => Err(not_found(&id)),
        Err(error) => Err(error),
    };
    request.answer(&bridge, deleted)
}

/// Cancels a response that is generated in the background. One that has ended stays as it is.
#[utoipa::path(
    post, path = "/v1/responses/{id}/cancel", tag = "openai", operation_id = "cancelResponse", security(("bearer" = [])),
    params(("id" = String, Path, description = "Id of the response")),
    responses((status = 200, description = "The response", body = response::Response), ApiError),
)]
pub(crate) async fn cancel(State(bridge): State<Bridge>, request: StoredRequest) -> Response<Body> {
    let cancelled = cancelled(&bridge, &request.kept).await;
    request.answer(&bridge, cancelled)
}

async fn cancelled(bridge: &Bridge, kept: &KeptRef) -> Result<Response<Body>, WireError> {
    let (_, known) = bridge.gateway.kept(kept).await?;
    if !Heading::of_kept(kept.correlation_id, Note::read(&known.note)?, known.created_at).is_background() {
        let message = "only a response with background: true can be cancelled; to cancel another, close its connection";
        return Err(WireError::new(ErrorCode::InvalidValue, message));
    }
    bridge.gateway.cancel_kept(kept).await?;
    response_of(bridge, kept).await
}

/// Lists the items that a response was generated from, including those of earlier responses.
#[utoipa::path(
    get, path = "/v1/responses/{id}/input_items", tag = "openai", operation_id = "listInputItems",
    security(("bearer" = [])),
    params(
        ("id" = String, Path, description = "Id of the response"),
        ("limit" = Option<u32>, Query, description = "The most items to return, 1 to 100; 20 if omitted"),
        ("order" = Option<String>, Query, description = "`desc` for the newest first, which is the default, or `asc`"),
        ("after" = Option<String>, Query, description = "Id of the last item of the page before"),
    ),
    responses((status = 200, description = "A page of items", body = ItemList), ApiError),
)]
pub(crate) async fn input_items(State(bridge): State<Bridge>, query: Query, request: StoredRequest) -> Response<Body> {
    let page = page(&bridge, &request.kept, &request.id, &query).await;
    request.answer(&bridge, page.map(|page| errors::json(&page)))
}

async fn page(bridge: &Bridge, kept: &KeptRef, id: &str, query: &Query) -> Result<ItemList, WireError> {
    let query = ItemQuery { limit: query.get("limit")?, order: query.get("order")?, after: query.get("after")? };
    let (_, known) = bridge.gateway.kept(kept).await.map_err(|error| named(error, id))?;
    ItemList::page(Note::read(&known.note)?.items, id, &query)
}

/// Returns a stored response as it is now.
pub(super) async fn response_of(bridge: &Bridge, kept: &KeptRef) -> Result<Response<Body>, WireError> {
    let (keeper, known) = bridge.gateway.kept(kept).await?;
    let heading = Heading::of_kept(kept.correlation_id, Note::read(&known.note)?, known.created_at);
    if known.status == KeptStatus::Completed {
        let read = bridge.gateway.read_kept(keeper, kept).await?;
        return json(response::write_kept(heading, &read));
    }
    json(response::write_unanswered(&heading, known.status, known.error.as_ref()))
}

async fn stream(bridge: &Bridge, request: StoredRequest, after: Option<u64>) -> Response<Body> {
    let StoredRequest { id, kept, admitted, headers } = request;
    let known = bridge.gateway.kept(&kept).await.and_then(|(keeper, known)| {
        let heading = Heading::of_kept(kept.correlation_id, Note::read(&known.note)?, known.created_at);
        Ok((keeper, known, Events::new(heading).after(after)))
    });
    let (keeper, known, events) = match known {
        Ok(known) => known,
        Err(error) => return headers.failure(bridge, &named(error, &id)),
    };
    if matches!(known.status, KeptStatus::Failed | KeptStatus::Cancelled) {
        let mut response = Response::new(Body::from(events.unanswered(known.status, known.error.as_ref())));
        let map = response.headers_mut();
        map.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        map.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
        headers.add(bridge, map, None);
        return response;
    }
    let gateway = bridge.gateway.clone();
    let opening = Box::pin(async move { gateway.follow_kept(admitted, keeper, kept).await.map(Box::new) });
    job::stream(bridge, opening, events, "text/event-stream", headers).await
}

/// An admitted request for the stored response that its path names.
pub(crate) struct StoredRequest {
    id: String,
    kept: KeptRef,
    admitted: AdmittedRequest,
    headers: ResponseHeaders,
}

impl FromRequestParts<Bridge> for StoredRequest {
    type Rejection = Response<Body>;

    async fn from_request_parts(parts: &mut Parts, bridge: &Bridge) -> Result<Self, Response<Body>> {
        let segment = Segment::from_request_parts(parts, bridge).await;
        let Segment(id) = segment.map_err(ApiError::into_response)?;
        let context = context(&parts.extensions);
        let admitted = bridge.gateway.admit_or_refuse(token(&parts.headers), context).await;
        let admitted = admitted.map_err(|refusal| refused(&refusal, context.correlation_id))?;
        match kept_ref(admitted.grant.tenant_id.clone(), &id) {
            Ok(kept) => {
                let headers = ResponseHeaders::of_earlier(context, kept.correlation_id, admitted.rate);
                Ok(Self { id, kept, admitted, headers })
            }
            Err(error) => Err(refused(&admitted.refuse(error), context.correlation_id)),
        }
    }
}

impl StoredRequest {
    /// Ends the request with a response.
    fn answer(self, bridge: &Bridge, response: Result<Response<Body>, WireError>) -> Response<Body> {
        let Self { id, mut admitted, headers, kept: _ } = self;
        let response = response.map_err(|error| named(error, &id));
        match &response {
            Ok(_) => admitted.record.answered(),
            Err(error) => admitted.record.failed(error.code),
        }
        answered(bridge, headers, response.map(|response| (response, None)))
    }
}

/// Names the response that is not there.
fn named(error: WireError, id: &str) -> WireError {
    if error.code == ErrorCode::NotFound { not_found(id) } else { error }
}
