//! `POST /v1/responses`, and what it shares with the endpoints for stored responses.

pub(super) mod stored;

use std::collections::BTreeMap;
use std::pin::pin;

use axum::body::Body;
use axum::extract::{Request, State};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use http::{HeaderValue, Response, header};
use protocol::kept::{KeptAnswer, KeptRef, KeptStatus, NOTE_BYTES_MAX};
use protocol::{CorrelationId, ErrorCode, PublicKey, TenantId, WireError};

use super::errors::ApiError;
use super::extract::Bridge;
use super::job::{self, AnswerFacts, Opening, ParsedRequest, ResponseHeaders};
use super::repeats::RepeatHeaders;
use crate::class;
use crate::json_body::invalid;
use crate::responses::item::Item;
use crate::responses::note::{self, Note};
use crate::responses::request::{self, ResponseRequest, ResponseRequestBody};
use crate::responses::response::events::Events;
use crate::responses::response::{self, Heading};

/// The most bytes of notes that are read for the items to which one request refers. Each note contains the conversation
/// up to its answer, so that they repeat each other.
const REFERRED_NOTES_BYTES_MAX: usize = 8 * NOTE_BYTES_MAX;
/// How many stored responses are read at the same time for one request.
const READS_AT_ONCE: usize = 8;

/// Answers a conversation of items. Unless `store` is false, the response can be read again under its id.
#[utoipa::path(
    post, path = "/v1/responses", tag = "openai", operation_id = "createResponse", security(("bearer" = [])),
    params(RepeatHeaders),
    request_body = ResponseRequestBody,
    responses(
        (status = 200, description = "The response, as server-sent events if `stream` is true", content(
            (response::Response = "application/json"), (String = "text/event-stream"),
        )),
        ApiError,
    ),
)]
pub(super) async fn create(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    let mut request = match job::ask(&bridge, request, request::parse_response).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    if let Err(error) = prepare(&bridge, &mut request).await {
        return job::refused(&request.admitted.refuse(error), request.context.correlation_id);
    }
    let ParsedRequest { context, rate, admitted, parsed, last_event_id: _ } = request;
    let (admitted, job) = match job::identify(&bridge, context, admitted, parsed.job, parsed.stream) {
        Ok(identified) => identified,
        Err(response) => return *response,
    };
    let response_headers = ResponseHeaders::new(context, &job, rate);
    let id = response_headers.correlation_id();
    if parsed.background && !parsed.stream {
        let kept = KeptRef { tenant_id: admitted.grant.tenant_id.clone(), correlation_id: id };
        let accepted = bridge.gateway.submit_detached(admitted, job).await;
        let response = match accepted {
            Ok(()) => stored::response_of(&bridge, &kept).await,
            Err(error) => Err(error),
        };
        return answered(&bridge, response_headers, response.map(|response| (response, None)));
    }
    let now = bridge.gateway.clock().now();
    let heading = Heading::new(id, parsed.model, parsed.echo, parsed.names, now).with_tier(job.class);
    let opening = job::open(&bridge, admitted, job);
    if parsed.stream {
        return job::stream(&bridge, opening, Events::new(heading), "text/event-stream", response_headers).await;
    }
    answered(&bridge, response_headers, whole(opening, heading).await)
}

/// Adds the earlier conversation to a request, and what is kept of it to its job.
async fn prepare(bridge: &Bridge, request: &mut ParsedRequest<ResponseRequest>) -> Result<(), WireError> {
    let tenant_id = request.admitted.grant.tenant_id.clone();
    let referred = request.parsed.referred()?;
    if !referred.is_empty() {
        request.parsed.resolve(stored_items(bridge, &tenant_id, referred).await?)?;
    }
    if let Some(previous) = request.parsed.previous_response_id.clone() {
        let earlier = earlier_items(bridge, tenant_id, &previous).await?;
        request.parsed.continue_after(earlier)?;
    }
    let class = class::agreed(request.admitted.class, request.parsed.job.class)?;
    request.parsed.keep(class::tier(class.unwrap_or_default()))
}

/// Returns the conversation of a stored response, including its answer.
async fn earlier_items(bridge: &Bridge, tenant_id: TenantId, previous: &str) -> Result<Vec<Item>, WireError> {
    const PARAM: &str = "previous_response_id";
    let correlation_id = note::job_of(previous).map_err(|error| of_param(error, PARAM))?;
    let stored = StoredResponse::find(bridge, tenant_id, correlation_id, PARAM.to_owned()).await?;
    let (mut items, answer) = stored.read(bridge).await?;
    items.extend(answer);
    Ok(items)
}

