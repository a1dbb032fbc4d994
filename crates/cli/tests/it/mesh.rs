//! A network of processes of the built program on this machine, and what a test does with it.

use std::fs;
use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use protocol::control::{Decision, Fleet};
use protocol::health::{HealthReport, ModelState};
use protocol::{PublicKey, WorkerId};
use rustix::process::Signal;
use serde_json::json;
use tether_cli::client::GatewayClient;
use tether_cli::node::Pool;
use tether_cli::processes::Processes;

use crate::program::{Home, children, signal};

/// An address of this machine alone, with a port that is free.
pub(crate) const LOOPBACK: &str = "127.0.0.1:0";
/// How long anything may take on a machine that is busy with other tests.
pub(crate) const TIMEOUT: Duration = Duration::from_mins(1);

/// A network of processes. What runs of it is killed when it is dropped.
pub(crate) struct Mesh {
    pub(crate) processes: Processes,
    /// Where the nodes' folders lie; dropped after the processes.
    home: Home,
    pub(crate) pool: Pool,
    pub(crate) gateway: GatewayClient,
    /// Flags with which nodes join.
    join_flags: Vec<String>,
    /// Questions that were asked.
    tries: AtomicU32,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) by: WorkerId,
    pub(crate) attempts: u32,
    pub(crate) took: Duration,
}

impl Mesh {
    /// Starts bootstrap nodes, a registry, an orchestrator, a gateway and workers, each by an invite where it needs
    /// one.
    pub(crate) async fn start(bootstrap_nodes: &[&str], workers: &[&str]) -> Self {
        let home = Home::new();
        let mut processes = Processes::of(env!("CARGO_BIN_EXE_tether"), home.path());
        let mut bootstrap: Vec<String> = vec![];
        for name in bootstrap_nodes {
            let known = bootstrap.join(",");
            let more: &[&str] = if known.is_empty() { &[] } else { &["--bootstrap", &known] };
            processes.start(name, &[&["bootstrap", "--listen", LOOPBACK], more].concat()).expect("started");
            bootstrap.push(processes.listening(name, "bootstrap").await.expect("it listens").to_string());
        }
        let known = bootstrap.join(",");
        let flags = ["registry", "--listen", LOOPBACK, "--bootstrap", &known];
        let mut mesh = Self::found_in(home, processes, &flags).await;
        mesh.join_flags = vec!["--listen".to_owned(), LOOPBACK.to_owned()];
        mesh.join("orchestrator", "orchestrator", &[]);
        mesh.join("gateway", "gateway", &["--bind", LOOPBACK]);
        for worker in workers {
            mesh.join(worker, "worker", &[]);
        }
        mesh.find_gateway().await;
        for worker in workers {
            mesh.until_ready(worker).await;
        }
        mesh
    }

    /// Starts a registry, of which everything else is to begin.
    pub(crate) async fn found(flags: &[&str]) -> Self {
        let home = Home::new();
        let processes = Processes::of(env!("CARGO_BIN_EXE_tether"), home.path());
        Self::found_in(home, processes, &[&["registry"], flags].concat()).await
    }

    /// Starts a whole network in one process, which other machines may join.
    pub(crate) async fn up(flags: &[&str]) -> Self {
        let home = Home::new();
        let processes = Processes::of(env!("CARGO_BIN_EXE_tether"), home.path());
        let mut mesh = Self::found_in(home, processes, &[&["up"], flags].concat()).await;
        mesh.find_gateway_in("registry").await;
        mesh
    }

    async fn found_in(home: Home, mut processes: Processes, arguments: &[&str]) -> Self {
        processes.start("registry", arguments).expect("started");
        let pool = processes.wait_for("registry", TIMEOUT, |data| data.pool().ok().flatten()).await.expect("a pool");
        let key = processes.wait_for("registry", TIMEOUT, |data| data.api_key().filter(|key| !key.is_empty()));
        // Known once it listens.
        let gateway = GatewayClient::new("http://127.0.0.1:9", Some(key.await.expect("a key"))).expect("a client");
        Self { processes, home, pool, gateway, join_flags: vec![], tries: AtomicU32::new(0) }
    }

