//! The worker's side of one engine process.

mod inbox;
mod last_words;
mod queries;

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{FrameError, Reply, ToChild, encode};
use super::pipe::{FRAMES_MAX, FrameReader, write_frames};
use super::spawn::{Spawned, spawn};
use super::stall_watch::{self, StallWatch};
use super::{CREDIT, ChildCommand, handover};
use crate::model_runtime::{
    EngineError, Event, GenerateRequest, GenerateSink, GenerateStream, LoadOptions, LoadSnapshot, LoadedModel, ModelId,
    ProgressSink, RuntimeInfo, VerifiedArtifact, unsupported,
};
use inbox::Inbox;
use last_words::LastWords;

/// The time limit for admitting a generation or replying to a query.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);
/// The time limit for exiting once the socket is closed.
const EXIT_WITHIN: Duration = Duration::from_secs(2);
/// The number of consumed events after which they are acknowledged; well below the credit, so that nothing stalls.
const ACKNOWLEDGE_EVERY: u32 = 64;
/// The number of events that wait for a reader, in addition to those in flight.
const READER_EVENTS_MAX: usize = 32;

type Item = Result<Event, EngineError>;

/// A running engine process, and its model once it is loaded.
pub(super) struct EngineProcess {
    pub(super) pid: u32,
    /// The socket for files that frames refer to. It is locked until the frame is queued, so that files and frames
    /// keep the same order.
    files: Mutex<StdUnixStream>,
    outgoing: mpsc::Sender<Vec<u8>>,
    next_number: AtomicU64,
    state: Mutex<State>,
    kill: CancellationToken,
    gone: CancellationToken,
    tasks: TaskTracker,
}

struct State {
    /// Why no more requests are accepted.
    closed: Option<EngineError>,
    generations: HashMap<u64, Generation>,
    queries: HashMap<u64, oneshot::Sender<Result<Reply, EngineError>>>,
    snapshot: Option<LoadSnapshot>,
    heard: u64,
    /// Whether a request was sent since the last frame arrived.
    expects_reply: bool,
}

struct Generation {
    admitted: Option<oneshot::Sender<Result<(), EngineError>>>,
    events: mpsc::Sender<Item>,
    /// Whether prefill has started. Before, the generation waits for a slot.
    started: bool,
    /// Events that arrived and were not acknowledged. At [`CREDIT`], the process waits for the reader.
    unacknowledged: usize,
}

/// The state of a running load.
pub(super) struct Loading {
    pub(super) progress: ProgressSink,
    pub(super) loaded: oneshot::Sender<Result<(LoadedModel, RuntimeInfo), EngineError>>,
    /// How long the engine may hang after the load.
    pub(super) stall_timeout: Duration,
}

/// Why the frames of a process ended.
enum Ending {
    Closed,
    /// The worker ended the process.
    Killed,
    /// The process sent an invalid message, or it hangs.
    Fault(String),
}

