//! The engine process: serves one model of any runtime to the worker that started it.

use std::any::Any;
use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{self, Query, Reply, ToChild, ToParent, encode};
use super::pipe::{FRAMES_MAX, FrameReader, PipeError, write_frames};
use super::sandbox::{self, Needs, Sandbox};
use super::{CREDIT, handover, host_memory, memory_limit, preflight, resource_limits};
use crate::hardware::{self, Device, Hardware};
use crate::model_runtime::{
    EmbedRequest, EngineError, GenerateRequest, LoadOptions, LoadSnapshot, LoadedModel, ModelRuntime, ProgressSink,
    RerankRequest, VerifiedArtifact,
};
use crate::own_process;

/// The interval between load reports while the model is busy.
const STATE_EVERY: Duration = Duration::from_millis(100);
/// The time for generations to send their end once the model is unloaded.
const FAREWELL: Duration = Duration::from_secs(1);

/// Why an engine process could not continue.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The process was not started by a `ProcessRuntime`.
    #[error("the standard streams are not those of an engine process: {0}")]
    Streams(#[source] io::Error),
    /// No thread could be started.
    #[error("the threads of the engine process could not be started: {0}")]
    Threads(#[source] io::Error),
    /// The worker sent a malformed message.
    #[error("the worker cannot be understood: {0}")]
    Protocol(String),
}

/// Serves one model until it is unloaded. Standard input is the socket for files, and standard output the socket for
/// frames.
///
/// If the worker is gone, the whole process is killed at once, even in the middle of a decode. If a task panics, the
/// process aborts, because nobody else would answer what the task was asked.
///
/// Call it before any other thread is started. It first starts the runtime's drivers, then waits for the model's files,
/// and closes the sandbox before anything is read of them.
pub fn serve_child(runtime: impl ModelRuntime) -> Result<(), ServeError> {
    resource_limits::lower();
    let (files, socket) = standard_streams().map_err(ServeError::Streams)?;
    let hardware = start_drivers(&runtime)?;
    let hello = ToParent::Hello { info: runtime.describe(), hardware };
    let Some(load) = greet(&hello, &files, &socket)? else { return Ok(()) };
    stand_back(load.options.nice);
    let work = Work { available_bytes: host_memory::available_bytes(), sandbox: close_sandbox(&load, &hello), load };
    let threads = Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(ServeError::Threads)?;
    let served = threads.block_on(async {
        socket.set_nonblocking(true)?;
        serve(Arc::new(runtime), files, UnixStream::from_std(socket)?, work).await
    });
    match served {
        Ok(End::Unloaded) => Ok(()),
        Ok(End::WorkerGone) => {
            // An orderly exit would wait for the decode, or free memory that it uses.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            Ok(())
        }
        Ok(End::Panicked) => std::process::abort(),
        Err(error) => Err(ServeError::Protocol(error.to_string())),
    }
}

fn standard_streams() -> io::Result<(StdUnixStream, StdUnixStream)> {
    let files = StdUnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let socket = StdUnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    for stream in [&files, &socket] {
        stream.local_addr()?;
    }
    files.set_nonblocking(true)?;
    // Nothing that prints to standard output later may get between the frames.
    rustix::stdio::dup2_stdout(io::stderr())?;
    Ok((files, socket))
}

/// Has the runtime load its backends and open its devices, on this thread.
fn start_drivers(runtime: &impl ModelRuntime) -> Result<Hardware, ServeError> {
    let thread = Builder::new_current_thread().build().map_err(ServeError::Threads)?;
    Ok(thread.block_on(runtime.hardware()))
}

/// What the worker asked this process to load.
struct Load {
    options: LoadOptions,
    artifact: VerifiedArtifact,
}

/// What this process serves, and what it found out before it closed its sandbox.
struct Work {
    load: Load,
    sandbox: Sandbox,
    /// The memory that the machine can spare.
    available_bytes: Option<u64>,
}

/// Says hello and waits for the model. Returns `None` if there is nothing to load.
fn greet(hello: &ToParent, files: &StdUnixStream, mut socket: &StdUnixStream) -> Result<Option<Load>, ServeError> {
    let protocol = |error: &dyn std::error::Error| ServeError::Protocol(error.to_string());
    let hello = encode(hello).map_err(|error| protocol(&error))?;
    // If the worker is gone, there is nothing to read either.
    let _ = socket.write_all(&hello);
    let Some(message) = frame::read(&mut socket).map_err(|error| protocol(&error))? else { return Ok(None) };
    match message {
        ToChild::Load { options, files: infos } => {
            let artifact = handover::receive(files, &infos).map_err(|error| protocol(&error))?;
            Ok(Some(Load { options, artifact: handover::reopened(artifact) }))
        }
        ToChild::Unload => Ok(None),
        _ => Err(ServeError::Protocol("the first message is not to load a model".into())),
    }
}

/// Lowers the priority of this process. Threads that are started later inherit it.
fn stand_back(nice: u8) {
    if nice > 0
        && let Err(error) = rustix::process::nice(nice.into())
    {
        tracing::warn!(%error, nice, "the engine's priority could not be lowered");
    }
}

/// Closes the sandbox, unless it is turned off.
fn close_sandbox(load: &Load, hello: &ToParent) -> Sandbox {
    if !load.options.sandbox {
        return Sandbox::Off;
    }
    // Both are needed later, when no file can be opened.
    own_process::open();
    hardware::cores();
    let Load { artifact, .. } = load;
    let files = match artifact.parts.as_slice() {
        [] => Vec::new(),
        parts => std::iter::once(artifact).chain(parts).map(|part| &part.file).collect(),
    };
    let drivers = matches!(hello, ToParent::Hello { hardware, .. } if hardware.devices.iter().any(Device::is_gpu));
    sandbox::close(&Needs { files, drivers })
}

/// How serving ended normally.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Unloaded,
    WorkerGone,
    Panicked,
}

