//! Removes old jobs and old dead letters from the store, a few at a time.

use std::sync::Arc;
use std::time::Duration;

use metadata_store::{JobStore, StoreError};
use protocol::jobs::DeadLetterPurge;
use protocol::{Clock, UnixMillis};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::Config;
use crate::metrics::Metrics;

/// How often the store is looked through.
const EVERY: Duration = Duration::from_mins(1);
/// The most jobs that are removed in one transaction, so that settlements do not wait for it.
const AT_ONCE: u32 = 200;
/// The most pieces of files that are removed in one transaction. A piece is larger than a job.
const FILE_PIECES_AT_ONCE: u32 = 32;
/// Pause between two such transactions.
const PAUSE: Duration = Duration::from_millis(20);

/// Keeps the store from growing for ever.
pub(crate) struct HistoryKeeper {
    store: Arc<dyn JobStore>,
    clock: Arc<dyn Clock>,
    metrics: Metrics,
    /// How long settled jobs are kept, at least as long as their answers; `None` for ever.
    jobs_kept: Option<Duration>,
    /// How long dead letters are kept.
    letters_kept: Duration,
}

impl HistoryKeeper {
    pub(crate) fn new(store: Arc<dyn JobStore>, clock: Arc<dyn Clock>, metrics: Metrics, config: &Config) -> Self {
        let hours = |hours: u64| Duration::from_secs(hours.saturating_mul(3600));
        // A kept answer is found through its job.
        let with_answers = if config.answers_kept_hours > 0 { config.answers_kept_hours.saturating_add(1) } else { 0 };
        Self {
            store,
            clock,
            metrics,
            jobs_kept: (config.jobs_kept_hours > 0).then(|| hours(config.jobs_kept_hours.max(with_answers))),
            letters_kept: hours(u64::from(config.dead_letters_days) * 24),
        }
    }

    /// Runs until `stop` is cancelled.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut ticks = time::interval(EVERY);
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            // The next look is a minute away.
            if let Err(error) = self.look(&stop).await {
                warn!(%error, "could not remove old jobs and dead letters from the store");
            }
        }
    }

    async fn look(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        let died_before = Some(self.before(self.letters_kept));
        self.store.purge_dead_letters(DeadLetterPurge { died_before, ..DeadLetterPurge::default() }).await?;
        self.metrics.dead_letters.set(self.store.count_dead_letters().await? as i64);
        self.remove_files(stop).await?;
        let Some(kept) = self.jobs_kept else { return Ok(()) };
        let mut removed = 0;
        loop {
            let batch = self.store.prune(self.before(kept), AT_ONCE).await?;
            removed += batch;
            if batch < AT_ONCE || stop.run_until_cancelled(time::sleep(PAUSE)).await.is_none() {
                break;
            }
        }
        if removed > 0 {
            debug!(removed, "old jobs removed from the store");
        }
        Ok(())
    }

    /// Deletes files that have expired, and records how many batches are open.
    async fn remove_files(&self, stop: &CancellationToken) -> Result<(), StoreError> {
        let batches = self.store.batches();
        while batches.prune_files(self.clock.now(), FILE_PIECES_AT_ONCE).await? >= FILE_PIECES_AT_ONCE {
            if stop.run_until_cancelled(time::sleep(PAUSE)).await.is_none() {
                break;
            }
        }
        let (open, lines) = batches.open_batches().await?;
        self.metrics.batches_open.set(open as i64);
        self.metrics.batch_lines_open.set(lines as i64);
        Ok(())
    }

    fn before(&self, kept: Duration) -> UnixMillis {
        UnixMillis(self.clock.now().0.saturating_sub(kept.as_millis() as u64))
    }
}
