//! Error codes, their HTTP statuses, and whether another attempt may succeed. No other code maps errors to the wire.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::id::MalformedId;
use inference::InvalidInput;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::health::LoadProgress;
use crate::model::ModelKey;
use crate::quota::QuotaState;

/// Code of an error, for clients and nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The body is not JSON, or not of the expected structure.
    InvalidJson,
    /// A field has an invalid value.
    InvalidValue,
    /// The request names no model.
    MissingModel,
    /// Prompt and answer do not fit into the model's context.
    ContextLengthExceeded,
    /// The request asks for something that this model or service does not support.
    UnsupportedParameter,
    /// The API key is missing, wrong, revoked or expired.
    InvalidApiKey,
    /// The key does not allow this operation.
    InsufficientScope,
    /// The tenant's policy does not allow this model.
    ModelNotAllowed,
    /// The tenant's policy does not allow this class of service.
    ClassNotAllowed,
    /// The model or version does not exist.
    ModelNotFound,
    /// The path does not exist on the gateway.
    NotFound,
    /// The path does not allow this method.
    MethodNotAllowed,
    /// A job with this retry token already exists.
    IdempotencyInProgress,
    /// The retry token belongs to another request.
    IdempotencyKeyReused,
    /// The body is larger than allowed.
    RequestTooLarge,
    /// The body is not `application/json`.
    UnsupportedMediaType,
    /// The client sent its request too slowly.
    RequestTimeout,
    /// Too many requests; wait and try again.
    RateLimitExceeded,
    /// The tenant has used up a quota that does not end soon.
    InsufficientQuota,
    /// The tenant's policy does not allow the regions where the job could run.
    ResidencyMismatch,
    /// Tether has a defect.
    InternalError,
    /// The workers that tried the job failed.
    WorkerFailed,
    /// The engine crashed while it ran the job.
    EngineCrashed,
    /// Several engines crashed on this request. It is not run again.
    RequestCrashesEngine,
    /// An operator cancelled the request.
    CancelledByOperator,
    /// The deadline passed before the answer began.
    DeadlineExceeded,
    /// No worker has free capacity.
    NoCapacity,
    /// The circuit breaker of this model and region is open.
    BreakerOpen,
    /// The model is being loaded.
    ModelLoading,
    /// A part of the network does not respond.
    Unavailable,
    /// The caller disconnected.
    Cancelled,
    /// Another worker has taken over the job. This attempt is void.
    StaleAttempt,
    /// The worker is full. Another one may have capacity.
    WorkerFull,
    /// The worker is stopping. Another one may take the job.
    WorkerStopping,
    /// The worker does not have this model. Another one may.
    ModelNotHere,
    /// The caller of a method between nodes is not enrolled.
    NotEnrolled,
    /// The node was revoked.
    NodeRevoked,
    /// The registry does not know the invite.
    InviteUnknown,
    /// The invite's secret is wrong.
    InviteWrongSecret,
    /// Another node has already used the invite.
    InviteUsed,
    /// The invite has expired.
    InviteExpired,
    /// The called node does not have this method.
    UnknownMethod,
}

/// Which side caused an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// The request is at fault. Another worker would fail too.
    Caller,
    /// The worker is at fault or busy. Another one may succeed.
    Worker,
    /// The connection to the worker failed, or time ran out.
    Network,
}

impl ErrorCode {
    /// Every code.
    pub const ALL: [Self; 42] = [
        Self::InvalidJson,
        Self::InvalidValue,
        Self::MissingModel,
        Self::ContextLengthExceeded,
        Self::UnsupportedParameter,
        Self::InvalidApiKey,
        Self::InsufficientScope,
        Self::ModelNotAllowed,
        Self::ClassNotAllowed,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::IdempotencyInProgress,
        Self::IdempotencyKeyReused,
        Self::RequestTooLarge,
        Self::UnsupportedMediaType,
        Self::RequestTimeout,
        Self::RateLimitExceeded,
        Self::InsufficientQuota,
        Self::ResidencyMismatch,
        Self::InternalError,
        Self::WorkerFailed,
        Self::EngineCrashed,
        Self::RequestCrashesEngine,
        Self::CancelledByOperator,
        Self::DeadlineExceeded,
        Self::NoCapacity,
        Self::BreakerOpen,
        Self::ModelLoading,
        Self::Unavailable,
        Self::Cancelled,
        Self::StaleAttempt,
        Self::WorkerFull,
        Self::WorkerStopping,
        Self::ModelNotHere,
        Self::NotEnrolled,
        Self::NodeRevoked,
        Self::InviteUnknown,
        Self::InviteWrongSecret,
        Self::InviteUsed,
        Self::InviteExpired,
        Self::UnknownMethod,
    ];

