//! The program with a mock in place of each engine: a network that answers without a model, for clients that are to be
//! tried against all that an answer may hold. `TETHER_BIN=target/debug/examples/mock interop/run python`
//!
//! `GGML_MOCK_FIRST_MS` and `GGML_MOCK_EACH_MS` set the time to the first token and between two tokens, and
//! `GGML_MOCK_WORDS` the length of an answer. Of the worker's variables, a process of an engine gets only those that
//! drivers and libraries read, hence ggml's prefix.

use std::process::ExitCode;
use std::time::Duration;

use engine::process::serve_child;
use engine::{MockOptions, MockRuntime};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("engine-host") {
        return tether_cli::commands::main();
    }
    let served = serve_child(MockRuntime::new(options()));
    if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn options() -> MockOptions {
    let default = MockOptions::default();
    let millis = |name| number(name).map_or(Duration::ZERO, |millis| Duration::from_millis(millis.into()));
    MockOptions {
        first_token: millis("GGML_MOCK_FIRST_MS"),
        per_token: millis("GGML_MOCK_EACH_MS"),
        tokens: number("GGML_MOCK_WORDS").unwrap_or(default.tokens),
        // The prompts of coding agents have tens of thousands of tokens.
        context_length: 200_000,
        ..default
    }
}

#[expect(clippy::disallowed_methods, reason = "this process has no other settings")]
fn number(variable: &str) -> Option<u32> {
    std::env::var(variable).ok()?.parse().ok()
}
