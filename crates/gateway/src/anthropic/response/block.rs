//! The blocks of a message's content.

use protocol::infer::ToolCall;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

/// A block of a message's content.
#[derive(Serialize, ToSchema)]
#[schema(as = MessageBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Block<'a> {
    Text {
        text: &'a str,
    },
    Thinking {
        thinking: &'a str,
        /// An opaque value, which is taken back with the block.
        signature: &'a str,
    },
    ToolUse {
        id: &'a str,
        name: &'a str,
        #[schema(value_type = Object)]
        input: &'a RawValue,
    },
}

impl<'a> Block<'a> {
    pub(super) fn call(call: &'a ToolCall) -> Self {
        let ToolCall { id, name, arguments } = call;
        Self::ToolUse { id, name, input: object(arguments).unwrap_or_else(no_input) }
    }
}

/// Returns arguments as they are if they are an object. They are not if the token limit has cut them.
fn object(arguments: &str) -> Option<&RawValue> {
    let value: &RawValue = serde_json::from_str(arguments).ok()?;
    value.get().starts_with('{').then_some(value)
}

pub(super) fn no_input<'a>() -> &'a RawValue {
    serde_json::from_str("{}").expect("an object")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_calls_input_is_an_object_whatever_the_model_wrote() {
        for (arguments, expected) in
            [(r#" {"a": 1} "#, r#"{"a": 1}"#), ("", "{}"), (r#"{"a": "#, "{}"), ("[1]", "{}"), ("Paris", "{}")]
        {
            let call = ToolCall { id: "c1".into(), name: "f".into(), arguments: arguments.into() };
            let written = serde_json::to_string(&Block::call(&call)).expect("JSON");
            assert_eq!(written, format!(r#"{{"type":"tool_use","id":"c1","name":"f","input":{expected}}}"#));
        }
    }
}
