//! The engine process: serves one model of any runtime to the worker that started it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::{task, time};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::CREDIT;
use super::frame::{ToChild, ToParent, encode};
use super::memory_limit;
use super::pipe::{FRAMES_MAX, FrameReader, PipeError, write_frames};
use crate::chat_template::ChatTemplate;
use crate::gguf::Header;
use crate::model_runtime::{
    ChatMessage, EngineError, Event, GenerateRequest, LoadOptions, LoadSnapshot, LoadedModel, ModelRuntime,
    PromptInput, VerifiedArtifact,
};

/// Between two reports of how busy the model is, while it is.
const STATE_EVERY: Duration = Duration::from_millis(100);
/// How long generations may take to tell their end once the model is unloaded.
const FAREWELL: Duration = Duration::from_secs(1);

/// How much memory the template of a model may take to render a short conversation.
const PROBE_BYTES_MAX: u64 = 1 << 30;
/// How long it may take; a sound one takes a thousandth.
const PROBE_WITHIN: Duration = Duration::from_secs(10);
/// How much memory the process may take beyond what it has once the model is loaded. Keys, values and scratch space
/// are taken by then, so this is for prompts on their way to tokens, threads and the odd buffer.
const GROWTH_BYTES_MAX: u64 = 2 << 30;

/// Why an engine process could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The process was not started by a `ProcessRuntime`.
    #[error("the standard streams are not those of an engine process: {0}")]
    Streams(#[source] io::Error),
    /// The worker sent something that cannot be understood.
    #[error("the worker cannot be understood: {0}")]
    Protocol(String),
}

/// Serves one model until it is unloaded. Standard input is the model's file, standard output the socket.
///
/// Ends the whole process at once, even in the middle of a decode, when the worker is gone.
pub async fn serve_child(runtime: impl ModelRuntime) -> Result<(), ServeError> {
    let (file, socket) = standard_streams().map_err(ServeError::Streams)?;
    match serve(Arc::new(runtime), file, socket).await {
        Ok(End::Unloaded) => Ok(()),
        Ok(End::WorkerGone) => {
            // An orderly exit would wait for the decode, or pull the ground from under it.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            Ok(())
        }
        Err(error) => Err(ServeError::Protocol(error.to_string())),
    }
}

fn standard_streams() -> io::Result<(File, UnixStream)> {
    let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let socket = std::os::unix::net::UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
    socket.local_addr()?;
    // Whatever prints to standard output from here on must not get between the frames.
    rustix::stdio::dup2_stdout(io::stderr())?;
    socket.set_nonblocking(true)?;
    Ok((file, UnixStream::from_std(socket)?))
}

/// How serving ended without a fault.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Unloaded,
    WorkerGone,
}

/// What the tasks of the engine process share.
struct Server<R> {
    runtime: Arc<R>,
    model: Mutex<Option<LoadedModel>>,
    generations: Mutex<HashMap<u64, Generation>>,
    outgoing: mpsc::Sender<Vec<u8>>,
    busy: Notify,
}

/// The worker's hold on a generation.
#[derive(Clone)]
struct Generation {
    cancel: CancellationToken,
    /// Events that may still be sent before the worker acknowledges some.
    credit: Arc<Semaphore>,
}

