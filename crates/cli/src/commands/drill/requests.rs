//! The requests of a drill. Each has one right answer, because it is deterministic and was asked before anything broke.

use std::collections::HashMap;

use protocol::TraceId;
use serde_json::{Value, json};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Shape {
    Text,
    /// Two answers to one prompt.
    Choices,
    Schema,
    ToolCall,
    Reasoning,
    /// An answer of a few tokens.
    Short,
}

pub(super) const SHAPES: [Shape; 6] =
    [Shape::Text, Shape::Choices, Shape::Schema, Shape::ToolCall, Shape::Reasoning, Shape::Short];
/// The number of prompts of each shape, so that no worker has them all in its cache.
const PROMPTS: u8 = 3;

/// What decides an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Question {
    pub(super) shape: Shape,
    pub(super) prompt: u8,
}

impl Question {
    pub(super) fn all() -> impl Iterator<Item = Self> {
        SHAPES.into_iter().flat_map(|shape| (0..PROMPTS).map(move |prompt| Self { shape, prompt }))
    }

    pub(super) fn draw(shape: Shape, random: &mut fastrand::Rng) -> Self {
        Self { shape, prompt: random.u8(..PROMPTS) }
    }

    pub(super) fn body(self, model: &str, is_streamed: bool) -> Value {
        // A model from a file is much slower than the demonstration model.
        let tokens = match (self.shape, model) {
            (Shape::Short, _) => 8,
            (_, super::network::TINY) => 300,
            _ => 64,
        };
        let mut body = json!({
            "model": model,
            "messages": [{ "role": "user", "content": format!("Tell me story {}.", self.prompt) }],
            "max_tokens": tokens,
            "deterministic": true,
            "temperature": 0.8,
            "seed": 7,
            "stream": is_streamed,
        });
        let more = match self.shape {
            Shape::Text | Shape::Short => json!({ "ignore_eos": true }),
            Shape::Reasoning => json!({ "ignore_eos": true, "chat_template_kwargs": { "enable_thinking": true } }),
            Shape::Choices => json!({ "ignore_eos": true, "n": 2, "max_tokens": tokens / 2 }),
            Shape::Schema => json!({ "response_format": { "type": "json_schema", "json_schema": {
                "name": "story", "schema": {
                    "type": "object",
                    "properties": {
                        "title": { "type": "string", "minLength": 20, "maxLength": 60 },
                        "words": { "type": "array", "items": { "enum": ["fox", "owl"] }, "minItems": 12, "maxItems": 12 }
                    },
                    "required": ["title", "words"],
                    "additionalProperties": false
                }
            } } }),
            Shape::ToolCall => json!({ "tool_choice": "required", "tools": [{ "type": "function", "function": {
                "name": "tell", "parameters": {
                    "type": "object",
                    "properties": { "words": {
                        "type": "array", "items": { "enum": ["fox", "owl"] }, "minItems": 12, "maxItems": 12
                    } },
                    "required": ["words"],
                    "additionalProperties": false
                }
            } }] }),
        };
        if let (Some(body), Value::Object(more)) = (body.as_object_mut(), more) {
            body.extend(more);
        }
        body
    }
}

/// A request of one client, with all its tries.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) question: Question,
    pub(super) is_streamed: bool,
    /// Its idempotency key. Without one, it is tried again as the official SDKs do.
    pub(super) key: Option<String>,
    /// The trace of all its tries, by which its jobs are found.
    pub(super) trace: TraceId,
}

impl Request {
    pub(super) fn new(question: Question, is_streamed: bool, has_key: bool, random: &mut fastrand::Rng) -> Self {
        let trace = TraceId(random.u128(1..).to_be_bytes());
        let key = has_key.then(|| format!("drill-{:032x}", u128::from_be_bytes(trace.0)));
        Self { question, is_streamed, key, trace }
    }

    /// Draws any request that has a right answer.
    pub(super) fn draw(right: &RightAnswers, random: &mut fastrand::Rng) -> Self {
        let shapes: Vec<Shape> = SHAPES.into_iter().filter(|shape| knows(right, *shape)).collect();
        let shape = random.choice(shapes).unwrap_or(Shape::Short);
        let question = Question::draw(shape, random);
        Self::new(question, random.bool(), random.bool(), random)
    }

    /// Returns the trace in words, as logs show it.
    pub(super) fn trace_text(&self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.trace.0))
    }

    /// Describes the request for a finding.
    pub(super) fn described(&self) -> String {
        let streamed = if self.is_streamed { "streamed" } else { "in one piece" };
        let key = if self.key.is_some() { "with a key" } else { "without a key" };
        format!("{:?} {}, {streamed}, {key}", self.question.shape, self.question.prompt)
    }
}

/// Returns whether the model can answer questions of a shape.
pub(super) fn knows(right: &RightAnswers, shape: Shape) -> bool {
    right.contains_key(&Question { shape, prompt: 0 })
}

/// The right answer to each question: its text and its number of tokens.
pub(super) type RightAnswers = HashMap<Question, RightAnswer>;

#[derive(Debug, Clone)]
pub(super) struct RightAnswer {
    pub(super) texts: Vec<String>,
    pub(super) tokens: u32,
}

impl RightAnswer {
    /// Returns the length of all texts together.
    pub(super) fn len(&self) -> usize {
        self.texts.iter().map(String::len).sum()
    }
}
