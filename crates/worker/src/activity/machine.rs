//! Looks at the machine: terminals, logind, power supplies and NetworkManager.
//!
//! Nothing here needs a right that other programs of the user lack. What a machine does not have is not reported.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use parking_lot::Mutex;
use protocol::{Clock, UnixMillis};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;
use tokio::time::{self, Instant};
use tracing::warn;

use super::Surroundings;
use super::rules::{ActivityConfig, Manner, Signals};
use crate::disk_calls::DiskCalls;

/// How long a command may take.
const COMMAND_WITHIN: Duration = Duration::from_secs(2);
/// How many bytes of a command's output are read.
const OUTPUT_MAX: u64 = 4096;
/// How long the answer of a command is believed.
const BELIEVED: Duration = Duration::from_secs(10);

const ASK_SEAT: [&str; 8] = [
    "loginctl",
    "show-seat",
    "seat0",
    "--property=ActiveSession",
    "--property=IdleHint",
    "--property=IdleSinceHint",
    "--no-pager",
    "--no-ask-password",
];
const ASK_METERED: [&str; 6] = [
    "busctl",
    "get-property",
    "org.freedesktop.NetworkManager",
    "/org/freedesktop/NetworkManager",
    "org.freedesktop.NetworkManager",
    "Metered",
];

/// The machine of this process.
pub(crate) struct Machine {
    clock: Arc<dyn Clock>,
    disk: DiskCalls,
    /// `/dev` and `/sys/class/power_supply`.
    devices: PathBuf,
    supplies: PathBuf,
    idle: Believed<Duration>,
    metered: Believed<bool>,
    /// Whether a warning was logged that `idle_command` fails.
    has_warned: AtomicBool,
}

/// The last answer of a command, and when it came.
struct Believed<T>(Mutex<Option<(Instant, Option<T>)>>);

impl<T: Copy> Believed<T> {
    fn new() -> Self {
        Self(Mutex::default())
    }

    async fn get(&self, ask: impl Future<Output = Option<T>>) -> Option<T> {
        let young = self.0.lock().filter(|(at, _)| at.elapsed() < BELIEVED);
        if let Some((_, answer)) = young {
            return answer;
        }
        let answer = ask.await;
        *self.0.lock() = Some((Instant::now(), answer));
        answer
    }
}

impl Machine {
    pub(crate) fn new(clock: Arc<dyn Clock>, disk: DiskCalls) -> Self {
        let (devices, supplies) = ("/dev".into(), "/sys/class/power_supply".into());
        Self {
            clock,
            disk,
            devices,
            supplies,
            idle: Believed::new(),
            metered: Believed::new(),
            has_warned: AtomicBool::new(false),
        }
    }

    /// Returns the time since the last input.
    async fn idle(&self, command: &[String]) -> Option<Duration> {
        if let [program, arguments @ ..] = command {
            let printed = async { Some(self.told_by(program, arguments).await) };
            return self.idle.get(printed).await;
        }
        let (now, devices) = (self.clock.now(), self.devices.clone());
        let terminals = self.disk.run(move || terminals_idle(&devices, now)).await.flatten();
        let seat = self.idle.get(async { seat_idle(&output_of(&ASK_SEAT).await?, now) }).await;
        terminals.into_iter().chain(seat).min()
    }
}

impl Machine {
    /// Returns the time since the last input as an `idle_command` tells it. If it fails, somebody may be there.
    async fn told_by(&self, program: &str, arguments: &[String]) -> Duration {
        let told = output(program, arguments).await.as_deref().and_then(seconds);
        if told.is_none() && !self.has_warned.swap(true, Ordering::Relaxed) {
            warn!(program, "idle_command prints no seconds, or fails: the machine counts as used");
        }
        told.unwrap_or_default()
    }
}

#[async_trait]
impl Surroundings for Machine {
    async fn look(&self, rules: &ActivityConfig) -> Signals {
        let supplies = self.supplies.clone();
        let asks = |manner| manner != Manner::Serve;
        let is_metered = async { output_of(&ASK_METERED).await.map(|text| is_metered(&text)) };
        Signals {
            idle: if asks(rules.in_use) { self.idle(&rules.idle_command).await } else { None },
            on_battery: asks(rules.on_battery)
                && self.disk.run(move || runs_on_battery(&supplies)).await.unwrap_or(false),
            is_metered: asks(rules.on_metered) && self.metered.get(is_metered).await.unwrap_or(false),
            minute: local_minute(self.clock.now(), &TimeZone::system()),
        }
    }
}

async fn output_of(command: &[&str]) -> Option<String> {
    let (program, arguments) = command.split_first()?;
    output(program, arguments).await
}

