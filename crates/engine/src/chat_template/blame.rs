//! Finds the request field that makes a template fail, by rendering the conversation without each candidate.

use serde_json::Value;

use super::ChatTemplateError;
use crate::model_runtime::{Chat, Message, Role, ToolChoice};

/// How many tools are tried one by one. Each try costs one rendering.
const TOOLS_TRIED: usize = 8;

/// Returns the error for a conversation on which a template failed with the given reason.
pub(super) fn find(
    chat: &Chat,
    reason: String,
    render: impl Fn(&Chat) -> Result<String, ChatTemplateError>,
) -> ChatTemplateError {
    // If the template rejects it with an error of its own, it has at least understood it.
    let works = |chat: &Chat| !matches!(render(chat), Err(ChatTemplateError::Broken(_)));
    let plain = |chat: &Chat| Chat { messages: vec![Message::new(Role::User, "Hello.")], ..chat.clone() };
    let unfit = |parameter: String, reason| ChatTemplateError::Unfit { parameter, reason };

    for name in chat.template_options.keys() {
        let mut without = chat.clone();
        without.template_options.remove(name);
        if works(&without) {
            // `reasoning_effort` is also a request field of its own.
            let parameter =
                if name == "reasoning_effort" { name.clone() } else { format!("chat_template_kwargs.{name}") };
            return unfit(parameter, reason);
        }
    }
    if let Some((parameter, mended)) = with_whole_arguments(chat)
        && works(&mended)
    {
        return unfit(parameter, "the arguments of a call must be a JSON object".into());
    }
    let without_tools = Chat { tools: Vec::new(), tool_choice: ToolChoice::Auto, ..chat.clone() };
    if !chat.tools.is_empty() && works(&without_tools) {
        let fails_alone = |index: &usize| {
            let alone = Chat { tools: vec![chat.tools[*index].clone()], tool_choice: ToolChoice::Auto, ..chat.clone() };
            !works(&plain(&alone))
        };
        let failing = (0..chat.tools.len().min(TOOLS_TRIED)).find(fails_alone);
        return unfit(failing.map_or_else(|| "tools".into(), |index| format!("tools[{index}]")), reason);
    }
    if works(&plain(&without_tools)) || works(&plain(&Chat::default())) {
        return unfit("messages".into(), reason);
    }
    ChatTemplateError::Broken(reason)
}

/// Returns the first call whose arguments are not a JSON object, and the conversation with an empty object in place
/// of each such call's arguments.
fn with_whole_arguments(chat: &Chat) -> Option<(String, Chat)> {
    let mut first = None;
    let mut chat = chat.clone();
    for (message, said) in chat.messages.iter_mut().enumerate() {
        for (call, called) in said.tool_calls.iter_mut().enumerate() {
            if !matches!(serde_json::from_str(&called.arguments), Ok(Value::Object(_))) {
                called.arguments = "{}".into();
                first.get_or_insert_with(|| format!("messages[{message}].tool_calls[{call}].function.arguments"));
            }
        }
    }
    first.map(|parameter| (parameter, chat))
}
