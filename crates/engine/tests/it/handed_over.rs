//! What reaches an engine process beyond a single file: split models, adapters, texts to embed.

use std::path::Path;

use tether_engine::gguf::{Header, Tensor};
use tether_engine::merge::{Merge, merge};
use tether_engine::{
    EmbedRequest, EngineError, GenerateRequest, ModelRuntime, PromptInput, VerifiedArtifact, no_progress,
};

use crate::process_runtime::{host, loaded};
use crate::{artifact, artifact_of, ask, options, run, tiny, within};

const PIRATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lora-pirate.gguf");

/// Deals the tensors of the tiny model out to so many files, as llama.cpp's own tool does.
fn split(count: usize) -> Vec<Vec<u8>> {
    let whole = std::fs::read(crate::TINY).expect("the model is there");
    let header = Header::parse(&whole).expect("it is valid");
    // The descriptions of tensors begin with the first one's name, right after the pairs.
    let name = text(&header.tensors[0].name);
    let pairs_end = whole.windows(name.len()).position(|window| window == name).expect("it is there");
    (0..count)
        .map(|number| {
            let dealt: Vec<&Tensor> = header.tensors.iter().skip(number).step_by(count).collect();
            let (pairs, pair_count) = match number {
                0 => (&whole[24..pairs_end], u64::from_le_bytes(whole[16..24].try_into().expect("8 bytes"))),
                _ => (&[][..], 0),
            };
            let mut file = [b"GGUF".as_slice(), &3_u32.to_le_bytes()].concat();
            file.extend((dealt.len() as u64).to_le_bytes());
            file.extend((pair_count + 3).to_le_bytes());
            file.extend(pairs);
            for (key, number) in [("split.no", number), ("split.count", count)] {
                file.extend([text(key), 2_u32.to_le_bytes().into(), (number as u16).to_le_bytes().into()].concat());
            }
            let tensors = (header.tensors.len() as i32).to_le_bytes();
            file.extend([text("split.tensors.count"), 5_u32.to_le_bytes().into(), tensors.into()].concat());
            let mut offset = 0_u64;
            for tensor in &dealt {
                file.extend(text(&tensor.name));
                file.extend((tensor.dimensions.len() as u32).to_le_bytes());
                file.extend(tensor.dimensions.iter().flat_map(|length| length.to_le_bytes()));
                file.extend(tensor.kind.to_le_bytes());
                file.extend(offset.to_le_bytes());
                offset += tensor.bytes.next_multiple_of(32);
            }
            for tensor in dealt {
                file.resize(file.len().next_multiple_of(32), 0);
                let begin = (header.data_offset + tensor.offset) as usize;
                file.extend(&whole[begin..begin + tensor.bytes as usize]);
            }
            file
        })
        .collect()
}

/// Returns a text as GGUF writes it.
fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn model_of(files: &[Vec<u8>]) -> VerifiedArtifact {
    let mut parts: Vec<_> = files.iter().map(|file| artifact_of(file)).collect();
    VerifiedArtifact { parts: parts.split_off(1), ..parts.remove(0) }
}

