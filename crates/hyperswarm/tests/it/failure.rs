//! What a call failed with, whichever side tells it.

use serde_json::Value;

/// A remote error as both worlds tell it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Failure {
    pub(crate) message: String,
    pub(crate) code: Option<String>,
    pub(crate) context: Option<String>,
    pub(crate) cause: Option<Box<Failure>>,
}

impl Failure {
    /// Node puts the code before the message.
    pub(crate) fn from_json(error: &Value) -> Self {
        let text = |field: &str| error[field].as_str().map(str::to_owned);
        let code = text("code");
        let message = text("message").unwrap_or_default();
        let message = match &code {
            Some(code) => message.strip_prefix(&format!("{code}: ")).unwrap_or(&message).to_owned(),
            None => message,
        };
        let cause = error.get("cause").filter(|cause| cause.is_object()).map(|cause| Box::new(Self::from_json(cause)));
        Self { message, code, context: text("context"), cause }
    }

    /// A failure with neither code nor cause.
    pub(crate) fn plain(message: impl ToString) -> Self {
        Self { message: message.to_string(), ..Self::default() }
    }
}