impl EngineProcess {
    /// Starts a process and begins to load. `gone` is called when the process has ended, before anyone is notified.
    pub(super) fn start(
        command: &ChildCommand,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        loading: Loading,
        kill: CancellationToken,
        tasks: &TaskTracker,
        gone: impl FnOnce() + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let Spawned { mut child, frames, files } = spawn(command)?;
        handover::send(&files, &artifact)?;
        let load =
            encode(&ToChild::Load { options, files: handover::describe(&artifact) }).map_err(io::Error::other)?;
        drop(artifact);
        let pid = child.id().unwrap_or_default();
        let (reading, writing) = frames.into_split();
        let (outgoing, queue) = mpsc::channel(FRAMES_MAX);
        tasks.spawn(write_frames(queue, writing));
        let last_words = LastWords::default();
        let stderr = child.stderr.take().map(|stderr| tasks.spawn(last_words.clone().listen(stderr, pid)));
        // The queue is empty, so this cannot fail.
        let _ = outgoing.try_send(load);
        let state = State {
            closed: None,
            generations: HashMap::new(),
            queries: HashMap::new(),
            snapshot: None,
            heard: 0,
            expects_reply: false,
        };
        let process = Arc::new(Self {
            pid,
            files: Mutex::new(files),
            outgoing,
            next_number: AtomicU64::new(1),
            state: Mutex::new(state),
            kill,
            gone: CancellationToken::new(),
            tasks: tasks.clone(),
        });
        let supervised = Arc::clone(&process);
        let stall_limit = loading.stall_timeout;
        tasks.spawn(async move {
            let mut inbox = Inbox { process: &supervised, loading: Some(loading), info: None };
            let ending = tokio::select! {
                ending = inbox.read(FrameReader::new(reading)) => ending,
                () = supervised.kill.cancelled() => Ending::Killed,
                stall = supervised.stall(stall_limit) => Ending::Fault(stall),
            };
            let Inbox { loading, info, .. } = inbox;
            let status = reap(child, &ending).await;
            // The last lines may still be in the pipe. A grandchild that holds the pipe open must not block this
            // task.
            if let Some(stderr) = stderr {
                let _ = time::timeout(Duration::from_millis(500), stderr).await;
            }
            let reason = explain(pid, &ending, status, last_words.telling());
            // The process is closed first, so that it cannot be added to the list after it was removed.
            let has_crashed = has_crashed(&ending, status);
            let end = if !has_crashed && is_signalled(&ending, status) {
                EngineError::Killed { reason: reason.clone() }
            } else {
                EngineError::Failed { reason: reason.clone() }
            };
            let was_closed = supervised.state().closed.replace(end);
            let crash = (was_closed.is_none() && has_crashed).then(|| reason.clone());
            if let Some(error) = was_closed {
                supervised.state().closed = Some(error);
            }
            gone();
            if let Some(Loading { loaded, .. }) = loading {
                let _ = loaded.send(Err(blame(reason.clone(), info.is_some(), &ending, status)));
            }
            supervised.end_all(crash);
            supervised.gone.cancel();
        });
        Ok(process)
    }

    /// Lets the caller add the process to its list, unless the process has ended.
    pub(super) fn enlist(self: &Arc<Self>, enter: impl FnOnce(Arc<Self>)) {
        // Under this lock, because a process is closed before it is removed from the list.
        let state = self.state();
        if state.closed.is_none() {
            enter(Arc::clone(self));
        }
    }

    /// Returns the load of the model, under its id in this runtime.
    pub(super) fn snapshot(&self, model: ModelId) -> Option<LoadSnapshot> {
        let state = self.state();
        let mut snapshot = state.snapshot.clone()?;
        snapshot.model = model;
        // Requests that were just sent are not in the last report yet.
        let active = (state.generations.len() as u32).max(snapshot.running + snapshot.waiting);
        snapshot.running = active.min(snapshot.slots);
        snapshot.waiting = active - snapshot.running;
        Some(snapshot)
    }

    pub(super) async fn generate(self: &Arc<Self>, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let id = self.number();
        let frame = encode(&ToChild::Generate { id, request: Box::new(request) })
            .map_err(|error| too_long("messages", &error))?;
        let (admitted, is_admitted) = oneshot::channel();
        // Capacity for all events that may be in flight, and for the end.
        let (events, incoming) = mpsc::channel(CREDIT + 2);
        {
            let mut state = self.state();
            if let Some(error) = &state.closed {
                return Err(error.clone());
            }
            state
                .generations
                .insert(id, Generation { admitted: Some(admitted), events, started: false, unacknowledged: 0 });
            state.expects_reply = true;
        }
        let (sink, stream) = GenerateStream::channel(READER_EVENTS_MAX);
        // From here on, dropping the stream cancels the generation; the queue keeps the two frames in order.
        if self.outgoing.try_send(frame).is_err() {
            self.state().generations.remove(&id);
            return Err(EngineError::Busy);
        }
        self.tasks.spawn(Arc::clone(self).relay(id, incoming, sink));
        match time::timeout(RESPONSE_TIMEOUT, is_admitted).await {
            Ok(Ok(admitted)) => admitted.map(|()| stream),
            Ok(Err(_)) => Err(EngineError::NotLoaded),
            Err(_) => Err(timed_out(RESPONSE_TIMEOUT)),
        }
    }

