//! The private network that is injured: each node a process of this program on a free port of this machine.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use metadata_store::{JobStore as _, SqliteStore, Store as _, StoreOptions};
use protocol::TraceId;
use protocol::control::Fleet;
use protocol::health::{HealthReport, ModelState};
use protocol::jobs::{JobInfo, JobList, JobStatus};
use serde_json::Value;

use super::namespaces::{self, Namespace};
use super::points;
use super::process::{Frozen, Handle};
use crate::client::GatewayClient;
use crate::data_folder::DataFolder;
use crate::processes::Processes;

pub(super) const WORKERS: [&str; 2] = ["worker-1", "worker-2"];
const NODES: [&str; 5] = ["registry", "orchestrator", "gateway", "worker-1", "worker-2"];
/// How long the network may take to be ready, also after an injury. Longer counts as stuck.
pub(super) const READY: Duration = Duration::from_mins(1);
/// How soon a supervisor starts a process again: as soon as `tether start` does.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// Leases of jobs whose orchestrator is gone expire within this time, so that it is seen in a short drill.
pub(super) const LEASE_SECS: u64 = 6;
/// How long a stopping node lets its answers go on, so that longer ones are seen in a short drill.
pub(super) const DRAIN_SECS: u64 = 2;
/// Size of the disk of each node whose disk is to be full, in MiB. A worker leaves 32 free when it takes a model in.
const DISK_MIB: u32 = 48;
/// The names of the demonstration model and of one that the user named.
pub(super) const TINY: &str = "drill-tiny";
const OTHER: &str = "drill";

/// The model that all workers serve.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) file: PathBuf,
    /// It is the demonstration model.
    pub(super) is_tiny: bool,
}

impl Model {
    fn name(&self) -> &'static str {
        if self.is_tiny { TINY } else { OTHER }
    }
}

/// What a network is prepared for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Setting {
    Plain,
    /// Each node has a small disk of its own.
    SmallDisks,
    /// The gateway and the workers are on machines of their own, with cables that can be cut.
    Cables,
    /// Each node has a clock that can be set.
    Clocks,
    /// Each node kills itself at a point of its program, when told to.
    Points,
}

pub(super) struct Network {
    processes: Processes,
    folder: PathBuf,
    setting: Setting,
    pub(super) address: SocketAddr,
    pub(super) key: String,
    pub(super) model: &'static str,
    admin: GatewayClient,
    machines: Vec<Namespace>,
}

impl Network {
    /// Starts a network and waits until it is ready.
    pub(super) async fn start(folder: PathBuf, setting: Setting, model: &Model) -> anyhow::Result<Self> {
        fs::create_dir_all(&folder).with_context(|| format!("could not make {}", folder.display()))?;
        let settings = folder.join("settings.toml");
        let text = format!(
            "version = 1\n[gateway.rate_limit]\nrequests_per_minute = 0\n[gateway]\ndrain_secs = {DRAIN_SECS}\n\
             [orchestrator]\nlease_secs = {LEASE_SECS}\ndrain_secs = {DRAIN_SECS}\n[worker]\ndrain_secs = {DRAIN_SECS}\n"
        );
        fs::write(&settings, text).context("could not write the settings")?;
        let program = std::env::current_exe().context("could not find the path of this program")?;
        let mut network = Self {
            processes: Processes::of(program, &folder).with_settings(&settings),
            folder,
            setting,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            key: String::new(),
            model: model.name(),
            admin: GatewayClient::new("http://127.0.0.1:9", None)?,
            machines: vec![],
        };
        match network.begin(model).await {
            Ok(()) => Ok(network),
            Err(error) => {
                let _ = network.processes.stop().await;
                network.release();
                Err(error)
            }
        }
    }

