//! How much an answer may contain and cost, whatever the worker says. Pure.
//!
//! Workers are members of the pool, but their word on usage and length is not trusted: a worker that lies must not fill
//! the caller's memory or the tenant's bill.

use protocol::infer::{InferRequest, Input};
use protocol::usage::TokenUsage;

/// Tokens that a chat template and a model's own system prompt may add to a conversation.
const TEMPLATE_TOKENS_MAX: u32 = 2_048;
/// Tokens that a reranker's template may add to each pair of a query and a text.
const PAIR_TOKENS_MAX: usize = 256;
/// Tokens that a tokenizer may add to any other prompt.
const SPECIAL_TOKENS_MAX: u32 = 16;
/// A count that cannot be checked is a lie if it is this many times the bound. Servers count in ways of their own.
const EXCESS: u32 = 2;
/// Tokens of an answer whose request sets no `maxTokens`, for a model whose context length is unknown.
const TOKENS_MAX: u32 = 1 << 20;
/// Bytes of a chunk for each token: the longest tokens of known vocabularies have some hundred bytes, and the fields
/// around them some hundred more.
const TOKEN_BYTES_MAX: u64 = 2_048;
/// Bytes of one alternative of a token's log-probability.
const ALTERNATIVE_BYTES_MAX: u64 = 1_024;
/// Bytes of one vector, as Base64.
const VECTOR_BYTES_MAX: u64 = 512 * 1024;
/// Bytes of everything else, such as progress.
const OTHER_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a listed token on the wire, for each byte of the request.
const LISTED_BYTES_MAX: u64 = 64;
/// Bytes of text for which a chunk without token ids counts as one token.
pub(crate) const BYTES_PER_TOKEN: usize = 4;

/// The most that an answer to a request may contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    prompt_tokens: u32,
    completion_tokens: u32,
    /// The most tokens of one answer.
    answer_tokens: u32,
    bytes: u64,
    /// The most tokens of a whole prompt and one answer.
    sequence_tokens: u64,
    /// Context length that the worker reports; 0 if unknown.
    context_length: u32,
    /// Whether chunks may repeat the prompt.
    has_echo: bool,
}

impl Bounds {
    /// Computes the bounds of the answer to a request that takes `request_bytes` on the wire. `context_length` is the
    /// model's, in tokens; 0 if unknown.
    pub(crate) fn of(request: &InferRequest, request_bytes: usize, context_length: u32) -> Self {
        Self::limited(&request.input, request.input.max_tokens, request_bytes, context_length)
    }

    /// Computes the bounds if each answer has at most `max_tokens` tokens.
    pub(crate) fn limited(input: &Input, max_tokens: Option<u32>, request_bytes: usize, context_length: u32) -> Self {
        let context = if context_length == 0 { TOKENS_MAX } else { context_length.min(TOKENS_MAX) };
        let request_bytes = u32::try_from(request_bytes).unwrap_or(u32::MAX);
        let added = if input.messages.is_some() { TEMPLATE_TOKENS_MAX } else { SPECIAL_TOKENS_MAX };
        // A token has at least one byte.
        let from_text = request_bytes.saturating_add(added).saturating_add(pair_tokens(input));
        let prompt_tokens = from_text.min(context.saturating_mul(prompts(input)));
        let completion_tokens = if input.embed.is_some() || input.count_only {
            0
        } else {
            max_tokens.unwrap_or(context).saturating_mul(input.answers())
        };
        let answer_tokens = max_tokens.unwrap_or(context).min(completion_tokens);
        let echoed = if input.echo { prompt_tokens.saturating_mul(input.answers_each()) } else { 0 };
        let alternatives = u64::from(input.logprobs.unwrap_or(0));
        let per_token = TOKEN_BYTES_MAX + alternatives * ALTERNATIVE_BYTES_MAX;
        let vectors = input.embed.as_ref().map_or(0, Vec::len) as u64;
        let bytes = (u64::from(completion_tokens) + u64::from(echoed)).saturating_mul(per_token);
        let listed = if input.list_tokens.is_some() { u64::from(from_text) * LISTED_BYTES_MAX } else { 0 };
        let bytes = bytes.saturating_add(vectors * VECTOR_BYTES_MAX).saturating_add(listed);
        let bytes = bytes.saturating_add(OTHER_BYTES_MAX);
        let sequence_tokens = u64::from(from_text) + u64::from(max_tokens.unwrap_or(0));
        let has_echo = input.echo;
        Self { prompt_tokens, completion_tokens, answer_tokens, bytes, sequence_tokens, context_length, has_echo }
    }
}

