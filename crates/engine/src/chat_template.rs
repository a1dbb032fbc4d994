//! Makes a prompt of a conversation with the model's own chat template.
//!
//! Templates are Jinja programs that come with a model, so they are run with limits: fuel against endless loops,
//! a ceiling on the text they make, and no access to anything but the conversation. The memory they take on the way
//! cannot be bounded here: `a ~ a` doubles a text for one unit of fuel, and no hook of minijinja sees it. Templates of
//! strangers are therefore rendered in an engine process, which [`crate::process::serve_child`] bounds.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind, context};

use crate::model_runtime::{ChatMessage, EngineError};

/// The most text that a template may make of a conversation, beyond four times the conversation itself.
const RENDERED_BYTES_MAX: usize = 1 << 20;
/// Steps that a template may take for a conversation without messages.
const FUEL_BASE: u64 = 1_000_000;
/// Steps that a template may take for each message beyond that.
const FUEL_PER_MESSAGE: u64 = 20_000;

const NAME: &str = "chat_template";

// The format most instruction models speak; llama.cpp falls back to it as well.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// Why a conversation could not be made a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template refused this conversation.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
    /// The template itself is at fault.
    #[error("the chat template cannot be run: {0}")]
    Broken(String),
}

impl From<ChatTemplateError> for EngineError {
    fn from(error: ChatTemplateError) -> Self {
        match error {
            ChatTemplateError::Refused(reason) => EngineError::Unsupported { parameter: "messages".into(), reason },
            ChatTemplateError::Broken(_) => EngineError::InvalidModel { reason: error.to_string() },
        }
    }
}

impl ChatTemplate {
    /// Compiles a template; `None` stands for ChatML.
    pub fn new(source: Option<&str>, bos_token: &str, eos_token: &str) -> Result<Self, ChatTemplateError> {
        let mut environment = Environment::new();
        // The settings under which Hugging Face renders chat templates, and so the ones they are written for.
        environment.set_syntax(
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| broken(&error))?,
        );
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
        });
        environment.set_recursion_limit(64);
        environment.add_template_owned(NAME, source.unwrap_or(CHATML).to_owned()).map_err(|error| broken(&error))?;
        Ok(Self { environment, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned() })
    }

    /// Returns the prompt that asks the model for the next message of the conversation.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, ChatTemplateError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL_BASE + FUEL_PER_MESSAGE * messages.len() as u64));
        let template = environment.get_template(NAME).map_err(|error| broken(&error))?;
        let spoken: usize = messages.iter().map(|message| message.content.len() + message.role.len()).sum();
        let mut output =
            Bounded { bytes: Vec::new(), most: RENDERED_BYTES_MAX.saturating_add(spoken.saturating_mul(4)) };
        let context = context! {
            messages => messages.iter().map(message_value).collect::<Value>(),
            add_generation_prompt => true,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        template.render_captured_to(context, &mut output).map_err(|error| classify(&error))?;
        String::from_utf8(output.bytes).map_err(|_| ChatTemplateError::Broken("it made invalid UTF-8".into()))
    }
}

/// The message that a template gave to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn message_value(message: &ChatMessage) -> Value {
    Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
}

fn broken(error: &Error) -> ChatTemplateError {
    ChatTemplateError::Broken(error.to_string())
}

fn classify(error: &Error) -> ChatTemplateError {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(Raised(message)) = inner.downcast_ref() {
            return ChatTemplateError::Refused(message.clone());
        }
        source = inner.source();
    }
    broken(error)
}

/// Refuses to grow beyond a limit.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.most {
            return Err(io::Error::other("the rendered text is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(role: &str, content: &str) -> ChatMessage {
        ChatMessage::new(role, content)
    }

    fn render(source: &str, messages: &[ChatMessage]) -> Result<String, ChatTemplateError> {
        ChatTemplate::new(Some(source), "<s>", "</s>")?.render(messages)
    }

    #[test]
    fn a_model_without_a_template_speaks_chatml() {
        let template = ChatTemplate::new(None, "", "").expect("it compiles");
        let prompt = template.render(&[say("system", "Be brief."), say("user", "Hi <b>\"you\"</b>")]);
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>\"you\"</b><|im_end|>\n\
                        <|im_start|>assistant\n";
        assert_eq!(prompt.as_deref(), Ok(expected));
    }

    #[test]
    fn blocks_are_trimmed_as_the_authors_of_templates_expect() {
        let source = "{%- for message in messages %}\n    {%- if message['role'] == 'user' %}\n{{ bos_token }}[{{ \
                      message['content'] | trim }}]\n    {% endif %}\n{% endfor %}";
        assert_eq!(render(source, &[say("user", " hi ")]).as_deref(), Ok("<s>[hi]\n"));
    }

    #[test]
    fn python_methods_namespaces_and_loop_controls_work() {
        let source = "{% set state = namespace(last='') %}{% for m in messages %}{% if m.content.startswith('x') %}\
                      {% continue %}{% endif %}{% set state.last = m.content.split(' ')[-1].upper() %}{% endfor %}\
                      {{ state.last }}{{ messages[1:] | length }}{{ tools is defined }}{{ eos_token }}";
        let prompt = render(source, &[say("user", "one two"), say("user", "x")]);
        assert_eq!(prompt.as_deref(), Ok("TWO1False</s>"));
    }

    #[test]
    fn a_refusal_by_the_template_concerns_the_messages() {
        let source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok";
        assert_eq!(render(source, &[say("user", "a")]).as_deref(), Ok("ok"));
        let error = render(source, &[say("system", "a")]).expect_err("it raises");
        assert_eq!(error, ChatTemplateError::Refused("no system role".into()));
        let error = EngineError::from(error);
        assert!(matches!(error, EngineError::Unsupported { parameter, .. } if parameter == "messages"));
    }

    #[test]
    fn an_endless_template_runs_out_of_fuel() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let error = render(source, &[]).expect_err("it never ends");
        assert!(matches!(&error, ChatTemplateError::Broken(reason) if reason.contains("fuel")), "{error}");
    }

    #[test]
    fn a_template_that_makes_too_much_text_is_stopped() {
        let source = "{% set x = 'a' * 100000 %}{% for a in range(1000) %}{{ x }}{% endfor %}";
        assert!(matches!(render(source, &[]), Err(ChatTemplateError::Broken(_))));
        let doubling = "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(64) %}{% set n.x = n.x * 2 %}\
                        {% endfor %}{{ n.x }}";
        assert!(matches!(render(doubling, &[]), Err(ChatTemplateError::Broken(_))));
    }

    #[test]
    fn a_template_that_does_not_parse_or_calls_what_is_not_there_is_broken() {
        for source in ["{% for %}", "{{ strftime_now('%Y') }}", "{% include 'other' %}", "{{ messages.x.y.z }}"] {
            assert!(matches!(render(source, &[]), Err(ChatTemplateError::Broken(_))), "{source}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_not_a_stack_overflow() {
        let source = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
        assert!(matches!(render(source, &[]), Err(ChatTemplateError::Broken(_))));
        assert!(render(&format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000)), &[]).is_err());
    }
}
