//! What all endpoints that run jobs share: admission, submission and response headers.

use std::pin::Pin;

use axum::body::Body;
use axum::extract::Request;
use http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use protocol::policy::ServiceClass;
use protocol::quota::QuotaState;
use protocol::{CorrelationId, ErrorCode, WireError};
use rpc::rate_limit::Verdict;
use tokio::time;
use tracing::debug;

use super::answer_body::AnswerBody;
use super::errors::{self, text};
use super::extract::{Bridge, context, token};
use super::{repeats, request_body};
use crate::answer::{Answer, EventId, StreamFormat, Whole};
use crate::class;
use crate::config::seconds;
use crate::job::Job;
use crate::request_context::{AdmittedRequest, Refusal, RequestContext};

/// A request that was admitted, with its parsed body.
pub(super) struct ParsedRequest<T> {
    pub(super) context: RequestContext,
    pub(super) rate: Verdict,
    pub(super) admitted: AdmittedRequest,
    /// The last event of the stream that its client has.
    pub(super) last_event_id: Option<EventId>,
    /// The parsed body.
    pub(super) parsed: T,
}

/// A future that resolves once the answer has begun.
pub(super) type Opening = Pin<Box<dyn Future<Output = Result<Box<Answer>, WireError>> + Send>>;

/// Admits a request and reads its body. Otherwise returns the error response.
pub(super) async fn ask<T>(
    bridge: &Bridge,
    request: Request,
    parse: impl FnOnce(&[u8]) -> Result<T, WireError>,
) -> Result<ParsedRequest<T>, Response<Body>> {
    let context = context(request.extensions());
    let (parts, mut body) = request.into_parts();
    if let Some(theirs) = parts.headers.get("x-client-request-id").and_then(|value| value.to_str().ok()) {
        debug!(correlation_id = %context.correlation_id, client_request_id = theirs, "request named by its client");
    }
    let admitted = match bridge.gateway.admit_or_refuse(token(&parts.headers), context).await {
        Ok(admitted) => admitted,
        Err(refusal) => {
            request_body::discard(body, &parts.headers).await;
            return Err(refused(&refusal, context.correlation_id));
        }
    };
    let config = bridge.gateway.config();
    let read = async {
        let repeat = repeats::read(&parts.headers, &parts.extensions)?;
        let class = read_class(&parts.headers)?;
        request_body::check_head(&parts.headers, config.body_bytes_max)?;
        let idle = seconds(config.body_idle_secs);
        let bytes = request_body::read(&mut body, config.body_bytes_max, idle).await?;
        Ok((parse(&bytes)?, repeats::last_event_id(&parts.headers)?, repeat, class))
    };
    let rate = admitted.rate;
    match read.await {
        Ok((parsed, last_event_id, repeat, class)) => {
            let admitted = AdmittedRequest { repeat, class, ..admitted };
            Ok(ParsedRequest { context, rate, admitted, last_event_id, parsed })
        }
        Err(error) => {
            let error: WireError = error;
            let refusal = admitted.refuse(error);
            request_body::discard(body, &parts.headers).await;
            Err(refused(&refusal, context.correlation_id))
        }
    }
}

/// Reads the class that the header names.
fn read_class(headers: &HeaderMap) -> Result<Option<ServiceClass>, WireError> {
    let value = repeats::only(headers, &HeaderName::from_static(class::CLASS))?;
    value.map(|value| class::parse(value.to_str().unwrap_or_default())).transpose()
}

/// Gives a job its id and token. Otherwise returns the error response.
pub(super) fn identify(
    bridge: &Bridge,
    context: RequestContext,
    admitted: AdmittedRequest,
    job: Job,
    is_streamed: bool,
) -> Result<(AdmittedRequest, Job), Box<Response<Body>>> {
    match bridge.gateway.identify(&admitted, job, is_streamed) {
        Ok(job) => Ok((admitted, job)),
        Err(error) => Err(Box::new(refused(&admitted.refuse(error), context.correlation_id))),
    }
}

/// Submits a job. The future owns what it needs, so that a stream can go on waiting for it.
pub(super) fn open(bridge: &Bridge, admitted: AdmittedRequest, job: Job) -> Opening {
    let gateway = bridge.gateway.clone();
    Box::pin(async move { gateway.submit(admitted, job).await.map(Box::new) })
}

/// Refuses an answer that is not the one of the client's last event.
pub(super) fn resumed(opening: Opening, last: Option<EventId>) -> Opening {
    let Some(last) = last else { return opening };
    Box::pin(async move {
        let answer = opening.await?;
        match answer.origin() {
            Some(origin) if origin.created_at == last.created_at => Ok(answer),
            _ => {
                let message = "the answer of this event is gone, and the request runs anew; \
                               ask again without Last-Event-ID for another answer";
                Err(WireError::new(ErrorCode::IdempotencyKeyReused, message).with_param("Last-Event-ID"))
            }
        }
    })
}

/// Waits for the whole answer and builds its response.
pub(super) async fn collect(
    bridge: &Bridge,
    opening: Opening,
    response_headers: ResponseHeaders,
    write: impl FnOnce(&Answer, &Whole) -> Result<Response<Body>, WireError>,
) -> Response<Body> {
    collect_or(bridge, opening, response_headers, write, |error| error).await
}

