//! Answers that several calls may read: those of jobs whose clients may ask for them again.
//!
//! A job writes its chunks here, and each call reads them from the first one on, at its own pace. The job goes on for a
//! while when nobody reads, and its answer stays for a while after its end.

use std::collections::hash_map::{Entry, HashMap};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use metadata_store::JobKey;
use parking_lot::Mutex;
use protocol::infer::{Degraded, Origin};
use protocol::quota::QuotaState;
use protocol::usage::TokenUsage;
use protocol::{ErrorCode, TenantId, UnixMillis, WireError};
use tokio::sync::watch;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

/// Bytes of an answer up to which it is kept whole.
pub(crate) const ANSWER_BYTES_MAX: usize = 8 << 20;
/// Bytes of all running answers together up to which they are kept whole.
const ANSWERS_BYTES_MAX: usize = 256 << 20;

/// Bytes of ended answers that are dropped together if there is no room for a running one.
const EVICTED_AT_ONCE: usize = ANSWERS_BYTES_MAX / 16;

/// The most jobs of a tenant that go on without a reader. Nobody pays for what nobody reads.
const LINGERING_MAX: usize = 16;
/// How long an answer stays after its end.
const STAYS: Duration = Duration::from_mins(1);

/// The answers that run or have ended lately.
#[derive(Default)]
pub(crate) struct Answers {
    answers: Mutex<HashMap<JobKey, Arc<Shared>>>,
    bytes: Arc<AtomicUsize>,
    /// The jobs of each tenant that go on without a reader.
    lingering: Mutex<HashMap<TenantId, usize>>,
}

/// What a call finds under its key.
pub(crate) enum Found {
    /// No answer: the call is to run the job.
    Nothing(Writer, Reader),
    Answer(Reader),
    /// The answer of another request.
    Other,
    /// A call of another request is finding out whether the job of this key is known.
    Undecided(Undecided),
}

/// A key whose first call has not begun its job yet.
pub(crate) struct Undecided(watch::Receiver<State>);

impl Undecided {
    /// Waits until it is known whether the call runs a job.
    pub(crate) async fn decided(mut self) {
        let _ = self.0.wait_for(State::is_decided).await;
    }
}

impl State {
    fn is_decided(&self) -> bool {
        self.origin.is_some() || self.end.is_some()
    }

    /// Returns whether a chunk has no room in an answer that nobody reads.
    fn is_overfull(&self, bytes: usize) -> bool {
        self.readers.is_empty() && self.bytes + bytes > ANSWER_BYTES_MAX
    }
}

/// What an answer holds.
struct Held {
    key: JobKey,
    bytes: usize,
    ended_at: Option<Instant>,
}

/// Chooses ended answers of together at least `bytes`, as far as there are such: always the oldest of the tenant that
/// holds most then. Pure.
fn victims(answers: Vec<Held>, tenant_id: &TenantId, bytes: usize) -> Vec<JobKey> {
    let mut totals = HashMap::<TenantId, usize>::new();
    let mut ended = HashMap::<TenantId, Vec<(Instant, JobKey, usize)>>::new();
    for Held { key, bytes, ended_at } in answers {
        *totals.entry(key.tenant_id.clone()).or_default() += bytes;
        if let Some(ended_at) = ended_at {
            ended.entry(key.tenant_id.clone()).or_default().push((ended_at, key, bytes));
        }
    }
    for answers in ended.values_mut() {
        // The oldest last.
        answers.sort_by(|one, other| (other.0, &other.1).cmp(&(one.0, &one.1)));
    }
    let (mut victims, mut freed) = (vec![], 0);
    while freed < bytes {
        ended.retain(|_, answers| !answers.is_empty());
        let Some(most) = ended.keys().max_by_key(|tenant| (totals[*tenant], *tenant)).cloned() else { break };
        if totals[&most] < totals.get(tenant_id).copied().unwrap_or_default() {
            break;
        }
        if let Some((_, key, bytes)) = ended.get_mut(&most).and_then(Vec::pop) {
            totals.entry(most).and_modify(|total| *total -= bytes);
            freed += bytes;
            victims.push(key);
        }
    }
    victims
}

