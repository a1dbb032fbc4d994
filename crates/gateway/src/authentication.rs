//! Whose token is it? Asks the registry, and believes the answer for a few seconds.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::control::TokenGrant;
use protocol::token::ApiToken;
use protocol::{Digest, ErrorCode, UnixMillis, WireError};
use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::gateway::Origin;
use crate::rate_limit::{Quota, RateLimit};

/// Tokens remembered at once.
const TOKENS_MAX: usize = 10_000;
/// How long a refusal is believed: short, so that a token just made works at once.
const REFUSAL_BELIEVED: Duration = Duration::from_secs(1);
/// How long it is believed that the registry does not answer, so that a crowd does not queue for it.
const SILENCE_BELIEVED: Duration = Duration::from_millis(200);
/// Failed tries of one address or node with one key: nobody mistypes a key more often.
const FAILURES: Quota = Quota { burst: 10, per_minute: 10 };

/// Checks tokens and remembers the outcome, by the SHA-256 of the token.
pub(crate) struct Authentication {
    believed: Duration,
    checks: Mutex<HashMap<Digest, Arc<OnceCell<Check>>>>,
    failures: RateLimit<(Option<Origin>, String)>,
}

/// The outcome of a check, and how long it is believed.
struct Check {
    outcome: Result<Arc<TokenGrant>, WireError>,
    until: Instant,
}

impl Authentication {
    pub(crate) fn new(believed: Duration) -> Self {
        Self { believed, checks: Mutex::default(), failures: RateLimit::new() }
    }

    /// Returns what a token allows. `ask` asks the registry; it is dropped unasked where the answer is known.
    pub(crate) async fn check(
        &self,
        token: Option<&str>,
        origin: Option<Origin>,
        now: UnixMillis,
        ask: impl Future<Output = Result<TokenGrant, WireError>>,
    ) -> Result<Arc<TokenGrant>, WireError> {
        let Some(token) = token else {
            return Err(WireError::new(
                ErrorCode::InvalidApiKey,
                "an API key is needed: send the header `Authorization: Bearer tth_live_…`, or by RPC the field `token`",
            ));
        };
        let parsed: ApiToken = match token.parse() {
            Ok(parsed) => parsed,
            Err(malformed) => {
                let error = WireError::new(ErrorCode::InvalidApiKey, malformed.to_string());
                return Err(self.failed((origin, String::new()), error));
            }
        };
        let failure_key = (origin, parsed.key_id().to_owned());
        let slot = self.slot(Digest::of(token.as_bytes()));
        if !slot.initialized() && !self.failures.look(&failure_key, FAILURES).allowed {
            return Err(self.failed(failure_key, invalid()));
        }
        let check = slot.get_or_init(|| async { self.judge(ask.await) }).await;
        match &check.outcome {
            Ok(grant) if grant.expires_at.is_some_and(|end| end <= now) => {
                let expired = WireError::new(ErrorCode::InvalidApiKey, "the API key has expired");
                Err(self.failed(failure_key, expired))
            }
            Ok(grant) => Ok(grant.clone()),
            Err(error) if error.code == ErrorCode::InvalidApiKey => Err(self.failed(failure_key, error.clone())),
            Err(error) => Err(error.clone()),
        }
    }

    /// Returns the place of a token's check: a finished one that is still believed, one under way, or an empty one.
    fn slot(&self, token: Digest) -> Arc<OnceCell<Check>> {
        let now = Instant::now();
        let believed = |slot: &Arc<OnceCell<Check>>| slot.get().is_none_or(|check| check.until > now);
        let mut checks = self.checks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = checks.get(&token).filter(|slot| believed(slot)) {
            return slot.clone();
        }
        if checks.len() >= TOKENS_MAX {
            checks.retain(|_, slot| slot.initialized() && believed(slot));
            // Asking again costs little, memory without bound costs more.
            if checks.len() >= TOKENS_MAX {
                checks.clear();
            }
        }
        let slot = Arc::default();
        checks.insert(token, Arc::clone(&slot));
        slot
    }

    fn judge(&self, answer: Result<TokenGrant, WireError>) -> Check {
        let (outcome, believed) = match answer {
            Ok(grant) => (Ok(Arc::new(grant)), self.believed),
            Err(error) if error.code == ErrorCode::InvalidApiKey => (Err(error), REFUSAL_BELIEVED),
            Err(error) => (Err(error), SILENCE_BELIEVED),
        };
        Check { outcome, until: Instant::now() + believed }
    }

