//! One of the two sides, as its client sees it.

use std::time::Instant;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;

/// Something that continues tokens, greedily and past the end of the turn. Dropping the stream cancels.
#[async_trait]
pub(crate) trait Side: Sync {
    async fn ask(&self, question: Question<'_>) -> BoxStream<'static, Vec<u32>>;
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Question<'a> {
    pub(crate) prompt: &'a [u32],
    pub(crate) tokens: u32,
    pub(crate) adapter: Option<usize>,
    /// Says no token twice. Greedy answers of random weights are one token over and over. Ours only.
    pub(crate) varied: bool,
    /// What the answer may be. Ours only.
    pub(crate) prediction: &'a [u32],
    /// What the caller has of the answer already. Ours only.
    pub(crate) continued: &'a [u32],
    /// 0 takes the likeliest token. Ours only.
    pub(crate) temperature: f32,
}

/// When a client heard what.
pub(crate) struct Heard {
    pub(crate) sent_at: Instant,
    pub(crate) at: Vec<Instant>,
    pub(crate) tokens: Vec<u32>,
}

/// An answer on its way.
pub(crate) struct Answer {
    pub(crate) heard: Heard,
    stream: BoxStream<'static, Vec<u32>>,
}

impl Answer {
    pub(crate) async fn of(side: &dyn Side, question: Question<'_>) -> Self {
        let sent_at = Instant::now();
        let stream = side.ask(question).await;
        Self { heard: Heard { sent_at, at: Vec::new(), tokens: Vec::new() }, stream }
    }

    /// Waits for the next piece; false is the end.
    pub(crate) async fn next(&mut self) -> bool {
        let Some(tokens) = self.stream.next().await else { return false };
        self.heard.at.push(Instant::now());
        self.heard.tokens.extend(tokens);
        true
    }

    pub(crate) async fn whole(mut self) -> Heard {
        while self.next().await {}
        self.heard
    }
}
