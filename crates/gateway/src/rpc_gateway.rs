//! The RPC server: `infer.submit` from any node with a valid API token.
//!
//! RPC requests pass the same [`Gateway::admit`] and [`Gateway::submit`] as HTTP requests, are parsed by the same
//! [`crate::openai::request`], and fail with the same codes.

pub(crate) mod submission;

use std::time::Duration;

use observability::TraceContext;
use protocol::control::{NodeInfo, NodeRole, Scope};
use protocol::gateway::{GatewayAnswer, MODELS, ModelsRequest};
use protocol::infer::SUBMIT;
use protocol::{ErrorCode, PublicKey, Topic, WireError};
use rpc::{Access, Caller, ResponseSink, Server, ServerLimits, StreamCall, announce};
use serde_json::value::{RawValue, to_raw_value};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::answer::{Answer, Whole};
use crate::config::{CUT_WITHIN, Config, seconds};
use crate::gateway::Gateway;
use crate::infer_request::native;
use crate::job::Job;
use crate::openai::request::Encoding;
use crate::openai::response::Heading;
use crate::openai::response::models::ModelList;
use crate::openai::response::vectors::write_vectors;
use crate::openai::response::whole::write_whole;
use crate::request_context::Origin;
use crate::upstream;
use submission::{Read, Submission, Words, parse_submission};

/// Maximum concurrent calls besides running jobs: lists of models, and jobs about to be refused.
const CALLS_BESIDES: usize = 1024;
/// Maximum bytes of request bodies in memory. It applies to callers that count as strangers: all of them, as long as
/// `body_bytes_max` is below the limit of members.
const REQUEST_BYTES: usize = 64 * 1024 * 1024;
/// How many clients it takes to use up the concurrent calls.
const CLIENTS_AT_LEAST: usize = 16;

/// Serves RPC clients on the gateway's node. Clones share one gateway.
#[derive(Clone)]
pub(crate) struct RpcGateway {
    gateway: Gateway,
}

/// A submitted job, and the format of its answer if that is not streamed.
struct Opened {
    answer: Box<Answer>,
    wording: Wording,
}

/// The API in whose format a job and its answer are written.
enum Wording {
    Native,
    /// `OpenAI`'s, for generated text.
    Generation(Heading),
    /// `OpenAI`'s, for embedding vectors.
    Vectors {
        model: String,
        encoding: Encoding,
    },
}

/// Returns the limits of the RPC server. Its clients are strangers, so they have all the calls and most of the
/// connections. Many keys can still fill these: a client with a call in progress is never disconnected for another. An
/// eighth of the connections is left to members.
fn limits(config: &Config) -> ServerLimits {
    let calls = config.jobs_max.saturating_add(CALLS_BESIDES);
    let defaults = ServerLimits::default();
    ServerLimits {
        strangers_calls_max: calls,
        strangers_calls_per_peer_max: calls / CLIENTS_AT_LEAST,
        strangers_body_bytes_max: REQUEST_BYTES,
        connections_max: config.connections_max,
        strangers_connections_max: config.connections_max - config.connections_max / 8,
        // Clients call again minutes later, and a new connection costs them a handshake.
        strangers_idle: defaults.idle,
        ..defaults
    }
}

impl RpcGateway {
    pub(crate) fn new(gateway: Gateway) -> Self {
        Self { gateway }
    }

