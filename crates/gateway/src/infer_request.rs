//! Parses requests of Tether's own API: the body of `POST /infer`, and the field `request` of an `infer.submit` call.

use std::time::Duration;

use protocol::infer::InferSubmission;
use protocol::model::ModelRef;
use protocol::{ErrorCode, WireError};

use crate::job::Job;
use crate::json_body::{invalid, read};

/// Parses the body of `POST /infer`.
pub fn parse_infer(bytes: &[u8]) -> Result<Job, WireError> {
    let submission: InferSubmission = read(bytes).map_err(native_missing_model)?;
    submission.input.check().map_err(|invalid| native(invalid.into()))?;
    if submission.deadline_ms == Some(0) {
        return Err(invalid("deadlineMs", "must be at least 1"));
    }
    Ok(Job {
        model: ModelRef { name: submission.model_id, version: submission.version, adapter: None },
        input: submission.input,
        tenant_id: submission.tenant_id,
        correlation_id: submission.correlation_id,
        retry_token: submission.retry_token,
        trace_id: submission.trace_id,
        linger: None,
        keeps_answer: false,
        note: None,
        detached: false,
        class: submission.class,
        deadline: submission.deadline_ms.map(Duration::from_millis),
    })
}

/// Renames the invalid field of an error from OpenAI's name to that of our own API.
pub(crate) fn native(mut error: WireError) -> WireError {
    error.param = error.param.map(|param| match param.as_str() {
        "model" => "modelId".to_owned(),
        "tenantId" | "retryToken" | "input" => param,
        "response_format" => "input.format".to_owned(),
        "chat_template_kwargs" => "input.templateOptions".to_owned(),
        "continue_final_message" => "input.continueLast".to_owned(),
        param if param.starts_with("chat_template_kwargs.") => {
            param.replacen("chat_template_kwargs", "input.templateOptions", 1)
        }
        _ => format!("input.{}", camel_case(&param)),
    });
    error
}

fn camel_case(snake_case: &str) -> String {
    let mut camel_case = String::with_capacity(snake_case.len());
    for word in snake_case.split('_') {
        match word.chars().next() {
            Some(first) if !camel_case.is_empty() => {
                camel_case.push(first.to_ascii_uppercase());
                camel_case.push_str(&word[first.len_utf8()..]);
            }
            _ => camel_case.push_str(word),
        }
    }
    camel_case
}

fn native_missing_model(error: WireError) -> WireError {
    if error.code == ErrorCode::InvalidValue && error.message.contains("missing field `modelId`") {
        return WireError::new(ErrorCode::MissingModel, "modelId is missing").with_param("modelId");
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_native_error_names_the_native_field() {
        let param = |body: &str| parse_infer(body.as_bytes()).expect_err(body).param;
        let out_of_range = r#"{"modelId":"m","input":{"prompt":"x","topP":2}}"#;
        assert_eq!(param(out_of_range).as_deref(), Some("input.topP"));
        let without_tools = r#"{"modelId":"m","input":{"messages":[{"role":"user"}],"toolChoice":"required"}}"#;
        assert_eq!(param(without_tools).as_deref(), Some("input.toolChoice"));
        let long =
            format!(r#"{{"modelId":"m","input":{{"prompt":"x","format":{{"regex":"{}"}}}}}}"#, "x".repeat(300_000));
        assert_eq!(param(&long).as_deref(), Some("input.format"));
        assert_eq!(param(r#"{"modelId":"m","input":{}}"#).as_deref(), Some("input"));
        assert_eq!(param(r#"{"modelId":"M","input":"x"}"#).as_deref(), Some("modelId"));
        assert_eq!(param(r#"{"modelId":"m","input":"x","deadlineMs":0}"#).as_deref(), Some("deadlineMs"));
    }
}