/// The tasks of the engine process.
#[derive(Default)]
struct Tasks {
    tracker: TaskTracker,
    panicked: CancellationToken,
}

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        let panicked = self.panicked.clone();
        self.tracker.spawn(async move {
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                // The worker reads the line with the cause from standard error.
                let _ = writeln!(io::stderr(), "error: the engine panicked: {}", message(&*panic));
                panicked.cancel();
            }
        })
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why")
}

/// The state that the tasks of the engine process share.
struct Server<R> {
    runtime: Arc<R>,
    model: Mutex<Option<LoadedModel>>,
    calls: Mutex<HashMap<u64, Call>>,
    outgoing: mpsc::Sender<Vec<u8>>,
    busy: Notify,
}

/// The handle of a generation or a query.
#[derive(Clone)]
struct Call {
    cancel: CancellationToken,
    /// The number of events that may still be sent before the worker acknowledges some.
    credit: Arc<Semaphore>,
}

async fn serve<R: ModelRuntime>(
    runtime: Arc<R>,
    files: StdUnixStream,
    socket: UnixStream,
    work: Work,
) -> Result<End, PipeError> {
    let (reading, writing) = socket.into_split();
    let (outgoing, queue) = mpsc::channel(FRAMES_MAX);
    let tasks = Tasks::default();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let writer = tasks.spawn(write_frames(queue, writing));
    let server =
        Arc::new(Server { runtime, model: Mutex::default(), calls: Mutex::default(), outgoing, busy: Notify::new() });
    tasks.spawn(Arc::clone(&server).load(work));
    let report = stop.clone().run_until_cancelled_owned(Arc::clone(&server).report());
    tasks.spawn(report.map(|_| ()));

    let mut frames = FrameReader::new(reading);
    let end = loop {
        let Some(message) = tasks.panicked.run_until_cancelled(frames.next()).await else { break End::Panicked };
        let Some(message) = message? else { break End::WorkerGone };
        match message {
            ToChild::Load { .. } => return Err(io::Error::other("it sent a second model").into()),
            ToChild::Generate { id, request } => {
                let call = server.enter(id);
                tasks.spawn(Arc::clone(&server).generate(id, *request, call));
            }
            ToChild::Cancel { id } => {
                if let Some(call) = server.call(id) {
                    call.cancel.cancel();
                }
            }
            ToChild::Acknowledge { id, events } => {
                if let Some(call) = server.call(id) {
                    call.credit.add_permits((events as usize).min(CREDIT));
                }
            }
            ToChild::AddAdapter { id, file } => {
                let artifact = handover::receive(&files, &[file])?;
                let call = server.enter(id);
                let added = Arc::clone(&server).add_adapter(artifact);
                tasks.spawn(Arc::clone(&server).reply(id, call, added));
            }
            ToChild::Ask { id, query } => {
                let call = server.enter(id);
                let reply = Arc::clone(&server).ask(query);
                tasks.spawn(Arc::clone(&server).reply(id, call, reply));
            }
            ToChild::Unload => break End::Unloaded,
        }
    };
    if end == End::Unloaded {
        let model = server.model().map(|model| model.id);
        if let Ok(model) = model {
            let _ = server.runtime.unload(model).await;
        }
        stop.cancel();
        drop(server);
        tasks.tracker.close();
        // The writer ends once every task has dropped its sender, after the last frame is written.
        let _ = time::timeout(FAREWELL, writer).await;
    }
    Ok(end)
}

