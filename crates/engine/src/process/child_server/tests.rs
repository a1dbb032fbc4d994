use std::io::{self, Seek, Write};

use async_trait::async_trait;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::*;
use crate::hardware::Hardware;
use crate::model_runtime::{
    Abilities, AdapterId, Counters, DevicePlacement, Embeddings, GenerateStream, MemoryPlan, ModelId, ProgressSink,
    PromptInput, RuntimeInfo,
};
use crate::process::handover;

const TIMEOUT: Duration = Duration::from_secs(20);

/// Uses the number in an adapter's file as its id, and embeds a text as the number in it.
#[derive(Default)]
struct Numbers {
    adapters: Mutex<Vec<AdapterId>>,
    /// Held by each query that never gets a reply.
    held: Arc<()>,
    panics_when_it_loads: bool,
}

#[async_trait]
impl ModelRuntime for Numbers {
    fn describe(&self) -> RuntimeInfo {
        RuntimeInfo { kind: "numbers".into(), detail: String::new() }
    }

    async fn hardware(&self) -> Hardware {
        Hardware::default()
    }

    async fn estimate(&self, _: &VerifiedArtifact, _: &LoadOptions) -> Result<MemoryPlan, EngineError> {
        Ok(MemoryPlan::default())
    }

    async fn load(
        &self,
        _: VerifiedArtifact,
        _: LoadOptions,
        progress: ProgressSink,
    ) -> Result<LoadedModel, EngineError> {
        assert!(!self.panics_when_it_loads, "the load panics");
        progress(1.0);
        let abilities = Abilities::default();
        Ok(LoadedModel {
            id: ModelId(7),
            context_length: 8,
            kv_tokens: 0,
            slots: 1,
            pid: None,
            abilities,
            placement: DevicePlacement::default(),
            sandbox: None,
            server: None,
        })
    }

    async fn add_adapter(&self, model: ModelId, artifact: VerifiedArtifact) -> Result<AdapterId, EngineError> {
        assert_eq!(model, ModelId(7));
        let text = io::read_to_string(&artifact.file).expect("it can be read");
        let adapter =
            text.parse().map(AdapterId).map_err(|_| EngineError::InvalidModel { reason: format!("{text:?}") })?;
        self.adapters.lock().push(adapter);
        Ok(adapter)
    }

    async fn remove_adapter(&self, _: ModelId, adapter: AdapterId) -> Result<(), EngineError> {
        let mut adapters = self.adapters.lock();
        let index = adapters.iter().position(|there| *there == adapter).ok_or(EngineError::NotLoaded)?;
        adapters.remove(index);
        Ok(())
    }

    async fn unload(&self, _: ModelId) -> Result<(), EngineError> {
        Ok(())
    }

    async fn generate(&self, _: GenerateRequest) -> Result<GenerateStream, EngineError> {
        Err(EngineError::Busy)
    }

    async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, EngineError> {
        let mut vectors = Vec::new();
        for input in &request.inputs {
            let PromptInput::Text(text) = input else { return Err(EngineError::Busy) };
            if text == "never" {
                let _held = Arc::clone(&self.held);
                std::future::pending::<()>().await;
            }
            vectors.push(vec![text.parse().expect("a number")]);
        }
        Ok(Embeddings { vectors, prompt_tokens: 3 })
    }

    async fn count_tokens(&self, _: ModelId, _: &PromptInput) -> Result<u32, EngineError> {
        Ok(5)
    }

    fn load_state(&self) -> Vec<LoadSnapshot> {
        vec![LoadSnapshot {
            model: ModelId(7),
            slots: 1,
            running: 0,
            waiting: 0,
            kv_usage: 0.0,
            tokens_per_second: 0.0,
            counters: Counters::default(),
            beats: 0,
        }]
    }
}

/// The worker's ends of both sockets.
struct Worker {
    files: StdUnixStream,
    reading: FrameReader,
    writing: OwnedWriteHalf,
    runtime: Arc<Numbers>,
    tasks: TaskTracker,
}

impl Worker {
    /// Returns a worker whose child has loaded its model.
    async fn with_model() -> Self {
        let (files, their_files) = StdUnixStream::pair().expect("sockets work");
        their_files.set_nonblocking(true).expect("it is ours");
        let (ours, theirs) = UnixStream::pair().expect("sockets work");
        let runtime = Arc::new(Numbers::default());
        let tasks = TaskTracker::new();
        tasks.spawn(serve(Arc::clone(&runtime), their_files, theirs, work()));
        let (reading, writing): (OwnedReadHalf, _) = ours.into_split();
        let mut worker = Self { files, reading: FrameReader::new(reading), writing, runtime, tasks };
        worker.hear(|message| matches!(message, ToParent::Loaded { .. })).await;
        worker
    }

    /// Closes the connection and waits for the child to notice.
    async fn leave(self) {
        drop((self.reading, self.writing));
        self.tasks.close();
        time::timeout(TIMEOUT, self.tasks.wait()).await.expect("the child ends");
    }

    async fn say(&mut self, message: ToChild) {
        self.writing.write_all(&encode(&message).expect("it encodes")).await.expect("it is sent");
    }

