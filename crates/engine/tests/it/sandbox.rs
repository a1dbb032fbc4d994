//! What a model that took over its engine process can reach: nothing, and its engine answers all the same.

use std::fs;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use tether_engine::{
    LoadOptions, LoadedModel, ModelRuntime, ProcessRuntime, PromptInput, Sandbox, VerifiedArtifact, no_progress,
};

use crate::process_runtime::host;
use crate::{artifact, ask, options, run, tiny, within};

/// What a worker has that an engine must not get at.
pub(crate) struct Worker {
    folder: tempfile::TempDir,
    pub(crate) tcp: TcpListener,
    pub(crate) udp: UdpSocket,
    _unix: UnixListener,
}

impl Worker {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("root.key"), "secret").expect("written");
        let unix = UnixListener::bind(folder.path().join("socket")).expect("it listens");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("it listens");
        let udp = UdpSocket::bind("127.0.0.1:0").expect("it listens");
        Self { folder, tcp, udp, _unix: unix }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Returns ways out that succeed for any process without a sandbox.
    fn ways_out(&self) -> Vec<String> {
        [self.named_ways_out(), calls()].concat()
    }

    fn named_ways_out(&self) -> Vec<String> {
        let pid = std::process::id();
        vec![
            "read /etc/passwd".to_owned(),
            format!("read {}", self.path("root.key")),
            format!("list {}", self.path("")),
            format!("write {}", self.path("written")),
            format!("mode {}", self.path("root.key")),
            format!("tcp {}", self.tcp.local_addr().expect("it has one")),
            format!("udp {}", self.udp.local_addr().expect("it has one")),
            format!("unix {}", self.path("socket")),
            "spawn /bin/true".to_owned(),
            "fork -".to_owned(),
            format!("signal {pid}"),
            format!("handle {pid}"),
        ]
    }
}

/// Calls by x32 numbers: `getpid`, `connect` and `execve`. The kernel need not have this ABI.
#[cfg(target_arch = "x86_64")]
const X32_CALLS: &[&str] = &["call 1073741863", "call 1073741866", "call 1073742344"];
#[cfg(not(target_arch = "x86_64"))]
const X32_CALLS: &[&str] = &[];

/// Calls that change what a file is, or its length: `fchmod`, `fchown`, `fsetxattr`, `fremovexattr`, `truncate`,
/// `fchmodat2`, `setxattrat`, `removexattrat`, `file_setattr`, `ioctl` with `FS_IOC_SETFLAGS`, and `fcntl` with
/// `F_SETLEASE`. `F_SETOWN` is not about files.
#[rustfmt::skip]
fn file_calls() -> Vec<String> {
    let numbers = [
        libc::SYS_fchmod, libc::SYS_fchown, libc::SYS_fsetxattr, libc::SYS_fremovexattr, libc::SYS_truncate,
        452, 463, 466, 469,
    ];
    let commands = [(libc::SYS_ioctl, 0x4008_6602), (libc::SYS_fcntl, 1_024), (libc::SYS_fcntl, 8)];
    let with_commands = commands.map(|(number, command)| format!("call {number} -1 {command}"));
    numbers.map(|number| format!("call {number}")).into_iter().chain(with_commands).collect()
}

/// Calls that reach other processes: their scheduling and that of their reads, and System V's queues, semaphores and
/// memory, which may exist already.
#[rustfmt::skip]
fn process_calls() -> Vec<String> {
    let with_a_process = [
        libc::SYS_sched_setaffinity, libc::SYS_sched_setscheduler, libc::SYS_sched_setparam, libc::SYS_sched_setattr,
    ];
    let plain = [
        libc::SYS_ioprio_set, libc::SYS_msgsnd, libc::SYS_msgrcv, libc::SYS_msgctl, libc::SYS_semop,
        libc::SYS_semtimedop, libc::SYS_semctl, libc::SYS_shmat, libc::SYS_shmctl, libc::SYS_shmdt,
    ];
    let pid = std::process::id();
    let with_a_process = with_a_process.map(|number| format!("call {number} {pid}"));
    plain.map(|number| format!("call {number}")).into_iter().chain(with_a_process).collect()
}

/// Returns system calls that no filter may let through.
pub(crate) fn calls() -> Vec<String> {
    X32_CALLS.iter().map(|&call| call.to_owned()).chain(file_calls()).chain(process_calls()).collect()
}

/// Returns ways out that some systems refuse without a sandbox as well.
fn further_ways_out() -> Vec<String> {
    let pid = std::process::id();
    vec![
        "execute /bin/true".to_owned(),
        "ring -".to_owned(),
        format!("trace {pid}"),
        format!("read /proc/{pid}/environ"),
        format!("read /proc/{pid}/mem"),
        "read /proc/self/environ".to_owned(),
        "environment TETHER_API_KEY".to_owned(),
    ]
}

/// Attempts ways out of an engine process, and returns those that succeeded.
async fn succeeded(runtime: &ProcessRuntime, model: &LoadedModel, ways_out: &[String]) -> Vec<String> {
    let mut succeeded = Vec::new();
    for way_out in ways_out {
        let attempt = PromptInput::Text(format!("attempt {way_out}"));
        if within(runtime.count_tokens(model.id, &attempt)).await.is_ok() {
            succeeded.push(way_out.clone());
        }
    }
    succeeded
}

async fn captured(kind: &str, artifact: VerifiedArtifact, options: LoadOptions) -> (ProcessRuntime, LoadedModel) {
    let runtime = host(&["captured", kind]);
    let model = within(runtime.load(artifact, options, no_progress())).await.expect("it loads");
    (runtime, model)
}

