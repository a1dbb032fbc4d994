//! Model descriptions in Anthropic's format.

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use utoipa::ToSchema;

use crate::openai::response::models::{Model, ModelList};

/// A model, in Anthropic's format.
#[derive(Serialize, ToSchema)]
#[schema(as = AnthropicModel)]
pub(crate) struct ModelInfo<'a> {
    /// Kind of the object: always `model`.
    r#type: &'static str,
    id: &'a str,
    /// Name of the model, for people.
    display_name: &'a str,
    /// Time of registration, as RFC 3339.
    created_at: String,
    /// Stage of the model, always `active`: none is retired by date here.
    lifecycle: &'static str,
    /// Context length in tokens. Prompt and answer share it.
    max_input_tokens: u32,
    /// Context length in tokens as well, since an answer may fill it.
    max_tokens: u32,
}

/// The models in Anthropic's format, all on one page.
#[derive(Serialize, ToSchema)]
#[schema(as = AnthropicModelList)]
pub(crate) struct ModelPage<'a> {
    data: Vec<ModelInfo<'a>>,
    /// Always false: one page lists all models.
    has_more: bool,
    first_id: Option<&'a str>,
    last_id: Option<&'a str>,
}

impl<'a> ModelInfo<'a> {
    pub(crate) fn of(model: &'a Model) -> Self {
        let id = model.id();
        Self {
            r#type: "model",
            id,
            display_name: id,
            created_at: rfc3339(model.created()),
            lifecycle: "active",
            max_input_tokens: model.context_length(),
            max_tokens: model.context_length(),
        }
    }
}

impl<'a> ModelPage<'a> {
    pub(crate) fn of(list: &'a ModelList) -> Self {
        let data: Vec<_> = list.models().iter().map(ModelInfo::of).collect();
        let (first_id, last_id) = (data.first().map(|model| model.id), data.last().map(|model| model.id));
        Self { data, has_more: false, first_id, last_id }
    }
}

/// Formats seconds since 1970. A time that no calendar has is the first.
fn rfc3339(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    time.unwrap_or(OffsetDateTime::UNIX_EPOCH).format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_written_in_utc() {
        assert_eq!(rfc3339(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(u64::MAX), "1970-01-01T00:00:00Z");
    }
}
