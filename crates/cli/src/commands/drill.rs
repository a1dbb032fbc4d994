//! `tether drill`: injures private networks of real processes while clients ask them, and counts what went wrong.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures_util::future::join_all;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

use self::cell::{Cell, Victim};
use self::network::{Model, Network, Setting};
use self::report::{CellReport, Report, Skipped};
use self::requests::RightAnswers;
use self::runner::Run;
use super::serve::end_with_parent;
use super::{Context, Outcome};
use crate::args::DrillArgs;
use crate::output;

mod cell;
mod client;
mod model;
mod namespaces;
mod network;
mod points;
mod process;
mod report;
mod requests;
mod runner;
mod verdict;

/// The most networks that run at the same time by default.
const NETWORKS_MAX: usize = 4;
/// How long a drill that is told to stop may take to clean up.
const CLEAN_UP: Duration = Duration::from_mins(1);
/// What a drill says that was told to stop.
const STOPPED: &str = "stopped before its end";

pub(super) async fn run(context: Context, args: DrillArgs) -> anyhow::Result<Outcome> {
    end_with_parent(args.with_parent)?;
    let cells = cell::chosen(&args.campaigns);
    if cells.is_empty() {
        bail!("no cell begins with {}; `tether drill --list` lists them", args.campaigns.join(" or "));
    }
    if args.list {
        let rows: Vec<Vec<String>> = cells.iter().map(|cell| vec![cell.to_string(), cell.described()]).collect();
        output::table(&["CELL", "WHAT HAPPENS"], &rows);
        return Ok(Outcome::Well);
    }
    let needs_namespaces = cells.iter().any(|cell| matches!(cell.setting(), Setting::Cables | Setting::SmallDisks));
    if !args.inside && needs_namespaces {
        return match namespaces::refusal() {
            None => run_inside(&context).await,
            Some(reason) => drill(&context, &args, cells, Some(reason)).await,
        };
    }
    drill(&context, &args, cells, None).await
}

/// Runs this command again in namespaces of its own.
async fn run_inside(context: &Context) -> anyhow::Result<Outcome> {
    let program = std::env::current_exe().context("could not find the path of this program")?;
    let entry = namespaces::enter();
    let mut command = Command::new(entry[0]);
    command.args(&entry[1..]).arg(program).args(std::env::args_os().skip(1)).args(["--inside", "--with-parent"]);
    let mut child = command.stdin(Stdio::null()).spawn().context("could not run unshare")?;
    let status = tokio::select! {
        status = child.wait() => status,
        () = context.stop.cancelled() => {
            if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
            tokio::time::timeout(CLEAN_UP, child.wait()).await.context("the drill does not end")?
        }
    };
    match status.context("could not learn how the drill ended")?.code() {
        Some(0) => Ok(Outcome::Well),
        Some(1) => Ok(Outcome::Finding),
        // It has said why.
        Some(2) => Ok(Outcome::Failure),
        _ => bail!("the drill could not be run"),
    }
}

/// What the runners of a drill share.
struct Drill<'a> {
    context: &'a Context,
    folder: PathBuf,
    model: Model,
    /// The runs that are left, for each setting of a network.
    runs: BTreeMap<Setting, Mutex<VecDeque<Run>>>,
    right: tokio::sync::OnceCell<Arc<RightAnswers>>,
    results: Mutex<Results>,
    progress: Progress,
}

#[derive(Default)]
struct Results {
    cells: BTreeMap<usize, CellReport>,
    troubles: Vec<String>,
    skipped: BTreeMap<String, &'static str>,
    networks: usize,
}