    /// Counts a failure; one too many is told to wait instead.
    fn failed(&self, key: (Option<Origin>, String), error: WireError) -> WireError {
        let verdict = self.failures.take(key, FAILURES);
        if verdict.allowed {
            return error;
        }
        WireError::new(ErrorCode::RateLimitExceeded, "too many tries with a wrong API key, wait before the next")
            .with_retry_after(verdict.retry_after)
    }
}

fn invalid() -> WireError {
    WireError::new(ErrorCode::InvalidApiKey, "the API key is wrong, revoked or expired")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use protocol::control::Scope;
    use protocol::policy::TenantPolicy;
    use protocol::token::{RANDOM_BYTES, TokenKind};

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000);

    fn token(seed: u8) -> String {
        ApiToken::generate(TokenKind::Live, &[seed; RANDOM_BYTES]).to_string()
    }

    fn grant(expires_at: Option<UnixMillis>) -> TokenGrant {
        TokenGrant {
            key_id: "k".into(),
            tenant_id: "t".parse().expect("tenant"),
            scopes: vec![Scope::Infer],
            policy: TenantPolicy::default(),
            expires_at,
        }
    }

    /// An authentication, and the calls its registry got.
    struct Fixture {
        authentication: Authentication,
        calls: Cell<u32>,
    }

    impl Fixture {
        fn new() -> Self {
            Self { authentication: Authentication::new(Duration::from_secs(5)), calls: Cell::new(0) }
        }

        async fn check(&self, token: &str, answer: Result<TokenGrant, WireError>) -> Result<(), ErrorCode> {
            let ask = async {
                self.calls.set(self.calls.get() + 1);
                tokio::time::sleep(Duration::from_millis(10)).await;
                answer
            };
            self.authentication.check(Some(token), None, NOW, ask).await.map(drop).map_err(|error| error.code)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_revoked_is_refused_within_five_seconds() {
        let fixture = Fixture::new();
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
        fixture.check(&token(1), Err(invalid())).await.expect("believed");
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(fixture.check(&token(1), Err(invalid())).await, Err(ErrorCode::InvalidApiKey));
        assert_eq!(fixture.calls.get(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_believed_for_a_second_only() {
        let fixture = Fixture::new();
        for _ in 0..3 {
            assert_eq!(fixture.check(&token(1), Err(invalid())).await, Err(ErrorCode::InvalidApiKey));
        }
        assert_eq!(fixture.calls.get(), 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_ask_for_one_token_make_one_call() {
        let fixture = Fixture::new();
        let text = token(1);
        let ask = || fixture.check(&text, Ok(grant(None)));
        let (one, two, three) = tokio::join!(ask(), ask(), ask());
        assert_eq!((one, two, three), (Ok(()), Ok(()), Ok(())));
        assert_eq!(fixture.calls.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_mistyped_token_costs_no_call() {
        let fixture = Fixture::new();
        let mistyped = token(1).replacen("live", "test", 1);
        assert_eq!(fixture.check(&mistyped, Ok(grant(None))).await, Err(ErrorCode::InvalidApiKey));
        assert_eq!(fixture.calls.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_past_its_end_is_refused_though_its_check_is_believed() {
        let fixture = Fixture::new();
        let ended = fixture.check(&token(1), Ok(grant(Some(NOW)))).await;
        assert_eq!(ended, Err(ErrorCode::InvalidApiKey));
        fixture.check(&token(2), Ok(grant(Some(UnixMillis(NOW.0 + 1))))).await.expect("granted");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_guesses_is_told_to_wait() {
        let fixture = Fixture::new();
        for _ in 0..10 {
            assert_eq!(fixture.check("tth_live_x", Err(invalid())).await, Err(ErrorCode::InvalidApiKey));
        }
        assert_eq!(fixture.check("tth_live_x", Err(invalid())).await, Err(ErrorCode::RateLimitExceeded));
        fixture.check(&token(1), Ok(grant(None))).await.expect("another key is not held up");
        tokio::time::advance(Duration::from_mins(1)).await;
        assert_eq!(fixture.check("tth_live_x", Err(invalid())).await, Err(ErrorCode::InvalidApiKey));
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_that_is_away_is_no_verdict_on_the_token() {
        let fixture = Fixture::new();
        let away = || Err(WireError::new(ErrorCode::Unavailable, "away"));
        assert_eq!(fixture.check(&token(1), away()).await, Err(ErrorCode::Unavailable));
        tokio::time::advance(SILENCE_BELIEVED).await;
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
    }
}
