//! Engine tests on the tiny model, in this process and in engine processes.

#![cfg_attr(not(feature = "llama"), expect(dead_code, reason = "the mock's tests need a part of the helpers"))]

#[cfg(feature = "llama")]
mod chance;
mod chat_templates;
#[cfg(feature = "llama")]
mod embeddings;
#[cfg(feature = "llama")]
mod handed_over;
#[cfg(target_os = "linux")]
mod header_memory;
#[cfg(feature = "llama")]
mod llama_constraints;
#[cfg(feature = "llama")]
mod llama_cuts;
#[cfg(feature = "llama")]
mod llama_families;
#[cfg(feature = "llama")]
mod llama_process;
#[cfg(feature = "llama")]
mod llama_repeats;
#[cfg(feature = "llama")]
mod llama_runtime;
#[cfg(feature = "llama")]
mod llama_sharing;
#[cfg(feature = "llama")]
mod memory;
#[cfg(feature = "llama")]
mod model_table;
#[cfg(feature = "llama")]
mod poison;
mod process_runtime;
#[cfg(feature = "llama")]
mod quantized_model;
#[cfg(feature = "llama")]
mod random_model;
#[cfg(feature = "remote")]
mod remote;
#[cfg(feature = "llama")]
mod reranking;
#[cfg(all(feature = "llama", target_os = "linux"))]
mod sandbox;
#[cfg(all(feature = "llama", target_os = "linux"))]
mod server_sandbox;
#[cfg(feature = "llama")]
mod token_lists;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use tether_engine::{
    EngineError, Event, FinishReason, GenerateRequest, GenerateStream, LoadOptions, LoadSnapshot, Message, ModelId,
    ModelRuntime, Piece, PromptInput, Role, Sampling, TokenUsage, VerifiedArtifact,
};

/// Longer than anything here should ever take on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf");

fn tiny() -> VerifiedArtifact {
    artifact(Path::new(TINY))
}

fn artifact(path: &Path) -> VerifiedArtifact {
    let file = File::open(path).expect("the model is there");
    let bytes = file.metadata().expect("it has a length").len();
    VerifiedArtifact { file, sha256: String::new(), bytes, parts: Vec::new() }
}

fn artifact_of(bytes: &[u8]) -> VerifiedArtifact {
    let mut file = tempfile::NamedTempFile::new().expect("temporary files work");
    file.write_all(bytes).expect("it is written");
    artifact(file.path())
}

/// The tiny model with another chat template.
fn tiny_with_template(template: &str) -> VerifiedArtifact {
    const KEY: &[u8] = b"tokenizer.chat_template";
    let bytes = std::fs::read(TINY).expect("the model is there");
    let key = bytes.windows(KEY.len()).position(|window| window == KEY).expect("it has a template");
    // The key is followed by the kind of the value (4 bytes), its length (8) and the text.
    let length_at = key + KEY.len() + 4;
    let text_at = length_at + 8;
    let length = u64::from_le_bytes(bytes[length_at..text_at].try_into().expect("it has 8 bytes")) as usize;
    // The tensors stay aligned when the length changes by a multiple of 32.
    let padding = (32 + length % 32 - template.len() % 32) % 32;
    let template = format!("{template}{{#{}#}}", " ".repeat(padding + 32 - 4));
    let written = (template.len() as u64).to_le_bytes();
    artifact_of(&[&bytes[..length_at], &written, template.as_bytes(), &bytes[text_at + length..]].concat())
}

/// A template that doubles a text until it has 4 GiB, when the last message is as given or is anything.
fn doubling(when: Option<&str>) -> String {
    let condition = when.map_or("true".to_owned(), |content| format!("messages[-1].content == '{content}'"));
    format!(
        "{{% if {condition} %}}{{% set ns = namespace(s='xxxxxxxx') %}}{{% for i in range(29) %}}\
         {{% set ns.s = ns.s ~ ns.s %}}{{% endfor %}}{{{{ ns.s }}}}{{% endif %}}\
         {{% for message in messages %}}<|im_start|>{{{{ message.role }}}}\n{{{{ message.content | trim }}}}<|im_end|>\n\
         {{% endfor %}}<|im_start|>assistant\n"
    )
}

/// One thread, because OpenMP's barriers spin and other tests want the cores as well.
fn options() -> LoadOptions {
    LoadOptions { threads: 1, ..LoadOptions::default() }
}

/// A greedy request for an answer to one question.
fn ask(model: ModelId, question: &str) -> GenerateRequest {
    let input = PromptInput::Chat(vec![Message::new(Role::User, question)].into());
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    GenerateRequest { sampling, ..GenerateRequest::new(model, input) }
}

/// A request that goes on to the end of the context.
fn endless(model: ModelId) -> GenerateRequest {
    GenerateRequest { ignore_eos: true, ..ask(model, "Tell me a story.") }
}

/// An answer that was read to its end.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    text: String,
    tokens: Vec<u32>,
    pieces: usize,
    started: Option<u32>,
    stop_sequence: Option<String>,
    end: Result<(FinishReason, TokenUsage), EngineError>,
}

impl Answer {
    fn reason(&self) -> FinishReason {
        self.end.as_ref().expect("the answer is complete").0
    }

    fn usage(&self) -> TokenUsage {
        self.end.as_ref().expect("the answer is complete").1
    }
}

async fn read(mut stream: GenerateStream) -> Answer {
    let mut answer = Answer {
        text: String::new(),
        tokens: Vec::new(),
        pieces: 0,
        started: None,
        stop_sequence: None,
        end: Err(EngineError::Failed { reason: "the stream has no end".into() }),
    };
    while let Some(item) = within(stream.next()).await {
        match item {
            Ok(Event::Started { prompt_tokens, .. }) => answer.started = Some(prompt_tokens),
            Ok(Event::Piece(Piece { text, tokens, .. })) => {
                answer.text.push_str(&text);
                answer.tokens.extend(tokens);
                answer.pieces += 1;
            }
            Ok(Event::Done { reason, usage, rest }) => {
                answer.text.push_str(&rest.text);
                answer.stop_sequence = rest.stop_sequence;
                answer.end = Ok((reason, usage));
            }
            Ok(Event::Progress(_)) => {}
            Err(error) => answer.end = Err(error),
        }
    }
    answer
}

async fn run(runtime: &dyn ModelRuntime, request: GenerateRequest) -> Answer {
    read(within(runtime.generate(request)).await.expect("it is admitted")).await
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TIMEOUT, future).await.expect("it happens in time")
}

/// Polls the state of the only model until it is as wanted.
async fn until(runtime: &dyn ModelRuntime, wanted: impl Fn(&LoadSnapshot) -> bool) -> LoadSnapshot {
    within(async {
        loop {
            if let Some(state) = runtime.load_state().into_iter().find(&wanted) {
                return state;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
}