impl Shared {
    fn held(&self, key: &JobKey) -> Held {
        let state = self.state.borrow();
        Held { key: key.clone(), bytes: state.bytes, ended_at: state.ended_at }
    }
}

struct Shared {
    fingerprint: [u8; 32],
    state: watch::Sender<State>,
    /// The bytes of all answers, to which it adds its own.
    bytes: Arc<AtomicUsize>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.bytes.fetch_sub(self.state.borrow().bytes, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct State {
    /// The chunks that are kept, and what is billed if a caller has read up to their end.
    chunks: VecDeque<(Bytes, TokenUsage)>,
    /// Number of the first of them. It is above 0 if the answer was too long to be kept whole.
    first: usize,
    bytes: usize,
    /// The last chunk without a part of the answer, unless a part followed it.
    progress_chunk: Option<Bytes>,
    /// How many chunks without a part of the answer there were.
    progress: u64,
    origin: Option<Origin>,
    quota: Option<QuotaState>,
    degraded: Option<Degraded>,
    end: Option<Result<(), WireError>>,
    ended_at: Option<Instant>,
    /// For each reader, the number of the next chunk it reads.
    readers: BTreeMap<u64, usize>,
    readers_so_far: u64,
    /// When the last reader left.
    left_at: Option<Instant>,
    /// What the reader that read most has acknowledged.
    read: TokenUsage,
    /// Whether the job waits for a reader that has read everything.
    wants_receipt: bool,
    has_receipt: bool,
    /// Whether the job waits for its readers, because the answer is too long to be kept whole.
    is_full: bool,
}

impl Answers {
    /// Finds the answer of a job, or begins one.
    pub(crate) fn enter(self: &Arc<Self>, key: &JobKey, fingerprint: [u8; 32]) -> Found {
        let mut answers = self.answers.lock();
        match answers.entry(key.clone()) {
            Entry::Occupied(entry) if entry.get().fingerprint != fingerprint => {
                let state = entry.get().state.subscribe();
                if state.borrow().is_decided() { Found::Other } else { Found::Undecided(Undecided(state)) }
            }
            Entry::Occupied(entry) => Found::Answer(Reader::new(entry.get().clone(), false)),
            Entry::Vacant(entry) => {
                let (state, bytes) = (watch::Sender::new(State::default()), self.bytes.clone());
                let shared = Arc::new(Shared { fingerprint, state, bytes });
                entry.insert(shared.clone());
                let reader = Reader::new(shared.clone(), true);
                Found::Nothing(Writer { answers: self.clone(), key: key.clone(), shared }, reader)
            }
        }
    }

    /// Returns a reader of a job's answer, if it runs or has ended lately.
    pub(crate) fn reader(&self, key: &JobKey) -> Option<Reader> {
        self.answers.lock().get(key).map(|shared| Reader::new(shared.clone(), false))
    }

    /// Returns whether a job runs or has ended lately.
    pub(crate) fn has(&self, key: &JobKey) -> bool {
        self.answers.lock().contains_key(key)
    }

    /// Forgets an answer. Those who read it go on.
    pub(crate) fn remove(&self, key: &JobKey) {
        self.answers.lock().retain(|known, shared| known != key || shared.state.borrow().end.is_none());
    }

    /// Drops old answers until `stop` is cancelled.
    pub(crate) async fn run(&self, stop: CancellationToken) {
        let mut ticks = time::interval(STAYS / 6);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.sweep();
        }
    }

    /// Drops the answers whose time after their end is over.
    fn sweep(&self) {
        let now = Instant::now();
        self.drop_ended(|ended_at| now.duration_since(ended_at) >= STAYS);
    }

    fn drop_ended(&self, is_over: impl Fn(Instant) -> bool) {
        self.answers.lock().retain(|_, shared| !shared.state.borrow().ended_at.is_some_and(&is_over));
    }

    /// Drops ended answers so that a tenant's job may go on: of the tenants that hold most first, and never of one that
    /// holds less than this one.
    fn evict(&self, tenant_id: &TenantId) {
        let mut answers = self.answers.lock();
        let held: Vec<Held> = answers.iter().map(|(key, shared)| shared.held(key)).collect();
        for key in victims(held, tenant_id, EVICTED_AT_ONCE) {
            answers.remove(&key);
        }
    }
}

/// The job's end of an answer. When it is dropped, a complete answer stays for a while, and any other gives way to the
/// next job of its key.
pub(crate) struct Writer {
    answers: Arc<Answers>,
    key: JobKey,
    shared: Arc<Shared>,
}

impl Writer {
    /// Says where the answer comes from. Called once, before its first chunk.
    pub(crate) fn begin(&self, origin: Origin) {
        self.shared.state.send_modify(|state| state.origin = Some(origin));
    }

