//! The commands, one module each, and what they share: settings, logs, the runtime, the exit code.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use engine::{ChildCommand, ModelRuntime, ProcessRuntime};
use tokio_util::sync::CancellationToken;

use crate::addresses;
use crate::args::{
    AdapterCommand, BatchCommand, Cli, Command, Common, ConfigCommand, DlqCommand, JobsCommand, ModelCommand,
    PolicyCommand, TokenCommand, UpArgs, WorkerArgs,
};
use crate::clock;
use crate::data_folder::DataFolder;
use crate::kept_flags::KeptFlags;
use crate::local_models;
use crate::network::Supplies;
use crate::output;
use crate::settings::{self, Env, Flag, Settings};
use protocol::control::NodeRole;

mod adapter;
mod batch;
mod chat;
mod demo;
mod dlq;
mod doctor;
mod drill;
mod engine_host;
mod jobs;
mod manual;
mod membership;
mod model;
mod model_add;
mod nodes;
mod policy;
mod queue;
mod quota;
mod reach;
mod run;
mod serve;
mod start;
mod token;
mod up;

/// The command succeeded and found something wrong.
const FINDING: u8 = 1;
const FAILURE: u8 = 2;

/// The outcome of a command that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Well,
    /// Something is wrong, and was reported.
    Finding,
    /// The command failed, and another process has said why.
    Failure,
}

pub struct Context {
    /// The settings in force.
    pub settings: Settings,
    /// The data folder of this machine.
    pub data: DataFolder,
    /// The flags that this command's node is started with, if it runs one.
    pub kept: Option<KeptFlags>,
    /// The environment variables that matter.
    pub env: Env,
    /// Whether to print JSON.
    pub json: bool,
    /// The clock of the node that this command runs.
    pub clock: Arc<dyn protocol::Clock>,
    /// Cancelled by Ctrl-C or SIGTERM, for commands that run until they are stopped.
    pub stop: CancellationToken,
}

impl Context {
    /// Returns the beginning of a command line about this network: the program, and the data folder if it is not the
    /// user's default one.
    pub fn program(&self) -> String {
        let path = self.data.path();
        if self.env.data_folder().as_deref() == Some(path) {
            return "tether".to_owned();
        }
        let shown = path.display().to_string();
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-+,:@".contains(letter);
        if shown.chars().all(plain) {
            format!("tether --data-dir {shown}")
        } else {
            format!("tether --data-dir '{}'", shown.replace('\'', "'\\''"))
        }
    }

    /// Keeps the flags for the node's next start. Called once it has started.
    fn keep_flags(&self) -> anyhow::Result<()> {
        self.kept.as_ref().map_or(Ok(()), KeptFlags::write)
    }
}