    async fn begin(&mut self, model: &Model) -> anyhow::Result<()> {
        if self.setting == Setting::Cables {
            self.machines = namespaces::lay_cables()?;
            for machine in &self.machines {
                self.processes.wrap(machine.node, machine.entry());
            }
        }
        if self.setting == Setting::Points {
            let command = points::wrapper(&self.point_file().display().to_string());
            for node in NODES {
                self.processes.wrap(node, command.clone().context("this program has no failpoints")?);
            }
        }
        if self.setting == Setting::SmallDisks {
            for node in NODES {
                namespaces::mount_disk(&self.folder.join(node), DISK_MIB)?;
            }
        }
        self.start_node("registry", &["registry", "--listen", &self.listen("registry")])?;
        self.processes.wait_for("registry", READY, |data| data.pool().ok().flatten()).await?;
        self.key =
            self.processes.wait_for("registry", READY, |data| data.api_key().filter(|key| !key.is_empty())).await?;
        for name in &NODES[1..] {
            self.join(name, model)?;
        }
        let url = self.processes.wait_for("gateway", READY, DataFolder::address).await?;
        self.address = url.trim_start_matches("http://").parse().context("the gateway's address is not one")?;
        self.admin = GatewayClient::new(url, Some(self.key.clone()))?;
        self.until_ready().await
    }

    fn listen(&self, node: &str) -> String {
        let machine = self.machines.iter().find(|machine| machine.node == node);
        let address = machine
            .map_or(if self.machines.is_empty() { "127.0.0.1" } else { namespaces::HERE }, |machine| machine.address);
        format!("{address}:0")
    }

    fn join(&mut self, name: &'static str, model: &Model) -> anyhow::Result<()> {
        let role = role(name);
        let line = self.processes.run("registry", &["invite", "--role", role, "--name", name])?;
        let invite = line.strip_prefix("tether join ").with_context(|| format!("no invite: {line}"))?.to_owned();
        self.processes.run(name, &["join", &invite, "--only-enrol"])?;
        let (listen, file) = (self.listen(name), format!("{}={}", model.name(), model.file.display()));
        let mut arguments = vec![role, "--listen", &listen];
        if role == "gateway" {
            let at = self.machines.iter().find(|machine| machine.node == name).map(|machine| machine.front);
            let bind = format!("{}:0", at.unwrap_or("127.0.0.1"));
            return self.start_node(name, &[&arguments[..], &["--bind", &bind]].concat());
        }
        if role == "worker" {
            arguments.push(&file);
        }
        self.start_node(name, &arguments)
    }

    fn start_node(&mut self, name: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let clock = self.clock_file(name);
        let clock: &[&str] = if self.setting == Setting::Clocks { &["--clock-file", &clock] } else { &[] };
        self.processes.start(name, &[arguments, clock].concat())
    }

    fn clock_file(&self, name: &str) -> String {
        self.folder.join(format!("{name}.clock")).display().to_string()
    }

    /// Makes a node's clock wrong by so many seconds.
    pub(super) fn set_clock(&self, name: &str, skew_secs: i64) -> anyhow::Result<()> {
        fs::write(self.clock_file(name), (skew_secs * 1000).to_string()).context("could not set a clock")
    }

    fn point_file(&self) -> PathBuf {
        self.folder.join("failpoint")
    }

    /// Arms a point: the first node that comes to it kills itself.
    pub(super) fn arm(&self, point: &str) -> anyhow::Result<()> {
        fs::write(self.point_file(), point).context("could not arm a failpoint")
    }

