//! Quotas of a tenant: what its policy limits in windows of time, how much of that is used, and what still fits.
//!
//! Windows are fixed: minutes and days of UTC. What a job may use at most is reserved before it runs, so that jobs at
//! the same time cannot exceed a limit together.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::error_code::{ErrorCode, WireError};
use crate::id::{PublicKey, TenantId};
use crate::policy::TenantPolicy;
use crate::usage::TokenUsage;

/// Orchestrator: returns the quotas of tenants. [`QuotaQuery`] → [`QuotaPage`].
pub const QUOTA_LIST: &str = "quota.list";
/// The most tenants that one page of quotas lists.
pub const TENANTS_MAX: u32 = 1_000;
/// The longest wait that a client is asked for. Official SDKs do not wait longer.
const WAIT_MAX: Duration = Duration::from_mins(2);
/// How long a tenant waits that has as many jobs as it may have.
const JOB_WAIT: Duration = Duration::from_secs(1);

/// A fixed window of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Window {
    /// A minute of UTC.
    Minute,
    /// A day of UTC.
    Day,
}

impl Window {
    /// Every window, the shorter first.
    pub const ALL: [Self; 2] = [Self::Minute, Self::Day];

    /// Returns the window's length.
    pub fn length(self) -> Duration {
        match self {
            Self::Minute => Duration::from_mins(1),
            Self::Day => Duration::from_hours(24),
        }
    }

    /// Returns the beginning of the window that contains a time.
    pub fn start(self, time: UnixMillis) -> UnixMillis {
        let length = self.length().as_millis() as u64;
        UnixMillis(time.0 - time.0 % length)
    }

    /// Returns the end of the window that contains a time.
    pub fn end(self, time: UnixMillis) -> UnixMillis {
        self.start(time).after(self.length())
    }

    /// Returns the name of the window, as in stores and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Day => "day",
        }
    }
}

/// A rule of a policy that limits an amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum QuotaRule {
    /// Requests per minute in the long run.
    RequestsPerMinute,
    /// Requests in each day of UTC.
    RequestsPerDay,
    /// Tokens of prompts and answers in each minute.
    TokensPerMinute,
    /// Tokens of prompts and answers in each day of UTC.
    TokensPerDay,
    /// Jobs at the same time.
    ConcurrentJobs,
}

impl QuotaRule {
    /// Returns the name of the rule, as in error messages and policies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RequestsPerMinute => "requests_per_minute",
            Self::RequestsPerDay => "requests_per_day",
            Self::TokensPerMinute => "tokens_per_minute",
            Self::TokensPerDay => "tokens_per_day",
            Self::ConcurrentJobs => "concurrent_jobs",
        }
    }

    /// Returns whether the rule limits tokens.
    pub fn is_of_tokens(self) -> bool {
        matches!(self, Self::TokensPerMinute | Self::TokensPerDay)
    }

    /// Returns the window whose end frees the quota; `None` if it is freed by other events.
    pub fn window(self) -> Option<Window> {
        match self {
            Self::TokensPerMinute => Some(Window::Minute),
            Self::RequestsPerDay | Self::TokensPerDay => Some(Window::Day),
            Self::RequestsPerMinute | Self::ConcurrentJobs => None,
        }
    }

    /// Returns what is limited, for people.
    fn unit(self) -> &'static str {
        match self {
            Self::RequestsPerMinute => "requests per minute",
            Self::RequestsPerDay => "requests per day (UTC)",
            Self::TokensPerMinute => "tokens per minute",
            Self::TokensPerDay => "tokens per day (UTC)",
            Self::ConcurrentJobs => "jobs at the same time",
        }
    }
}

/// The limits that are checked when a job is reserved. An omitted one does not apply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct QuotaLimits {
    /// Requests in each day of UTC.
    pub requests_per_day: Option<u64>,
    /// Tokens in each minute.
    pub tokens_per_minute: Option<u64>,
    /// Tokens in each day of UTC.
    pub tokens_per_day: Option<u64>,
    /// Jobs at the same time.
    pub concurrent_jobs: Option<u32>,
}

impl QuotaLimits {
    /// Returns the limits that a policy sets.
    pub fn of(policy: &TenantPolicy) -> Self {
        Self {
            requests_per_day: policy.requests_per_day,
            tokens_per_minute: policy.tokens_per_minute,
            tokens_per_day: policy.tokens_per_day,
            concurrent_jobs: policy.concurrent_jobs,
        }
    }

    /// Returns whether tokens are limited.
    pub fn limits_tokens(&self) -> bool {
        self.tokens_per_minute.is_some() || self.tokens_per_day.is_some()
    }