    /// Asks the process to end, kills it after `timeout`, and returns when it has ended.
    pub(super) async fn unload(&self, timeout: Duration) {
        self.state().closed.get_or_insert(EngineError::NotLoaded);
        if let Ok(frame) = encode(&ToChild::Unload) {
            let _ = self.outgoing.try_send(frame);
        }
        if time::timeout(timeout, self.gone.cancelled()).await.is_err() {
            self.kill.cancel();
            // A killed process ends at once, unless the kernel itself is stuck.
            let _ = time::timeout(EXIT_WITHIN, self.gone.cancelled()).await;
        }
    }

    fn state(&self) -> parking_lot::MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Waits until the engine or the whole process has hung for `limit`, and returns what is wrong.
    async fn stall(&self, limit: Duration) -> String {
        let (mut engine, mut process) = (StallWatch::default(), StallWatch::default());
        loop {
            time::sleep(limit / stall_watch::LOOKS).await;
            let state = self.state();
            // Until the model is loaded, the load has a time limit of its own.
            let Some(snapshot) = &state.snapshot else { continue };
            if engine.is_stalled(state.engine_owes(), snapshot.beats) {
                return format!("its engine made no progress for {limit:?}");
            }
            if process.is_stalled(state.process_owes(), state.heard) {
                return format!("it did not answer for {limit:?}");
            }
        }
    }

    fn number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Relays the events of one generation at the reader's pace (backpressure).
    async fn relay(self: Arc<Self>, id: u64, mut incoming: mpsc::Receiver<Item>, sink: GenerateSink) {
        let read = async {
            let mut consumed = 0;
            while let Some(item) = incoming.recv().await {
                if sink.events.send(item).await.is_err() {
                    return;
                }
                consumed += 1;
                if consumed == ACKNOWLEDGE_EVERY {
                    if let Some(generation) = self.state().generations.get_mut(&id) {
                        generation.unacknowledged = generation.unacknowledged.saturating_sub(consumed as usize);
                    }
                    self.tell(&ToChild::Acknowledge { id, events: consumed }).await;
                    consumed = 0;
                }
            }
        };
        // A reader that goes away closes its queue and cancels, and either may be noticed first. A generation that
        // has ended is no longer in the list.
        sink.cancelled.run_until_cancelled(read).await;
        if self.state().generations.remove(&id).is_some() {
            self.tell(&ToChild::Cancel { id }).await;
        }
    }

    async fn tell(&self, message: &ToChild) {
        if let Ok(frame) = encode(message) {
            // If the writer has ended, the process is gone, which its supervisor notices.
            let _ = self.outgoing.send(frame).await;
        }
    }

    /// Fails all requests to this process, once it is closed. A crash is attributed only to requests that the process
    /// was working on.
    fn end_all(&self, crash: Option<String>) {
        let (generations, queries, suspected, error) = {
            let mut state = self.state();
            let error = state.closed.clone().unwrap_or(EngineError::NotLoaded);
            let suspected = state.worked_on();
            (std::mem::take(&mut state.generations), std::mem::take(&mut state.queries), suspected, error)
        };
        let suspects = (suspected.len() + queries.len()) as u32;
        let crashed = crash.map_or_else(|| error.clone(), |reason| EngineError::Crashed { reason, suspects });
        for (id, Generation { admitted, events, .. }) in generations {
            let error = if suspected.contains(&id) { &crashed } else { &error }.clone();
            match admitted {
                Some(admitted) => drop(admitted.send(Err(error))),
                None => drop(events.try_send(Err(error))),
            }
        }
        for query in queries.into_values() {
            let _ = query.send(Err(crashed.clone()));
        }
    }
}

