use serde_json::json;
use tokio::time::Instant;

use super::*;
use crate::model_runtime::{Chat, Message, OutputFormat, Piece, Progress, Role, Tool, ToolChoice, no_progress};

fn artifact() -> VerifiedArtifact {
    let file = tempfile::tempfile().expect("temporary files work");
    VerifiedArtifact { file, sha256: String::new(), bytes: 7, parts: Vec::new() }
}

async fn mock(options: MockOptions, load: LoadOptions) -> (MockRuntime, ModelId) {
    let runtime = MockRuntime::new(options);
    let model = runtime.load(artifact(), load, no_progress()).await.expect("it loads").id;
    (runtime, model)
}

fn request(model: ModelId) -> GenerateRequest {
    GenerateRequest::new(model, PromptInput::Text("one two three".into()))
}

async fn read(mut stream: GenerateStream) -> (String, Option<Result<Event, EngineError>>) {
    let mut text = String::new();
    let mut last = None;
    while let Some(item) = stream.next().await {
        if let Ok(Event::Piece(Piece { text: more, .. })) = &item {
            text.push_str(more);
        }
        last = Some(item);
    }
    (text, last)
}

#[tokio::test(start_paused = true)]
async fn an_answer_comes_at_the_pace_that_was_set() {
    let options = MockOptions {
        first_token: Duration::from_millis(100),
        per_token: Duration::from_millis(10),
        tokens: 5,
        ..MockOptions::default()
    };
    let (runtime, model) = mock(options, LoadOptions::default()).await;
    let begin = Instant::now();
    let (text, last) = read(runtime.generate(request(model)).await.expect("it starts")).await;
    assert_eq!(begin.elapsed(), Duration::from_millis(140));
    assert_eq!(text, MockRuntime::text(5));
    let usage = TokenUsage { prompt_tokens: 3, completion_tokens: 5, cached_tokens: 0, reasoning_tokens: 0 };
    assert_eq!(last, Some(Ok(Event::Done { reason: FinishReason::Stop, usage, rest: Piece::default() })));
}

#[tokio::test(start_paused = true)]
async fn a_pace_of_zero_takes_no_time() {
    let (runtime, model) = mock(MockOptions { tokens: 2_000, ..MockOptions::default() }, LoadOptions::default()).await;
    let begin = Instant::now();
    let (text, _) = read(runtime.generate(request(model)).await.expect("it starts")).await;
    assert_eq!((begin.elapsed(), text), (Duration::ZERO, MockRuntime::text(2_000)));
}

#[tokio::test(start_paused = true)]
async fn a_token_limit_ends_the_answer_by_length() {
    let (runtime, model) = mock(MockOptions::default(), LoadOptions::default()).await;
    let limited = GenerateRequest { max_tokens: Some(2), ..request(model) };
    let (text, last) = read(runtime.generate(limited).await.expect("it starts")).await;
    assert_eq!(text, "tok0 tok1");
    assert!(matches!(last, Some(Ok(Event::Done { reason: FinishReason::Length, .. }))));
}

