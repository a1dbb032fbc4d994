//! Files that were damaged by chance: each is an error that says why, or a model that works. The seed is fixed, so a
//! failure repeats; `TETHER_POISONED_FILES` sets how many there are.

use tether_engine::{
    EngineError, GenerateRequest, LoadOptions, ModelRuntime, ProcessRuntime, PromptInput, no_progress,
};

use crate::chance::Chance;
use crate::process_runtime::host;
use crate::{artifact_of, ask, options, read, run, tiny, within};

/// Enough to meet each kind of damage many times, in some seconds.
const FILES: u64 = 1_000;
/// Where the tensors of the tiny model begin, nearly.
const HEADER_BYTES: u64 = 45_000;
/// Processes at a time.
const LANES: u64 = 2;

/// Returns a damaged copy, and how it was damaged.
fn damaged(bytes: &[u8], number: u64) -> (Vec<u8>, String) {
    let mut chance = Chance(number);
    let mut file = bytes.to_vec();
    let header = |chance: &mut Chance| chance.below(HEADER_BYTES) as usize;
    let how = match number % 6 {
        0 => {
            let (offset, bit) = (header(&mut chance), chance.below(8));
            file[offset] ^= 1 << bit;
            format!("bit {bit} of byte {offset} flipped")
        }
        1 => {
            let offset = header(&mut chance);
            let value = chance.next() as u8;
            file[offset] = value;
            format!("byte {offset} set to {value}")
        }
        2 => {
            // Lengths, counts and numbers are eight bytes or four.
            let offset = header(&mut chance);
            let value = [0, 1, u64::from(u32::MAX), u64::MAX, 1 << 40, chance.next()][chance.below(6) as usize];
            file[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
            format!("bytes {offset}.. set to {value:#x}")
        }
        3 => {
            let length = chance.below(file.len() as u64) as usize;
            file.truncate(length);
            format!("cut to {length} bytes")
        }
        4 => {
            // The numbers that follow the names of the hyperparameters.
            let offset = 60 + chance.below(900) as usize;
            let value = chance.next() as u32;
            file[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
            format!("bytes {offset}.. set to {value:#x}")
        }
        _ => {
            let data = HEADER_BYTES as usize + 8;
            let offsets: Vec<_> = (0..64).map(|_| data + chance.below((file.len() - data) as u64) as usize).collect();
            for offset in offsets {
                file[offset] = chance.next() as u8;
            }
            "64 bytes of its tensors changed".to_owned()
        }
    };
    (file, how)
}

/// Loads a file and asks it something; returns how its process died, if it did.
async fn try_out(runtime: &ProcessRuntime, file: &[u8], how: &str) -> Option<String> {
    // Little room, so that a damaged context length finds none where it is enormous.
    let options = LoadOptions { memory_max_bytes: Some(1 << 30), prompt_cache_bytes: 0, ..options() };
    let died = |reason: &str| reason.starts_with("engine process").then(|| format!("{how}: {reason}"));
    match within(runtime.load(artifact_of(file), options, no_progress())).await {
        Ok(model) => {
            let request = GenerateRequest {
                max_tokens: Some(4),
                ..GenerateRequest::new(model.id, PromptInput::Text("What is 3 + 4?".into()))
            };
            let end = match within(runtime.generate(request)).await {
                Ok(stream) => read(stream).await.end.map(drop),
                Err(error) => Err(error),
            };
            let _ = within(runtime.unload(model.id)).await;
            match end {
                Err(EngineError::Failed { reason } | EngineError::Killed { reason }) => died(&reason),
                _ => None,
            }
        }
        Err(EngineError::InvalidModel { reason } | EngineError::Failed { reason }) => died(&reason),
        Err(EngineError::Unsupported { .. } | EngineError::OutOfMemory { .. }) => None,
        Err(error) => panic!("{how}: {error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_files_are_errors_or_models_and_harm_nobody() {
    #[expect(clippy::disallowed_methods, reason = "tests have no command line of their own")]
    let count = std::env::var("TETHER_POISONED_FILES").ok().and_then(|count| count.parse().ok()).unwrap_or(FILES);
    let bytes = std::fs::read(crate::TINY).expect("the model is there");
    let runtime = host(&["llama"]);
    let healthy = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads");
    let lane = async |lane: u64| {
        let mut deaths = Vec::new();
        for number in (lane..count).step_by(LANES as usize) {
            let (file, how) = damaged(&bytes, number);
            deaths.extend(try_out(&runtime, &file, &format!("file {number}, {how}")).await);
        }
        deaths
    };
    let (mut deaths, others) = tokio::join!(lane(0), lane(1));
    deaths.extend(others);
    assert!(deaths.is_empty(), "{} processes died:\n{}", deaths.len(), deaths.join("\n"));
    assert_eq!(run(&runtime, ask(healthy.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
    assert_eq!(runtime.load_state().len(), 1);
}

#[tokio::test]
async fn a_prompt_of_a_million_tokens_is_refused() {
    let runtime = host(&["llama"]);
    let model = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads");
    let million = || (0..1_000_000_u32).map(|number| number % 1_000);
    let prompts = [
        PromptInput::Tokens(million().collect()),
        PromptInput::Text("word ".repeat(1_000_000)),
        ask(model.id, &"word ".repeat(1_000_000)).input,
    ];
    for input in prompts {
        let refused = within(runtime.generate(GenerateRequest::new(model.id, input))).await.err();
        assert!(matches!(refused, Some(EngineError::ContextLength { .. })), "{refused:?}");
    }
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

/// Returns where the texts of the vocabulary lie in a file.
fn vocabulary(file: &[u8]) -> Vec<std::ops::Range<usize>> {
    const KEY: &[u8] = b"tokenizer.ggml.tokens";
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("8 bytes")) as usize;
    let key = file.windows(KEY.len()).position(|window| window == KEY).expect("it has a vocabulary");
    // The kind of the value and of its elements come before their count, and the length of each before its text.
    let mut at = key + KEY.len() + 8;
    let count = number(at);
    at += 8;
    let text = |at: &mut usize| {
        let begin = *at + 8;
        *at = begin + number(*at);
        begin..*at
    };
    (0..count).map(|_| text(&mut at)).collect()
}

#[tokio::test]
async fn texts_that_are_no_utf_8_are_errors_or_answered_and_harm_nobody() {
    let runtime = host(&["llama"]);
    let healthy = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads");
    let bytes = std::fs::read(crate::TINY).expect("the model is there");
    let texts = vocabulary(&bytes);
    assert!(texts.len() > 500, "{} tokens", texts.len());
    let poison = |name: &'static str, bad: &dyn Fn(&mut [u8])| {
        let mut file = bytes.clone();
        for text in &texts {
            bad(&mut file[text.clone()]);
        }
        (name, file)
    };
    let template = bytes.windows(11).position(|window| window == b"<|im_start|").expect("it has a template");
    let mut in_template = bytes.clone();
    in_template[template] = 0xff;
    let files = [
        poison("texts of bytes that never occur", &|text| text.fill(0xff)),
        poison("characters that go on without a beginning", &|text| text[0] = 0x80),
        poison("characters that begin and do not go on", &|text| *text.last_mut().expect("a text") = 0xe2),
        poison("surrogates", &|text| {
            if let [first, second, third, ..] = text {
                (*first, *second, *third) = (0xed, 0xa0, 0x80);
            }
        }),
        ("a template with a byte that never occurs", in_template),
    ];
    for (name, file) in &files {
        assert_eq!(try_out(&runtime, file, name).await, None);
    }
    assert_eq!(run(&runtime, ask(healthy.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}
