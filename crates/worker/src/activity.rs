//! Guest manners: whether a worker takes jobs on a machine that people work on.
//!
//! [`decide`] is a pure function of the owner's rules and of what is known of the machine. [`machine`] looks at the
//! machine, and [`ActivityWatch`] carries out what was decided.

mod machine;
mod rules;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protocol::health::Activity;
use tokio::sync::watch;
use tokio::time::{self, Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::info;

pub(crate) use self::machine::Machine;
pub use self::rules::{ActivityConfig, Manner, QuietHours, Signals, decide};
use crate::model_loader::ModelLoader;
use crate::quota_guard::QuotaGuard;
use crate::standing::Standing;

/// How often the machine is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The machine around a worker, as far as its rules ask for it.
#[async_trait]
pub trait Surroundings: Send + Sync {
    /// Returns what is known now. What no rule asks for may be missing.
    async fn look(&self, rules: &ActivityConfig) -> Signals;
}

/// Lets a worker take jobs, or not, as its rules say.
pub(crate) struct ActivityWatch {
    pub(crate) rules: ActivityConfig,
    pub(crate) surroundings: Arc<dyn Surroundings>,
    pub(crate) standing: Arc<Standing>,
    pub(crate) guard: Arc<QuotaGuard>,
    pub(crate) loader: Arc<ModelLoader>,
    pub(crate) changes: watch::Sender<()>,
}

impl ActivityWatch {
    /// Watches until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut ticks = time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut paused_at = None;
        let watching = async {
            loop {
                ticks.tick().await;
                let signals = self.surroundings.look(&self.rules).await;
                self.follow(&signals, &mut paused_at);
            }
        };
        stop.run_until_cancelled(watching).await;
    }

    fn follow(&self, signals: &Signals, paused_at: &mut Option<Instant>) {
        let (activity, reason) = decide(&self.rules, signals);
        if activity != self.standing.activity() {
            info!(activity = activity.as_str(), reason, "the rules of [worker.activity] apply");
            self.change(activity);
        }
        if activity != Activity::Paused {
            *paused_at = None;
            return;
        }
        let since = *paused_at.get_or_insert_with(Instant::now);
        if since.elapsed() >= Duration::from_secs(self.rules.hand_over_secs) {
            self.standing.hand_over();
        }
        if self.guard.count() == 0 {
            self.loader.clear_memory();
        }
    }

    fn change(&self, activity: Activity) {
        let was_paused = self.standing.activity() == Activity::Paused;
        self.standing.set_activity(activity);
        self.changes.send_replace(());
        if activity == Activity::Paused {
            self.loader.hold_loads();
        } else if was_paused {
            self.loader.restore_memory();
        }
    }
}
