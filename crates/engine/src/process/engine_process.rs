//! The worker's side of one engine process.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{ToChild, ToParent, encode};
use super::pipe::{FRAMES_MAX, FrameReader, write_frames};
use super::stall_watch::StallWatch;
use super::{CREDIT, ChildCommand};
use crate::model_runtime::{
    EngineError, Event, GenerateRequest, GenerateSink, GenerateStream, LoadOptions, LoadSnapshot, LoadedModel, ModelId,
    ProgressSink, PromptInput, RuntimeInfo, VerifiedArtifact,
};

/// How long a process may take to admit a generation or to count tokens.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// How long a process may take to exit once its socket is closed.
const EXIT_WITHIN: Duration = Duration::from_secs(2);
/// Events after which the consumed ones are acknowledged; well below the credit, so that nothing stalls.
const ACKNOWLEDGE_EVERY: u32 = 64;
/// Events that wait for a reader beyond those under way.
const READER_EVENTS_MAX: usize = 32;
/// Lines of standard error that are kept to explain a death.
const LAST_LINES: usize = 16;
/// The longest line of standard error that is kept in one piece.
const LINE_BYTES_MAX: usize = 4_096;

/// Words of lines that tell what a process died of, the most telling first.
const TELLING: [&str; 3] = ["memory allocation of", "ASSERT", "rror"];

type Item = Result<Event, EngineError>;

/// A running engine process with its model, once that is loaded.
pub(super) struct EngineProcess {
    pub(super) pid: u32,
    outgoing: mpsc::Sender<Vec<u8>>,
    next_number: AtomicU64,
    state: Mutex<State>,
    kill: CancellationToken,
    gone: CancellationToken,
    tasks: TaskTracker,
}

struct State {
    /// Why no more requests are taken.
    closed: Option<EngineError>,
    generations: HashMap<u64, Generation>,
    counts: HashMap<u64, oneshot::Sender<Result<u32, EngineError>>>,
    snapshot: Option<LoadSnapshot>,
    /// Frames that came.
    heard: u64,
    /// Whether something was asked since the last frame came.
    asked: bool,
}

struct Generation {
    admitted: Option<oneshot::Sender<Result<(), EngineError>>>,
    events: mpsc::Sender<Item>,
    /// Events that came and were not acknowledged; at [`CREDIT`] the process waits for the reader.
    unacknowledged: usize,
}

/// What a load waits for.
pub(super) struct Loading {
    pub(super) progress: ProgressSink,
    pub(super) loaded: oneshot::Sender<Result<(LoadedModel, RuntimeInfo), EngineError>>,
    /// How long the engine may hang once it has loaded.
    pub(super) stall_limit: Duration,
}

/// Why the frames of a process ended.
enum Ending {
    /// The socket closed.
    Closed,
    /// The worker wants it to end.
    Killed,
    /// It said something that makes no sense, or it hangs.
    Fault(String),
}

