//! `ProcessRuntime` over engine processes that serve the mock or the tiny model.

use std::time::Duration;

use tether_engine::{
    ChildCommand, EngineError, Event, GenerateStream, LoadOptions, LoadedModel, MockRuntime, ModelRuntime,
    ProcessRuntime, no_progress,
};
use tokio::time::Instant;

use crate::{ask, doubling, options, read, run, tiny, tiny_with_template, until, within};

pub(crate) fn host(arguments: &[&str]) -> ProcessRuntime {
    ProcessRuntime::new(ChildCommand {
        program: env!("CARGO_BIN_EXE_engine-host").into(),
        args: arguments.iter().map(Into::into).collect(),
        envs: Vec::new(),
    })
}

pub(crate) async fn loaded(arguments: &[&str], options: LoadOptions) -> (ProcessRuntime, LoadedModel) {
    let runtime = host(arguments);
    let model = within(runtime.load(tiny(), options, no_progress())).await.expect("it loads");
    (runtime, model)
}

fn is_alive(pid: u32) -> bool {
    // A process that ended but was not yet waited for still has a folder.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

pub(crate) fn kill(pid: u32) {
    signal(pid, rustix::process::Signal::KILL);
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("it is a process");
    rustix::process::kill_process(pid, signal).expect("it is ours");
}

/// Longer than a healthy mock ever goes without a step, on a busy machine as well.
const STALL_TIMEOUT: Duration = Duration::from_secs(2);

async fn with_stall_timeout(arguments: &[&str], options: LoadOptions) -> (ProcessRuntime, LoadedModel) {
    let runtime = host(arguments).with_stall_timeout(STALL_TIMEOUT);
    let model = within(runtime.load(tiny(), options, no_progress())).await.expect("it loads");
    (runtime, model)
}

async fn until_dead(pid: u32) {
    within(async {
        while is_alive(pid) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_model_answers_from_a_process_of_its_own() {
    let (runtime, model) = loaded(&["mock", "tokens=20"], LoadOptions::default()).await;
    let pid = model.pid.expect("it has a process");
    assert!(pid != std::process::id() && is_alive(pid));
    let answer = run(&runtime, ask(model.id, "one two")).await;
    assert_eq!((answer.text, answer.started), (MockRuntime::text(20), Some(2)));
    assert_eq!(within(runtime.count_tokens(model.id, &ask(model.id, "a b c").input)).await, Ok(3));
    assert_eq!(runtime.describe().kind, "mock");
    let state = &runtime.load_state()[0];
    assert_eq!((state.model, state.running, state.waiting), (model.id, 0, 0));
    assert_eq!((state.counters.completed, state.counters.generated_tokens), (1, 20));
}

#[tokio::test]
async fn an_interrupt_from_the_terminal_does_not_reach_the_process() {
    let (_runtime, model) = loaded(&["mock"], LoadOptions::default()).await;
    // A terminal signals the process group in its foreground.
    let group = |pid| rustix::process::getpgid(Some(pid)).expect("it lives");
    let child = rustix::process::Pid::from_raw(model.pid.expect("it has a process") as i32).expect("a process id");
    assert_ne!(group(child), group(rustix::process::getpid()));
}

#[tokio::test]
async fn errors_of_the_request_cross_the_pipe() {
    let (runtime, model) = loaded(&["mock", "context_length=2"], LoadOptions::default()).await;
    let expected = EngineError::ContextLength { prompt_tokens: 3, context_length: 2 };
    assert_eq!(within(runtime.generate(ask(model.id, "a b c"))).await.err(), Some(expected));
    let mut request = ask(model.id, "a");
    request.sampling.temperature = f32::NAN;
    assert!(matches!(within(runtime.generate(request)).await, Err(EngineError::Unsupported { .. })));
    assert_eq!(runtime.load_state()[0].waiting, 0);
}

#[tokio::test]
async fn a_request_longer_than_a_frame_is_refused() {
    let (runtime, model) = loaded(&["mock"], LoadOptions::default()).await;
    let refused = within(runtime.generate(ask(model.id, &"x".repeat(17 << 20)))).await;
    assert!(matches!(refused, Err(EngineError::Unsupported { .. })));
    assert_eq!(run(&runtime, ask(model.id, "a")).await.text, MockRuntime::text(16));
}

#[tokio::test]
async fn a_full_queue_is_busy() {
    let options = LoadOptions { slots: 1, queue_max: 1, ..LoadOptions::default() };
    let (runtime, model) = loaded(&["mock", "per_token_ms=10000"], options).await;
    let _first = within(runtime.generate(ask(model.id, "a"))).await.expect("a slot");
    let _second = within(runtime.generate(ask(model.id, "a"))).await.expect("a place");
    assert_eq!(within(runtime.generate(ask(model.id, "a"))).await.err(), Some(EngineError::Busy));
    assert_eq!((runtime.load_state()[0].running, runtime.load_state()[0].waiting), (1, 1));
}

#[tokio::test]
async fn a_dropped_stream_is_cancelled_in_the_process() {
    let (runtime, model) = loaded(&["mock", "per_token_ms=10000"], LoadOptions::default()).await;
    let mut stream = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    within(stream.next()).await.expect("it starts").expect("and well");
    drop(stream);
    let state = until(&runtime, |state| state.counters.cancelled == 1 && state.running == 0).await;
    assert_eq!(state.counters.completed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_dropped_in_a_flood_of_pieces_never_leave_a_slot_taken() {
    let (runtime, model) = loaded(&["mock", "tokens=100000", "context_length=200000"], LoadOptions::default()).await;
    for round in 0..100 {
        let mut stream = within(runtime.generate(ask(model.id, "go"))).await.expect("it starts");
        for _ in 0..round % 7 {
            within(stream.next()).await;
        }
        drop(stream);
    }
    until(&runtime, |state| state.counters.cancelled == 100 && state.running == 0).await;
}

#[tokio::test]
async fn a_slow_reader_holds_up_nobody_and_misses_nothing() {
    let (runtime, model) = loaded(&["mock", "tokens=5000", "context_length=100000"], LoadOptions::default()).await;
    let slow = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    let quick = run(&runtime, ask(model.id, "a")).await;
    assert_eq!(quick.text, MockRuntime::text(5_000));
    // Were there no credit, the slow generation would be over too, its events heaped up here.
    assert_eq!(runtime.load_state()[0].counters.completed, 1);
    assert!(runtime.load_state()[0].counters.generated_tokens < 5_000 + 1_000);
    assert_eq!(read(slow).await.text, MockRuntime::text(5_000));
}

#[tokio::test]
async fn a_process_that_is_killed_fails_its_generations_and_the_next_load_works() {
    let (runtime, model) = loaded(&["mock", "per_token_ms=10000"], LoadOptions::default()).await;
    let mut stream = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    within(stream.next()).await.expect("it starts").expect("and well");
    kill(model.pid.expect("it has a process"));
    let end = read(stream).await.end;
    assert!(matches!(&end, Err(EngineError::Killed { reason }) if reason.contains("signal: 9")), "{end:?}");
    assert!(runtime.load_state().is_empty());
    assert_eq!(within(runtime.generate(ask(model.id, "a"))).await.err(), Some(EngineError::NotLoaded));
    let again = within(runtime.load(tiny(), LoadOptions::default(), no_progress())).await.expect("it loads again");
    assert_ne!(again.id, model.id);
    assert!(within(runtime.generate(ask(again.id, "a"))).await.is_ok());
}

#[tokio::test]
async fn a_crash_is_laid_to_the_requests_that_were_worked_on_and_to_no_other() {
    let options = LoadOptions { slots: 2, queue_max: 1, ..LoadOptions::default() };
    let (runtime, model) = loaded(&["mock", "per_token_ms=10000"], options).await;
    let ask = || async { within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted") };
    let (mut first, mut second, waiting) = (ask().await, ask().await, ask().await);
    for running in [&mut first, &mut second] {
        within(running.next()).await.expect("it starts").expect("and well");
    }
    signal(model.pid.expect("it has a process"), rustix::process::Signal::ABORT);
    for running in [first, second] {
        let end = read(running).await.end;
        assert!(
            matches!(&end, Err(EngineError::Crashed { reason, suspects: 2 }) if reason.contains("signal: 6")),
            "{end:?}"
        );
    }
    let end = read(waiting).await.end;
    assert!(matches!(&end, Err(EngineError::Failed { reason }) if reason.contains("signal: 6")), "{end:?}");
}

#[tokio::test]
async fn unloading_ends_the_process_and_its_generations() {
    let (runtime, model) = loaded(&["mock", "per_token_ms=10000"], LoadOptions::default()).await;
    let stream = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    let begin = Instant::now();
    within(runtime.unload(model.id)).await.expect("it was loaded");
    assert!(begin.elapsed() < Duration::from_millis(1_900), "it had to be killed");
    assert!(!is_alive(model.pid.expect("it has a process")));
    assert_eq!(read(stream).await.end, Err(EngineError::NotLoaded));
    assert!(runtime.load_state().is_empty());
    assert_eq!(within(runtime.unload(model.id)).await, Err(EngineError::NotLoaded));
}

#[tokio::test]
async fn a_runtime_that_is_dropped_takes_its_processes_along() {
    let (runtime, model) = loaded(&["mock"], LoadOptions::default()).await;
    drop(runtime);
    until_dead(model.pid.expect("it has a process")).await;
}

#[tokio::test]
async fn shutting_down_waits_for_the_processes() {
    let (runtime, model) = loaded(&["mock"], LoadOptions::default()).await;
    within(runtime.shut_down()).await;
    assert!(!is_alive(model.pid.expect("it has a process")));
}

#[tokio::test]
async fn a_load_that_is_dropped_takes_its_process_along() {
    let runtime = host(&["mock", "load_ms=600000"]);
    let load = runtime.load(tiny(), LoadOptions::default(), no_progress());
    assert!(tokio::time::timeout(Duration::from_millis(300), load).await.is_err(), "it takes ten minutes");
    within(runtime.shut_down()).await;
    assert!(runtime.load_state().is_empty());
}

#[tokio::test]
async fn a_program_that_is_no_engine_fails_without_blaming_the_model() {
    for (program, arguments) in [("/nonexistent", vec![]), ("/bin/false", vec![]), ("/bin/echo", vec!["hello".into()])]
    {
        let command = ChildCommand { program: program.into(), args: arguments, envs: Vec::new() };
        let runtime = ProcessRuntime::new(command);
        let refused = within(runtime.load(tiny(), LoadOptions::default(), no_progress())).await;
        assert!(matches!(refused, Err(EngineError::Failed { .. })), "{program}: {refused:?}");
    }
}

#[tokio::test]
async fn a_template_that_asks_for_endless_memory_is_an_invalid_model() {
    let runtime = host(&["mock"]);
    let refused =
        within(runtime.load(tiny_with_template(&doubling(None)), LoadOptions::default(), no_progress())).await;
    let Err(EngineError::InvalidModel { reason }) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("memory allocation of"), "{reason}");
    assert!(runtime.load_state().is_empty());
    within(runtime.load(tiny(), LoadOptions::default(), no_progress())).await.expect("a sound model loads");
}

#[tokio::test]
async fn an_engine_that_hangs_is_killed_and_its_generations_fail() {
    let (runtime, model) = with_stall_timeout(&["mock", "hang_first=1"], LoadOptions::default()).await;
    let stream = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    let end = read(stream).await.end;
    assert!(matches!(&end, Err(EngineError::Failed { reason }) if reason.contains("no progress for")), "{end:?}");
    assert!(!is_alive(model.pid.expect("it has a process")));
    assert!(runtime.load_state().is_empty());
    within(runtime.load(tiny(), LoadOptions::default(), no_progress())).await.expect("it loads again");
}

#[tokio::test]
async fn an_engine_that_hangs_is_killed_even_when_nobody_waits_for_it_any_more() {
    let (runtime, model) = with_stall_timeout(&["mock", "hang_first=1"], LoadOptions::default()).await;
    let mut stream = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    within(stream.next()).await.expect("it starts").expect("and well");
    drop(stream);
    until_dead(model.pid.expect("it has a process")).await;
}

#[tokio::test]
async fn a_process_that_says_nothing_at_all_is_killed() {
    let (runtime, model) = with_stall_timeout(&["mock"], LoadOptions::default()).await;
    let pid = model.pid.expect("it has a process");
    signal(pid, rustix::process::Signal::STOP);
    let refused = within(runtime.generate(ask(model.id, "a"))).await.err();
    assert!(
        matches!(&refused, Some(EngineError::Failed { reason }) if reason.contains("did not answer for")),
        "{refused:?}"
    );
    assert!(!is_alive(pid));
}

#[tokio::test]
async fn a_process_that_stops_in_the_middle_of_an_answer_is_killed() {
    let (runtime, model) =
        with_stall_timeout(&["mock", "per_token_ms=1", "tokens=60000"], LoadOptions::default()).await;
    let mut stream = within(runtime.generate(ask(model.id, "a"))).await.expect("it is admitted");
    within(stream.next()).await.expect("it starts").expect("and well");
    signal(model.pid.expect("it has a process"), rustix::process::Signal::STOP);
    assert!(matches!(read(stream).await.end, Err(EngineError::Failed { .. })));
    within(runtime.load(tiny(), LoadOptions::default(), no_progress())).await.expect("it loads again");
}

#[tokio::test]
async fn a_prompt_that_takes_long_is_no_hang_and_its_reader_and_those_behind_it_are_told() {
    let options = LoadOptions { slots: 1, queue_max: 1, ..LoadOptions::default() };
    let (runtime, model) = with_stall_timeout(&["mock", "first_token_ms=5000"], options).await;
    let reading = within(runtime.generate(ask(model.id, "one two three"))).await.expect("a slot");
    let waiting = within(runtime.generate(ask(model.id, "a"))).await.expect("a place");
    let (reading, waiting) = tokio::join!(progress(reading), progress(waiting));
    assert!(reading.len() >= 2 && reading.is_sorted(), "{reading:?}");
    assert!(reading.iter().all(|(read, total)| read <= total && *total == 3), "{reading:?}");
    // It is told while it waits for its slot as well.
    assert!(waiting.len() > reading.len(), "{waiting:?}");
}

/// Reads a generation to its end and returns how far it was told to be with its prompt.
async fn progress(mut stream: GenerateStream) -> Vec<(u32, u32)> {
    let mut reports = vec![];
    loop {
        match within(stream.next()).await.expect("it has an end").expect("and a good one") {
            Event::Progress(progress) => reports.push((progress.tokens_read, progress.tokens_total)),
            Event::Done { .. } => return reports,
            _ => {}
        }
    }
}

#[tokio::test]
async fn readers_that_do_not_read_and_those_behind_them_are_no_hang() {
    let options = LoadOptions { slots: 1, queue_max: 1, ..LoadOptions::default() };
    let (runtime, model) = with_stall_timeout(&["mock", "tokens=5000", "context_length=100000"], options).await;
    let slow = within(runtime.generate(ask(model.id, "a"))).await.expect("a slot");
    let behind = within(runtime.generate(ask(model.id, "a"))).await.expect("a place");
    tokio::time::sleep(STALL_TIMEOUT * 3).await;
    assert_eq!(read(slow).await.text, MockRuntime::text(5_000));
    assert_eq!(read(behind).await.text, MockRuntime::text(5_000));
    // Nor is an engine without work.
    tokio::time::sleep(STALL_TIMEOUT * 2).await;
    assert!(is_alive(model.pid.expect("it has a process")));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_load_that_panics_fails_at_once_and_says_why() {
    let runtime = host(&["captured", "panicking"]);
    let error = within(runtime.load(tiny(), options(), no_progress())).await.expect_err("it panics");
    assert!(error.to_string().contains("the load panics"), "{error}");
}
