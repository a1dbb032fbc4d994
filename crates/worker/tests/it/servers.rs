//! Models of servers that run already, from the attachment to the answer.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::MockOptions;
use parking_lot::Mutex;
use protocol::control::Empty;
use protocol::health::{HealthReport, ModelServer, ModelState, ServerKind};
use protocol::infer::{Delivered, DeliveredAnswer, DeliveredText, FinishReason, InferRequest, Input};
use protocol::model::{ModelOffer, OfferedSource};
use protocol::usage::TokenUsage;
use protocol::{Digest, ErrorCode, WireError};
use rpc::{CallError, Membership};
use tether_worker::{Config, NotReady, RemoteServer, ServedModel};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use crate::offers::registry;
use crate::{SECOND, Scene, World, config, model, read, request, text};

const MODELS: &str = r#"{"data":[{"id":"Org/M","owned_by":"vllm","max_model_len":2048}]}"#;
const ANSWER: &str = concat!(
    "data: {\"choices\":[{\"index\":0,\"text\":\"once \"}]}\n\n",
    "data: {\"choices\":[{\"index\":0,\"text\":\"more\",\"finish_reason\":\"length\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n",
);
/// The beginning of that answer, whose server dies.
const BEGUN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"once \"}]}\n\n";
const REST: &str = concat!(
    "data: {\"choices\":[{\"index\":0,\"text\":\" more\",\"finish_reason\":\"length\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":1}}\n\ndata: [DONE]\n\n",
);

/// Serves as vLLM does, and returns the address.
async fn server(tasks: &TaskTracker) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    tasks.spawn(async move {
        let connections = TaskTracker::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(answer(stream));
        }
    });
    format!("http://{address}/v1")
}

/// Answers one request as vLLM does, and returns its path.
async fn answer(mut stream: TcpStream) -> Option<String> {
    let mut request = String::new();
    let mut piece = [0; 4_096];
    // What is sent to it ends with a brace, or is a head without a body.
    while !(request.ends_with('}') || (request.starts_with("GET") && request.ends_with("\r\n\r\n"))) {
        match stream.read(&mut piece).await {
            Ok(length) if length > 0 => request.push_str(&String::from_utf8_lossy(&piece[..length])),
            _ => return None,
        }
    }
    let (status, body) = match request.split(' ').nth(1) {
        Some("/v1/models") => (200, MODELS),
        // It accepts, and then hangs.
        Some("/v1/completions") if request.contains("hang") => return std::future::pending().await,
        Some("/v1/completions") if request.contains("\"break off once\"") => (200, REST),
        Some("/v1/completions") if request.contains("break off") => (200, BEGUN),
        Some("/v1/completions") => (200, ANSWER),
        _ => (404, "{}"),
    };
    let head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    // A client that left needs no answer.
    let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    request.split(' ').nth(1).map(str::to_owned)
}

async fn scene(outcome: Result<Empty, WireError>) -> (Scene, Arc<Mutex<Vec<ModelOffer>>>) {
    scene_with(outcome, config()).await
}

async fn scene_with(outcome: Result<Empty, WireError>, config: Config) -> (Scene, Arc<Mutex<Vec<ModelOffer>>>) {
    let tasks = TaskTracker::new();
    let remote = RemoteServer { base_url: server(&tasks).await, model: "Org/M".into(), api_key_file: None };
    let served = ServedModel { digest: None, remote: Some(remote), ..model() };
    let config = Config { models: vec![served], ..config };
    let mut offers = None;
    let prepare = |world: &World| offers = Some(registry(world, outcome));
    let scene =
        Scene::build(config, MockOptions::default(), prepare, |runtime| runtime, |_| Membership::unchecked()).await;
    (scene, offers.expect("it was prepared"))
}