    /// Waits until one of the nodes has killed itself, and returns which.
    pub(super) async fn self_killed(&mut self, nodes: &[&'static str]) -> anyhow::Result<&'static str> {
        let deadline = Instant::now() + READY;
        loop {
            if let Some(name) = nodes.iter().find(|name| self.processes.has_ended(name)) {
                self.processes.kill(name)?;
                return Ok(name);
            }
            if Instant::now() >= deadline {
                let _ = fs::remove_file(self.point_file());
                bail!("no node came to the point");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Fills the disk of a node until nothing more fits.
    pub(super) fn fill_disk(&self, name: &str) -> anyhow::Result<()> {
        namespaces::fill(&self.filler(name))
    }

    pub(super) fn free_disk(&self, name: &str) -> anyhow::Result<()> {
        fs::remove_file(self.filler(name)).context("could not free a disk")
    }

    fn filler(&self, name: &str) -> PathBuf {
        self.folder.join(name).join("filler")
    }

    /// Cuts the cable of a node's machine, or mends it.
    pub(super) fn set_cable(&self, name: &str, is_whole: bool) -> anyhow::Result<()> {
        let machine = self.machines.iter().find(|machine| machine.node == name).context("it has no cable")?;
        machine.set_cable(is_whole)
    }

    /// Kills a node and everything that it started, as the kernel would.
    pub(super) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        self.processes.kill(name)
    }

    /// Asks a node to end.
    pub(super) fn terminate(&self, name: &str) -> anyhow::Result<()> {
        super::process::terminate(self.pid(name)?)
    }

    /// Waits until a node has ended that was asked to.
    pub(super) async fn ended(&mut self, name: &str) -> anyhow::Result<()> {
        self.processes.end(name).await
    }

    /// Kills every node at once and starts all again, each as its supervisor would.
    pub(super) async fn cut_power(&mut self) -> anyhow::Result<()> {
        for name in NODES {
            self.processes.kill(name)?;
        }
        tokio::time::sleep(RESTART_AFTER).await;
        for name in NODES {
            self.start_again(name)?;
        }
        Ok(())
    }

    /// Starts a node again that was killed, as its supervisor would.
    pub(super) async fn restart(&mut self, name: &str) -> anyhow::Result<()> {
        tokio::time::sleep(RESTART_AFTER).await;
        self.start_again(name)
    }

    fn start_again(&mut self, name: &str) -> anyhow::Result<()> {
        let bind = self.address.to_string();
        // Its other flags are kept. A port of its own lets clients find it again.
        let more: &[&str] = if name == "gateway" { &["--bind", &bind] } else { &[] };
        self.keep_log(name);
        self.start_node(name, &[&[role(name)], more].concat())
    }

    /// Each start begins a new log; the last one is kept beside it.
    fn keep_log(&self, name: &str) {
        let log = self.folder.join(name).join("log");
        let _ = fs::rename(&log, log.with_extension("before"));
    }

    pub(super) fn pid(&self, name: &str) -> anyhow::Result<u32> {
        self.processes.pid(name).with_context(|| format!("{name} does not run"))
    }

    /// Returns the engine of a worker.
    pub(super) fn engine(&self, worker: &str) -> anyhow::Result<Handle> {
        Handle::of_child(self.pid(worker)?).with_context(|| format!("{worker} has no engine"))
    }

    pub(super) fn kill_engine(&self, worker: &str) -> anyhow::Result<()> {
        self.engine(worker)?.kill()
    }

    /// Stops the engines until the returned value is dropped, so that an answer stays where it is.
    pub(super) fn freeze_engines(&self) -> Frozen {
        Frozen::new(WORKERS.iter().filter_map(|worker| self.engine(worker).ok()))
    }

    /// Returns the worker that has the job of a trace, or else any.
    pub(super) async fn worker_of(&self, trace: TraceId) -> &'static str {
        let jobs = self.jobs_since(0).await.unwrap_or_default();
        let job = jobs.iter().find(|job| job.trace_id == trace);
        let has = |name: &&&str| {
            let key = self.processes.data(name).node_key("worker").map(|key| key.public_key());
            job.is_some_and(|job| key.is_ok_and(|key| key == job.worker_id))
        };
        WORKERS.iter().find(has).copied().unwrap_or(WORKERS[0])
    }

    /// Waits until every node does its work, since its latest start.
    pub(super) async fn until_ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY;
        loop {
            let missing = self.missing().await;
            if missing.is_empty() {
                return Ok(());
            }
            for name in NODES {
                self.processes.check(name)?;
            }
            if Instant::now() >= deadline {
                bail!("after {} s the network is not ready: {missing}", READY.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Returns what is missing until the network is ready; nothing if it is.
    async fn missing(&self) -> String {
        let ready: Value = match self.admin.get("/readyz").await {
            Ok(ready) => ready,
            Err(error) => return format!("the gateway: {error:#}"),
        };
        if ready["status"] != "ok" {
            return format!("the gateway says {ready}");
        }
        let reports: Vec<HealthReport> = match self.admin.get::<Fleet>("/admin/v1/nodes").await {
            Ok(fleet) => fleet.workers.into_iter().map(|worker| worker.report).collect(),
            Err(error) => return format!("the list of workers: {error:#}"),
        };
        let missing = WORKERS.into_iter().filter(|worker| !reports.iter().any(|report| self.is_of(worker, report)));
        missing.collect::<Vec<_>>().join(", ")
    }

    /// Returns whether a report is of a worker since its latest start, and says that it takes jobs.
    fn is_of(&self, worker: &str, report: &HealthReport) -> bool {
        let data = self.processes.data(worker);
        let is_its = data.node_key("worker").is_ok_and(|key| key.public_key() == report.worker_id);
        let epoch = fs::read_to_string(data.path().join("nodes/worker.epoch")).unwrap_or_default();
        let is_latest = epoch.trim().parse().is_ok_and(|epoch: u64| report.epoch >= epoch);
        let is_ready = report
            .model_cache
            .iter()
            .any(|model| model.state == ModelState::Ready && model.key.model_id.as_str() == self.model);
        is_its && is_latest && is_ready && !report.draining
    }

    /// Returns the jobs with a greater number, the newest first.
    pub(super) async fn jobs_since(&self, sequence: u64) -> anyhow::Result<Vec<JobInfo>> {
        let mut jobs: Vec<JobInfo> = vec![];
        let mut after = String::new();
        loop {
            let page: JobList = self.admin.get(&format!("/admin/v1/jobs?limit=200{after}")).await?;
            if !page.silent.is_empty() {
                bail!("the orchestrator does not list its jobs");
            }
            let is_last = page.jobs.last().is_none_or(|job| job.sequence <= sequence);
            jobs.extend(page.jobs.into_iter().filter(|job| job.sequence > sequence));
            match page.next {
                Some(next) if !is_last => after = format!("&after={next}"),
                _ => return Ok(jobs),
            }
        }
    }

    /// Waits until no job with a greater number runs any more, and returns the jobs. Those that still run after their
    /// leases have long expired are stuck.
    pub(super) async fn settled_since(&self, sequence: u64) -> anyhow::Result<Vec<JobInfo>> {
        let deadline = Instant::now() + Duration::from_secs(LEASE_SECS) + READY;
        loop {
            let jobs = self.jobs_since(sequence).await;
            match jobs {
                Ok(jobs) if jobs.iter().all(|job| job.status != JobStatus::Running) => return Ok(jobs),
                jobs if Instant::now() >= deadline => return jobs,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Ends the network, and returns what is left in its store: reservations, and keys that were billed twice.
    pub(super) async fn stop(&mut self) -> anyhow::Result<Leftovers> {
        let stopped = self.processes.stop().await;
        let leftovers = leftovers(&self.processes.data("orchestrator")).await;
        self.release();
        stopped?;
        leftovers
    }

    /// Gives back what is not in the folder. May be called again.
    fn release(&mut self) {
        self.machines.clear();
        if self.setting == Setting::SmallDisks {
            for node in NODES {
                self.rescue_logs(node);
                namespaces::unmount(&self.folder.join(node));
            }
        }
    }

    /// Copies the logs of a node from its disk, which ends with the network.
    fn rescue_logs(&self, node: &str) {
        for log in ["log", "log.before"] {
            let _ = fs::copy(self.folder.join(node).join(log), self.folder.join(format!("{node}.{log}")));
        }
    }
}

impl Drop for Network {
    /// Ends the network at once if it has not ended, so that its folder can be removed.
    fn drop(&mut self) {
        for name in NODES {
            let _ = self.processes.kill(name);
        }
        self.release();
    }
}

/// What is left in the store of a network that has ended.
#[derive(Debug, Default)]
pub(super) struct Leftovers {
    pub(super) reservations: u32,
    /// Bills beyond the first of a job.
    pub(super) second_bills: usize,
}

async fn leftovers(data: &DataFolder) -> anyhow::Result<Leftovers> {
    let store = SqliteStore::open(data.orchestrator_store(), StoreOptions::default())?;
    let reservations = store.active_reservations().await?.iter().map(|(_, count)| count).sum();
    let tenant = "default".parse().context("a well-formed tenant")?;
    let mut keys = std::collections::HashSet::new();
    let (mut second_bills, mut cursor) = (0, metadata_store::UsageCursor::default());
    loop {
        let page = store.usage(&tenant, cursor, 1000).await?;
        let Some(last) = page.last() else { break };
        cursor = last.cursor();
        second_bills += page.into_iter().filter(|record| !keys.insert(record.key.clone())).count();
    }
    store.close().await?;
    Ok(Leftovers { reservations, second_bills })
}

/// Returns the role of a node.
fn role(name: &str) -> &str {
    name.split_once('-').map_or(name, |(role, _)| role)
}