/// Returns the most tokens that ranking adds to those of the request: a reranker reads the query with each text.
fn pair_tokens(input: &Input) -> u32 {
    let Some(query) = &input.query else { return 0 };
    let texts = input.embed.as_ref().map_or(0, Vec::len);
    u32::try_from(texts.saturating_mul(query.len().saturating_add(PAIR_TOKENS_MAX))).unwrap_or(u32::MAX)
}

/// Returns the most prompts with a context of their own. A model made for embeddings reads the query by itself.
fn prompts(input: &Input) -> u32 {
    let texts = input.embed.as_ref().map_or(1, Vec::len).saturating_add(usize::from(input.query.is_some()));
    let prompts = input.prompts.as_ref().map_or(1, Vec::len).max(texts);
    u32::try_from(prompts).unwrap_or(u32::MAX)
}

impl Bounds {
    /// Returns the most tokens, of prompt and answers, that the job can be billed.
    pub(crate) fn tokens(&self) -> u64 {
        u64::from(self.prompt_tokens) + u64::from(self.completion_tokens)
    }

    /// Returns whether the prompt and its answer can be too long for the context that the worker reports.
    pub(crate) fn can_be_too_long(&self) -> bool {
        self.context_length == 0 || self.sequence_tokens >= u64::from(self.context_length)
    }
}

/// Counts what a job delivers, over all attempts that continue its answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meter {
    bounds: Bounds,
    bytes: u64,
    /// Tokens with ids.
    tokens: u64,
    /// Tokens, as far as the chunks show.
    shown: u64,
    /// What the worker claims of the prompt.
    claimed: TokenUsage,
}

/// The content of a chunk, as far as it is counted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Content {
    /// Length of the text, the reasoning and the function calls, in bytes.
    pub(crate) bytes: usize,
    /// Number of token ids.
    pub(crate) tokens: usize,
    pub(crate) logprobs: usize,
}

impl Meter {
    pub(crate) fn new(bounds: Bounds) -> Self {
        Self { bounds, bytes: 0, tokens: 0, shown: 0, claimed: TokenUsage::default() }
    }

    /// Goes on within the bounds of another worker. The prompt is the same.
    pub(crate) fn within(self, bounds: Bounds) -> Self {
        let prompt_tokens = bounds.prompt_tokens.min(self.bounds.prompt_tokens);
        Self { bounds: Bounds { prompt_tokens, ..bounds }, ..self }
    }

    /// Returns whether one answer may have so many tokens.
    pub(crate) fn may_answer(&self, tokens: usize) -> bool {
        tokens as u64 <= u64::from(self.bounds.answer_tokens)
    }

    /// Counts the bytes of a chunk. Returns whether the answer is still within its bounds; otherwise nothing is
    /// counted.
    #[must_use]
    pub(crate) fn take_bytes(&mut self, bytes: usize) -> bool {
        let bytes = self.bytes.saturating_add(bytes as u64);
        let is_within = bytes <= self.bounds.bytes;
        if is_within {
            self.bytes = bytes;
        }
        is_within
    }

    /// Counts the content of a chunk. Returns whether the answer is still within its bounds; otherwise nothing is
    /// counted.
    #[must_use]
    pub(crate) fn take(&mut self, content: Content, claimed: Option<TokenUsage>) -> bool {
        let tokens = self.tokens + content.tokens as u64;
        if tokens > u64::from(self.bounds.completion_tokens) {
            return false;
        }
        self.tokens = tokens;
        if let Some(claimed) = claimed {
            // A worker that continues an answer may not know all prompts.
            let prompt_tokens = claimed.prompt_tokens.max(self.claimed.prompt_tokens);
            self.claimed = TokenUsage { prompt_tokens, ..claimed };
        }
        // A server without token ids may join several tokens in a chunk. Log-probabilities count them. With an echo, a
        // chunk with log-probabilities and without ids repeats the prompt.
        let shown = match content {
            Content { tokens: 0, logprobs: 1.., .. } if self.bounds.has_echo => 0,
            // Text that was held back: its tokens were counted.
            Content { tokens: 0, .. } if self.tokens > 0 => 0,
            Content { tokens: 0, logprobs: count @ 1.., .. } => count,
            Content { tokens: 0, bytes, .. } => bytes.div_ceil(BYTES_PER_TOKEN),
            Content { tokens, .. } => tokens,
        };
        self.shown += shown as u64;
        true
    }

