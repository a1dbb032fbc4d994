//! What operators see of jobs and do with them, on a running network with real engines.

#![cfg(feature = "llama")]

use std::io::Read as _;
use std::process::{Child, Stdio};

use protocol::Clock as _;
use rpc::SystemClock;
use rustix::process::Signal;
use serde_json::Value;

use crate::program::{Home, Up, signal, wait_for};

const PROMPT: &str = "Tell me a story about poison.";

/// Asks a question in the background, without waiting for an engine that is being loaded.
fn ask(home: &Home, prompt: &str, more: &[&str]) -> Child {
    let mut command =
        home.command(&[&["run", "tether-tiny", prompt, "--temperature", "0", "--timeout", "0"], more].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs")
}

/// Waits for the end of a command that must fail, and returns what it says.
fn failure(child: Child) -> String {
    let output = child.wait_with_output().expect("it ends");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    errors
}

/// Returns the one engine of the network.
fn engine(up: &Up) -> u32 {
    let engines = up.children();
    assert_eq!(engines.len(), 1, "one worker");
    engines[0]
}

/// Returns the id of the one job in a state, once there is one.
fn job_in_state(home: &Home, state: &str) -> String {
    let mut id = None;
    wait_for("the job to be listed", || {
        let listed = home.json(&["jobs", "list", "--state", state, "--json"]);
        id = listed["jobs"][0]["correlationId"].as_str().map(str::to_owned);
        id.is_some()
    });
    id.expect("just found")
}

/// Makes the engine crash on the prompt, and waits until its worker has another one. Returns the id of the request.
fn crash(home: &Home, up: &Up) -> String {
    let engine = engine(up);
    // A stopped engine keeps the request until it crashes.
    signal(engine, Signal::STOP);
    let asking = ask(home, PROMPT, &[]);
    let id = job_in_state(home, "running");
    // An engine that is killed says nothing of its request; one that ends itself does.
    signal(engine, Signal::ABORT);
    signal(engine, Signal::CONT);
    failure(asking);
    wait_for("the engine to come back", || up.children().len() == 1 && up.children() != [engine]);
    let back = SystemClock.now();
    wait_for("the worker to report it", || {
        let report = home.json(&["nodes", "--json"])["workers"][0]["report"].clone();
        report["modelCache"][0]["state"] == "ready" && report["issuedAt"].as_u64() > Some(back.0)
    });
    id
}

fn dead_letters(home: &Home) -> Vec<Value> {
    home.json(&["dlq", "list", "--json"])["deadLetters"].as_array().cloned().expect("a list")
}

#[test]
fn a_poison_request_is_found_explained_replayed_and_deleted() {
    let home = Home::new();
    let up = home.up(&[]);
    assert_eq!(dead_letters(&home), Vec::<Value>::new());
    let first = crash(&home, &up);
    assert_eq!(dead_letters(&home), Vec::<Value>::new(), "one crash convicts nobody");
    let id = &crash(&home, &up);
    let letters = dead_letters(&home);
    let [letter] = &letters[..] else { panic!("one letter: {letters:?}") };
    assert_eq!((&letter["correlationId"], &letter["cause"]), (&id.as_str().into(), &"engines_crashed".into()));

    let listed = home.well(&["dlq", "list"]);
    assert!(listed.contains(id) && listed.contains("request_crashes_engine"), "{listed}");
    let shown = home.well(&["dlq", "show", id]);
    assert!(shown.contains("engine_crashed") && !shown.contains("poison"), "{shown}");
    let payload = home.json(&["dlq", "show", id, "--payload", "--json"]);
    assert!(payload["request"].to_string().contains(PROMPT), "{payload}");
    let explained = home.well(&["explain", id]);
    assert!(explained.contains("engine_crashed") && explained.contains("SCORE"), "{explained}");
    let of_answer = home.json(&["explain", &format!("chatcmpl-{id}"), "--json"]);
    assert_eq!(of_answer["job"]["status"], "dead", "{of_answer}");
    assert_eq!(home.json(&["explain", &first, "--json"])["job"]["status"], "failed");
    assert!(home.well(&["jobs", "show", id]).contains("counts against the request"));
    // The prompt is in no file of the store.
    for file in ["orchestrator.db", "orchestrator.db-wal"] {
        let bytes = std::fs::read(home.data().join(file)).unwrap_or_default();
        assert!(!bytes.windows(PROMPT.len()).any(|found| found == PROMPT.as_bytes()), "{file}");
    }

    // Whoever repeats it is refused, until an operator runs it again.
    let refused = failure(ask(&home, PROMPT, &[]));
    assert!(refused.contains("engines crashed on this request"), "{refused}");
    let replayed = home.well(&["dlq", "replay", id, "--keep"]);
    assert!(replayed.contains("completed as") && replayed.contains("finish reason"), "{replayed}");
    assert_eq!(dead_letters(&home).len(), 1, "it was to be kept");
    let replayed = home.json(&["dlq", "replay", id, "--json"]);
    assert!(replayed["usage"]["completionTokens"].as_u64() > Some(0), "{replayed}");
    assert_eq!((&replayed["status"], &replayed["purged"]), (&"completed".into(), &true.into()));
    let job = home.json(&["jobs", "show", replayed["correlationId"].as_str().expect("an id"), "--json"]);
    assert_eq!((&job["jobs"][0]["status"], &job["jobs"][0]["tenantId"]), (&"completed".into(), &letter["tenantId"]));
    assert_eq!(dead_letters(&home), Vec::<Value>::new());
    assert_eq!(home.run(&["dlq", "replay", id]).status.code(), Some(2), "there is nothing to replay");
    assert_eq!(home.run(&["dlq", "purge", id]).status.code(), Some(1), "there is nothing to delete");
    home.well(&["dlq", "purge", "--all", "--yes"]);
    assert_eq!(up.end(), Some(0));
}

#[test]
fn an_operator_cancels_a_running_answer_and_its_client_is_told_so() {
    let home = Home::new();
    let up = home.up(&[]);
    let engine = engine(&up);
    let mut asking = ask(&home, "Tell me a story.", &["--max-tokens", "400"]);
    let mut output = asking.stdout.take().expect("piped");
    output.read_exact(&mut [0]).expect("the answer begins");
    signal(engine, Signal::STOP);
    let id = job_in_state(&home, "running");
    let shown = home.well(&["jobs", "show", &id]);
    assert!(shown.contains("running since") && shown.contains("attempt 1"), "{shown}");
    let cancelled = home.well(&["jobs", "cancel", &id]);
    assert!(cancelled.contains("cancelled after") && cancelled.contains("cancelled_by_operator"), "{cancelled}");
    let said = failure(asking);
    assert!(said.contains("an operator of the network cancelled this request"), "{said}");
    signal(engine, Signal::CONT);
    assert_eq!(home.run(&["jobs", "cancel", &id]).status.code(), Some(1), "it no longer runs");
    let explained = home.json(&["explain", &id, "--json"]);
    assert_eq!(explained["job"]["errorCode"], "cancelled_by_operator");
    let question = ["run", "tether-tiny", "What is the capital of Japan?", "--temperature", "0"];
    assert!(home.well(&question).contains("Tokyo"), "the engine is free for others");
    // A tenant's key sees nothing of this.
    let key = home.well(&["token", "create", "--tenant", "acme"]).trim().to_owned();
    for command in [&["jobs", "list"][..], &["jobs", "cancel", &id], &["explain", &id], &["dlq", "list"]] {
        let refused = home.command(command).env("TETHER_API_KEY", &key).output().expect("the program runs");
        let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && errors.contains("may not operate the network"), "{errors}");
    }
    assert_eq!(up.end(), Some(0));
}

#[test]
fn ids_that_are_none_are_refused_before_anybody_is_asked() {
    let home = Home::apart();
    for command in [&["explain", "7"][..], &["jobs", "show", "x"], &["jobs", "cancel", "x"], &["dlq", "show", "x"]] {
        let refused = home.run(command);
        let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(2) && errors.contains("x-request-id"), "{errors}");
    }
    let nothing = home.run(&["dlq", "purge"]);
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("--all"));
    let unasked = home.run(&["dlq", "purge", "--all"]);
    assert!(String::from_utf8_lossy(&unasked.stderr).contains("--yes"));
}
