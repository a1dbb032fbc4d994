//! The turns of a chat, and how they are sent and saved.

use serde_json::{Map, Value, json};

use super::input::Setting;

/// A conversation with a model, or with several in turn.
#[derive(Debug, Clone, Default)]
pub(super) struct Conversation {
    system: Option<String>,
    turns: Vec<Turn>,
    /// A question that got no answer.
    unanswered: Option<String>,
    sampling: Map<String, Value>,
}

#[derive(Debug, Clone)]
struct Turn {
    question: String,
    answer: String,
    model: String,
    /// Whether the answer is complete.
    is_whole: bool,
}

impl Conversation {
    /// Returns the system prompt.
    pub(super) fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// Sets or removes the system prompt.
    pub(super) fn set_system(&mut self, text: Option<String>) {
        self.system = text;
    }

    /// Changes a sampling parameter.
    pub(super) fn set(&mut self, setting: Setting) {
        let (name, value) = match setting {
            Setting::Temperature(value) => ("temperature", value.map(Value::from)),
            Setting::TopP(value) => ("top_p", value.map(Value::from)),
            Setting::Seed(value) => ("seed", value.map(Value::from)),
            Setting::MaxTokens(value) => ("max_tokens", value.map(Value::from)),
        };
        match value {
            Some(value) => drop(self.sampling.insert(name.to_owned(), value)),
            None => drop(self.sampling.shift_remove(name)),
        }
    }

    /// Describes the sampling parameters that were set.
    pub(super) fn sampling(&self) -> String {
        let set: Vec<String> = self.sampling.iter().map(|(name, value)| format!("{name} {value}")).collect();
        if set.is_empty() { "the model's own".to_owned() } else { set.join(", ") }
    }

    /// Returns the number of answered questions.
    pub(super) fn turns(&self) -> usize {
        self.turns.len()
    }

    pub(super) fn clear(&mut self) {
        self.turns.clear();
        self.unanswered = None;
    }

    /// Returns the request body for a question.
    pub(super) fn request(&self, model: &str, question: &str) -> Value {
        let mut messages = self.messages();
        messages.push(json!({ "role": "user", "content": question }));
        let mut body = json!({
            "model": model,
            "messages": messages,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        for (name, value) in &self.sampling {
            body[name] = value.clone();
        }
        body
    }

    /// Records an answer, or the part of it that arrived.
    pub(super) fn answered(&mut self, model: &str, question: String, answer: String, is_whole: bool) {
        self.unanswered = None;
        self.turns.push(Turn { question, answer, model: model.to_owned(), is_whole });
    }

    /// Keeps an unanswered question for a retry. It is not sent to the model otherwise.
    pub(super) fn failed(&mut self, question: String) {
        self.unanswered = Some(question);
    }

    /// Removes the last question and its answer, to ask the question again.
    pub(super) fn take_last(&mut self) -> Option<String> {
        self.unanswered.take().or_else(|| Some(self.turns.pop()?.question))
    }

    fn messages(&self) -> Vec<Value> {
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let mut messages: Vec<Value> = self.system.iter().map(|text| message("system", text)).collect();
        for turn in &self.turns {
            messages.extend([message("user", &turn.question), message("assistant", &turn.answer)]);
        }
        messages
    }

    /// Renders the conversation as Markdown.
    pub(super) fn markdown(&self) -> String {
        let mut parts = vec!["# A conversation".to_owned()];
        if let Some(system) = &self.system {
            parts.extend(["## System".to_owned(), system.clone()]);
        }
        for Turn { question, answer, model, is_whole } in &self.turns {
            parts.extend(["## You".to_owned(), question.clone(), format!("## {model}"), answer.clone()]);
            if !is_whole {
                parts.push("*The answer was stopped here.*".to_owned());
            }
        }
        parts.join("\n\n") + "\n"
    }

    /// Renders the conversation as JSON: the request that would continue it.
    pub(super) fn json(&self, model: &str) -> String {
        let mut whole = json!({ "model": model, "messages": self.messages() });
        for (name, value) in &self.sampling {
            whole[name] = value.clone();
        }
        format!("{whole:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation() -> Conversation {
        let mut conversation = Conversation::default();
        conversation.set_system(Some("Be brief.".into()));
        conversation.set(Setting::Temperature(Some(0.0)));
        conversation.set(Setting::Seed(Some(7)));
        conversation.answered("one", "Hi".into(), "Ho".into(), true);
        conversation.answered("two", "And?".into(), "Wel".into(), false);
        conversation
    }

    #[test]
    fn each_question_is_asked_with_all_that_was_said_before() {
        let mut conversation = conversation();
        conversation.failed("lost".into());
        conversation.set(Setting::Seed(None));
        let request = conversation.request("two", "Go on");
        let said: Vec<&str> =
            request["messages"].as_array().expect("a list").iter().filter_map(|one| one["content"].as_str()).collect();
        assert_eq!(said, ["Be brief.", "Hi", "Ho", "And?", "Wel", "Go on"]);
        assert_eq!((&request["temperature"], &request["seed"]), (&json!(0.0), &Value::Null));
    }

    #[test]
    fn the_last_question_is_taken_back_whether_or_not_it_was_answered() {
        let mut conversation = conversation();
        conversation.failed("lost".into());
        assert_eq!(conversation.take_last().as_deref(), Some("lost"));
        assert_eq!((conversation.take_last().as_deref(), conversation.turns()), (Some("And?"), 1));
        conversation.clear();
        assert_eq!(conversation.take_last(), None);
        assert_eq!(conversation.system(), Some("Be brief."), "a new conversation keeps what was set");
    }

    #[test]
    fn it_is_written_down_for_people_and_for_programs() {
        let markdown = conversation().markdown();
        assert!(
            markdown.starts_with("# A conversation\n\n## System\n\nBe brief.\n\n## You\n\nHi\n\n## one\n\nHo\n"),
            "{markdown}"
        );
        assert!(markdown.ends_with("## two\n\nWel\n\n*The answer was stopped here.*\n"), "{markdown}");
        let json: Value = serde_json::from_str(&conversation().json("two")).expect("JSON");
        assert_eq!((&json["model"], &json["seed"]), (&json!("two"), &json!(7)));
        assert_eq!(json["messages"][4], json!({ "role": "assistant", "content": "Wel" }));
    }
}