/// Waits for the whole answer and builds its response. `named` changes an error to the client's words.
pub(super) async fn collect_or(
    bridge: &Bridge,
    opening: Opening,
    response_headers: ResponseHeaders,
    write: impl FnOnce(&Answer, &Whole) -> Result<Response<Body>, WireError>,
    named: impl FnOnce(WireError) -> WireError,
) -> Response<Body> {
    let collected = async {
        let mut answer = opening.await?;
        let whole = answer.collect().await?;
        Ok((write(&answer, &whole)?, AnswerFacts::of(&answer)))
    };
    match collected.await {
        Ok((mut response, facts)) => {
            response_headers.add(bridge, response.headers_mut(), Some(&facts));
            response
        }
        Err(error) => response_headers.failure(bridge, &named(error)),
    }
}

/// Builds the response of a stream. An error that arrives soon enough gets its own status.
pub(super) async fn stream<F: StreamFormat>(
    bridge: &Bridge,
    mut opening: Opening,
    format: F,
    content_type: &'static str,
    response_headers: ResponseHeaders,
) -> Response<Body> {
    let keep_alive = bridge.gateway.config().keep_alive();
    // Waiting for the first piece lets an error have its own status. After a while the response must begin all the
    // same, or proxies time out.
    let (body, answer) = match time::timeout(keep_alive, &mut opening).await {
        Ok(Ok(answer)) => {
            let facts = AnswerFacts::of(&answer);
            (AnswerBody::new(format, answer, keep_alive, bridge.gateway.cut()), Some(facts))
        }
        Ok(Err(error)) => return response_headers.failure(bridge, &error),
        Err(_) => (AnswerBody::pending(format, opening, keep_alive, bridge.gateway.cut()), None),
    };
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    // Without it, nginx and similar proxies would buffer the stream.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, no-store"));
    response_headers.add(bridge, headers, answer.as_ref());
    response
}

/// Returns the error of an answer that its endpoint cannot write.
pub(super) fn unwritable() -> WireError {
    WireError::new(ErrorCode::InternalError, "the answer could not be written")
}

/// The headers of a response that describe its request.
#[derive(Clone, Copy)]
pub(super) struct ResponseHeaders {
    context: RequestContext,
    correlation_id: CorrelationId,
    rate: Verdict,
}

/// The headers of a response that describe its answer.
pub(super) struct AnswerFacts {
    attempt: u32,
    continued: u32,
    is_replayed: bool,
    degraded: Option<String>,
    model: String,
    digest: String,
    quota: Option<QuotaState>,
}

impl AnswerFacts {
    pub(super) fn of(answer: &Answer) -> Self {
        let model = answer.model();
        let (attempt, continued) = (answer.attempt(), answer.continued());
        let is_replayed = answer.origin().is_some_and(|origin| origin.replayed);
        let degraded = answer.degraded().map(ToString::to_string);
        let (model, digest, quota) = (model.key.to_string(), model.digest.to_string(), answer.quota());
        Self { attempt, continued, is_replayed, degraded, model, digest, quota }
    }
}

impl ResponseHeaders {
    pub(super) fn new(context: RequestContext, job: &Job, rate: Verdict) -> Self {
        Self { context, correlation_id: job.correlation_id.unwrap_or(context.correlation_id), rate }
    }

    /// Creates the headers of a response to a job that an earlier request began.
    pub(super) fn of_earlier(context: RequestContext, correlation_id: CorrelationId, rate: Verdict) -> Self {
        Self { context, correlation_id, rate }
    }

    pub(super) fn correlation_id(&self) -> CorrelationId {
        self.correlation_id
    }

    /// Adds the headers of an admitted request.
    pub(super) fn add(&self, bridge: &Bridge, headers: &mut HeaderMap, answer: Option<&AnswerFacts>) {
        let id = text(&self.correlation_id.to_string());
        headers.insert(HeaderName::from_static("x-request-id"), id.clone());
        headers.insert(HeaderName::from_static("x-tether-decision"), id);
        let millis = self.context.received.elapsed().as_millis() as u64;
        headers.insert(HeaderName::from_static("openai-processing-ms"), HeaderValue::from(millis));
        let region = text(bridge.gateway.config().region.as_str());
        headers.insert(HeaderName::from_static("x-tether-region"), region);
        errors::add_rate(headers, &self.rate);
        if let Some(answer) = answer {
            headers.insert(HeaderName::from_static("x-tether-attempts"), HeaderValue::from(answer.attempt));
            if answer.continued > 0 {
                headers.insert(HeaderName::from_static("x-tether-continued"), HeaderValue::from(answer.continued));
            }
            if let Some(degraded) = &answer.degraded {
                headers.insert(HeaderName::from_static("x-tether-degraded"), text(degraded));
            }
            if answer.is_replayed {
                headers.insert(HeaderName::from_static("idempotency-replayed"), HeaderValue::from_static("true"));
            }
            if let Some(quota) = &answer.quota {
                errors::add_token_quota(headers, quota, bridge.gateway.clock().now());
            }
            headers.insert(HeaderName::from_static("x-tether-model"), text(&answer.model));
            headers.insert(HeaderName::from_static("x-tether-model-digest"), text(&answer.digest));
        }
    }

    /// Builds the error response of a job.
    pub(super) fn failure(&self, bridge: &Bridge, error: &WireError) -> Response<Body> {
        let mut response = errors::failure(error);
        self.add(bridge, response.headers_mut(), None);
        if let Some(quota) = error.quota.as_deref() {
            errors::add_token_quota(response.headers_mut(), quota, bridge.gateway.clock().now());
        }
        response
    }
}

pub(super) fn refused(refusal: &Refusal, request: CorrelationId) -> Response<Body> {
    let mut response = errors::with_request(errors::failure(&refusal.error), request);
    if let Some(rate) = &refusal.rate {
        errors::add_rate(response.headers_mut(), rate);
    }
    response
}
