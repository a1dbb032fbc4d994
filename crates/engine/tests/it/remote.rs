//! The remote runtime against servers of each dialect, as their documents describe them.

mod fake_server;

use std::time::Duration;

use serde_json::json;
use tether_engine::remote::dialect::{Dialect, Kind};
use tether_engine::remote::{RemoteRuntime, ServerAddress, Timeouts};
use tether_engine::{
    ContinuedText, EmbedRequest, EngineError, Event, FinishReason, GenerateRequest, ListedToken, LoadOptions,
    LoadedModel, Message, ModelId, ModelRuntime, Piece, PromptInput, Ranking, RerankRequest, Role, Scores, ServerFacts,
    TokenListing, TokenUsage,
};
use tokio::time::timeout;

use self::fake_server::{FakeServer, Reply};
use crate::TIMEOUT;

const VLLM_MODELS: &str =
    r#"{"object":"list","data":[{"id":"qwen/Qwen3-8B","object":"model","owned_by":"vllm","max_model_len":4096}]}"#;
const VLLM_ANSWER: &str = concat!(
    "data: {\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"reasoning_content\":\"It is \"},\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Tokyo\"},\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\".\"},\"finish_reason\":\"stop\",\"stop_reason\":null}]}\n\n",
    "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":14,\"total_tokens\":18,\"completion_tokens\":4,\"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\n",
    "data: [DONE]\n\n",
);
const FIRST_PIECE: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"To\"}}]}\n\n";