    /// Returns the code as text.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidJson => "invalid_json",
            Self::InvalidValue => "invalid_value",
            Self::MissingModel => "missing_model",
            Self::ContextLengthExceeded => "context_length_exceeded",
            Self::UnsupportedParameter => "unsupported_parameter",
            Self::InvalidApiKey => "invalid_api_key",
            Self::InsufficientScope => "insufficient_scope",
            Self::ModelNotAllowed => "model_not_allowed",
            Self::ClassNotAllowed => "class_not_allowed",
            Self::ModelNotFound => "model_not_found",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::IdempotencyInProgress => "idempotency_in_progress",
            Self::IdempotencyKeyReused => "idempotency_key_reused",
            Self::RequestTooLarge => "request_too_large",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::RequestTimeout => "request_timeout",
            Self::RateLimitExceeded => "rate_limit_exceeded",
            Self::InsufficientQuota => "insufficient_quota",
            Self::ResidencyMismatch => "residency_mismatch",
            Self::InternalError => "internal_error",
            Self::WorkerFailed => "worker_failed",
            Self::EngineCrashed => "engine_crashed",
            Self::RequestCrashesEngine => "request_crashes_engine",
            Self::CancelledByOperator => "cancelled_by_operator",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::NoCapacity => "no_capacity",
            Self::BreakerOpen => "breaker_open",
            Self::ModelLoading => "model_loading",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
            Self::StaleAttempt => "stale_attempt",
            Self::WorkerFull => "worker_full",
            Self::WorkerStopping => "worker_stopping",
            Self::ModelNotHere => "model_not_here",
            Self::NotEnrolled => "not_enrolled",
            Self::NodeRevoked => "node_revoked",
            Self::InviteUnknown => "invite_unknown",
            Self::InviteWrongSecret => "invite_wrong_secret",
            Self::InviteUsed => "invite_used",
            Self::InviteExpired => "invite_expired",
            Self::UnknownMethod => "unknown_method",
        }
    }

    /// Returns the HTTP status a client sees.
    pub fn http_status(self) -> u16 {
        match self {
            Self::InvalidJson
            | Self::InvalidValue
            | Self::MissingModel
            | Self::ContextLengthExceeded
            | Self::UnsupportedParameter => 400,
            Self::InvalidApiKey => 401,
            Self::InsufficientScope
            | Self::ModelNotAllowed
            | Self::ResidencyMismatch
            | Self::ClassNotAllowed
            | Self::NotEnrolled
            | Self::NodeRevoked
            | Self::InviteWrongSecret => 403,
            Self::ModelNotFound | Self::NotFound | Self::UnknownMethod | Self::InviteUnknown => 404,
            Self::MethodNotAllowed => 405,
            Self::RequestTimeout => 408,
            Self::IdempotencyInProgress | Self::InviteUsed => 409,
            Self::InviteExpired => 410,
            Self::RequestTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::IdempotencyKeyReused => 422,
            Self::RateLimitExceeded | Self::InsufficientQuota => 429,
            // Nginx's status for a client that closed the connection. Nobody reads it.
            Self::Cancelled => 499,
            Self::InternalError | Self::StaleAttempt | Self::RequestCrashesEngine | Self::CancelledByOperator => 500,
            Self::WorkerFailed | Self::EngineCrashed => 502,
            Self::NoCapacity
            | Self::BreakerOpen
            | Self::ModelLoading
            | Self::Unavailable
            | Self::WorkerFull
            | Self::WorkerStopping
            | Self::ModelNotHere => 503,
            Self::DeadlineExceeded => 504,
        }
    }

    /// Returns OpenAI's `type` of the error.
    pub fn error_type(self) -> &'static str {
        match self.http_status() {
            403 => "permission_error",
            409 | 422 => "idempotency_error",
            429 if self == Self::InsufficientQuota => "insufficient_quota",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// Returns the code of a job that fails because a worker returned this code.
    pub fn as_job_failure(self) -> Self {
        match self {
            Self::WorkerFull | Self::WorkerStopping | Self::ModelNotHere => Self::NoCapacity,
            Self::EngineCrashed
            | Self::StaleAttempt
            | Self::NotEnrolled
            | Self::NodeRevoked
            | Self::UnknownMethod
            | Self::InternalError => Self::WorkerFailed,
            code => code,
        }
    }

    /// Returns the code that clients see. Codes that only nodes use are replaced.
    pub fn for_clients(self) -> Self {
        match self {
            Self::StaleAttempt | Self::NotEnrolled | Self::NodeRevoked | Self::UnknownMethod | Self::InternalError => {
                Self::InternalError
            }
            Self::Cancelled => Self::Unavailable,
            code => code.as_job_failure(),
        }
    }

    /// Returns which side caused the error.
    pub fn blame(self) -> Blame {
        match self {
            Self::WorkerFull
            | Self::WorkerStopping
            | Self::ModelNotHere
            | Self::ModelLoading
            | Self::WorkerFailed
            | Self::EngineCrashed
            | Self::InternalError
            | Self::UnknownMethod
            | Self::NotEnrolled
            | Self::NodeRevoked => Blame::Worker,
            Self::Unavailable | Self::DeadlineExceeded => Blame::Network,
            _ => Blame::Caller,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// An error in a response between nodes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[error("{code}: {message}")]
pub struct WireError {
    /// Code of the error, for programs.
    pub code: ErrorCode,
    /// What went wrong and what to do, for people. It contains no address, path or secret.
    pub message: String,
    /// The field at fault, as the client wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub param: Option<String>,
    /// Milliseconds to wait before the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Progress of the load, if the model is being loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loading: Option<Box<LoadingModel>>,
    /// Number of jobs that an engine was running when it crashed, including this one. 0 if the engine was killed from
    /// outside, which says nothing of its jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspects: Option<u32>,
    /// The quota that the request would exceed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota: Option<Box<QuotaState>>,
}

/// Progress of a model that no worker has ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadingModel {
    /// The model that is being loaded.
    pub model: ModelKey,
    /// Pseudonym of the worker whose load is furthest. It stays the same and reveals nothing about the worker.
    pub node: String,
    /// Progress of the load on that worker.
    pub progress: LoadProgress,
}

/// A prompt that does not fit the model's context. [`fmt::Display`] writes it in OpenAI's words, by which clients
/// recognise a full context, and [`FromStr`] reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextLength {
    /// Tokens that fit the context.
    pub context_length: u32,
    /// The part of the request that is too long: `messages`, `input` or `prompt`.
    pub part: &'static str,
    /// Tokens of that part.
    pub prompt_tokens: u32,
}

impl fmt::Display for ContextLength {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { context_length, part, prompt_tokens } = self;
        write!(
            formatter,
            "This model's maximum context length is {context_length} tokens. However, your {part} resulted in \
             {prompt_tokens} tokens. Please reduce the length of the {part}."
        )
    }
}

