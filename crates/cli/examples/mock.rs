//! The program with a mock in place of each engine: a network that answers without a model, for clients that are to be
//! tried against all that an answer may hold. `TETHER_BIN=target/debug/examples/mock interop/run python`

use std::process::ExitCode;

use engine::process::serve_child;
use engine::{MockOptions, MockRuntime};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("engine-host") {
        return tether_cli::commands::main();
    }
    let served = serve_child(MockRuntime::new(MockOptions::default()));
    if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
