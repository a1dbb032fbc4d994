//! Parses the bodies of `POST /v1/responses` into jobs. Pure functions that never panic, whatever the input.
//!
//! Unknown fields are ignored, and so are tools of unknown types. Known fields that are not supported are refused.

mod body;
mod tools;

use std::collections::BTreeMap;

use protocol::{CorrelationId, WireError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::item::{self, Item};
use super::note::{self, Note};
use super::tool_names::ToolNames;
use crate::job::Job;
use crate::json_body::{invalid, read};
pub(crate) use body::ResponseRequestBody;

/// The number of stored responses whose items a request may refer to.
const REFERRED_MAX: usize = 256;

/// A parsed request for a response.
#[derive(Debug, Clone, PartialEq)]
pub struct ResponseRequest {
    pub job: Job,
    /// The model's name as the client wrote it.
    pub model: String,
    /// Whether to stream the answer.
    pub stream: bool,
    /// Whether the response is stored.
    pub store: bool,
    /// Whether the client does not wait for the answer.
    pub background: bool,
    /// The response that the conversation continues.
    pub previous_response_id: Option<String>,
    /// What the response repeats of the request.
    pub(crate) echo: Echo,
    pub(crate) names: ToolNames,
    /// The conversation up to the answer.
    pub(crate) items: Vec<Item>,
}

impl ResponseRequest {
    /// Returns the jobs of the stored responses whose items the request refers to, each with the index of its first
    /// reference.
    pub(crate) fn referred(&self) -> Result<BTreeMap<CorrelationId, usize>, WireError> {
        let mut jobs = BTreeMap::new();
        for (index, id) in self.references() {
            jobs.entry(note::job_of_item(id).ok_or_else(|| not_stored(index))?).or_insert(index);
        }
        if jobs.len() <= REFERRED_MAX {
            return Ok(jobs);
        }
        Err(invalid("input", &format!("may refer to items of {REFERRED_MAX} responses; send the items themselves")))
    }

    /// Replaces the references by the stored items. Each item may be referred to once.
    pub(crate) fn resolve(&mut self, mut stored: BTreeMap<String, Item>) -> Result<(), WireError> {
        for (index, item) in self.items.iter_mut().enumerate() {
            if let Some(id) = item.referred() {
                *item = stored.remove(id).ok_or_else(|| not_stored(index))?;
            }
        }
        self.read_items()
    }

    fn references(&self) -> impl Iterator<Item = (usize, &str)> {
        self.items.iter().enumerate().filter_map(|(index, item)| Some((index, item.referred()?)))
    }

    fn read_items(&mut self) -> Result<(), WireError> {
        self.job.input.messages = Some(item::messages(self.echo.instructions.as_deref(), &self.items)?);
        Ok(())
    }

    /// Puts an earlier conversation before the items of the request. Instructions are not carried over.
    pub(crate) fn continue_after(&mut self, mut earlier: Vec<Item>) -> Result<(), WireError> {
        earlier.append(&mut self.items);
        self.items = earlier;
        self.read_items()
    }

    /// Adds what is kept of the request to its job, if the response is stored.
    pub(crate) fn keep(&mut self, service_tier: &str) -> Result<(), WireError> {
        if !self.store {
            return Ok(());
        }
        let (model, mut echo) = (self.model.clone(), self.echo.clone());
        service_tier.clone_into(&mut echo.service_tier);
        let note = Note { model, echo, names: self.names.clone(), items: std::mem::take(&mut self.items) };
        self.job.note = Some(note.write()?);
        self.job.detached = self.background;
        Ok(())
    }
}

fn not_stored(index: usize) -> WireError {
    let what = "refers to no item of a stored response; it may have expired, been deleted, or be referred to twice";
    invalid(&id_param(index), what)
}

/// Returns the name of an item's id in errors.
pub(crate) fn id_param(index: usize) -> String {
    format!("input[{index}].id")
}

/// Parses the body of `POST /v1/responses`.
pub fn parse_response(bytes: &[u8]) -> Result<ResponseRequest, WireError> {
    read::<ResponseRequestBody>(bytes)?.request()
}

/// The fields of a response that repeat its request.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Echo {
    pub(crate) background: bool,
    instructions: Option<String>,
    max_output_tokens: Option<u32>,
    max_tool_calls: Option<u32>,
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
    parallel_tool_calls: bool,
    pub(crate) previous_response_id: Option<String>,
    prompt_cache_key: Option<String>,
    reasoning: ReasoningEcho,
    safety_identifier: Option<String>,
    /// How urgent the request was: `default`, `priority` or `flex`.
    pub(crate) service_tier: String,
    pub(crate) store: bool,
    temperature: Option<f32>,
    text: TextEcho,
    #[schema(value_type = Value)]
    tool_choice: Value,
    #[schema(value_type = Vec<Object>)]
    tools: Vec<Value>,
    top_logprobs: u32,
    top_p: Option<f32>,
    truncation: String,
    user: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = ResponseReasoning)]
struct ReasoningEcho {
    effort: Option<String>,
    summary: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = ResponseText)]
struct TextEcho {
    #[schema(value_type = Object)]
    format: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    verbosity: Option<String>,
}

#[cfg(test)]
mod tests;