async fn serve<R: ModelRuntime>(runtime: Arc<R>, file: File, socket: UnixStream) -> Result<End, PipeError> {
    let (reading, writing) = socket.into_split();
    let (outgoing, queue) = mpsc::channel(FRAMES_MAX);
    let tasks = TaskTracker::new();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let writer = tasks.spawn(write_frames(queue, writing));
    let server = Arc::new(Server {
        runtime,
        model: Mutex::default(),
        generations: Mutex::default(),
        outgoing,
        busy: Notify::new(),
    });
    server.tell(&ToParent::Hello { info: server.runtime.describe() }).await;
    tasks.spawn(stop.clone().run_until_cancelled_owned(Arc::clone(&server).report()));

    let mut file = Some(file);
    let mut frames = FrameReader::new(reading);
    let end = loop {
        let Some(message) = frames.next().await? else { break End::WorkerGone };
        match message {
            ToChild::Load { options, sha256, bytes } => {
                let Some(file) = file.take() else { continue };
                let artifact = VerifiedArtifact { file, sha256, bytes, parts: Vec::new() };
                tasks.spawn(Arc::clone(&server).load(artifact, options));
            }
            ToChild::Generate { id, request } => {
                let generation = server.enter(id);
                tasks.spawn(Arc::clone(&server).generate(id, *request, generation));
            }
            ToChild::Cancel { id } => {
                if let Some(generation) = server.generation(id) {
                    generation.cancel.cancel();
                }
            }
            ToChild::Acknowledge { id, events } => {
                if let Some(generation) = server.generation(id) {
                    generation.credit.add_permits((events as usize).min(CREDIT));
                }
            }
            ToChild::CountTokens { id, input } => {
                tasks.spawn(Arc::clone(&server).count_tokens(id, input));
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
        tasks.close();
        // The writer ends once every task has dropped its sender, and with it the last frame is out.
        let _ = time::timeout(FAREWELL, writer).await;
    }
    Ok(end)
}

impl<R: ModelRuntime> Server<R> {
    async fn tell(&self, message: &ToParent) {
        match encode(message) {
            // A writer that ended means that the worker is gone, which the reading side notices.
            Ok(frame) => drop(self.outgoing.send(frame).await),
            Err(error) => tracing::error!(%error, "a message to the worker is dropped"),
        }
    }

    fn model(&self) -> Result<LoadedModel, EngineError> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(EngineError::NotLoaded)
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

    async fn load(self: Arc<Self>, artifact: VerifiedArtifact, options: LoadOptions) {
        let outgoing = self.outgoing.clone();
        let progress = Box::new(move |share| {
            // A report that finds the queue full is superseded by the next.
            if let Ok(frame) = encode(&ToParent::Progress { share }) {
                let _ = outgoing.try_send(frame);
            }
        });
        let loaded = match probe_template(&artifact.file).await {
            Ok(()) => self.runtime.load(artifact, options, progress).await,
            Err(error) => Err(error),
        };
        match loaded {
            Ok(model) => {
                // A template may be harmless to the probe and not to other conversations.
                memory_limit::limit_growth(GROWTH_BYTES_MAX);
                *self.model.lock().unwrap_or_else(PoisonError::into_inner) = Some(model.clone());
                match self.state() {
                    Some(state) => self.tell(&ToParent::Loaded { model, state }).await,
                    None => self.tell(&ToParent::NotLoaded { error: EngineError::NotLoaded }).await,
                }
            }
            Err(error) => self.tell(&ToParent::NotLoaded { error }).await,
        }
    }

    fn enter(&self, id: u64) -> Generation {
        let generation = Generation { cancel: CancellationToken::new(), credit: Arc::new(Semaphore::new(CREDIT)) };
        self.generations.lock().unwrap_or_else(PoisonError::into_inner).insert(id, generation.clone());
        self.busy.notify_one();
        generation
    }

    fn generation(&self, id: u64) -> Option<Generation> {
        self.generations.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    async fn generate(self: Arc<Self>, id: u64, request: GenerateRequest, generation: Generation) {
        // Dropping the stream, here or in the middle, is what cancels it in the runtime.
        let _ = generation.cancel.run_until_cancelled(self.relay(id, request, &generation.credit)).await;
        self.generations.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        self.busy.notify_one();
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
            // The end needs no credit: there is always room for it.
            match item {
                Some(Ok(event @ Event::Done { .. })) => {
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

    async fn count_tokens(self: Arc<Self>, id: u64, input: PromptInput) {
        let tokens = match self.model() {
            Ok(model) => self.runtime.count_tokens(model.id, &input).await,
            Err(error) => Err(error),
        };
        self.tell(&ToParent::Counted { id, tokens }).await;
    }

    /// Reports how busy the model is while it is, and once more when it no longer is.
    async fn report(self: Arc<Self>) {
        loop {
            self.busy.notified().await;
            loop {
                time::sleep(STATE_EVERY).await;
                self.tell_state().await;
                let none = self.generations.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
                if none && self.state().is_none_or(|state| state.running + state.waiting == 0) {
                    self.tell_state().await;
                    break;
                }
            }
        }
    }
}

/// Renders short conversations with the template in a model's file, under a limit of memory and time.
///
/// A template that takes too much memory ends the process, before the model has taken any; the worker then blames the
/// model. What else is wrong with a file is for the runtime to find.
async fn probe_template(file: &File) -> Result<(), EngineError> {
    let too_much = |what: &str| EngineError::InvalidModel { reason: format!("its chat template {what}") };
    let file = file.try_clone().map_err(|error| EngineError::Failed { reason: error.to_string() })?;
    let probe = task::spawn_blocking(move || {
        let Ok(header) = Header::read(&file) else { return };
        let before = memory_limit::limit_growth(PROBE_BYTES_MAX);
        // Whether it compiles, or refuses the conversations, is of no interest here.
        if let Ok(template) = ChatTemplate::new(header.chat_template(), "<s>", "</s>") {
            let say = |role: &str| ChatMessage::new(role, "Hello.");
            let _ = template.render(&[say("user")]);
            let _ = template.render(&[say("system"), say("user"), say("assistant"), say("user")]);
        }
        memory_limit::restore(before);
    });
    match time::timeout(PROBE_WITHIN, probe).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(too_much("makes the renderer panic")),
        Err(_) => Err(too_much("takes too long")),
    }
}
