//! What the caller of a job has of its answers, so that another worker can continue them. Pure.

use std::collections::BTreeMap;

use protocol::health::ModelServer;
use protocol::infer::{Delivered, DeliveredAnswer, DeliveredText, FinishReason, Input, OutputFormat, ToolChoice};

use crate::bounds::BYTES_PER_TOKEN;

/// The longest text that another server continues, in bytes. It is sent with the request.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Records the chunks of a job that were sent to its caller, over all attempts.
///
/// The tokens of an answer determine its text, so only they are kept: four bytes for each. Of servers that list no
/// tokens, the text is kept.
#[derive(Debug, Default)]
pub struct Journal {
    /// Number of the next chunk.
    seq: u64,
    answers: BTreeMap<u32, Answer>,
    /// Whether the caller has something that neither tokens nor text determine.
    is_untold: bool,
    /// Whether a server can continue an answer to the request after its text.
    allows_text: bool,
    is_chat: bool,
    /// The server that the current attempt runs on.
    server: Option<ModelServer>,
    /// Whether the job has output other than answers, such as vectors.
    has_other_output: bool,
}

#[derive(Debug, Default)]
struct Answer {
    tokens: Vec<u32>,
    /// The text of a server that lists no tokens.
    text: String,
    finish_reason: Option<FinishReason>,
    /// Whether part of the echoed prompt was sent, and no token after it.
    is_in_echo: bool,
}

/// The part of a chunk that the journal records.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry<'a> {
    pub index: u32,
    pub tokens: &'a [u32],
    pub text: &'a str,
    /// Whether the chunk has reasoning, calls or log-probabilities.
    pub has_other: bool,
    pub finish_reason: Option<FinishReason>,
}

impl Journal {
    pub fn new(input: &Input) -> Self {
        let has_other_output = input.embed.is_some() || input.count_only;
        let (allows_text, is_chat) = (allows_text(input), input.messages.is_some());
        Self { allows_text, is_chat, has_other_output, ..Self::default() }
    }

    /// Begins an attempt. `server` is what runs the model, if it is not an engine of the worker.
    pub fn begin(&mut self, server: Option<ModelServer>) {
        self.server = server;
    }

    /// Returns what a worker's server must be to continue the text of an answer. Returns `None` if none can continue
    /// it, or nothing was written: templates and tokenizers of other software differ.
    pub fn text_server(&self) -> Option<ModelServer> {
        let has_text = self.answers.values().any(|answer| !answer.text.is_empty());
        let server = self.server.filter(|server| has_text && self.allows_text && (server.prefills || !self.is_chat))?;
        Some(ModelServer { prefills: self.is_chat, ..server })
    }

    /// Returns the number of the next chunk.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Returns a number that grows with each token or text, and with each answer that ends.
    pub fn progress(&self) -> u64 {
        let of =
            |answer: &Answer| answer.tokens.len() + answer.text.len() + usize::from(answer.finish_reason.is_some());
        self.answers.values().map(of).sum::<usize>() as u64
    }

    /// Returns how many tokens of an answer were sent.
    pub fn tokens_of(&self, index: u32) -> usize {
        self.answers.get(&index).map_or(0, |answer| answer.tokens.len())
    }

    /// Records a chunk that was sent. `echoes` says whether the request asks for an echo of its prompt.
    pub fn record(&mut self, entry: Entry<'_>, echoes: bool) {
        self.seq += 1;
        let answer = self.answers.entry(entry.index).or_default();
        answer.tokens.extend_from_slice(entry.tokens);
        answer.finish_reason = entry.finish_reason.or(answer.finish_reason);
        // The end of an answer may bring text that waited for it.
        let is_untold = entry.has_output() && entry.tokens.is_empty() && entry.finish_reason.is_none();
        answer.is_in_echo = is_untold && echoes && answer.tokens.is_empty();
        if !is_untold || answer.is_in_echo {
            // Tokens after text do not determine the whole answer.
            self.is_untold |= !answer.text.is_empty() && entry.has_output();
        } else if entry.has_other
            || !answer.tokens.is_empty()
            || !self.allows_text
            || answer.text.len() + entry.text.len() > TEXT_BYTES_MAX
        {
            answer.text = String::new();
            self.is_untold = true;
        } else if !self.is_untold {
            answer.text.push_str(entry.text);
        }
    }

    /// Returns what another worker needs to continue the answers. Returns `None` if none can: a server that lists no
    /// tokens wrote something that none continues after its text, or an echoed prompt was cut.
    pub fn delivered(&self) -> Option<Delivered> {
        let is_cut = self.answers.values().any(|answer| answer.is_in_echo);
        let has_text = self.answers.values().any(|answer| !answer.text.is_empty());
        if self.is_untold || is_cut || self.has_other_output || has_text && self.text_server().is_none() {
            return None;
        }
        let answers = self.answers.iter().map(|(index, answer)| DeliveredAnswer {
            index: *index,
            tokens: answer.tokens.clone(),
            text: answer.delivered_text(),
            finish_reason: answer.finish_reason,
        });
        Some(Delivered { seq: self.seq, answers: answers.collect() })
    }
}

impl Answer {
    fn delivered_text(&self) -> Option<DeliveredText> {
        let tokens = u32::try_from(self.text.len().div_ceil(BYTES_PER_TOKEN)).unwrap_or(u32::MAX);
        (!self.text.is_empty()).then(|| DeliveredText { text: self.text.clone(), tokens })
    }
}