    /// Returns whether no limit applies.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How much of something is used in a window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Amount {
    /// What settled jobs used.
    pub spent: u64,
    /// What running jobs may use at most.
    pub reserved: u64,
}

impl Amount {
    /// Returns what is used or may still be used by running jobs.
    pub fn taken(self) -> u64 {
        self.spent.saturating_add(self.reserved)
    }
}

/// What a tenant uses in the windows that contain a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct QuotaUsage {
    /// Tokens of the minute.
    pub minute_tokens: Amount,
    /// Tokens of the day.
    pub day_tokens: Amount,
    /// Requests of the day.
    pub day_requests: Amount,
    /// Jobs that have a reservation.
    pub jobs: u32,
}

impl QuotaUsage {
    /// Returns the state of each limit at a time, also of those that do not apply.
    pub fn states(&self, limits: &QuotaLimits, now: UnixMillis) -> [QuotaState; 4] {
        let state = |rule: QuotaRule, limit, Amount { spent, reserved }| QuotaState {
            rule,
            limit,
            spent,
            reserved,
            resets_at: rule.window().map(|window| window.end(now)),
        };
        let jobs = Amount { spent: 0, reserved: self.jobs.into() };
        [
            state(QuotaRule::RequestsPerDay, limits.requests_per_day, self.day_requests),
            state(QuotaRule::TokensPerMinute, limits.tokens_per_minute, self.minute_tokens),
            state(QuotaRule::TokensPerDay, limits.tokens_per_day, self.day_tokens),
            state(QuotaRule::ConcurrentJobs, limits.concurrent_jobs.map(u64::from), jobs),
        ]
    }

    /// Checks that a job fits within the limits. `tokens` is the most that it may use. If several limits refuse the
    /// job, the error is that of [`QuotaRefusal::among`].
    pub fn check(&self, limits: &QuotaLimits, tokens: u64, now: UnixMillis) -> Result<(), QuotaRefusal> {
        QuotaRefusal::among(self.states(limits, now), tokens).map_or(Ok(()), Err)
    }
}

/// The state of one limit of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuotaState {
    /// The rule of the policy.
    pub rule: QuotaRule,
    /// The limit; absent if the policy sets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// What settled jobs used.
    pub spent: u64,
    /// What running jobs may use at most.
    pub reserved: u64,
    /// When the window ends, and with it what is spent; absent for a rule without a window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<UnixMillis>,
}

impl QuotaState {
    /// Returns what is left, or `None` without a limit.
    pub fn left(&self) -> Option<u64> {
        Some(self.limit?.saturating_sub(self.spent.saturating_add(self.reserved)))
    }

    /// Returns whether less is left than a job needs.
    fn lacks(&self, wanted: u64) -> bool {
        let taken = self.spent.saturating_add(self.reserved);
        self.limit.is_some_and(|limit| taken.saturating_add(wanted) > limit)
    }

    /// Returns the token limit of which least is left.
    pub fn tightest_of_tokens(states: &[Self]) -> Option<Self> {
        let limits = states.iter().filter(|state| state.rule.is_of_tokens() && state.limit.is_some());
        limits.min_by_key(|state| state.left()).copied()
    }
}

/// A limit that a job would exceed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{} does not allow {wanted} more", .state.rule.as_str())]
pub struct QuotaRefusal {
    /// The limit, before the job.
    pub state: QuotaState,
    /// What the job may use at most.
    pub wanted: u64,
}

impl QuotaRefusal {
    /// Returns why a limit refuses a job that may use at most `tokens`, if it does.
    pub fn of(state: QuotaState, tokens: u64) -> Option<Self> {
        let wanted = if state.rule.is_of_tokens() { tokens } else { 1 };
        state.lacks(wanted).then_some(Self { state, wanted })
    }

    /// Returns the refusal by these limits that takes longest to end, if one of them refuses.
    pub fn among(states: impl IntoIterator<Item = QuotaState>, tokens: u64) -> Option<Self> {
        let refusals = states.into_iter().filter_map(|state| Self::of(state, tokens));
        refusals.max_by_key(|refusal| (refusal.is_final(), refusal.state.resets_at))
    }

    /// Returns whether the job alone exceeds the limit, so that it never fits.
    pub fn is_final(&self) -> bool {
        self.state.limit.is_some_and(|limit| self.wanted > limit)
    }

