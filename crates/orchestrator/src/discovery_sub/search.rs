//! Looks up workers under their topics, and asks those that do not report by themselves.
//!
//! Anyone may announce on a topic, and a lookup returns a random selection of records. So a topic only names nodes to
//! ask, a few at a time, and nodes without a report are asked at growing intervals.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use protocol::control::{Empty, NodeRole, PRESENCE_DESCRIBE};
use protocol::health::HEARTBEAT;
use protocol::signature::Signed;
use protocol::{PublicKey, Region, Topic};
use quick_cache::unsync::Cache;
use rpc::backoff::{self, Backoff};
use rpc::{CallError, Client, Transport};
use tokio::sync::Semaphore;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::fleet::Fleet;

/// The longest pause between lookups of the presence topics; jitter shortens it by up to a quarter.
const EVERY: Duration = Duration::from_secs(2);
/// One round in this many also looks up model topics, some of them each time.
const MODELS_EVERY: u64 = 4;
/// Model topics looked up in one round.
const MODELS_AT_ONCE: usize = 8;
/// How long a lookup may take.
const LOOKUP_WITHIN: Duration = Duration::from_secs(5);
/// Nodes asked concurrently; a later lookup finds the others again.
const REQUESTS_AT_ONCE: usize = 16;
/// How long a node may take to connect and to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay before a node that had no report is asked again; it doubles each time.
const REST: Duration = Duration::from_secs(2);
/// The longest such delay. A worker that comes back reports by itself.
const REST_MAX: Duration = Duration::from_mins(5);
/// The most nodes remembered for having no report.
const RESTING_MAX: usize = 4096;
/// A worker is asked once it has been silent for longer than a heartbeat and a half.
const SILENT: Duration = HEARTBEAT.saturating_add(Duration::from_millis(2_500));

/// Looks up workers and asks for their reports.
pub struct Search {
    transport: Arc<dyn Transport>,
    client: Client,
    fleet: Arc<Fleet>,
    regions: Vec<Region>,
    contacts: Mutex<Contacts>,
    permits: Arc<Semaphore>,
    tasks: TaskTracker,
}

/// Nodes that are not to be asked now.
struct Contacts {
    now: HashSet<PublicKey>,
    resting: Cache<PublicKey, Rest>,
}

/// A node that had no report.
struct Rest {
    backoff: Backoff,
    until: Instant,
}

impl Default for Contacts {
    fn default() -> Self {
        Self { now: HashSet::new(), resting: Cache::new(RESTING_MAX) }
    }
}

impl Contacts {
    /// Returns whether a node may be asked now.
    fn is_due(&self, key: PublicKey, now: Instant) -> bool {
        !self.now.contains(&key) && self.resting.get(&key).is_none_or(|rest| rest.until <= now)
    }

    /// Records the result of asking a node.
    fn note(&mut self, own: PublicKey, key: PublicKey, is_worker: bool, now: Instant) {
        self.now.remove(&key);
        if is_worker {
            self.resting.remove(&key);
            return;
        }
        if let Some(mut rest) = self.resting.get_mut(&key) {
            rest.until = now + rest.backoff.next_wait();
        } else {
            let mut backoff = Backoff::new(REST, REST_MAX, backoff::seed_of([own, key]));
            let until = now + backoff.next_wait();
            self.resting.insert(key, Rest { backoff, until });
        }
    }
}

impl Search {
    /// Makes a search for the workers of some regions.
    pub fn new(transport: Arc<dyn Transport>, client: Client, fleet: Arc<Fleet>, regions: Vec<Region>) -> Self {
        let permits = Arc::new(Semaphore::new(REQUESTS_AT_ONCE));
        Self { transport, client, fleet, regions, contacts: Mutex::default(), permits, tasks: TaskTracker::new() }
    }

    /// Searches until `stop` is cancelled. `take` gets each report and returns whether it was accepted.
    pub async fn run(
        self: Arc<Self>,
        stop: CancellationToken,
        take: impl Fn(PublicKey, &Signed) -> bool + Clone + Send + Sync + 'static,
    ) {
        let own = self.transport.public_key();
        stop.run_until_cancelled(async {
            for round in 0.. {
                for topic in self.topics(round) {
                    for key in self.find(&topic).await {
                        self.ask(own, key, take.clone(), &stop);
                    }
                }
                time::sleep(backoff::spread(EVERY, [own; 2], round)).await;
            }
        })
        .await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Records that a worker reported by itself, and opens a connection for its jobs.
    pub fn greet(self: &Arc<Self>, worker: PublicKey) {
        self.lock().resting.remove(&worker);
        self.client.forgive(worker);
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            let client = self.client.clone();
            self.tasks.spawn(async move {
                // If this fails, the first job opens a connection.
                let _ = time::timeout(RESPONSE_TIMEOUT, client.connect(worker)).await;
                drop(permit);
            });
        }
    }

