//! The answers to one job, generated concurrently and merged into one stream of events.

use std::future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use engine::{EngineError, Event, GenerateRequest, GenerateStream, ModelRuntime, PromptInput};
use futures_util::Stream as _;
use tokio::time;

use super::plan::Plan;

/// How long to wait before retrying when the engine is full.
const BUSY_WAIT: Duration = Duration::from_millis(100);

/// The answers to one job. Dropping them stops the engine's work on all of them.
///
/// The first answer to each prompt begins alone. Once its prompt is evaluated, the others begin one after the other.
/// They never exceed the engine's slots, so that they find the prompt in the prefix cache and leave the engine's queue
/// to other jobs.
pub(super) struct Choices {
    runtime: Arc<dyn ModelRuntime>,
    /// The request of the first answer. The others differ in the seed or the prompt.
    request: GenerateRequest,
    /// Empty if all have the prompt of the request.
    prompts: Vec<PromptInput>,
    plan: Plan,
    side_by_side: usize,
    /// The next answer to begin, if any is left.
    next: Option<u32>,
    /// The next answer, while it is being submitted to the engine.
    beginning: Option<Beginning>,
    running: Vec<Running>,
    /// The index of the answer that was polled last.
    turn: usize,
    /// The last prompt that was evaluated; all before it are evaluated as well.
    primed: Option<u32>,
}

type Beginning = Pin<Box<dyn Future<Output = Result<GenerateStream, EngineError>> + Send>>;

struct Running {
    index: u32,
    events: GenerateStream,
}

