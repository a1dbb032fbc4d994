//! A private Redis server.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use ::redis::{Client, Commands as _, Connection, RedisResult};
use tempfile::TempDir;
use tether_orchestrator::config::RedisConfig;

const PASSWORD: &str = "a password of tests";

/// A server of its own folder and port. Dropping it ends the process.
pub(crate) struct Redis {
    folder: TempDir,
    port: u16,
    child: Option<Child>,
}

impl Redis {
    pub(crate) fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port").port();
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("password"), PASSWORD).expect("written");
        let mut redis = Self { folder, port, child: None };
        redis.start_again();
        redis
    }

    /// Starts the server on the same port and the same files.
    pub(crate) fn start_again(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--requirepass", PASSWORD]);
        command.args(["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction", "--dir"]);
        command.arg(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let installed = "redis-server is installed by `scripts/setup test`";
        self.child = Some(command.spawn().expect(installed));
        while self.connect().is_err() {
            std::thread::yield_now();
        }
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("ended");
        }
    }

    pub(crate) fn config(&self) -> RedisConfig {
        RedisConfig {
            url: Some(format!("redis://127.0.0.1:{}", self.port).try_into().expect("a URL")),
            password_file: Some(self.folder.path().join("password")),
            ..RedisConfig::default()
        }
    }

    fn connect(&self) -> RedisResult<Connection> {
        let mut connection = Client::open(format!("redis://127.0.0.1:{}", self.port))?.get_connection()?;
        ::redis::cmd("AUTH").arg(PASSWORD).query::<()>(&mut connection)?;
        connection.ping::<()>()?;
        Ok(connection)
    }

    pub(crate) fn run(&self, words: &[&str]) -> ::redis::Value {
        let mut command = ::redis::Cmd::new();
        for word in words {
            command.arg(word);
        }
        command.query(&mut self.connect().expect("it runs")).expect("a command")
    }

    /// The number of clients whose latest command is this one.
    pub(crate) fn clients_at(&self, command: &str) -> usize {
        let list: String =
            ::redis::cmd("CLIENT").arg("LIST").query(&mut self.connect().expect("it runs")).expect("a list");
        list.lines().filter(|client| client.contains(&format!(" cmd={command} "))).count()
    }

    /// The correlation ids of the stream, in order.
    pub(crate) fn letters(&self) -> Vec<String> {
        let mut connection = self.connect().expect("it runs");
        let mut range = ::redis::cmd("XRANGE");
        let entries: Vec<(String, Vec<(String, String)>)> =
            range.arg("tether:dlq").arg("-").arg("+").query(&mut connection).expect("a stream");
        let id = |fields: Vec<(String, String)>| fields.into_iter().find(|(name, _)| name == "correlationId");
        entries.into_iter().filter_map(|(_, fields)| Some(id(fields)?.1)).collect()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
    }
}
