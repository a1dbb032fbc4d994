//! Unstreamed answers in Anthropic's format.

use protocol::gateway::Choice;
use serde_json::value::{RawValue, to_raw_value};

use super::block::Block;
use super::{Heading, Message, stop};
use crate::answer::{Answer, Whole};

/// Serializes a whole answer as Anthropic does.
pub(crate) fn write_whole(heading: Heading, answer: &Answer, whole: &Whole) -> serde_json::Result<Box<RawValue>> {
    let heading = Heading { model: answer.model_name(&heading.model), ..heading };
    write(&heading, whole)
}

fn write(heading: &Heading, whole: &Whole) -> serde_json::Result<Box<RawValue>> {
    // A request for a message asks for one answer.
    let choice = &whole.choices[0];
    let (stop_reason, stop_sequence) = stop(choice.finish_reason, choice.stop_sequence.as_deref());
    let content = blocks(choice, &heading.id);
    let begun = Message::begin(heading, whole.usage);
    to_raw_value(&Message { content, stop_reason: Some(stop_reason), stop_sequence, ..begun })
}

fn blocks<'a>(choice: &'a Choice, signature: &'a str) -> Vec<Block<'a>> {
    let Choice { text, reasoning, tool_calls, .. } = choice;
    let thinking = (!reasoning.is_empty()).then_some(Block::Thinking { thinking: reasoning, signature });
    let text = (!text.is_empty()).then_some(Block::Text { text });
    thinking.into_iter().chain(text).chain(tool_calls.iter().map(Block::call)).collect()
}

#[cfg(test)]
mod tests {
    use protocol::infer::{FinishReason, ToolCall};
    use protocol::usage::TokenUsage;
    use serde_json::{Value, json};

    use super::*;

    fn written(choice: Choice) -> Value {
        let heading = Heading { id: "msg_1".into(), model: "m".into(), service_tier: "standard" };
        let usage = TokenUsage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 3, reasoning_tokens: 0 };
        let whole =
            Whole { choices: vec![choice], embeddings: vec![], input_tokens: None, listed_tokens: vec![], usage };
        serde_json::from_str(write(&heading, &whole).expect("JSON").get()).expect("JSON")
    }

    fn choice(text: &str, finish_reason: FinishReason) -> Choice {
        Choice {
            text: text.into(),
            reasoning: String::new(),
            tool_calls: vec![],
            logprobs: vec![],
            finish_reason,
            stop_sequence: None,
        }
    }

    #[test]
    fn an_answer_is_written_as_anthropic_writes_it() {
        let usage = json!({
            "input_tokens": 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 2,
            "service_tier": "standard"
        });
        let expected = json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "m",
            "content": [{"type": "text", "text": "hi"}], "stop_reason": "end_turn", "stop_sequence": null,
            "usage": usage
        });
        assert_eq!(written(choice("hi", FinishReason::Stop)), expected);
    }

    #[test]
    fn reasoning_comes_before_the_text_and_calls_after_it() {
        let tool_calls = vec![ToolCall { id: "c1".into(), name: "f".into(), arguments: r#"{"a":1}"#.into() }];
        let choice = Choice { reasoning: "hm".into(), tool_calls, ..choice("so", FinishReason::ToolCalls) };
        let answer = written(choice);
        let expected = json!([
            {"type": "thinking", "thinking": "hm", "signature": "msg_1"},
            {"type": "text", "text": "so"},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
        ]);
        assert_eq!((&answer["content"], &answer["stop_reason"]), (&expected, &json!("tool_use")));
    }

    #[test]
    fn each_end_has_its_reason_and_a_stop_sequence_is_named() {
        let ended = |finish_reason, stop: Option<&str>| {
            let answer = written(Choice { stop_sequence: stop.map(str::to_owned), ..choice("x", finish_reason) });
            (answer["stop_reason"].clone(), answer["stop_sequence"].clone())
        };
        assert_eq!(ended(FinishReason::Stop, Some("END")), (json!("stop_sequence"), json!("END")));
        assert_eq!(ended(FinishReason::Length, None), (json!("max_tokens"), json!(null)));
        assert_eq!(ended(FinishReason::ToolCalls, Some("END")), (json!("tool_use"), json!(null)));
    }

    #[test]
    fn an_answer_of_nothing_has_no_blocks() {
        assert_eq!(written(choice("", FinishReason::Stop))["content"], json!([]));
    }
}
