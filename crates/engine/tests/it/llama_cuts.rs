//! Answers that a grammar holds, cut after every piece: another engine writes the rest, and the whole is what one would
//! have written, and valid.

use serde_json::{Value, json};
use tether_engine::{
    Chat, Event, FinishReason, GenerateRequest, LlamaRuntime, Message, ModelId, ModelRuntime, OutputFormat, Piece,
    PromptInput, Role, Sampling, Tool, ToolChoice, no_progress,
};

use super::{ask, options, tiny_with_template, within};

/// A template in the idiom of models that call functions.
const WITH_TOOLS: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools> Answer with \
    <tool_call>{\"name\": …, \"arguments\": …}</tool_call>{% endif %}<|im_start|>assistant\n";

struct Engine {
    runtime: LlamaRuntime,
    model: ModelId,
}

impl Engine {
    async fn start() -> Self {
        let runtime = LlamaRuntime::new();
        let load = runtime.load(tiny_with_template(WITH_TOOLS), options(), no_progress());
        let model = within(load).await.expect("it loads").id;
        Self { runtime, model }
    }

    /// Returns the pieces of an answer, that of its end included, and why it ended.
    async fn answer(&self, request: GenerateRequest) -> (Vec<Piece>, FinishReason) {
        let mut pieces = vec![];
        let request = GenerateRequest { model: self.model, ..request };
        let mut stream = within(self.runtime.generate(request)).await.expect("it is admitted");
        loop {
            match within(stream.next()).await.expect("it has an end").expect("it goes on") {
                Event::Piece(piece) => pieces.push(piece),
                Event::Done { reason, rest, .. } => {
                    pieces.push(rest);
                    return (pieces, reason);
                }
                Event::Started { .. } | Event::Progress(_) => {}
            }
        }
    }
}

/// What a client has of an answer.
#[derive(Debug, Default, PartialEq)]
struct Whole {
    text: String,
    /// Name and arguments of each call.
    calls: Vec<(String, String)>,
    tokens: Vec<u32>,
}

fn gather<'a>(pieces: impl IntoIterator<Item = &'a Piece>) -> Whole {
    let mut whole = Whole::default();
    for piece in pieces {
        whole.text += &piece.text;
        whole.tokens.extend(&piece.tokens);
        for delta in &piece.tool_calls {
            let index = delta.index as usize;
            if whole.calls.len() <= index {
                whole.calls.resize(index + 1, Default::default());
            }
            let (name, arguments) = &mut whole.calls[index];
            *name += delta.name.as_deref().unwrap_or_default();
            *arguments += &delta.arguments;
        }
    }
    whole
}

fn properties() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 12 },
            "age": { "type": "integer", "minimum": 0, "maximum": 120 },
            "tags": { "type": "array", "items": { "enum": ["red", "green", "blue"] }, "minItems": 1, "maxItems": 3 },
            "well": { "type": "boolean" },
        },
        "required": ["name", "age", "tags", "well"],
        "additionalProperties": false,
    })
}

/// Panics unless a text is JSON of these properties.
fn check(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields = value.as_object().expect("an object");
    assert_eq!(fields.len(), 4, "{text}");
    assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 12), "{text}");
    assert!(value["age"].as_u64().is_some_and(|age| age <= 120) && value["well"].is_boolean(), "{text}");
    let tags = value["tags"].as_array().expect("a list");
    let may_be = |tag: &Value| tag.as_str().is_some_and(|tag| ["red", "green", "blue"].contains(&tag));
    assert!((1..=3).contains(&tags.len()) && tags.iter().all(may_be), "{text}");
}

fn schema(seed: u64) -> GenerateRequest {
    GenerateRequest { format: OutputFormat::JsonSchema(properties()), ..request(seed, ask(ModelId(0), "Who is it?")) }
}

fn call(seed: u64) -> GenerateRequest {
    let chat = Chat {
        messages: vec![Message::new(Role::User, "Who is it?")],
        tools: vec![Tool { name: "describe".into(), description: None, parameters: Some(properties()) }],
        tool_choice: ToolChoice::Required,
        one_call: true,
        ..Chat::default()
    };
    request(seed, GenerateRequest::new(ModelId(0), PromptInput::Chat(chat)))
}

fn request(seed: u64, request: GenerateRequest) -> GenerateRequest {
    let sampling = Sampling { temperature: 0.9, seed, ..Sampling::default() };
    GenerateRequest { sampling, max_tokens: Some(300), deterministic: true, ..request }
}

/// Cuts the answer to a request after each piece, and returns the number of cuts.
async fn cut_everywhere(first: &Engine, second: &Engine, request: GenerateRequest) -> usize {
    let (pieces, reason) = first.answer(request.clone()).await;
    let whole = gather(&pieces);
    match &whole.calls[..] {
        [] => {
            assert_eq!(reason, FinishReason::Stop, "{whole:?}");
            check(&whole.text);
        }
        [(name, arguments)] => {
            assert_eq!((reason, name.as_str()), (FinishReason::ToolCalls, "describe"), "{whole:?}");
            check(arguments);
        }
        _ => panic!("one call: {whole:?}"),
    }
    let cuts = pieces.len() - 1;
    for cut in 1..=cuts {
        let delivered = &pieces[..cut];
        let continued = delivered.iter().flat_map(|piece| piece.tokens.clone()).collect();
        let (rest, ended) = second.answer(GenerateRequest { continued, ..request.clone() }).await;
        assert_eq!((gather(delivered.iter().chain(&rest)), ended), (gather(&pieces), reason), "cut after {cut} pieces");
    }
    cuts
}

async fn cut_so_often(least: usize) {
    let (first, second) = (Engine::start().await, Engine::start().await);
    let (mut in_schemas, mut in_calls, mut seed) = (0, 0, 0);
    while in_schemas < least || in_calls < least {
        seed += 1;
        if in_schemas < least {
            in_schemas += cut_everywhere(&first, &second, schema(seed)).await;
        }
        if in_calls < least {
            in_calls += cut_everywhere(&first, &second, call(seed)).await;
        }
    }
}

#[tokio::test]
async fn schemas_and_calls_continue_after_any_piece_on_another_engine() {
    cut_so_often(150).await;
}

#[tokio::test]
#[ignore = "runs for long: make cuts"]
async fn a_thousand_cuts_in_schemas_and_calls_are_mended() {
    cut_so_often(500).await;
}
