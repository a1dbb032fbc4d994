//! What a load is predicted to take, against what engine processes really take.

use std::fs;
use std::path::PathBuf;

use tether_engine::{
    EngineError, GenerateRequest, LoadOptions, ModelRuntime, PromptInput, VerifiedArtifact, no_progress,
};

use crate::process_runtime::host;
use crate::{artifact, ask, doubling, options, read, run, tiny, tiny_with_template, within};

/// A folder of models from `models/make_random_gguf.py`, for the comparison that is too large to run every time.
const MODELS: &str = "TETHER_RANDOM_MODELS";
const MIB: f64 = (1 << 20) as f64;

/// Returns the peak of a process's resident memory: the pages of the file it maps, and what it allocated.
fn peak_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel tells");
    let kib: u64 = peak.trim().trim_end_matches("kB").trim().parse().expect("it is a number");
    kib * 1_024
}

/// Loads a model, has so many sequences evaluate full batches, and compares.
#[expect(clippy::print_stdout, reason = "the figures are what it is run for")]
async fn compare(name: &str, artifact: VerifiedArtifact, options: LoadOptions, sequences: u32) {
    let runtime = host(&["llama"]);
    let plan = within(runtime.estimate(&artifact, &options)).await.expect("it can be planned");
    let model = within(runtime.load(artifact, options.clone(), no_progress())).await.expect("it loads");
    let mut answers = Vec::new();
    for sequence in 0..sequences {
        let tokens = (0..model.context_length.min(600) - 8).map(|number| 300 + (number + sequence) % 97).collect();
        let prompt = PromptInput::Tokens(tokens);
        let request = GenerateRequest { max_tokens: Some(4), ..GenerateRequest::new(model.id, prompt) };
        answers.push(runtime.generate(request).await.expect("it is admitted"));
    }
    for answer in answers {
        read(answer).await.end.expect("it answers");
    }
    let (planned, measured) = (plan.total_bytes(), peak_bytes(model.pid.expect("it has a process")));
    let ratio = planned as f64 / measured as f64;
    let text = format!(
        "{name}, {} tokens for {} slots: {:.1} MiB planned, {:.1} MiB measured, ratio {ratio:.3}",
        options.context_length,
        options.slots,
        planned as f64 / MIB,
        measured as f64 / MIB
    );
    println!("{text}");
    assert!((0.9..=1.1).contains(&ratio), "{text}: {plan:?}");
}

/// No memory for old conversations, which none of these has.
fn sized(context_length: u32, slots: u32) -> LoadOptions {
    LoadOptions { context_length, slots, prompt_cache_bytes: 0, ..options() }
}

#[tokio::test]
async fn the_tiny_models_take_what_was_predicted() {
    for slots in [4, 24] {
        // The room of such small models is most of what they take, so all of it is used.
        compare("tiny", tiny(), sized(512, slots), slots).await;
        let four_bits = artifact(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-q4_0.gguf").as_ref());
        compare("tiny-q4_0", four_bits, sized(512, slots), slots).await;
    }
}

#[tokio::test]
#[ignore = "needs models: make bench-engine"]
async fn realistic_models_take_what_was_predicted() {
    let folder = PathBuf::from(std::env::var_os(MODELS).expect("it names a folder of models"));
    let mut files: Vec<_> =
        fs::read_dir(folder).expect("it can be read").map(|entry| entry.expect("a file").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "gguf"));
    // Their adapters lie beside them.
    files.retain(|file| !file.to_string_lossy().contains("-lora-"));
    files.sort();
    for file in files {
        let name = file.file_stem().expect("it has a name").to_string_lossy().into_owned();
        for (context_length, slots) in [(2_048, 1), (2_048, 4), (1_024, 16)] {
            compare(&name, artifact(&file), sized(context_length, slots), 1).await;
        }
    }
}

#[tokio::test]
async fn a_model_that_may_not_take_what_it_needs_is_refused_before_it_does() {
    let runtime = host(&["llama"]);
    let options = LoadOptions { memory_max_bytes: Some(30 << 20), ..options() };
    let refused = within(runtime.load(tiny(), options, no_progress())).await;
    let Err(EngineError::OutOfMemory { needed_bytes, available_bytes }) = refused else { panic!("{refused:?}") };
    assert!(needed_bytes > available_bytes && available_bytes == 30 << 20);
    let options = LoadOptions { slots: 192, context_length: 0, kv_tokens: 0, ..crate::options() };
    within(runtime.load(tiny(), options, no_progress())).await.expect("a machine has room for that");
}

#[tokio::test]
async fn a_process_that_outgrows_its_limit_dies_alone_and_says_why() {
    let runtime = host(&["llama"]);
    let healthy = within(runtime.load(tiny(), options(), no_progress())).await.expect("it loads");
    let tight = LoadOptions { memory_max_bytes: Some(700 << 20), ..options() };
    let greedy = tiny_with_template(&doubling(Some("boom")));
    let model = within(runtime.load(greedy, tight, no_progress())).await.expect("it fits");
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
    let died = within(runtime.generate(ask(model.id, "boom"))).await.err();
    let Some(EngineError::Crashed { reason, .. }) = &died else { panic!("{died:?}") };
    // Below the gibibyte that it would have got without a limit of its own.
    let asked: u64 = reason
        .split("memory allocation of ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next()?.parse().ok())
        .unwrap_or_else(|| panic!("{reason}"));
    assert!(asked < 1 << 30, "{reason}");
    assert_eq!(run(&runtime, ask(healthy.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}
