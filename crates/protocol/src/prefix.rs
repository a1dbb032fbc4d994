//! Digests of prompt prefixes, by which a conversation finds a worker that still has it in its prefix cache.
//!
//! A prompt is a chain of links. Each message of a conversation is a link, and so is each block of a text or of tokens.
//! The digest of a link covers all links before it, so two prompts with a common prefix have common digests. The
//! digests also cover tenant, model and adapter: the prompts of one tenant do not make a worker warm for another, and a
//! digest reveals nothing to anyone who cannot guess the whole prefix.

use std::iter;

use blake2::digest::consts::U8;
use blake2::{Blake2b, Digest as _};

use crate::id::{AdapterName, PrefixDigest};
use crate::infer::{EmbedInput, InferRequest, Input, Message};
use crate::model::ModelKey;

/// Text without messages is cut into blocks of this many bytes.
const BLOCK_BYTES: usize = 512;
/// Tokens are cut into blocks of this many.
const BLOCK_TOKENS: usize = 128;
/// How many links at the end of a prompt are all remembered. The next request may continue after the last message,
/// regenerate it, or edit the message before it.
const LAST_LINKS: usize = 3;

/// The prefixes of one prompt, from its first link to its last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixChain {
    /// Digest of what precedes the first link: tenant, model and adapter.
    root: PrefixDigest,
    links: Vec<Link>,
}

/// A prefix that ends with a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link {
    digest: PrefixDigest,
    /// Bytes from the start of the prompt's first link to the end of this one.
    bytes: usize,
}

impl PrefixChain {
    /// A chain without prefixes.
    pub const NONE: Self = Self { root: PrefixDigest([0; 8]), links: Vec::new() };

    /// Returns the prefixes of a job's prompt. A job for embeddings has none.
    pub fn of(request: &InferRequest) -> Self {
        Self::with(request, &request.model())
    }

    /// Returns the prefixes of a job's prompt for another model that may run it.
    pub fn with(request: &InferRequest, model: &ModelKey) -> Self {
        let Input { adapter, messages, prompt, prompt_tokens, prompts, tools, template_options, .. } = &request.input;
        let mut chain = Self::begin(&[
            request.tenant_id.as_str(),
            model.model_id.as_str(),
            &model.version.to_string(),
            adapter.as_ref().map_or("", AdapterName::as_str),
        ]);
        if let Some(messages) = messages {
            // Templates write them before the first message.
            if !tools.is_empty() || !template_options.is_empty() {
                chain.push(&[&json(tools), &json(template_options)]);
            }
            for message in messages {
                chain.push_message(message);
            }
        } else if let Some(prompt) = prompt {
            chain.push_text(prompt);
        } else if let Some(tokens) = prompt_tokens {
            chain.push_tokens(tokens);
        } else {
            // Prompts of one request usually have a common prefix.
            match prompts.as_ref().and_then(|prompts| prompts.first()) {
                Some(EmbedInput::Text(text)) => chain.push_text(text),
                Some(EmbedInput::Tokens(tokens)) => chain.push_tokens(tokens),
                None => {}
            }
        }
        chain
    }

    fn begin(parts: &[&str]) -> Self {
        let parts: Vec<&[u8]> = iter::once("tether/prefix/1").chain(parts.iter().copied()).map(str::as_bytes).collect();
        Self { root: digest(Self::NONE.root, &parts), ..Self::NONE }
    }

    /// Appends a message of the conversation, such as the answer that a worker has just given.
    ///
    /// It omits an assistant's reasoning, because clients seldom send it back.
    pub fn push_message(&mut self, message: &Message) {
        let Message { role, content, reasoning: _, tool_calls, tool_call_id, name } = message;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        self.push(&[
            role.as_str().as_bytes(),
            content.as_bytes(),
            &json(tool_calls),
            text(tool_call_id).as_bytes(),
            text(name).as_bytes(),
        ]);
    }

