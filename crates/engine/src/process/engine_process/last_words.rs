//! The last lines that an engine process wrote to standard error, kept to explain its death.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::process::ChildStderr;

const LINES_MAX: usize = 16;
/// The longest line that is kept in one piece.
const LINE_BYTES_MAX: usize = 4_096;

/// Patterns of lines that show the cause of death, the most telling first.
const TELLING: [&str; 4] = ["memory allocation of", "failed to allocate", "ASSERT", "rror"];

/// The last lines of one process.
#[derive(Debug, Clone, Default)]
pub(super) struct LastWords(Arc<Mutex<VecDeque<String>>>);

impl LastWords {
    /// Logs standard error line by line until it ends, and keeps the last lines.
    pub(super) async fn listen(self, mut stderr: ChildStderr, pid: u32) {
        let mut buffer = Vec::new();
        let mut line = Vec::new();
        loop {
            buffer.clear();
            buffer.reserve(LINE_BYTES_MAX);
            match stderr.read_buf(&mut buffer).await {
                Ok(count) if count > 0 => {}
                _ => break,
            }
            for &byte in &buffer {
                if byte != b'\n' {
                    line.push(byte);
                }
                if byte == b'\n' || line.len() >= LINE_BYTES_MAX {
                    self.keep(&mut line, pid);
                }
            }
        }
        self.keep(&mut line, pid);
    }

    /// Returns the most telling line: the cause of death says more than the backtrace after it.
    pub(super) fn telling(&self) -> Option<String> {
        let lines = self.0.lock();
        let telling = TELLING.iter().find_map(|words| lines.iter().rev().find(|line| line.contains(words)));
        telling.or(lines.back()).cloned()
    }

    fn keep(&self, line: &mut Vec<u8>, pid: u32) {
        let text = String::from_utf8_lossy(line).trim().to_owned();
        line.clear();
        if text.is_empty() {
            return;
        }
        tracing::debug!(target: "engine_process", pid, "{text}");
        let mut lines = self.0.lock();
        if lines.len() == LINES_MAX {
            // A long backtrace must not push out the line with its cause.
            let is_telling = |line: &String| TELLING.iter().any(|words| line.contains(words));
            let oldest = lines.iter().position(|line| !is_telling(line)).unwrap_or(0);
            lines.remove(oldest);
        }
        lines.push_back(text);
    }
}
