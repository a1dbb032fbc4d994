//! Errors in OpenAI's format: `{"error":{"message","type","param","code"}}`.

use bytes::{BufMut as _, BytesMut};
use protocol::WireError;
use protocol::error_code::LoadingModel;
use serde::Serialize;
use utoipa::ToSchema;

/// The body of every error.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody<'a> {
    error: ErrorDetail<'a>,
    /// Progress of the load, if the model is being loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    loading: Option<Loading<'a>>,
}

#[derive(Serialize, ToSchema)]
struct ErrorDetail<'a> {
    /// What went wrong and what to do, for people.
    message: &'a str,
    /// OpenAI's type of the error.
    r#type: &'static str,
    /// The field at fault.
    param: Option<&'a str>,
    /// Code of the error, for programs.
    code: &'static str,
}

/// Progress of a model's load.
#[derive(Serialize, ToSchema)]
struct Loading<'a> {
    model: String,
    /// `fetching` or `loading`.
    state: &'static str,
    /// Pseudonym of the worker whose load is furthest. It stays the same.
    node: &'a str,
    /// Completed share, from 0 to 1.
    progress: f64,
    bytes_sent: u64,
    total_bytes: u64,
    eta_seconds: Option<u64>,
}

impl<'a> Loading<'a> {
    fn of(loading: &'a LoadingModel) -> Self {
        let LoadingModel { model, node, progress } = loading;
        let percent = progress.percent.min(100);
        Self {
            model: model.to_string(),
            state: if progress.fetching { "fetching" } else { "loading" },
            node,
            progress: f64::from(percent) / 100.0,
            bytes_sent: progress.bytes / 100 * u64::from(percent),
            total_bytes: progress.bytes,
            eta_seconds: progress.remaining().map(|remaining| remaining.as_secs()),
        }
    }
}

/// Writes an error as JSON.
pub(crate) fn write(error: &WireError, out: &mut BytesMut) {
    let detail = ErrorDetail {
        message: &error.message,
        r#type: error.code.error_type(),
        param: error.param.as_deref(),
        code: error.code.as_str(),
    };
    let loading = error.loading.as_deref().map(Loading::of);
    let written = serde_json::to_writer(out.writer(), &ErrorBody { error: detail, loading });
    debug_assert!(written.is_ok(), "texts are always writable");
}

#[cfg(test)]
mod tests {
    use protocol::ErrorCode;
    use protocol::health::LoadProgress;
    use protocol::model::ModelKey;

    use super::*;

    #[test]
    fn an_error_has_the_four_fields_clients_expect() {
        let error = WireError::new(ErrorCode::MissingModel, "say \"which\"").with_param("model");
        let mut body = BytesMut::new();
        write(&error, &mut body);
        let expected = r#"{"error":{"message":"say \"which\"","type":"invalid_request_error","param":"model","code":"missing_model"}}"#;
        assert_eq!(body, expected.as_bytes());
    }

    #[test]
    fn how_far_a_load_is_stands_beside_its_error() {
        let key = "tether-tiny".parse().and_then(|model_id| Ok(ModelKey { model_id, version: "1.0".parse()? }));
        let progress = LoadProgress { percent: 25, elapsed_ms: 2_000, bytes: 4_000, fetching: false };
        let loading = LoadingModel { model: key.expect("well formed"), node: "n".into(), progress };
        let mut body = BytesMut::new();
        write(&WireError::new(ErrorCode::ModelLoading, "wait").with_loading(loading), &mut body);
        let error: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(error["error"]["type"], "overloaded_error");
        assert_eq!(
            error["loading"],
            serde_json::json!({
                "model": "tether-tiny@1.0", "state": "loading", "node": "n", "progress": 0.25,
                "bytes_sent": 1_000, "total_bytes": 4_000, "eta_seconds": 6,
            })
        );
    }
}