impl<R: ModelRuntime> Server<R> {
    async fn tell(&self, message: &ToParent) {
        match encode(message) {
            // If the writer has ended, the worker is gone, which the reading side notices.
            Ok(frame) => drop(self.outgoing.send(frame).await),
            Err(error) => tracing::error!(%error, "a message to the worker is dropped"),
        }
    }

    fn model(&self) -> Result<LoadedModel, EngineError> {
        self.model.lock().clone().ok_or(EngineError::NotLoaded)
    }

    fn state(&self) -> Option<LoadSnapshot> {
        let id = self.model().ok()?.id;
        self.runtime.load_state().into_iter().find(|state| state.model == id)
    }

    async fn tell_state(&self) {
        if let Some(state) = self.state() {
            self.tell(&ToParent::State { state }).await;
        }
    }

    async fn load(self: Arc<Self>, work: Work) {
        let outgoing = self.outgoing.clone();
        let progress = Box::new(move |share| {
            // A report that does not fit the queue is superseded by the next one.
            if let Ok(frame) = encode(&ToParent::Progress { share }) {
                let _ = outgoing.try_send(frame);
            }
        });
        match self.load_within_limits(work, progress).await {
            Ok(model) => {
                *self.model.lock() = Some(model.clone());
                match self.state() {
                    Some(state) => self.tell(&ToParent::Loaded { model, state }).await,
                    None => self.tell(&ToParent::NotLoaded { error: EngineError::NotLoaded }).await,
                }
            }
            Err(error) => self.tell(&ToParent::NotLoaded { error }).await,
        }
    }

    async fn load_within_limits(&self, work: Work, progress: ProgressSink) -> Result<LoadedModel, EngineError> {
        let Work { load: Load { options, artifact }, sandbox, available_bytes: available } = work;
        // The header is read within the limit as well.
        let before = memory_limit::limit_growth(preflight::TRIAL_BYTES_MAX);
        preflight::try_template(&artifact.file).await?;
        let (options, plan) = preflight::fit(&*self.runtime, &artifact, options, available).await?;
        let growth = preflight::growth(&plan, options.memory_max_bytes, available)?;
        memory_limit::restore(before);
        memory_limit::limit_growth(growth);
        let model = self.runtime.load(artifact, options, progress).await?;
        Ok(LoadedModel { sandbox: Some(sandbox), ..model })
    }

    fn enter(&self, id: u64) -> Call {
        let call = Call { cancel: CancellationToken::new(), credit: Arc::new(Semaphore::new(CREDIT)) };
        self.calls.lock().insert(id, call.clone());
        self.busy.notify_one();
        call
    }