    fn push_text(&mut self, text: &str) {
        for block in text.as_bytes().chunks(BLOCK_BYTES) {
            self.push(&[block]);
        }
    }

    fn push_tokens(&mut self, tokens: &[u32]) {
        for block in tokens.chunks(BLOCK_TOKENS) {
            let bytes: Vec<u8> = block.iter().flat_map(|token| token.to_le_bytes()).collect();
            self.push(&[&bytes]);
        }
    }

    fn push(&mut self, parts: &[&[u8]]) {
        let (before, bytes) = self.links.last().map_or((self.root, 0), |link| (link.digest, link.bytes));
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.links.push(Link { digest: digest(before, parts), bytes: bytes + length });
    }

    /// Returns each prefix, the longest first, with its share of the prompt's bytes, above 0 and at most 1.
    pub fn shares(&self) -> impl Iterator<Item = (PrefixDigest, f32)> {
        let whole = self.links.last().map_or(1, |link| link.bytes).max(1);
        self.links.iter().rev().map(move |link| (link.digest, (link.bytes.max(1) as f64 / whole as f64) as f32))
    }

    /// Returns the prefixes of an evaluated prompt that are remembered, the longest first.
    ///
    /// Their number grows with the logarithm of the prompt's length. They find at least half of the links that another
    /// prompt has in common with this one.
    pub fn marks(&self) -> impl Iterator<Item = PrefixDigest> {
        let count = self.links.len();
        let last = (1..=count).rev().take(LAST_LINKS);
        let before = count.saturating_sub(LAST_LINKS);
        let halves = iter::successors(Some(count / 2), |links| Some(links / 2)).take_while(|links| *links > 0);
        last.chain(halves.skip_while(move |links| *links > before)).map(|links| self.links[links - 1].digest)
    }
}

/// Hashes the parts after the digest before them. The parts' lengths are hashed too, so that other parts never give the
/// same bytes.
fn digest(before: PrefixDigest, parts: &[&[u8]]) -> PrefixDigest {
    let mut hasher = Blake2b::<U8>::new();
    hasher.update(before.0);
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    PrefixDigest(hasher.finalize().into())
}