/// Runs the program and returns its exit code: 0 for success, 1 if something is wrong, 2 for a failure.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are not errors.
            let code = if error.use_stderr() { FAILURE } else { 0 };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match run(cli) {
        Ok(Outcome::Well) => ExitCode::SUCCESS,
        Ok(Outcome::Finding) => ExitCode::from(FINDING),
        Ok(Outcome::Failure) => ExitCode::from(FAILURE),
        Err(error) => {
            output::note(format!("{error:#}"));
            ExitCode::from(FAILURE)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Outcome> {
    if let Command::EngineHost = cli.command {
        return engine_host::run();
    }
    if let Command::Config(ConfigCommand::Example) = cli.command {
        output::piece(&settings::example()?);
        return Ok(Outcome::Well);
    }
    match &cli.command {
        Command::Completions { shell } => return manual::completions(*shell),
        Command::Man { folder } => return manual::pages(folder),
        _ => {}
    }
    let env = Env::of_process();
    let flags = flags(&cli.command);
    let mut settings = settings::load(&cli.common, &env, &flags)?;
    let data = DataFolder::of(&settings, &env)?;
    let mut kept = role(&cli.command).map(|role| KeptFlags::read(&data, role)).transpose()?;
    if let Some(kept) = &mut kept {
        kept.replace(&flags)?;
        settings = settings::load_with(&cli.common, &env, Some(kept), &flags)?;
    }
    let quiet = !runs_a_service(&cli.command);
    start_logs(&settings, quiet && !env_sets_filter(&env))?;
    let (json, clock) = (cli.common.json, clock::of(clock_file(&cli.command)));
    let context = Context { data, settings, kept, env, json, clock, stop: CancellationToken::new() };
    let runtime = async_runtime(context.settings.threads).context("no async runtime")?;
    runtime.block_on(command(cli.command, &cli.common, context))
}

async fn command(command: Command, common: &Common, context: Context) -> anyhow::Result<Outcome> {
    // Ctrl-C ends all other commands at once.
    let cleans_up = matches!(command, Command::Nodes(_) | Command::Model(ModelCommand::Add(_)) | Command::Drill(_));
    if !runs_a_service(&command) && !cleans_up {
        return Box::pin(carry_out(command, common, context)).await;
    }
    let listening = up::listen_for_stop(context.stop.clone())?;
    tokio::select! {
        outcome = Box::pin(carry_out(command, common, context)) => outcome,
        never = listening => match never {},
    }
}

async fn carry_out(command: Command, common: &Common, context: Context) -> anyhow::Result<Outcome> {
    if runs_a_service(&command) {
        up::outlive_terminal()?;
    }
    match command {
        Command::Up(args) => {
            serve::end_with_parent(args.with_parent)?;
            up::run(context).await
        }
        Command::Bootstrap(args) => serve::bootstrap(context, &args).await,
        Command::Registry(args) => Box::pin(serve::registry(context, &args)).await,
        Command::Orchestrator(args) => serve::enrolled(context, NodeRole::Orchestrator, &args.node).await,
        Command::Gateway(args) => serve::enrolled(context, NodeRole::Gateway, &args.node).await,
        Command::Worker(args) => serve::enrolled(context, NodeRole::Worker, &args.node).await,
        Command::Start(args) => start::run(&context, common, &args).await,
        Command::Invite(args) => membership::invite(context, args).await,
        Command::Join(args) => membership::join(context, args).await,
        Command::Revoke(args) => membership::revoke(context, args).await,
        Command::Rename(args) => membership::rename(context, args).await,
        Command::Demo => demo::run(context, common).await,
        Command::Drill(args) => Box::pin(drill::run(context, args)).await,
        Command::Run(args) => run::run(context, args).await,
        Command::Chat(args) => chat::run(context, args).await,
        Command::Model(ModelCommand::List(server)) | Command::List(server) => model::list(context, &server).await,
        Command::Model(ModelCommand::Add(args)) => Box::pin(model_add::run(context, args)).await,
        Command::Model(ModelCommand::Show { model, server }) => model::show(context, &model, &server).await,
        Command::Model(ModelCommand::Rm { model, force, server }) => {
            model::remove(context, &model, force, &server).await
        }
        Command::Model(ModelCommand::Load { model, keep_alive, server }) => {
            model::load(context, &model, keep_alive, &server).await
        }
        Command::Model(ModelCommand::Pin { model, server }) => model::pin(context, &model, true, &server).await,
        Command::Model(ModelCommand::Unpin { model, server }) => model::pin(context, &model, false, &server).await,
        Command::Model(ModelCommand::Unload { model, server }) => model::unload(context, &model, &server).await,
        Command::Model(ModelCommand::Alias(args)) => model::alias(context, args).await,
        Command::Model(ModelCommand::Adapter(AdapterCommand::Add(args))) => adapter::add(context, args).await,
        Command::Model(ModelCommand::Adapter(AdapterCommand::List(server))) => adapter::list(context, &server).await,
        Command::Model(ModelCommand::Adapter(AdapterCommand::Rm { model, name, server })) => {
            adapter::remove(context, &model, &name, &server).await
        }
        Command::Token(TokenCommand::Create(args)) => token::create(context, args).await,
        Command::Token(TokenCommand::List(server)) => token::list(context, &server).await,
        Command::Token(TokenCommand::Revoke(args)) => token::revoke(context, &args).await,
        Command::Nodes(server) => nodes::run(context, &server).await,
        Command::Jobs(JobsCommand::List(args)) => jobs::list(context, &args).await,
        Command::Jobs(JobsCommand::Show(args)) => jobs::show(context, &args).await,
        Command::Jobs(JobsCommand::Cancel(args)) => jobs::cancel(context, &args).await,
        Command::Queue(args) => queue::list(context, &args).await,
        Command::Explain(args) => jobs::explain(context, &args).await,
        Command::Dlq(DlqCommand::List(args)) => dlq::list(context, &args).await,
        Command::Dlq(DlqCommand::Show(args)) => dlq::show(context, &args).await,
        Command::Dlq(DlqCommand::Replay(args)) => dlq::replay(context, &args).await,
        Command::Dlq(DlqCommand::Purge(args)) => dlq::purge(context, &args).await,
        Command::Batch(BatchCommand::List(args)) => batch::list(context, &args).await,
        Command::Batch(BatchCommand::Show(args)) => batch::show(context, &args).await,
        Command::Batch(BatchCommand::Cancel(args)) => batch::cancel(context, &args).await,
        Command::Policy(PolicyCommand::List(server)) => policy::list(context, &server).await,
        Command::Policy(PolicyCommand::Show(args)) => policy::show(context, &args).await,
        Command::Policy(PolicyCommand::Set(args)) => policy::set(context, *args).await,
        Command::Policy(PolicyCommand::Explain(args)) => policy::explain(context, &args).await,
        Command::Quota(args) => quota::show(context, &args).await,
        Command::Doctor(server) => doctor::run(context, &server).await,
        Command::Config(ConfigCommand::Check) => check_config(&context),
        // Handled before the settings were read.
        Command::Config(ConfigCommand::Example)
        | Command::EngineHost
        | Command::Completions { .. }
        | Command::Man { .. } => Ok(Outcome::Well),
    }
}

fn check_config(context: &Context) -> anyhow::Result<Outcome> {
    if context.json {
        output::json(&context.settings)?;
    } else {
        output::piece(&toml::to_string(&context.settings)?);
    }
    Ok(Outcome::Well)
}

fn flags(command: &Command) -> Vec<Flag> {
    let mut flags: Vec<(&'static str, Option<config::Value>)> = vec![];
    let (node, bind, near_regions) = match command {
        Command::Up(up) => {
            flags.push(("region", up.region.clone().map(Into::into)));
            flags.push(("workers", up.workers.map(Into::into)));
            flags.push(("network.up_listen", up.listen.clone().map(Into::into)));
            (None, &up.bind, &None)
        }
        Command::Bootstrap(node) | Command::Registry(node) => (Some(node), &None, &None),
        Command::Worker(args) => (Some(&args.node), &None, &None),
        Command::Orchestrator(args) => (Some(&args.node), &None, &args.near_regions),
        Command::Gateway(args) => (Some(&args.node), &args.bind, &None),
        Command::Join(args) => (Some(&args.node), &args.bind, &args.near_regions),
        _ => (None, &None, &None),
    };
    let (adopt, files) = match command {
        Command::Up(UpArgs { adopt, models, .. }) | Command::Worker(WorkerArgs { adopt, models, .. }) => {
            (&adopt.adopt, models.files.as_slice())
        }
        Command::Join(args) => (&args.adopt.adopt, args.models.files.as_slice()),
        _ => (&None, &[][..]),
    };
    let files: Vec<String> = files.iter().map(|file| local_models::absolute(file)).collect();
    flags.push(("adopt", adopt.clone().map(Into::into)));
    flags.push(("models", Some(files).filter(|files| !files.is_empty()).map(Into::into)));
    flags.push(("gateway.bind", bind.as_deref().map(|bind| addresses::to_bind(bind).into())));
    flags.push(("orchestrator.near_regions", near_regions.clone().map(Into::into)));
    if let Some(node) = node {
        flags.push(("network.bootstrap", node.bootstrap.clone().map(Into::into)));
        flags.push(("network.listen", node.listen.clone().map(Into::into)));
        flags.push(("metrics_listen", node.metrics_listen.clone().map(Into::into)));
        flags.push(("region", node.region.clone().map(Into::into)));
    }
    flags.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// Returns the file that makes the clock of a command's node wrong.
fn clock_file(command: &Command) -> Option<&Path> {
    let node = match command {
        Command::Registry(node) => node,
        Command::Orchestrator(args) => &args.node,
        Command::Gateway(args) => &args.node,
        Command::Worker(args) => &args.node,
        _ => return None,
    };
    node.clock_file.as_deref()
}

/// Returns the role of the node that a command runs.
fn role(command: &Command) -> Option<&'static str> {
    match command {
        Command::Up(_) => Some("up"),
        Command::Bootstrap(_) => Some("bootstrap"),
        Command::Registry(_) => Some("registry"),
        Command::Orchestrator(_) => Some("orchestrator"),
        Command::Gateway(_) => Some("gateway"),
        Command::Worker(_) => Some("worker"),
        // An invalid invite is reported when it is redeemed.
        Command::Join(args) => membership::role_of(&args.invite).ok().and_then(|role| serve::name(role).ok()),
        _ => None,
    }
}

/// Returns whether a command runs until it is stopped, and logs what happens.
fn runs_a_service(command: &Command) -> bool {
    matches!(
        command,
        Command::Up(_)
            | Command::Bootstrap(_)
            | Command::Registry(_)
            | Command::Orchestrator(_)
            | Command::Gateway(_)
            | Command::Worker(_)
            | Command::Join(_)
            | Command::Start(_)
    )
}

fn env_sets_filter(env: &Env) -> bool {
    env.get("TETHER_LOG__FILTER").is_some()
}

/// Sets up logging. Commands that answer a question log errors only.
fn start_logs(settings: &Settings, quiet: bool) -> anyhow::Result<()> {
    let filter = if quiet { "error" } else { &settings.log.filter };
    observability::logs::init(settings.log.format()?, filter)?;
    Ok(())
}

/// Returns the runtime and the models that ship with the program.
pub fn shipped() -> Supplies<'static> {
    Supplies { runtime: &process_runtime, models: vec![] }
}

/// Returns the runtime that workers use: each model in a child process, which runs this program.
pub fn process_runtime() -> anyhow::Result<Arc<dyn ModelRuntime>> {
    let program = std::env::current_exe().context("could not find the path of this program")?;
    let command = ChildCommand { program, args: vec!["engine-host".into()], envs: vec![] };
    Ok(Arc::new(ProcessRuntime::new(command)))
}

/// Creates the async runtime that serves the network. 0 threads means half of the cores: a thread that wakes on an
/// engine's core delays every thread of the engine, and passing chunks on takes little CPU time.
pub fn async_runtime(threads: u32) -> std::io::Result<tokio::runtime::Runtime> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if threads == 0 { cores.div_ceil(2) } else { threads as usize };
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

/// Shows a spinner, on a terminal only.
pub fn spinner(message: &str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new_spinner().with_message(message.to_owned());
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    bar
}
