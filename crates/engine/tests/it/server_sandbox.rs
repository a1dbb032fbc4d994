//! What a model that took over a server of others can reach, if a worker started it: its port and those that the kernel
//! picks, and nothing else.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::tempfile;
use tether_engine::Sandbox;
use tether_engine::process::{ServerCommand, start_server};

use crate::sandbox::{Worker, calls};
use crate::within;

const HOST: &str = env!("CARGO_BIN_EXE_engine-host");

/// Returns a port that nothing listens on.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("there is one").port()
}

fn server(program: &str, args: &[&str], paths: Option<Vec<PathBuf>>) -> ServerCommand {
    let args = args.iter().map(OsString::from).collect();
    ServerCommand { program: program.into(), args, model: tempfile().expect("made"), port: free_port(), paths }
}

/// Returns whether a server attempts something with success.
async fn succeeds(way_out: &str, paths: Option<Vec<PathBuf>>) -> bool {
    let words: Vec<&str> = ["attempt"].into_iter().chain(way_out.split(' ')).collect();
    let (mut child, _) = start_server(server(HOST, &words, paths)).expect("it starts");
    within(child.wait()).await.expect("it ends").success()
}

async fn succeeded(ways_out: &[String], paths: Option<Vec<PathBuf>>) -> Vec<String> {
    let mut succeeded = Vec::new();
    for way_out in ways_out {
        if succeeds(way_out, paths.clone()).await {
            succeeded.push(way_out.clone());
        }
    }
    succeeded
}

/// Returns ways out that succeed for any process without a sandbox.
fn ways_out(worker: &Worker) -> Vec<String> {
    let pid = std::process::id();
    let tcp = worker.tcp.local_addr().expect("it has one");
    let named = [
        "read /etc/passwd".to_owned(),
        format!("read {}", worker.path("root.key")),
        format!("list {}", worker.path("")),
        format!("write {}", worker.path("written")),
        format!("mode {}", worker.path("root.key")),
        format!("tcp {tcp}"),
        format!("open {tcp}"),
        format!("udp {}", worker.udp.local_addr().expect("it has one")),
        format!("unix {}", worker.path("socket")),
        "pair -".to_owned(),
        "listen 127.0.0.1:0".to_owned(),
        format!("signal {pid}"),
        format!("handle {pid}"),
    ];
    named.into_iter().chain(calls()).collect()
}

/// Returns ways out that some systems refuse without a sandbox as well: to the kernel, through other protocols of
/// streams (SCTP and MPTCP), and to other processes.
fn further_ways_out() -> Vec<String> {
    let pid = std::process::id();
    let plain = ["namespace -", "ring -", "read /proc/kcore", "socket 2 1 132", "socket 2 1 262", "socket 16 3 0"];
    let of_worker = ["environ", "mem", "cmdline", "maps"].map(|name| format!("read /proc/{pid}/{name}"));
    plain.map(str::to_owned).into_iter().chain(of_worker).chain([format!("trace {pid}")]).collect()
}

#[tokio::test]
async fn code_that_runs_in_a_server_reaches_its_port_and_no_key_no_file_no_other_machine_and_no_process() {
    let worker = Worker::new();
    let (_child, sandbox) = start_server(server("true", &[], Some(vec![]))).expect("it starts");
    assert!(sandbox.is_complete(), "this kernel cannot close the sandbox: {sandbox}");
    let all = [ways_out(&worker), further_ways_out()].concat();
    assert_eq!(succeeded(&all, Some(vec![])).await, [""; 0]);
    assert!(!Path::new(&worker.path("written")).exists());
}

#[tokio::test]
async fn each_way_out_of_a_server_is_one_where_there_is_no_sandbox() {
    let worker = Worker::new();
    let (_child, sandbox) = start_server(server("true", &[], None)).expect("it starts");
    assert_eq!(sandbox, Sandbox::Off);
    assert_eq!(succeeded(&ways_out(&worker), None).await, ways_out(&worker));
}

#[tokio::test]
async fn a_server_listens_reads_its_model_and_starts_programs_that_are_closed_off_as_it_is() {
    let worker = Worker::new();
    let port = free_port();
    let listens = [format!("listen 127.0.0.1:{port}")];
    let words: Vec<&str> = ["attempt"].into_iter().chain(listens[0].split(' ')).collect();
    let command = ServerCommand { port, ..server(HOST, &words, Some(vec![])) };
    let (mut child, _) = start_server(command).expect("it starts");
    assert!(within(child.wait()).await.expect("it ends").success());

    let needed = ["read /proc/self/fd/0", "read /proc/self/maps", "read /proc/cpuinfo", "spawn /bin/true"];
    let needed = needed.map(str::to_owned);
    assert_eq!(succeeded(&needed, Some(vec![])).await, needed);

    let key = worker.path("root.key");
    let (mut cat, _) = start_server(server("sh", &["-c", &format!("cat {key}")], Some(vec![]))).expect("it starts");
    assert!(!within(cat.wait()).await.expect("it ends").success());
}

/// A gap that ADR 0065 tells: Landlock guards `bind` only.
#[tokio::test]
async fn a_server_that_listens_without_a_port_gets_one_that_the_kernel_picks() {
    assert!(succeeds("unbound -", Some(vec![])).await);
}

#[tokio::test]
async fn a_model_in_memory_is_read_in_the_same_sandbox() {
    let memory = rustix::fs::memfd_create("model", rustix::fs::MemfdFlags::CLOEXEC).expect("made");
    let words = ["attempt", "read", "/proc/self/fd/0"];
    let command = ServerCommand { model: memory.into(), ..server(HOST, &words, Some(vec![])) };
    let (mut child, sandbox) = start_server(command).expect("it starts");
    assert!(sandbox.is_complete(), "{sandbox}");
    assert!(within(child.wait()).await.expect("it ends").success());
}

#[tokio::test]
async fn a_server_uses_the_files_that_its_operator_names() {
    let worker = Worker::new();
    let folder = PathBuf::from(worker.path(""));
    let ways = [format!("read {}", worker.path("root.key")), format!("write {}", worker.path("log"))];
    assert_eq!(succeeded(&ways, Some(vec![folder.clone()])).await, ways);
    // No link there leads out.
    std::os::unix::fs::symlink("/etc/passwd", folder.join("link")).expect("made");
    assert!(!succeeds(&format!("read {}", worker.path("link")), Some(vec![folder.clone()])).await);
    let error = start_server(server("true", &[], Some(vec![folder.join("none")]))).expect_err("it is not there");
    assert!(error.to_string().contains("in server_paths does not exist"), "{error}");
}

#[tokio::test]
async fn a_server_writes_no_core_file_and_gains_no_rights() {
    let (child, _) = start_server(server("sleep", &["600"], Some(vec![]))).expect("it starts");
    let pid = child.id().expect("it runs");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("it lives");
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).expect("the kernel tells");
    assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"]);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    for expected in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"] {
        assert!(status.contains(expected), "{expected} in {status}");
    }
}

#[tokio::test]
async fn a_server_that_does_not_exist_is_an_error_at_once() {
    let error = start_server(server("no-such-server", &[], Some(vec![]))).expect_err("it is unknown");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
}