fn json(value: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("what came as JSON can be written as JSON")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::infer::{Role, Tool};

    fn request(input: Input) -> InferRequest {
        let model = crate::model::ModelKey {
            model_id: "tether-tiny".parse().expect("model"),
            version: "1.0".parse().expect("version"),
        };
        InferRequest::new(
            "acme".parse().expect("tenant"),
            model,
            input,
            "018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f".parse().expect("id"),
            "r".parse().expect("token"),
            crate::TraceId([1; 16]),
        )
    }

    fn conversation(texts: &[&str]) -> InferRequest {
        let roles = [Role::User, Role::Assistant].into_iter().cycle();
        let messages = roles.zip(texts).map(|(role, text)| Message::new(role, *text)).collect();
        request(Input { messages: Some(messages), ..Input::default() })
    }

    fn prompt(text: &str) -> InferRequest {
        request(Input { prompt: Some(text.to_owned()), ..Input::default() })
    }

    fn digests(request: &InferRequest) -> HashSet<PrefixDigest> {
        PrefixChain::of(request).shares().map(|(digest, _)| digest).collect()
    }

    /// Returns the share of a prompt that a worker has cached after it evaluated another.
    fn warm(evaluated: &InferRequest, next: &InferRequest) -> f32 {
        let known: HashSet<_> = PrefixChain::of(evaluated).marks().collect();
        PrefixChain::of(next).shares().find(|(digest, _)| known.contains(digest)).map_or(0.0, |(_, share)| share)
    }

    #[test]
    fn the_next_turn_of_a_conversation_finds_all_that_was_said() {
        let mut after = PrefixChain::of(&conversation(&["hi"]));
        after.push_message(&Message { reasoning: Some("a greeting".into()), ..Message::new(Role::Assistant, "hello") });
        let next = conversation(&["hi", "hello", "how are you?"]);
        assert_eq!(PrefixChain::of(&next).shares().nth(1).map(|(digest, _)| digest), after.marks().next());
    }

    #[test]
    fn the_share_is_that_of_the_bytes_in_common() {
        let share = warm(&conversation(&[&"x".repeat(1000)]), &conversation(&[&"x".repeat(1000), "y", "z"]));
        assert!(share > 0.9 && share < 1.0, "{share}");
        let text = "word ".repeat(1000);
        let share = warm(&prompt(&text), &prompt(&format!("{text}{}", "more ".repeat(1000))));
        assert!((0.4..0.5).contains(&share), "whole blocks of a half: {share}");
        assert!((warm(&prompt(&text), &prompt(&text)) - 1.0).abs() < f32::EPSILON);
    }

    #[test]
    fn another_tenant_model_adapter_or_set_of_tools_has_nothing_in_common() {
        let first = conversation(&["hi", "hello"]);
        let with = |change: fn(&mut InferRequest)| {
            let mut other = first.clone();
            change(&mut other);
            other
        };
        for other in [
            with(|job| job.tenant_id = "globex".parse().expect("tenant")),
            with(|job| job.model_id = "other".parse().expect("model")),
            with(|job| job.version = "1.1".parse().expect("version")),
            with(|job| job.input.adapter = Some("pirate".parse().expect("adapter"))),
            with(|job| job.input.tools = vec![Tool { name: "f".into(), description: None, parameters: None }]),
            with(|job| drop(job.input.template_options.insert("enable_thinking".into(), true.into()))),
        ] {
            assert!(digests(&first).is_disjoint(&digests(&other)), "{other:?}");
        }
    }

    #[test]
    fn fields_are_told_apart_from_their_neighbours() {
        assert!(digests(&conversation(&["ab", "c"])).is_disjoint(&digests(&conversation(&["a", "bc"]))));
        let tokens = |tokens: Vec<u32>| request(Input { prompt_tokens: Some(tokens), ..Input::default() });
        assert!(digests(&tokens(vec![1, 2])).is_disjoint(&digests(&tokens(vec![2, 1]))));
        assert_eq!(digests(&request(Input { embed: Some(vec![]), ..Input::default() })).len(), 0);
    }

    proptest! {
        #[test]
        fn prompts_share_digests_exactly_as_far_as_they_begin_alike(
            common in proptest::collection::vec("[a-c]{0,3}", 0..40),
            one in proptest::collection::vec("[a-c]{0,3}", 0..40),
            other in proptest::collection::vec("[d-f]{1,3}", 0..40),
        ) {
            let of = |tail: &[String]| {
                let texts: Vec<&str> = common.iter().chain(tail).map(String::as_str).collect();
                conversation(&texts)
            };
            let (one, other) = (of(&one), of(&other));
            prop_assert_eq!(digests(&one).intersection(&digests(&other)).count(), common.len());
            // The remembered prefixes find at least half of the common links.
            let marks: HashSet<_> = PrefixChain::of(&one).marks().collect();
            let chain = PrefixChain::of(&other);
            let links = chain.shares().count();
            let found = chain.shares().position(|(digest, _)| marks.contains(&digest)).map_or(0, |cut| links - cut);
            prop_assert!(found <= common.len() && found * 2 + 1 >= common.len(), "{found} of {}", common.len());
        }

        #[test]
        fn what_is_remembered_is_little_and_led_by_the_whole(count in 0_usize..3000) {
            let chain = PrefixChain::of(&conversation(&vec!["x"; count]));
            let marks: Vec<_> = chain.marks().collect();
            prop_assert!(marks.len() <= LAST_LINKS + 12);
            prop_assert_eq!(marks.iter().collect::<HashSet<_>>().len(), marks.len());
            prop_assert_eq!(marks.first().copied(), chain.shares().next().map(|(digest, _)| digest));
            prop_assert!(chain.shares().map(|(_, share)| share).is_sorted_by(|longer, shorter| longer >= shorter));
        }
    }
}
