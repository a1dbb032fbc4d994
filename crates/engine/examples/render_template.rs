//! Renders chat templates, for the comparison with jinja2 in `interop/templates/compare.py`.
//!
//! Reads one JSON object a line: `template`, `bos_token`, `eos_token`, and a conversation in `chat`. Writes one a line:
//! the `variables` that the template was given, and the `prompt`, or the `error`.

use std::io::{self, BufRead, Write};
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::json;
use tether_engine::Chat;
use tether_engine::chat_template::ChatTemplate;

#[derive(Deserialize)]
struct Case {
    template: String,
    bos_token: String,
    eos_token: String,
    chat: Chat,
}

fn main() -> io::Result<()> {
    let mut output = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let case: Case = serde_json::from_str(&line?)?;
        let result = match ChatTemplate::new(Some(&case.template), &case.bos_token, &case.eos_token) {
            Err(error) => json!({ "error": error.to_string() }),
            Ok(template) => {
                let mut variables = template.variables(&case.chat);
                variables.insert("bos_token".into(), case.bos_token.into());
                variables.insert("eos_token".into(), case.eos_token.into());
                match template.render(&case.chat, SystemTime::UNIX_EPOCH) {
                    Ok(prompt) => json!({ "variables": variables, "prompt": prompt }),
                    Err(error) => json!({ "variables": variables, "error": error.to_string() }),
                }
            }
        };
        writeln!(output, "{result}")?;
    }
    Ok(())
}
