//! Answers that outlive their workers, with real gateways, orchestrators and workers, and engines at a fixed pace.

use std::collections::BTreeMap;

use engine::MockOptions;
use protocol::infer::{EmbedInput, FinishReason, InferChunk, InferRequest, Input, Message, Role, Tool, ToolChoice};
use protocol::membership::CERTIFICATE_LIFE;
use protocol::{PublicKey, codec};
use serde_json::json;
use tokio::time;

use crate::memory_network::{Network, SECOND, job};

const TOKENS: u32 = 6;

async fn network() -> Network {
    let mock = MockOptions { per_token: SECOND / 10, tokens: TOKENS, ..MockOptions::default() };
    let network = Network::start_with(CERTIFICATE_LIFE, mock).await;
    time::sleep(SECOND * 2).await;
    network
}

/// What a client has of each answer in the end.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    text: String,
    reasoning: String,
    arguments: String,
    tokens: Vec<u32>,
    logprobs: usize,
    finish_reason: Option<FinishReason>,
}

fn gather(chunks: &[InferChunk]) -> BTreeMap<u32, Answer> {
    let mut answers = BTreeMap::<u32, Answer>::new();
    for (chunk, seq) in chunks.iter().zip(0..) {
        assert_eq!(chunk.seq, seq, "chunks come in order");
        let payload = &chunk.payload;
        let answer = answers.entry(payload.index).or_default();
        answer.text += &payload.text;
        answer.reasoning += &payload.reasoning;
        answer.arguments.extend(payload.tool_calls.iter().map(|call| call.arguments.as_str()));
        answer.tokens.extend(&payload.tokens);
        answer.logprobs += payload.logprobs.len();
        answer.finish_reason = payload.finish_reason.or(answer.finish_reason);
    }
    answers
}

/// Reads an answer; cuts off the worker that gives it after so many chunks.
async fn read(network: &Network, request: &InferRequest, cut_after: Option<usize>) -> Vec<InferChunk> {
    let mut stream = network.open(request).await.expect("accepted");
    let mut chunks = vec![];
    while let Some(chunk) = stream.next().await {
        if cut_after == Some(chunks.len()) {
            network.memory.cut(first_of(network));
        }
        chunks.push(codec::decode(&chunk.expect("no error")).expect("a chunk"));
    }
    chunks
}

/// The worker that is asked first among equals.
fn first_of(network: &Network) -> PublicKey {
    network.workers[0].min(network.workers[1])
}

fn inputs() -> Vec<(&'static str, Input)> {
    let prompt = |input: Input| Input { prompt: Some("one two three".into()), ..input };
    let ask = vec![Message::new(Role::User, "What is two and two?")];
    let chat = |input: Input| Input { messages: Some(ask.clone()), ..input };
    let tool = Tool { name: "add".into(), description: None, parameters: None };
    let text = |text: &str| EmbedInput::Text(text.to_owned());
    let thinks = serde_json::Map::from_iter([("enable_thinking".to_owned(), json!(true))]);
    vec![
        ("a text", prompt(Input::default())),
        ("log-probabilities", prompt(Input { logprobs: Some(2), ..Input::default() })),
        ("a limit", prompt(Input { max_tokens: Some(4), ..Input::default() })),
        ("several answers", prompt(Input { n: Some(3), ..Input::default() })),
        ("several prompts", Input { prompts: Some(vec![text("a"), text("b c")]), ..Input::default() }),
        ("reasoning", chat(Input { template_options: thinks, ..Input::default() })),
        ("a call", chat(Input { tools: vec![tool], tool_choice: ToolChoice::Required, ..Input::default() })),
    ]
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_any_kind_continues_after_any_chunk_of_it() {
    for (name, input) in inputs() {
        let request = job(1, input);
        let whole = read(&network().await, &request, None).await;
        let (last, parts) = whole.split_last().expect("an end");
        assert_eq!(last.payload.continued, 0);
        for cut_after in 1..=parts.len() {
            let chunks = read(&network().await, &request, Some(cut_after)).await;
            assert_eq!(gather(&chunks), gather(&whole), "{name}, cut after {cut_after} chunks");
            let end = &chunks.last().expect("an end").payload;
            assert_eq!(end.usage, last.payload.usage, "{name}, cut after {cut_after} chunks");
            // The worker may have sent the rest before it was cut off.
            assert!(end.continued <= 1);
        }
    }
}
