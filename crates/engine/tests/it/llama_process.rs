//! `ProcessRuntime` over engine processes that serve the tiny model.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use bytes::BytesMut;
use tether_engine::process::frame::{ToChild, ToParent, decode, encode};
use tether_engine::process::handover;
use tether_engine::{EngineError, Event, FinishReason, GenerateRequest, ModelId, ModelRuntime, no_progress};

use crate::process_runtime::{host, kill, loaded};
use crate::{artifact_of, ask, doubling, endless, options, read, run, tiny, tiny_with_template, within};

#[tokio::test]
async fn the_tiny_model_answers_from_a_process() {
    let (runtime, model) = loaded(&["llama"], options()).await;
    assert_eq!((model.context_length, model.slots), (512, 4));
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
    let answer = run(&runtime, ask(model.id, "What is the capital of Japan?")).await;
    assert!(answer.text.contains("Tokyo"), "{answer:?}");
    assert_eq!(answer.reason(), FinishReason::Stop);
    let counters = runtime.load_state()[0].counters;
    assert_eq!(counters.completed, 2);
    assert!(counters.decode_steps > 0 && counters.prompt_tokens > 0);
}

#[tokio::test]
async fn the_loaded_file_is_the_verified_one_even_when_its_name_is_gone() {
    let runtime = host(&["llama"]);
    let bytes = std::fs::read(crate::TINY).expect("the model is there");
    // The temporary file loses its name before the load.
    let model = within(runtime.load(artifact_of(&bytes), options(), no_progress())).await.expect("it loads");
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn a_process_killed_in_the_middle_of_an_answer_fails_it() {
    let (runtime, model) = loaded(&["llama"], options()).await;
    let mut stream = within(runtime.generate(endless(model.id))).await.expect("it is admitted");
    for _ in 0..3 {
        within(stream.next()).await.expect("it runs").expect("and well");
    }
    kill(model.pid.expect("it has a process"));
    assert!(matches!(read(stream).await.end, Err(EngineError::Killed { .. })));
}

#[test]
fn a_process_whose_worker_vanishes_ends_in_the_middle_of_its_work() {
    let (mut worker, theirs) = UnixStream::pair().expect("sockets work");
    let (files, their_files) = UnixStream::pair().expect("sockets work");
    let mut child = Command::new(env!("CARGO_BIN_EXE_engine-host"))
        .arg("llama")
        .stdin(Stdio::from(OwnedFd::from(their_files)))
        .stdout(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .expect("it starts");
    let request = endless(ModelId(0));
    let model = tiny();
    handover::send(&files, &model).expect("it is sent");
    let load = ToChild::Load { options: options(), files: handover::describe(&model) };
    let mut buffer = BytesMut::new();
    worker.write_all(&encode(&load).expect("it encodes")).expect("it is sent");
    await_message(&mut worker, &mut buffer, |message| matches!(message, ToParent::Loaded { .. }));
    worker
        .write_all(&encode(&ToChild::Generate { id: 1, request: Box::new(request) }).expect("it encodes"))
        .expect("it is sent");
    let is_piece = |message: &_| matches!(message, ToParent::Event { event: Event::Piece(_), .. });
    await_message(&mut worker, &mut buffer, is_piece);
    drop(worker);
    let status = child.wait().expect("it can be waited for");
    assert_eq!(status.signal(), Some(9), "{status}");
}

fn await_message(worker: &mut UnixStream, buffer: &mut BytesMut, wanted: impl Fn(&ToParent) -> bool) {
    loop {
        while let Some(message) = decode(buffer).expect("it is a frame") {
            if wanted(&message) {
                return;
            }
        }
        let mut bytes = [0; 4_096];
        let count = worker.read(&mut bytes).expect("it can be read");
        assert!(count > 0, "the process ended");
        buffer.extend_from_slice(&bytes[..count]);
    }
}

#[tokio::test]
async fn malformed_files_are_invalid_models_and_harm_nobody() {
    let bytes = std::fs::read(crate::TINY).expect("the model is there");
    let (runtime, healthy) = loaded(&["llama"], options()).await;
    let mut files: Vec<Vec<u8>> = Vec::new();
    for length in [0, 3, 4, 8, 23, 24, 100, 1_000, 10_000, 30_000, 60_000, 500_000, bytes.len() - 64] {
        files.push(bytes[..length].to_vec());
    }
    files.push(b"GGML".iter().chain(&bytes[4..]).copied().collect());
    files.push([&bytes[..4], &9_u32.to_le_bytes(), &bytes[8..]].concat());
    files.push([&bytes[..8], &u64::MAX.to_le_bytes(), &bytes[16..]].concat());
    files.push(vec![0xff; 4_096]);
    for file in files {
        let length = file.len();
        let refused = within(runtime.load(artifact_of(&file), options(), no_progress())).await;
        assert!(matches!(refused, Err(EngineError::InvalidModel { .. })), "{length} bytes: {refused:?}");
    }
    assert_eq!(run(&runtime, ask(healthy.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
    assert_eq!(runtime.load_state().len(), 1);
}

#[tokio::test]
async fn flipped_bits_load_or_are_invalid_models_and_harm_nobody() {
    let bytes = std::fs::read(crate::TINY).expect("the model is there");
    let (runtime, healthy) = loaded(&["llama"], options()).await;
    for number in 0..60_usize {
        let mut file = bytes.clone();
        let offset = number * 7_919 % 45_000;
        file[offset] ^= 1 << (number % 8);
        match within(runtime.load(artifact_of(&file), options(), no_progress())).await {
            Ok(model) => {
                let request = GenerateRequest { max_tokens: Some(4), ..ask(model.id, "What is 3 + 4?") };
                // A poisoned model may crash its process when it runs, and only that.
                if let Ok(stream) = within(runtime.generate(request)).await {
                    read(stream).await;
                }
                let _ = within(runtime.unload(model.id)).await;
            }
            Err(EngineError::InvalidModel { .. } | EngineError::Unsupported { .. }) => {}
            Err(error) => panic!("bit {} of byte {offset}: {error}", number % 8),
        }
    }
    assert_eq!(run(&runtime, ask(healthy.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn a_process_says_what_it_computes_with_before_any_model_is_loaded() {
    let devices = within(host(&["llama"]).hardware()).await.devices;
    assert!(devices.iter().any(|device| !device.is_gpu() && device.total_bytes > 0), "{devices:?}");
    assert!(within(host(&["nonsense"]).hardware()).await.devices.is_empty());
}

#[tokio::test]
async fn a_header_is_estimated_without_a_process() {
    let runtime = host(&["llama"]);
    let plan = within(runtime.estimate(&tiny(), &options())).await.expect("it can be planned");
    assert!(plan.total_bytes() > 1_600_000 && plan.total_bytes() < 400 << 20, "{plan:?}");
    let refused = within(runtime.estimate(&artifact_of(b"GGUF"), &options())).await;
    assert!(matches!(refused, Err(EngineError::InvalidModel { .. })));
}

#[tokio::test]
async fn a_template_that_asks_for_endless_memory_later_takes_its_process_along_and_no_more() {
    let runtime = host(&["llama"]);
    let poisoned = tiny_with_template(&doubling(Some("boom")));
    let model =
        within(runtime.load(poisoned, options(), no_progress())).await.expect("the probe is not what it waits for");
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
    let refused = within(runtime.generate(ask(model.id, "boom"))).await.err();
    assert!(
        matches!(&refused, Some(EngineError::Crashed { reason, .. }) if reason.contains("memory allocation of")),
        "{refused:?}"
    );
    assert!(runtime.load_state().is_empty());
    let again = within(runtime.load(tiny(), options(), no_progress())).await.expect("a sound model loads");
    assert_eq!(run(&runtime, ask(again.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}
