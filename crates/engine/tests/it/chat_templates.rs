//! Templates in the idioms of the common families give what Python's jinja2 makes of them.
//!
//! `tests/chat_templates/expect.py` wrote down what that is, and says how to do so again.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use tether_engine::Chat;
use tether_engine::chat_template::{ChatTemplate, ChatTemplateError};

/// The point in time that `expect.py` takes for the present: noon of 15 June 2025.
const NOW_SECS: u64 = 1_749_988_800;

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Expected {
    Prompt(String),
    Refused(String),
}

#[test]
fn prompts_are_those_that_hugging_face_makes() {
    let conversations: BTreeMap<String, Chat> = read_json("conversations.json");
    let expected: BTreeMap<String, BTreeMap<String, Expected>> = read_json("expected.json");
    assert!(expected.len() > 10, "every family has its expectations");
    for (family, expected) in expected {
        let template = ChatTemplate::new(Some(&read(&format!("{family}.jinja"))), "<s>", "</s>").expect("it compiles");
        for (name, expected) in expected {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW_SECS);
            let rendered = match template.render(&conversations[&name], now) {
                Ok(prompt) => Expected::Prompt(prompt),
                Err(ChatTemplateError::Refused(reason)) => Expected::Refused(reason),
                Err(error) => panic!("{family} of {name}: {error}"),
            };
            assert_eq!(rendered, expected, "{family} of {name}");
        }
    }
}

#[test]
fn each_family_is_known_to_take_tools_or_not() {
    for (family, takes_tools) in [
        ("chatml", true),
        ("command_r", true),
        ("deepseek_r1", false),
        ("gemma", false),
        ("harmony", true),
        ("llama2", false),
        ("llama3", true),
        ("mistral", true),
        ("qwen3", true),
    ] {
        let template = ChatTemplate::new(Some(&read(&format!("{family}.jinja"))), "<s>", "</s>").expect("it compiles");
        assert_eq!(template.takes_tools(), takes_tools, "{family}");
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    serde_json::from_str(&read(name)).expect("it is what we wrote")
}

fn read(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/chat_templates").join(name);
    fs::read_to_string(path).expect("it is there")
}
