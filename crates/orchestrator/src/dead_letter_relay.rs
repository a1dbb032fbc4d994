//! Mirrors dead letters to a Redis stream, where other programs can wait for them.
//!
//! The store is the outbox: a letter is written there in the transaction that settles its job. The relay compares the
//! store with an index in Redis and makes good what is missing, so nothing is lost while Redis is away, full or wiped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use metadata_store::{JobStore, StoreError};
use protocol::jobs::{DeadLetter, DeadLetterQuery, PAGE_MAX};
use protocol::{PublicKey, codec};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisError, Script};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::RedisConfig;
use crate::metrics::Metrics;

/// How often the store and Redis are compared.
const EVERY: Duration = Duration::from_secs(2);
/// How long Redis may take to accept a connection, and to respond.
const WITHIN: Duration = Duration::from_secs(5);

/// Appends a letter to the stream, unless the index has it. The index maps each letter to its entry.
const ADD: &str = "
    if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 0 end
    local entry = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
    redis.call('HSET', KEYS[2], ARGV[1], entry)
    return 1";
/// Removes a letter from the stream and from the index.
const REMOVE: &str = "
    local entry = redis.call('HGET', KEYS[2], ARGV[1])
    if entry then redis.call('XDEL', KEYS[1], entry) end
    return redis.call('HDEL', KEYS[2], ARGV[1])";

/// Keeps a Redis stream equal to the dead letters of a store.
pub(crate) struct DeadLetterRelay {
    store: Arc<dyn JobStore>,
    config: RedisConfig,
    metrics: Metrics,
    /// Begins the names of this orchestrator's letters in the index; others may share the stream.
    origin: String,
    connection: Option<MultiplexedConnection>,
    /// What was seen when both were last equal.
    equal_at: Option<Glance>,
    /// How many letters Redis had then.
    sent_last: u64,
    add: Script,
    remove: Script,
}

/// What changes if the store's letters or the index do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Glance {
    newest: Option<u64>,
    stored: u64,
    sent: u64,
}

/// Why the stream could not be brought up to date.
#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("Redis: {0}")]
    Redis(#[from] RedisError),
    #[error("could not read {}", .0.display())]
    Password(PathBuf, #[source] std::io::Error),
    #[error("Redis did not respond within {} s", WITHIN.as_secs())]
    Silent,
}

/// What the stream lacks, and what it should no longer have.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    /// Sequences of the letters to append, in order.
    missing: Vec<u64>,
    surplus: Vec<String>,
}

impl DeadLetterRelay {
    pub(crate) fn new(
        store: Arc<dyn JobStore>,
        config: RedisConfig,
        metrics: Metrics,
        orchestrator: PublicKey,
    ) -> Self {
        let origin = format!("{orchestrator}:");
        let (add, remove) = (Script::new(ADD), Script::new(REMOVE));
        Self { store, config, metrics, origin, connection: None, equal_at: None, sent_last: 0, add, remove }
    }

    /// Runs until `stop` is cancelled. Returns at once if no Redis is configured.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        if self.config.url.is_none() {
            return;
        }
        let mut ticks = time::interval(EVERY);
        ticks.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut is_well = true;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let Some(outcome) = stop.run_until_cancelled(self.level()).await else { return };
            match outcome {
                Ok(()) if !is_well => info!("dead letters reach Redis again"),
                Ok(()) => {}
                Err(error) => {
                    self.count_unsent().await;
                    self.connection = None;
                    if is_well {
                        warn!(%error, "dead letters do not reach Redis; they stay in the store and are sent later");
                    }
                    is_well = false;
                    continue;
                }
            }
            is_well = true;
        }
    }

    /// Estimates how many letters Redis lacks while it does not say.
    async fn count_unsent(&mut self) {
        if let Some(Glance { stored, .. }) = self.equal_at.take() {
            self.sent_last = stored;
        }
        if let Ok(stored) = self.store.count_dead_letters().await {
            self.metrics.dead_letters_unsent.set(stored.saturating_sub(self.sent_last) as i64);
        }
    }

    /// Makes the stream equal to the store.
    async fn level(&mut self) -> Result<(), RelayError> {
        let mut connection = self.connection().await?;
        if self.equal_at.is_some() && self.equal_at == Some(self.glance(&mut connection).await?) {
            return Ok(());
        }
        let letters = self.letters().await?;
        let index: Vec<String> = timely(redis::cmd("HKEYS").arg(self.index()).query_async(&mut connection)).await?;
        let Difference { missing, surplus } = difference(&self.origin, letters.keys(), &index);
        self.metrics.dead_letters_unsent.set(missing.len() as i64);
        for name in surplus {
            let mut call = self.remove.prepare_invoke();
            call.key(&self.config.stream).key(self.index()).arg(name);
            timely(call.invoke_async::<u8>(&mut connection)).await?;
        }
        for sequence in missing {
            let Some(letter) = letters.get(&sequence) else { continue };
            let mut call = self.add.prepare_invoke();
            call.key(&self.config.stream).key(self.index()).arg(name(&self.origin, sequence));
            for (field, value) in fields(letter) {
                call.arg(field).arg(value);
            }
            timely(call.invoke_async::<u8>(&mut connection)).await?;
            self.metrics.dead_letters_unsent.dec();
        }
        // What changes from here on is seen at the next glance.
        let newest = letters.last_key_value().map(|(sequence, _)| *sequence);
        let sent = self.glance(&mut connection).await?.sent;
        self.equal_at = Some(Glance { newest, stored: letters.len() as u64, sent });
        Ok(())
    }

    async fn glance(&self, connection: &mut MultiplexedConnection) -> Result<Glance, RelayError> {
        let newest = self.store.list_dead_letters(DeadLetterQuery { limit: 1, ..DeadLetterQuery::default() }).await?;
        Ok(Glance {
            newest: newest.dead_letters.first().map(|letter| letter.sequence),
            stored: self.store.count_dead_letters().await?,
            sent: timely(redis::cmd("HLEN").arg(self.index()).query_async(connection)).await?,
        })
    }

    /// Returns the letters of the store, by their sequence.
    async fn letters(&self) -> Result<BTreeMap<u64, DeadLetter>, StoreError> {
        let mut letters = BTreeMap::new();
        let mut before = None;
        loop {
            let query = DeadLetterQuery { before, limit: PAGE_MAX, ..DeadLetterQuery::default() };
            let page = self.store.list_dead_letters(query).await?;
            letters.extend(page.dead_letters.into_iter().map(|letter| (letter.sequence, letter)));
            before = page.next;
            if before.is_none() {
                return Ok(letters);
            }
        }
    }

    async fn connection(&mut self) -> Result<MultiplexedConnection, RelayError> {
        if let Some(connection) = &self.connection {
            return Ok(connection.clone());
        }
        let connection = connect(&self.config).await?;
        Ok(self.connection.insert(connection).clone())
    }

    /// The index's key has the stream's hash tag, so that a cluster keeps both on one node.
    fn index(&self) -> String {
        format!("{{{}}}:index", self.config.stream)
    }
}

