//! `tether start`: runs every service that was started or joined in a data folder, each in a process of its own, and
//! restarts those that end by themselves.

use std::ffi::OsString;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::signal::unix;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::serve::end_with_parent;
use super::{Context, Outcome};
use crate::args::{Common, StartArgs};
use crate::output;

/// How long a service may take to end: longer than any of them drains its jobs.
const END_TIMEOUT: Duration = Duration::from_mins(1);
/// The first and the longest wait before a service that ended by itself is restarted.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(30);
/// A service that ran this long resets the wait.
const WELL_AFTER: Duration = Duration::from_mins(1);

pub(super) async fn run(context: &Context, common: &Common, args: &StartArgs) -> anyhow::Result<Outcome> {
    end_with_parent(args.with_parent)?;
    let roles = context.data.roles();
    if roles.is_empty() {
        bail!(
            "{} has no service to start: `tether up` runs a whole network, `tether registry` founds one of several \
             machines, and `tether join` joins one",
            context.data.path().display()
        );
    }
    let program = std::env::current_exe().context("could not find the path of this program")?;
    let mut services = vec![];
    let hung_up = watch::Sender::new(());
    for role in roles {
        let service = Service { role, program: program.clone(), arguments: arguments(context, common, role) };
        let stop = CancellationToken::new();
        let hangups = hung_up.subscribe();
        let mut task = JoinSet::new();
        let first = service.spawn()?;
        task.spawn(service.supervise(first, hangups, stop.clone()));
        services.push((role, stop, task));
    }
    output::line(format!("started {}", services.iter().map(|(role, ..)| *role).collect::<Vec<_>>().join(", ")));
    tokio::select! {
        () = context.stop.cancelled() => {}
        hung = pass_on_hangups(&hung_up) => hung?,
    }
    output::line("stopping");
    // Services that dispatch work stop before those that run it.
    let mut outcome = Ok(Outcome::Well);
    for (role, stop, mut task) in services.into_iter().rev() {
        stop.cancel();
        if let Some(ended) = task.join_next().await
            && let Err(error) = ended.context("a task broke down").flatten()
        {
            outcome = Err(error.context(format!("the {role} did not end well")));
        }
    }
    outcome
}

/// Passes each SIGHUP on to the services. Never returns on success.
async fn pass_on_hangups(hung_up: &watch::Sender<()>) -> anyhow::Result<()> {
    let mut hangups = unix::signal(unix::SignalKind::hangup()).context("no signals")?;
    while hangups.recv().await.is_some() {
        hung_up.send_replace(());
    }
    std::future::pending().await
}

fn arguments(context: &Context, common: &Common, role: &str) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![role.into(), "--with-parent".into()];
    arguments.extend(["--data-dir".into(), context.data.path().into()]);
    if let Some(config) = &common.config {
        arguments.extend(["--config".into(), config.into()]);
    }
    if let Some(format) = common.log_format {
        arguments.extend(["--log-format".into(), format.as_str().into()]);
    }
    arguments
}

/// A service that runs as a child process.
struct Service {
    role: &'static str,
    program: std::path::PathBuf,
    arguments: Vec<OsString>,
}

impl Service {
    fn spawn(&self) -> anyhow::Result<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).kill_on_drop(true);
        command.spawn().with_context(|| format!("could not start {}", self.program.display()))
    }

    /// Keeps the service running until `stop`, then ends it.
    async fn supervise(
        self,
        mut child: Child,
        mut hangups: watch::Receiver<()>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut wait = WAIT_FIRST;
        loop {
            let started = Instant::now();
            let ended = loop {
                tokio::select! {
                    () = stop.cancelled() => return end(&mut child).await,
                    ended = child.wait() => break ended.context("no word of a child")?,
                    // The sender outlives this task.
                    Ok(()) = hangups.changed() => send(&child, Signal::HUP),
                }
            };
            if started.elapsed() >= WELL_AFTER {
                wait = WAIT_FIRST;
            }
            warn!(role = self.role, status = %ended, "the service ended by itself; starting it again in {} s", wait.as_secs());
            if stop.run_until_cancelled(time::sleep(wait)).await.is_none() {
                return Ok(());
            }
            wait = (2 * wait).min(WAIT_MAX);
            child = self.spawn()?;
        }
    }
}

/// Sends a signal to a service. If it has ended meanwhile, the task that waits for it notices.
fn send(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Asks a service to end, and kills it if it does not.
async fn end(child: &mut Child) -> anyhow::Result<()> {
    send(child, Signal::TERM);
    match time::timeout(END_TIMEOUT, child.wait()).await {
        Ok(status) => well(status.context("no word of a child")?),
        Err(_) => {
            child.kill().await.context("could not kill a child")?;
            bail!("it did not end within {} s and was killed", END_TIMEOUT.as_secs())
        }
    }
}

fn well(status: ExitStatus) -> anyhow::Result<()> {
    if status.success() { Ok(()) } else { bail!("it ended with {status}") }
}
