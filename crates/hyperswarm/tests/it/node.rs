//! A Node peer: a script of `interop/hyperswarm`, asked and answering in lines of JSON.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::oneshot;
use tokio::time;
use tokio_util::task::TaskTracker;

use crate::failure::Failure;

const PATIENCE: Duration = Duration::from_secs(100);

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, Failure>>>>>;

/// A running script. It ends when this is dropped.
pub(crate) struct Node {
    ready: Value,
    next: AtomicU64,
    stdin: tokio::sync::Mutex<ChildStdin>,
    waiting: Waiting,
    _child: Child,
}

impl Node {
    /// Starts a script and waits until it is ready.
    pub(crate) async fn start(script: &str, options: Value) -> Self {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../interop/hyperswarm"));
        assert!(folder.join("node_modules").is_dir(), "the Node packages are not installed: run `make interop`");
        let mut child = Command::new("node")
            .arg(folder.join(script))
            .arg(options.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("node starts");
        let stdin = tokio::sync::Mutex::new(child.stdin.take().expect("its stdin"));
        let mut lines = BufReader::new(child.stdout.take().expect("its stdout")).lines();
        let first = time::timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("readable");
        let first: Value = serde_json::from_str(&first.expect("a line")).expect("JSON");
        let waiting = Waiting::default();
        TaskTracker::new().spawn(hand_out(lines, waiting.clone()));
        Self { ready: first["ready"].clone(), next: AtomicU64::new(1), stdin, waiting, _child: child }
    }

    /// What the script told when it was ready.
    pub(crate) fn ready(&self, field: &str) -> &str {
        self.ready[field].as_str().unwrap_or_else(|| panic!("no {field} in {}", self.ready))
    }

    /// The same for a list.
    pub(crate) fn ready_list(&self, field: &str) -> Vec<String> {
        serde_json::from_value(self.ready[field].clone()).expect("a list of texts")
    }

    /// Asks the script to do something.
    pub(crate) async fn call(&self, action: &str, mut arguments: Value) -> Result<Value, Failure> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        arguments["id"] = json!(id);
        arguments["do"] = json!(action);
        let (answer, answered) = oneshot::channel();
        self.waiting.lock().insert(id, answer);
        self.stdin.lock().await.write_all(format!("{arguments}\n").as_bytes()).await.expect("the script listens");
        let answer = time::timeout(PATIENCE, answered).await;
        let answer = answer.unwrap_or_else(|_| panic!("no answer to {action} {arguments}"));
        answer.unwrap_or_else(|_| panic!("the script ended during {action}"))
    }

    /// Asks for what cannot fail.
    pub(crate) async fn done(&self, action: &str, arguments: Value) -> Value {
        self.call(action, arguments).await.unwrap_or_else(|failure| panic!("{action}: {failure:?}"))
    }
}

async fn hand_out(mut lines: tokio::io::Lines<BufReader<ChildStdout>>, waiting: Waiting) {
    while let Ok(Some(line)) = lines.next_line().await {
        // The packages print warnings now and then.
        let Ok(answer) = serde_json::from_str::<Value>(&line) else { continue };
        let Some(id) = answer["id"].as_u64() else { continue };
        let Some(asker) = waiting.lock().remove(&id) else { continue };
        let outcome = match answer.get("error") {
            Some(error) => Err(Failure::from_json(error)),
            None => Ok(answer["ok"].clone()),
        };
        let _ = asker.send(outcome);
    }
    waiting.lock().clear();
}
