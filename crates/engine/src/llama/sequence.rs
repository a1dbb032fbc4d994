//! One generation: its request, its state, and how its tokens become an answer.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::draft::Drafter;
use super::kv_cache::{CachedPrefix, CachedSequence};
use super::native::{Token, Vocabulary};
use super::outbox::Outbox;
use crate::answer_parser::{AnswerParser, Delta};
use crate::grammar::Constraint;
use crate::model_runtime::{
    AdapterId, EngineError, FinishReason, Piece, Sampling, TokenLogprob, TokenUsage, unsupported,
};
use crate::sampler::{History, SampleError, Sampler};
use crate::text_assembler::TextAssembler;

pub(super) struct Job {
    /// The tokens of the prompt, followed by those of the answer that the reader already has.
    pub(super) tokens: Vec<Token>,
    /// The number of tokens that belong to the prompt.
    pub(super) prompt_tokens: usize,
    pub(super) adapter: Option<AdapterId>,
    pub(super) sampling: Sampling,
    pub(super) stop: Vec<String>,
    /// The maximum number of tokens in the answer, including those that the reader already has.
    pub(super) limit: u32,
    pub(super) ignore_eos: bool,
    pub(super) logprobs: Option<u32>,
    /// The text of the prompt, to be sent before the answer.
    pub(super) echo: Option<String>,
    /// Whether the log-probabilities of the prompt are sent as well.
    pub(super) tells_prompt: bool,
    /// The constraint on the answer (structured output).
    pub(super) constraint: Option<Constraint>,
    /// Parses the answer to a conversation.
    pub(super) parser: Option<AnswerParser>,
    /// Special tokens whose text is part of the answer.
    pub(super) spoken: Arc<BTreeSet<Token>>,
    /// The answer that the caller predicts.
    pub(super) prediction: Vec<Token>,
    /// Whether it is evaluated by itself, so that repeating it gives bit-identical results.
    pub(super) deterministic: bool,
    /// Whether it pauses while others run that do not.
    pub(super) yields: bool,
    pub(super) outbox: Outbox,
    pub(super) admitted: OwnedSemaphorePermit,
}

/// A waiting or running generation.
pub(super) struct Sequence {
    pub(super) job: Job,
    /// The tokens of the prompt and of the answer so far.
    pub(super) tokens: Vec<Token>,
    /// The tokens that are in the KV cache; `None` while it waits.
    pub(super) in_cache: Option<CachedSequence>,
    /// The logits after the prompt, if known at the start; the first token is sampled from them.
    pub(super) known: Option<Arc<[f32]>>,
    /// Draft tokens that are evaluated with the last one.
    pub(super) suggested: Vec<Token>,
    pub(super) drafter: Drafter,
    /// Prompt tokens that were cached at its first start.
    cached: Option<u32>,
    start_sent: bool,
    /// The number of prompt tokens whose log-probabilities were sent.
    prompt_sent: usize,
    history: History,
    assembler: TextAssembler,
    /// Reasoning tokens of the answer, including the tags around the reasoning.
    thoughts: u32,
}

/// The outcome of drawing a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drawn {
    /// The generation continues with this token.
    Token(Token),
    /// The generation ended, with a token or without.
    End(FinishReason),
}

/// A generation that has ended. Its reader is notified once its cells are free.
pub(super) struct Finished {
    outbox: Outbox,
    last: Piece,
    reason: FinishReason,
    usage: TokenUsage,
}

impl Sequence {
    /// Returns `None`, and sends an error to the reader, if the tokens that it continues violate the constraint.
    pub(super) fn new(mut job: Job, vocabulary: Vocabulary<'_>) -> Option<Self> {
        let tokens = std::mem::take(&mut job.tokens);
        let (prompt, continued) = tokens.split_at(job.prompt_tokens);
        let unsigned = |tokens: &[Token]| tokens.iter().map(|token| token.cast_unsigned()).collect::<Vec<_>>();
        let mut history =
            if History::is_needed(&job.sampling) { History::new(&unsigned(prompt)) } else { History::default() };
        let mut assembler = TextAssembler::new(&job.stop);
        let mut thoughts = 0;
        for token in continued {
            history.push(token.cast_unsigned());
            if let Some(constraint) = &mut job.constraint
                && let Err(error) = constraint.accept(token.cast_unsigned())
            {
                job.outbox.fail(error);
                return None;
            }
            // The reader already has this text.
            let text = assembler.push(&vocabulary.piece(*token, job.spoken.contains(token)));
            let _ = read(&mut job.parser, text, &mut thoughts);
        }
        let drafter = Drafter::new(std::mem::take(&mut job.prediction));
        Some(Self {
            job,
            tokens,
            in_cache: None,
            known: None,
            suggested: Vec::new(),
            drafter,
            cached: None,
            start_sent: false,
            prompt_sent: 0,
            history,
            assembler,
            thoughts,
        })
    }

