//! Files and batches as OpenAI's API shows them, and the lines of their files. Pure functions that never panic.

pub(crate) mod line;

use std::collections::BTreeMap;

use protocol::batches::{Batch, BatchCounts, BatchError, BatchStatus};
use protocol::files::{FileId, FilePurpose, StoredFile};
use protocol::{UnixMillis, WireError};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::json_body::{invalid, missing, read};

/// The most pairs of metadata, and the longest key and value; `OpenAI`'s limits.
const METADATA_MAX: usize = 16;
const METADATA_KEY_MAX: usize = 64;
const METADATA_VALUE_MAX: usize = 512;
/// The least and the most seconds after which a file may be deleted; `OpenAI`'s limits.
const EXPIRES_AFTER_SECS: std::ops::RangeInclusive<u64> = 3_600..=2_592_000;

/// The endpoints whose requests a batch may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BatchEndpoint {
    Chat,
    Completions,
    Embeddings,
    Responses,
}

impl BatchEndpoint {
    const ALL: [Self; 4] = [Self::Chat, Self::Completions, Self::Embeddings, Self::Responses];

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
        }
    }

    pub(crate) fn of_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|endpoint| endpoint.path() == path)
    }
}

/// The body of `POST /v1/batches`.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = CreateBatchRequest)]
pub(crate) struct BatchRequest {
    /// Id of an uploaded file with the purpose `batch`. Each line is a request: `custom_id`, `method` (`POST`), `url`
    /// and `body`.
    #[schema(value_type = String)]
    input_file_id: Option<String>,
    /// The endpoint of all requests: `/v1/chat/completions`, `/v1/completions`, `/v1/embeddings` or `/v1/responses`.
    #[schema(value_type = String)]
    endpoint: Option<String>,
    /// Always `24h`.
    #[schema(value_type = String)]
    completion_window: Option<String>,
    /// Up to 16 pairs that the batch shows again.
    metadata: Option<BTreeMap<String, String>>,
    /// When the result files are deleted.
    output_expires_after: Option<ExpiresAfter>,
}

/// When a file is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, ToSchema)]
#[schema(as = FileExpiresAfter)]
pub(crate) struct ExpiresAfter {
    /// Always `created_at`.
    pub(crate) anchor: String,
    /// Seconds after that time; 3600 to 2592000.
    pub(crate) seconds: u64,
}

impl ExpiresAfter {
    pub(crate) fn check(&self, param: &str) -> Result<u64, WireError> {
        if self.anchor != "created_at" {
            return Err(invalid(&format!("{param}.anchor"), "must be created_at"));
        }
        if !EXPIRES_AFTER_SECS.contains(&self.seconds) {
            return Err(invalid(&format!("{param}.seconds"), "must be between 3600 and 2592000"));
        }
        Ok(self.seconds)
    }
}

/// A parsed request for a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BatchOrder {
    pub(crate) input_file: FileId,
    pub(crate) endpoint: BatchEndpoint,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) results_expire_after_secs: Option<u64>,
}

/// Parses the body of `POST /v1/batches`.
pub(crate) fn parse_batch(bytes: &[u8]) -> Result<BatchOrder, WireError> {
    let body: BatchRequest = read(bytes)?;
    let input_file = body.input_file_id.ok_or_else(|| missing("input_file_id"))?;
    let input_file = input_file.parse().map_err(|_| invalid("input_file_id", "is not the id of a file"))?;
    let endpoint = body.endpoint.ok_or_else(|| missing("endpoint"))?;
    let endpoint = BatchEndpoint::of_path(&endpoint).ok_or_else(|| {
        let paths = BatchEndpoint::ALL.map(BatchEndpoint::path).join(", ");
        invalid("endpoint", &format!("must be one of {paths}"))
    })?;
    if body.completion_window.ok_or_else(|| missing("completion_window"))? != "24h" {
        return Err(invalid("completion_window", "must be 24h"));
    }
    let metadata = body.metadata.unwrap_or_default();
    check_metadata(&metadata)?;
    let expires = body.output_expires_after.map(|expires| expires.check("output_expires_after")).transpose()?;
    Ok(BatchOrder { input_file, endpoint, metadata, results_expire_after_secs: expires })
}

fn check_metadata(metadata: &BTreeMap<String, String>) -> Result<(), WireError> {
    if metadata.len() > METADATA_MAX {
        return Err(invalid("metadata", &format!("has more than {METADATA_MAX} pairs")));
    }
    let is_long = |(key, value): (&String, &String)| {
        key.chars().count() > METADATA_KEY_MAX || value.chars().count() > METADATA_VALUE_MAX
    };
    if metadata.iter().any(is_long) {
        let limits = format!("has a key above {METADATA_KEY_MAX} or a value above {METADATA_VALUE_MAX} characters");
        return Err(invalid("metadata", &limits));
    }
    Ok(())
}

/// A file, without its bytes.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = File)]
pub(crate) struct FileObject {
    pub(crate) id: String,
    /// Kind of the object: always `file`.
    object: &'static str,
    bytes: u64,
    /// Seconds since 1970.
    created_at: u64,
    /// When the file is deleted, in seconds since 1970.
    expires_at: u64,
    filename: String,
    /// `batch` or `batch_output`.
    purpose: &'static str,
    /// Always `processed`.
    status: &'static str,
}

impl From<StoredFile> for FileObject {
    fn from(file: StoredFile) -> Self {
        Self {
            id: file.id.to_string(),
            object: "file",
            bytes: file.bytes,
            created_at: seconds(file.created_at),
            expires_at: seconds(file.expires_at),
            filename: file.name,
            purpose: file.purpose.as_str(),
            status: "processed",
        }
    }
}

