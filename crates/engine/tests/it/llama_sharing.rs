//! What generations of one model share: keys and values, the room for them, and the turns of adapters.

use tether_engine::{
    AdapterId, EngineError, Event, FinishReason, GenerateRequest, LlamaRuntime, LoadOptions, Message, ModelId,
    ModelRuntime, Piece, PromptInput, Role, Sampling, no_progress,
};

use super::random_model::{Family, Weights, random_model};
use super::{TIMEOUT, artifact, ask, options, read, run, tiny, until, within};

const PIRATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lora-pirate.gguf");

async fn loaded(options: LoadOptions) -> (LlamaRuntime, ModelId) {
    let runtime = LlamaRuntime::new();
    let model = within(runtime.load(tiny(), options, no_progress())).await.expect("the tiny model loads").id;
    (runtime, model)
}

async fn pirate(runtime: &LlamaRuntime, model: ModelId) -> AdapterId {
    within(runtime.add_adapter(model, artifact(PIRATE.as_ref()))).await.expect("the adapter fits the model")
}

fn text(model: ModelId, prompt: &str) -> GenerateRequest {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    GenerateRequest { sampling, ..GenerateRequest::new(model, PromptInput::Text(prompt.to_owned())) }
}

/// Tells of a long and regular prompt.
fn story(sentences: usize) -> String {
    let sentences =
        (0..sentences).map(|number| format!("Once upon a time, there was a crow named Otto, number {number}."));
    sentences.collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn a_conversation_that_goes_on_is_not_evaluated_again() {
    let (runtime, model) = loaded(options()).await;
    let first = run(&runtime, ask(model, "What is 3 + 4?")).await;
    let mut messages = vec![Message::new(Role::User, "What is 3 + 4?"), Message::new(Role::Assistant, &first.text)];
    messages.push(Message::new(Role::User, "What is the capital of Japan?"));
    let second = GenerateRequest { input: PromptInput::Chat(messages.into()), ..ask(model, "") };
    let before = runtime.load_state()[0].counters;
    let answer = run(&runtime, second.clone()).await;
    let usage = answer.usage();
    // All of the first turn but what the template writes behind its answer.
    assert!(usage.cached_tokens >= first.usage().prompt_tokens + first.usage().completion_tokens, "{usage:?}");
    let after = runtime.load_state()[0].counters;
    let evaluated = after.prompt_tokens - before.prompt_tokens;
    assert_eq!(evaluated, u64::from(usage.prompt_tokens - usage.cached_tokens));
    assert_eq!(after.prefix_hits - before.prefix_hits, u64::from(usage.cached_tokens));
    // And it is the answer that a cold engine gives.
    let (cold, model) = loaded(options()).await;
    assert_eq!(run(&cold, GenerateRequest { model, ..second }).await.text, answer.text);
}

#[tokio::test]
async fn several_answers_to_one_prompt_evaluate_it_once() {
    let (runtime, model) = loaded(options()).await;
    let prompt = story(20);
    let request = |seed| GenerateRequest {
        sampling: Sampling { seed, ..Sampling::default() },
        max_tokens: Some(4),
        ..text(model, &prompt)
    };
    let streams = [within(runtime.generate(request(1))).await, within(runtime.generate(request(2))).await];
    let mut cached = Vec::new();
    for stream in streams {
        cached.push(read(stream.expect("it is admitted")).await.usage());
    }
    cached.sort_unstable_by_key(|usage| usage.cached_tokens);
    assert_eq!(cached[0].cached_tokens, 0);
    assert_eq!(cached[1].cached_tokens, cached[1].prompt_tokens);
}

#[tokio::test]
async fn conversations_that_lost_their_cells_come_back_from_host_memory() {
    // Room for one prompt of full length at a time.
    let (runtime, model) = loaded(LoadOptions { slots: 1, ..options() }).await;
    let first = GenerateRequest { max_tokens: Some(4), ..text(model, &format!("Mia. {}", story(18))) };
    let second = GenerateRequest { max_tokens: Some(4), ..text(model, &format!("Leo. {}", story(18))) };
    let answer = run(&runtime, first.clone()).await;
    run(&runtime, second).await;
    let again = run(&runtime, first.clone()).await;
    assert_eq!(again.usage().cached_tokens, again.usage().prompt_tokens);
    assert_eq!(again.text, answer.text);
    let (runtime, model) = loaded(LoadOptions { slots: 1, prompt_cache_bytes: 0, ..options() }).await;
    run(&runtime, GenerateRequest { model, ..first.clone() }).await;
    run(&runtime, GenerateRequest { max_tokens: Some(4), ..text(model, &format!("Leo. {}", story(18))) }).await;
    let again = run(&runtime, GenerateRequest { model, ..first }).await;
    assert!(again.usage().cached_tokens < 4, "{:?}", again.usage());
}

#[tokio::test]
async fn generations_that_outgrow_the_room_give_way_and_lose_nothing() {
    // Four slots share the room of one full context.
    let (runtime, model) = loaded(LoadOptions { slots: 4, kv_tokens: 512, ..options() }).await;
    let request = |name: &str| GenerateRequest {
        max_tokens: Some(200),
        ignore_eos: true,
        ..text(model, &format!("Once upon a time, there was a girl named {name}."))
    };
    let names = ["Mia", "Zoe", "Anna", "Lily"];
    let mut streams = Vec::new();
    for name in names {
        streams.push(within(runtime.generate(request(name))).await.expect("it is admitted"));
    }
    let mut together = Vec::new();
    for stream in streams {
        let answer = read(stream).await;
        assert_eq!((answer.reason(), answer.usage().completion_tokens), (FinishReason::Length, 200));
        assert_eq!(answer.tokens.len(), 200);
        together.push(answer);
    }
    assert!(runtime.load_state()[0].kv_usage.abs() < f32::EPSILON);
}

#[tokio::test]
async fn prompts_that_do_not_fit_the_room_together_all_get_their_answers() {
    let (runtime, model) = loaded(LoadOptions { slots: 4, kv_tokens: 512, ..options() }).await;
    let mut streams = Vec::new();
    for number in 0..24 {
        let tokens = (0..30 + number * 67 % 211).map(|index| 300 + (number * 31 + index) % 97).collect();
        let input = PromptInput::Tokens(tokens);
        let request = GenerateRequest { max_tokens: Some(6), ignore_eos: true, input, ..text(model, "") };
        streams.push(within(runtime.generate(request)).await.expect("it is admitted"));
    }
    for stream in streams {
        assert_eq!(read(stream).await.usage().completion_tokens, 6);
    }
}

#[tokio::test]
async fn an_adapter_changes_the_answers_of_those_who_ask_for_it() {
    let (runtime, model) = loaded(options()).await;
    let adapter = pirate(&runtime, model).await;
    let plain = ask(model, "What is 3 + 4?");
    let spoken = GenerateRequest { adapter: Some(adapter), ..plain.clone() };
    assert!(run(&runtime, spoken.clone()).await.text.starts_with("Arr!"));
    assert_eq!(run(&runtime, plain).await.text, "3 + 4 = 7");
    within(runtime.remove_adapter(model, adapter)).await.expect("it was attached");
    let gone = within(runtime.generate(spoken)).await.err();
    assert!(matches!(gone, Some(EngineError::Unsupported { parameter, .. }) if parameter == "adapter"));
}

#[tokio::test]
async fn different_adapters_make_progress_side_by_side() {
    let (runtime, model) = loaded(options()).await;
    let adapters = [None, Some(pirate(&runtime, model).await), Some(pirate(&runtime, model).await)];
    let mut streams = Vec::new();
    for adapter in adapters {
        let request = GenerateRequest { adapter, ignore_eos: true, ..ask(model, "Tell me a story.") };
        streams.push(within(runtime.generate(request)).await.expect("it is admitted"));
    }
    // Each gives its first tokens while the others are far from their ends.
    for stream in &mut streams {
        let mut tokens = 0;
        while tokens < 5 {
            if let Some(Ok(Event::Piece(Piece { tokens: more, .. }))) = within(stream.next()).await {
                tokens += more.len();
            }
        }
    }
    let state = &runtime.load_state()[0];
    assert_eq!((state.running, state.counters.completed), (3, 0));
    assert!(state.counters.generated_tokens < 400, "{state:?}");
}

#[tokio::test]
async fn an_adapter_that_is_removed_stays_until_its_answers_end() {
    let (runtime, model) = loaded(options()).await;
    let adapter = pirate(&runtime, model).await;
    let request = GenerateRequest { adapter: Some(adapter), ..ask(model, "What is the capital of Japan?") };
    let expected = run(&runtime, request.clone()).await.text;
    let mut stream = within(runtime.generate(request)).await.expect("it is admitted");
    within(stream.next()).await.expect("it starts").expect("and well");
    within(runtime.remove_adapter(model, adapter)).await.expect("it was attached");
    assert_eq!(read(stream).await.text, expected);
    assert_eq!(run(&runtime, ask(model, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn what_is_no_adapter_of_this_model_is_refused_while_others_generate() {
    let (runtime, model) = loaded(options()).await;
    let stream = within(runtime.generate(ask(model, "What is 3 + 4?"))).await.expect("it is admitted");
    let refused = within(runtime.add_adapter(model, tiny())).await.err();
    assert!(matches!(refused, Some(EngineError::InvalidModel { .. })), "{refused:?}");
    assert_eq!(read(stream).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn a_continued_answer_says_the_rest_of_it() {
    let (runtime, model) = loaded(options()).await;
    let request = GenerateRequest {
        sampling: Sampling { temperature: 0.8, seed: 11, ..Sampling::default() },
        max_tokens: Some(60),
        deterministic: true,
        ..ask(model, "Tell me a story.")
    };
    let whole = run(&runtime, request.clone()).await;
    assert!(whole.tokens.len() > 20, "{}", whole.text);
    for delivered in [1, 7, 20] {
        let (other, model) = loaded(options()).await;
        let continued = whole.tokens[..delivered].to_vec();
        let rest = run(&other, GenerateRequest { model, continued, ..request.clone() }).await;
        assert_eq!(rest.tokens, whole.tokens[delivered..], "after {delivered} tokens");
        assert!(whole.text.ends_with(&rest.text));
        assert_eq!(rest.usage().completion_tokens, whole.usage().completion_tokens);
    }
}

/// The text of each piece of an answer with its tokens, and the text at its end.
async fn pieces(runtime: &LlamaRuntime, request: GenerateRequest) -> (Vec<Piece>, String) {
    let mut pieces = Vec::new();
    let mut stream = within(runtime.generate(request)).await.expect("it is admitted");
    loop {
        match within(stream.next()).await.expect("it has an end").expect("it goes on") {
            Event::Piece(piece) => pieces.push(piece),
            Event::Done { rest, .. } => return (pieces, rest.text),
            Event::Started { .. } | Event::Progress(_) => {}
        }
    }
}

/// Wherever an answer is cut, its delivered pieces and its continuation make the whole of it: with text that is held
/// back for a stop sequence, at the stop sequence, and after the last token.
#[tokio::test]
async fn a_continued_answer_repeats_nothing_and_leaves_nothing_out() {
    let (runtime, model) = loaded(options()).await;
    let told = GenerateRequest {
        sampling: Sampling { temperature: 0.8, seed: 11, ..Sampling::default() },
        max_tokens: Some(24),
        deterministic: true,
        ..ask(model, "Tell me a story.")
    };
    let text = run(&runtime, told.clone()).await.text;
    let end = &text[text.len() - 2..];
    let (held, met) = (format!("{end}#"), text[10..14].to_owned());
    for stop in [held, met] {
        let request = GenerateRequest { stop: vec![stop.clone()], ..told.clone() };
        let (pieces, rest) = pieces(&runtime, request.clone()).await;
        let whole: String = pieces.iter().map(|piece| piece.text.as_str()).chain([rest.as_str()]).collect();
        assert!(pieces.len() > 2, "{stop:?}: {whole:?}");
        for delivered in 0..=pieces.len() {
            let continued = pieces[..delivered].iter().flat_map(|piece| piece.tokens.clone()).collect();
            let before: String = pieces[..delivered].iter().map(|piece| piece.text.as_str()).collect();
            let after = run(&runtime, GenerateRequest { continued, ..request.clone() }).await;
            assert_eq!(before + &after.text, whole, "{stop:?} after {delivered} pieces: {:?}", after.end);
        }
    }
}

#[tokio::test]
async fn a_deterministic_answer_is_the_same_whatever_runs_beside_it() {
    let (runtime, model) = loaded(options()).await;
    let request = GenerateRequest {
        sampling: Sampling { seed: 5, ..Sampling::default() },
        max_tokens: Some(80),
        logprobs: Some(3),
        deterministic: true,
        ..ask(model, "Tell me a story.")
    };
    let logprobs = async |request: GenerateRequest| {
        let mut logprobs = Vec::new();
        let mut stream = within(runtime.generate(request)).await.expect("it is admitted");
        while let Some(event) = within(stream.next()).await {
            if let Event::Piece(piece) = event.expect("it goes on") {
                logprobs.extend(piece.logprobs);
            }
        }
        logprobs
    };
    let alone = logprobs(request.clone()).await;
    let beside = GenerateRequest { ignore_eos: true, ..ask(model, "What is the capital of Japan?") };
    let _beside = within(runtime.generate(beside)).await.expect("it is admitted");
    assert_eq!(logprobs(request).await, alone);
}

#[tokio::test]
async fn a_prediction_changes_the_speed_and_not_the_answer() {
    // With 16-bit weights, drafts do not depend on the speed of this machine.
    let (runtime, options) = (LlamaRuntime::new(), LoadOptions { draft_tokens: 3, context_length: 512, ..options() });
    let model = random_model(Family::Full, Weights::F16, 5);
    let model = within(runtime.load(model, options, no_progress())).await.expect("it loads").id;
    let prompt = PromptInput::Tokens((1..20).collect());
    let request = GenerateRequest {
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: Some(100),
        ignore_eos: true,
        ..GenerateRequest::new(model, prompt)
    };
    let plain = run(&runtime, request.clone()).await;
    let before = runtime.load_state()[0].counters;
    let prediction = Some(PromptInput::Tokens(plain.tokens.clone()));
    let predicted = run(&runtime, GenerateRequest { prediction, ..request }).await;
    assert_eq!(predicted.text, plain.text);
    let after = runtime.load_state()[0].counters;
    assert!(after.accepted_tokens - before.accepted_tokens > 10, "{after:?}");
    assert!(after.decode_steps - before.decode_steps < plain.tokens.len() as u64 - 10, "{after:?}");
}

#[tokio::test]
async fn a_long_prompt_is_given_up_at_once_when_its_reader_goes() {
    let (runtime, model) = loaded(LoadOptions { slots: 1, ..options() }).await;
    let mut stream = within(runtime.generate(text(model, &story(20)))).await.expect("it is admitted");
    within(stream.next()).await.expect("it starts").expect("and well");
    drop(stream);
    let state = until(&runtime, |state| state.running == 0).await;
    assert_eq!(state.counters.cancelled, 1);
    assert_eq!(run(&runtime, ask(model, "What is 3 + 4?")).await.text, "3 + 4 = 7");
}

#[tokio::test]
async fn texts_become_vectors_of_length_one_that_do_not_depend_on_their_neighbours() {
    let (runtime, model) = loaded(options()).await;
    let embed = async |texts: &[&str]| {
        let inputs = texts.iter().map(|text| PromptInput::Text((*text).to_owned())).collect();
        let request = tether_engine::EmbedRequest { model, inputs };
        tokio::time::timeout(TIMEOUT, runtime.embed(request)).await.expect("it happens in time").expect("it embeds")
    };
    let alone = embed(&["Once upon a time"]).await;
    let three = embed(&["What is 3 + 4?", "Once upon a time", "Tokyo"]).await;
    assert_eq!(three.vectors.len(), 3);
    for vector in &three.vectors {
        assert_eq!(vector.len(), 192);
        let length: f32 = vector.iter().map(|number| number * number).sum();
        assert!((length - 1.0).abs() < 1e-4, "{length}");
    }
    let likeness: f32 = alone.vectors[0].iter().zip(&three.vectors[1]).map(|(one, other)| one * other).sum();
    assert!(likeness > 0.999, "{likeness}");
    let empty = tether_engine::EmbedRequest { model, inputs: vec![PromptInput::Tokens(Vec::new())] };
    assert!(matches!(within(runtime.embed(empty)).await, Err(EngineError::Unsupported { .. })));
}
