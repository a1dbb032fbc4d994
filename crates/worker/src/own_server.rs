//! Servers that the worker starts itself, each on a file that it has verified.
//!
//! The file is the server's standard input, and the server is told to open that. So it reads the verified bytes,
//! whatever happens to the file's path.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;

use tokio::process::{Child, Command};

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
}

impl OwnServer {
    /// Starts a command. `{model}` in it stands for the model's file and `{port}` for the port to listen on.
    ///
    /// It inherits this program's environment without the `TETHER_` variables, which are meant for this program:
    /// `TETHER_API_KEY` and the settings.
    pub(crate) fn start(command: &[String], model: File) -> io::Result<Self> {
        Self::start_in(command, model, std::env::vars_os())
    }

    fn start_in(
        command: &[String],
        model: File,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> io::Result<Self> {
        // The port was free a moment ago. `has_its_port` says whether the server got it.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let said = |word: &String| word.replace("{model}", STDIN).replace("{port}", &port.to_string());
        let mut words = command.iter().map(said);
        let program = words.next().ok_or(io::ErrorKind::InvalidInput)?;
        engine::process::close_in_children();
        let child = Command::new(program)
            .args(words)
            .env_clear()
            .envs(environment.into_iter().filter(|(name, _)| !is_ours(name)))
            .stdin(Stdio::from(model))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { child, port })
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

fn is_ours(variable: &OsStr) -> bool {
    variable.as_encoded_bytes().starts_with(b"TETHER_")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::path::{Path, PathBuf};
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
        let mut server = OwnServer::start(&["sh".into(), "-c".into(), script], opened).expect("started");
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

    #[tokio::test]
    async fn a_server_inherits_the_environment_without_what_is_meant_for_this_program() {
        let folder = tempfile::tempdir().expect("a folder");
        let output = folder.path().join("told");
        let path = std::env::var_os("PATH").expect("the shell is found by it");
        let environment = [
            (OsString::from("PATH"), path),
            ("TETHER_API_KEY".into(), "tth_secret".into()),
            ("TETHER_WORKER__SLOTS".into(), "2".into()),
            ("CUDA_VISIBLE_DEVICES".into(), "1".into()),
        ];
        let script = format!("env | grep -v '^PATH=' | cut -d= -f1 > '{0}'; printf '.' >> '{0}'", output.display());
        let model = tempfile::tempfile().expect("a file");
        let command = ["sh".into(), "-c".into(), script];
        let _server = OwnServer::start_in(&command, model, environment).expect("started");
        let text = timeout(Duration::from_secs(20), written(&output)).await.expect("in time");
        assert!(text.contains("CUDA_VISIBLE_DEVICES") && !text.contains("TETHER_"), "{text}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_server_inherits_no_open_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let inherited = folder.path().join("root.key");
        fs::write(&inherited, "secret").expect("written");
        // A child of this test inherits the file, and starts the server.
        let child = std::process::Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 9< \"$INHERITED\""])
            .arg(std::env::current_exe().expect("this program"))
            .args(["--exact", "own_server::tests::with_an_inherited_file", "--ignored", "--nocapture"])
            .env("INHERITED", inherited)
            .output()
            .expect("it starts");
        let printed = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success() && printed.contains("1 passed"), "{printed}");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    #[ignore = "run in a process of its own by a_server_inherits_no_open_file"]
    async fn with_an_inherited_file() {
        let inherited = fs::read_link("/proc/self/fd/9").expect("it is open");
        assert!(inherited.ends_with("root.key"), "{}", inherited.display());
        let folder = tempfile::tempdir().expect("a folder");
        let output = folder.path().join("told");
        let script = format!("readlink /proc/self/fd/* > '{0}'; printf '.' >> '{0}'", output.display());
        let model = tempfile::tempfile().expect("a file");
        let _server = OwnServer::start(&["sh".into(), "-c".into(), script], model).expect("started");
        let text = timeout(Duration::from_secs(20), written(&output)).await.expect("in time");
        assert!(text.contains("/dev/null") && !text.contains("root.key"), "{text}");
    }
}
