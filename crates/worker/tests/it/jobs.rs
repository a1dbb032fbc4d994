//! What a job gets: an answer, a refusal, or an error with the right code.

use bytes::Bytes;
use engine::{MockOptions, MockRuntime, ModelRuntime as _};
use protocol::infer::{FinishReason, InferRequest, Input, START};
use protocol::signature::NodeKey;
use protocol::usage::TokenUsage;
use protocol::{CorrelationId, ErrorCode, codec};
use rpc::CallError;
use rpc::frame::{Frame, WINDOW};
use tether_worker::Config;
use tokio::time::{self, Instant};

use crate::{SECOND, Scene, config, next, of_tenant, read, request, slow, text, uuid};

#[tokio::test(start_paused = true)]
async fn an_answer_comes_in_numbered_chunks_that_end_with_reason_and_usage() {
    let scene = Scene::ready(config(), MockOptions { per_token: SECOND / 100, ..MockOptions::default() }).await;
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!(error, None);
    assert_eq!(text(&chunks), MockRuntime::text(16));
    let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.payload.tokens.clone()).collect();
    assert_eq!(tokens, (0..16).collect::<Vec<_>>());
    // One chunk a token, and the end.
    assert_eq!(chunks.len(), 17);
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!((chunk.seq, chunk.attempt), (index as u64, 3));
        assert_eq!((chunk.correlation_id, chunk.done), (CorrelationId(uuid(1)), index == 16));
        assert_eq!(chunk.model, (index == 0).then(|| request().model()), "the first says which model answers");
    }
    let last = &chunks[16].payload;
    assert_eq!((last.text.as_str(), last.tokens.len()), ("", 0));
    assert_eq!(last.finish_reason, Some(FinishReason::Stop));
    assert_eq!(
        last.usage,
        Some(TokenUsage { prompt_tokens: 3, completion_tokens: 16, cached_tokens: 0, reasoning_tokens: 0 })
    );
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_ready_together_travel_together() {
    let scene = Scene::ready(config(), MockOptions { tokens: 3_000, ..MockOptions::default() }).await;
    let (chunks, error) = read(scene.open(&request()).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(3_000)));
    assert!(chunks.len() < 300, "{} chunks", chunks.len());
    assert!(chunks.iter().enumerate().all(|(index, chunk)| chunk.seq == index as u64));
}

#[tokio::test(start_paused = true)]
async fn a_token_limit_ends_the_answer_by_length() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let limited = InferRequest { input: Input { max_tokens: Some(2), ..request().input }, ..request() };
    let (chunks, _) = read(scene.open(&limited).await.expect("accepted")).await;
    assert_eq!(text(&chunks), "tok0 tok1");
    assert_eq!(chunks.last().expect("an end").payload.finish_reason, Some(FinishReason::Length));
}

#[tokio::test(start_paused = true)]
async fn each_refusal_has_its_code_and_names_the_field_at_fault() {
    let scene = Scene::ready(config(), MockOptions { context_length: 3, ..MockOptions::default() }).await;
    let with = |input: Input| InferRequest { input, ..request() };
    let input = || request().input;
    for (refused, code, param) in [
        (with(Input { temperature: Some(9.0), ..input() }), ErrorCode::InvalidValue, Some("temperature")),
        (with(Input { adapter: Some("pirate".parse().expect("a name")), ..input() }), ErrorCode::ModelNotHere, None),
        (InferRequest { version: "2.0".parse().expect("a version"), ..request() }, ErrorCode::ModelNotHere, None),
        (request(), ErrorCode::ContextLengthExceeded, Some("prompt")),
        (InferRequest { deadline_ms: Some(0), ..request() }, ErrorCode::DeadlineExceeded, None),
    ] {
        let error = scene.refusal(&refused).await;
        assert_eq!((error.code, error.param.as_deref()), (code, param), "{error}");
    }
    // None of them holds a place.
    time::sleep(SECOND).await;
    assert_eq!(scene.orchestrator.last().capacity.running, 0);
}

#[tokio::test(start_paused = true)]
async fn a_long_request_is_acknowledged_before_it_is_read_and_a_full_worker_reads_none() {
    let mock = MockOptions { context_length: 1_000_000, ..slow() };
    let scene = Scene::ready(Config { slots: 1, queue_max: 0, ..config() }, mock).await;
    let long = |temperature| {
        let input = Input { prompt: Some("word ".repeat(100_000)), temperature, ..Input::default() };
        InferRequest { input, ..request() }
    };
    let stream = scene.open(&long(Some(9.0))).await.expect("acknowledged");
    let (chunks, error) = read(stream).await;
    let Some(CallError::Remote(error)) = error else { panic!("{error:?}") };
    assert_eq!((chunks.len(), error.code, error.param.as_deref()), (0, ErrorCode::InvalidValue, Some("temperature")));
    let mut running = scene.open(&long(None)).await.expect("acknowledged");
    next(&mut running).await.expect("it runs").expect("and well");
    assert_eq!(scene.refusal(&long(None)).await.code, ErrorCode::WorkerFull);
}

