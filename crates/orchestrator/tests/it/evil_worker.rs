//! An enrolled worker that lies, beside an honest one (S-14): nobody is billed too much, the liar is ejected, and the
//! honest worker serves.

use metadata_store::UsageRecord;
use protocol::error_code::ContextLength;
use protocol::infer::{FinishReason, InferChunk, InferRequest, ModelDigest, Payload, Progress};
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, Digest, ErrorCode, WireError, codec};
use rpc::StreamCall;
use tether_orchestrator::Config;

use crate::stand::{Manner, Stand, Worker, model, stand};

/// Tokens that each job asks for.
const ASKED: u32 = 8;
const JOBS: usize = 20;

/// How a worker lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    /// Claims four billion tokens of the answer.
    OverclaimsAnswer,
    /// Claims four billion tokens of the prompt.
    OverclaimsPrompt,
    /// Claims the tokens that were asked for, and sends one.
    ClaimsAllOfOne,
    /// Sends ten times the tokens that were asked for.
    TenfoldTokens,
    /// Sends text without end.
    EndlessText,
    /// Sends progress without end.
    EndlessProgress,
    /// Sends bytes that are no text.
    Garbage,
    /// Sends a chunk that is cut in its middle.
    CutChunk,
    /// Continues after the last chunk.
    AfterDone,
    /// Leaves a chunk out.
    Gap,
    /// Answers another job.
    OtherJob,
    /// Ends without a last chunk.
    NoEnd,
    /// Accepts each job and fails.
    AcceptsAndFails,
    /// Refuses each job for the client's key.
    BlamesKey,
    /// Refuses short prompts as too long.
    BlamesLength,
    /// Refuses each job for a parameter, with a text for the client's terminal.
    BlamesParameter,
    /// Refuses each job with a code that would end it.
    Refuses(ErrorCode),
}

const LIES: [Lie; 21] = [
    Lie::Refuses(ErrorCode::WorkerFull),
    Lie::OverclaimsAnswer,
    Lie::OverclaimsPrompt,
    Lie::ClaimsAllOfOne,
    Lie::TenfoldTokens,
    Lie::EndlessText,
    Lie::EndlessProgress,
    Lie::Garbage,
    Lie::CutChunk,
    Lie::AfterDone,
    Lie::Gap,
    Lie::OtherJob,
    Lie::NoEnd,
    Lie::AcceptsAndFails,
    Lie::BlamesKey,
    Lie::BlamesLength,
    Lie::BlamesParameter,
    Lie::Refuses(ErrorCode::StaleAttempt),
    Lie::Refuses(ErrorCode::Cancelled),
    Lie::Refuses(ErrorCode::DeadlineExceeded),
    Lie::Refuses(ErrorCode::Unavailable),
];

fn usage(prompt_tokens: u32, completion_tokens: u32) -> TokenUsage {
    TokenUsage { prompt_tokens, completion_tokens, cached_tokens: prompt_tokens, reasoning_tokens: completion_tokens }
}

impl Lie {
    pub(crate) async fn serve(self, call: StreamCall, request: &InferRequest) {
        let (code, message) = match self {
            Self::BlamesKey => (ErrorCode::InvalidApiKey, "buy another key at evil.example".to_owned()),
            Self::BlamesLength => {
                let limit = ContextLength { context_length: 512, part: "prompt", prompt_tokens: 700 };
                return call.refuse(limit.into()).await;
            }
            Self::BlamesParameter => (ErrorCode::UnsupportedParameter, "\u{1b}]52;c;x\u{7}".to_owned()),
            Self::Refuses(code) => (code, "no".to_owned()),
            _ => return self.answer(call, request).await,
        };
        call.refuse(WireError::new(code, message).with_param("prompt")).await;
    }

