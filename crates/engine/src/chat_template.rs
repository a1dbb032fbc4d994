//! Renders a conversation into a prompt with the model's own chat template.
//!
//! Chat templates are Jinja programs that ship with a model. They are written for Hugging Face's Python environment,
//! so this module imitates that environment. Templates run with limits: fuel against endless loops, a maximum length
//! of the rendered text, and access to nothing but the conversation. Their peak memory cannot be bounded here: `a ~
//! a` doubles a text for one unit of fuel, and no hook of minijinja sees it. Untrusted templates are therefore
//! rendered in an engine process, whose memory [`crate::process::serve_child`] limits.

mod blame;
mod conversation;
mod python;
mod strftime;

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, Error, ErrorKind};

use crate::gguf::Header;
use crate::model_runtime::{Chat, EngineError, Message, Role};
use conversation::Dialect;

/// The maximum length of a rendered conversation, in addition to four times the conversation's own length.
const RENDERED_BYTES_MAX: usize = 1 << 20;
/// Fuel for an empty conversation.
const FUEL_BASE: u64 = 1_000_000;
/// Additional fuel for each message and tool.
const FUEL_PER_PART: u64 = 20_000;
/// Additional fuel for each byte; some templates walk the schemas of tools.
const FUEL_PER_BYTE: u64 = 20;

/// The key under which GGUF files hold a separate template for conversations with tools.
pub(crate) const TOOL_USE: &str = "tokenizer.chat_template.tool_use";

const NAME: &str = "chat_template";

/// A model without a template is assumed to speak ChatML if its vocabulary has these tokens.
pub(crate) const CHATML_TOKENS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
// The format that most instruction-tuned models use; llama.cpp falls back to it as well.
const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The compiled chat template of a model, with a separate one for tools if the model has it.
#[derive(Debug)]
pub struct ChatTemplate {
    plain: Program,
    with_tools: Option<Program>,
}

/// Why a conversation could not be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template rejected this conversation.
    #[error("the chat template refuses the messages: {0}")]
    Refused(String),
    /// The template renders other conversations, but fails on this one because of a field of the request.
    #[error("the chat template fails on it: {reason}")]
    Unfit {
        /// The field, by its name in OpenAI's API.
        parameter: String,
        reason: String,
    },
    /// The model's file has no template, and the model does not seem to speak ChatML.
    #[error("this model takes no conversations, because its file has no chat template; send it a prompt instead")]
    Missing,
    /// The template cannot render any conversation.
    #[error(
        "this model takes no conversations, because its chat template cannot be run: {0}; send it a prompt instead"
    )]
    Broken(String),
}

/// Another worker has the same template and would fail in the same way, so none of these counts as an engine failure.
impl From<ChatTemplateError> for EngineError {
    fn from(error: ChatTemplateError) -> Self {
        let (parameter, reason) = match error {
            ChatTemplateError::Refused(reason) => ("messages".into(), reason),
            ChatTemplateError::Unfit { ref parameter, .. } => (parameter.clone(), error.to_string()),
            ChatTemplateError::Missing | ChatTemplateError::Broken(_) => ("messages".into(), error.to_string()),
        };
        EngineError::Unsupported { parameter, reason }
    }
}

impl ChatTemplate {
    /// Compiles a template; `None` means ChatML.
    pub fn new(source: Option<&str>, bos_token: &str, eos_token: &str) -> Result<Self, ChatTemplateError> {
        Ok(Self { plain: Program::new(source.unwrap_or(CHATML), bos_token, eos_token)?, with_tools: None })
    }

    /// Compiles the template of a model, and its separate template for tools if it has one.
    pub fn of_model(header: &Header) -> Result<Self, ChatTemplateError> {
        let (bos, eos) = (header.bos_token().unwrap_or_default(), header.eos_token().unwrap_or_default());
        let source = header.chat_template();
        // For a base model, ChatML would be noise, unless it was trained on ChatML's tokens.
        if source.is_none() && !CHATML_TOKENS.iter().all(|token| header.has_token(token)) {
            return Err(ChatTemplateError::Missing);
        }
        let template = Self::new(source, &bos, &eos)?;
        match header.text(TOOL_USE) {
            Some(source) => template.with_tool_use(source),
            None => Ok(template),
        }
    }

    /// Sets a separate template for conversations with tools.
    pub fn with_tool_use(mut self, source: &str) -> Result<Self, ChatTemplateError> {
        self.with_tools = Some(Program::new(source, &self.plain.bos_token, &self.plain.eos_token)?);
        Ok(self)
    }

    /// Returns whether the template tells the model about tools.
    pub fn takes_tools(&self) -> bool {
        self.for_tools().dialect().takes_tools
    }

    /// Renders the prompt that asks the model for the next message of the conversation. Some templates write the
    /// date, which is taken from `now` in UTC.
    pub fn render(&self, chat: &Chat, now: SystemTime) -> Result<String, ChatTemplateError> {
        let program = self.program(chat);
        program.render(chat, now).map_err(|error| match error {
            ChatTemplateError::Broken(reason) => blame::find(chat, reason, |chat| program.render(chat, now)),
            error => error,
        })
    }