    /// Says what is left of the tenant's tokens. Called at most once, before the first chunk.
    pub(crate) fn tell_quota(&self, quota: QuotaState) {
        self.shared.state.send_modify(|state| state.quota = Some(quota));
    }

    /// Says how the job was made cheaper, or that it no longer is. Called before the first chunk.
    pub(crate) fn tell_degraded(&self, degraded: Option<Degraded>) {
        self.shared.state.send_modify(|state| state.degraded = degraded);
    }

    /// Adds a chunk. Waits for the readers if the answer is too long to be kept whole. Cancel safe.
    pub(crate) async fn push(&self, chunk: Bytes, usage: TokenUsage) {
        let mut watcher = self.shared.state.subscribe();
        while !self.make_room(chunk.len()) {
            // Those that have ended give way first.
            if self.answers.bytes.load(Ordering::Relaxed) + chunk.len() > ANSWERS_BYTES_MAX {
                self.answers.evict(&self.key.tenant_id);
                if self.make_room(chunk.len()) {
                    break;
                }
            }
            if watcher.changed().await.is_err() {
                return;
            }
        }
        self.put(chunk, usage);
    }

    /// Returns whether a chunk has no room in an answer that nobody reads.
    pub(crate) fn is_overfull(&self, bytes: usize) -> bool {
        self.shared.state.borrow().is_overfull(bytes)
    }

    /// Waits until a chunk has no room and nobody reads. Cancel safe.
    pub(crate) async fn overfull(&self, bytes: usize) {
        let _ = self.shared.state.subscribe().wait_for(|state| state.is_overfull(bytes)).await;
    }

    /// Adds a chunk at once.
    pub(crate) fn put(&self, chunk: Bytes, usage: TokenUsage) {
        self.answers.bytes.fetch_add(chunk.len(), Ordering::Relaxed);
        self.shared.state.send_modify(|state| {
            state.bytes += chunk.len();
            state.chunks.push_back((chunk, usage));
            // Progress has the number of the chunk that it precedes.
            state.progress_chunk = None;
        });
    }

    /// Drops chunks that all readers have read, if there is no room for a further one. Returns whether there is room.
    fn make_room(&self, bytes: usize) -> bool {
        let mut has_room = false;
        self.shared.state.send_if_modified(|state| {
            let slowest = state.readers.values().copied().min().unwrap_or(state.first);
            loop {
                let total = self.answers.bytes.load(Ordering::Relaxed);
                has_room = state.chunks.is_empty()
                    || (state.bytes + bytes <= ANSWER_BYTES_MAX && total + bytes <= ANSWERS_BYTES_MAX);
                state.is_full = !has_room;
                if has_room || state.first >= slowest {
                    return false;
                }
                let Some((chunk, _)) = state.chunks.pop_front() else { return false };
                state.first += 1;
                state.bytes -= chunk.len();
                self.answers.bytes.fetch_sub(chunk.len(), Ordering::Relaxed);
            }
        });
        has_room
    }

    /// Tells the readers of progress.
    pub(crate) fn progress(&self, chunk: Bytes) {
        self.shared.state.send_modify(|state| {
            state.progress += 1;
            state.progress_chunk = Some(chunk);
        });
    }