impl EngineProcess {
    /// Starts a process that begins to load; `gone` is called when it has ended, before anyone learns of it.
    pub(super) fn start(
        command: &ChildCommand,
        artifact: VerifiedArtifact,
        options: LoadOptions,
        loading: Loading,
        kill: CancellationToken,
        tasks: &TaskTracker,
        gone: impl FnOnce() + Send + 'static,
    ) -> io::Result<Arc<Self>> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let socket = UnixStream::from_std(ours)?;
        let VerifiedArtifact { file, sha256, bytes, .. } = artifact;
        let mut child = Command::new(&command.program)
            .args(&command.args)
            .envs(command.envs.iter().map(|(name, value)| (name, value)))
            // An assertion that fails would start a debugger to print a trace.
            .env("GGML_NO_BACKTRACE", "1")
            .stdin(Stdio::from(file))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            // Ctrl-C on a terminal is for the program, which lets its jobs end, and not for the engines they need.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let pid = child.id().unwrap_or_default();
        let (reading, writing) = socket.into_split();
        let (outgoing, queue) = mpsc::channel(FRAMES_MAX);
        tasks.spawn(write_frames(queue, writing));
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let stderr = child.stderr.take().map(|stderr| tasks.spawn(read_lines(stderr, pid, Arc::clone(&lines))));
        let load = encode(&ToChild::Load { options, sha256, bytes }).map_err(io::Error::other)?;
        // The queue is empty, so there is room.
        let _ = outgoing.try_send(load);
        let state = State {
            closed: None,
            generations: HashMap::new(),
            counts: HashMap::new(),
            snapshot: None,
            heard: 0,
            asked: false,
        };
        let process = Arc::new(Self {
            pid,
            outgoing,
            next_number: AtomicU64::new(1),
            state: Mutex::new(state),
            kill,
            gone: CancellationToken::new(),
            tasks: tasks.clone(),
        });
        let supervised = Arc::clone(&process);
        let stall_limit = loading.stall_limit;
        tasks.spawn(async move {
            let mut frames = Frames { process: &supervised, loading: Some(loading), info: None };
            let ending = tokio::select! {
                ending = frames.read(FrameReader::new(reading)) => ending,
                () = supervised.kill.cancelled() => Ending::Killed,
                stall = supervised.stall(stall_limit) => Ending::Fault(stall),
            };
            let Frames { loading, info, .. } = frames;
            let status = reap(child, &ending).await;
            // The last words may still be in the pipe; a grandchild that holds it open must not hold us up.
            if let Some(stderr) = stderr {
                let _ = time::timeout(Duration::from_millis(500), stderr).await;
            }
            let last = lines.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect::<Vec<_>>();
            let reason = explain(pid, &ending, status, &last);
            // Closed first, so that nobody enters it in the list after it was struck off.
            supervised.state().closed.get_or_insert(EngineError::Failed { reason: reason.clone() });
            gone();
            if let Some(Loading { loaded, .. }) = loading {
                let _ = loaded.send(Err(blame(reason.clone(), info.is_some(), &ending, status)));
            }
            supervised.end_all();
            supervised.gone.cancel();
        });
        Ok(process)
    }

    /// Lets the caller enter the process in its list, unless it has ended already.
    pub(super) fn enlist(self: &Arc<Self>, enter: impl FnOnce(Arc<Self>)) {
        // Under this lock, because a process is closed before it is struck off the list.
        let state = self.state();
        if state.closed.is_none() {
            enter(Arc::clone(self));
        }
    }

    /// Returns how busy the model is, under the name it has in this runtime.
    pub(super) fn snapshot(&self, model: ModelId) -> Option<LoadSnapshot> {
        let state = self.state();
        let mut snapshot = state.snapshot.clone()?;
        snapshot.model = model;
        // What was sent a moment ago is not in the last report yet.
        let active = (state.generations.len() as u32).max(snapshot.running + snapshot.waiting);
        snapshot.running = active.min(snapshot.slots);
        snapshot.waiting = active - snapshot.running;
        Some(snapshot)
    }

    pub(super) async fn generate(self: &Arc<Self>, request: GenerateRequest) -> Result<GenerateStream, EngineError> {
        let id = self.number();
        let frame = encode(&ToChild::Generate { id, request: Box::new(request) })
            .map_err(|error| EngineError::Unsupported { parameter: "messages".into(), reason: error.to_string() })?;
        let (admitted, is_admitted) = oneshot::channel();
        // Room for all that may be under way, and for the end.
        let (events, incoming) = mpsc::channel(CREDIT + 2);
        {
            let mut state = self.state();
            if let Some(error) = &state.closed {
                return Err(error.clone());
            }
            state.generations.insert(id, Generation { admitted: Some(admitted), events, unacknowledged: 0 });
            state.asked = true;
        }
        let (sink, stream) = GenerateStream::channel(READER_EVENTS_MAX);
        // From here on, dropping the stream cancels; the queue keeps the order of the two frames.
        if self.outgoing.try_send(frame).is_err() {
            self.state().generations.remove(&id);
            return Err(EngineError::Busy);
        }
        self.tasks.spawn(Arc::clone(self).relay(id, incoming, sink));
        match time::timeout(ANSWER_WITHIN, is_admitted).await {
            Ok(Ok(admitted)) => admitted.map(|()| stream),
            Ok(Err(_)) => Err(EngineError::NotLoaded),
            Err(_) => Err(no_answer()),
        }
    }

    pub(super) async fn count_tokens(&self, input: &PromptInput) -> Result<u32, EngineError> {
        let id = self.number();
        let message = ToChild::CountTokens { id, input: input.clone() };
        let frame = encode(&message)
            .map_err(|error| EngineError::Unsupported { parameter: "messages".into(), reason: error.to_string() })?;
        let (counted, is_counted) = oneshot::channel();
        {
            let mut state = self.state();
            if let Some(error) = &state.closed {
                return Err(error.clone());
            }
            state.counts.insert(id, counted);
            state.asked = true;
        }
        if self.outgoing.try_send(frame).is_err() {
            self.state().counts.remove(&id);
            return Err(EngineError::Busy);
        }
        match time::timeout(ANSWER_WITHIN, is_counted).await {
            Ok(Ok(tokens)) => tokens,
            Ok(Err(_)) => Err(EngineError::NotLoaded),
            Err(_) => {
                self.state().counts.remove(&id);
                Err(no_answer())
            }
        }
    }

    /// Asks the process to end, insists after `patience`, and returns when it has ended.
    pub(super) async fn unload(&self, patience: Duration) {
        self.state().closed.get_or_insert(EngineError::NotLoaded);
        if let Ok(frame) = encode(&ToChild::Unload) {
            let _ = self.outgoing.try_send(frame);
        }
        if time::timeout(patience, self.gone.cancelled()).await.is_err() {
            self.kill.cancel();
            // A killed process goes at once, unless the kernel itself is stuck.
            let _ = time::timeout(EXIT_WITHIN, self.gone.cancelled()).await;
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is wrong once the engine, or the whole process, has hung for so long.
    async fn stall(&self, limit: Duration) -> String {
        let (mut engine, mut process) = (StallWatch::default(), StallWatch::default());
        loop {
            time::sleep(limit / 8).await;
            let now = Instant::now();
            let state = self.state();
            // Until the model is loaded, the load has a limit of its own.
            let Some(snapshot) = &state.snapshot else { continue };
            if engine.is_stalled(state.engine_owes(), snapshot.counters.decode_steps, limit, now) {
                return format!("its engine made no step for {limit:?}");
            }
            // A busy process tells its state several times a second, from a thread that is not the engine's.
            if process.is_stalled(state.asked, state.heard, limit, now) {
                return format!("it did not answer for {limit:?}");
            }
        }
    }

    fn number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Hands the events of one generation to its reader, as fast as that one reads.
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
        // A reader that goes closes its queue and cancels: either may be noticed first. A generation that has ended is
        // not in the list any more.
        sink.cancelled.run_until_cancelled(read).await;
        if self.state().generations.remove(&id).is_some() {
            self.tell(&ToChild::Cancel { id }).await;
        }
    }

    async fn tell(&self, message: &ToChild) {
        if let Ok(frame) = encode(message) {
            // A writer that ended means that the process is gone, which its supervisor notices.
            let _ = self.outgoing.send(frame).await;
        }
    }

    /// Ends everything that waits for this process, once it is closed.
    fn end_all(&self) {
        let (generations, counts, error) = {
            let mut state = self.state();
            let error = state.closed.clone().unwrap_or(EngineError::NotLoaded);
            (std::mem::take(&mut state.generations), std::mem::take(&mut state.counts), error)
        };
        for Generation { admitted, events, .. } in generations.into_values() {
            match admitted {
                Some(admitted) => drop(admitted.send(Err(error.clone()))),
                None => drop(events.try_send(Err(error.clone()))),
            }
        }
        for count in counts.into_values() {
            let _ = count.send(Err(error.clone()));
        }
    }
}

