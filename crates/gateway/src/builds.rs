//! Chooses among the models (*builds*) that a requested name stands for. Pure functions.

use std::sync::Arc;

use protocol::infer::Input;
use protocol::model::{Capability, ModelEntry};
use protocol::{AdapterName, ErrorCode, WireError};

/// A model, such as one quantisation, that the requested name stands for, with the job's adapter.
#[derive(Debug, Clone)]
pub(crate) struct Build {
    /// Its entry in the catalogue.
    pub(crate) entry: Arc<ModelEntry>,
    /// The adapter to run the job with.
    pub(crate) adapter: Option<AdapterName>,
}

/// Returns the builds that passed the gateway's checks of the model and the key, given the outcome for each. Leaves out
/// duplicates, and builds with another adapter than the first. If none passed, returns the error of the highest
/// [`rank`].
pub(crate) fn choose(checked: Vec<Result<Build, WireError>>) -> Result<Vec<Build>, WireError> {
    let mut refusal: Option<WireError> = None;
    let mut builds: Vec<Build> = Vec::new();
    for outcome in checked {
        match outcome {
            Ok(build) => {
                // A job has one adapter, so builds that would run it with another are left out.
                let is_alike = builds.first().is_none_or(|first| first.adapter == build.adapter);
                if is_alike && builds.iter().all(|other| other.entry.key != build.entry.key) {
                    builds.push(build);
                }
            }
            Err(error) => {
                if refusal.as_ref().is_none_or(|before| rank(&error) > rank(before)) {
                    refusal = Some(error);
                }
            }
        }
    }
    match refusal {
        Some(refusal) if builds.is_empty() => Err(refusal),
        _ => Ok(builds),
    }
}

/// Returns how much a refusal tells the client. An invalid request ranks above a model that the key may not use, and
/// that ranks above a model that does not exist.
fn rank(error: &WireError) -> u8 {
    match error.code {
        ErrorCode::ModelNotFound => 0,
        ErrorCode::ModelNotAllowed => 1,
        _ => 2,
    }
}

/// Removes builds that cannot do what a job asks, unless that would remove all. The capabilities come from a model's
/// file or server and may be wrong, so the worker decides in the end.
pub(crate) fn those_that_suit(builds: Vec<Build>, input: &Input) -> Vec<Build> {
    if builds.len() > 1 && builds.iter().any(|build| suits(&build.entry, input)) {
        return builds.into_iter().filter(|build| suits(&build.entry, input)).collect();
    }
    builds
}

fn suits(entry: &ModelEntry, input: &Input) -> bool {
    let Some(facts) = entry.facts.as_ref().filter(|facts| !facts.capabilities.is_empty()) else { return true };
    let can = |what| facts.capabilities.contains(&what);
    if input.embed.is_some() {
        return can(Capability::Embeddings);
    }
    let chats = input.messages.is_none() || can(Capability::Chat);
    let calls = input.tools.is_empty() || can(Capability::Tools);
    // A model that only makes embeddings generates no text.
    let generates = can(Capability::Completion) || can(Capability::Chat);
    // The prompt's length in tokens is unknown without the vocabulary; the number of tokens to generate is known.
    let room = input.max_tokens.is_none_or(|tokens| entry.context_length == 0 || tokens < entry.context_length);
    chats && calls && generates && room
}

#[cfg(test)]
mod tests {
    use protocol::infer::{EmbedInput, Message, Role, Tool};
    use protocol::model::{ModelFacts, ModelKey};
    use protocol::{Digest, UnixMillis};

    use super::*;

    fn build(name: &str, context_length: u32, capabilities: &[Capability]) -> Build {
        let key = ModelKey { model_id: name.parse().expect("a name"), version: "1.0".parse().expect("a version") };
        let entry = ModelEntry {
            digest: Digest::of(name.as_bytes()),
            key,
            bytes: 1,
            context_length,
            description: String::new(),
            created_at: UnixMillis(0),
            facts: Some(ModelFacts { capabilities: capabilities.to_vec(), ..ModelFacts::default() }),
            added: false,
            pin: false,
            keep_alive_secs: None,
        };
        Build { entry: Arc::new(entry), adapter: None }
    }

    fn names(builds: &[Build]) -> Vec<&str> {
        builds.iter().map(|build| build.entry.key.model_id.as_str()).collect()
    }

    #[test]
    fn a_job_goes_to_models_that_can_do_what_it_asks() {
        use Capability::{Chat, Completion, Embeddings, Tools};
        let all = || {
            vec![
                build("plain", 4_096, &[Completion]),
                build("chat", 2_048, &[Completion, Chat]),
                build("tools", 512, &[Completion, Chat, Tools]),
                build("vectors", 512, &[Embeddings]),
                build("untold", 0, &[]),
            ]
        };
        let chat = Input { messages: Some(vec![Message::new(Role::User, "hi")]), ..Input::default() };
        let tool = Tool { name: "f".into(), description: None, parameters: None };
        let calls = Input { tools: vec![tool], ..chat.clone() };
        let long = Input { max_tokens: Some(2_048), ..chat.clone() };
        let prompt = Input { prompt: Some("hi".into()), ..Input::default() };
        let embed = Input { embed: Some(vec![EmbedInput::Text("hi".into())]), ..Input::default() };
        for (input, suit) in [
            (&chat, &["chat", "tools", "untold"][..]),
            (&calls, &["tools", "untold"]),
            (&long, &["untold"]),
            (&prompt, &["plain", "chat", "tools", "untold"]),
            (&embed, &["vectors", "untold"]),
        ] {
            assert_eq!(names(&those_that_suit(all(), input)), suit, "{input:?}");
        }
        let none = vec![build("one", 512, &[Completion]), build("two", 512, &[Embeddings])];
        assert_eq!(names(&those_that_suit(none, &calls)), ["one", "two"], "a worker has the last word");
    }

    #[test]
    fn the_refusal_that_tells_most_is_told_where_no_model_passes() {
        let refused = |code| Err(WireError::new(code, code.as_str()));
        for (codes, expected) in [
            (vec![ErrorCode::ModelNotFound, ErrorCode::ModelNotAllowed], ErrorCode::ModelNotAllowed),
            (vec![ErrorCode::ContextLengthExceeded, ErrorCode::ModelNotAllowed], ErrorCode::ContextLengthExceeded),
            (vec![ErrorCode::ModelNotFound, ErrorCode::ModelNotFound], ErrorCode::ModelNotFound),
        ] {
            let checked = codes.iter().map(|code| refused(*code)).collect();
            assert_eq!(choose(checked).expect_err("none passes").code, expected, "{codes:?}");
        }
        let passed = choose(vec![refused(ErrorCode::ModelNotAllowed), Ok(build("one", 1, &[]))]);
        assert_eq!(names(&passed.expect("one passes")), ["one"]);
    }
}