impl Entry<'_> {
    fn has_output(&self) -> bool {
        self.has_other || !self.text.is_empty()
    }
}

/// Returns whether a server can continue an answer to this request after its text. A constraint would begin anew, and
/// log-probabilities, several answers and prompts of tokens cannot be expressed as text.
fn allows_text(input: &Input) -> bool {
    let is_free = input.format == OutputFormat::Text
        && matches!(input.tool_choice, ToolChoice::Auto | ToolChoice::None)
        && input.adapter.is_none();
    let is_one = input.answers() == 1 && input.prompts.is_none() && input.prompt_tokens.is_none();
    is_free && is_one && input.logprobs.is_none() && !input.echo && input.suffix.is_none()
}

#[cfg(test)]
mod tests {
    use protocol::health::ServerKind;

    use super::*;

    fn told(index: u32, tokens: &[u32]) -> Entry<'_> {
        Entry { index, tokens, text: "x", has_other: false, finish_reason: None }
    }

    fn said(text: &str) -> Entry<'_> {
        Entry { text, ..Entry::default() }
    }

    fn server(prefills: bool) -> ModelServer {
        ModelServer { kind: ServerKind::LlamaServer, prefills }
    }

    /// Records entries of a server's answer, and returns what another may continue.
    fn texts(input: &Input, server: Option<ModelServer>, entries: &[Entry<'_>]) -> Option<DeliveredText> {
        let mut journal = Journal::new(input);
        journal.begin(server);
        for entry in entries {
            journal.record(*entry, input.echo);
        }
        journal.delivered()?.answers.remove(0).text
    }

    #[test]
    fn tokens_are_kept_by_answer_and_in_order() {
        let mut journal = Journal::new(&Input::default());
        let held_back = Entry { text: "", ..told(1, &[5]) };
        let ended = Entry { finish_reason: Some(FinishReason::Stop), ..told(1, &[]) };
        for entry in [told(0, &[1, 2]), held_back, told(0, &[3]), ended] {
            journal.record(entry, false);
        }
        let answer = |index, tokens: &[u32], finish_reason| DeliveredAnswer {
            index,
            tokens: tokens.to_vec(),
            text: None,
            finish_reason,
        };
        let answers = vec![answer(0, &[1, 2, 3], None), answer(1, &[5], Some(FinishReason::Stop))];
        assert_eq!(journal.delivered(), Some(Delivered { seq: 4, answers }));
    }

    #[test]
    fn text_without_tokens_cannot_be_continued() {
        let mut journal = Journal::new(&Input::default());
        journal.record(told(0, &[1]), false);
        journal.record(told(0, &[]), false);
        assert_eq!((journal.delivered(), journal.seq()), (None, 2));
        let vectors = Input { embed: Some(vec![]), ..Input::default() };
        assert_eq!(Journal::new(&vectors).delivered(), None);
    }

    #[test]
    fn the_text_of_a_server_is_kept_for_another_of_its_kind() {
        let kept = Some(DeliveredText { text: "To be or".into(), tokens: 2 });
        let entries = [said("To be"), said(" or")];
        let chat = Input { messages: Some(vec![]), ..Input::default() };
        assert_eq!(texts(&chat, Some(server(true)), &entries), kept);
        assert_eq!(texts(&Input::default(), Some(server(false)), &entries), kept, "every server continues a prompt");
        assert_eq!(texts(&chat, Some(server(false)), &entries), None);
        assert_eq!(texts(&chat, None, &entries), None, "an engine lists its tokens");
        let mut journal = Journal::new(&chat);
        journal.begin(Some(server(true)));
        journal.record(said("a"), false);
        assert_eq!((journal.text_server(), journal.progress()), (Some(server(true)), 1));
    }

    #[test]
    fn what_is_more_than_text_cannot_be_continued_after_it() {
        let chat = || Input { messages: Some(vec![]), ..Input::default() };
        for input in [
            Input { n: Some(2), ..chat() },
            Input { format: OutputFormat::Json, ..chat() },
            Input { tool_choice: ToolChoice::Required, ..chat() },
            Input { logprobs: Some(0), ..chat() },
            Input { prompt_tokens: Some(vec![1]), ..Input::default() },
            Input { prompts: Some(vec![]), ..Input::default() },
            Input { suffix: Some("x".into()), ..Input::default() },
        ] {
            assert_eq!(texts(&input, Some(server(true)), &[said("a")]), None, "{input:?}");
        }
        let reasoning = Entry { has_other: true, ..said("") };
        let long = "x".repeat(TEXT_BYTES_MAX);
        for entries in [
            [said("a"), reasoning],
            [reasoning, said("a")],
            [told(0, &[1]), said("a")],
            [said("a"), told(0, &[1])],
            [said(&long), said("a")],
        ] {
            assert_eq!(texts(&chat(), Some(server(true)), &entries), None, "{:?}", entries[0].tokens);
        }
    }

    #[test]
    fn an_echoed_prompt_can_be_continued_once_it_is_whole() {
        let mut journal = Journal::new(&Input::default());
        journal.record(told(0, &[]), true);
        assert_eq!(journal.delivered(), None);
        journal.record(told(0, &[7]), true);
        assert_eq!(journal.delivered().map(|delivered| delivered.answers[0].tokens.clone()), Some(vec![7]));
    }
}