    /// Makes an invite.
    pub(crate) fn invite(&self, role: &str) -> String {
        let line = self.processes.run("registry", &["invite", "--role", role]).expect("an invite");
        line.strip_prefix("tether join ").unwrap_or_else(|| panic!("no invite: {line}")).to_owned()
    }

    /// Starts a node by an invite of its own.
    pub(crate) fn join(&mut self, name: &str, role: &str, more: &[&str]) {
        let invite = self.invite(role);
        let flags: Vec<&str> = self.join_flags.iter().map(String::as_str).collect();
        self.processes.start(name, &[&["join", &invite], flags.as_slice(), more].concat()).expect("started");
    }

    /// Runs a command on a node's folder to its end, however it ends.
    pub(crate) fn run(&self, name: &str, arguments: &[&str]) -> Output {
        let folder = self.folder(name);
        self.home.command(arguments).arg("--data-dir").arg(folder).output().expect("the program runs")
    }

    pub(crate) fn folder(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// Returns a node's key.
    pub(crate) fn key(&self, name: &str, role: &str) -> PublicKey {
        self.processes.data(name).node_key(role).expect("a key").public_key()
    }

    /// Returns what a node logged and printed since its last start.
    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.folder(name).join("log")).unwrap_or_default()
    }

    pub(crate) fn signal(&self, name: &str, number: Signal) {
        signal(self.processes.pid(name).expect("it runs"), number);
    }

    /// Asks a question and returns who answered it.
    pub(crate) async fn ask(&self) -> Answered {
        self.try_ask().await.expect("an answer")
    }

    pub(crate) async fn try_ask(&self) -> anyhow::Result<Answered> {
        let began = Instant::now();
        let messages = json!([{ "role": "user", "content": "What is the capital of Japan?" }]);
        // Each question is a new one to the workers' memory, which would else draw them all to one worker.
        let options = json!({ "try": self.tries.fetch_add(1, Ordering::Relaxed) });
        let body = json!({
            "model": "tether-tiny",
            "messages": messages,
            "chat_template_kwargs": options,
            "temperature": 0,
            "stream": true,
        });
        let answer = self.gateway.chat(&body, |_| {}).await?;
        let took = began.elapsed();
        anyhow::ensure!(answer.text.contains("Tokyo"), "{}", answer.text);
        let decision: Decision =
            self.gateway.get(&format!("/admin/v1/jobs/{}/decision", answer.correlation_id)).await?;
        let by = decision.attempts.last().and_then(|attempt| attempt.chosen).expect("a worker");
        Ok(Answered { by, attempts: answer.attempts, took })
    }

    /// Returns the workers that hold a model and get jobs.
    pub(crate) async fn routable(&self) -> anyhow::Result<Vec<WorkerId>> {
        Ok(self.reports().await?.into_iter().map(|report| report.worker_id).collect())
    }

    async fn reports(&self) -> anyhow::Result<Vec<HealthReport>> {
        let fleet: Fleet = self.gateway.get("/admin/v1/nodes").await?;
        let reports = fleet.workers.into_iter().map(|worker| worker.report);
        let ready = |report: &HealthReport| report.model_cache.iter().any(|model| model.state == ModelState::Ready);
        Ok(reports.filter(|report| !report.draining && ready(report)).collect())
    }

    /// Waits until a worker gets jobs, since its last start.
    pub(crate) async fn until_ready(&mut self, worker: &str) -> Duration {
        let key = self.until_named(worker).await;
        let epoch = self.epoch(worker);
        self.until_fleet(worker, |fleet| fleet.iter().any(|report| report.worker_id == key && report.epoch >= epoch))
            .await
    }

    /// Waits until a worker gets none.
    pub(crate) async fn until_gone(&mut self, worker: &str) -> Duration {
        let key = self.until_named(worker).await;
        self.until_fleet(worker, |fleet| fleet.iter().all(|report| report.worker_id != key)).await
    }

    /// Returns how often a worker was started.
    pub(crate) fn epoch(&self, worker: &str) -> u64 {
        let text = fs::read_to_string(self.folder(worker).join("nodes/worker.epoch")).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    }

    /// A worker has a key from its first start on.
    async fn until_named(&mut self, worker: &str) -> PublicKey {
        let path = self.folder(worker).join("nodes/worker.key");
        until("the worker's key", || path.exists()).await;
        self.key(worker, "worker")
    }

    async fn until_fleet(&mut self, worker: &str, so: impl Fn(&[HealthReport]) -> bool) -> Duration {
        let began = Instant::now();
        loop {
            let fleet = self.reports().await;
            if fleet.as_ref().is_ok_and(|fleet| so(fleet)) {
                return began.elapsed();
            }
            assert!(
                began.elapsed() < TIMEOUT,
                "waited {} s for {worker}; the fleet is {fleet:?}\n{}\n{}",
                TIMEOUT.as_secs(),
                self.log(worker),
                self.log("orchestrator")
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Takes the address of a gateway that was started again.
    pub(crate) async fn find_gateway(&mut self) {
        self.find_gateway_in("gateway").await;
    }

    /// Takes the address of a gateway that runs in a folder of another name.
    pub(crate) async fn find_gateway_in(&mut self, name: &str) {
        let key = self.processes.data("registry").api_key();
        self.until_logged(name, "OpenAI address").await;
        let url = self.processes.data(name).address().expect("an address");
        self.gateway = GatewayClient::new(url, key).expect("a client");
    }

    /// Asks until a worker is the one that answers. Returns how often, and the longest that an answer took.
    pub(crate) async fn until_accepted_again(&self, worker: &str) -> (u32, Duration) {
        let key = self.key(worker, "worker");
        let mut slowest = Duration::ZERO;
        for tries in 1..=50 {
            // Side by side, because among idle workers the one that is known to be fast gets every job.
            let (one, other) = tokio::join!(self.ask(), self.ask());
            slowest = slowest.max(one.took).max(other.took);
            if one.by == key || other.by == key {
                return (tries, slowest);
            }
        }
        panic!("{worker} answers nothing any more");
    }

    /// Waits until a node's log holds a text.
    pub(crate) async fn until_logged(&self, name: &str, text: &str) {
        until(text, || self.log(name).contains(text)).await;
    }

    /// Ends all of it.
    pub(crate) async fn end(mut self) {
        self.processes.stop().await.expect("every process ends when it is asked to");
    }
}

impl Drop for Mesh {
    #[expect(clippy::print_stdout, reason = "shown by the test runner where a test fails")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Its folders go with it, and the logs in them would be missed.
            for folder in fs::read_dir(self.home.path()).into_iter().flatten().flatten() {
                let name = folder.file_name().into_string().unwrap_or_default();
                let log = self.log(&name);
                let lines: Vec<&str> = log.lines().collect();
                println!("--- {name}\n{}", lines[lines.len().saturating_sub(20)..].join("\n"));
            }
        }
    }
}

/// Pulls the plug of a process and of those it has started.
pub(crate) fn cut_power(pid: u32) {
    // It must not see how its children end.
    signal(pid, Signal::STOP);
    for child in children(pid) {
        cut_power(child);
    }
    signal(pid, Signal::KILL);
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !so() {
        assert!(Instant::now() < deadline, "waited {} s for: {what}", TIMEOUT.as_secs());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Returns what a command said that could not be done. It must end with exit code 2.
pub(crate) fn refusal(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}{}", String::from_utf8_lossy(&output.stdout));
    said
}