    /// Waits until nobody has read for `linger`, or too many jobs of the tenant have no reader. Cancel safe.
    pub(crate) async fn abandoned(&self, linger: Duration) {
        let mut watcher = self.shared.state.subscribe();
        loop {
            let left_at = {
                let state = watcher.borrow_and_update();
                state.left_at.filter(|_| state.readers.is_empty())
            };
            let permit = left_at.map(|_| Lingering::enter(&self.answers, &self.key.tenant_id));
            if matches!(permit, Some(None)) {
                return;
            }
            let over = async {
                match left_at {
                    Some(left_at) => time::sleep_until(left_at + linger).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = watcher.changed() => if changed.is_err() { return },
                () = over => return,
            }
        }
    }

    /// Returns what the reader that read most has acknowledged.
    pub(crate) fn read(&self) -> TokenUsage {
        self.shared.state.borrow().read
    }

    /// Returns whether the answer is kept whole, so that its readers may come later.
    pub(crate) fn is_whole(&self) -> bool {
        self.shared.state.borrow().first == 0
    }

    /// Waits until a reader has acknowledged everything, unless the answer is kept whole.
    pub(crate) async fn wait_until_read(&self) {
        if self.is_whole() {
            return;
        }
        self.shared.state.send_modify(|state| state.wants_receipt = true);
        let _ = self.shared.state.subscribe().wait_for(|state| state.has_receipt).await;
    }

    /// Returns the chunks so far.
    pub(crate) fn chunks(&self) -> Vec<Bytes> {
        self.shared.state.borrow().chunks.iter().map(|(chunk, _)| chunk.clone()).collect()
    }

    pub(crate) fn created_at(&self) -> Option<UnixMillis> {
        self.shared.state.borrow().origin.map(|origin| origin.created_at)
    }

    /// Ends the answer for all its readers. Only the first end counts.
    pub(crate) fn end(&self, end: Result<(), WireError>) {
        self.shared.state.send_modify(|state| {
            state.end.get_or_insert(end);
        });
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut answers = self.answers.answers.lock();
        let mut stays = false;
        self.shared.state.send_modify(|state| {
            stays = state.end == Some(Ok(())) && state.first == 0;
            state.ended_at = stays.then(Instant::now);
            // Its readers wait for an end, also if the job panicked.
            state.end.get_or_insert_with(|| Err(WireError::new(ErrorCode::InternalError, "the job was dropped")));
        });
        if !stays {
            answers.remove(&self.key);
        }
    }
}

/// A job that goes on without a reader.
struct Lingering<'a> {
    answers: &'a Answers,
    tenant_id: &'a TenantId,
}

impl<'a> Lingering<'a> {
    fn enter(answers: &'a Answers, tenant_id: &'a TenantId) -> Option<Self> {
        let mut lingering = answers.lingering.lock();
        let jobs = lingering.entry(tenant_id.clone()).or_default();
        if *jobs >= LINGERING_MAX {
            return None;
        }
        *jobs += 1;
        Some(Self { answers, tenant_id })
    }
}

impl Drop for Lingering<'_> {
    fn drop(&mut self) {
        let mut lingering = self.answers.lingering.lock();
        if let Some(jobs) = lingering.get_mut(self.tenant_id) {
            *jobs -= 1;
            if *jobs == 0 {
                lingering.remove(self.tenant_id);
            }
        }
    }
}

/// What a reader reads next.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Next {
    Chunk(Bytes, TokenUsage),
    Progress(Bytes),
    /// The job waits until the reader's caller has acknowledged everything.
    Receipt,
    /// The answer is not kept whole, and the reader came too late.
    TooLate,
    End(Result<(), WireError>),
}

/// A call's end of an answer.
pub(crate) struct Reader {
    shared: Arc<Shared>,
    watcher: watch::Receiver<State>,
    id: u64,
    position: usize,
    progress: u64,
    has_sent_receipt: bool,
    /// Whether the answer had ended when the reader came.
    came_after_end: bool,
    /// Whether its call runs the job.
    is_first: bool,
}