    /// Returns the error that the client gets: which limit, how much of it is used, and when it ends.
    pub fn error(&self, now: UnixMillis) -> WireError {
        let wait = match self.state.resets_at {
            Some(end) => end.since(now).max(Duration::from_millis(1)),
            None => JOB_WAIT,
        };
        let code = if self.is_final() || wait > WAIT_MAX {
            ErrorCode::InsufficientQuota
        } else {
            ErrorCode::RateLimitExceeded
        };
        let error = WireError::new(code, self.text(wait)).with_param(self.state.rule.as_str()).with_quota(self.state);
        if code == ErrorCode::RateLimitExceeded { error.with_retry_after(wait) } else { error }
    }

    fn text(&self, wait: Duration) -> String {
        let Self { state: QuotaState { rule, limit, spent, reserved, .. }, wanted } = *self;
        let (limit, unit) = (limit.unwrap_or_default(), rule.unit());
        if limit == 0 {
            return format!("the tenant's policy allows no {unit}");
        }
        if self.is_final() {
            return format!(
                "this request may need up to {wanted} tokens, and the tenant's limit is {limit} {unit}; \
                 set a lower max_tokens or send a shorter prompt"
            );
        }
        if rule == QuotaRule::ConcurrentJobs {
            return format!("the tenant may have {limit} {unit} and has {reserved}; wait until one ends");
        }
        let needs =
            if rule.is_of_tokens() { format!(", and this request may need up to {wanted}") } else { String::new() };
        format!(
            "the tenant's limit is {limit} {unit}: {spent} are used and {reserved} are reserved for running jobs{needs}; \
             the limit resets in {}",
            in_words(wait)
        )
    }
}

/// Returns a duration as `3h 12m`, `4m 5s` or `17s`, rounded up.
pub fn in_words(duration: Duration) -> String {
    let seconds = duration.as_millis().div_ceil(1000) as u64;
    let (hours, minutes) = (seconds / 3600, seconds % 3600 / 60);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        _ => format!("{hours}h {minutes}m"),
    }
}

/// Returns the part of a usage that is billed if at most `tokens` were reserved for it. The prompt comes first.
#[must_use]
pub fn within(usage: TokenUsage, tokens: u64) -> TokenUsage {
    let at_most = |tokens: u64| u32::try_from(tokens).unwrap_or(u32::MAX);
    let prompt_tokens = usage.prompt_tokens.min(at_most(tokens));
    let completion_tokens = usage.completion_tokens.min(at_most(tokens.saturating_sub(prompt_tokens.into())));
    TokenUsage {
        prompt_tokens,
        completion_tokens,
        cached_tokens: usage.cached_tokens.min(prompt_tokens),
        reasoning_tokens: usage.reasoning_tokens.min(completion_tokens),
    }
}

/// Which tenants' quotas an operator asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuotaQuery {
    /// The tenant; every tenant that has used something in a current window if omitted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant_id: Option<TenantId>,
}

/// The quotas of one tenant at one orchestrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TenantQuota {
    /// The tenant that is limited.
    pub tenant_id: TenantId,
    /// The state of each rule, also of those that set no limit.
    pub quotas: Vec<QuotaState>,
}

/// The quotas of tenants, as one orchestrator counts them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuotaPage {
    /// The tenants, ordered by name.
    pub tenants: Vec<TenantQuota>,
    /// Tenants are missing: more than [`TENANTS_MAX`] have used something, or the policy of one could not be read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
}

/// The quotas of tenants, as each orchestrator of a region counts them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QuotaList {
    /// What each orchestrator counts. Each limits the jobs that it runs itself.
    pub orchestrators: Vec<OrchestratorQuotas>,
    /// Orchestrators that did not respond.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub silent: Vec<PublicKey>,
}

