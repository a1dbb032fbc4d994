//! The routers: Tether, and those whose programs are in the folder `BENCH_ROUTERS` or, for nginx, on this machine.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tether_cli::data_folder::DataFolder;

use crate::baseline::cpu_of;
use crate::load::Load;

/// How long a router may take to start.
const START_WITHIN: Duration = Duration::from_mins(1);
/// The core of the routers. `make bench-gateway` gives the other one to this process.
const CORE: &str = "0";

/// A running router. Dropping it ends the process.
pub(crate) struct Router {
    pub(crate) name: &'static str,
    address: SocketAddr,
    key: Option<String>,
    model: String,
    child: Child,
}

impl Router {
    pub(crate) fn load(&self) -> Load {
        Load::new(self.address, self.key.clone(), &*self.model)
    }

    /// CPU seconds that its processes have used.
    pub(crate) fn cpu(&self) -> f64 {
        self.processes().into_iter().map(cpu_of).sum()
    }

    /// Memory of its processes, of which shared pages are divided among those that share them.
    pub(crate) fn memory_mib(&self) -> f64 {
        let of = |process: u32| -> f64 {
            let text = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap_or_default();
            line.trim().trim_end_matches(" kB").parse().unwrap_or(0.0)
        };
        self.processes().into_iter().map(of).sum::<f64>() / 1024.0
    }

    /// The process that was started, and its children.
    fn processes(&self) -> Vec<u32> {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        children.split_whitespace().filter_map(|child| child.parse().ok()).chain([pid]).collect()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        // SIGTERM, so that those with children end them.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

/// Starts every router that is installed.
pub(crate) fn start(folder: &Path, upstream: SocketAddr) -> Vec<Router> {
    let started = [
        nginx(folder, upstream),
        python("sglang-router", "sglang-router", folder, upstream),
        python("smg", "smg", folder, upstream),
        Some(tether(folder, upstream)),
    ];
    started.into_iter().flatten().collect()
}

fn nginx(folder: &Path, upstream: SocketAddr) -> Option<Router> {
    let program = ["/usr/sbin/nginx", "/usr/bin/nginx"].map(PathBuf::from).into_iter().find(|path| path.exists());
    let Some(program) = program else {
        println!("nginx is not installed: it is left out");
        return None;
    };
    let address = free_address();
    let config = folder.join("nginx.conf");
    let text = format!(
        "worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log stderr crit;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;\n\
         fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;\n\
         keepalive_requests 1000000;\n\
         upstream engine {{ server {upstream}; keepalive 128; keepalive_requests 1000000; }}\n\
         server {{ listen {address}; location / {{ proxy_pass http://engine; proxy_http_version 1.1;\n\
         proxy_set_header Connection ''; proxy_buffering off; }} }} }}\n",
        folder = folder.display(),
    );
    std::fs::write(&config, text).unwrap();
    let mut command = pinned(&program);
    command.arg("-c").arg(&config).arg("-p").arg(folder);
    Some(run("nginx", command, address, None, "bench", folder))
}

fn python(name: &'static str, program: &str, folder: &Path, upstream: SocketAddr) -> Option<Router> {
    let program = PathBuf::from(std::env::var_os("BENCH_ROUTERS").unwrap_or_default()).join(program);
    if !program.exists() {
        println!("{name} is not installed: it is left out");
        return None;
    }
    let (address, metrics) = (free_address(), free_address());
    let mut command = pinned(&program);
    command.args(["launch", "--host", "127.0.0.1", "--port", &address.port().to_string()]);
    command.args(["--worker-urls", &format!("http://{upstream}"), "--log-level", "warn"]);
    command.args(["--prometheus-host", "127.0.0.1", "--prometheus-port", &metrics.port().to_string()]);
    command.args(["--max-concurrent-requests", "4096"]);
    Some(run(name, command, address, None, "bench", folder))
}

fn tether(folder: &Path, upstream: SocketAddr) -> Router {
    let (address, data) = (free_address(), folder.join("data"));
    let mut command = pinned(Path::new(env!("CARGO_BIN_EXE_tether")));
    command.args(["up", "--adopt", &format!("http://{upstream}/v1"), "--bind", &address.to_string(), "--data-dir"]);
    command.arg(&data).env("HOME", folder);
    for (setting, value) in [
        ("GATEWAY__RATE_LIMIT__REQUESTS_PER_MINUTE", "0"),
        ("GATEWAY__CONNECTIONS_PER_ADDRESS_MAX", "0"),
        ("WORKER__SLOTS", "128"),
    ] {
        command.env(format!("TETHER_{setting}"), value);
    }
    let mut router = run("tether", command, address, None, "bench", folder);
    router.key = DataFolder::at(&data).api_key();
    router
}

/// Returns a command that runs on the routers' core.
fn pinned(program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", CORE]).arg(program);
    command
}

/// Starts a router and waits until it answers.
fn run(
    name: &'static str,
    mut command: Command,
    address: SocketAddr,
    key: Option<String>,
    model: &str,
    folder: &Path,
) -> Router {
    let log = folder.join(format!("{name}.log"));
    let (out, err) = (File::create(&log).unwrap(), File::options().append(true).open(&log).unwrap());
    let child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap();
    let mut router = Router { name, address, key, model: model.to_owned(), child };
    let began = Instant::now();
    while !is_ready(&router.address) {
        let has_ended = !matches!(router.child.try_wait(), Ok(None));
        let is_late = has_ended || began.elapsed() > START_WITHIN;
        assert!(!is_late, "{name} did not start: {}", std::fs::read_to_string(&log).unwrap_or_default());
        std::thread::sleep(Duration::from_millis(50));
    }
    router
}

/// Returns whether a router lists the upstream's model, or is at least well.
fn is_ready(address: &SocketAddr) -> bool {
    ["/readyz", "/v1/models"].iter().any(|path| get(address, path).is_some_and(|head| head.contains(" 200 ")))
}

fn get(address: &SocketAddr, path: &str) -> Option<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n").ok()?;
    let mut head = [0; 64];
    let count = stream.read(&mut head).ok()?;
    Some(String::from_utf8_lossy(&head[..count]).into_owned())
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}