impl State {
    /// Returns whether the process owes a message: while it is busy, it reports its state several times a second.
    fn process_owes(&self) -> bool {
        self.expects_reply || !self.generations.is_empty() || !self.queries.is_empty()
    }

    /// Returns the generations that the process was working on: those being admitted and those that have started. Of
    /// the others it includes the oldest, up to the number of slots, because their start events may have been lost
    /// with the process.
    fn worked_on(&self) -> HashSet<u64> {
        let mut begun = HashSet::new();
        let mut waiting = Vec::new();
        for (id, generation) in &self.generations {
            if generation.admitted.is_some() || generation.started {
                begun.insert(*id);
            } else {
                waiting.push(*id);
            }
        }
        waiting.sort_unstable();
        let slots = self.snapshot.as_ref().map_or(0, |snapshot| snapshot.slots as usize);
        let running = self.generations.values().filter(|generation| generation.started).count();
        begun.extend(waiting.into_iter().take(slots.saturating_sub(running)));
        begun
    }

    /// Returns whether the engine has work that waits for nobody else.
    fn engine_owes(&self) -> bool {
        let Some(snapshot) = &self.snapshot else { return false };
        // Generations with slow readers pause, and others may wait for their slots.
        let paused = self.generations.values().filter(|generation| generation.unacknowledged >= CREDIT).count();
        // Cancelled generations are no longer listed here, but a working engine drops them within one step.
        snapshot.running as usize > paused || (snapshot.running == 0 && snapshot.waiting > 0)
    }
}

async fn reap(mut child: Child, ending: &Ending) -> Option<ExitStatus> {
    if let Ending::Closed = ending
        && let Ok(status) = time::timeout(EXIT_WITHIN, child.wait()).await
    {
        return status.ok();
    }
    let _ = child.start_kill();
    child.wait().await.ok()
}

fn explain(pid: u32, ending: &Ending, status: Option<ExitStatus>, last_words: Option<String>) -> String {
    let how = match (ending, status) {
        (Ending::Killed, _) => "was ended by its worker".to_owned(),
        (Ending::Fault(fault), _) => format!("was ended because {fault}"),
        (Ending::Closed, Some(status)) => format!("ended ({status})"),
        (Ending::Closed, None) => "ended".to_owned(),
    };
    match last_words {
        Some(words) => format!("engine process {pid} {how}: {words}"),
        None => format!("engine process {pid} {how}"),
    }
}

/// Returns whether a process ended by itself: by exiting, or by a signal that its own instructions raise. All other
/// signals come from outside, such as the kernel's SIGKILL when memory runs out.
fn has_crashed(ending: &Ending, status: Option<ExitStatus>) -> bool {
    use rustix::process::Signal;
    let own = [Signal::ABORT, Signal::SEGV, Signal::ILL, Signal::BUS, Signal::FPE, Signal::SYS, Signal::TRAP];
    let by_itself =
        |status: ExitStatus| status.signal().is_none_or(|signal| own.iter().any(|own| own.as_raw() == signal));
    matches!(ending, Ending::Closed) && status.is_some_and(by_itself)
}

/// Returns whether a signal ended a process that its worker did not end.
fn is_signalled(ending: &Ending, status: Option<ExitStatus>) -> bool {
    matches!(ending, Ending::Closed) && status.is_some_and(|status| status.signal().is_some())
}

/// Decides whether the model or the machine is to blame for the death of a loading process.
fn blame(reason: String, said_hello: bool, ending: &Ending, status: Option<ExitStatus>) -> EngineError {
    // The kernel kills processes when memory runs out. A malicious model makes its process crash.
    let killed = status.is_some_and(|status| status.signal() == Some(9));
    if said_hello && !killed && matches!(ending, Ending::Closed) {
        EngineError::InvalidModel { reason }
    } else {
        EngineError::Failed { reason }
    }
}

fn timed_out(within: Duration) -> EngineError {
    EngineError::Failed { reason: format!("the engine process did not answer within {within:?}") }
}

fn too_long(parameter: &str, error: &FrameError) -> EngineError {
    unsupported(parameter, error.to_string())
}