/// Answers as vLLM does, with `answer` to conversations and no vectors.
fn vllm(path: &str, answer: Reply) -> Reply {
    match path {
        "/v1/models" => Reply::Json(200, VLLM_MODELS.into()),
        "/v1/chat/completions" => answer,
        "/tokenize" => Reply::Json(200, r#"{"count":7,"max_model_len":4096,"tokens":[1,2,3,4,5,6,7]}"#.into()),
        _ => Reply::Json(404, r#"{"detail":"Not Found"}"#.into()),
    }
}

fn address(server: &FakeServer) -> ServerAddress {
    ServerAddress::new(&server.url(), Some("sesame".into())).expect("an address")
}

fn hasty() -> Timeouts {
    let short = Duration::from_millis(100);
    Timeouts { describe: TIMEOUT, begin: TIMEOUT, idle: short, health_check_interval: short }
}

async fn attach(runtime: &RemoteRuntime, server: &FakeServer, name: &str) -> LoadedModel {
    let options = LoadOptions { slots: 1, queue_max: 1, ..LoadOptions::default() };
    runtime.attach(address(server), name, &options).await.expect("the server lists it").0
}

async fn attached_vllm(answer: Reply) -> (FakeServer, RemoteRuntime, ModelId) {
    let server = FakeServer::start(move |path, _| vllm(path, answer.clone())).await;
    let runtime = RemoteRuntime::default();
    let id = attach(&runtime, &server, "qwen/Qwen3-8B").await.id;
    (server, runtime, id)
}

fn question(model: ModelId) -> GenerateRequest {
    let messages = vec![Message::new(Role::User, "What is the capital of Japan?")];
    GenerateRequest { max_tokens: Some(9), ..GenerateRequest::new(model, PromptInput::Chat(messages.into())) }
}

async fn events_of(runtime: &RemoteRuntime, request: GenerateRequest) -> Vec<Result<Event, EngineError>> {
    let mut stream = runtime.generate(request).await.expect("it begins");
    let mut events = Vec::new();
    while let Some(event) = timeout(TIMEOUT, stream.next()).await.expect("in time") {
        events.push(event);
    }
    events
}

#[tokio::test]
async fn an_answer_of_vllm_comes_whole_with_its_usage() {
    let (server, runtime, id) = attached_vllm(Reply::Events(VLLM_ANSWER.into())).await;
    let events = events_of(&runtime, question(id)).await;
    let usage = TokenUsage { prompt_tokens: 14, completion_tokens: 4, cached_tokens: 8, reasoning_tokens: 0 };
    assert_eq!(events.last(), Some(&Ok(Event::Done { reason: FinishReason::Stop, usage, rest: Piece::default() })));
    let (mut text, mut reasoning) = (String::new(), String::new());
    for event in events {
        if let Ok(Event::Piece(piece)) = event {
            text.push_str(&piece.text);
            reasoning.push_str(&piece.reasoning);
        }
    }
    assert_eq!((text.as_str(), reasoning.as_str()), ("Tokyo.", "It is "));
    let state = runtime.load_state().remove(0);
    assert_eq!((state.running, state.counters.completed, state.counters.generated_tokens), (0, 1, 4));
    let asked = server.request("/v1/chat/completions").expect("it was asked");
    assert_eq!(
        (&asked["model"], &asked["max_tokens"], &asked["stream"]),
        (&json!("qwen/Qwen3-8B"), &json!(9), &json!(true))
    );
    assert!(server.heads().iter().all(|head| head.to_lowercase().contains("authorization: bearer sesame")));
}

#[tokio::test]
async fn a_server_that_sends_elsewhere_is_not_followed() {
    let other = FakeServer::start(|path, _| vllm(path, Reply::Events(VLLM_ANSWER.into()))).await;
    let (_server, runtime, id) = attached_vllm(Reply::Elsewhere(other.url())).await;
    let refused = runtime.generate(question(id)).await;
    assert!(matches!(refused, Err(EngineError::Failed { .. })), "{:?}", refused.err());
    // Neither the prompt nor the server's key.
    assert_eq!(other.heads(), [""; 0]);
}

#[tokio::test]
async fn a_reader_that_leaves_closes_the_connection_at_once() {
    let (server, runtime, id) = attached_vllm(Reply::EventsAndSilence(FIRST_PIECE.into())).await;
    let mut stream = runtime.generate(question(id)).await.expect("it begins");
    timeout(TIMEOUT, stream.next()).await.expect("in time").expect("an event").expect("it starts");
    drop(stream);
    timeout(Duration::from_secs(2), server.left()).await.expect("the connection is closed");
    assert_eq!((runtime.load_state()[0].running, runtime.load_state()[0].counters.cancelled), (0, 1));
}

#[tokio::test]
async fn a_caller_that_leaves_before_the_answer_closes_the_connection_too() {
    let (server, runtime, id) = attached_vllm(Reply::Silence).await;
    let begun = timeout(Duration::from_millis(200), runtime.generate(question(id))).await;
    begun.expect_err("nothing was answered");
    timeout(Duration::from_secs(2), server.left()).await.expect("the connection is closed");
    assert_eq!(runtime.load_state()[0].running, 0);
}

#[tokio::test]
async fn one_request_more_than_slots_and_queue_is_refused() {
    let (_server, runtime, id) = attached_vllm(Reply::EventsAndSilence(FIRST_PIECE.into())).await;
    let first = runtime.generate(question(id)).await.expect("a slot");
    let _second = runtime.generate(question(id)).await.expect("the queue");
    assert_eq!(runtime.generate(question(id)).await.expect_err("full"), EngineError::Busy);
    let state = runtime.load_state().remove(0);
    assert_eq!((state.running, state.waiting), (1, 1));
    drop(first);
}

#[tokio::test]
async fn a_server_that_falls_silent_or_breaks_off_fails_the_answer() {
    let server = FakeServer::start(|path, _| vllm(path, Reply::EventsAndSilence(FIRST_PIECE.into()))).await;
    let silent = RemoteRuntime::new(Timeouts { idle: Duration::from_millis(100), ..Timeouts::default() });
    let id = attach(&silent, &server, "qwen/Qwen3-8B").await.id;
    let fell_silent = events_of(&silent, question(id)).await.pop();
    let (_server, runtime, id) = attached_vllm(Reply::Events(FIRST_PIECE.into())).await;
    let broke_off = events_of(&runtime, question(id)).await.pop();
    for last in [fell_silent, broke_off] {
        assert!(matches!(last, Some(Err(EngineError::Failed { .. }))), "{last:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_gone_is_noticed_by_the_health_check_and_by_the_next_request() {
    let probing = RemoteRuntime::new(hasty());
    let idle = RemoteRuntime::default();
    let server = FakeServer::start(|path, _| vllm(path, Reply::Silence)).await;
    let (_, id) = (attach(&probing, &server, "qwen/Qwen3-8B").await, attach(&idle, &server, "qwen/Qwen3-8B").await.id);
    assert_eq!((probing.load_state().len(), idle.load_state().len()), (1, 1));
    server.stop().await;
    let unlisted = async {
        while !probing.load_state().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(TIMEOUT, unlisted).await.expect("the health check notices");
    assert_eq!(idle.generate(question(id)).await.expect_err("gone"), EngineError::NotLoaded);
    assert_eq!(idle.load_state(), []);
}

#[tokio::test]
async fn an_unloaded_model_ends_its_answers() {
    let (_server, runtime, id) = attached_vllm(Reply::EventsAndSilence(FIRST_PIECE.into())).await;
    let mut stream = runtime.generate(question(id)).await.expect("it begins");
    runtime.unload(id).await.expect("it was attached");
    let mut last = None;
    while let Some(event) = timeout(TIMEOUT, stream.next()).await.expect("in time") {
        last = Some(event);
    }
    assert_eq!(last, Some(Err(EngineError::NotLoaded)));
    assert_eq!(runtime.unload(id).await, Err(EngineError::NotLoaded));
}

#[tokio::test]
async fn a_refusal_says_what_the_caller_can_do() {
    let too_long = r#"{"error":{"message":"This model's maximum context length is 4096 tokens. However, your request has 5000 input tokens.","type":"BadRequestError","param":null,"code":400}}"#;
    for (status, body, expected) in [
        (400, too_long, EngineError::ContextLength { prompt_tokens: 5_000, context_length: 4_096 }),
        (429, "", EngineError::Busy),
        (503, "", EngineError::Busy),
    ] {
        let (_server, runtime, id) = attached_vllm(Reply::Json(status, body.into())).await;
        assert_eq!(runtime.generate(question(id)).await.expect_err("refused"), expected);
        assert_eq!(runtime.load_state()[0].running, 0);
    }
}

#[tokio::test]
async fn tokens_are_counted_where_the_server_can() {
    let (_server, runtime, id) = attached_vllm(Reply::Silence).await;
    let chat = PromptInput::Chat(vec![Message::new(Role::User, "hi")].into());
    assert_eq!(runtime.count_tokens(id, &chat).await, Ok(7));
    assert_eq!(runtime.count_tokens(id, &PromptInput::Tokens(vec![1, 2])).await, Ok(2));
}

#[tokio::test]
async fn tokens_and_their_text_are_those_of_the_server() {
    let server = FakeServer::start(|path, body| match path {
        "/v1/models" => Reply::Json(200, r#"{"object":"list","data":[{"id":"m","owned_by":"llamacpp"}]}"#.into()),
        "/tokenize" if body["with_pieces"] == true && body["add_special"] == false => {
            Reply::Json(200, r#"{"tokens":[{"id":7,"piece":"He"},{"id":8,"piece":[195]}]}"#.into())
        }
        "/detokenize" if body["tokens"] == json!([7, 9]) => Reply::Json(200, r#"{"content":"Hello"}"#.into()),
        _ => Reply::Json(404, "{}".into()),
    })
    .await;
    let runtime = RemoteRuntime::default();
    let id = attach(&runtime, &server, "m").await.id;
    let listing = TokenListing { add_special: false, parse_special: true };
    let listed = |id, bytes: &[u8]| ListedToken { id, bytes: bytes.to_vec() };
    let of_text = runtime.list_tokens(id, &PromptInput::Text("H".into()), listing).await;
    assert_eq!(of_text, Ok(vec![listed(7, b"He"), listed(8, &[195])]));
    let text = runtime.list_tokens(id, &PromptInput::Tokens(vec![7, 9]), listing).await;
    assert_eq!(text, Ok(vec![listed(7, b"Hello"), listed(9, b"")]));
}

#[tokio::test]
async fn the_longest_text_of_tokens_may_be_written_with_escapes() {
    let server = FakeServer::start(|path, _| match path {
        "/v1/models" => Reply::Json(200, r#"{"object":"list","data":[{"id":"m","owned_by":"llamacpp"}]}"#.into()),
        "/detokenize" => Reply::Json(200, format!(r#"{{"content":"{}"}}"#, r"\u0001".repeat(1 << 20))),
        _ => Reply::Json(404, "{}".into()),
    })
    .await;
    let runtime = RemoteRuntime::default();
    let id = attach(&runtime, &server, "m").await.id;
    let listing = TokenListing { add_special: false, parse_special: false };
    let listed = runtime.list_tokens(id, &PromptInput::Tokens(vec![7]), listing).await.expect("listed");
    assert_eq!((listed.len(), listed[0].bytes.len()), (1, 1 << 20));
}

#[tokio::test]
async fn rerankers_are_told_from_embedding_models_and_writers_by_what_they_answer() {
    const SCORES: &str = r#"{"results":[{"index":0,"relevance_score":0.5}],"usage":{"total_tokens":4}}"#;
    const VECTORS: &str = r#"{"data":[{"index":0,"embedding":[3.0,4.0]}]}"#;
    for (owner, scores, vectors, ranking, writes) in [
        // A llama-server with a reranker makes vectors too.
        ("llamacpp", true, true, Ranking::Scores, false),
        ("llamacpp", false, false, Ranking::None, true),
        // vLLM ranks by the vectors of an embedding model.
        ("vllm", true, true, Ranking::Vectors, false),
        ("vllm", true, false, Ranking::Scores, false),
        ("vllm", false, false, Ranking::None, true),
    ] {
        let server = FakeServer::start(move |path, _| match path {
            "/v1/models" => Reply::Json(200, format!(r#"{{"data":[{{"id":"m","owned_by":"{owner}"}}]}}"#)),
            "/v1/rerank" if scores => Reply::Json(200, SCORES.into()),
            "/v1/embeddings" if vectors => Reply::Json(200, VECTORS.into()),
            _ => Reply::Json(501, "{}".into()),
        })
        .await;
        let runtime = RemoteRuntime::default();
        let loaded = attach(&runtime, &server, "m").await;
        assert_eq!((loaded.abilities.ranking, loaded.abilities.generate), (ranking, writes), "{owner}");
        let request = RerankRequest { model: loaded.id, query: "q".into(), texts: vec!["a".into()] };
        let scored = runtime.rerank(request).await;
        assert_eq!(scored.is_ok(), ranking == Ranking::Scores, "{scored:?}");
        if let Ok(scored) = scored {
            assert_eq!(scored, Scores { scores: vec![0.5], prompt_tokens: 4 });
        }
    }
}

/// The question, of whose answer the caller has a text of seven tokens.
fn rest(model: ModelId, max_tokens: u32) -> GenerateRequest {
    let continued_text = Some(ContinuedText { text: "The capital is ".into(), tokens: 99 });
    GenerateRequest { continued_text, max_tokens: Some(max_tokens), ..question(model) }
}

#[tokio::test]
async fn an_answer_that_another_server_began_goes_on_as_its_last_message() {
    let answer = concat!(
        "data: {\"choices\":[{\"delta\":{\"content\":\" Tokyo\"},\"finish_reason\":\"stop\"}],",
        "\"usage\":{\"prompt_tokens\":21,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n"
    );
    let (server, runtime, id) = attached_vllm(Reply::Events(answer.into())).await;
    let events = events_of(&runtime, rest(id, 9)).await;
    let usage = TokenUsage { prompt_tokens: 14, completion_tokens: 9, cached_tokens: 0, reasoning_tokens: 0 };
    let piece = Piece { text: "Tokyo".into(), ..Piece::default() };
    let expected = [
        Ok(Event::Started { prompt_tokens: 14, cached_tokens: 0 }),
        Ok(Event::Piece(piece)),
        Ok(Event::Done { reason: FinishReason::Stop, usage, rest: Piece::default() }),
    ];
    assert_eq!(events, expected);
    let asked = server.request("/v1/chat/completions").expect("it was asked");
    assert_eq!(asked["messages"][1], json!({"role": "assistant", "content": "The capital is"}));
    assert_eq!(asked["max_tokens"], json!(2), "seven of nine tokens were delivered");
    assert_eq!((&asked["continue_final_message"], &asked["add_generation_prompt"]), (&json!(true), &json!(false)));
    let counted = server.request("/tokenize").expect("it counts");
    assert_eq!((&counted["prompt"], &counted["add_special_tokens"]), (&json!("The capital is "), &json!(false)));
}

#[tokio::test]
async fn an_answer_that_lacks_only_its_end_asks_no_server() {
    let (server, runtime, id) = attached_vllm(Reply::Silence).await;
    let events = events_of(&runtime, rest(id, 7)).await;
    let usage = TokenUsage { completion_tokens: 7, ..TokenUsage::default() };
    let done = Event::Done { reason: FinishReason::Length, usage, rest: Piece::default() };
    assert_eq!(events.last(), Some(&Ok(done)));
    assert_eq!((server.request("/v1/chat/completions"), runtime.load_state()[0].running), (None, 0));
}

#[tokio::test]
async fn llama_server_shows_by_its_template_whether_it_continues_messages() {
    let models = r#"{"object":"list","data":[{"id":"m","owned_by":"llamacpp"}]}"#;
    for (templated, expected) in [
        (Reply::Json(200, r#"{"prompt":"<user>Is it?<assistant>Certainly"}"#.into()), true),
        (Reply::Json(200, r#"{"prompt":"<user>Is it?<assistant>Certainly<end><assistant>"}"#.into()), false),
        (Reply::Json(400, r#"{"error":{"message":"incompatible with enable_thinking"}}"#.into()), false),
    ] {
        let server = FakeServer::start(move |path, _| match path {
            "/v1/models" => Reply::Json(200, models.into()),
            "/apply-template" => templated.clone(),
            _ => Reply::Json(404, "{}".into()),
        })
        .await;
        let loaded = attach(&RemoteRuntime::default(), &server, "m").await;
        assert_eq!(loaded.server, Some(ServerFacts { dialect: Dialect::LlamaServer, prefills: expected }));
    }
}

#[tokio::test]
async fn ollamas_models_are_listed_by_what_they_are_for_and_make_vectors() {
    let server = FakeServer::start(|path, body| {
        let is_embedder = body["model"] == "nomic-embed-text:latest";
        let json = match path {
            "/v1/models" => r#"{"object":"list","data":[{"id":"llama3.2:3b","owned_by":"library"},{"id":"nomic-embed-text:latest","owned_by":"library"}]}"#,
            "/api/tags" => r#"{"models":[{"name":"llama3.2:3b","details":{"family":"llama"}},{"name":"nomic-embed-text:latest","details":{"family":"nomic-bert"}}]}"#,
            "/api/show" if is_embedder => r#"{"model_info":{"nomic-bert.context_length":2048},"capabilities":["embedding"]}"#,
            "/api/show" => r#"{"model_info":{"llama.context_length":131072},"capabilities":["completion","tools"]}"#,
            "/v1/embeddings" => r#"{"object":"list","data":[{"object":"embedding","embedding":[3.0,4.0],"index":0}],"usage":{"prompt_tokens":2}}"#,
            _ => return Reply::Json(404, "404 page not found".into()),
        };
        Reply::Json(200, json.into())
    })
    .await;
    let runtime = RemoteRuntime::default();
    let survey = runtime.survey(&address(&server), TIMEOUT).await.expect("it answers");
    let kinds: Vec<_> = survey.models.iter().map(|model| (model.kind, model.context_length)).collect();
    assert_eq!(survey.dialect, Dialect::Ollama);
    assert_eq!(kinds, [(Kind::Text, Some(131_072)), (Kind::Vectors, Some(2_048))]);

    let embedder = attach(&runtime, &server, "nomic-embed-text:latest").await;
    assert_eq!((embedder.abilities.embedding_length, embedder.abilities.generate), (2, false));
    let inputs = vec![PromptInput::Text("hello".into())];
    let made = runtime.embed(EmbedRequest { model: embedder.id, inputs: inputs.clone() }).await.expect("vectors");
    assert_eq!((made.vectors, made.prompt_tokens), (vec![vec![0.6, 0.8]], 2));
    let refused = runtime.generate(question(embedder.id)).await;
    assert!(matches!(refused, Err(EngineError::Unsupported { .. })), "{refused:?}");
    let writer = attach(&runtime, &server, "llama3.2:3b").await;
    let refused = runtime.embed(EmbedRequest { model: writer.id, inputs }).await;
    assert!(matches!(refused, Err(EngineError::Unsupported { .. })), "{refused:?}");
    let uncounted = runtime.count_tokens(writer.id, &PromptInput::Text("hello".into())).await;
    assert!(matches!(uncounted, Err(EngineError::Unsupported { .. })), "{uncounted:?}");
}

#[tokio::test]
async fn lm_studio_and_strangers_are_told_apart() {
    let models = r#"{"object":"list","data":[{"id":"qwen2.5-7b","object":"model","owned_by":"organization_owner"}]}"#;
    let lm_studio =
        r#"{"object":"list","data":[{"id":"qwen2.5-7b","type":"llm","state":"loaded","max_context_length":32768}]}"#;
    let studio = FakeServer::start(move |path, _| match path {
        "/v1/models" => Reply::Json(200, models.into()),
        "/api/v0/models" => Reply::Json(200, lm_studio.into()),
        _ => Reply::Json(200, r#"{"error":"Unexpected endpoint or method."}"#.into()),
    })
    .await;
    let stranger = FakeServer::start(move |path, _| match path {
        "/v1/models" => Reply::Json(200, models.into()),
        _ => Reply::Json(404, String::new()),
    })
    .await;
    let website = FakeServer::start(|_, _| Reply::Json(200, "<html></html>".into())).await;
    let runtime = RemoteRuntime::default();
    let dialect = async |server| runtime.survey(&address(server), TIMEOUT).await.map(|survey| survey.dialect);
    assert_eq!(dialect(&studio).await, Ok(Dialect::LmStudio));
    assert_eq!(dialect(&stranger).await, Ok(Dialect::Other));
    assert!(dialect(&website).await.is_err());
}