/// A file that was deleted.
#[derive(Serialize, ToSchema)]
pub(crate) struct FileDeleted {
    pub(crate) id: String,
    /// Kind of the object that was deleted: always `file`.
    pub(crate) object: &'static str,
    /// Always true, since failures have a status of their own.
    pub(crate) deleted: bool,
}

/// A page of a list.
#[derive(Serialize, ToSchema)]
pub(crate) struct Page<T> {
    /// Kind of the object: always `list`.
    object: &'static str,
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

impl<T> Page<T> {
    /// Creates a page of at most `limit` of the objects.
    pub(crate) fn new(mut data: Vec<T>, limit: u32, id: impl Fn(&T) -> &str) -> Self {
        let has_more = data.len() > limit as usize;
        data.truncate(limit as usize);
        let of = |object: Option<&T>| object.map(|object| id(object).to_owned());
        let (first_id, last_id) = (of(data.first()), of(data.last()));
        Self { object: "list", data, first_id, last_id, has_more }
    }
}

/// Parses the purpose by which files are listed.
pub(crate) fn parse_purpose(purpose: &str) -> Result<FilePurpose, WireError> {
    [FilePurpose::Batch, FilePurpose::BatchOutput]
        .into_iter()
        .find(|known| known.as_str() == purpose)
        .ok_or_else(|| invalid("purpose", "must be batch or batch_output"))
}

/// A batch as clients see it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Batch)]
pub(crate) struct BatchObject {
    pub(crate) id: String,
    /// Kind of the object: always `batch`.
    object: &'static str,
    endpoint: String,
    /// What is wrong with the input file, if the batch has failed.
    errors: Option<Errors>,
    input_file_id: String,
    /// Always `24h`.
    completion_window: &'static str,
    /// Where the batch stands.
    #[schema(value_type = BatchState)]
    status: BatchStatus,
    /// File with the answers, once the batch has ended.
    output_file_id: Option<String>,
    /// File with the requests that have failed or expired, once the batch has ended.
    error_file_id: Option<String>,
    /// All times are in seconds since 1970.
    created_at: u64,
    in_progress_at: Option<u64>,
    expires_at: u64,
    finalizing_at: Option<u64>,
    completed_at: Option<u64>,
    failed_at: Option<u64>,
    expired_at: Option<u64>,
    cancelling_at: Option<u64>,
    cancelled_at: Option<u64>,
    request_counts: RequestCounts,
    metadata: BTreeMap<String, String>,
}

/// Where a batch stands.
#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[expect(dead_code, reason = "only its description is used")]
enum BatchState {
    Validating,
    Failed,
    InProgress,
    Finalizing,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

/// What is wrong with an input file.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchErrors)]
struct Errors {
    /// Kind of the object: always `list`.
    object: &'static str,
    data: Vec<ErrorObject>,
}

#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchError)]
struct ErrorObject {
    code: String,
    message: String,
    param: Option<String>,
    /// Number of the line, from 1.
    line: Option<u32>,
}

/// How many requests a batch has.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BatchRequestCounts)]
struct RequestCounts {
    total: u32,
    completed: u32,
    failed: u32,
}

impl From<Batch> for BatchObject {
    fn from(batch: Batch) -> Self {
        let Batch { times, counts: BatchCounts { total, completed, failed }, details, .. } = batch;
        let errors = (!details.errors.is_empty())
            .then(|| Errors { object: "list", data: details.errors.into_iter().map(ErrorObject::from).collect() });
        Self {
            id: batch.id.to_string(),
            object: "batch",
            endpoint: batch.endpoint,
            errors,
            input_file_id: batch.input_file.to_string(),
            completion_window: "24h",
            status: batch.status,
            output_file_id: batch.output_file.map(|file| file.to_string()),
            error_file_id: batch.error_file.map(|file| file.to_string()),
            created_at: seconds(times.created_at),
            in_progress_at: times.in_progress_at.map(seconds),
            expires_at: seconds(times.expires_at),
            finalizing_at: times.finalizing_at.map(seconds),
            completed_at: times.completed_at.map(seconds),
            failed_at: times.failed_at.map(seconds),
            expired_at: times.expired_at.map(seconds),
            cancelling_at: times.cancelling_at.map(seconds),
            cancelled_at: times.cancelled_at.map(seconds),
            request_counts: RequestCounts { total, completed, failed },
            metadata: details.metadata,
        }
    }
}

impl From<BatchError> for ErrorObject {
    fn from(error: BatchError) -> Self {
        let BatchError { code, message, param, line } = error;
        Self { code, message, param, line }
    }
}

fn seconds(time: UnixMillis) -> u64 {
    time.0 / 1000
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn order() -> Value {
        json!({
            "input_file_id": "file-00000000000000000000000000000001", "endpoint": "/v1/embeddings",
            "completion_window": "24h", "metadata": {"run": "nightly"},
        })
    }

    #[test]
    fn a_batch_names_its_file_endpoint_and_window() {
        let read = parse_batch(order().to_string().as_bytes()).expect("well formed");
        assert_eq!((read.endpoint, read.metadata["run"].as_str()), (BatchEndpoint::Embeddings, "nightly"));
        for (param, value) in [
            ("input_file_id", json!(null)),
            ("input_file_id", json!("../passwd")),
            ("endpoint", json!("/v1/models")),
            ("endpoint", json!(null)),
            ("completion_window", json!("1h")),
            ("metadata", json!({"long": "x".repeat(513)})),
            ("output_expires_after.seconds", json!({"anchor": "created_at", "seconds": 1})),
            ("output_expires_after.anchor", json!({"anchor": "last_active_at", "seconds": 3600})),
        ] {
            let mut body = order();
            body[param.split('.').next().expect("a name")] = value;
            let error = parse_batch(body.to_string().as_bytes()).expect_err(param);
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }
}
