//! Runs simulations, each from its seed and in a process of its own.
#![allow(clippy::print_stdout, reason = "it reports to whoever runs it")]

use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use tether_simulation::simulation::{Report, simulate};
use tracing::Level;

const USAGE: &str = "simulate SEEDS [FIRST]   runs so many seeds
simulate --seed N        runs one seed and shows what happened in it";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|argument| argument.parse::<u64>().ok());
    match (arguments.first().map(String::as_str), number(0), number(1)) {
        (Some("--seed"), _, Some(seed)) => one(seed, true),
        (Some("--only"), _, Some(seed)) => one(seed, false),
        (_, Some(seeds), first) => many(first.unwrap_or(0), seeds),
        _ => {
            println!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn one(seed: u64, shows_events: bool) -> ExitCode {
    if shows_events {
        tracing_subscriber::fmt().with_max_level(Level::WARN).without_time().with_writer(std::io::stderr).init();
    }
    let Report { findings, events, digest, requests, finished, faults, .. } = simulate(seed);
    if shows_events || !findings.is_empty() {
        for event in &events {
            println!("{event}");
        }
    }
    for finding in &findings {
        println!("WRONG {finding}");
    }
    println!("seed {seed}: {requests} requests, {finished} finished, {faults} faults, {digest}");
    ExitCode::from(u8::from(!findings.is_empty()))
}

/// Runs each seed in a process of its own, because random numbers belong to a process.
fn many(first: u64, seeds: u64) -> ExitCode {
    let (next, failed) = (AtomicU64::new(first), AtomicU64::new(0));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                return;
            }
            let program = std::env::current_exe().expect("this program has a path");
            let output = Command::new(program).args(["--only", &seed.to_string()]).output().expect("it runs again");
            let said = String::from_utf8_lossy(&output.stdout);
            if output.status.success() {
                println!("{}", said.trim_end());
                continue;
            }
            failed.fetch_add(1, Ordering::Relaxed);
            let complaint = String::from_utf8_lossy(&output.stderr);
            println!("{said}{complaint}seed {seed} fails: `make simulate SEED={seed}` repeats it");
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner();
    println!("{seeds} seeds, {failed} fail");
    ExitCode::from(u8::from(failed > 0))
}