async fn drill(
    context: &Context,
    args: &DrillArgs,
    cells: Vec<Cell>,
    refusal: Option<String>,
) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let mut skipped = vec![];
    let is_possible = |cell: &Cell| {
        let reason = why_not(*cell, refusal.as_deref(), args.model.is_some());
        let is_possible = reason.is_none();
        skipped.extend(reason.map(|reason| Skipped { cell: cell.to_string(), reason }));
        is_possible
    };
    let cells: Vec<Cell> = cells.into_iter().filter(is_possible).collect();
    let mut folder = tempfile::tempdir().context("no temporary folder")?;
    folder.disable_cleanup(args.keep);
    let model = match &args.model {
        Some(file) => Model { file: std::path::absolute(file)?, is_tiny: false },
        None => Model { file: folder.path().join("tiny.gguf"), is_tiny: true },
    };
    if model.is_tiny {
        model::write(&model.file)?;
    }
    let runs = runs(&cells, args.kills, seed);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let runners = args.networks.map_or(cores.min(NETWORKS_MAX), |networks| networks as usize);
    let drill = Drill {
        context,
        folder: folder.path().to_owned(),
        model,
        progress: Progress::new(runs.values().map(VecDeque::len).sum()),
        runs: runs.into_iter().map(|(setting, runs)| (setting, Mutex::new(runs))).collect(),
        right: tokio::sync::OnceCell::new(),
        results: Mutex::default(),
    };
    join_all((0..runners).map(|number| Box::pin(drill.runner(number, &cells)))).await;
    drill.progress.bar.finish_and_clear();
    if args.keep {
        output::note(format!("the data and logs of the networks are in {}", drill.folder.display()));
        if drill.runs.contains_key(&Setting::SmallDisks) {
            output::note("of networks with small disks only the logs are kept: each disk ends with its network");
        }
    }
    let Results { cells, troubles, skipped: unsupported, .. } =
        drill.results.into_inner().unwrap_or_else(PoisonError::into_inner);
    skipped.extend(unsupported.into_iter().map(|(cell, reason)| Skipped { cell, reason: reason.to_owned() }));
    let (cells, seconds) = (cells.into_values().collect(), began.elapsed().as_secs_f64());
    let report = Report { seed, kills: args.kills, seconds, cells, skipped, troubles };
    if context.json {
        output::json(&report)?;
    } else {
        report.print();
    }
    if context.stop.is_cancelled() {
        bail!(STOPPED);
    }
    if report.ran_nothing() {
        bail!("no cell was run: each one that was chosen was skipped");
    }
    Ok(if report.is_well() { Outcome::Well } else { Outcome::Finding })
}

/// Returns why a cell cannot be run here, if it cannot.
fn why_not(cell: Cell, refusal: Option<&str>, has_model: bool) -> Option<String> {
    if cell.victim == Victim::Engine && !cfg!(target_os = "linux") {
        return Some("engines are found by /proc of Linux".to_owned());
    }
    match (cell.setting(), refusal) {
        (Setting::Cables | Setting::SmallDisks, Some(reason)) => {
            Some(format!("this machine does not allow unprivileged namespaces: {reason}"))
        }
        (Setting::SmallDisks, None) if has_model => {
            Some("the small disks of this cell hold tether-tiny alone".to_owned())
        }
        _ => None,
    }
}

/// Returns all runs, for each setting of a network, so that a drill that is stopped has seen every cell as often.
fn runs(cells: &[Cell], kills: u32, seed: u64) -> BTreeMap<Setting, VecDeque<Run>> {
    let mut runs: BTreeMap<Setting, VecDeque<Run>> = BTreeMap::new();
    for number in 1..=kills {
        for cell in cells.iter().filter(|cell| number <= cell.runs(kills)) {
            runs.entry(cell.setting()).or_default().push_back(Run { cell: *cell, number, seed });
        }
    }
    runs
}

