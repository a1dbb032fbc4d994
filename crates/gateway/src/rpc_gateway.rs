//! RPC in, jobs out: `infer.submit` from any key that brings an API token (G1).
//!
//! What comes in here passes the same [`Gateway::admit`] and [`Gateway::submit`] as what comes in by HTTP, is read by
//! the same [`crate::openai::request`], and fails with the same codes.

pub(crate) mod submission;

use std::time::Duration;

use observability::TraceContext;
use protocol::control::{NodeInfo, NodeRole, Scope};
use protocol::gateway::{GatewayAnswer, MODELS, ModelsRequest};
use protocol::infer::SUBMIT;
use protocol::{ErrorCode, PublicKey, Topic, WireError};
use rpc::{Caller, Limits, ReplyStream, Server, StreamCall, announce};
use serde_json::value::{RawValue, to_raw_value};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::answer::{Answer, Whole};
use crate::config::seconds;
use crate::gateway::Gateway;
use crate::infer_request::native;
use crate::job::Job;
use crate::openai::request::Encoding;
use crate::openai::response::Heading;
use crate::openai::response::models::ModelList;
use crate::openai::response::vectors::write_vectors;
use crate::openai::response::whole::write_whole;
use crate::request_context::Origin;
use submission::{Read, Submission, Words, parse_submission};

/// Calls besides jobs that may be under way: lists of models, and jobs about to be refused.
const CALLS_BESIDES: usize = 1024;
/// Bytes of requests held at once. Every client is a stranger here.
const REQUEST_BYTES: usize = 256 * 1024 * 1024;

/// Serves RPC clients on the gateway's node. Clones are the same.
#[derive(Clone)]
pub(crate) struct RpcGateway {
    gateway: Gateway,
}

/// A job on its way, and how its answer is written where it comes as a whole.
struct Opened {
    answer: Box<Answer>,
    wording: Wording,
}

/// Whose words a job and its answer are in.
enum Wording {
    Native,
    /// `OpenAI`'s.
    Generation(Heading),
    /// `OpenAI`'s, for vectors.
    Vectors {
        model: String,
        encoding: Encoding,
    },
}

impl RpcGateway {
    pub(crate) fn new(gateway: Gateway) -> Self {
        Self { gateway }
    }

    /// Serves until `stop`, and then until the calls under way are done or the drain time is over.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let config = self.gateway.config().clone();
        let transport = self.gateway.transport().clone();
        let info = NodeInfo {
            roles: vec![NodeRole::Gateway],
            region: config.region.clone(),
            version: self.gateway.version().to_owned(),
        };
        let limits = Limits {
            strangers_calls_max: config.jobs_max.saturating_add(CALLS_BESIDES),
            strangers_body_bytes_max: REQUEST_BYTES,
            connections_max: config.connections_max,
            ..Limits::default()
        };
        let membership = self.gateway.membership().clone();
        let server = self.serve(Server::new(transport.clone(), info)).limits(limits).membership(membership);
        let server = server.body_limit(move |_| config.body_bytes_max);
        let topic = Topic::Control(config.region);
        info!(key = %transport.public_key(), "serving RPC");
        let announced = announce::keep_announced(&*transport, &topic, &stop);
        tokio::join!(server.run(stop.clone(), seconds(config.drain_secs)), announced);
    }

    fn serve(self, server: Server) -> Server {
        let server = server.with_state(self).stream(SUBMIT, Self::stream);
        server.unary_while_wanted(SUBMIT, Self::whole).unary_while_wanted(MODELS, Self::models).into_server()
    }

    /// Answers with each chunk as it comes. A call is accepted with its first chunk: until then it can be refused.
    async fn stream(self, mut call: StreamCall) {
        let (body, peer, deadline) = (call.body.clone(), call.peer, call.deadline);
        let write_timeout = seconds(self.gateway.config().write_timeout_secs);
        let opened = tokio::select! {
            biased;
            opened = self.open(peer, &body, deadline, false) => opened,
            // Dropping the job on its way cancels it.
            () = call.cancelled() => return,
        };
        drop(body);
        match opened {
            Ok(Opened { answer, .. }) => {
                if let Ok(reply) = call.accept().await {
                    relay(*answer, reply, write_timeout).await;
                }
            }
            // A caller that does not listen needs no answer.
            Err(error) => drop(time::timeout(write_timeout, call.refuse(error)).await),
        }
    }

    /// Answers with the whole as one JSON value, for callers that speak no streams.
    async fn whole(self, caller: Caller, body: Box<RawValue>) -> Result<Box<RawValue>, WireError> {
        let body = body.get().as_bytes();
        let Opened { mut answer, wording } = self.open(caller.key, body, None, true).await?;
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

    /// Lets a submission in, reads it, and hands its job to an orchestrator.
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
        let admission = gateway.admit(token.as_deref(), context).await?;
        let read = job.read().and_then(|read| if is_whole { read.for_one_value() } else { Ok(read) });
        let Read { job, words } = match read {
            Ok(read) => read,
            Err(error) => return Err(admission.refuse(error).error),
        };
        let job = Job { deadline: sooner(job.deadline, deadline), ..job };
        let wording = match words {
            Words::Native => Wording::Native,
            Words::Vectors { model, encoding } => Wording::Vectors { model, encoding },
            Words::Generation { endpoint, model, .. } => {
                let id = job.correlation_id.unwrap_or(context.correlation_id);
                Wording::Generation(Heading::new(endpoint, model, &job, id, gateway.clock().now()))
            }
        };
        match gateway.submit(admission, job).await {
            Ok(answer) => Ok(Opened { answer: Box::new(answer), wording }),
            // The field at fault is named as the client wrote it.
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
    })
}

/// Passes the chunks on. A caller that leaves one unread for too long counts as gone, which cancels the job.
async fn relay(mut answer: Answer, mut reply: ReplyStream, write_timeout: Duration) {
    loop {
        let piece = tokio::select! {
            biased;
            piece = answer.next() => piece,
            () = reply.cancelled() => return,
        };
        match piece {
            Some(Ok(piece)) => match time::timeout(write_timeout, reply.send(&piece.raw)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            },
            // What the request took is counted before its client learns of the end.
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

/// Returns the shorter of the time a job names and the time its caller will wait.
fn sooner(named: Option<Duration>, until: Option<Instant>) -> Option<Duration> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    named.into_iter().chain(left).min()
}