impl Choices {
    /// Begins the first of the planned answers, to several prompts or to that of the request. Errors of the request are
    /// returned here, and errors of a later prompt when its turn comes.
    pub(super) async fn begin(
        runtime: Arc<dyn ModelRuntime>,
        request: GenerateRequest,
        prompts: Vec<PromptInput>,
        plan: Plan,
        slots: u32,
    ) -> Result<Self, EngineError> {
        let mut running = vec![];
        let first = plan.next(0);
        if let Some(index) = first {
            let events = runtime.generate(of_index(&request, &prompts, &plan, index)).await?;
            running.push(Running { index, events });
        }
        Ok(Self {
            runtime,
            request,
            prompts,
            side_by_side: slots.max(1) as usize,
            next: first.and_then(|index| plan.next(index + 1)),
            plan,
            beginning: None,
            running,
            turn: 0,
            primed: None,
        })
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Returns whether no answer is running: the next one waits for capacity in the engine.
    pub(super) fn is_outside(&self) -> bool {
        self.running.is_empty()
    }

    /// Returns the next event and the index of its answer. Must not be called after all answers have ended. Cancel
    /// safe.
    pub(super) async fn next(&mut self) -> Result<(u32, Event), EngineError> {
        future::poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<(u32, Event), EngineError>> {
        self.poll_begin(context)?;
        // Round-robin, so that a fast answer does not hold up the others.
        for _ in 0..self.running.len() {
            self.turn = (self.turn + 1) % self.running.len();
            let Running { index, events } = &mut self.running[self.turn];
            let Poll::Ready(event) = Pin::new(events).poll_next(context) else { continue };
            let (index, event) = (*index, event.unwrap_or_else(|| Err(unfinished()))?);
            if !matches!(event, Event::Started { .. } | Event::Progress(_)) {
                self.primed = self.primed.max(Some(self.plan.prompt_of(index)));
            }
            if let Event::Done { .. } = event {
                self.running.swap_remove(self.turn);
            }
            return Poll::Ready(Ok((index, event)));
        }
        Poll::Pending
    }

    /// Returns the next answer if it may begin: a slot is free, and it is the first to its prompt or its prompt is
    /// evaluated.
    fn may_begin(&self) -> Option<u32> {
        let index = self.next.filter(|_| self.running.len() < self.side_by_side)?;
        let is_primed = self.primed.is_some_and(|primed| primed >= self.plan.prompt_of(index));
        (is_primed || self.plan.is_first(index)).then_some(index)
    }

    /// Begins as many of the remaining answers as may run.
    fn poll_begin(&mut self, context: &mut Context<'_>) -> Result<(), EngineError> {
        while let Some(index) = self.may_begin() {
            let Self { runtime, request, prompts, plan, .. } = self;
            let beginning = self.beginning.get_or_insert_with(|| {
                Box::pin(begin_when_there_is_room(runtime.clone(), of_index(request, prompts, plan, index)))
            });
            let Poll::Ready(begun) = beginning.as_mut().poll(context) else { return Ok(()) };
            self.beginning = None;
            self.running.push(Running { index, events: begun? });
            self.next = self.plan.next(index + 1);
        }
        Ok(())
    }
}

/// Waits for a full engine as long as the caller listens: part of the answer may have been sent already.
async fn begin_when_there_is_room(
    runtime: Arc<dyn ModelRuntime>,
    request: GenerateRequest,
) -> Result<GenerateStream, EngineError> {
    loop {
        match runtime.generate(request.clone()).await {
            Err(EngineError::Busy) => time::sleep(BUSY_WAIT).await,
            outcome => return outcome,
        }
    }
}

/// Returns the request of one of several answers. It is the same on every attempt, and the first answer to each prompt
/// is the one that a single answer would be.
fn of_index(request: &GenerateRequest, prompts: &[PromptInput], plan: &Plan, index: u32) -> GenerateRequest {
    /// The golden ratio's fraction, whose multiples are far apart.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut request = request.clone();
    if let Some(prompt) = prompts.get(plan.prompt_of(index) as usize) {
        request.input = prompt.clone();
    }
    request.sampling.seed = request.sampling.seed.wrapping_add(STEP.wrapping_mul(u64::from(plan.number_of(index))));
    request.continued = plan.delivered(index).to_vec();
    request.continued_text = plan.text(index).cloned();
    request
}

/// The error for a stream that ends without a `Done` event.
fn unfinished() -> EngineError {
    EngineError::Failed { reason: "the stream ended without an end".into() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use tokio_util::task::TaskTracker;

    use engine::{LoadOptions, MockOptions, MockRuntime, VerifiedArtifact, no_progress};

    use super::*;

    async fn engine(slots: u32, queue_max: u32, mock: MockOptions) -> (Arc<MockRuntime>, GenerateRequest) {
        let runtime = Arc::new(MockRuntime::new(mock));
        let file = tempfile::tempfile().expect("temporary files work");
        let artifact = VerifiedArtifact { file, sha256: String::new(), bytes: 1, parts: vec![] };
        let options = LoadOptions { slots, queue_max, ..LoadOptions::default() };
        let model = runtime.load(artifact, options, no_progress()).await.expect("it loads").id;
        (runtime, GenerateRequest::new(model, PromptInput::Text("once".into())))
    }

    fn paced() -> MockOptions {
        let second = Duration::from_secs(1);
        MockOptions { first_token: second, per_token: second, tokens: 3, ..MockOptions::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_others_begin_once_the_prompt_of_the_first_is_evaluated() {
        let (runtime, request) = engine(4, 0, paced()).await;
        let mut choices =
            Choices::begin(runtime.clone(), request.clone(), vec![], Plan::new(1, 3), 4).await.expect("it begins");
        let begun = time::Instant::now();
        let mut starts = vec![];
        while starts.len() < 4 {
            let (index, event) = choices.next().await.expect("it runs");
            starts.push((index, matches!(event, Event::Started { .. })));
        }
        assert_eq!(starts, [(0, true), (0, false), (1, true), (2, true)]);
        assert_eq!((runtime.load_state()[0].running, begun.elapsed()), (3, Duration::from_secs(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn each_runs_to_its_end_however_little_room_there_is() {
        // Another job holds the queue's only place, so each submission finds the engine full at first.
        let (runtime, request) = engine(1, 1, paced()).await;
        let mut choices =
            Choices::begin(runtime.clone(), request.clone(), vec![], Plan::new(1, 3), 1).await.expect("it begins");
        let mut other = runtime.generate(request).await.expect("the place in the queue");
        let other = TaskTracker::new().spawn(async move { while other.next().await.is_some() {} });
        let mut ended = vec![];
        while ended.len() < 3 {
            if let (index, Event::Done { .. }) = choices.next().await.expect("it runs") {
                ended.push(index);
            }
        }
        assert_eq!(ended, [0, 1, 2]);
        other.await.expect("the other's job ends");
    }

    #[tokio::test(start_paused = true)]
    async fn dropping_them_stops_them_all() {
        let (runtime, request) = engine(4, 0, MockOptions { tokens: 1_000, ..paced() }).await;
        let mut choices =
            Choices::begin(runtime.clone(), request.clone(), vec![], Plan::new(1, 3), 4).await.expect("it begins");
        for _ in 0..12 {
            choices.next().await.expect("it runs");
        }
        assert_eq!(runtime.load_state()[0].running, 3);
        drop(choices);
        time::sleep(Duration::from_secs(5)).await;
        let state = &runtime.load_state()[0];
        assert_eq!((state.running, state.counters.cancelled), (0, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn seeds_differ_and_the_first_is_that_of_the_request() {
        let (_, request) = engine(1, 0, MockOptions::default()).await;
        let plan = Plan::new(1, 16);
        let seeds: BTreeSet<_> = (0..16).map(|index| of_index(&request, &[], &plan, index).sampling.seed).collect();
        assert_eq!((seeds.len(), of_index(&request, &[], &plan, 0)), (16, request));
    }
}