async fn connect(config: &RedisConfig) -> Result<MultiplexedConnection, RelayError> {
    let Some(url) = &config.url else { return Err(RelayError::Silent) };
    let mut info = url.info();
    if let Some(file) = &config.password_file {
        let text = tokio::fs::read_to_string(file).await;
        let text = text.map_err(|error| RelayError::Password(file.clone(), error))?;
        let settings = info.redis_settings().clone().set_password(text.trim());
        info = info.set_redis_settings(settings);
    }
    let limits = AsyncConnectionConfig::new().set_connection_timeout(Some(WITHIN)).set_response_timeout(Some(WITHIN));
    timely(Client::open(info)?.get_multiplexed_async_connection_with_config(&limits)).await
}

/// Waits for Redis, but not for longer than [`WITHIN`].
async fn timely<T>(answer: impl Future<Output = Result<T, RedisError>>) -> Result<T, RelayError> {
    time::timeout(WITHIN, answer).await.map_err(|_| RelayError::Silent)?.map_err(RelayError::from)
}

/// Compares the letters in the store with the names in the index. Letters of other origins are left alone.
fn difference<'a>(origin: &str, stored: impl Iterator<Item = &'a u64>, index: &[String]) -> Difference {
    let stored: BTreeMap<String, u64> = stored.map(|sequence| (name(origin, *sequence), *sequence)).collect();
    let sent: BTreeSet<&str> = index.iter().map(String::as_str).filter(|name| name.starts_with(origin)).collect();
    let mut missing: Vec<u64> =
        stored.iter().filter(|(name, _)| !sent.contains(name.as_str())).map(|(_, sequence)| *sequence).collect();
    missing.sort_unstable();
    let surplus = sent.into_iter().filter(|name| !stored.contains_key(*name)).map(str::to_owned).collect();
    Difference { missing, surplus }
}

/// Returns the name of a letter in the index.
fn name(origin: &str, sequence: u64) -> String {
    format!("{origin}{sequence}")
}

/// Returns the fields of a letter's entry. The request is not among them, because it is sealed in the store.
fn fields(letter: &DeadLetter) -> [(&'static str, Vec<u8>); 5] {
    let letter = DeadLetter { request: None, ..letter.clone() };
    [
        ("correlationId", letter.correlation_id.to_string().into_bytes()),
        ("tenantId", letter.tenant_id.to_string().into_bytes()),
        ("model", letter.model.to_string().into_bytes()),
        ("errorCode", letter.error_code.as_str().as_bytes().to_vec()),
        ("letter", codec::encode(&letter)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_sent_or_removed_and_others_letters_stay() {
        let index = ["a:1", "a:2", "b:7"].map(str::to_owned);
        let found = difference("a:", [2, 3, 10].iter(), &index);
        assert_eq!(found, Difference { missing: vec![3, 10], surplus: vec!["a:1".to_owned()] });
        let after_a_wipe = difference("a:", [2, 3, 10].iter(), &[]);
        assert_eq!(after_a_wipe, Difference { missing: vec![2, 3, 10], surplus: vec![] });
    }
}