    /// Returns the template if it can render a conversation, or rejects one with an error of its own.
    pub fn checked(self) -> Result<Self, ChatTemplateError> {
        match self.render(&Chat::from(vec![Message::new(Role::User, "Hello.")]), SystemTime::UNIX_EPOCH) {
            Err(error @ ChatTemplateError::Broken(_)) => Err(error),
            _ => Ok(self),
        }
    }

    /// Returns the template's variables for a conversation, except the BOS and EOS tokens.
    pub fn variables(&self, chat: &Chat) -> serde_json::Map<String, serde_json::Value> {
        self.program(chat).dialect().variables(chat)
    }

    fn program(&self, chat: &Chat) -> &Program {
        if conversation::offers_tools(chat) { self.for_tools() } else { &self.plain }
    }

    fn for_tools(&self) -> &Program {
        self.with_tools.as_ref().unwrap_or(&self.plain)
    }
}

#[derive(Debug)]
struct Program {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    /// Determined by rendering, so only on first use.
    dialect: OnceLock<Dialect>,
}

impl Program {
    fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, ChatTemplateError> {
        let mut environment = Environment::new();
        // The settings with which Hugging Face renders chat templates, and so the ones that templates are written
        // for.
        environment.set_syntax(
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|error| broken(&error))?,
        );
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        python::add(&mut environment);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
        });
        environment.set_recursion_limit(64);
        // Jinja2 normalises line endings.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let source = python::without_generation_tags(&source).into_owned();
        // If the rewritten template does not parse, the original is used.
        if environment.add_template_owned(NAME, python::rewrite(&source)).is_err() {
            environment.add_template_owned(NAME, source).map_err(|error| broken(&error))?;
        }
        let (bos_token, eos_token) = (bos_token.to_owned(), eos_token.to_owned());
        Ok(Self { environment, bos_token, eos_token, dialect: OnceLock::new() })
    }

    fn dialect(&self) -> Dialect {
        *self
            .dialect
            .get_or_init(|| Dialect::find(|variables| self.run(variables, SystemTime::UNIX_EPOCH).unwrap_or_default()))
    }

    /// Renders a conversation in the template's own dialect. Optional tool fields that the template requires are
    /// filled in.
    fn render(&self, chat: &Chat, now: SystemTime) -> Result<String, ChatTemplateError> {
        let dialect = self.dialect();
        let rendered = match self.run(dialect.variables(chat), now) {
            Err(ChatTemplateError::Broken(_)) if conversation::offers_tools(chat) => {
                self.run(dialect.variables(&conversation::with_whole_tools(chat)), now)
            }
            rendered => rendered,
        }?;
        match chat.messages.last() {
            Some(last) if chat.continue_last => up_to(rendered, &last.content),
            _ => Ok(rendered),
        }
    }

    fn run(
        &self,
        variables: serde_json::Map<String, serde_json::Value>,
        now: SystemTime,
    ) -> Result<String, ChatTemplateError> {
        let spoken = variables.values().map(|value| value.to_string().len()).sum::<usize>();
        let parts: usize =
            ["messages", "tools"].iter().filter_map(|key| variables.get(*key)?.as_array().map(Vec::len)).sum();
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL_BASE + FUEL_PER_PART * parts as u64 + FUEL_PER_BYTE * spoken as u64));
        environment.add_function("strftime_now", move |format: &str| strftime::format(now, format));
        let template = environment.get_template(NAME).map_err(|error| broken(&error))?;
        let mut context: BTreeMap<String, Value> =
            variables.into_iter().map(|(name, value)| (name, Value::from(Serde(value)))).collect();
        context.insert("bos_token".into(), self.bos_token.as_str().into());
        context.insert("eos_token".into(), self.eos_token.as_str().into());
        let mut output =
            Bounded { bytes: Vec::new(), most: RENDERED_BYTES_MAX.saturating_add(spoken.saturating_mul(4)) };
        template.render_captured_to(context, &mut output).map_err(|error| classify(&error))?;
        String::from_utf8(output.bytes).map_err(|_| ChatTemplateError::Broken("it made invalid UTF-8".into()))
    }
}

/// Cuts the prompt at the end of the last message, without what the template writes after it. Some templates trim
/// messages, so trailing whitespace may be missing.
fn up_to(mut prompt: String, last: &str) -> Result<String, ChatTemplateError> {
    let unfit = || ChatTemplateError::Unfit {
        parameter: "continue_final_message".into(),
        reason: "it does not show the last message as it is".into(),
    };
    let said = last.trim();
    let at = prompt.rfind(said).filter(|_| !said.is_empty()).ok_or_else(unfit)?;
    let with_space = last.trim_start();
    let length = if prompt[at..].starts_with(with_space) { with_space.len() } else { said.len() };
    prompt.truncate(at + length);
    Ok(prompt)
}

/// The message that a template passed to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

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

/// A buffer that refuses to grow beyond a limit.
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
mod tests;
