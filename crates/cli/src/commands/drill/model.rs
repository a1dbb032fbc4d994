//! The model that a drill asks by default: `tether-tiny` with a chat template by which it calls functions and reasons.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use crate::tiny_model;

const KEY: &[u8] = b"tokenizer.chat_template";
const TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools> Answer with \
    <tool_call>{\"name\": …, \"arguments\": …}</tool_call>{% endif %}<|im_start|>assistant\n\
    {% if enable_thinking %}<think>\n{% endif %}";
/// Tensors stay aligned if what precedes them changes its length by a multiple of this.
const ALIGNMENT: usize = 32;

/// Writes the model to a file.
pub(super) fn write(file: &Path) -> anyhow::Result<()> {
    let bytes = with_template(tiny_model::BYTES, TEMPLATE).context("the demonstration model has no chat template")?;
    fs::write(file, bytes).with_context(|| format!("could not write {}", file.display()))
}

/// Returns a GGUF file with another chat template, or `None` if it has none.
fn with_template(bytes: &[u8], template: &str) -> Option<Vec<u8>> {
    let key = bytes.windows(KEY.len()).position(|window| window == KEY)?;
    // The key is followed by the type of the value (4 bytes), its length (8) and the text.
    let length_at = key + KEY.len() + 4;
    let text_at = length_at + 8;
    let length = u64::from_le_bytes(bytes.get(length_at..text_at)?.try_into().ok()?) as usize;
    let padding = (ALIGNMENT + length % ALIGNMENT - template.len() % ALIGNMENT) % ALIGNMENT;
    let template = format!("{template}{{#{}#}}", " ".repeat(padding + ALIGNMENT - 4));
    let written = (template.len() as u64).to_le_bytes();
    Some([bytes.get(..length_at)?, &written, template.as_bytes(), bytes.get(text_at + length..)?].concat())
}