/// The quotas of tenants at one orchestrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrchestratorQuotas {
    /// The node that counts.
    pub orchestrator: PublicKey,
    /// The tenants, ordered by name.
    pub tenants: Vec<TenantQuota>,
    /// Tenants are missing: more than [`TENANTS_MAX`] have used something, or the policy of one could not be read.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2023-11-14T22:13:20Z.
    const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
    const MINUTE_ENDS_IN: u64 = 40_000;

    fn tokens(minute: Option<u64>, day: Option<u64>) -> QuotaLimits {
        QuotaLimits { tokens_per_minute: minute, tokens_per_day: day, ..QuotaLimits::default() }
    }

    fn used(spent: u64, reserved: u64) -> QuotaUsage {
        let amount = Amount { spent, reserved };
        QuotaUsage { minute_tokens: amount, day_tokens: amount, ..QuotaUsage::default() }
    }

    fn refused(limits: &QuotaLimits, usage: &QuotaUsage, tokens: u64) -> WireError {
        usage.check(limits, tokens, NOW).expect_err("it does not fit").error(NOW)
    }

    #[test]
    fn windows_are_minutes_and_days_of_utc() {
        assert_eq!(Window::Minute.start(NOW), UnixMillis(1_699_999_980_000));
        assert_eq!(Window::Minute.end(NOW).since(NOW), Duration::from_millis(MINUTE_ENDS_IN));
        assert_eq!(Window::Day.start(NOW).0 % 86_400_000, 0);
        assert_eq!(Window::Day.end(NOW), UnixMillis(1_700_006_400_000));
        let start = Window::Day.end(NOW);
        assert_eq!(Window::Day.start(start), start, "the end of a window belongs to the next one");
    }

    #[test]
    fn a_minutes_limit_says_when_to_come_back_and_a_days_limit_says_not_to_try() {
        let error = refused(&tokens(Some(100), None), &used(60, 30), 20);
        assert_eq!((error.code, error.retry_after_ms), (ErrorCode::RateLimitExceeded, Some(MINUTE_ENDS_IN)));
        assert_eq!(error.param.as_deref(), Some("tokens_per_minute"));
        for part in ["100 tokens per minute", "60 are used", "30 are reserved", "up to 20", "resets in 40s"] {
            assert!(error.message.contains(part), "{part} in {}", error.message);
        }
        let error = refused(&tokens(Some(100), Some(100)), &used(60, 30), 20);
        assert_eq!((error.code, error.retry_after_ms), (ErrorCode::InsufficientQuota, None), "the day takes longer");
        assert!(error.message.contains("resets in 1h 46m"), "{}", error.message);
        assert!(!error.should_retry());
        let just_before_midnight = UnixMillis(Window::Day.end(NOW).0 - 5_000);
        let refusal = used(60, 30).check(&tokens(None, Some(100)), 20, just_before_midnight).expect_err("full");
        assert_eq!(refusal.error(just_before_midnight).retry_after_ms, Some(5_000), "worth the wait");
    }

    #[test]
    fn a_request_that_never_fits_is_told_so() {
        let error = refused(&tokens(Some(100), None), &QuotaUsage::default(), 101);
        assert_eq!(error.code, ErrorCode::InsufficientQuota);
        assert!(error.message.contains("lower max_tokens"), "{}", error.message);
        let error = refused(&tokens(Some(0), None), &QuotaUsage::default(), 1);
        assert_eq!(error.message, "the tenant's policy allows no tokens per minute");
    }

    #[test]
    fn jobs_and_requests_are_counted_one_by_one() {
        let limits = QuotaLimits { concurrent_jobs: Some(2), requests_per_day: Some(5), ..QuotaLimits::default() };
        let usage = |jobs, requests| QuotaUsage {
            jobs,
            day_requests: Amount { spent: requests, reserved: 0 },
            ..QuotaUsage::default()
        };
        assert_eq!(usage(1, 4).check(&limits, 1_000_000, NOW), Ok(()));
        let error = refused(&limits, &usage(2, 0), 1);
        assert_eq!((error.code, error.retry_after_ms), (ErrorCode::RateLimitExceeded, Some(1_000)));
        assert!(error.message.contains("may have 2 jobs at the same time and has 2"), "{}", error.message);
        let error = refused(&limits, &usage(2, 5), 1);
        assert_eq!(error.param.as_deref(), Some("requests_per_day"), "which takes longer");
    }

    #[test]
    fn the_limit_with_least_left_is_shown_to_clients() {
        let states = |limits| QuotaState::tightest_of_tokens(&used(10, 5).states(&limits, NOW));
        assert_eq!(states(QuotaLimits::default()), None);
        let tightest = states(tokens(Some(100), Some(50))).expect("two limits");
        assert_eq!((tightest.rule, tightest.left()), (QuotaRule::TokensPerDay, Some(35)));
    }

    proptest! {
        #[test]
        fn what_is_admitted_fits_and_what_fits_is_admitted(
            limit in 0u64..50, spent in 0u64..50, reserved in 0u64..50, wanted in 0u64..50,
        ) {
            let admitted = used(spent, reserved).check(&tokens(Some(limit), None), wanted, NOW).is_ok();
            prop_assert_eq!(admitted, spent + reserved + wanted <= limit);
        }

        #[test]
        fn nothing_is_billed_beyond_what_was_reserved(usage in any::<[u32; 4]>(), reserved in any::<u64>()) {
            let [prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens] = usage;
            let usage = TokenUsage { prompt_tokens, completion_tokens, cached_tokens, reasoning_tokens };
            let billed = within(usage, reserved);
            let total = |usage: TokenUsage| u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens);
            prop_assert!(total(billed) <= reserved);
            if total(usage) <= reserved {
                prop_assert_eq!(total(billed), total(usage));
            }
        }
    }
}
