//! Answers that must have a form, tell how likely they were, or call functions.

use serde_json::{Value, json};
use tether_engine::{
    Chat, EngineError, Event, FinishReason, GenerateRequest, LeftToModel, LlamaRuntime, Message, ModelId, ModelRuntime,
    OutputFormat, Piece, PromptInput, Role, Sampling, Tool, ToolChoice, no_progress,
};

use super::{ask, options, run, tiny, tiny_with_template, within};

/// A template in the idiom of models that call functions.
const WITH_TOOLS: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools> Answer with \
    <tool_call>{\"name\": …, \"arguments\": …}</tool_call>{% endif %}<|im_start|>assistant\n";

async fn loaded() -> (LlamaRuntime, ModelId) {
    let runtime = LlamaRuntime::new();
    let model = within(runtime.load(tiny(), options(), no_progress())).await.expect("the tiny model loads").id;
    (runtime, model)
}

fn formed(model: ModelId, format: OutputFormat) -> GenerateRequest {
    let sampling = Sampling { seed: 3, ..Sampling::default() };
    GenerateRequest { format, sampling, max_tokens: Some(300), ..ask(model, "Tell me a story.") }
}

async fn pieces(runtime: &LlamaRuntime, request: GenerateRequest) -> (Piece, FinishReason) {
    let mut whole = Piece::default();
    let mut stream = within(runtime.generate(request)).await.expect("it is admitted");
    loop {
        match within(stream.next()).await.expect("it has an end").expect("it goes on") {
            Event::Piece(piece) => whole.append(piece),
            Event::Done { reason, rest, .. } => {
                whole.append(rest);
                return (whole, reason);
            }
            Event::Started { .. } | Event::Progress(_) => {}
        }
    }
}

#[tokio::test]
async fn a_schema_is_kept_by_a_model_that_knows_nothing_of_it() {
    let (runtime, model) = loaded().await;
    let schema = json!({
        "type": "object",
        "properties": { "name": { "type": "string", "maxLength": 8 }, "age": { "type": "integer", "maximum": 120 } },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let answer = run(&runtime, formed(model, OutputFormat::JsonSchema(schema))).await;
    assert_eq!(answer.reason(), FinishReason::Stop, "{}", answer.text);
    let value: Value = serde_json::from_str(&answer.text).expect("it is JSON");
    assert!(value["name"].is_string() && value["age"].is_i64(), "{value}");
}

#[tokio::test]
async fn a_pattern_is_kept_and_a_continued_answer_keeps_it_too() {
    let (runtime, model) = loaded().await;
    let request = formed(model, OutputFormat::Regex("[a-c]{6}-[0-9]{4}".into()));
    let answer = run(&runtime, request.clone()).await;
    let (letters, digits) = answer.text.split_once('-').expect("it has the form");
    assert!(letters.len() == 6 && digits.len() == 4, "{}", answer.text);
    let continued = answer.tokens[..2].to_vec();
    let rest = run(&runtime, GenerateRequest { continued, ..request.clone() }).await;
    assert_eq!(rest.tokens, answer.tokens[2..]);
    // Tokens that do not have the form are not a beginning of this answer.
    let strange = vec![answer.tokens[0], answer.tokens[answer.tokens.len() - 1], answer.tokens[0]];
    let refused = run(&runtime, GenerateRequest { continued: strange, ..request }).await;
    assert!(matches!(refused.end, Err(EngineError::Unsupported { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_form_that_cannot_be_kept_is_refused_before_the_answer() {
    let (runtime, model) = loaded().await;
    for format in [
        OutputFormat::JsonSchema(json!({ "type": "no such type" })),
        OutputFormat::Regex("(((a{1,1000}){1,1000}){1,1000}".into()),
        OutputFormat::Lark("start: nowhere".into()),
    ] {
        let refused = within(runtime.generate(formed(model, format))).await.err();
        let named =
            matches!(&refused, Some(EngineError::Unsupported { parameter, .. }) if parameter == "response_format");
        assert!(named, "{refused:?}");
    }
    assert_eq!(run(&runtime, ask(model, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn each_token_tells_how_likely_it_was_and_what_else_might_have_come() {
    let (runtime, model) = loaded().await;
    let request = GenerateRequest { logprobs: Some(4), ..ask(model, "What is 3 + 4?") };
    let (piece, _) = pieces(&runtime, request).await;
    assert_eq!(piece.logprobs.len(), piece.tokens.len());
    let bytes: Vec<u8> = piece.logprobs.iter().flat_map(|logprob| logprob.bytes.clone()).collect();
    assert_eq!(String::from_utf8(bytes).as_deref(), Ok("3 + 4 = 7"));
    for (logprob, token) in piece.logprobs.iter().zip(&piece.tokens) {
        assert_eq!((logprob.token, logprob.top.len(), logprob.top[0].token), (*token, 4, *token));
        assert!(logprob.logprob <= 0.0 && logprob.logprob > -3.0, "{logprob:?}");
        assert!(logprob.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
    }
}

#[tokio::test]
async fn a_prompt_is_repeated_before_the_answer_where_that_is_asked_for() {
    let (runtime, model) = loaded().await;
    let input = PromptInput::Text("The capital of Japan is".into());
    let plain = GenerateRequest { input, max_tokens: Some(5), ..ask(model, "") };
    let usual = run(&runtime, plain.clone()).await;
    let echo = GenerateRequest { echo: true, ..plain };
    let both = run(&runtime, echo.clone()).await;
    assert_eq!((both.text, &both.tokens), (format!("The capital of Japan is{}", usual.text), &usual.tokens));
    for logprobs in [None, Some(0)] {
        let alone = run(&runtime, GenerateRequest { max_tokens: Some(0), logprobs, ..echo.clone() }).await;
        assert_eq!((alone.text.as_str(), alone.tokens.len()), ("The capital of Japan is", 0));
        let usage = alone.usage();
        assert_eq!((alone.reason(), usage.completion_tokens), (FinishReason::Length, 0));
        assert_eq!(usage.prompt_tokens, usual.usage().prompt_tokens);
    }
    // Where a form or a stop text ends the answer at once, the prompt is told all the same.
    let ended = run(&runtime, GenerateRequest { stop: vec![usual.text[..1].into()], ..echo }).await;
    assert_eq!(ended.text, "The capital of Japan is");
}

#[tokio::test]
async fn the_likelihood_of_a_prompt_is_what_its_tokens_had_as_an_answer() {
    let (runtime, model) = loaded().await;
    let begin = PromptInput::Text("The capital of Japan is".into());
    let said = GenerateRequest {
        input: begin,
        logprobs: Some(2),
        echo: true,
        ignore_eos: true,
        max_tokens: Some(90),
        ..ask(model, "")
    };
    let (said, _) = pieces(&runtime, said).await;
    assert!(said.logprobs.len() > 94 && said.tokens.len() == 90);
    let whole: Vec<u32> = said.logprobs.iter().map(|logprob| logprob.token).collect();
    let echo = |logprobs| GenerateRequest {
        input: PromptInput::Tokens(whole.clone()),
        logprobs: Some(logprobs),
        echo: true,
        max_tokens: Some(0),
        ..ask(model, "")
    };
    // The second finds the first in the cache, and others are at work beside the rest.
    for _ in 0..2 {
        let beside = GenerateRequest { ignore_eos: true, max_tokens: Some(40), ..ask(model, "Tell me a story.") };
        let (echoed, other, beside) =
            tokio::join!(pieces(&runtime, echo(2)), pieces(&runtime, echo(0)), run(&runtime, beside));
        assert_eq!(beside.tokens.len(), 40);
        assert_eq!((echoed.0.logprobs.len(), other.0.logprobs.len()), (whole.len(), whole.len()));
        let first = &echoed.0.logprobs[0];
        assert_eq!((first.token, first.top.len()), (whole[0], 0));
        for (index, (echoed, said)) in echoed.0.logprobs.iter().zip(&said.logprobs).enumerate().skip(1) {
            assert_eq!((echoed.token, echoed.top.len()), (said.token, 2), "{index}");
            assert!((echoed.logprob - said.logprob).abs() < 0.05, "{index}: {} and {}", echoed.logprob, said.logprob);
        }
    }
}

#[tokio::test]
async fn a_banned_token_never_comes() {
    let (runtime, model) = loaded().await;
    let usual = run(&runtime, ask(model, "What is 3 + 4?")).await;
    let sampling = Sampling { temperature: 0.0, logit_bias: vec![(usual.tokens[0], -100.0)], ..Sampling::default() };
    let other = run(&runtime, GenerateRequest { sampling, ..ask(model, "What is 3 + 4?") }).await;
    assert!(!other.tokens.contains(&usual.tokens[0]), "{}", other.text);
}

#[tokio::test]
async fn a_ban_that_leaves_no_token_is_the_requests_fault() {
    let (runtime, model) = loaded().await;
    let only = run(&runtime, formed(model, OutputFormat::Regex("a".into()))).await;
    // The form allows one text, and its only token is banned.
    let sampling = Sampling { logit_bias: vec![(only.tokens[0], -100.0)], ..Sampling::default() };
    let request = GenerateRequest { sampling, ..formed(model, OutputFormat::Regex("a".into())) };
    let refused = run(&runtime, request).await;
    let named = matches!(&refused.end, Err(EngineError::Unsupported { parameter, .. }) if parameter == "logit_bias");
    assert!(named, "{refused:?}");
    assert_eq!(run(&runtime, ask(model, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn suggestions_are_bounded_however_many_are_wished_for() {
    let runtime = LlamaRuntime::new();
    let wish = tether_engine::LoadOptions { draft_tokens: u32::MAX, ..options() };
    let model = within(runtime.load(tiny(), wish, no_progress())).await.expect("it loads").id;
    assert_eq!(run(&runtime, ask(model, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn a_required_call_comes_as_a_call() {
    let runtime = LlamaRuntime::new();
    let artifact = tiny_with_template(WITH_TOOLS);
    let model = within(runtime.load(artifact, options(), no_progress())).await.expect("it loads");
    assert!(model.abilities.tools);
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "enum": ["Tokyo", "Paris"] } },
        "required": ["city"],
        "additionalProperties": false,
    });
    let tool = Tool { name: "weather".into(), description: None, parameters: Some(parameters) };
    let chat = |tool_choice| Chat {
        messages: vec![Message::new(Role::User, "How is the weather in Tokyo?")],
        tools: vec![tool.clone()],
        tool_choice,
        ..Chat::default()
    };
    let request = |tool_choice| GenerateRequest {
        input: PromptInput::Chat(chat(tool_choice)),
        max_tokens: Some(200),
        ..ask(model.id, "")
    };
    for choice in [ToolChoice::Required, ToolChoice::Function("weather".into())] {
        let (piece, reason) = pieces(&runtime, request(choice)).await;
        assert_eq!((reason, piece.text.as_str()), (FinishReason::ToolCalls, ""), "{piece:?}");
        assert_eq!(piece.tool_calls[0].name.as_deref(), Some("weather"));
        assert!(piece.tool_calls[0].id.as_ref().is_some_and(|id| !id.is_empty()));
        let first = piece.tool_calls.iter().filter(|call| call.index == 0);
        let arguments: String = first.map(|call| call.arguments.as_str()).collect();
        let arguments: Value = serde_json::from_str(&arguments).expect("they are JSON");
        assert!(arguments["city"] == "Tokyo" || arguments["city"] == "Paris", "{arguments}");
    }
}

#[tokio::test]
async fn where_one_call_is_wanted_nothing_is_generated_behind_it() {
    let runtime = LlamaRuntime::new();
    let artifact = tiny_with_template(WITH_TOOLS);
    let model = within(runtime.load(artifact, options(), no_progress())).await.expect("it loads").id;
    let tool = Tool { name: "weather".into(), description: None, parameters: Some(json!({ "enum": [{ "a": 1 }] })) };
    let request = |one_call, seed| {
        let chat = Chat {
            messages: vec![Message::new(Role::User, "How is the weather?")],
            tools: vec![tool.clone()],
            tool_choice: ToolChoice::Required,
            one_call,
            ..Chat::default()
        };
        // At such a temperature some of the answers call more than once.
        let sampling = Sampling { temperature: 2.0, seed, ..Sampling::default() };
        GenerateRequest { input: PromptInput::Chat(chat), sampling, max_tokens: Some(300), ..ask(model, "") }
    };
    let mut shorter = 0;
    for seed in 0..16 {
        let (all, _) = pieces(&runtime, request(false, seed)).await;
        let (one, reason) = pieces(&runtime, request(true, seed)).await;
        assert_eq!((reason, one.tool_calls.iter().map(|call| call.index).max()), (FinishReason::ToolCalls, Some(0)));
        let calls_again = all.tool_calls.iter().any(|call| call.index > 0);
        assert!(one.tokens.len() < all.tokens.len() || !calls_again, "seed {seed}: {all:?}");
        shorter += usize::from(calls_again);
    }
    assert!(shorter > 0, "no seed calls twice");
}

#[tokio::test]
async fn a_model_without_calls_refuses_tools() {
    let (runtime, model) = loaded().await;
    let tool = Tool { name: "weather".into(), description: None, parameters: None };
    let chat = Chat { messages: vec![Message::new(Role::User, "Hi.")], tools: vec![tool], ..Chat::default() };
    let refused = within(runtime.generate(GenerateRequest { input: PromptInput::Chat(chat), ..ask(model, "") })).await;
    assert!(matches!(refused.err(), Some(EngineError::Unsupported { parameter, .. }) if parameter == "tools"));
}

#[tokio::test]
async fn a_model_without_calls_takes_tools_that_must_not_be_called() {
    let (runtime, model) = loaded().await;
    let tool = Tool { name: "weather".into(), description: None, parameters: None };
    let messages = vec![Message::new(Role::User, "What is 3 + 4?")];
    let chat = Chat { messages, tools: vec![tool], tool_choice: ToolChoice::None, ..Chat::default() };
    let answer = run(&runtime, GenerateRequest { input: PromptInput::Chat(chat), ..ask(model, "") }).await;
    assert_eq!(answer.text, "3 + 4 = 7");
}

#[tokio::test]
async fn a_forced_call_takes_schemas_as_libraries_write_them() {
    let runtime = LlamaRuntime::new();
    let artifact = tiny_with_template(WITH_TOOLS);
    let model = within(runtime.load(artifact, options(), no_progress())).await.expect("it loads").id;
    let forced = |tools: Vec<Tool>| {
        let messages = vec![Message::new(Role::User, "How is the weather?")];
        let chat = Chat { messages, tools, tool_choice: ToolChoice::Required, one_call: true, ..Chat::default() };
        GenerateRequest { input: PromptInput::Chat(chat), max_tokens: Some(40), ..ask(model, "") }
    };
    let tool = |parameters: Value| Tool { name: "f".into(), description: None, parameters: Some(parameters) };
    let with = |property: Value| json!({ "type": "object", "properties": { "a": property }, "required": ["a"] });
    for parameters in [
        with(json!({ "type": "array", "items": { "type": "integer" }, "uniqueItems": true })),
        with(json!({ "not": { "type": "string" } })),
        with(json!({ "type": "string", "format": "bicycle" })),
        with(json!({ "type": "string", "pattern": "^(?!x)" })),
        with(json!({ "type": "object", "properties": null })),
        with(json!({ "if": { "const": 1 }, "then": { "const": 1 }, "else": { "const": 2 } })),
        json!({ "type": "object", "properties": null }),
        json!({ "type": "object", "properties": { "a": { "type": "string" } }, "dependentRequired": { "a": ["a"] } }),
        json!({ "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "F", "type": "object" }),
    ] {
        let (piece, _) = pieces(&runtime, forced(vec![tool(parameters.clone())])).await;
        assert_eq!(piece.tool_calls[0].name.as_deref(), Some("f"), "{parameters}");
        assert_eq!(piece.text, "", "{parameters}");
    }
    let impossible = with(json!({ "$ref": "#/$defs/nowhere" }));
    let request = forced(vec![tool(with(json!({ "type": "string" }))), tool(impossible)]);
    let refused = within(runtime.generate(request)).await.expect_err("it refers to nothing");
    let EngineError::Unsupported { parameter, .. } = &refused else { panic!("{refused:?}") };
    assert_eq!(parameter, "tools[1].function.parameters", "{refused}");
}

#[tokio::test]
async fn the_arguments_of_a_forced_call_hold_what_their_schema_names() {
    let runtime = LlamaRuntime::new();
    let artifact = tiny_with_template(WITH_TOOLS);
    let model = within(runtime.load(artifact, options(), no_progress())).await.expect("it loads").id;
    let parameters = json!({ "type": "object", "properties": { "a": { "enum": [1] }, "b": { "enum": [2] } } });
    let tool = Tool { name: "f".into(), description: None, parameters: Some(parameters) };
    for seed in 0..16 {
        let chat = Chat {
            messages: vec![Message::new(Role::User, "How is the weather?")],
            tools: vec![tool.clone()],
            tool_choice: ToolChoice::Required,
            one_call: true,
            ..Chat::default()
        };
        let sampling = Sampling { temperature: 2.0, seed, ..Sampling::default() };
        let request =
            GenerateRequest { input: PromptInput::Chat(chat), sampling, max_tokens: Some(100), ..ask(model, "") };
        let (piece, _) = pieces(&runtime, request).await;
        let arguments: String = piece.tool_calls.iter().map(|call| call.arguments.as_str()).collect();
        let arguments: Value = serde_json::from_str(&arguments).expect("they are JSON");
        let named = arguments.as_object().expect("an object").iter().all(|(name, value)| match name.as_str() {
            "a" => value == 1,
            "b" => value == 2,
            _ => false,
        });
        assert!(named, "seed {seed}: {arguments}");
    }
}

#[tokio::test]
async fn an_answer_that_keeps_to_a_form_cannot_go_on_past_its_end() {
    let (runtime, model) = loaded().await;
    let format = || OutputFormat::Regex("[a-c]{6}".into());
    let usual = run(&runtime, formed(model, format())).await;
    let going_on = run(&runtime, GenerateRequest { ignore_eos: true, ..formed(model, format()) }).await;
    assert_eq!((&going_on.text, going_on.reason()), (&usual.text, FinishReason::Stop));
    let parameters = json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "required": ["a"] });
    let tool = Tool { name: "f".into(), description: None, parameters: Some(parameters) };
    let messages = vec![Message::new(Role::User, "hi")];
    let chat =
        Chat { messages, tools: vec![tool], tool_choice: ToolChoice::Required, one_call: true, ..Chat::default() };
    let model = within(runtime.load(tiny_with_template(WITH_TOOLS), options(), no_progress())).await.expect("loads").id;
    let request =
        GenerateRequest { ignore_eos: true, input: PromptInput::Chat(chat), ..formed(model, OutputFormat::Text) };
    assert_eq!(pieces(&runtime, request).await.1, FinishReason::ToolCalls);
}

#[tokio::test]
async fn the_tokens_of_a_thought_are_counted_also_where_it_is_gone_on_with() {
    let runtime = LlamaRuntime::new();
    let template = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
        {% endfor %}<|im_start|>assistant\n{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}";
    let model = within(runtime.load(tiny_with_template(template), options(), no_progress())).await.expect("loads").id;
    let thinking = |thinks: bool, continued: &[u32]| {
        let template_options = json!({ "enable_thinking": thinks }).as_object().expect("an object").clone();
        let messages = vec![Message::new(Role::User, "What is 3 + 4?")];
        let input = PromptInput::Chat(Chat { messages, template_options, ..Chat::default() });
        GenerateRequest { input, continued: continued.to_vec(), max_tokens: Some(8), ..ask(model, "") }
    };
    let thought = run(&runtime, thinking(true, &[])).await;
    let usage = thought.usage();
    assert!(usage.completion_tokens > 2 && usage.reasoning_tokens == usage.completion_tokens, "{usage:?}");
    let rest = run(&runtime, thinking(true, &thought.tokens[..2])).await;
    assert_eq!(rest.usage().reasoning_tokens, usage.reasoning_tokens);
    let answer = run(&runtime, thinking(false, &[])).await;
    assert_eq!(answer.usage().reasoning_tokens, 0);
}

#[tokio::test]
async fn a_last_message_is_gone_on_with() {
    let (runtime, model) = loaded().await;
    let messages = vec![Message::new(Role::User, "What is 3 + 4?"), Message::new(Role::Assistant, "3 + 4")];
    let chat = Chat { messages, continue_last: true, ..Chat::default() };
    let answer = run(&runtime, GenerateRequest { input: PromptInput::Chat(chat), ..ask(model, "") }).await;
    assert_eq!(answer.text, " = 7");
}

#[tokio::test]
async fn what_a_request_leaves_open_is_sampled_as_the_model_says() {
    let (runtime, model) = loaded().await;
    let left = LeftToModel { temperature: true, top_p: true, top_k: true, min_p: true, repetition_penalty: true };
    let mut right = 0;
    for seed in 0..30 {
        let sampling = Sampling { seed, ..Sampling::default() };
        let request = GenerateRequest { sampling, left_to_model: left, ..ask(model, "What is 3 + 4?") };
        right += usize::from(run(&runtime, request).await.text.contains("3 + 4 = 7"));
    }
    assert!(right >= 28, "{right} of 30");
}
