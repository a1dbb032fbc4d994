//! What is kept of a request with its answer.

use protocol::kept::NOTE_BYTES_MAX;
use protocol::{CorrelationId, ErrorCode, WireError};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::item::Item;
use super::request::Echo;
use super::tool_names::ToolNames;

/// The beginning of a response's id.
const ID_PREFIX: &str = "resp_";

/// What is kept of a request with its answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// The model as the client named it.
    pub(crate) model: String,
    pub(crate) echo: Echo,
    pub(crate) names: ToolNames,
    /// The conversation up to the answer.
    pub(crate) items: Vec<Item>,
}

impl Note {
    pub(crate) fn write(&self) -> Result<String, WireError> {
        let text = serde_json::to_string(self).expect("texts and numbers are always writable");
        if text.len() <= NOTE_BYTES_MAX {
            return Ok(text);
        }
        let message = format!("the conversation is too long to be stored ({NOTE_BYTES_MAX} bytes); set store to false");
        Err(WireError::new(ErrorCode::InvalidValue, message).with_param("store"))
    }

    pub(crate) fn read(text: &str) -> Result<Self, WireError> {
        serde_json::from_str(text).map_err(|_| {
            let message = "the stored response was written by another version of the gateway";
            WireError::new(ErrorCode::InternalError, message)
        })
    }
}

/// Returns the id of a job's response.
pub(crate) fn response_id(job: CorrelationId) -> String {
    format!("{ID_PREFIX}{}", job.0.simple())
}

/// Returns the job of a response.
pub(crate) fn job_of(id: &str) -> Result<CorrelationId, WireError> {
    let hex = id.strip_prefix(ID_PREFIX).filter(|hex| hex.len() == 32);
    hex.and_then(|hex| Uuid::try_parse(hex).ok()).map(CorrelationId).ok_or_else(|| not_found(id))
}

/// Returns the job of the response whose answer has this item, as [`item_id`](super::response) names it.
pub(super) fn job_of_item(id: &str) -> Option<CorrelationId> {
    let (_, name) = id.split_once('_')?;
    let (hex, index) = name.split_at_checked(32)?;
    let is_index = !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit());
    Uuid::try_parse(hex).ok().filter(|_| is_index).map(CorrelationId)
}

pub(crate) fn not_found(id: &str) -> WireError {
    let id: String = id.chars().take(60).collect();
    let message =
        format!("there is no stored response {id:?}; it may have expired, been deleted, or never been stored");
    WireError::new(ErrorCode::NotFound, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_leads_to_its_job() {
        let job = CorrelationId(Uuid::from_u128(0x1234_5678_9abc));
        assert_eq!(job_of(&response_id(job)), Ok(job));
        for bad in
            ["", "resp_", "resp_12", "msg_00000000000000000000000000000007", "resp_{0000000000000000000000000000}"]
        {
            assert_eq!(job_of(bad).expect_err(bad).code, ErrorCode::NotFound, "{bad}");
        }
    }

    #[test]
    fn an_item_leads_to_the_job_of_its_response() {
        let job = CorrelationId(Uuid::from_u128(0x1234_5678_9abc));
        assert_eq!(job_of_item(&format!("msg_{}00", job.0.simple())), Some(job));
        for bad in
            ["", "msg", "msg_1", "msg_00000000000000000000000000000007", "msg_00000000000000000000000000000007i0"]
        {
            assert_eq!(job_of_item(bad), None, "{bad}");
        }
    }
}
