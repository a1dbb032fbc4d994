//! Detects that no orchestrator accepts this worker's reports, and logs a reason that an operator can act on.

use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};
use protocol::control::NodeRole;
use protocol::{PublicKey, Region};
use rpc::Directory;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

/// How long reports may go unaccepted before it is logged. With the heartbeat that checks, that is at most 15 seconds.
const UNHEARD_MAX: Duration = Duration::from_secs(10);
/// How often the warning is repeated while nothing changes.
const REPEAT: Duration = Duration::from_mins(5);

/// Tracks which orchestrators accept this worker's reports.
#[derive(Debug)]
pub(crate) struct Hearing {
    region: Region,
    state: Mutex<State>,
    /// When the latest accepted report was written.
    written: watch::Sender<Option<Instant>>,
}

#[derive(Debug)]
struct State {
    heard: Instant,
    logged_at: Option<Instant>,
    /// Why no orchestrator accepts reports; `None` while that is no problem.
    why: Option<String>,
    /// The last refusal: by which orchestrator, and why.
    refusal: Option<(PublicKey, String)>,
}

/// The facts from which the reason is derived.
#[derive(Debug, Default)]
struct Facts<'a> {
    region: &'a str,
    /// Orchestrators of this region that answer.
    orchestrators: usize,
    /// Nodes of this region that were found but do not answer.
    unreachable: usize,
    /// The registry's region, if it is another one.
    registry_region: Option<&'a str>,
    refusal: Option<(String, &'a str)>,
}

impl Hearing {
    pub(crate) fn new(region: Region) -> Self {
        let state = State { heard: Instant::now(), logged_at: None, why: None, refusal: None };
        Self { region, state: Mutex::new(state), written: watch::Sender::new(None) }
    }

    /// Waits until an orchestrator has a report that was written at `then` or later.
    pub(crate) async fn has_heard_of(&self, then: Instant) {
        // The sender lives as long as `self`.
        let _ = self.written.subscribe().wait_for(|written| written.is_some_and(|written| written >= then)).await;
    }

    /// Records that an orchestrator has accepted a report, written at this time.
    pub(crate) fn heard(&self, written: Instant) {
        self.written.send_if_modified(|latest| {
            let is_later = latest.is_none_or(|latest| latest < written);
            if is_later {
                *latest = Some(written);
            }
            is_later
        });
        let mut state = self.state();
        (state.heard, state.refusal, state.why) = (Instant::now(), None, None);
        if state.logged_at.take().is_some() {
            info!("an orchestrator takes this worker's reports");
        }
    }

    /// Records that an orchestrator refused a report.
    pub(crate) fn refused(&self, orchestrator: PublicKey, why: String) {
        self.state().refusal = Some((orchestrator, why));
    }

    /// Logs a warning if no orchestrator has accepted a report for too long.
    pub(crate) fn look(&self, directory: &Directory) {
        let mut state = self.state();
        let now = Instant::now();
        if now - state.heard < UNHEARD_MAX {
            return;
        }
        let registries = directory.regions(NodeRole::Registry);
        let facts = Facts {
            region: self.region.as_str(),
            orchestrators: directory.find(NodeRole::Orchestrator).len(),
            unreachable: directory.unreachable(),
            registry_region: registries.iter().find(|region| **region != self.region).map(Region::as_str),
            refusal: state.refusal.as_ref().map(|(by, why)| (by.short(), why.as_str())),
        };
        let why = format!("no orchestrator takes this worker's reports, so it gets no jobs: {}", why(&facts));
        if state.is_due(now) {
            state.logged_at = Some(now);
            warn!("{why}");
        }
        state.why = Some(why);
    }

    /// Returns why no orchestrator accepts this worker's reports, or `None` while that is no problem.
    pub(crate) fn unheard(&self) -> Option<String> {
        self.state().why.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn is_due(&self, now: Instant) -> bool {
        now - self.heard >= UNHEARD_MAX && self.logged_at.is_none_or(|logged_at| now - logged_at >= REPEAT)
    }
}

fn why(facts: &Facts<'_>) -> String {
    let Facts { region, orchestrators, unreachable, registry_region, refusal } = facts;
    if let Some((by, why)) = refusal {
        return format!("the orchestrator {by} refuses them: {why}");
    }
    if *orchestrators > 0 {
        return format!("{orchestrators} of region {region} answer, but not to reports; look at their logs");
    }
    if *unreachable > 0 {
        return format!(
            "{unreachable} nodes of region {region} were found and do not answer; where both machines are behind routers, \
             forward a UDP port to one of them and start its services with --listen 0.0.0.0:PORT"
        );
    }
    match registry_region {
        Some(other) => format!(
            "none answers in region {region}, and the registry is in region {other}; start this worker with --region \
             {other}, or an orchestrator with --near-regions {region}"
        ),
        None => format!(
            "none answers in region {region}; see that one runs, or bring one in with `tether invite --role orchestrator`"
        ),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time;

    use super::*;

    #[test]
    fn the_likeliest_cause_is_named_with_what_to_do() {
        let lone = || Facts { region: "garage", ..Facts::default() };
        assert!(why(&lone()).contains("tether invite --role orchestrator"));
        let elsewhere = Facts { registry_region: Some("local"), ..lone() };
        assert!(why(&elsewhere).contains("--region local") && why(&elsewhere).contains("--near-regions garage"));
        let walled = Facts { unreachable: 2, registry_region: Some("local"), ..lone() };
        assert!(why(&walled).contains("forward a UDP port"));
        let deaf = Facts { orchestrators: 1, unreachable: 1, ..lone() };
        assert!(why(&deaf).contains("logs"));
        let refused = Facts { refusal: Some(("9cdd4eab".into(), "clock skew")), orchestrators: 1, ..lone() };
        assert!(why(&refused).contains("9cdd4eab refuses them: clock skew"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_nobody_hears_says_so_within_15_seconds_and_not_with_each_heartbeat() {
        let hearing = Hearing::new("local".parse().expect("region"));
        let is_due = || hearing.state().is_due(Instant::now());
        assert!(!is_due());
        time::advance(UNHEARD_MAX).await;
        assert!(is_due() && UNHEARD_MAX + protocol::health::HEARTBEAT <= Duration::from_secs(15));
        hearing.state().logged_at = Some(Instant::now());
        time::advance(REPEAT / 2).await;
        assert!(!is_due());
        time::advance(REPEAT / 2).await;
        assert!(is_due());
        hearing.heard(Instant::now());
        assert!(!is_due());
    }
}
