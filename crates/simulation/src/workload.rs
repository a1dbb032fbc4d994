//! What the clients of a simulated network ask for, and what they get.

use std::time::Duration;

use fastrand::Rng;
use gateway::{Gateway, Job};
use protocol::gateway::GatewaySubmission;
use protocol::infer::{FinishReason, Input};
use protocol::infer::{InferChunk, InferSubmission, SUBMIT};
use protocol::model::{ModelKey, ModelRef};
use protocol::{CorrelationId, ErrorCode, PublicKey, RetryToken, TraceId, codec};
use rpc::{CallError, Client, StreamOptions};
use tokio::time::{self, Instant};
use uuid::Uuid;

use crate::scripted_engine::{ANSWER_TOKENS, word};

/// No request may take longer, whatever fails: the deadlines of the services are shorter.
const STUCK_AFTER: Duration = Duration::from_mins(5);

/// A request of a client.
#[derive(Debug, Clone)]
pub struct Request {
    pub id: CorrelationId,
    pub retry_token: RetryToken,
    pub tenant: usize,
    pub model: ModelKey,
    pub prompt: String,
    pub max_tokens: u32,
    /// How many tokens the client reads before it goes away; `None` if it reads all.
    pub leaves_after: Option<u32>,
    /// How long the client takes for each chunk.
    pub pause: Duration,
    /// How long the job goes on without its client.
    pub linger: Option<Duration>,
}

impl Request {
    pub fn random(number: u64, models: &[ModelKey], tenants: usize, random: &mut Rng) -> Self {
        let leaves_after = (random.u8(..5) == 0).then(|| random.u32(0..20));
        let pause = if random.u8(..10) == 0 { random.u64(50..800) } else { 0 };
        Self {
            id: CorrelationId(Uuid::from_u128(u128::from(random.u64(..)) << 64 | u128::from(number))),
            retry_token: format!("token-{number}").parse().expect("a token"),
            tenant: random.usize(..tenants),
            model: models[random.usize(..models.len())].clone(),
            prompt: format!("question {number} of {}", random.u32(..)),
            max_tokens: random.u32(1..2 * ANSWER_TOKENS),
            leaves_after,
            pause: Duration::from_millis(pause),
            linger: random.bool().then(|| Duration::from_secs(random.u64(1..10))),
        }
    }

    /// Returns how many tokens the whole answer has.
    pub fn tokens(&self) -> u32 {
        self.max_tokens.min(ANSWER_TOKENS)
    }

    /// Returns how many tokens the prompt has.
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt.split_whitespace().count() as u32
    }

    fn text(&self, tokens: u32) -> String {
        (0..tokens).map(|index| word(&self.prompt, index)).collect()
    }

    fn input(&self) -> Input {
        Input { prompt: Some(self.prompt.clone()), max_tokens: Some(self.max_tokens), ..Input::default() }
    }
}

/// What came of a request.
#[derive(Debug, Clone)]
pub struct Received {
    pub text: String,
    pub end: End,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The answer has its last piece.
    Finished(FinishReason),
    /// The client went away.
    Left,
    Failed(ErrorCode, String),
    /// The connection to the gateway broke.
    Broken,
    /// The gateway neither went on nor failed.
    Stuck,
}

impl Received {
    pub(crate) fn nothing(end: End) -> Self {
        Self { text: String::new(), end }
    }

    /// Returns what is wrong with it.
    pub fn check(&self, request: &Request) -> Option<String> {
        let whole = request.text(request.tokens());
        let reason = if request.max_tokens < ANSWER_TOKENS { FinishReason::Length } else { FinishReason::Stop };
        match self.end {
            End::Stuck => Some(format!("{} is stuck", request.id)),
            End::Finished(found) if self.text != whole || found != reason => {
                Some(format!("{} ended with {found:?} after {:?}, and not {whole:?}", request.id, self.text))
            }
            _ if !whole.starts_with(&self.text) => {
                Some(format!("{} got {:?}, which is no part of {whole:?}", request.id, self.text))
            }
            _ => None,
        }
    }

    /// Returns how many tokens it has.
    pub fn tokens(&self) -> u32 {
        self.text.matches(' ').count() as u32
    }
}

/// Asks a gateway as its HTTP side does, so that a piece counts as read when the client has it.
pub async fn ask_within(gateway: &Gateway, token: &str, request: &Request) -> Received {
    time::timeout(STUCK_AFTER, Box::pin(within(gateway, token, request))).await.unwrap_or(Received::nothing(End::Stuck))
}