    async fn answer(self, call: StreamCall, request: &InferRequest) {
        let Ok(mut reply) = call.accept().await else { return };
        let chunk = |seq: u64, payload: Payload| InferChunk::new(request.correlation_id, request.attempt, seq, payload);
        let piece = |tokens: u32| Payload { text: "a".into(), tokens: vec![1; tokens as usize], ..Payload::default() };
        let end = |seq, usage| InferChunk {
            done: true,
            ..chunk(seq, Payload { finish_reason: Some(FinishReason::Stop), usage: Some(usage), ..Payload::default() })
        };
        let honest = end(1, usage(3, 1));
        let text = "x".repeat(1 << 20);
        let endless = |seq| match self {
            Self::EndlessText => chunk(seq, Payload { text: text.clone(), ..Payload::default() }),
            _ => InferChunk {
                progress: Some(Progress { tokens_read: 1, tokens_total: 2 }),
                ..chunk(0, Payload { text: text.clone(), ..Payload::default() })
            },
        };
        let mut chunks: Vec<Vec<u8>> = match self {
            Self::OverclaimsAnswer => vec![chunk(0, piece(1)), end(1, usage(3, u32::MAX))],
            Self::OverclaimsPrompt => vec![chunk(0, piece(1)), end(1, usage(u32::MAX, 1))],
            Self::ClaimsAllOfOne => vec![chunk(0, piece(1)), end(1, usage(3, ASKED))],
            Self::TenfoldTokens => vec![chunk(0, piece(ASKED * 10)), honest],
            Self::AfterDone => vec![chunk(0, piece(1)), honest, chunk(2, piece(1)), end(3, usage(9, 9))],
            Self::Gap => vec![chunk(1, piece(1)), end(2, usage(3, 1))],
            Self::OtherJob => vec![InferChunk { correlation_id: CorrelationId(uuid::Uuid::nil()), ..honest }],
            _ => vec![],
        }
        .iter()
        .map(codec::encode)
        .collect();
        match self {
            Self::Garbage => chunks.push(vec![0xff; 100]),
            Self::CutChunk => chunks.push(codec::encode(&chunk(0, piece(1)))[..40].to_vec()),
            Self::AcceptsAndFails => {
                let _ = reply.fail(WireError::new(ErrorCode::WorkerFailed, "no")).await;
                return;
            }
            Self::EndlessText | Self::EndlessProgress => {
                let mut seq = 0;
                while reply.send(&codec::encode(&endless(seq))).await.is_ok() {
                    seq += 1;
                    assert!(seq < 1000, "the orchestrator reads on");
                }
                return;
            }
            _ => {}
        }
        for chunk in chunks {
            if reply.send(&chunk).await.is_err() {
                return;
            }
        }
        let _ = reply.finish().await;
    }
}

/// What a caller received of a job.
struct Received {
    outcome: Result<(), WireError>,
    tokens: u32,
    usage: Option<TokenUsage>,
    text: String,
}

async fn receive(stand: &Stand, job: &InferRequest) -> Received {
    let mut received = Received { outcome: Ok(()), tokens: 0, usage: None, text: String::new() };
    let mut stream = match stand.submit(job).await {
        Ok(stream) => stream,
        Err(error) => {
            received.outcome = Err(error.into());
            return received;
        }
    };
    while let Some(chunk) = stream.next().await {
        match chunk {
            Ok(chunk) => {
                let chunk: InferChunk = codec::decode(&chunk).expect("a chunk");
                received.tokens += chunk.payload.tokens.len() as u32;
                received.usage = chunk.payload.usage.or(received.usage);
                received.text += &chunk.payload.text;
            }
            Err(error) => received.outcome = Err(error.into()),
        }
    }
    received
}

fn job(stand: &Stand) -> InferRequest {
    let mut job = stand.job();
    job.input.max_tokens = Some(ASKED);
    job
}

fn billed(records: &[UsageRecord], job: &InferRequest) -> Vec<TokenUsage> {
    let of_job = records.iter().filter(|record| record.key.correlation_id == job.correlation_id);
    of_job.map(|record| record.usage).collect()
}