    /// Returns the topics to look up in a round.
    fn topics(&self, round: u64) -> Vec<Topic> {
        let mut topics: Vec<Topic> = self.regions.iter().cloned().map(Topic::Presence).collect();
        if round.is_multiple_of(MODELS_EVERY) {
            let of_models = self.fleet.models().into_iter().flat_map(|key| {
                let topic = move |region| Topic::Model(key.model_id.clone(), key.version, region);
                self.regions.iter().cloned().map(topic)
            });
            let mut of_models: Vec<Topic> = of_models.collect();
            if !of_models.is_empty() {
                let turn = (round / MODELS_EVERY) as usize * MODELS_AT_ONCE % of_models.len();
                of_models.rotate_left(turn);
            }
            topics.extend(of_models.into_iter().take(MODELS_AT_ONCE));
        }
        topics
    }

    async fn find(&self, topic: &Topic) -> Vec<PublicKey> {
        match time::timeout(LOOKUP_WITHIN, self.transport.lookup(topic)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                debug!(%topic, %error, "lookup failed");
                vec![]
            }
            Err(_) => {
                debug!(%topic, "lookup took too long");
                vec![]
            }
        }
    }

    /// Asks a node for its report, unless it reports by itself, recently had none, or too many nodes are being asked.
    fn ask(
        self: &Arc<Self>,
        own: PublicKey,
        key: PublicKey,
        take: impl Fn(PublicKey, &Signed) -> bool + Send + 'static,
        stop: &CancellationToken,
    ) {
        let now = Instant::now();
        if key == own || self.fleet.silence(key, now).is_some_and(|silence| silence < SILENT) {
            return;
        }
        if !self.lock().is_due(key, now) {
            return;
        }
        let Ok(permit) = self.permits.clone().try_acquire_owned() else { return };
        self.lock().now.insert(key);
        let (search, stop) = (self.clone(), stop.clone());
        self.tasks.spawn(async move {
            let Some(answer) = stop.run_until_cancelled(search.describe(key)).await else { return };
            let is_worker = match &answer {
                Ok(signed) => take(key, signed),
                Err(error) => {
                    debug!(node = key.short(), %error, "a node under a worker's topic has no report");
                    false
                }
            };
            if matches!(answer, Ok(_) | Err(CallError::Remote(_))) && !is_worker && !search.may_run_jobs(key) {
                search.client.disconnect(key);
            }
            search.lock().note(own, key, is_worker, Instant::now());
            drop(permit);
        });
    }

    /// Returns whether jobs may run on a node though its report is not believed now, for example because its clock is
    /// off.
    fn may_run_jobs(&self, key: PublicKey) -> bool {
        let membership = self.client.membership();
        let is_certified = membership.is_checked() && membership.check_role(key, NodeRole::Worker, None).is_ok();
        is_certified || self.fleet.silence(key, Instant::now()).is_some()
    }

    /// Asks a node for its report. When this returns, it is known whether the node may be a worker.
    async fn describe(&self, key: PublicKey) -> Result<Signed, CallError> {
        let report = self.client.call(key, PRESENCE_DESCRIBE, &Empty {}, RESPONSE_TIMEOUT).await?;
        if self.client.membership().standing(key).is_err() {
            self.client.meet(key, RESPONSE_TIMEOUT).await?;
        }
        Ok(report)
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, Contacts> {
        self.contacts.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_has_nothing_to_say_is_asked_ever_more_rarely() {
        let (own, key) = (PublicKey([0; 32]), PublicKey([1; 32]));
        let (mut contacts, begin) = (Contacts::default(), Instant::now());
        let mut times = 0;
        for second in 0..3600 {
            let now = begin + Duration::from_secs(second);
            if contacts.is_due(key, now) {
                contacts.now.insert(key);
                assert!(!contacts.is_due(key, now), "it is being asked");
                contacts.note(own, key, false, now);
                times += 1;
            }
        }
        assert!((14..=24).contains(&times), "asked {times} times in an hour");
        contacts.note(own, key, true, begin);
        assert!(contacts.is_due(key, begin), "a worker is not held back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_of_strangers_takes_bounded_memory_and_makes_no_other_forgotten() {
        let (own, key) = (PublicKey([0; 32]), PublicKey([1; 32]));
        let (mut contacts, begin) = (Contacts::default(), Instant::now());
        for _ in 0..3 {
            contacts.note(own, key, false, begin);
        }
        for number in 0..3 * RESTING_MAX as u64 {
            let mut bytes = [7; 32];
            bytes[..8].copy_from_slice(&number.to_le_bytes());
            contacts.note(own, PublicKey(bytes), false, begin);
            assert!(contacts.resting.len() <= RESTING_MAX);
        }
        assert!(!contacts.is_due(key, begin));
    }
}