    /// Returns what the job is billed if it ends now, without the worker's word on the answer's tokens.
    pub(crate) fn delivered(&self) -> TokenUsage {
        self.bounded(TokenUsage { completion_tokens: u32::MAX, ..self.claimed })
    }

    /// Returns whether an honest worker cannot claim this usage. Without token ids, a count cannot be checked: a server
    /// may join tokens in a chunk, or count those that it dropped.
    pub(crate) fn is_impossible(&self, claimed: TokenUsage) -> bool {
        let has_ids = self.tokens > 0 && self.tokens == self.shown;
        claimed.prompt_tokens > self.bounds.prompt_tokens.saturating_mul(EXCESS)
            || claimed.completion_tokens > self.bounds.completion_tokens.saturating_mul(EXCESS)
            || has_ids && u64::from(claimed.completion_tokens) > self.tokens
    }

    /// Returns what the job is billed of the usage that the worker claims.
    pub(crate) fn bounded(&self, claimed: TokenUsage) -> TokenUsage {
        let shown = u32::try_from(self.shown).unwrap_or(u32::MAX);
        let completion_tokens = claimed.completion_tokens.min(shown).min(self.bounds.completion_tokens);
        let prompt_tokens = claimed.prompt_tokens.max(self.claimed.prompt_tokens).min(self.bounds.prompt_tokens);
        TokenUsage {
            prompt_tokens,
            completion_tokens,
            cached_tokens: claimed.cached_tokens.min(prompt_tokens),
            reasoning_tokens: claimed.reasoning_tokens.min(completion_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bounds(prompt_tokens: u32, completion_tokens: u32) -> Bounds {
        let sequence_tokens = u64::from(prompt_tokens) + u64::from(completion_tokens);
        let (bytes, context_length, has_echo, answer_tokens) = (1 << 20, 0, false, completion_tokens);
        Bounds { prompt_tokens, completion_tokens, answer_tokens, bytes, sequence_tokens, context_length, has_echo }
    }

    fn usage(prompt_tokens: u32, completion_tokens: u32, cached_tokens: u32, reasoning_tokens: u32) -> TokenUsage {
        TokenUsage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens }
    }

    fn tokens(tokens: usize) -> Content {
        Content { tokens, ..Content::default() }
    }

    #[test]
    fn a_query_counts_once_for_each_text_and_listed_tokens_have_room() {
        let texts = |count: usize| Some(vec![text(); count]);
        let of = |input: &Input| Bounds::limited(input, None, 1_000, 0);
        let vectors = of(&Input { embed: texts(3), ..Input::default() });
        let scores = of(&Input { embed: texts(3), query: Some("x".repeat(100)), ..Input::default() });
        assert_eq!(scores.prompt_tokens - vectors.prompt_tokens, 3 * (100 + 256));
        let counted = Input { prompt: Some("x".into()), count_only: true, ..Input::default() };
        let listing = protocol::infer::TokenListing { add_special: true, parse_special: true };
        let listed = Input { list_tokens: Some(listing), ..counted.clone() };
        assert_eq!(of(&counted).bytes, OTHER_BYTES_MAX);
        assert!(of(&listed).bytes > OTHER_BYTES_MAX + 64 * 1_000 && of(&listed).completion_tokens == 0);
    }

    #[test]
    fn an_honest_ranking_is_possible_and_billed_in_full() {
        // A short query and short texts, and a template of 75 tokens around each pair.
        let input = Input { embed: Some(vec![text(); 100]), query: Some("q".into()), ..Input::default() };
        let ranked = usage(100 * (75 + 2), 0, 0, 0);
        let meter = Meter::new(Bounds::limited(&input, None, 600, 8_192));
        assert!(!meter.is_impossible(ranked));
        assert_eq!(meter.bounded(ranked), ranked);
        // The query and the only text each fill a context.
        let input = Input { embed: Some(vec![text()]), query: Some("q".repeat(2_000)), ..Input::default() };
        let filled = usage(2 * 512, 0, 0, 0);
        assert_eq!(Meter::new(Bounds::limited(&input, None, 4_000, 512)).bounded(filled), filled);
    }

    fn text() -> protocol::infer::EmbedInput {
        protocol::infer::EmbedInput::Text("a".into())
    }

    #[test]
    fn a_chunk_counts_its_tokens_or_its_text() {
        for (content, shown) in [
            (Content { bytes: 9, tokens: 2, logprobs: 2 }, 2),
            (Content { bytes: 1, ..Content::default() }, 1),
            (Content { bytes: 9, ..Content::default() }, 3),
            (Content { bytes: 9, logprobs: 5, tokens: 0 }, 5),
            (Content::default(), 0),
        ] {
            let mut meter = Meter::new(bounds(10, 10));
            assert!(meter.take(content, None));
            assert_eq!(meter.delivered().completion_tokens, shown, "{content:?}");
        }
    }

    #[test]
    fn an_echoed_prompt_is_no_part_of_the_answer() {
        let mut meter = Meter::new(Bounds { has_echo: true, ..bounds(10, 10) });
        assert!(meter.take(Content { bytes: 9, logprobs: 5, tokens: 0 }, None));
        assert_eq!(meter.delivered().completion_tokens, 0);
    }

    #[test]
    fn more_tokens_than_were_asked_for_break_the_bounds() {
        let mut meter = Meter::new(bounds(10, 3));
        assert!(meter.take(tokens(3), None));
        assert!(!meter.take(tokens(1), None));
        assert_eq!(meter.delivered().completion_tokens, 3);
        let mut meter = Meter::new(bounds(10, 3));
        assert!(meter.take_bytes(1 << 20));
        assert!(!meter.take_bytes(1));
    }

    #[test]
    fn a_prompt_of_few_bytes_cannot_be_too_long() {
        let of = |tokens, context_length| Bounds { context_length, ..bounds(100, tokens) };
        assert!(!of(10, 8192).can_be_too_long());
        assert!(of(8192, 8192).can_be_too_long(), "the answer counts, too");
        assert!(of(10, 0).can_be_too_long(), "the context is not known");
    }

    proptest! {
        #[test]
        fn nobody_is_billed_for_more_than_was_asked_for_or_shown(
            chunks in proptest::collection::vec(0usize..5, 0..20),
            claimed: [u32; 4],
            prompt_max in 0u32..1000,
            completion_max in 0u32..100,
        ) {
            let mut meter = Meter::new(bounds(prompt_max, completion_max));
            let claimed = usage(claimed[0], claimed[1], claimed[2], claimed[3]);
            // What breaks the bounds is not delivered, and does not count.
            let mut shown = 0;
            for count in chunks {
                let is_within = meter.take(tokens(count), None);
                prop_assert_eq!(is_within, shown + count <= completion_max as usize);
                shown += if is_within { count } else { 0 };
            }
            let billed = meter.bounded(claimed);
            prop_assert!(billed.completion_tokens <= shown as u32);
            prop_assert!(billed.prompt_tokens <= prompt_max);
            prop_assert!(billed.cached_tokens <= billed.prompt_tokens);
            prop_assert!(billed.reasoning_tokens <= billed.completion_tokens);
            let honest = usage(prompt_max, (shown as u32).min(completion_max), 0, 0);
            prop_assert_eq!(meter.bounded(honest), honest, "an honest claim is billed in full");
            prop_assert!(!meter.is_impossible(honest));
            prop_assert!(meter.is_impossible(usage(2 * prompt_max + 1, 0, 0, 0)));
            prop_assert!(meter.is_impossible(usage(0, 2 * completion_max + 1, 0, 0)));
            prop_assert!(shown == 0 || meter.is_impossible(usage(0, shown as u32 + 1, 0, 0)));
        }
    }
}