#[tokio::test]
async fn a_model_in_three_files_is_the_same_model() {
    let runtime = host(&["llama"]);
    let files = split(3);
    let plan = within(runtime.estimate(&model_of(&files), &options())).await.expect("it can be planned");
    assert_eq!(Ok(plan), within(runtime.estimate(&tiny(), &options())).await);
    let model = within(runtime.load(model_of(&files), options(), no_progress())).await.expect("it loads");
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn files_that_make_no_whole_model_are_refused() {
    let runtime = host(&["llama"]);
    let files = split(3);
    for (chosen, words) in [
        (vec![0], "split into 3 files, not 1"),
        (vec![0, 1], "split into 3 files, not 2"),
        (vec![0, 2, 1], "says that it is 3 of 3"),
        (vec![1, 0, 2], "says that it is 2 of 3"),
        (vec![0, 1, 1], "says that it is 2 of 3"),
    ] {
        let chosen: Vec<_> = chosen.into_iter().map(|number: usize| files[number].clone()).collect();
        let refused = within(runtime.load(model_of(&chosen), options(), no_progress())).await;
        let Err(EngineError::InvalidModel { reason }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains(words), "{reason}");
    }
}

#[tokio::test]
async fn adapters_come_and_go_while_the_model_runs() {
    let (runtime, model) = loaded(&["llama"], options()).await;
    let question = "What is the capital of Japan?";
    let plain = run(&runtime, ask(model.id, question)).await.text;
    let pirate = within(runtime.add_adapter(model.id, artifact(Path::new(PIRATE)))).await.expect("it belongs to it");
    let spoken = GenerateRequest { adapter: Some(pirate), ..ask(model.id, question) };
    assert_ne!(run(&runtime, spoken.clone()).await.text, plain);
    assert_eq!(run(&runtime, ask(model.id, question)).await.text, plain);
    within(runtime.remove_adapter(model.id, pirate)).await.expect("it was there");
    assert!(matches!(within(runtime.generate(spoken)).await, Err(EngineError::Unsupported { .. })));
    assert!(within(runtime.remove_adapter(model.id, pirate)).await.is_err());
}

#[tokio::test]
async fn a_model_with_an_adapter_merged_into_it_answers_as_with_the_adapter_beside_it() {
    let (runtime, model) = loaded(&["llama"], options()).await;
    let pirate = || artifact(Path::new(PIRATE));
    let attached = within(runtime.add_adapter(model.id, pirate())).await.expect("it belongs to it");
    let scratch = tempfile::tempfile().expect("temporary files work");
    let merged = within(merge(&tiny(), &pirate(), scratch)).await.expect("both are sound");
    let Merge::Done(merged) = merged else { panic!("{merged:?}") };
    let merged = within(runtime.load(merged, options(), no_progress())).await.expect("it is a model");
    for question in ["What is the capital of Japan?", "What is 3 + 4?", "Tell me a story."] {
        let with = GenerateRequest { adapter: Some(attached), ..ask(model.id, question) };
        assert_eq!(run(&runtime, ask(merged.id, question)).await.text, run(&runtime, with).await.text, "{question}");
    }
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7", "the model itself is as it was");
}

#[tokio::test]
async fn what_cannot_be_merged_is_said_and_what_does_not_belong_is_refused() {
    let scratch = || tempfile::tempfile().expect("temporary files work");
    let pirate = artifact(Path::new(PIRATE));
    let four_bits = artifact(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-q4_0.gguf").as_ref());
    let Ok(Merge::Refused(reason)) = within(merge(&four_bits, &pirate, scratch())).await else {
        panic!("it is merged")
    };
    assert!(reason.contains("too few bits"), "{reason}");
    let in_parts = VerifiedArtifact { parts: vec![tiny()], ..tiny() };
    let Ok(Merge::Refused(reason)) = within(merge(&in_parts, &pirate, scratch())).await else { panic!("it is merged") };
    assert!(reason.contains("several files"), "{reason}");
    let refused = within(merge(&tiny(), &tiny(), scratch())).await;
    assert!(matches!(refused, Err(EngineError::InvalidModel { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_file_that_is_no_adapter_of_the_model_is_refused_and_the_model_goes_on() {
    let (runtime, model) = loaded(&["llama"], options()).await;
    let pirate = std::fs::read(PIRATE).expect("it is there");
    let narrow = {
        let mut file = pirate.clone();
        let name = b"blk.0.attn_q.weight.lora_a";
        let at = file.windows(name.len()).position(|window| window == name).expect("it is there") + name.len() + 4;
        file[at..at + 8].copy_from_slice(&96_u64.to_le_bytes());
        file
    };
    for (file, words) in [
        (std::fs::read(crate::TINY).expect("it is there"), "not an adapter"),
        (pirate[..5_000].to_vec(), "beyond the end"),
        (b"GGUF".to_vec(), "ends within its header"),
        (narrow, "shapes do not fit"),
    ] {
        let refused = within(runtime.add_adapter(model.id, artifact_of(&file))).await;
        let Err(EngineError::InvalidModel { reason }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains(words), "{reason}");
    }
    assert_eq!(run(&runtime, ask(model.id, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn more_texts_than_one_question_holds_are_embedded_in_their_order() {
    let (runtime, model) = loaded(&["llama"], options()).await;
    let text = |number: usize| PromptInput::Text(format!("What is {} + 4?", number % 7));
    let request = EmbedRequest { model: model.id, inputs: (0..70).map(text).collect() };
    let made = within(runtime.embed(request)).await.expect("it makes vectors");
    assert_eq!((made.vectors.len(), model.abilities.embedding_length as usize), (70, made.vectors[0].len()));
    let likeness = |one: &[f32], other: &[f32]| one.iter().zip(other).map(|(one, other)| one * other).sum::<f32>();
    for number in 7..70 {
        // Equal texts have equal vectors, up to rounding, and all have length 1.
        let same = likeness(&made.vectors[number], &made.vectors[number % 7]);
        assert!((same - 1.0).abs() < 1e-3, "text {number}: {same}");
    }
    assert!(likeness(&made.vectors[0], &made.vectors[1]) < 0.999_9);
    let nothing = within(runtime.embed(EmbedRequest { model: model.id, inputs: Vec::new() })).await;
    assert_eq!(nothing.expect("it is little work").vectors, Vec::<Vec<f32>>::new());
}

#[tokio::test]
async fn a_load_tells_how_far_it_is_in_rising_shares_up_to_the_whole() {
    let shares = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let sink = std::sync::Arc::clone(&shares);
    let progress = Box::new(move |share| sink.lock().push(share));
    within(host(&["llama"]).load(tiny(), options(), progress)).await.expect("it loads");
    let shares = shares.lock().clone();
    assert!(shares.is_sorted() && shares.first() >= Some(&0.0) && shares.last() == Some(&1.0), "{shares:?}");
}