    /// Serves until `stop`, then drains: waits for the calls under way, at most for the drain time.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let config = self.gateway.config().clone();
        let transport = self.gateway.transport().clone();
        let info = NodeInfo {
            roles: vec![NodeRole::Gateway],
            region: config.region.clone(),
            version: self.gateway.version().to_owned(),
        };
        let limits = limits(&config);
        let membership = self.gateway.membership().clone();
        let server = self.serve(Server::new(transport.clone(), info)).limits(limits).membership(membership);
        let server = server.body_limit(move |_| config.body_bytes_max);
        let topic = Topic::Control(config.region);
        info!(key = %transport.public_key(), "serving RPC");
        let announced = announce::keep_announced(&*transport, &topic, &stop);
        tokio::join!(server.run(stop.clone(), seconds(config.drain_secs) + CUT_WITHIN), announced);
    }

    fn serve(self, server: Server) -> Server {
        // Clients are no nodes of the pool. Their API token counts, which the gateway checks.
        server
            .with_state(self)
            .stream(SUBMIT, Access::Anyone, Self::stream)
            .unary_while_wanted(SUBMIT, Access::Anyone, Self::whole)
            .unary_while_wanted(MODELS, Access::Anyone, Self::models)
            .into_server()
    }

    /// Streams the chunks as they arrive. A call is accepted once the first chunk is there; until then it can be
    /// refused.
    async fn stream(self, mut call: StreamCall) {
        let (body, peer, deadline) = (call.body.clone(), call.peer, call.deadline);
        let write_timeout = seconds(self.gateway.config().write_timeout_secs);
        let opened = tokio::select! {
            biased;
            opened = self.open(peer, &body, deadline, false) => opened,
            // Dropping the pending job cancels it.
            () = call.cancelled() => return,
        };
        drop(body);
        match opened {
            Ok(Opened { answer, .. }) => {
                if let Ok(reply) = call.accept().await {
                    relay(*answer, reply, write_timeout, self.gateway.cut()).await;
                }
            }
            // The result is ignored: a caller that no longer listens needs no response.
            Err(error) => drop(time::timeout(write_timeout, call.refuse(error)).await),
        }
    }

    /// Answers with one JSON value, for callers that do not use streams.
    async fn whole(self, caller: Caller, body: Box<RawValue>) -> Result<Box<RawValue>, WireError> {
        let body = body.get().as_bytes();
        let Opened { mut answer, wording } = Box::pin(self.open(caller.key, body, None, true)).await?;
        let whole = answer.collect().await?;
        let written = match wording {
            Wording::Generation(heading) => write_whole(&heading, &answer, &whole).ok(),
            Wording::Vectors { model, encoding } => write_vectors(&model, encoding, &whole),
            Wording::Native => native_answer(&answer, whole).and_then(|answer| to_raw_value(&answer).ok()),
        };
        written.ok_or_else(|| WireError::new(ErrorCode::InternalError, "the answer could not be written"))
    }

    async fn models(self, caller: Caller, request: ModelsRequest) -> Result<ModelList, WireError> {
        let gateway = &self.gateway;
        let grant = gateway.authenticate(Some(&request.token), Some(Origin::Node(caller.key)), Scope::Infer).await?;
        let (models, fleet) = (gateway.models().await?, gateway.fleet().await?);
        Ok(ModelList::served(&models, &fleet, &grant.policy))
    }

    /// Admits a submission, parses its job and submits it to an orchestrator.
    async fn open(
        &self,
        caller: PublicKey,
        body: &[u8],
        deadline: Option<Instant>,
        is_whole: bool,
    ) -> Result<Opened, WireError> {
        let gateway = &self.gateway;
        let submission = parse_submission(body);
        let trace = submission.as_ref().ok().and_then(|submission| submission.traceparent.as_deref());
        let context = gateway.context(Some(Origin::Node(caller)), trace.and_then(TraceContext::parse))?;
        let Submission { token, job, traceparent: _ } = match submission {
            Ok(submission) => submission,
            Err(error) => {
                gateway.turn_down(context, &error);
                return Err(error);
            }
        };
        let admitted = gateway.admit(token.as_deref(), context).await?;
        let read = job.read().and_then(|read| if is_whole { read.for_one_value() } else { Ok(read) });
        let Read { job, words } = match read {
            Ok(read) => read,
            Err(error) => return Err(admitted.refuse(error).error),
        };
        let job = Job { deadline: sooner(job.deadline, deadline), ..job };
        let job = match gateway.identify(&admitted, job, !is_whole) {
            Ok(job) => job,
            Err(error) => return Err(admitted.refuse(error).error),
        };
        let wording = match words {
            Words::Native => Wording::Native,
            Words::Vectors { model, encoding } => Wording::Vectors { model, encoding },
            Words::Generation { endpoint, model, names_tier, calls_functions, .. } => {
                let id = job.correlation_id.unwrap_or(context.correlation_id);
                let heading = Heading::new(endpoint, model, &job, id, gateway.clock().now());
                let heading = Heading { calls_functions, ..heading };
                Wording::Generation(if names_tier { heading.with_tier(job.class) } else { heading })
            }
        };
        match gateway.submit(admitted, job).await {
            Ok(answer) => Ok(Opened { answer: Box::new(answer), wording }),
            // Names the invalid field as the client wrote it.
            Err(error) if matches!(wording, Wording::Native) => Err(native(error)),
            Err(error) => Err(error),
        }
    }
}

fn native_answer(answer: &Answer, whole: Whole) -> Option<GatewayAnswer> {
    let mut choices = whole.choices.into_iter();
    Some(GatewayAnswer {
        correlation_id: answer.correlation_id(),
        model_id: answer.model().key.model_id.clone(),
        version: answer.model().key.version,
        choice: choices.next()?,
        further_choices: choices.collect(),
        embeddings: whole.embeddings,
        usage: whole.usage,
        attempt: answer.attempt(),
        continued: answer.continued(),
        degraded: answer.degraded().cloned().map(Box::new),
    })
}

/// Forwards the chunks. A caller that leaves one unread for too long counts as gone, which cancels the job.
async fn relay(mut answer: Answer, mut reply: ResponseSink, write_timeout: Duration, cut: &CancellationToken) {
    loop {
        let piece = tokio::select! {
            biased;
            () = cut.cancelled() => Some(Err(upstream::stopping())),
            piece = answer.next() => piece,
            () = reply.cancelled() => return,
        };
        match piece {
            Some(Ok(piece)) => match time::timeout(write_timeout, reply.send(&piece.raw)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            },
            // Dropping the answer records the request's usage before the client learns of the end.
            Some(Err(error)) => {
                drop(answer);
                return drop(time::timeout(write_timeout, reply.fail(error)).await);
            }
            None => {
                drop(answer);
                return drop(time::timeout(write_timeout, reply.finish()).await);
            }
        }
    }
}

/// Returns the shorter of the job's own deadline and the time that its caller will wait.
fn sooner(named: Option<Duration>, until: Option<Instant>) -> Option<Duration> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    named.into_iter().chain(left).min()
}