/// Returns the items of the answers of stored responses, by their ids. `jobs` has the index of a reference to each.
async fn stored_items(
    bridge: &Bridge,
    tenant_id: &TenantId,
    jobs: BTreeMap<CorrelationId, usize>,
) -> Result<BTreeMap<String, Item>, WireError> {
    let find = |(job, index)| StoredResponse::find(bridge, tenant_id.clone(), job, request::id_param(index));
    let mut note_bytes = 0;
    let found = stream::iter(jobs).map(find).buffered(READS_AT_ONCE).map(|stored| {
        let stored = stored?;
        count(&mut note_bytes, stored.answer.note.len(), REFERRED_NOTES_BYTES_MAX, "requests")?;
        Ok::<_, WireError>(stored.read(bridge))
    });
    let mut answers = pin!(found.try_buffered(READS_AT_ONCE));
    let (mut items, mut bytes) = (BTreeMap::new(), 0);
    while let Some((_, answer)) = answers.try_next().await? {
        count(&mut bytes, answer.iter().map(Item::bytes).sum(), NOTE_BYTES_MAX, "answers")?;
        items.extend(answer.into_iter().filter_map(|item| Some((item.id.clone()?, item))));
    }
    Ok(items)
}

/// Adds to the bytes of what a request refers to, and refuses more than `max`.
fn count(bytes: &mut usize, more: usize, max: usize, what: &str) -> Result<(), WireError> {
    *bytes += more;
    if *bytes <= max {
        return Ok(());
    }
    Err(invalid("input", &format!("refers to more than {max} bytes of stored {what}")))
}

/// A stored response that is complete, before its note is parsed and its answer is read.
struct StoredResponse {
    kept: KeptRef,
    keeper: PublicKey,
    answer: KeptAnswer,
    /// The parameter that names the response.
    param: String,
}

impl StoredResponse {
    async fn find(
        bridge: &Bridge,
        tenant_id: TenantId,
        correlation_id: CorrelationId,
        param: String,
    ) -> Result<Self, WireError> {
        let kept = KeptRef { tenant_id, correlation_id };
        let (keeper, answer) = bridge.gateway.kept(&kept).await.map_err(|error| of_param(error, &param))?;
        if answer.status != KeptStatus::Completed {
            return Err(invalid(&param, "names a response that is not complete"));
        }
        Ok(Self { kept, keeper, answer, param })
    }

    /// Returns the items that the response was generated from, and those of its answer.
    async fn read(self, bridge: &Bridge) -> Result<(Vec<Item>, Vec<Item>), WireError> {
        let Self { kept, keeper, answer, param } = self;
        let mut note = Note::read(&answer.note)?;
        let read = bridge.gateway.read_kept(keeper, &kept).await.map_err(|error| of_param(error, &param))?;
        let earlier = std::mem::take(&mut note.items);
        let answer = response::items_of(&Heading::of_kept(kept.correlation_id, note, answer.created_at), &read.whole);
        Ok((earlier, answer))
    }
}

/// Blames a parameter for a stored response that does not exist.
fn of_param(error: WireError, param: &str) -> WireError {
    match error.code {
        ErrorCode::NotFound => invalid(param, "names no stored response; it may have expired or been deleted"),
        _ => error,
    }
}

/// Waits for the whole answer.
async fn whole(opening: Opening, heading: Heading) -> Result<(Response<Body>, Option<AnswerFacts>), WireError> {
    let mut answer = opening.await?;
    let whole = answer.collect().await?;
    let facts = AnswerFacts::of(&answer);
    Ok((json(response::write_whole(heading, &answer, &whole))?, Some(facts)))
}

/// Adds the headers of an admitted request.
fn answered(
    bridge: &Bridge,
    headers: ResponseHeaders,
    response: Result<(Response<Body>, Option<AnswerFacts>), WireError>,
) -> Response<Body> {
    match response {
        Ok((mut response, facts)) => {
            headers.add(bridge, response.headers_mut(), facts.as_ref());
            response
        }
        Err(error) => headers.failure(bridge, &error),
    }
}

fn json(written: serde_json::Result<Vec<u8>>) -> Result<Response<Body>, WireError> {
    let written = written.map_err(|_| WireError::new(ErrorCode::InternalError, "the answer could not be written"))?;
    let mut response = Response::new(Body::from(written));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Names a stored response.
fn kept_ref(tenant_id: TenantId, id: &str) -> Result<KeptRef, WireError> {
    let correlation_id: CorrelationId = note::job_of(id)?;
    Ok(KeptRef { tenant_id, correlation_id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_refers_to_is_bounded_in_sum() {
        let mut bytes = 0;
        assert_eq!(count(&mut bytes, 6, 10, "answers"), Ok(()));
        assert_eq!(count(&mut bytes, 4, 10, "answers"), Ok(()));
        let error = count(&mut bytes, 1, 10, "answers").expect_err("too much");
        assert_eq!((error.code, error.param.as_deref()), (ErrorCode::InvalidValue, Some("input")));
    }
}