    /// Returns the number of tokens in the KV cache.
    pub(super) fn evaluated(&self) -> usize {
        self.in_cache.as_ref().map_or(0, |in_cache| in_cache.tokens.len())
    }

    /// Returns the number of tokens to evaluate before the next one can be drawn.
    pub(super) fn pending(&self) -> usize {
        self.tokens.len() - self.evaluated()
    }

    /// Returns the number of tokens in the answer.
    pub(super) fn generated(&self) -> u32 {
        (self.tokens.len() - self.job.prompt_tokens) as u32
    }

    /// Returns whether the whole prompt is evaluated, and only the last token is not.
    pub(super) fn is_generating(&self) -> bool {
        self.pending() == 1 && self.evaluated() >= self.job.prompt_tokens
    }

    /// Returns why the answer is over before another token is drawn, if it is: all tokens were drawn, or an answer that
    /// is continued had ended.
    pub(super) fn is_over(&self) -> Option<FinishReason> {
        if self.has_ended() { Some(FinishReason::Stop) } else { (self.left() == 0).then_some(FinishReason::Length) }
    }

    /// Returns whether a stop sequence or a call has ended the answer.
    fn has_ended(&self) -> bool {
        self.assembler.is_stopped() || self.job.parser.as_ref().is_some_and(AnswerParser::is_done)
    }

    /// Returns the number of tokens that may still be drawn.
    pub(super) fn left(&self) -> u32 {
        self.job.limit.saturating_sub(self.generated())
    }

    /// Starts with a cached prefix of its tokens.
    pub(super) fn start(&mut self, prefix: CachedPrefix) {
        // A preempted generation that starts again keeps the count of its first start.
        self.cached.get_or_insert(prefix.cached.tokens.len().min(self.job.prompt_tokens) as u32);
        self.in_cache = Some(prefix.cached);
        self.known = prefix.logits;
    }

    /// Records how much of the prompt is evaluated, for progress reports.
    pub(super) fn note_reading(&self) {
        self.job.outbox.reading().reach(self.evaluated());
    }

    /// Sends the start event to the reader, once.
    pub(super) fn send_start(&mut self, vocabulary: Vocabulary<'_>) {
        if let Some(cached) = self.cached
            && !std::mem::replace(&mut self.start_sent, true)
        {
            self.job.outbox.started(self.job.prompt_tokens as u32, cached);
            if self.job.tells_prompt {
                self.tell_first(vocabulary);
            }
        }
    }

    /// Sends the text of the prompt and its first token, which has no log-probability.
    fn tell_first(&mut self, vocabulary: Vocabulary<'_>) {
        let text = self.job.echo.take().unwrap_or_default();
        let first = self.tokens[0];
        let bytes = vocabulary.piece(first, true);
        // The token that the tokenizer puts before a text is not part of the text.
        let is_written = text.as_bytes().starts_with(&bytes);
        let bytes = if is_written { bytes } else { Vec::new() };
        let logprob = TokenLogprob { token: first.cast_unsigned(), bytes, logprob: 0.0, top: Vec::new() };
        self.prompt_sent = 1;
        self.job.outbox.piece(Piece { text, logprobs: vec![logprob], ..Piece::default() });
    }

    /// Returns whether log-probabilities of prompt tokens remain to be sent.
    pub(super) fn echoes_prompt(&self) -> bool {
        self.job.tells_prompt && self.prompt_sent < self.job.prompt_tokens
    }

    /// Returns whether the logits at a position give the log-probability of a prompt token that was not sent yet.
    pub(super) fn echoes_after(&self, position: usize) -> bool {
        self.job.tells_prompt && (self.prompt_sent.max(1)..self.job.prompt_tokens).contains(&(position + 1))
    }

    /// Sends the log-probability of the prompt token after a position.
    pub(super) fn send_prompt_logprob(
        &mut self,
        position: usize,
        logits: &[f32],
        sampler: &mut Sampler,
        vocabulary: Vocabulary<'_>,
    ) {
        if let (Some(top), Some(token)) = (self.job.logprobs, self.tokens.get(position + 1)) {
            let logprob = logprobs(sampler, logits, token.cast_unsigned(), top, vocabulary);
            self.prompt_sent = position + 2;
            self.job.outbox.piece(Piece { logprobs: vec![logprob], ..Piece::default() });
        }
    }