impl State {
    /// Returns whether the engine has something to do that waits for nobody else.
    fn engine_owes(&self) -> bool {
        let Some(snapshot) = &self.snapshot else { return false };
        // Those whose readers are behind pause, and others may wait for their slots.
        let paused = self.generations.values().filter(|generation| generation.unacknowledged >= CREDIT).count();
        // Cancelled generations are no longer listed here, but an engine at work drops them within a step.
        snapshot.running as usize > paused || (snapshot.running == 0 && snapshot.waiting > 0)
    }
}

/// Takes what a process says, frame by frame.
struct Frames<'a> {
    process: &'a EngineProcess,
    loading: Option<Loading>,
    info: Option<RuntimeInfo>,
}

impl Frames<'_> {
    async fn read(&mut self, mut frames: FrameReader) -> Ending {
        loop {
            match frames.next().await {
                Ok(Some(message)) => {
                    if let Err(nonsense) = self.take(message) {
                        return Ending::Fault(nonsense);
                    }
                }
                Ok(None) => return Ending::Closed,
                Err(error) => return Ending::Fault(error.to_string()),
            }
        }
    }

    fn take(&mut self, message: ToParent) -> Result<(), String> {
        {
            let mut state = self.process.state();
            state.heard += 1;
            state.asked = false;
        }
        match message {
            ToParent::Hello { info } => self.info = Some(info),
            ToParent::Progress { share } => {
                if let Some(loading) = &self.loading {
                    (loading.progress)(share);
                }
            }
            ToParent::Loaded { model, state } => {
                self.process.state().snapshot = Some(state);
                let info = self.info.clone().ok_or("it loaded before it said hello")?;
                if let Some(Loading { loaded, .. }) = self.loading.take() {
                    let _ = loaded.send(Ok((model, info)));
                }
            }
            ToParent::NotLoaded { error } => {
                if let Some(Loading { loaded, .. }) = self.loading.take() {
                    let _ = loaded.send(Err(error));
                }
            }
            ToParent::State { state } => self.process.state().snapshot = Some(state),
            ToParent::Counted { id, tokens } => {
                if let Some(count) = self.process.state().counts.remove(&id) {
                    let _ = count.send(tokens);
                }
            }
            ToParent::Accepted { id } => {
                if let Some(generation) = self.process.state().generations.get_mut(&id)
                    && let Some(admitted) = generation.admitted.take()
                {
                    let _ = admitted.send(Ok(()));
                }
            }
            ToParent::Refused { id, error } => {
                let generation = self.process.state().generations.remove(&id);
                if let Some(admitted) = generation.and_then(|generation| generation.admitted) {
                    let _ = admitted.send(Err(error));
                }
            }
            ToParent::Event { id, event } => return self.hand(id, Ok(event)),
            ToParent::Failed { id, error } => return self.hand(id, Err(error)),
        }
        Ok(())
    }

    fn hand(&self, id: u64, item: Item) -> Result<(), String> {
        let end = !matches!(item, Ok(Event::Started { .. } | Event::Piece(_)));
        let mut state = self.process.state();
        // A generation that was cancelled may still have events under way.
        let Some(generation) = state.generations.get_mut(&id) else { return Ok(()) };
        generation.unacknowledged += 1;
        if let Err(mpsc::error::TrySendError::Full(_)) = generation.events.try_send(item) {
            return Err("it sent more events than it had credit for".into());
        }
        if end {
            state.generations.remove(&id);
        }
        Ok(())
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

fn explain(pid: u32, ending: &Ending, status: Option<ExitStatus>, last: &[String]) -> String {
    let how = match (ending, status) {
        (Ending::Killed, _) => "was ended by its worker".to_owned(),
        (Ending::Fault(fault), _) => format!("was ended because {fault}"),
        (Ending::Closed, Some(status)) => format!("ended ({status})"),
        (Ending::Closed, None) => "ended".to_owned(),
    };
    // What it died of says more than the trace that comes after it.
    let telling = TELLING.iter().find_map(|words| last.iter().rev().find(|line| line.contains(words)));
    match telling.or(last.last()) {
        Some(line) => format!("engine process {pid} {how}: {line}"),
        None => format!("engine process {pid} {how}"),
    }
}

/// Tells a load whether the model or the machine is to blame for the death of its process.
fn blame(reason: String, said_hello: bool, ending: &Ending, status: Option<ExitStatus>) -> EngineError {
    // The kernel kills where memory runs out; a poisoned model crashes by itself.
    let killed = status.is_some_and(|status| status.signal() == Some(9));
    if said_hello && !killed && matches!(ending, Ending::Closed) {
        EngineError::InvalidModel { reason }
    } else {
        EngineError::Failed { reason }
    }
}

fn no_answer() -> EngineError {
    EngineError::Failed { reason: format!("the engine process did not answer within {ANSWER_WITHIN:?}") }
}

/// Sends standard error to the log, line by line, and keeps the last lines.
async fn read_lines(mut stderr: ChildStderr, pid: u32, lines: Arc<Mutex<VecDeque<String>>>) {
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
                keep_line(&mut line, pid, &lines);
            }
        }
    }
    keep_line(&mut line, pid, &lines);
}

fn keep_line(line: &mut Vec<u8>, pid: u32, lines: &Mutex<VecDeque<String>>) {
    let text = String::from_utf8_lossy(line).trim().to_owned();
    line.clear();
    if text.is_empty() {
        return;
    }
    tracing::debug!(target: "engine_process", pid, "{text}");
    let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    if lines.len() == LAST_LINES {
        // A long trace must not push out what it is the trace of.
        let is_telling = |line: &String| TELLING.iter().any(|words| line.contains(words));
        let oldest = lines.iter().position(|line| !is_telling(line)).unwrap_or(0);
        lines.remove(oldest);
    }
    lines.push_back(text);
}