/// Asserts that nothing leads out of an engine, as far as its kernel has what the sandbox is made of, and that it
/// answers before and after it was tried.
async fn assert_closed(artifact: VerifiedArtifact, question: &str, answer: &str) {
    let worker = Worker::new();
    let (runtime, model) = captured("llama", artifact, options()).await;
    let sandbox = model.sandbox.clone().expect("a process has one");
    assert!(sandbox.is_complete(), "this kernel cannot close the sandbox: {sandbox}");
    assert!(run(&runtime, ask(model.id, question)).await.text.contains(answer));
    let ways_out = [worker.ways_out(), further_ways_out()].concat();
    assert_eq!(succeeded(&runtime, &model, &ways_out).await, [""; 0]);
    assert!(!Path::new(&worker.path("written")).exists());
    assert!(run(&runtime, ask(model.id, question)).await.text.contains(answer));
}

#[tokio::test]
async fn code_that_runs_in_an_engine_finds_no_key_no_file_no_network_and_no_process() {
    assert_closed(tiny(), "What is 3 + 4?", "3 + 4 = 7").await;
}

#[tokio::test]
async fn a_real_model_answers_in_its_sandbox() {
    let target = Path::new(env!("CARGO_BIN_EXE_engine-host")).ancestors().nth(2).expect("the target folder");
    let path = target.join("models/smollm2.gguf");
    assert!(path.exists(), "{} is missing; `scripts/setup test` fetches it", path.display());
    assert_closed(artifact(&path), "What is the capital of Japan?", "Tokyo").await;
}

#[tokio::test]
async fn an_engine_whose_drivers_need_room_reaches_no_more_than_libraries_and_its_own_facts() {
    let worker = Worker::new();
    let (runtime, model) = captured("gpu", tiny(), options()).await;
    let sandbox = model.sandbox.clone().expect("a process has one");
    assert!(sandbox.is_complete(), "this kernel cannot close the sandbox: {sandbox}");
    let ways_out = [worker.ways_out(), further_ways_out()].concat();
    assert_eq!(succeeded(&runtime, &model, &ways_out).await, ["read /proc/self/environ"]);
    let needed = ["list /usr/lib", "read /proc/cpuinfo"].map(str::to_owned);
    assert_eq!(succeeded(&runtime, &model, &needed).await, needed);
    let own_scheduling = [format!("call {} 0", libc::SYS_sched_setaffinity)];
    assert_eq!(succeeded(&runtime, &model, &own_scheduling).await, own_scheduling);
}

#[tokio::test]
async fn an_engine_still_sees_the_size_and_times_of_files() {
    // A filter sees no paths, and Landlock does not ask who looks. The ADR says so, and must change with this.
    let worker = Worker::new();
    for kind in ["mock", "gpu"] {
        let (runtime, model) = captured(kind, tiny(), options()).await;
        let visible = [format!("look {}", worker.path("root.key"))];
        assert_eq!(succeeded(&runtime, &model, &visible).await, visible);
    }
}

#[tokio::test]
async fn each_way_out_is_one_where_there_is_no_sandbox() {
    let worker = Worker::new();
    let (runtime, model) = captured("mock", tiny(), LoadOptions { sandbox: false, ..options() }).await;
    assert_eq!(model.sandbox, Some(Sandbox::Off));
    assert_eq!(succeeded(&runtime, &model, &worker.ways_out()).await, worker.ways_out());
}

#[tokio::test]
async fn a_descriptor_that_the_worker_inherited_is_in_no_engine() {
    let worker = Worker::new();
    let path = worker.path("root.key");
    // A copy is passed on to started processes, as an inherited descriptor is.
    let _inherited = rustix::io::dup(fs::File::open(&path).expect("it opens")).expect("it is copied");
    let (runtime, model) = captured("mock", tiny(), LoadOptions { sandbox: false, ..options() }).await;
    assert_eq!(succeeded(&runtime, &model, &[format!("inherited {path}")]).await, [""; 0]);
}

#[tokio::test]
async fn a_secret_of_the_worker_is_in_no_engine() {
    // A child of this test has the secret in its environment, and starts the engine.
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "sandbox::with_a_secret", "--ignored", "--nocapture"])
        .env("TETHER_API_KEY", "tth_secret")
        .output()
        .expect("it starts");
    let printed = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(child.status.success() && printed.contains("1 passed"), "{printed}");
}

#[tokio::test]
#[ignore = "run in a process of its own by a_secret_of_the_worker_is_in_no_engine"]
async fn with_a_secret() {
    assert!(std::env::var_os("TETHER_API_KEY").is_some());
    // Without a sandbox, so that only the environment keeps the secret.
    let (runtime, model) = captured("mock", tiny(), LoadOptions { sandbox: false, ..options() }).await;
    let ways_out = ["environment TETHER_API_KEY".to_owned()];
    assert_eq!(succeeded(&runtime, &model, &ways_out).await, [""; 0]);
    let pid = model.pid.expect("it has a process");
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("it is ours");
    assert!(!String::from_utf8_lossy(&environment).contains("tth_secret"));
}

#[tokio::test]
async fn an_engine_writes_no_core_file_and_opens_a_limited_number_of_files() {
    let (_runtime, model) = captured("mock", tiny(), options()).await;
    let limits =
        fs::read_to_string(format!("/proc/{}/limits", model.pid.expect("it has a process"))).expect("it lives");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells");
        line.split_whitespace().take(2).map(|number| number.parse().expect("a number")).collect::<Vec<u64>>()
    };
    assert_eq!(limit("Max core file size"), [0, 0]);
    assert!(limit("Max open files").iter().all(|files| *files <= 4_096), "{limits}");
}