impl Reader {
    fn new(shared: Arc<Shared>, is_first: bool) -> Self {
        let (mut id, came_after_end) = (0, shared.state.borrow().end.is_some());
        shared.state.send_if_modified(|state| {
            state.readers_so_far += 1;
            id = state.readers_so_far;
            state.readers.insert(id, 0);
            false
        });
        let watcher = shared.state.subscribe();
        Self { shared, watcher, id, position: 0, progress: 0, has_sent_receipt: false, came_after_end, is_first }
    }

    /// Waits for what comes next. Cancel safe.
    pub(crate) async fn next(&mut self) -> Next {
        loop {
            if let Some(next) = self.ready() {
                return next;
            }
            if self.watcher.changed().await.is_err() {
                // The reader itself keeps the sender.
                return Next::TooLate;
            }
        }
    }

    fn ready(&mut self) -> Option<Next> {
        let state = self.watcher.borrow_and_update();
        if self.position < state.first {
            return Some(Next::TooLate);
        }
        if let Some((chunk, usage)) = state.chunks.get(self.position - state.first) {
            self.position += 1;
            return Some(Next::Chunk(chunk.clone(), *usage));
        }
        if let Some(end) = &state.end {
            return Some(Next::End(end.clone()));
        }
        if state.wants_receipt && !self.has_sent_receipt {
            self.has_sent_receipt = true;
            return Some(Next::Receipt);
        }
        let chunk = state.progress_chunk.clone().filter(|_| state.progress > self.progress)?;
        self.progress = state.progress;
        Some(Next::Progress(chunk))
    }

    /// Returns where the answer comes from, once its first chunk was read.
    pub(crate) fn origin(&self) -> Option<Origin> {
        let origin = self.shared.state.borrow().origin?;
        let replayed = origin.replayed || self.came_after_end;
        Some(Origin { replayed, attached: !replayed && !self.is_first, ..origin })
    }

    /// Returns what was left of the tenant's tokens when the job began.
    pub(crate) fn quota(&self) -> Option<QuotaState> {
        self.shared.state.borrow().quota
    }

    /// Returns how the job was made cheaper.
    pub(crate) fn degraded(&self) -> Option<Degraded> {
        self.shared.state.borrow().degraded.clone()
    }

    /// Records what the caller has acknowledged, in all.
    pub(crate) fn acknowledge(&self, usage: TokenUsage) {
        let position = self.position;
        self.shared.state.send_if_modified(|state| {
            if usage.total_tokens() > state.read.total_tokens() {
                state.read = usage;
            }
            state.readers.insert(self.id, position);
            state.is_full
        });
    }

    /// Records that the caller has acknowledged everything that the job waits for.
    pub(crate) fn receipt(&self) {
        self.shared.state.send_modify(|state| state.has_receipt = true);
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.shared.state.send_modify(|state| {
            state.readers.remove(&self.id);
            state.left_at = Some(Instant::now());
        });
    }
}

/// Writes an answer as the bytes that are sealed and stored.
pub(crate) fn encode(created_at: UnixMillis, chunks: &[Bytes]) -> Vec<u8> {
    let bytes: usize = chunks.iter().map(|chunk| chunk.len() + 4).sum();
    let mut encoded = Vec::with_capacity(8 + bytes);
    encoded.extend_from_slice(&created_at.0.to_be_bytes());
    for chunk in chunks {
        encoded.extend_from_slice(&(chunk.len() as u32).to_be_bytes());
        encoded.extend_from_slice(chunk);
    }
    encoded
}

/// Reads what [`encode`] wrote. Returns `None` if it is malformed.
pub(crate) fn decode(encoded: Vec<u8>) -> Option<(UnixMillis, Vec<Bytes>)> {
    let mut rest = Bytes::from(encoded);
    let take = |rest: &mut Bytes, bytes: usize| (rest.len() >= bytes).then(|| rest.split_to(bytes));
    let created_at = u64::from_be_bytes(take(&mut rest, 8)?[..].try_into().ok()?);
    let mut chunks = vec![];
    while !rest.is_empty() {
        let bytes = u32::from_be_bytes(take(&mut rest, 4)?[..].try_into().ok()?);
        chunks.push(take(&mut rest, bytes as usize)?);
    }
    Some((UnixMillis(created_at), chunks))
}

#[cfg(test)]
mod tests;
