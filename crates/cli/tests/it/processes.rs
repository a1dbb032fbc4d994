//! A network of processes as its operators meet it: how it begins, what it survives, and who is let in.

#![cfg(feature = "llama")]

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;
use tether_cli::client::{ChatAnswer, Piece};
use tokio::task::JoinSet;

use crate::mesh::{LOOPBACK, Mesh, cut_power, refusal, until};
use crate::program::{children, signal};
use crate::stranger::Stranger;

const SECOND: Duration = Duration::from_secs(1);
const WORKERS: [&str; 2] = ["worker-1", "worker-2"];

/// Shows a time that a promise is about. What is asserted leaves room for a machine that is busy with other tests.
#[expect(clippy::print_stdout, reason = "shown by the test runner where a test fails, or with --no-capture")]
fn note(what: &str, took: Duration) {
    println!("{what}: {:.0} ms", took.as_secs_f64() * 1e3);
}

/// Starts a node that belongs to the network already, and returns when it said so itself.
async fn start_again(mesh: &mut Mesh, name: &str, role: &str, more: &[&str]) -> Instant {
    let before = mesh.epoch(name);
    mesh.processes.start(name, &[&[role, "--listen", LOOPBACK], more].concat()).expect("started");
    mesh.until_logged(name, "on the network").await;
    let began = Instant::now();
    if role == "worker" {
        // Its reports from now on are told from those of its earlier life.
        until("a worker to number its start", || mesh.epoch(name) > before).await;
    }
    began
}

/// Asks a node to end, which it does soon whoever of the others is gone.
async fn end(mesh: &mut Mesh, name: &str) {
    let began = Instant::now();
    mesh.processes.end(name).await.expect("a clean end");
    note(&format!("{name} ended"), began.elapsed());
}

fn other(worker: &str) -> &'static str {
    WORKERS.into_iter().find(|name| *name != worker).expect("there are two")
}

