//! A terminal, and somebody who types at it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::program::wait_for;

/// Ctrl-C, as a terminal sends it.
pub(crate) const CTRL_C: &str = "\u{3}";
/// Ctrl-D, as a terminal sends it.
pub(crate) const CTRL_D: &str = "\u{4}";

/// A program on a terminal of its own.
pub(crate) struct Terminal {
    keys: File,
    shown: Arc<Mutex<String>>,
    /// How much of what was shown has been looked at, in bytes.
    seen: usize,
    child: Child,
}

impl Terminal {
    /// Starts a command on a new terminal, which sends it signals as a real one does.
    pub(crate) fn start(command: &Command) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&keys).expect("ours");
        unlockpt(&keys).expect("usable");
        let name = ptsname(&keys, vec![]).expect("a name").into_string().expect("text");
        let end = || File::options().read(true).write(true).open(&name).expect("its other end");
        let mut on_terminal = Command::new("setsid");
        on_terminal.arg("--ctty").arg(command.get_program()).args(command.get_args()).env_clear();
        on_terminal.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("TERM", "xterm");
        // Where `setsid` is looked for.
        on_terminal.env("PATH", "/usr/local/bin:/usr/bin:/bin");
        if let Some(folder) = command.get_current_dir() {
            on_terminal.current_dir(folder);
        }
        let child = on_terminal.stdin(end()).stdout(end()).stderr(end()).spawn().expect("the program starts");
        drop(on_terminal);
        let shown = Arc::<Mutex<String>>::default();
        listen(keys.try_clone().expect("a copy"), shown.clone());
        Self { keys: File::from(keys), shown, seen: 0, child }
    }

    /// Presses keys.
    pub(crate) fn keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Types a line, once the program is ready for one.
    pub(crate) fn types(&mut self, line: &str) {
        self.sees("> ");
        self.keys(&format!("{line}\r"));
    }

    /// Waits until something is shown, and returns what was shown up to there since it was last asked.
    pub(crate) fn sees(&mut self, text: &str) -> String {
        let (shown, seen) = (self.shown.clone(), self.seen);
        let unseen = || shown.lock()[seen..].to_owned();
        let found = std::panic::catch_unwind(AssertUnwindSafe(|| wait_for(text, || unseen().contains(text))));
        assert!(found.is_ok(), "{text:?} never came; what did is {:?}", unseen());
        let mut passed = unseen();
        passed.truncate(passed.find(text).expect("it came") + text.len());
        self.seen += passed.len();
        passed
    }

    /// Waits for the program's end.
    pub(crate) fn ends(mut self) -> ExitStatus {
        wait_for("the program to end", || self.child.try_wait().expect("a child").is_some());
        self.child.wait().expect("ended")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes down what is shown, until nobody has the terminal any more.
fn listen(keys: OwnedFd, shown: Arc<Mutex<String>>) {
    thread::spawn(move || {
        let mut keys = File::from(keys);
        let mut piece = [0; 4_096];
        let mut begun = vec![];
        while let Ok(length @ 1..) = keys.read(&mut piece) {
            begun.extend_from_slice(&piece[..length]);
            // A letter may come in two parts.
            let whole = match std::str::from_utf8(&begun) {
                Ok(_) => begun.len(),
                Err(error) => error.valid_up_to(),
            };
            let text: Vec<u8> = begun.drain(..whole).collect();
            shown.lock().push_str(&String::from_utf8_lossy(&text));
        }
    });
}
