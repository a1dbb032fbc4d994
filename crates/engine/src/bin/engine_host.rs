//! An engine process for tests: `engine-host llama`, `engine-host mock [name=number]…`, or `engine-host captured
//! llama`, which attempts to get out of its sandbox. `engine-host attempt NAME ARGUMENT` is a server that attempts it.
//!
//! The shipped program offers the first through a hidden subcommand.

use std::process::ExitCode;
use std::time::Duration;

#[cfg(target_os = "linux")]
use tether_engine::process::ServeError;
use tether_engine::process::serve_child;
use tether_engine::{MockOptions, MockRuntime};

#[cfg(target_os = "linux")]
#[path = "engine_host/captured.rs"]
mod captured;

#[cfg(target_os = "linux")]
use captured::Captured;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let kind = arguments.first().map(String::as_str);
    let served = match kind {
        #[cfg(target_os = "linux")]
        Some("attempt") => return captured::attempted(&arguments[1..]),
        #[cfg(target_os = "linux")]
        Some("captured") => captured(arguments.get(1).map(String::as_str)),
        #[cfg(feature = "llama")]
        Some("llama") => serve_child(tether_engine::LlamaRuntime::new()),
        Some("mock") => serve_child(MockRuntime::new(mock_options(&arguments[1..]))),
        _ => return ExitCode::from(2),
    };
    if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Serves a runtime that a malicious model has taken over.
#[cfg(target_os = "linux")]
fn captured(kind: Option<&str>) -> Result<(), ServeError> {
    let (has_gpu, panics_when_it_loads) = (kind == Some("gpu"), kind == Some("panicking"));
    match kind {
        #[cfg(feature = "llama")]
        Some("llama") => {
            serve_child(Captured { runtime: tether_engine::LlamaRuntime::new(), has_gpu, panics_when_it_loads })
        }
        _ => {
            let runtime = MockRuntime::new(MockOptions::default());
            serve_child(Captured { runtime, has_gpu, panics_when_it_loads })
        }
    }
}

fn mock_options(arguments: &[String]) -> MockOptions {
    let mut options = MockOptions::default();
    for (name, number) in arguments.iter().filter_map(|argument| argument.split_once('=')) {
        let Ok(number) = number.parse::<u32>() else { continue };
        match name {
            "first_token_ms" => options.first_token = Duration::from_millis(number.into()),
            "per_token_ms" => options.per_token = Duration::from_millis(number.into()),
            "load_ms" => options.load = Duration::from_millis(number.into()),
            "tokens" => options.tokens = number,
            "context_length" => options.context_length = number,
            "fail_first" => options.fail_first = number,
            "die_first" => options.die_first = number,
            "die_after" => options.die_after = number,
            "hang_first" => options.hang_first = number,
            _ => {}
        }
    }
    options
}