async fn report_with_context(stand: &Stand, worker: &Worker) {
    let reported = worker.report(stand, |report| report.model_cache[0].context_length = 8192).await;
    reported.expect("believed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_lies_is_ejected_and_nobody_is_billed_for_it() {
    for lie in LIES {
        let stand = stand(Config::default()).await;
        let (liar, honest) = stand.pair(Manner::Lie(lie), Manner::Answer(3)).await;
        report_with_context(&stand, &liar).await;
        report_with_context(&stand, &honest).await;
        let mut failures = 0;
        let mut jobs = vec![];
        for _ in 0..JOBS {
            let job = job(&stand);
            let received = receive(&stand, &job).await;
            if let Err(error) = &received.outcome {
                failures += 1;
                assert_eq!(error.code, ErrorCode::WorkerFailed, "{lie:?}: {error}");
                assert!(!error.message.contains("evil"), "{lie:?}: {error}");
            }
            jobs.push((job, received));
        }
        // An answer that has begun cannot begin again elsewhere. Everything else is answered by the honest worker.
        assert!(failures <= 1, "{lie:?}: {failures} jobs failed");
        let is_harmless = lie == Lie::AfterDone;
        assert!(is_harmless || liar.jobs_seen() <= 3, "{lie:?}: the liar got {} jobs", liar.jobs_seen());
        assert!(is_harmless || honest.jobs_seen() >= JOBS - 3, "{lie:?}: {}", honest.jobs_seen());
        let records = stand.usage().await;
        for (job, received) in jobs {
            for tokens in billed(&records, &job) {
                assert!(tokens.completion_tokens <= received.tokens.min(ASKED), "{lie:?}: {tokens:?}");
                assert!(tokens.prompt_tokens < 4096, "{lie:?}: {tokens:?}");
                assert!(tokens.cached_tokens <= tokens.prompt_tokens, "{lie:?}: {tokens:?}");
                assert!(tokens.reasoning_tokens <= tokens.completion_tokens, "{lie:?}: {tokens:?}");
                let told = received.usage.filter(|_| received.outcome.is_ok());
                let counts = |usage: TokenUsage| (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens);
                assert!(told.is_none_or(|told| counts(told) == counts(tokens)), "{lie:?}: {told:?} and {tokens:?}");
            }
            assert!(received.text.len() < 8 << 20, "{lie:?}");
        }
        assert!(!stand.metrics.encode().contains("tether_breaker_transitions_total{"), "{lie:?}: the breaker opened");
    }
}

#[tokio::test]
async fn an_ejected_worker_stays_ejected_when_it_restarts() {
    let stand = stand(Config::default()).await;
    let (liar, honest) = stand.pair(Manner::Lie(Lie::Garbage), Manner::Answer(1)).await;
    stand.answer(&stand.job()).await.expect("answered by the other");
    assert_eq!((liar.jobs_seen(), honest.jobs_seen()), (1, 1));
    liar.report(&stand, |report| report.epoch = 2).await.expect("believed");
    let job = stand.job();
    stand.answer(&job).await.expect("answered");
    assert_eq!((liar.jobs_seen(), honest.jobs_seen()), (1, 2));
    let refused = stand.explain(&job).await.attempts[0].refused.clone();
    assert!(refused.iter().any(|refused| refused.reason == "ejected"), "{refused:?}");
}

#[tokio::test]
async fn an_ejected_worker_gets_jobs_where_there_is_no_other() {
    let stand = stand(Config::default()).await;
    let only = stand.worker(1, Manner::Lie(Lie::Garbage)).await;
    stand.answer(&stand.job()).await.expect_err("nobody else");
    *only.manner.lock() = Manner::Answer(1);
    stand.answer(&stand.job()).await.expect("answered");
}

#[tokio::test]
async fn a_worker_with_another_file_under_the_models_name_gets_no_job() {
    let stand = stand(Config::default()).await;
    let (wrong, right) = stand.pair(Manner::Answer(1), Manner::Answer(1)).await;
    wrong.report(&stand, |report| report.model_cache[0].digest = Digest::of(b"another file")).await.expect("believed");
    for _ in 0..5 {
        let mut job = stand.job();
        job.digests = vec![ModelDigest { key: model(), digest: Digest::of(b"model") }];
        stand.answer(&job).await.expect("answered");
    }
    assert_eq!((wrong.jobs_seen(), right.jobs_seen()), (0, 5));
}
