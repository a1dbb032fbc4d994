//! Structured output: OpenAI's `response_format`, and the fields that vLLM's clients send instead.

use protocol::WireError;
use protocol::infer::OutputFormat;
use serde::Deserialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::json_body::{invalid, is_empty, missing, refuse_unless, unsupported};

/// Format that an answer must have.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    kind: String,
    /// Schema of the answer, with `json_schema`.
    json_schema: Option<JsonSchema>,
}

/// A schema. Its `name` is ignored.
#[derive(Debug, Default, Deserialize, ToSchema)]
struct JsonSchema {
    /// The JSON schema.
    #[schema(value_type = Object)]
    schema: Option<Value>,
    /// Whether to refuse a schema that cannot be enforced completely. Otherwise unsupported parts are ignored.
    strict: Option<bool>,
}

/// vLLM's `structured_outputs`, and its older fields with the prefix `guided_`. At most one may be given.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StructuredOutputs {
    /// A JSON schema, or its text.
    pub(super) json: Option<Value>,
    /// Whether the answer must be a JSON object.
    pub(super) json_object: Option<bool>,
    /// A regular expression that must match the whole answer.
    pub(super) regex: Option<String>,
    /// Texts, of which the answer must be one.
    pub(super) choice: Option<Vec<String>>,
    /// A Lark grammar.
    pub(super) grammar: Option<String>,
    /// Refused unless it is empty.
    pub(super) structural_tag: Option<Value>,
}

impl ResponseFormat {
    pub(super) fn convert(self) -> Result<OutputFormat, WireError> {
        match self.kind.as_str() {
            "text" => Ok(OutputFormat::Text),
            "json_object" => Ok(OutputFormat::Json),
            "json_schema" => {
                let JsonSchema { schema, strict } = self.json_schema.unwrap_or_default();
                let schema = schema.ok_or_else(|| missing("response_format.json_schema.schema"))?;
                Ok(of_schema(schema, strict))
            }
            _ => Err(unsupported("response_format.type")),
        }
    }
}

/// Returns the format of a schema. Unless it is strict, the parts that cannot be enforced are ignored.
pub(crate) fn of_schema(mut schema: Value, strict: Option<bool>) -> OutputFormat {
    if let Some(keywords) = schema.as_object_mut().filter(|_| strict != Some(true)) {
        keywords.insert("x-guidance".into(), json!({ "lenient": true }));
    }
    OutputFormat::JsonSchema(schema)
}

impl StructuredOutputs {
    /// Returns the requested constraint; at most one is allowed. `param` is the prefix of the fields' names in errors.
    pub(super) fn convert(self, param: &str) -> Result<OutputFormat, WireError> {
        let Self { json, json_object, regex, choice, grammar, structural_tag } = self;
        refuse_unless(structural_tag.as_ref().is_none_or(is_empty), &format!("{param}structural_tag"))?;
        let json = json.map(|json| schema(json, &format!("{param}json"))).transpose()?;
        let choice = choice.map(|texts| one_of(&texts, &format!("{param}choice"))).transpose()?;
        let given = [
            json.map(OutputFormat::JsonSchema),
            json_object.filter(|wanted| *wanted).map(|_| OutputFormat::Json),
            regex.map(OutputFormat::Regex),
            choice.map(OutputFormat::Regex),
            grammar.map(OutputFormat::Lark),
        ];
        one(given.into_iter().flatten(), param.trim_end_matches(['.', '_']))
    }
}

/// Returns the only format that constrains the answer, or an error if several do.
pub(super) fn one(formats: impl IntoIterator<Item = OutputFormat>, param: &str) -> Result<OutputFormat, WireError> {
    let mut said = formats.into_iter().filter(|format| *format != OutputFormat::Text);
    let format = said.next().unwrap_or_default();
    if said.next().is_some() {
        return Err(invalid(param, "is one of several forms that are asked for: ask for one"));
    }
    Ok(format)
}

/// Returns a JSON schema. Like vLLM, accepts it as a string as well.
fn schema(json: Value, param: &str) -> Result<Value, WireError> {
    match json {
        Value::String(text) => serde_json::from_str(&text).map_err(|_| invalid(param, "must be a JSON schema")),
        schema => Ok(schema),
    }
}

/// Returns a regular expression that matches exactly these texts.
fn one_of(texts: &[String], param: &str) -> Result<String, WireError> {
    if texts.is_empty() {
        return Err(invalid(param, "must not be empty"));
    }
    let escaped: Vec<_> = texts.iter().map(|text| escape(text)).collect();
    Ok(format!("({})", escaped.join("|")))
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if r"\.+*?()|[]{}^$#&-~".contains(character) {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}
