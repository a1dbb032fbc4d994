//! An engine process for tests: `engine-host llama`, or `engine-host mock [name=number]…`.
//!
//! The shipped program offers the same through a hidden subcommand.

use std::process::ExitCode;
use std::time::Duration;

use tether_engine::process::serve_child;
use tether_engine::{MockOptions, MockRuntime};

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let Ok(runtime) = runtime else { return ExitCode::FAILURE };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let kind = arguments.first().map(String::as_str);
    let served = match kind {
        #[cfg(feature = "llama")]
        Some("llama") => runtime.block_on(serve_child(tether_engine::LlamaRuntime::new())),
        Some("mock") => runtime.block_on(serve_child(MockRuntime::new(mock_options(&arguments[1..])))),
        _ => return ExitCode::from(2),
    };
    if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
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