impl Drill<'_> {
    /// Works off what is left, network after network.
    async fn runner(&self, number: usize, cells: &[Cell]) {
        let is_stopped = || self.context.stop.is_cancelled();
        for (setting, runs) in &self.runs {
            // One network alone has the names of its cables.
            if *setting == Setting::Cables && number > 0 {
                continue;
            }
            while !is_stopped() && !lock(runs).is_empty() {
                let folder = self.next_folder();
                let starting = Network::start(folder, *setting, &self.model);
                let Some(network) = self.context.stop.run_until_cancelled(starting).await else { return };
                let worked = match network {
                    Ok(network) => self.work(network, runs, cells).await,
                    Err(error) => Err(error.context(format!("could not start a network ({setting:?})"))),
                };
                if let Err(error) = worked {
                    lock(&self.results).troubles.push(format!("{error:#}"));
                    break;
                }
            }
        }
    }

    fn next_folder(&self) -> PathBuf {
        let mut results = lock(&self.results);
        results.networks += 1;
        self.folder.join(format!("network-{}", results.networks))
    }

    /// Runs cells on one network until none is left or the network is not ready any more.
    async fn work(&self, mut network: Network, runs: &Mutex<VecDeque<Run>>, cells: &[Cell]) -> anyhow::Result<()> {
        let ask = async || runner::right_answers(&network).await.map(Arc::new);
        let right = self.right.get_or_try_init(ask).await?.clone();
        let mut is_cut_short = false;
        loop {
            let Some(run) = lock(runs).pop_front() else { break };
            let Some(sample) = self.context.stop.run_until_cancelled(runner::run(&mut network, run, &right)).await
            else {
                is_cut_short = true;
                break;
            };
            let at = cells.iter().position(|cell| *cell == run.cell).unwrap_or_default();
            match sample {
                Ok(None) => {
                    let reason = "the model does not support what these cells ask for";
                    lock(&self.results).skipped.insert(run.cell.to_string(), reason);
                }
                Ok(Some(sample)) => {
                    let mut results = lock(&self.results);
                    let report = results.cells.entry(at).or_default();
                    report.cell = run.cell.to_string();
                    report.add(sample);
                    self.progress.passed(run, &report.findings);
                }
                Err(error) => {
                    let trouble = format!("{} (seed {}, run {}): {error:#}", run.cell, run.seed, run.number);
                    output::note(&trouble);
                    lock(&self.results).troubles.push(trouble);
                    drop(network);
                    return Ok(());
                }
            }
        }
        let left = network.stop().await?;
        // A node that was killed just now and not started again leaves its reservations until their leases expire.
        if left.reservations > 0 && !is_cut_short || left.second_bills > 0 {
            lock(&self.results).troubles.push(format!("in the store of a network that has ended: {left:?}"));
        }
        Ok(())
    }
}

/// Shows how far the drill is: a bar on a terminal, or else a line from time to time.
struct Progress {
    bar: indicatif::ProgressBar,
    last: Mutex<Instant>,
}

impl Progress {
    const EVERY: Duration = Duration::from_secs(30);

    fn new(runs: usize) -> Self {
        let bar = indicatif::ProgressBar::new(runs as u64);
        bar.set_style(
            indicatif::ProgressStyle::with_template("{pos}/{len} {wide_bar} {eta} {msg}")
                .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()),
        );
        Self { bar, last: Mutex::new(Instant::now()) }
    }

    fn passed(&self, run: Run, findings: &[runner::Finding]) {
        self.bar.inc(1);
        self.bar.set_message(run.cell.to_string());
        for finding in findings.iter().filter(|finding| finding.run == run.number) {
            let text = output::one_line(&finding.text);
            self.bar.suspend(|| output::note(format!("{:?} in {}: {text}", finding.fault, run.cell)));
        }
        let mut last = lock(&self.last);
        if self.bar.is_hidden() && last.elapsed() >= Self::EVERY {
            *last = Instant::now();
            output::note(format!(
                "{} of {} runs, last {}",
                self.bar.position(),
                self.bar.length().unwrap_or(0),
                run.cell
            ));
        }
    }
}

/// Locks what only this process's own tasks hold, for a moment.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
