//! Model descriptions in Anthropic's format.

use protocol::WireError;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use utoipa::ToSchema;

use crate::json_body::invalid;
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

/// The most models of a page, and how many it has by default.
const LIMIT_MAX: u32 = 1000;

/// Which page of models.
#[derive(Debug, Default)]
pub(crate) struct PageQuery {
    pub(crate) after_id: Option<String>,
    pub(crate) before_id: Option<String>,
    pub(crate) limit: Option<u32>,
}

/// A page of the models in Anthropic's format.
#[derive(Serialize, ToSchema)]
#[schema(as = AnthropicModelList)]
pub(crate) struct ModelPage<'a> {
    data: Vec<ModelInfo<'a>>,
    /// Whether there are more models in the direction of the request: before `before_id`, or else after this page.
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
    pub(crate) fn of(list: &'a ModelList, query: &PageQuery) -> Result<Self, WireError> {
        let limit = query.limit.unwrap_or(LIMIT_MAX);
        if !(1..=LIMIT_MAX).contains(&limit) {
            return Err(invalid("limit", &format!("must be between 1 and {LIMIT_MAX}")));
        }
        let models: Vec<_> = list.models().iter().map(ModelInfo::of).collect();
        let (page, has_more) = query.page(models, limit as usize)?;
        let (first_id, last_id) = (page.first().map(|model| model.id), page.last().map(|model| model.id));
        Ok(Self { data: page, has_more, first_id, last_id })
    }
}

impl PageQuery {
    /// Returns the models of the page, and whether there are more in the same direction.
    fn page<'a>(&self, mut models: Vec<ModelInfo<'a>>, limit: usize) -> Result<(Vec<ModelInfo<'a>>, bool), WireError> {
        let position = |models: &[ModelInfo<'_>], id: &str, param: &str| {
            let known = models.iter().position(|model| model.id == id);
            known.ok_or_else(|| invalid(param, "is no model of this list"))
        };
        match (&self.after_id, &self.before_id) {
            (Some(_), Some(_)) => return Err(invalid("before_id", "is not allowed together with after_id")),
            (Some(after), None) => {
                let known = position(&models, after, "after_id")?;
                models.drain(..=known);
            }
            (None, Some(before)) => {
                models.truncate(position(&models, before, "before_id")?);
                let excess = models.len().saturating_sub(limit);
                models.drain(..excess);
                return Ok((models, excess > 0));
            }
            (None, None) => {}
        }
        let has_more = models.len() > limit;
        models.truncate(limit);
        Ok((models, has_more))
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

    const IDS: [&str; 5] = ["a", "b", "c", "d", "e"];

    /// Returns the ids of a page and whether there are more.
    fn page(after: Option<&str>, before: Option<&str>, limit: usize) -> Result<(String, bool), WireError> {
        let model = |id| ModelInfo {
            r#type: "model",
            id,
            display_name: id,
            created_at: String::new(),
            lifecycle: "active",
            max_input_tokens: 0,
            max_tokens: 0,
        };
        let query = PageQuery { after_id: after.map(Into::into), before_id: before.map(Into::into), limit: None };
        let (models, has_more) = query.page(IDS.map(model).into(), limit)?;
        Ok((models.iter().map(|model| model.id).collect(), has_more))
    }

    #[test]
    fn pages_follow_and_precede_a_model() {
        let of = |after, before, limit| page(after, before, limit).expect("a page");
        assert_eq!(of(None, None, 5), ("abcde".into(), false));
        assert_eq!(of(None, None, 2), ("ab".into(), true));
        assert_eq!(of(Some("b"), None, 2), ("cd".into(), true));
        assert_eq!(of(Some("c"), None, 2), ("de".into(), false));
        assert_eq!(of(Some("e"), None, 2), (String::new(), false));
        assert_eq!(of(None, Some("d"), 2), ("bc".into(), true));
        assert_eq!(of(None, Some("c"), 2), ("ab".into(), false));
        for (after, before, param) in
            [(Some("x"), None, "after_id"), (None, Some("x"), "before_id"), (Some("a"), Some("b"), "before_id")]
        {
            assert_eq!(page(after, before, 2).expect_err(param).param.as_deref(), Some(param));
        }
    }

    #[test]
    fn a_time_is_written_in_utc() {
        assert_eq!(rfc3339(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(rfc3339(u64::MAX), "1970-01-01T00:00:00Z");
    }
}