/// Returns the beginning of what a command prints, or `None` if it fails or takes too long.
async fn output(program: &str, arguments: &[impl AsRef<std::ffi::OsStr>]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = command.process_group(0).spawn().ok()?;
    let group = child.id();
    let reading = async {
        let mut text = String::new();
        child.stdout.take()?.take(OUTPUT_MAX).read_to_string(&mut text).await.ok()?;
        child.wait().await.ok()?.success().then_some(text)
    };
    let Ok(read) = time::timeout(COMMAND_WITHIN, reading).await else {
        kill_group(group);
        return None;
    };
    read
}

/// Kills a command and what it has started.
fn kill_group(group: Option<u32>) {
    let group = group.and_then(|group| i32::try_from(group).ok()).and_then(Pid::from_raw);
    if let Some(group) = group {
        // If it has just ended, there is nothing to kill.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// Reads what an `idle_command` printed.
fn seconds(text: &str) -> Option<Duration> {
    text.trim().parse().ok().and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok())
}

/// Returns for how long nobody has typed into a terminal: a terminal's access time is that of its last input.
fn terminals_idle(devices: &Path, now: UnixMillis) -> Option<Duration> {
    let of = |folder: PathBuf, prefix: &'static str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries
            .filter(move |entry| is_terminal(entry, prefix))
            .filter_map(|entry| entry.metadata().ok()?.accessed().ok())
    };
    let last = of(devices.join("pts"), "").chain(of(devices.to_owned(), "tty")).max()?;
    let last = last.duration_since(UNIX_EPOCH).unwrap_or_default();
    Some(Duration::from_millis(now.0).saturating_sub(last))
}