    fn call(&self, id: u64) -> Option<Call> {
        self.calls.lock().get(&id).cloned()
    }

    fn leave(&self, id: u64) {
        self.calls.lock().remove(&id);
        self.busy.notify_one();
    }

    async fn generate(self: Arc<Self>, id: u64, request: GenerateRequest, call: Call) {
        // Dropping the stream cancels the generation in the runtime.
        let _ = call.cancel.run_until_cancelled(self.relay(id, request, &call.credit)).await;
        self.leave(id);
    }

    async fn relay(&self, id: u64, mut request: GenerateRequest, credit: &Semaphore) {
        let started = match self.model() {
            Ok(model) => {
                request.model = model.id;
                self.runtime.generate(request).await
            }
            Err(error) => Err(error),
        };
        let mut stream = match started {
            Ok(stream) => stream,
            Err(error) => return self.tell(&ToParent::Refused { id, error }).await,
        };
        self.tell(&ToParent::Accepted { id }).await;
        loop {
            let item = stream.next().await;
            // The end event needs no credit: capacity for it is always reserved.
            match item {
                Some(Ok(event)) if event.is_last() => {
                    self.tell_state().await;
                    return self.tell(&ToParent::Event { id, event }).await;
                }
                Some(Ok(event)) => {
                    if let Ok(permit) = credit.acquire().await {
                        permit.forget();
                    }
                    self.tell(&ToParent::Event { id, event }).await;
                }
                Some(Err(error)) => {
                    self.tell_state().await;
                    return self.tell(&ToParent::Failed { id, error }).await;
                }
                None => {
                    let error = EngineError::Failed { reason: "the answer has no end".into() };
                    return self.tell(&ToParent::Failed { id, error }).await;
                }
            }
        }
    }

    async fn reply(self: Arc<Self>, id: u64, call: Call, reply: impl Future<Output = Result<Reply, EngineError>>) {
        if let Some(reply) = call.cancel.run_until_cancelled(reply).await {
            self.tell(&ToParent::Reply { id, reply }).await;
        }
        self.leave(id);
    }

    async fn add_adapter(self: Arc<Self>, artifact: VerifiedArtifact) -> Result<Reply, EngineError> {
        self.runtime.add_adapter(self.model()?.id, artifact).await.map(Reply::Adapter)
    }

    async fn ask(self: Arc<Self>, query: Query) -> Result<Reply, EngineError> {
        let model = self.model()?.id;
        match query {
            Query::CountTokens(input) => self.runtime.count_tokens(model, &input).await.map(Reply::Tokens),
            Query::RemoveAdapter(adapter) => self.runtime.remove_adapter(model, adapter).await.map(|()| Reply::Removed),
            Query::ListTokens { input, listing } => {
                self.runtime.list_tokens(model, &input, listing).await.map(Reply::Listed)
            }
            // JSON has no numbers that are not finite, so they are errors here and below.
            Query::Rerank { query, texts } => {
                let scores = self.runtime.rerank(RerankRequest { model, query, texts }).await?;
                if scores.scores.iter().all(|score| score.is_finite()) {
                    Ok(Reply::Scores(scores))
                } else {
                    Err(EngineError::Failed { reason: "the model made a score that is not finite".into() })
                }
            }
            Query::Embed(inputs) => {
                let embeddings = self.runtime.embed(EmbedRequest { model, inputs }).await?;
                if embeddings.vectors.iter().flatten().all(|number| number.is_finite()) {
                    Ok(Reply::Vectors(embeddings))
                } else {
                    Err(EngineError::Failed { reason: "the model made a vector that is not finite".into() })
                }
            }
        }
    }

    /// Reports the model's load while it is busy, and once more when it becomes idle.
    async fn report(self: Arc<Self>) {
        loop {
            self.busy.notified().await;
            loop {
                time::sleep(STATE_EVERY).await;
                self.tell_state().await;
                let none = self.calls.lock().is_empty();
                if none && self.state().is_none_or(|state| state.running + state.waiting == 0) {
                    self.tell_state().await;
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