#[tokio::test(start_paused = true)]
async fn one_job_more_than_slots_and_queue_is_refused() {
    let scene = Scene::ready(Config { slots: 1, queue_max: 1, ..config() }, slow()).await;
    let mut first = scene.open(&request()).await.expect("a slot");
    let _second = scene.open(&request()).await.expect("a place in the queue");
    next(&mut first).await.expect("it runs").expect("and well");
    let error = scene.refusal(&request()).await;
    assert_eq!((error.code, error.retry_after_ms), (ErrorCode::WorkerFull, Some(1_000)));
    time::sleep(SECOND).await;
    let capacity = scene.orchestrator.last().capacity;
    assert_eq!((capacity.slots, capacity.queue_max, capacity.running, capacity.waiting), (1, 1, 1, 1));
    assert!((scene.metric("tether_worker_requests_running") - 1.0).abs() < f64::EPSILON);
    assert!((scene.metric("tether_worker_requests_waiting") - 1.0).abs() < f64::EPSILON);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_over_its_share_is_refused_while_others_are_taken() {
    let scene = Scene::ready(Config { tenant_jobs_max: Some(1), ..config() }, slow()).await;
    let first = scene.open(&of_tenant("acme")).await.expect("within its share");
    assert_eq!(scene.refusal(&of_tenant("acme")).await.code, ErrorCode::WorkerFull);
    let _other = scene.open(&of_tenant("globex")).await.expect("another tenant");
    drop(first);
    time::sleep(SECOND).await;
    scene.open(&of_tenant("acme")).await.expect("its job is gone");
}

#[tokio::test(start_paused = true)]
async fn the_next_job_finds_its_place_free_once_the_last_chunk_is_read() {
    let scene = Scene::ready(Config { slots: 1, queue_max: 0, ..config() }, MockOptions::default()).await;
    for _ in 0..20 {
        let mut stream = scene.open(&request()).await.expect("the place is free");
        while !next(&mut stream).await.expect("it goes on").expect("and well").done {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_job_stops_its_generation() {
    let scene = Scene::ready(config(), slow()).await;
    let mut stream = scene.open(&request()).await.expect("accepted");
    for _ in 0..3 {
        next(&mut stream).await.expect("it runs").expect("and well");
    }
    drop(stream);
    time::sleep(SECOND).await;
    let state = &scene.runtime.load_state()[0];
    assert_eq!((state.running, state.counters.cancelled), (0, 1));
    assert!(state.counters.generated_tokens <= 4, "{state:?}");
    // And /metrics shows it.
    assert!((scene.metric("tether_engine_cancelled_total") - 1.0).abs() < f64::EPSILON);
    let steps = scene.metric("tether_engine_decode_steps_total");
    assert!((steps - state.counters.decode_steps as f64).abs() < f64::EPSILON);
    assert_eq!(scene.orchestrator.last().capacity.running, 0);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_vanishes_without_a_cancel_stops_its_generation() {
    let scene = Scene::ready(config(), slow()).await;
    let caller = scene.world.network.node(&NodeKey::from_seed(&[9; 32]));
    let connection = caller.connect(scene.handle.worker_id()).await.expect("connected");
    // Frame by frame, because an `ResponseStream` that is dropped would send a cancel.
    let channel = connection.open_channel().await.expect("opened");
    let body = Bytes::from(codec::encode(&request()));
    let body_bytes = body.len() as u32;
    let open = Frame::Open { credit: WINDOW, deadline_ms: 0, method: START.to_owned(), body_bytes, body };
    assert!(channel.send(open.encode()).await);
    assert_eq!(Frame::decode(channel.receive().await.expect("an answer")), Ok(Frame::Accept));
    let first = Frame::decode(channel.receive().await.expect("a chunk"));
    assert!(matches!(first, Ok(Frame::Data { .. })), "{first:?}");
    drop(channel);
    time::sleep(SECOND).await;
    let state = &scene.runtime.load_state()[0];
    assert_eq!((state.running, state.counters.cancelled), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_does_not_read_slows_only_its_own_job_and_is_given_up() {
    let quick = MockOptions { tokens: 1_000_000, context_length: 2_000_000, ..MockOptions::default() };
    let scene = Scene::ready(config(), quick).await;
    let _unread = scene.open(&request()).await.expect("accepted");
    let limited = InferRequest { input: Input { max_tokens: Some(50), ..request().input }, ..request() };
    let (chunks, error) = read(scene.open(&limited).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks)), (None, MockRuntime::text(50)));
    let made = scene.runtime.load_state()[0].counters.generated_tokens;
    assert!(made < 100_000, "back pressure holds the engine: {made} tokens");
    time::sleep(SECOND * 90).await;
    assert_eq!(scene.runtime.load_state()[0].running, 0);
}

#[tokio::test(start_paused = true)]
async fn the_deadline_ends_a_job_that_has_not_begun_whether_it_came_with_the_stream_or_the_request() {
    let scene = Scene::ready(config(), MockOptions { first_token: SECOND * 10, ..slow() }).await;
    let hurried = InferRequest { deadline_ms: Some(1_000), ..request() };
    for (request, wait) in [(request(), Some(SECOND)), (hurried, None)] {
        let begin = Instant::now();
        let stream = scene.open_within(&request, wait).await.expect("accepted");
        let (chunks, error) = read(stream).await;
        assert_eq!(chunks, []);
        let late = match error.expect("the deadline passes") {
            CallError::Remote(error) => error.code == ErrorCode::DeadlineExceeded,
            other => other == CallError::Deadline,
        };
        assert!(late && begin.elapsed() == SECOND, "after {:?}", begin.elapsed());
    }
    time::sleep(SECOND).await;
    assert_eq!(scene.runtime.load_state()[0].running, 0);
}