/// Returns whether an entry of `/dev` or `/dev/pts` is a terminal of a person: its name is a number.
fn is_terminal(entry: &fs::DirEntry, prefix: &str) -> bool {
    let name = entry.file_name();
    let number = name.to_str().and_then(|name| name.strip_prefix(prefix));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Reads what logind says of the machine's seat. A seat without a session is used by nobody.
fn seat_idle(text: &str, now: UnixMillis) -> Option<Duration> {
    let of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    of("ActiveSession").filter(|session| !session.is_empty())?;
    match of("IdleHint")? {
        "no" => Some(Duration::ZERO),
        "yes" => {
            let since = Duration::from_micros(of("IdleSinceHint")?.parse().ok()?);
            Some(Duration::from_millis(now.0).saturating_sub(since))
        }
        _ => None,
    }
}

/// Reads NetworkManager's `Metered`: 1 is yes, and 3 is a guess that it is.
fn is_metered(text: &str) -> bool {
    matches!(text.trim(), "u 1" | "u 3")
}

/// Returns whether a battery or an uninterruptible power supply feeds the machine. Batteries of mice and the like do
/// not count.
fn runs_on_battery(supplies: &Path) -> bool {
    let read = |supply: &Path, name: &str| fs::read_to_string(supply.join(name)).unwrap_or_default();
    let feeds = |supply: &Path| {
        matches!(read(supply, "type").trim(), "Battery" | "UPS")
            && read(supply, "scope").trim() != "Device"
            && read(supply, "status").trim() == "Discharging"
    };
    fs::read_dir(supplies).into_iter().flatten().flatten().any(|entry| feeds(&entry.path()))
}

/// Returns the local time in minutes since midnight.
fn local_minute(now: UnixMillis, zone: &TimeZone) -> u16 {
    let now = i64::try_from(now.0).ok().and_then(|now| Timestamp::from_millisecond(now).ok()).unwrap_or_default();
    let time = zone.to_datetime(now).time();
    u16::from(time.hour().unsigned_abs()) * 60 + u16::from(time.minute().unsigned_abs())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    #[test]
    fn the_terminal_that_was_used_last_counts() {
        let folder = folder();
        fs::create_dir(folder.path().join("pts")).expect("made");
        assert_eq!(terminals_idle(folder.path(), NOW), None);
        let used = |name: &str, ago: u64| {
            let at = UNIX_EPOCH + Duration::from_millis(NOW.0) - Duration::from_secs(ago);
            let file = File::create(folder.path().join(name)).expect("made");
            file.set_times(fs::FileTimes::new().set_accessed(at)).expect("set");
        };
        used("pts/ptmx", 1);
        used("ttyS0", 1);
        used("tty", 1);
        used("tty1", 900);
        assert_eq!(terminals_idle(folder.path(), NOW), Some(Duration::from_mins(15)));
        used("pts/3", 40);
        assert_eq!(terminals_idle(folder.path(), NOW), Some(Duration::from_secs(40)));
        used("tty2", 0);
        assert_eq!(terminals_idle(folder.path(), UnixMillis(0)), Some(Duration::ZERO), "a clock that is off");
    }

    #[test]
    fn only_what_feeds_the_machine_counts_as_its_battery() {
        let folder = folder();
        let supply = |name: &str, files: &[(&str, &str)]| {
            let path = folder.path().join(name);
            fs::create_dir_all(&path).expect("made");
            for (file, text) in files {
                fs::write(path.join(file), format!("{text}\n")).expect("written");
            }
        };
        assert!(!runs_on_battery(&folder.path().join("none")));
        supply("AC", &[("type", "Mains"), ("online", "0")]);
        supply("mouse", &[("type", "Battery"), ("scope", "Device"), ("status", "Discharging")]);
        supply("BAT0", &[("type", "Battery"), ("status", "Charging")]);
        assert!(!runs_on_battery(folder.path()));
        supply("BAT0", &[("status", "Discharging")]);
        assert!(runs_on_battery(folder.path()));
    }

    #[test]
    fn a_seat_is_used_until_logind_says_since_when_it_is_idle() {
        let seat = |text: &str| seat_idle(text, NOW);
        assert_eq!(seat("ActiveSession=2\nIdleHint=no\nIdleSinceHint=0\n"), Some(Duration::ZERO));
        let since = (NOW.0 - 60_000) * 1_000;
        let idle = format!("IdleHint=yes\nIdleSinceHint={since}\nActiveSession=2\n");
        assert_eq!(seat(&idle), Some(Duration::from_mins(1)));
        for unknown in
            ["", "ActiveSession=\nIdleHint=no\n", "ActiveSession=2\nIdleHint=yes\n", "ActiveSession=2\nIdleHint=\n"]
        {
            assert_eq!(seat(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn a_connection_is_metered_if_networkmanager_says_or_guesses_so() {
        for (text, expected) in
            [("u 1\n", true), ("u 3\n", true), ("u 0\n", false), ("u 2", false), ("u 4", false), ("", false)]
        {
            assert_eq!(is_metered(text), expected, "{text}");
        }
    }

    #[test]
    fn quiet_hours_are_those_of_the_local_clock() {
        // 2027-01-15 08:00 UTC.
        assert_eq!(local_minute(NOW, &TimeZone::UTC), 8 * 60);
        assert_eq!(local_minute(NOW, &TimeZone::fixed(jiff::tz::offset(-9))), 23 * 60);
        assert_eq!(local_minute(UnixMillis(u64::MAX), &TimeZone::UTC), 0, "a clock that is off");
    }

    #[tokio::test]
    async fn a_command_is_believed_only_if_it_ends_well() {
        let run = async |script: &str| output("sh", &["-c", script]).await.as_deref().and_then(seconds);
        assert_eq!(run("echo 12.5").await, Some(Duration::from_millis(12_500)));
        for script in ["echo 12; exit 1", "echo soon", "echo -3", "echo NaN", "echo inf", "printf '\\377'", "true"] {
            assert_eq!(run(script).await, None, "{script}");
        }
        assert_eq!(output("/no/such/program", &["x"]).await, None);
        assert_eq!(run("yes 1").await, None, "endless output is cut");
    }

    #[tokio::test]
    async fn an_idle_command_replaces_what_the_machine_says() {
        let machine = Machine::new(Arc::new(rpc::SystemClock), DiskCalls::at_once());
        let idle_command = ["echo", "7"].map(str::to_owned).to_vec();
        let rules = ActivityConfig { idle_command, ..ActivityConfig::default() };
        assert_eq!(machine.look(&rules).await.idle, None, "no rule asks for it");
        let rules = ActivityConfig { in_use: Manner::Pause, ..rules };
        assert_eq!(machine.look(&rules).await.idle, Some(Duration::from_secs(7)));
        let broken = ActivityConfig { idle_command: vec!["/no/such/program".to_owned()], ..rules };
        let machine = Machine::new(Arc::new(rpc::SystemClock), DiskCalls::at_once());
        assert_eq!(machine.look(&broken).await.idle, Some(Duration::ZERO), "somebody may be there");
    }

    #[tokio::test]
    async fn a_command_that_hangs_is_ended_with_what_it_has_started() {
        let folder = folder();
        let told = folder.path().join("told");
        let script = format!("sleep 600 & echo $! > '{}'; wait", told.display());
        assert_eq!(output("sh", &["-c", &script]).await, None);
        let child = fs::read_to_string(&told).expect("it was started");
        let process = format!("/proc/{}", child.trim());
        let ended = async {
            // Whoever takes over orphans may not reap it at once.
            while fs::read_to_string(format!("{process}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
                time::sleep(Duration::from_millis(10)).await;
            }
        };
        time::timeout(Duration::from_secs(20), ended).await.expect("it ends");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_believed_for_a_while_also_if_there_is_none() {
        let believed = Believed::new();
        assert_eq!(believed.get(async { None }).await, None);
        assert_eq!(believed.get(async { Some(1) }).await, None);
        time::advance(BELIEVED).await;
        assert_eq!(believed.get(async { Some(2) }).await, Some(2));
    }
}