async fn within(gateway: &Gateway, token: &str, request: &Request) -> Received {
    let trace_id = TraceId([1; 16]);
    let received = Instant::now();
    let context = gateway::RequestContext { correlation_id: request.id, trace_id, origin: None, received };
    let job = Job {
        model: ModelRef { name: request.model.model_id.clone(), version: None, adapter: None },
        input: request.input(),
        tenant_id: None,
        correlation_id: Some(request.id),
        retry_token: Some(request.retry_token.clone()),
        trace_id: Some(trace_id),
        linger: request.linger,
        keeps_answer: request.linger.is_some(),
        note: None,
        detached: false,
        class: None,
        deadline: None,
    };
    let admitted = match gateway.admit(Some(token), context).await {
        Ok(admitted) => admitted,
        Err(error) => return Received::nothing(End::Failed(error.code, error.message)),
    };
    let mut answer = match gateway.submit(admitted, job).await {
        Ok(answer) => answer,
        Err(error) => return Received::nothing(End::Failed(error.code, error.message)),
    };
    let mut reader = Reader::new(request);
    loop {
        let piece = match answer.next().await {
            Some(Ok(piece)) => piece,
            Some(Err(error)) => return reader.end(End::Failed(error.code, error.message)),
            None => return reader.end(End::Broken),
        };
        if let Some(end) = reader.read(&piece.content.text, piece.end.map(|end| end.reason)).await {
            return reader.end(end);
        }
    }
}

/// Asks a gateway over the network.
pub async fn ask_over(client: &Client, gateway: PublicKey, token: &str, request: &Request) -> Received {
    time::timeout(STUCK_AFTER, over(client, gateway, token, request)).await.unwrap_or(Received::nothing(End::Stuck))
}

async fn over(client: &Client, gateway: PublicKey, token: &str, request: &Request) -> Received {
    let submission = InferSubmission {
        tenant_id: None,
        model_id: request.model.model_id.clone(),
        version: None,
        input: request.input(),
        correlation_id: Some(request.id),
        retry_token: Some(request.retry_token.clone()),
        trace_id: None,
        deadline_ms: None,
        class: None,
    };
    let body = codec::encode(&GatewaySubmission::of(token, submission));
    let within = Duration::from_secs(40);
    let options = StreamOptions { accept_within: within, deadline: None, stall: within };
    let mut answer = match client.open_stream(gateway, SUBMIT, body.into(), options).await {
        Ok(answer) => answer,
        Err(error) => return Received::nothing(broken(error)),
    };
    let mut reader = Reader::new(request);
    loop {
        let chunk: InferChunk = match answer.next().await {
            Some(Ok(bytes)) => codec::decode(&bytes).expect("a gateway sends chunks"),
            Some(Err(error)) => return reader.end(broken(error)),
            None => return reader.end(End::Broken),
        };
        let finish_reason = chunk.payload.finish_reason.filter(|_| chunk.done);
        if let Some(end) = reader.read(&chunk.payload.text, finish_reason).await {
            return reader.end(end);
        }
    }
}

fn broken(error: CallError) -> End {
    match error {
        CallError::Remote(error) => End::Failed(error.code, error.message),
        _ => End::Broken,
    }
}

/// A client that reads an answer in its own way.
struct Reader<'a> {
    request: &'a Request,
    text: String,
    tokens: u32,
}

impl<'a> Reader<'a> {
    fn new(request: &'a Request) -> Self {
        Self { request, text: String::new(), tokens: 0 }
    }

    async fn read(&mut self, text: &str, finish_reason: Option<FinishReason>) -> Option<End> {
        self.text.push_str(text);
        self.tokens += u32::from(!text.is_empty());
        if let Some(reason) = finish_reason {
            return Some(End::Finished(reason));
        }
        if self.request.leaves_after.is_some_and(|after| self.tokens >= after) {
            return Some(End::Left);
        }
        if !self.request.pause.is_zero() {
            time::sleep(self.request.pause).await;
        }
        None
    }

    fn end(self, end: End) -> Received {
        Received { text: self.text, end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        let model = crate::network::models().remove(0);
        let random = &mut Rng::with_seed(1);
        Request { max_tokens: 3, ..Request::random(1, &[model], 1, random) }
    }

    fn received(text: &str, end: End) -> Received {
        Received { text: text.to_owned(), end }
    }

    #[test]
    fn a_whole_answer_and_each_part_of_it_are_well() {
        let request = request();
        let finished = received(&request.text(3), End::Finished(FinishReason::Length));
        assert_eq!((finished.check(&request), finished.tokens()), (None, 3));
        for tokens in 0..3 {
            assert_eq!(received(&request.text(tokens), End::Broken).check(&request), None);
        }
    }

    #[test]
    fn a_splice_a_repeat_and_an_end_too_early_are_noticed() {
        let request = request();
        let repeated = format!("{}{}", request.text(1), request.text(1));
        let foreign = word("another prompt", 0);
        let early = received(&request.text(2), End::Finished(FinishReason::Length));
        let reason = received(&request.text(3), End::Finished(FinishReason::Stop));
        for wrong in [received(&repeated, End::Broken), received(&foreign, End::Left), early, reason] {
            assert!(wrong.check(&request).is_some(), "{wrong:?}");
        }
        assert!(Received::nothing(End::Stuck).check(&request).is_some());
    }
}