impl FromStr for ContextLength {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let malformed = || MalformedId::new("error", text, "an error about the length of a prompt");
        let mut numbers = text.split(|character: char| !character.is_ascii_digit()).filter(|run| !run.is_empty());
        let mut number = || numbers.next().and_then(|run| run.parse().ok()).ok_or_else(malformed);
        let (context_length, prompt_tokens) = (number()?, number()?);
        let parts = ["messages", "input", "prompt"].map(|part| Self { context_length, part, prompt_tokens });
        parts.into_iter().find(|read| read.to_string() == text).ok_or_else(malformed)
    }
}

impl From<ContextLength> for WireError {
    fn from(limit: ContextLength) -> Self {
        Self::new(ErrorCode::ContextLengthExceeded, limit.to_string()).with_param(limit.part)
    }
}

impl From<InvalidInput> for WireError {
    fn from(invalid: InvalidInput) -> Self {
        Self::new(ErrorCode::InvalidValue, invalid.to_string()).with_param(invalid.param)
    }
}

impl WireError {
    /// Makes an error of a code and a message.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after_ms: None,
            loading: None,
            suspects: None,
            quota: None,
        }
    }

    /// Sets the field at fault.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Sets the progress of the model's load.
    #[must_use]
    pub fn with_loading(mut self, loading: LoadingModel) -> Self {
        self.loading = Some(Box::new(loading));
        self
    }

    /// Sets the number of jobs that may have caused the crash.
    #[must_use]
    pub fn with_suspects(mut self, suspects: u32) -> Self {
        self.suspects = Some(suspects);
        self
    }

    /// Sets the quota that the request would exceed.
    #[must_use]
    pub fn with_quota(mut self, quota: QuotaState) -> Self {
        self.quota = Some(Box::new(quota));
        self
    }

    /// Returns whether the same request may succeed later. Official SDKs retry a status of 500 or more, unless the
    /// response forbids it.
    pub fn should_retry(&self) -> bool {
        use ErrorCode::{CancelledByOperator, InsufficientQuota, RequestCrashesEngine};
        !matches!(self.code, RequestCrashesEngine | CancelledByOperator | InsufficientQuota)
    }

    /// Returns the error of a job that fails because a worker returned this error.
    #[must_use]
    pub fn as_job_failure(mut self) -> Self {
        let said = self.code;
        self.code = said.as_job_failure();
        match self.code {
            code if code == said => self,
            ErrorCode::NoCapacity => Self::new(self.code, "no worker has room for this model, try again")
                .with_retry_after(Duration::from_secs(1)),
            // An engine's message about its crash helps the caller. Messages of nodes about each other do not.
            _ if said == ErrorCode::EngineCrashed => Self { suspects: None, ..self },
            _ => Self { message: "the worker failed".into(), ..self },
        }
    }

    /// Returns the error as clients see it.
    #[must_use]
    pub fn for_clients(mut self) -> Self {
        let said = self.code;
        self.code = said.for_clients();
        if said != self.code && self.code == ErrorCode::InternalError {
            "a defect between our nodes, not of this request".clone_into(&mut self.message);
        }
        self
    }

    /// Sets how long to wait, at most 120 s, because official SDKs give up on longer waits.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        const LONGEST: Duration = Duration::from_mins(2);
        self.retry_after_ms = Some(wait.min(LONGEST).as_millis() as u64);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_written_the_same_in_json_and_in_text() {
        for code in [ErrorCode::InvalidJson, ErrorCode::ModelNotFound, ErrorCode::WorkerFull, ErrorCode::EngineCrashed]
        {
            assert_eq!(serde_json::to_value(code).expect("serialises"), code.as_str());
        }
    }

    #[test]
    fn codes_that_nodes_use_among_themselves_stay_among_them() {
        use ErrorCode as E;
        // The code of a worker, the code of the job, and the code that clients see if a node fails by itself.
        for (said, job, client) in [
            (E::WorkerFull, E::NoCapacity, E::NoCapacity),
            (E::WorkerStopping, E::NoCapacity, E::NoCapacity),
            (E::ModelNotHere, E::NoCapacity, E::NoCapacity),
            (E::EngineCrashed, E::WorkerFailed, E::WorkerFailed),
            (E::StaleAttempt, E::WorkerFailed, E::InternalError),
            (E::NotEnrolled, E::WorkerFailed, E::InternalError),
            (E::NodeRevoked, E::WorkerFailed, E::InternalError),
            (E::UnknownMethod, E::WorkerFailed, E::InternalError),
            (E::InternalError, E::WorkerFailed, E::InternalError),
            (E::Cancelled, E::Cancelled, E::Unavailable),
            (E::ContextLengthExceeded, E::ContextLengthExceeded, E::ContextLengthExceeded),
            (E::NoCapacity, E::NoCapacity, E::NoCapacity),
        ] {
            assert_eq!(WireError::new(said, "x").as_job_failure().code, job, "{said} of a worker");
            assert_eq!(WireError::new(said, "x").for_clients().code, client, "{said}");
        }
        let crashed = WireError::new(E::EngineCrashed, "the engine crashed").with_suspects(3).as_job_failure();
        assert_eq!((crashed.message.as_str(), crashed.suspects), ("the engine crashed", None));
        assert_eq!(WireError::new(E::NotEnrolled, "10.0.0.1 is unknown").as_job_failure().message, "the worker failed");
        assert!(!WireError::new(E::NotEnrolled, "10.0.0.1 is unknown").for_clients().message.contains("10.0.0.1"));
    }

    #[test]
    fn nobody_is_told_to_wait_longer_than_the_sdks_will() {
        let error = WireError::new(ErrorCode::NoCapacity, "full").with_retry_after(Duration::from_hours(1));
        assert_eq!(error.retry_after_ms, Some(120_000));
    }
}