impl Mesh {
    fn name_of(&self, worker: protocol::WorkerId) -> &'static str {
        WORKERS.into_iter().find(|name| self.key(name, "worker") == worker).expect("a worker of ours")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_go_on_when_the_worker_that_gave_one_is_killed() {
    let began = Instant::now();
    let mut mesh = Mesh::start(&["bootstrap-1", "bootstrap-2", "bootstrap-3"], &WORKERS).await;
    note("eight processes, from the first to the last that is ready", began.elapsed());
    for _ in 0..2 {
        let first = mesh.ask().await;
        assert_eq!(first.attempts, 1, "{first:?}");
        let killed = mesh.name_of(first.by);
        mesh.processes.kill(killed).expect("killed");
        let mut tried = 0;
        for _ in 0..4 {
            let next = mesh.ask().await;
            note("the answer after a worker was killed", next.took);
            assert_eq!(mesh.name_of(next.by), other(killed));
            assert!(next.attempts <= 2 && next.took < 4 * SECOND, "{next:?}");
            tried += next.attempts - 1;
        }
        assert!(tried <= 1, "a worker that does not acknowledge a job is set aside, and not tried {tried} times");
        let began = start_again(&mut mesh, killed, "worker", &[]).await;
        mesh.until_ready(killed).await;
        note("a worker that was killed gets jobs again, from its start", began.elapsed());
        // One that did not acknowledge a job is left alone for a while, but not once it was started anew.
        let (tries, slowest) = mesh.until_accepted_again(killed).await;
        note(&format!("{tries} answers until it gave one, the slowest"), slowest);
    }
    mesh.end().await;
}

/// Tells a long story; calls `on_piece` with the number of each piece.
async fn tell(mesh: &Mesh, mut on_piece: impl FnMut(usize)) -> ChatAnswer {
    let story = json!({
        "model": "tether-tiny",
        "messages": [{ "role": "user", "content": "Tell me a story." }],
        "max_tokens": 400,
        "ignore_eos": true,
        "deterministic": true,
        "seed": 7,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let mut pieces = 0;
    let count = |_: Piece<'_>| {
        pieces += 1;
        on_piece(pieces);
    };
    mesh.gateway.chat(&story, count).await.expect("an answer")
}

/// Signals a worker in the middle of a story that it tells. Returns the answer, its longest pause, and the worker.
async fn interrupt(mesh: &mut Mesh, number: Signal, flags: &[&str]) -> (ChatAnswer, Duration, &'static str) {
    // The story may begin at the other worker, whose end then interrupts nothing.
    for round in 0..10 {
        let victim = WORKERS[round % 2];
        let pid = mesh.processes.pid(victim).expect("it runs");
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        let told = tell(mesh, |pieces| {
            if pieces == 20 {
                signal(pid, number);
            }
            longest = longest.max(std::mem::replace(&mut last, Instant::now()).elapsed());
        })
        .await;
        if told.continued > 0 {
            return (told, longest, victim);
        }
        if number == Signal::KILL {
            mesh.processes.kill(victim).expect("gone");
        } else {
            mesh.processes.end(victim).await.expect("a clean end");
        }
        start_again(mesh, victim, "worker", flags).await;
        mesh.until_ready(victim).await;
    }
    panic!("no story begins where its worker is interrupted");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_continues_when_the_worker_that_gives_it_is_killed() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS).await;
    let whole = tell(&mesh, |_| {}).await;
    let (told, longest, _) = interrupt(&mut mesh, Signal::KILL, &[]).await;
    note("the longest pause of an answer whose worker was killed", longest);
    assert_eq!((told.text, told.continued), (whole.text, 1));
    assert_eq!((told.completion_tokens, told.prompt_tokens), (whole.completion_tokens, whole.prompt_tokens));
    // Silence would end the connection too, but later and under another name.
    #[cfg(target_os = "linux")]
    assert!(mesh.log("orchestrator").contains("its port is closed, so its process has ended"));
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_pause_for_four_seconds_keep_their_answers() {
    let mesh = Mesh::start(&["bootstrap"], &WORKERS).await;
    let whole = tell(&mesh, |_| {}).await;
    let pids = WORKERS.map(|worker| mesh.processes.pid(worker).expect("it runs"));
    for _ in 0..10 {
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        let mut waking = JoinSet::new();
        let told = tell(&mesh, |pieces| {
            if pieces == 20 {
                for pid in pids {
                    signal(pid, Signal::STOP);
                }
                waking.spawn(async move {
                    tokio::time::sleep(4 * SECOND).await;
                    for pid in pids {
                        signal(pid, Signal::CONT);
                    }
                });
            }
            longest = longest.max(std::mem::replace(&mut last, Instant::now()).elapsed());
        })
        .await;
        assert_eq!((told.text, told.continued), (whole.text.clone(), 0));
        waking.join_next().await.expect("the story is long enough").expect("no panic");
        if longest > 3 * SECOND {
            return;
        }
        // The workers had sent the whole story by then.
    }
    panic!("no story was interrupted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_stopped_hands_its_answer_over() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS).await;
    let whole = tell(&mesh, |_| {}).await;
    let settings = mesh.folder("settings.toml");
    std::fs::write(&settings, "[worker]\ndrain_secs = 0\n").expect("written");
    let flags = ["--config", settings.to_str().expect("text")];
    for worker in WORKERS {
        end(&mut mesh, worker).await;
        start_again(&mut mesh, worker, "worker", &flags).await;
        mesh.until_ready(worker).await;
    }
    let (told, longest, stopped) = interrupt(&mut mesh, Signal::TERM, &flags).await;
    note("the longest pause of an answer whose worker was stopped", longest);
    assert_eq!((told.text, told.continued), (whole.text, 1));
    assert_eq!((told.completion_tokens, told.prompt_tokens), (whole.completion_tokens, whole.prompt_tokens));
    mesh.processes.end(stopped).await.expect("it ends by itself, without an error");
    let log = mesh.log("orchestrator");
    assert!(log.contains("the worker is stopping, try another") && !log.contains("is ejected"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_gets_jobs_soon_after_its_start_and_none_once_it_stops_or_falls_silent() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS).await;
    let worker = WORKERS[0];
    for _ in 0..3 {
        let began = Instant::now();
        mesh.signal(worker, Signal::TERM);
        mesh.until_gone(worker).await;
        let gone = began.elapsed();
        note("gone after a stop", gone);
        assert!(gone < 3 * SECOND, "{gone:?}");
        mesh.processes.end(worker).await.expect("a clean end");
        note("its process ended", began.elapsed());
        let began = start_again(&mut mesh, worker, "worker", &[]).await;
        mesh.until_ready(worker).await;
        let ready = began.elapsed();
        note("gets jobs after its start", ready);
        assert!(ready < 6 * SECOND, "{ready:?}");
    }
    mesh.signal(worker, Signal::STOP);
    let began = Instant::now();
    let answered = mesh.ask().await;
    assert!(answered.attempts <= 2 && mesh.name_of(answered.by) == other(worker), "{answered:?}");
    note("an answer while a worker is silent", answered.took);
    mesh.until_gone(worker).await;
    let gone = began.elapsed();
    note("gone after silence", gone);
    assert!(gone > SECOND && gone < 18 * SECOND, "{gone:?}");
    mesh.signal(worker, Signal::CONT);
    let back = mesh.until_ready(worker).await;
    note("back after silence", back);
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_bootstrap_nodes_the_network_goes_on_and_those_who_knew_it_come_back() {
    let bootstrap = ["bootstrap-1", "bootstrap-2"];
    let mut mesh = Mesh::start(&bootstrap, &WORKERS).await;
    for name in ["registry", "orchestrator", "gateway", "worker-1", "worker-2"] {
        let role = if WORKERS.contains(&name) { "worker" } else { name };
        let folder = mesh.folder(name);
        until("a node to write down whom it knows", || folder.join(format!("nodes/{role}.peers")).exists()).await;
    }
    for name in bootstrap {
        mesh.processes.kill(name).expect("killed");
    }
    // A node that takes over one of their ports, the doctor's own or another test's, would answer there.
    let held: Vec<UdpSocket> = mesh.pool.bootstrap.iter().map(|at| UdpSocket::bind(at).expect("a free port")).collect();
    for _ in 0..5 {
        assert_eq!(mesh.ask().await.attempts, 1);
    }
    let worker = WORKERS[0];
    let said = diagnosis(&mesh, worker);
    drop(held);
    assert!(said.contains("!!  bootstrap     no bootstrap node answers at 127.0.0.1:"), "{said}");
    assert!(said.contains("ok  registry ") && said.contains("ok  clock "), "{said}");
    assert!(said.contains("ok  worker ") && said.contains("belongs to the network"), "{said}");
    end(&mut mesh, worker).await;
    mesh.until_gone(worker).await;
    let began = start_again(&mut mesh, worker, "worker", &[]).await;
    mesh.until_ready(worker).await;
    note("a worker is back without a bootstrap node", began.elapsed());

    end(&mut mesh, "orchestrator").await;
    let began = start_again(&mut mesh, "orchestrator", "orchestrator", &[]).await;
    mesh.until_ready(WORKERS[0]).await;
    mesh.until_ready(WORKERS[1]).await;
    note("an orchestrator is back without a bootstrap node, and knows both workers", began.elapsed());
    assert!(began.elapsed() < 20 * SECOND);
    mesh.ask().await;

    // A crash takes no leave of anybody.
    mesh.processes.kill("orchestrator").expect("killed");
    let began = start_again(&mut mesh, "orchestrator", "orchestrator", &[]).await;
    mesh.until_ready(WORKERS[0]).await;
    mesh.until_ready(WORKERS[1]).await;
    note("an orchestrator is back after it was killed", began.elapsed());
    assert!(began.elapsed() < 20 * SECOND);
    mesh.ask().await;

    end(&mut mesh, "gateway").await;
    let began = start_again(&mut mesh, "gateway", "gateway", &["--bind", LOOPBACK]).await;
    mesh.find_gateway().await;
    mesh.until_ready(WORKERS[0]).await;
    note("a gateway is back without a bootstrap node", began.elapsed());
    mesh.ask().await;

    end(&mut mesh, "registry").await;
    let bootstrap = mesh.pool.bootstrap.join(",");
    mesh.processes.start("registry", &["registry", "--listen", LOOPBACK, "--bootstrap", &bootstrap]).expect("started");
    let began = Instant::now();
    mesh.until_ready(WORKERS[0]).await;
    mesh.ask().await;
    note("answers while the registry comes back", began.elapsed());
    let invite = mesh.invite("worker");
    assert!(invite.starts_with("tth_join_"));
    note("the registry makes invites again", began.elapsed());
}

/// What the doctor says of a node that has something wrong.
fn diagnosis(mesh: &Mesh, name: &str) -> String {
    let output = mesh.run(name, &["doctor", "--url", "http://127.0.0.1:9"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_on_every_address_of_its_machine_begins_a_network() {
    let port = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let mut mesh = Mesh::found(&["--listen", &format!("0.0.0.0:{port}")]).await;
    let [address] = &mesh.pool.bootstrap[..] else { panic!("one address: {:?}", mesh.pool) };
    assert!(address.ends_with(&format!(":{port}")) && !address.starts_with("0."), "{address}");
    mesh.join("orchestrator", "orchestrator", &[]);
    mesh.join("gateway", "gateway", &["--bind", LOOPBACK]);
    mesh.join("worker-1", "worker", &[]);
    mesh.find_gateway().await;
    mesh.until_ready("worker-1").await;
    mesh.ask().await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_joins_the_network_of_up_with_the_line_that_it_prints() {
    let up = ["--listen", LOOPBACK, "--bind", LOOPBACK, "--workers", "1"];
    let mut mesh = Mesh::up(&up).await;
    mesh.until_logged("registry", "tether join ").await;
    let log = mesh.log("registry");
    let invite = log.lines().find_map(|line| line.trim().strip_prefix("tether join ")).expect("a line").to_owned();
    let guest = WORKERS[1];
    mesh.processes.start(guest, &["join", &invite, "--listen", LOOPBACK]).expect("started");
    mesh.until_ready(guest).await;
    assert_eq!(mesh.routable().await.expect("a fleet").len(), 2);
    mesh.ask().await;
    assert!(mesh.invite("worker").starts_with("tth_join_"), "for a third machine");

    // Both lose their power, and come back.
    for name in ["registry", guest] {
        cut_power(mesh.processes.pid(name).expect("it runs"));
        mesh.processes.kill(name).expect("gone");
    }
    for name in ["registry", guest] {
        mesh.processes.start(name, &["start"]).expect("started");
    }
    mesh.find_gateway_in("registry").await;
    mesh.until_ready(guest).await;
    mesh.ask().await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_cut_off_says_so_and_the_doctor_names_the_cause() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS[..1]).await;
    let lost = WORKERS[1];
    let began = Instant::now();
    mesh.join(lost, "worker", &["--region", "garage"]);
    mesh.until_logged(lost, "no orchestrator takes this worker's reports").await;
    note("a worker that nobody hears says so", began.elapsed());
    assert!(began.elapsed() < 20 * SECOND, "{:?}", began.elapsed());
    let data = mesh.processes.data(lost);
    until("it to be written down", || data.unheard().is_some()).await;
    let said = diagnosis(&mesh, lost);
    assert!(said.contains("!!  worker ") && said.contains("--region local"), "{said}");
    assert!(said.contains("ok  orchestrators answering: 1 in region local"), "{said}");
    assert!(said.contains("ok  gateways      answering: 1 in region local"), "{said}");

    mesh.processes.kill("orchestrator").expect("killed");
    let said = diagnosis(&mesh, WORKERS[0]);
    assert!(said.contains("!!  orchestrators no orchestrator answers in region local"), "{said}");
    assert!(said.contains("the likeliest cause is orchestrators"), "{said}");
    let stopped = diagnosis(&mesh, "orchestrator");
    assert!(stopped.contains("does not run; start it with `tether start`"), "{stopped}");
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_have_names_by_which_they_are_listed_renamed_and_revoked_from_any_machine() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS[..1]).await;
    let well = |mesh: &Mesh, folder: &str, arguments: &[&str]| {
        let output = mesh.run(folder, arguments);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
        said
    };
    // Keys are made at the registry while it runs.
    let key = well(&mesh, "registry", &["token", "create", "--name", "laptop"]);
    assert!(key.starts_with("tth_live_"), "{key}");
    let listed = well(&mesh, "registry", &["token", "list"]);
    assert!(listed.contains("laptop") && listed.contains("made at first start"), "{listed}");
    let first = mesh.processes.data("registry").api_key().expect("a key");
    let last_key = refusal(&mesh.run("registry", &["token", "revoke", &first[9..17]]));
    assert!(last_key.contains("last key that operates this network") && last_key.contains("--yes"), "{last_key}");

    // With the gateway's address and a key, everything works from elsewhere, too.
    let file = mesh.folder("registry").join("api-key");
    let (url, file) = (mesh.gateway.url().to_owned(), file.to_str().expect("text").to_owned());
    let at = ["--url", &url, "--api-key-file", &file];
    let line = well(&mesh, "laptop", &[&["invite", "--name", "garage"][..], &at].concat());
    let invite = line.trim().strip_prefix("tether join ").expect("an invite").to_owned();
    mesh.processes.start(WORKERS[1], &["join", &invite, "--listen", LOOPBACK]).expect("started");
    mesh.until_ready(WORKERS[1]).await;
    let nodes = well(&mesh, "laptop", &[&["nodes"][..], &at].concat());
    let line_of = |word: &str| nodes.lines().find(|line| line.contains(word)).unwrap_or_else(|| panic!("{nodes}"));
    assert!(line_of("garage").contains("ready") && line_of("garage").contains("tether-tiny@1.0"), "{nodes}");
    for role in ["registry", "orchestrator", "gateway"] {
        assert!(line_of(&format!(" {role} ")).contains("answers"), "{nodes}");
    }
    let key = mesh.key(WORKERS[1], "worker");
    well(&mesh, "laptop", &[&["rename", &key.short(), "attic"][..], &at].concat());
    // The registry's machine has no gateway, and knows who belongs.
    let nodes = well(&mesh, "registry", &["nodes"]);
    assert!(nodes.contains("attic") && !nodes.contains("garage") && nodes.contains("is not known"), "{nodes}");
    let unknown = refusal(&mesh.run("registry", &["revoke", "cellar"]));
    assert!(unknown.contains("tether nodes"), "{unknown}");
    let said = well(&mesh, "registry", &["revoke", "attic"]);
    assert!(said.contains(&key.short()), "{said}");
    mesh.until_gone(WORKERS[1]).await;

    // Each service shows what it counts.
    end(&mut mesh, "orchestrator").await;
    start_again(&mut mesh, "orchestrator", "orchestrator", &["--metrics-listen", LOOPBACK]).await;
    mesh.until_logged("orchestrator", "/metrics\n").await;
    let log = mesh.log("orchestrator");
    let at = log.lines().find_map(|line| line.strip_prefix("metrics at ")).expect("an address").to_owned();
    mesh.until_ready(WORKERS[0]).await;
    let shown = reqwest::get(&at).await.expect("answered").text().await.expect("text");
    assert!(shown.contains("tether_workers_live 1\n"), "{shown}");
    assert!(!shown.contains("tether_throttled"), "{shown}");
    let gateway = reqwest::get(format!("{}/metrics", mesh.gateway.url())).await.expect("answered");
    let gateway = gateway.text().await.expect("text");
    assert!(gateway.contains("roles=\"gateway\"") && gateway.contains("tether_throttled_total{"), "{gateway}");
    for foreign in ["tether_workers_live", "tether_reservations", "tether_breaker", "tether_engine"] {
        assert!(!gateway.contains(foreign), "{foreign}: {gateway}");
    }
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_outlive_their_terminal_and_a_log_that_cannot_be_written() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS[..1]).await;
    for name in ["bootstrap", "registry", "orchestrator", "gateway", WORKERS[0]] {
        mesh.signal(name, Signal::HUP);
    }
    mesh.until_logged("gateway", "SIGHUP").await;
    for name in ["bootstrap", "registry", "orchestrator", "gateway", WORKERS[0]] {
        mesh.processes.check(name).expect("it runs on");
    }
    mesh.ask().await;

    // Each invite is logged.
    mesh.processes.end("registry").await.expect("a clean end");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
    let registry = ["registry", "--data-dir", mesh.folder("registry").to_str().expect("text")].map(str::to_owned);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tether"));
    let mut child = command.args(registry).stdout(std::process::Stdio::null()).stderr(full).spawn().expect("started");
    let invited = || mesh.run("registry", &["invite"]).status.success();
    until("an invite", invited).await;
    until("another one", invited).await;
    assert!(child.try_wait().expect("a child").is_none(), "it runs on");
    crate::program::signal(child.id(), Signal::TERM);
    assert!(child.wait().expect("it ends").success());
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_on_while_the_registry_is_away_and_the_network_says_so() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS[..1]).await;
    mesh.ask().await;
    mesh.processes.kill("registry").expect("killed");
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    let silent = loop {
        slowest = slowest.max(mesh.ask().await.took);
        let ready: serde_json::Value = mesh.gateway.get("/readyz").await.expect("ready");
        match ready["registry_silent_secs"].as_u64() {
            Some(silent) if silent >= 8 => break ready,
            _ => assert!(began.elapsed() < 60 * SECOND, "{ready}"),
        }
        // Within the tenant's rate.
        tokio::time::sleep(SECOND / 5).await;
    };
    assert_eq!(silent["status"], "degraded");
    note("the slowest answer without a registry", slowest);
    assert!(slowest < 5 * SECOND, "{slowest:?}");
    let said = mesh.run("gateway", &["doctor"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("has had no answer of a registry for"), "{said}");
    assert!(said.contains("the likeliest cause is registry"), "{said}");
    assert!(mesh.log("gateway").contains("no registry answers: this node continues"), "{}", mesh.log("gateway"));

    mesh.processes.start("registry", &["registry"]).expect("started");
    let began = Instant::now();
    loop {
        let ready: serde_json::Value = mesh.gateway.get("/readyz").await.expect("ready");
        if ready["status"] == "ok" {
            break;
        }
        assert!(began.elapsed() < 60 * SECOND, "{ready}");
        tokio::time::sleep(SECOND / 20).await;
    }
    note("the gateway hears the registry again", began.elapsed());
    mesh.ask().await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_power_cut_the_network_comes_back_as_it_was() {
    let mut mesh = Mesh::found(&["--region", "garage"]).await;
    // One machine has three roles, which join at once, as a script would have them do.
    let invites = [("orchestrator", mesh.invite("orchestrator")), ("gateway", mesh.invite("gateway"))];
    std::thread::scope(|scope| {
        for (role, invite) in &invites {
            let more: &[&str] = if *role == "gateway" { &["--bind", LOOPBACK] } else { &[] };
            let mesh = &mesh;
            scope.spawn(move || {
                let enrol = ["join", invite, "--only-enrol", "--region", "garage"];
                let joined = mesh.run("registry", &[&enrol, more].concat());
                assert!(joined.status.success(), "{role}: {}", String::from_utf8_lossy(&joined.stderr));
            });
        }
    });
    mesh.join("worker-1", "worker", &["--region", "garage"]);
    mesh.until_logged("worker-1", "joined the network").await;
    mesh.processes.end("registry").await.expect("a clean end");
    mesh.processes.start("registry", &["start"]).expect("started");
    mesh.find_gateway_in("registry").await;
    mesh.until_ready("worker-1").await;
    mesh.ask().await;
    let (url, pool) = (mesh.gateway.url().to_owned(), mesh.pool.clone());

    for _ in 0..2 {
        for name in ["registry", "worker-1"] {
            cut_power(mesh.processes.pid(name).expect("it runs"));
            mesh.processes.kill(name).expect("gone");
        }
        let began = Instant::now();
        for name in ["registry", "worker-1"] {
            mesh.processes.start(name, &["start"]).expect("started");
        }
        mesh.find_gateway_in("registry").await;
        while let Err(error) = mesh.try_ask().await {
            assert!(began.elapsed() < 60 * SECOND, "{error:#}\n{}", mesh.log("registry"));
            tokio::time::sleep(SECOND / 20).await;
        }
        note("an answer after everything was killed and started", began.elapsed());
        assert!(began.elapsed() < 10 * SECOND, "{:?}", began.elapsed());
        assert_eq!(mesh.gateway.url(), url, "clients find the gateway where it was");
        let kept = mesh.processes.data("registry").pool().expect("a pool");
        assert_eq!(kept.as_ref(), Some(&pool), "nodes find the registry where it was");
    }
    // A service that ends by itself is started again.
    let starter = mesh.processes.pid("worker-1").expect("it runs");
    let [worker] = children(starter)[..] else { panic!("one service") };
    let before = mesh.epoch("worker-1");
    cut_power(worker);
    until("the worker to be started again", || mesh.epoch("worker-1") > before).await;
    mesh.until_ready("worker-1").await;
    mesh.ask().await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invite_lets_one_node_in_once_and_in_its_role() {
    let mut mesh = Mesh::start(&["bootstrap"], &[]).await;
    let uninvited = refusal(&mesh.run("nobody", &["worker", "--listen", LOOPBACK]));
    assert!(uninvited.contains("tether invite --role worker"), "{uninvited}");

    let invite = mesh.invite("worker");
    let mut mistyped: Vec<char> = invite.chars().collect();
    let last = mistyped.len() - 3;
    mistyped[last] = if mistyped[last] == 'a' { 'b' } else { 'a' };
    let mistyped: String = mistyped.into_iter().collect();
    for (text, word) in [
        (mistyped.as_str(), "mistyped"),
        (&invite[..invite.len() / 2], "cut or mistyped"),
        ("hello", "tth_join_"),
        (&format!("{invite}!"), "character"),
    ] {
        let said = refusal(&mesh.run("guest", &["join", text, "--listen", LOOPBACK]));
        assert!(said.contains(word) && !said.contains(text.trim_start_matches("tth_join_")), "{said}");
    }

    let enrol = ["join", &invite, "--only-enrol", "--listen", LOOPBACK];
    let joined = mesh.run("guest", &enrol);
    assert!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    assert!(String::from_utf8_lossy(&joined.stdout).contains("tether worker"));
    let checks = mesh.run("guest", &["doctor", "--json"]);
    let checks: Vec<serde_json::Value> = serde_json::from_slice(&checks.stdout).expect("JSON");
    let keys = checks.iter().find(|check| check["name"] == "keys").expect("they are looked at");
    assert_eq!(keys["well"], true, "what a node is left with is private: {keys}");
    let again = mesh.run("guest", &enrol);
    assert!(again.status.success(), "the same node may ask again, its first answer may have been lost");
    let said = refusal(&mesh.run("thief", &enrol));
    assert!(said.contains("used"), "{said}");
    let said = refusal(&mesh.run("thief", &["worker", "--listen", LOOPBACK]));
    assert!(said.contains("belongs to no network"), "{said}");

    start_again(&mut mesh, "guest", "worker", &[]).await;
    mesh.until_ready("guest").await;
    mesh.ask().await;

    let invite = mesh.invite("gateway");
    let joined = mesh.run("clerk", &["join", &invite, "--only-enrol", "--listen", LOOPBACK]);
    assert!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    let said = refusal(&mesh.run("clerk", &["worker", "--listen", LOOPBACK]));
    assert!(said.contains("tether invite --role worker"), "{said}");
    // Whoever copies the file shows a certificate that is for another role.
    let nodes = mesh.folder("clerk").join("nodes");
    for kind in ["key", "enrolment"] {
        std::fs::copy(nodes.join(format!("gateway.{kind}")), nodes.join(format!("worker.{kind}"))).expect("copied");
    }
    start_again(&mut mesh, "clerk", "worker", &[]).await;
    mesh.until_logged("clerk", "refused the report").await;
    let fleet = mesh.routable().await.expect("a fleet");
    assert_eq!(fleet, [mesh.key("guest", "worker")]);
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_no_work_and_gives_none() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS[..1]).await;
    let worker = mesh.key(WORKERS[0], "worker");
    let stranger = Stranger::start(&mesh).await;
    // Another network on the same nodes: its worker has a certificate, and it counts for nothing here.
    let bootstrap = mesh.pool.bootstrap.join(",");
    mesh.processes
        .start("registry-2", &["registry", "--listen", LOOPBACK, "--bootstrap", &bootstrap])
        .expect("started");
    mesh.until_logged("registry-2", "next: tether invite").await;
    let line = mesh.processes.run("registry-2", &["invite", "--role", "worker"]).expect("an invite");
    let invite = line.strip_prefix("tether join ").expect("an invite").to_owned();
    mesh.processes.start("worker-of-2", &["join", &invite, "--listen", LOOPBACK]).expect("started");
    mesh.until_logged("worker-of-2", "every model is loaded").await;

    stranger.until_requested().await;
    let orchestrator = mesh.key("orchestrator", "orchestrator");
    let refused = stranger.refusals(worker, orchestrator).await;
    assert!(refused.iter().all(|(_, code)| code == "not_enrolled"), "{refused:?}");
    for _ in 0..20 {
        assert_eq!(mesh.ask().await.by, worker);
        assert_eq!(mesh.routable().await.expect("a fleet"), [worker]);
        tokio::time::sleep(SECOND / 4).await;
    }
    let log = mesh.log("worker-of-2");
    assert!(!log.contains("refused the report"), "it knows by itself that this network is another: {log}");
    assert_eq!(stranger.accepted(), 0, "nobody sends it jobs or reports");
    stranger.stop().await;
    mesh.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_worker_is_out_within_five_seconds_and_stays_out() {
    let mut mesh = Mesh::start(&["bootstrap"], &WORKERS).await;
    let (out, stays) = (WORKERS[0], WORKERS[1]);
    let key = mesh.key(out, "worker");
    let began = Instant::now();
    let revoked = mesh.run("registry", &["revoke", &key.to_string()]);
    assert!(revoked.status.success(), "{}", String::from_utf8_lossy(&revoked.stderr));
    note("the command", began.elapsed());
    mesh.until_gone(out).await;
    let gone = began.elapsed();
    note("gone after it was revoked, the command included", gone);
    assert!(gone < 8 * SECOND, "{gone:?}");
    mesh.until_logged(out, "this node was revoked").await;
    note("told that it is", began.elapsed());
    for _ in 0..28 {
        assert_eq!(mesh.routable().await.expect("a fleet"), [mesh.key(stays, "worker")]);
        tokio::time::sleep(SECOND / 4).await;
    }
    assert_eq!(mesh.name_of(mesh.ask().await.by), stays);

    let said = diagnosis(&mesh, out);
    assert!(said.contains("!!  worker        not admitted: this worker was revoked"), "{said}");

    // Starting again is of no use, nor is an invite for the same key.
    mesh.processes.end(out).await.expect("a clean end");
    start_again(&mut mesh, out, "worker", &[]).await;
    mesh.until_logged(out, "this node was revoked").await;
    assert_eq!(mesh.routable().await.expect("a fleet"), [mesh.key(stays, "worker")]);
    mesh.processes.end(out).await.expect("a clean end");
    let invite = mesh.invite("worker");
    let said = refusal(&mesh.run(out, &["join", &invite, "--listen", LOOPBACK]));
    assert!(said.contains("revoked"), "{said}");

    // Nobody in particular is refused for good, too; a mistyped key is told.
    let unknown = mesh.run("registry", &["revoke", &"ab".repeat(32)]);
    assert_eq!(unknown.status.code(), Some(1));
    refusal(&mesh.run("registry", &["revoke", "abc"]));
    mesh.end().await;
}
