//! Servers that the worker starts itself, each on a file that it has verified.
//!
//! The file is the server's standard input, and the server is told to open that. So it reads the verified bytes,
//! whatever happens to the file's path. A malicious file that takes over the server finds what the server needs and
//! nothing else (`engine::process::start_server`).

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;

use engine::Sandbox;
use engine::process::{ServerCommand, start_server};
use tokio::process::Child;

#[cfg(target_os = "linux")]
mod listener;

/// The path by which a program reopens its standard input.
#[cfg(target_os = "linux")]
const STDIN: &str = "/proc/self/fd/0";
#[cfg(not(target_os = "linux"))]
const STDIN: &str = "/dev/fd/0";

/// A running server. Dropping it ends the server.
#[derive(Debug)]
pub(crate) struct OwnServer {
    child: Child,
    port: u16,
    sandbox: Sandbox,
}

impl OwnServer {
    /// Starts a command. `{model}` in it stands for the model's file and `{port}` for the port to listen on.
    ///
    /// `paths` are those that it may use besides its program. `None` starts it without a sandbox.
    pub(crate) fn start(command: &[String], model: File, paths: Option<Vec<PathBuf>>) -> io::Result<Self> {
        // The port was free a moment ago. `has_its_port` says whether the server got it.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let said = |word: &String| word.replace("{model}", STDIN).replace("{port}", &port.to_string());
        let mut words = command.iter().map(said);
        let program = words.next().ok_or(io::ErrorKind::InvalidInput)?.into();
        let server = ServerCommand { program, args: words.map(Into::into).collect(), model, port, paths };
        let (child, sandbox) = start_server(server)?;
        Ok(Self { child, port, sandbox })
    }

    /// Returns its sandbox, unless it is turned off.
    pub(crate) fn sandbox(&self) -> Option<Sandbox> {
        Some(self.sandbox.clone()).filter(|sandbox| *sandbox != Sandbox::Off)
    }

    /// Returns the server's URL.
    pub(crate) fn base_url(&self) -> String {
        format!("http://{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Returns whether it is this server that listens on the port, or a process that it started. Another program could
    /// have taken the port before the server did. Only Linux says who listens.
    pub(crate) fn has_its_port(&self) -> bool {
        #[cfg(target_os = "linux")]
        {
            self.pid().is_some_and(|pid| listener::is_of(std::path::Path::new("/proc"), pid, self.port))
        }
        #[cfg(not(target_os = "linux"))]
        {
            true
        }
    }

    /// Returns whether the process has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::path::Path;
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;

    /// Waits until a file is written, and returns its contents.
    async fn written(path: &Path) -> String {
        loop {
            match fs::read_to_string(path) {
                Ok(text) if text.ends_with('.') => return text,
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// Starts a script that may use a folder.
    fn start(script: String, model: File, folder: &tempfile::TempDir) -> OwnServer {
        let paths = Some(vec![folder.path().to_owned()]);
        OwnServer::start(&["sh".into(), "-c".into(), script], model, paths).expect("started")
    }

    #[tokio::test]
    async fn a_server_reads_the_verified_file_knows_its_port_and_ends_with_its_owner() {
        let folder = tempfile::tempdir().expect("a folder");
        let (model, output) = (folder.path().join("model"), folder.path().join("told"));
        File::create(&model).expect("made").write_all(b"weights ").expect("written");
        let opened = File::open(&model).expect("opened");
        // Another file takes over the path.
        fs::remove_file(&model).expect("removed");
        fs::write(&model, "others").expect("written");
        let script = format!("cat {{model}} > '{0}'; printf '{{port}}.' >> '{0}'; exec sleep 600", output.display());
        let mut server = start(script, opened, &folder);
        let text = timeout(Duration::from_secs(20), written(&output)).await.expect("in time");
        assert_eq!(
            format!("http://127.0.0.1:{}", text.trim_start_matches("weights ").trim_end_matches('.')),
            server.base_url()
        );
        assert!(text.starts_with("weights "), "{text}");
        assert!(!server.has_ended());

        let process = PathBuf::from(format!("/proc/{}", server.pid().expect("it runs")));
        drop(server);
        let ended = async {
            while process.exists() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(20), ended).await.expect("it ends");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_server_reads_no_key_of_its_worker_unless_its_operator_wants_no_sandbox() {
        let (folder, data) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let (key, output) = (data.path().join("root.key"), folder.path().join("told"));
        fs::write(&key, "secret").expect("written");
        let script = format!("cat '{}' > '{1}'; printf '.' >> '{1}'", key.display(), output.display());
        let model = || tempfile::tempfile().expect("a file");
        let server = start(script.clone(), model(), &folder);
        assert!(server.sandbox().is_some_and(|sandbox| sandbox.is_complete()), "{:?}", server.sandbox());
        assert_eq!(timeout(Duration::from_secs(20), written(&output)).await.expect("in time"), ".");

        fs::remove_file(&output).expect("removed");
        let server = OwnServer::start(&["sh".into(), "-c".into(), script], model(), None).expect("started");
        assert_eq!(server.sandbox(), None);
        assert_eq!(timeout(Duration::from_secs(20), written(&output)).await.expect("in time"), "secret.");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_server_inherits_no_open_file_and_no_secret() {
        let folder = tempfile::tempdir().expect("a folder");
        let inherited = folder.path().join("root.key");
        fs::write(&inherited, "secret").expect("written");
        // A child of this test inherits the file and the secrets, and starts the server.
        let child = std::process::Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 9< \"$INHERITED\""])
            .arg(std::env::current_exe().expect("this program"))
            .args(["--exact", "own_server::tests::with_an_inherited_file_and_a_secret", "--ignored", "--nocapture"])
            .env("INHERITED", inherited)
            .env("TETHER_API_KEY", "tth_secret")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .env("CUDA_VISIBLE_DEVICES", "1")
            .output()
            .expect("it starts");
        let printed = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success() && printed.contains("1 passed"), "{printed}");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    #[ignore = "run in a process of its own by a_server_inherits_no_open_file_and_no_secret"]
    async fn with_an_inherited_file_and_a_secret() {
        let inherited = fs::read_link("/proc/self/fd/9").expect("it is open");
        assert!(inherited.ends_with("root.key"), "{}", inherited.display());
        let folder = tempfile::tempdir().expect("a folder");
        let output = folder.path().join("told");
        let script = format!("(readlink /proc/$$/fd/*; env) > '{0}'; printf '.' >> '{0}'", output.display());
        let model = tempfile::tempfile().expect("a file");
        // Without a sandbox, so that only the start keeps them.
        let _server = OwnServer::start(&["sh".into(), "-c".into(), script], model, None).expect("started");
        let text = timeout(Duration::from_secs(20), written(&output)).await.expect("in time");
        assert!(text.contains("/dev/null") && !text.contains("root.key"), "{text}");
        assert!(text.contains("CUDA_VISIBLE_DEVICES=1") && !text.contains("secret"), "{text}");
    }
}