    async fn hear(&mut self, wanted: impl Fn(&ToParent) -> bool) -> ToParent {
        let hear = async {
            loop {
                let message = self.reading.next().await.expect("a frame").expect("the child lives");
                if wanted(&message) {
                    return message;
                }
            }
        };
        time::timeout(TIMEOUT, hear).await.expect("it is said in time")
    }

    async fn reply(&mut self, number: u64) -> Result<Reply, EngineError> {
        let said = self.hear(|message| matches!(message, ToParent::Reply { id, .. } if *id == number)).await;
        let ToParent::Reply { reply, .. } = said else { unreachable!("only answers are wanted") };
        reply
    }

    async fn ask(&mut self, id: u64, query: Query) -> Result<Reply, EngineError> {
        self.say(ToChild::Ask { id, query }).await;
        self.reply(id).await
    }

    async fn add_adapter(&mut self, id: u64, text: &str) -> Result<Reply, EngineError> {
        let adapter = file(text);
        handover::send(&self.files, &adapter).expect("there is room");
        let [file] = handover::describe(&adapter).try_into().expect("one file");
        self.say(ToChild::AddAdapter { id, file }).await;
        self.reply(id).await
    }
}

fn work() -> Work {
    let load = Load { options: LoadOptions::default(), artifact: file("model") };
    Work { load, sandbox: Sandbox::Off, available_bytes: None }
}

fn file(text: &str) -> VerifiedArtifact {
    let mut file = tempfile::tempfile().expect("temporary files work");
    file.write_all(text.as_bytes()).expect("it is written");
    file.rewind().expect("it seeks");
    VerifiedArtifact { file, sha256: String::new(), bytes: text.len() as u64, parts: Vec::new() }
}

fn text(text: &str) -> PromptInput {
    PromptInput::Text(text.into())
}

async fn until(wanted: impl Fn() -> bool) {
    let poll = async {
        while !wanted() {
            time::sleep(Duration::from_millis(1)).await;
        }
    };
    time::timeout(TIMEOUT, poll).await.expect("it happens in time");
}

#[tokio::test]
async fn adapters_come_as_open_files_while_the_model_is_loaded() {
    let mut worker = Worker::with_model().await;
    assert_eq!(worker.add_adapter(1, "4").await, Ok(Reply::Adapter(AdapterId(4))));
    assert!(matches!(worker.add_adapter(2, "no number").await, Err(EngineError::InvalidModel { .. })));
    assert_eq!(worker.add_adapter(3, "5").await, Ok(Reply::Adapter(AdapterId(5))));
    assert_eq!(worker.ask(4, Query::RemoveAdapter(AdapterId(4))).await, Ok(Reply::Removed));
    assert_eq!(worker.ask(5, Query::RemoveAdapter(AdapterId(4))).await, Err(EngineError::NotLoaded));
    assert_eq!(*worker.runtime.adapters.lock(), [AdapterId(5)]);
    worker.leave().await;
}

#[tokio::test]
async fn queries_are_answered_by_their_numbers() {
    let mut worker = Worker::with_model().await;
    assert_eq!(worker.ask(8, Query::CountTokens(text("a"))).await, Ok(Reply::Tokens(5)));
    let expected = Embeddings { vectors: vec![vec![0.25], vec![-3.0]], prompt_tokens: 3 };
    let embedded = worker.ask(9, Query::Embed(vec![text("0.25"), text("-3")])).await;
    assert_eq!(embedded, Ok(Reply::Vectors(expected)));
}

#[tokio::test]
async fn a_vector_that_is_not_finite_is_an_error_and_not_a_broken_frame() {
    let mut worker = Worker::with_model().await;
    let embedded = worker.ask(1, Query::Embed(vec![text("NaN")])).await;
    assert!(matches!(embedded, Err(EngineError::Failed { .. })), "{embedded:?}");
    assert_eq!(worker.ask(2, Query::CountTokens(text("a"))).await, Ok(Reply::Tokens(5)));
}

#[tokio::test]
async fn a_query_that_nobody_waits_for_any_more_is_dropped() {
    let mut worker = Worker::with_model().await;
    worker.say(ToChild::Ask { id: 1, query: Query::Embed(vec![text("never")]) }).await;
    let runtime = Arc::clone(&worker.runtime);
    until(|| Arc::strong_count(&runtime.held) == 2).await;
    worker.say(ToChild::Cancel { id: 1 }).await;
    until(|| Arc::strong_count(&runtime.held) == 1).await;
    assert_eq!(worker.ask(2, Query::CountTokens(text("a"))).await, Ok(Reply::Tokens(5)));
}

#[tokio::test]
async fn a_load_that_panics_ends_the_process() {
    let (_files, their_files) = StdUnixStream::pair().expect("sockets work");
    let (_frames, their_frames) = UnixStream::pair().expect("sockets work");
    let runtime = Arc::new(Numbers { panics_when_it_loads: true, ..Numbers::default() });
    let served = time::timeout(TIMEOUT, serve(runtime, their_files, their_frames, work())).await;
    assert!(matches!(served, Ok(Ok(End::Panicked))), "{served:?}");
}

#[tokio::test]
async fn a_query_that_panics_ends_the_process() {
    let mut worker = Worker::with_model().await;
    worker.say(ToChild::Ask { id: 1, query: Query::Embed(vec![text("no number")]) }).await;
    worker.tasks.close();
    time::timeout(TIMEOUT, worker.tasks.wait()).await.expect("the child ends");
}