#[tokio::test(start_paused = true)]
async fn one_request_more_than_slots_and_queue_is_refused() {
    let options = MockOptions { per_token: Duration::from_secs(1), ..MockOptions::default() };
    let (runtime, model) = mock(options, LoadOptions { slots: 1, queue_max: 1, ..LoadOptions::default() }).await;
    let mut first = runtime.generate(request(model)).await.expect("a slot");
    let second = runtime.generate(request(model)).await.expect("a place in the queue");
    first.next().await.expect("it runs").expect("and well");
    assert_eq!(runtime.generate(request(model)).await.err(), Some(EngineError::Busy));
    let state = &runtime.load_state()[0];
    assert_eq!((state.running, state.waiting), (1, 1));
    drop(first);
    let (text, _) = read(second).await;
    assert_eq!(text, MockRuntime::text(16));
    assert_eq!(runtime.load_state()[0].counters.cancelled, 1);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_stream_stops_its_generation() {
    let options = MockOptions { per_token: Duration::from_secs(1), tokens: 1_000, ..MockOptions::default() };
    let (runtime, model) = mock(options, LoadOptions::default()).await;
    let mut stream = runtime.generate(request(model)).await.expect("it starts");
    for _ in 0..3 {
        stream.next().await.expect("it runs").expect("and well");
    }
    drop(stream);
    time::sleep(Duration::from_mins(1)).await;
    let state = &runtime.load_state()[0];
    assert_eq!((state.running, state.counters.cancelled, state.counters.completed), (0, 1, 0));
    assert!(state.counters.generated_tokens <= 3, "{state:?}");
}

#[tokio::test(start_paused = true)]
async fn faults_strike_the_first_requests_and_then_no_more() {
    let options = MockOptions { fail_first: 1, die_first: 1, die_after: 3, ..MockOptions::default() };
    let (runtime, model) = mock(options, LoadOptions::default()).await;
    let (text, last) = read(runtime.generate(request(model)).await.expect("it starts")).await;
    assert!(text.is_empty() && matches!(last, Some(Err(EngineError::Failed { .. }))));
    let (text, last) = read(runtime.generate(request(model)).await.expect("it starts")).await;
    assert_eq!(text, MockRuntime::text(3));
    assert!(matches!(last, Some(Err(EngineError::Failed { .. }))));
    let (text, _) = read(runtime.generate(request(model)).await.expect("it starts")).await;
    assert_eq!(text, MockRuntime::text(16));
}

#[tokio::test(start_paused = true)]
async fn unloading_ends_what_runs() {
    let options = MockOptions { per_token: Duration::from_secs(1), ..MockOptions::default() };
    let (runtime, model) = mock(options, LoadOptions::default()).await;
    let stream = runtime.generate(request(model)).await.expect("it starts");
    runtime.unload(model).await.expect("it was loaded");
    assert_eq!(read(stream).await.1, Some(Err(EngineError::NotLoaded)));
    assert_eq!(runtime.generate(request(model)).await.err(), Some(EngineError::NotLoaded));
    assert!(runtime.load_state().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_prompt_as_long_as_the_context_is_refused() {
    let (runtime, model) =
        mock(MockOptions::default(), LoadOptions { context_length: 3, ..LoadOptions::default() }).await;
    let expected = EngineError::ContextLength { prompt_tokens: 3, context_length: 3 };
    assert_eq!(runtime.generate(request(model)).await.err(), Some(expected));
    assert_eq!(runtime.load_state()[0].waiting, 0);
}

/// Returns all pieces merged into one, and the finish reason.
async fn gather(mut stream: GenerateStream) -> (Piece, FinishReason) {
    let mut whole = Piece::default();
    loop {
        match stream.next().await.expect("an end comes").expect("and a good one") {
            Event::Started { .. } | Event::Progress(_) => {}
            Event::Piece(piece) => whole.append(piece),
            Event::Done { reason, rest, .. } => {
                whole.append(rest);
                return (whole, reason);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_is_told_every_second_how_far_its_prompt_is() {
    let options = MockOptions { first_token: Duration::from_secs(4), tokens: 1, ..MockOptions::default() };
    let (runtime, model) = mock(options, LoadOptions::default()).await;
    let input = PromptInput::Text("one two three four".into());
    let mut stream = runtime.generate(GenerateRequest::new(model, input)).await.expect("it starts");
    let mut events = vec![];
    while let Some(event) = stream.next().await {
        events.push(event.expect("all is well"));
    }
    let progress = |tokens_read| Event::Progress(Progress { tokens_read, tokens_total: 4 });
    assert_eq!(events[1..4], [progress(1), progress(2), progress(3)]);
    assert!(matches!(events[4], Event::Piece(_)));
}

#[tokio::test]
async fn a_function_that_must_be_called_is_called_as_its_schema_says() {
    let (runtime, model) = mock(MockOptions::default(), LoadOptions::default()).await;
    let schema = json!({
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
        "$defs": {"city": {"enum": ["Kyoto", "Nara"]}}
    });
    let tool = |name: &str| Tool { name: name.into(), description: None, parameters: Some(schema.clone()) };
    for (tool_choice, called) in
        [(ToolChoice::Required, Some("f")), (ToolChoice::Function("g".into()), Some("g")), (ToolChoice::Auto, None)]
    {
        let messages = vec![Message::new(Role::User, "hi")];
        let chat = Chat { messages, tools: vec![tool("f"), tool("g")], tool_choice, ..Chat::default() };
        let request = GenerateRequest::new(model, PromptInput::Chat(chat));
        let (whole, reason) = gather(runtime.generate(request).await.expect("it starts")).await;
        let name = whole.tool_calls.first().and_then(|delta| delta.name.clone());
        assert_eq!(name.as_deref(), called);
        assert_eq!(reason == FinishReason::ToolCalls, called.is_some());
        let arguments: String = whole.tool_calls.iter().map(|delta| delta.arguments.as_str()).collect();
        assert!(called.is_none() || arguments == r#"{"city":"Kyoto","days":0}"#, "{arguments}");
    }
}

#[tokio::test]
async fn a_call_that_the_user_wrote_out_is_called_once() {
    let (runtime, model) = mock(MockOptions::default(), LoadOptions::default()).await;
    let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}});
    let add = Tool { name: "add".into(), description: None, parameters: Some(parameters) };
    for (question, called) in [
        ("What is add(2, \"x y\")?", Some(r#"{"a":2,"b":"x y"}"#)),
        ("Call add({\"b\": \")\"}).", Some(r#"{"b":")"}"#)),
        ("add(nothing) and add(1)", Some(r#"{"a":1}"#)),
        ("add(", None),
        ("What is added?", None),
    ] {
        let asked = vec![Message::new(Role::User, question)];
        let answered = [asked.clone(), vec![Message::new(Role::Tool, "3")]].concat();
        for (messages, called) in [(asked, called), (answered, None)] {
            let chat = Chat { messages, tools: vec![add.clone()], ..Chat::default() };
            let request = GenerateRequest::new(model, PromptInput::Chat(chat));
            let (whole, _) = gather(runtime.generate(request).await.expect("it starts")).await;
            let arguments: String = whole.tool_calls.iter().map(|delta| delta.arguments.as_str()).collect();
            assert_eq!(called.unwrap_or_default(), arguments, "{question}");
        }
    }
}

#[tokio::test]
async fn json_log_probabilities_and_thoughts_come_where_they_are_asked_for() {
    let (runtime, model) = mock(MockOptions::default(), LoadOptions::default()).await;
    let template_options = [("enable_thinking".to_owned(), true.into())].into_iter().collect();
    let messages = vec![Message::new(Role::User, "hi")];
    let whole_request = GenerateRequest {
        logprobs: Some(2),
        format: OutputFormat::JsonSchema(json!({"type": "object", "properties": {"a": {"type": "string"}}})),
        ..GenerateRequest::new(model, PromptInput::Chat(Chat { messages, template_options, ..Chat::default() }))
    };
    let (whole, reason) = gather(runtime.generate(whole_request).await.expect("it starts")).await;
    assert_eq!((whole.reasoning.as_str(), whole.text.as_str()), ("hm", r#"{"a":"tok0"}"#));
    assert_eq!((reason, whole.tokens.len(), whole.logprobs.len()), (FinishReason::Stop, 2, 2));
    assert_eq!(whole.logprobs[1].bytes, whole.text.as_bytes());
    assert_eq!(whole.logprobs[1].top.len(), 2);
    let regex = GenerateRequest { format: OutputFormat::Regex("a".into()), ..request(model) };
    assert!(matches!(runtime.generate(regex).await, Err(EngineError::Unsupported { .. })));
}

#[tokio::test]
async fn vectors_have_length_one_and_are_the_same_for_the_same_text() {
    let (runtime, model) = mock(MockOptions::default(), LoadOptions::default()).await;
    let text = |text: &str| PromptInput::Text(text.into());
    let inputs = vec![text("one two"), text("three"), text("one two")];
    let embeddings = runtime.embed(EmbedRequest { model, inputs }).await.expect("vectors");
    assert_eq!((embeddings.vectors.len(), embeddings.prompt_tokens), (3, 5));
    assert_eq!(embeddings.vectors[0], embeddings.vectors[2]);
    assert_ne!(embeddings.vectors[0], embeddings.vectors[1]);
    for vector in embeddings.vectors {
        let length: f32 = vector.iter().map(|number| number * number).sum();
        assert!(vector.len() == 8 && (length - 1.0).abs() < 1e-5, "{vector:?}");
    }
}

#[tokio::test]
async fn an_adapter_serves_from_its_adding_to_its_removal() {
    let (runtime, model) = mock(MockOptions::default(), LoadOptions::default()).await;
    let adapter = runtime.add_adapter(model, artifact()).await.expect("added");
    let with = || GenerateRequest { adapter: Some(adapter), ..request(model) };
    runtime.generate(with()).await.expect("it starts");
    runtime.remove_adapter(model, adapter).await.expect("removed");
    assert!(matches!(runtime.generate(with()).await, Err(EngineError::Unsupported { .. })));
    assert!(runtime.remove_adapter(model, adapter).await.is_err());
}

#[tokio::test]
async fn an_answer_goes_on_after_the_tokens_of_another_try() {
    let (runtime, model) = mock(MockOptions { tokens: 3, ..MockOptions::default() }, LoadOptions::default()).await;
    let continued = GenerateRequest { continued: vec![0, 1], ..request(model) };
    let (whole, _) = gather(runtime.generate(continued).await.expect("it starts")).await;
    assert_eq!((whole.text.as_str(), whole.tokens), (" tok2", vec![2]));
}