async fn report_with(scene: &Scene, state: ModelState) -> HealthReport {
    let deadline = Instant::now() + SECOND * 20;
    loop {
        let report = scene.orchestrator.reports().pop();
        if let Some(report) = report.filter(|report| report.model_cache.iter().any(|model| model.state == state)) {
            return report;
        }
        assert!(Instant::now() < deadline, "no report tells {state:?}");
        sleep(SECOND / 20).await;
    }
}

#[tokio::test]
async fn a_servers_model_is_offered_reported_unattested_and_answers() {
    let (scene, offers) = scene(Ok(Empty {})).await;
    scene.handle.ready().await.expect("it is attached and listed");
    let cached = report_with(&scene, ModelState::Ready).await.model_cache.remove(0);
    assert_eq!((cached.attested, cached.digest), (false, Digest::of(b"remote:Org/M")));
    let source = OfferedSource::Server { served_as: "Org/M".into() };
    let offer = ModelOffer { key: model().key(), source, context_length: 2_048, facts: None };
    assert_eq!(*offers.lock(), [offer]);

    let job = InferRequest { input: Input { prompt: Some("say it".into()), ..Input::default() }, ..request() };
    let (chunks, error) = read(scene.open(&job).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks).as_str()), (None, "once more"));
    let last = &chunks.last().expect("chunks").payload;
    let usage = TokenUsage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 0, reasoning_tokens: 0 };
    assert_eq!((last.finish_reason, last.usage), (Some(FinishReason::Length), Some(usage)));
}

#[tokio::test]
async fn an_answer_that_broke_off_on_a_server_goes_on_after_its_text() {
    let (scene, _) = scene(Ok(Empty {})).await;
    scene.handle.ready().await.expect("it is attached and listed");
    let cached = report_with(&scene, ModelState::Ready).await.model_cache.remove(0);
    assert_eq!(cached.server, Some(ModelServer { kind: ServerKind::Vllm, prefills: true }));
    let first = InferRequest { input: Input { prompt: Some("break off ".into()), ..Input::default() }, ..request() };
    let (chunks, error) = read(scene.open(&first).await.expect("accepted")).await;
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
    assert_eq!(text(&chunks), "once ");

    let known = DeliveredText { text: "once ".into(), tokens: 2 };
    let answers = vec![DeliveredAnswer { text: Some(known), ..DeliveredAnswer::default() }];
    let delivered = Some(Delivered { seq: chunks.len() as u64, answers });
    let second = InferRequest { attempt: 2, delivered, ..first };
    let (rest, error) = read(scene.open(&second).await.expect("accepted")).await;
    assert_eq!((error, text(&rest).as_str(), rest[0].seq), (None, "more", chunks.len() as u64));
    let usage = TokenUsage { prompt_tokens: 3, completion_tokens: 3, cached_tokens: 0, reasoning_tokens: 0 };
    assert_eq!(rest.last().expect("chunks").payload.usage, Some(usage));
}

#[tokio::test]
async fn an_engine_does_not_continue_the_text_of_a_server() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let known = DeliveredText { text: "once".into(), tokens: 1 };
    let answers = vec![DeliveredAnswer { text: Some(known), ..DeliveredAnswer::default() }];
    let job = InferRequest { delivered: Some(Delivered { seq: 1, answers }), ..request() };
    assert_eq!(scene.refusal(&job).await.code, ErrorCode::UnsupportedParameter);
}

#[tokio::test]
async fn a_server_that_hangs_before_its_first_token_fails_the_job_long_before_its_deadline() {
    let (scene, _) = scene_with(Ok(Empty {}), Config { server_stall_secs: 1, ..config() }).await;
    scene.handle.ready().await.expect("it is attached and listed");
    let ask = |prompt: &str| InferRequest {
        input: Input { prompt: Some(prompt.into()), ..Input::default() },
        deadline_ms: Some(600_000),
        ..request()
    };
    let (chunks, error) = read(scene.open(&ask("hang")).await.expect("accepted")).await;
    assert!(chunks.iter().all(|chunk| chunk.progress.is_some()), "{chunks:?}");
    assert!(matches!(error, Some(CallError::Remote(error)) if error.code == ErrorCode::WorkerFailed));
    // The request may be at fault, so the server stays in use.
    let (chunks, error) = read(scene.open(&ask("say it")).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks).as_str()), (None, "once more"));
}

