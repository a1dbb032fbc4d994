//! Our engine beside upstream's `llama-server` and `llama-bench`: `make bench-engine`, which makes the models and
//! builds the programs. `BENCH_MODELS`, `BENCH_MEASURES` (parts of their names) and `BENCH_ROUNDS` choose less.
//!
//! Both sides are asked by the same client, with the same tokens, in turn; every figure is taken where the answer is
//! read. Ours runs in a process of its own, as it ships.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

mod comparison;
mod continuation;
mod measure;
mod ours;
mod report;
mod roofline;
mod side;
mod upstream;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tether_engine::gguf::Header;

use comparison::{COMPARISONS, Rounds};
use report::Report;
use roofline::Roofline;
use upstream::Programs;

const ROUNDS: usize = 7;
/// Both sides decode on so many threads.
const THREADS: u32 = 2;
/// Sequences side by side.
const SLOTS: u32 = 8;
/// Tokens of context per sequence, where the model has so many.
const CONTEXT_MAX: u32 = 4096;

fn main() -> ExitCode {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(models), Some(upstream)) = (folder("BENCH_FOLDER"), folder("BENCH_UPSTREAM")) else {
        println!("BENCH_FOLDER and BENCH_UPSTREAM name no folders: nothing is measured; run make bench-engine");
        return ExitCode::SUCCESS;
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(compare(&models, &Programs::in_folder(&upstream)));
    ExitCode::SUCCESS
}

async fn compare(folder: &Path, programs: &Programs) {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let rounds = variable("BENCH_ROUNDS").parse().unwrap_or(ROUNDS);
    let chosen = variable("BENCH_MEASURES");
    let is_chosen = |name: &str| chosen.is_empty() || chosen.split_whitespace().any(|part| name.contains(part));
    let comparisons: Vec<_> = COMPARISONS.into_iter().filter(|it| is_chosen(it.name)).collect();
    let mut report = Report::begin(rounds, roofline::bandwidth());
    for name in variable("BENCH_MODELS").split_whitespace() {
        let model = Model::find(folder, name);
        Rounds::new(&model, programs, rounds).run(&comparisons, &mut report).await;
        if is_chosen("continuation") {
            for temperature in [0.0, 1.0] {
                report.continued(&model, temperature, continuation::measure(&model, temperature).await);
            }
        }
        report.save(&folder.join("engine.json"));
    }
}

/// A model, and what its file says of it.
struct Model {
    name: String,
    path: PathBuf,
    adapters: [PathBuf; 2],
    context: u32,
    vocabulary: u32,
    roofline: Roofline,
}

impl Model {
    fn find(folder: &Path, name: &str) -> Self {
        let path = folder.join(format!("{name}.gguf"));
        let header = Header::read(&File::open(&path).unwrap()).unwrap();
        let (shape, _) = name.rsplit_once('-').unwrap();
        Self {
            name: name.to_owned(),
            path,
            adapters: [1, 2].map(|number| folder.join(format!("{shape}-lora-{number}.gguf"))),
            context: header.context_length().unwrap().min(CONTEXT_MAX),
            vocabulary: header.vocabulary_size().unwrap() as u32,
            roofline: Roofline::of(&header),
        }
    }
}