    /// Draws the next token from the logits of the last one and sends it to the reader.
    pub(super) fn draw(
        &mut self,
        logits: &[f32],
        sampler: &mut Sampler,
        vocabulary: Vocabulary<'_>,
    ) -> Result<Drawn, EngineError> {
        // The random number depends only on the seed and the token's position, so a continued answer draws as the
        // first attempt would have.
        let position = self.tokens.len() as u64;
        let mask = self.job.constraint.as_mut().map(Constraint::mask).transpose()?;
        let token =
            sampler.sample(logits, &self.job.sampling, position, &self.history, mask.as_ref()).map_err(refusal)?;
        let drawn = token.cast_signed();
        if vocabulary.is_end(drawn) && !self.job.ignore_eos {
            return Ok(Drawn::End(FinishReason::Stop));
        }
        if let Some(constraint) = &mut self.job.constraint {
            constraint.accept(token)?;
        }
        self.tokens.push(drawn);
        self.history.push(token);
        let bytes = vocabulary.piece(drawn, self.job.spoken.contains(&drawn));
        let logprobs = self.job.logprobs.map(|top| logprobs(sampler, logits, token, top, vocabulary));
        let text = self.assembler.push(&bytes);
        let delta = read(&mut self.job.parser, text, &mut self.thoughts);
        let mut piece = Piece { tokens: vec![token], logprobs: logprobs.into_iter().collect(), ..piece(delta) };
        if let Some(echo) = self.job.echo.take() {
            piece.text.insert_str(0, &echo);
        }
        self.job.outbox.piece(piece);
        Ok(self.is_over().map_or(Drawn::Token(drawn), Drawn::End))
    }

    /// Ends the generation and releases its permit.
    pub(super) fn finish(mut self, mut reason: FinishReason) -> Finished {
        let usage = TokenUsage {
            prompt_tokens: self.job.prompt_tokens as u32,
            completion_tokens: self.generated(),
            cached_tokens: self.cached.unwrap_or(0),
            reasoning_tokens: self.thoughts,
        };
        let rest = self.assembler.finish(reason == FinishReason::Length);
        // This text belongs to tokens that were already sent and counted.
        let mut last = piece(read(&mut self.job.parser, rest, &mut 0));
        last.stop_sequence = self.assembler.stop_sequence().map(str::to_owned);
        if let Some(parser) = &mut self.job.parser {
            let (delta, calls) = parser.finish(reason == FinishReason::Length);
            last.append(piece(delta));
            if calls && reason == FinishReason::Stop {
                reason = FinishReason::ToolCalls;
            }
        }
        // An answer without a token has not sent the echo yet.
        if let Some(echo) = self.job.echo.take() {
            last.text.insert_str(0, &echo);
        }
        drop(self.job.admitted);
        Finished { outbox: self.job.outbox, last, reason, usage }
    }
}

/// Parses the text of one token if there is a parser, and counts the token if it is part of reasoning.
fn read(parser: &mut Option<AnswerParser>, text: String, thoughts: &mut u32) -> Delta {
    let Some(parser) = parser else { return Delta { text, ..Delta::default() } };
    let was_thinking = parser.is_thinking();
    let delta = parser.push(&text);
    *thoughts += u32::from(was_thinking || parser.is_thinking() || !delta.reasoning.is_empty());
    delta
}

/// Separates errors that the request caused, since an engine that fails several times in a row is replaced.
fn refusal(error: SampleError) -> EngineError {
    match error {
        SampleError::NothingAllowed => unsupported("logit_bias", error.to_string()),
        SampleError::NotFinite => EngineError::Failed { reason: error.to_string() },
    }
}

fn piece(delta: Delta) -> Piece {
    let Delta { text, reasoning, tool_calls } = delta;
    Piece { text, reasoning, tool_calls, ..Piece::default() }
}

impl Finished {
    pub(super) fn tell(self) {
        self.outbox.done(self.last, self.reason, self.usage);
    }
}

fn logprobs(sampler: &mut Sampler, logits: &[f32], token: u32, top: u32, vocabulary: Vocabulary<'_>) -> TokenLogprob {
    let say = |token: u32, logprob: f32, top| {
        // The texts of special tokens are included, since a caller that asks for log-probabilities wants to see them.
        TokenLogprob { token, bytes: vocabulary.piece(token.cast_signed(), true), logprob, top }
    };
    let (logprob, top) = sampler.logprob(logits, token, top);
    let top = top.into_iter().map(|(token, logprob)| say(token, logprob, Vec::new())).collect();
    say(token, logprob, top)
}