#[tokio::test]
async fn a_server_of_our_own_that_ends_is_a_failed_load() {
    let served = ServedModel { server_command: vec!["false".into(), "{port}".into()], ..model() };
    let scene = Scene::new(Config { models: vec![served], ..config() }, MockOptions::default()).await;
    let Err(NotReady::LoadFailed { reason, .. }) = scene.handle.ready().await else { panic!("nothing answers") };
    assert!(reason.contains("ended before it answered"), "{reason}");
    // Its bytes were verified all the same.
    assert!(report_with(&scene, ModelState::Error).await.model_cache[0].attested);
}

/// Takes the port that a server is told first, and counts the prompts that it gets there.
async fn take_the_first_port(told: PathBuf, prompts: Arc<AtomicUsize>) {
    let port: u16 = loop {
        let text = std::fs::read_to_string(&told).unwrap_or_default();
        match text.lines().next() {
            Some(port) if text.ends_with('\n') => break port.parse().expect("a port"),
            _ => sleep(SECOND / 100).await,
        }
    };
    let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("it is free");
    let connections = TaskTracker::new();
    while let Ok((stream, _)) = listener.accept().await {
        let prompts = prompts.clone();
        connections.spawn(async move {
            if answer(stream).await.is_some_and(|path| path.ends_with("completions")) {
                prompts.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_program_that_takes_a_servers_port_gets_no_prompt_and_the_server_another_port() {
    let folder = tempfile::tempdir().expect("a folder");
    let told = folder.path().join("ports");
    // At its first start it does not listen yet, as a server that still loads its model.
    let script = format!(
        "echo {{port}} >> '{0}'; test $(wc -l < '{0}') = 1 && exec sleep 600; \
         PORT={{port}} exec '{1}' --exact servers::serve_a_port --ignored",
        told.display(),
        std::env::current_exe().expect("this program").display()
    );
    let server_paths = vec![folder.path().to_owned(), std::env::current_exe().expect("this program")];
    let served = ServedModel { server_command: vec!["sh".into(), "-c".into(), script], server_paths, ..model() };
    let (tasks, prompts) = (TaskTracker::new(), Arc::new(AtomicUsize::new(0)));
    tasks.spawn(take_the_first_port(told, prompts.clone()));
    let scene = Scene::new(Config { models: vec![served], ..config() }, MockOptions::default()).await;
    scene.handle.ready().await.expect("the second start listens");
    let job = InferRequest { input: Input { prompt: Some("say it".into()), ..Input::default() }, ..request() };
    let (chunks, error) = read(scene.open(&job).await.expect("accepted")).await;
    assert_eq!((error, text(&chunks).as_str()), (None, "once more"));
    assert_eq!(prompts.load(Ordering::Relaxed), 0);
}

#[tokio::test]
#[ignore = "run in a process of its own by a_program_that_takes_a_servers_port_gets_no_prompt_and_the_server_another_port"]
async fn serve_a_port() {
    let port = std::env::var_os("PORT").and_then(|port| port.to_str()?.parse::<u16>().ok()).expect("a port");
    let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("it is free");
    let connections = TaskTracker::new();
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn(answer(stream));
    }
}

#[tokio::test]
async fn a_model_that_the_registry_refuses_gets_no_job() {
    let refusal = WireError::new(ErrorCode::InvalidValue, "another model has this name");
    let (scene, _) = scene(Err(refusal)).await;
    let Err(NotReady::LoadFailed { reason, .. }) = scene.handle.ready().await else { panic!("it was refused") };
    assert!(reason.contains("another model has this name"), "{reason}");
    let report = report_with(&scene, ModelState::Error).await;
    assert!(!report.model_cache[0].attested);
}
