//! Authenticates API tokens: asks the registry and caches its response for a few seconds.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use protocol::control::TokenGrant;
use protocol::token::ApiToken;
use protocol::{Digest, ErrorCode, UnixMillis, WireError};
use quick_cache::unsync::Cache;
use rpc::rate_limit::{Quota, RateLimit};
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};
use tokio::time::{self, Instant};

use crate::origin_permits::{OriginPermit, OriginPermits};
use crate::request_context::Origin;

/// Maximum number of cached tokens. Those in use stay when strangers show many others.
const TOKENS_MAX: usize = 10_000;
/// How long a refusal is cached. It is short, so that a new token works at once.
const REFUSAL_BELIEVED: Duration = Duration::from_secs(1);
/// How long a failure to reach the registry is cached, so that requests do not queue up for it.
const SILENCE_BELIEVED: Duration = Duration::from_millis(200);
/// Failed attempts allowed to one address or node with one key id. Nobody mistypes a key more often.
const FAILURES: Quota = Quota { burst: 10, per_minute: 10 };
/// Wrong tokens of one address or node that a registry is asked about. Further ones are asked about if they return.
const WRONG: Quota = Quota { burst: 60, per_minute: 60 };
/// Questions about returning tokens of one address or node: one in 200 ms, with ten in the queue.
const TURNS: Quota = Quota { burst: 10, per_minute: 300 };
/// Questions at a time about tokens that were not right before. Node keys and IPv6 networks cost nothing, so limits for
/// each origin do not protect the registry.
const QUESTIONS_MAX: usize = 64;
/// How long a deferred token's client should wait before it returns.
const DEFERRAL: Duration = Duration::from_secs(1);
/// Maximum number of deferred tokens that are remembered.
const DEFERRED_MAX: usize = 65_536;
/// How long a grant stays valid after the registry failed to confirm it, before the gateway asks again.
const UNCONFIRMED_BELIEVED: Duration = Duration::from_secs(1);

/// Checks tokens and caches the outcome under the SHA-256 of the token.
pub(crate) struct Authentication {
    believed: Duration,
    /// How long a grant stays valid after its last confirmation while no registry responds.
    absence_max: Duration,
    checks: Mutex<Cache<Digest, Entry>>,
    failures: RateLimit<FailureKey>,
    wrong: RateLimit<Option<Origin>>,
    /// Questions under way for each origin. They count as wrong until their answer is there.
    asking: OriginPermits,
    /// Permits for questions of all origins.
    questions: Semaphore,
    turns: RateLimit<Option<Origin>>,
    /// Tokens that were told to return, by who showed them.
    deferred: Mutex<Cache<(Option<Origin>, Digest), ()>>,
}

/// An origin and the key id that it showed.
type FailureKey = (Option<Origin>, String);

/// A token's check, and the last grant that a registry confirmed.
#[derive(Clone, Default)]
struct Entry {
    check: Arc<OnceCell<Check>>,
    confirmed: Option<Confirmed>,
}

/// The outcome of a check, and how long it is valid.
struct Check {
    outcome: Result<Arc<TokenGrant>, WireError>,
    until: Instant,
    confirmed: Option<Confirmed>,
}

/// A grant, and when a registry confirmed it.
#[derive(Clone)]
struct Confirmed {
    grant: Arc<TokenGrant>,
    at: Instant,
}

impl Authentication {
    pub(crate) fn new(believed: Duration, absence_max: Duration) -> Self {
        Self {
            believed,
            absence_max,
            checks: Mutex::new(Cache::new(TOKENS_MAX)),
            failures: RateLimit::new(),
            wrong: RateLimit::new(),
            asking: OriginPermits::default(),
            questions: Semaphore::new(QUESTIONS_MAX),
            turns: RateLimit::new(),
            deferred: Mutex::new(Cache::new(DEFERRED_MAX)),
        }
    }

    /// Returns what a token allows. The future `ask` queries the registry. It is dropped without being polled if the
    /// response is cached, or if the registry is known to be away and confirmed the grant recently enough.
    pub(crate) async fn check(
        &self,
        token: Option<&str>,
        origin: Option<Origin>,
        now: UnixMillis,
        is_registry_away: bool,
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
        let digest = Digest::of(token.as_bytes());
        let entry = self.entry(digest);
        let known = || entry.confirmed.clone().filter(|confirmed| confirmed.at.elapsed() < self.absence_max);
        let judged = async || {
            if let Some(known) = known().filter(|_| is_registry_away) {
                return Ok(unconfirmed(known));
            }
            // A token that was right before is always asked about.
            let question =
                if entry.confirmed.is_none() { Some(self.question(&failure_key, digest).await?) } else { None };
            let check = self.judge(ask.await, known());
            if let Some(question) = question {
                question.answered(is_wrong(&check.outcome));
            }
            Ok(check)
        };
        let check = match entry.check.get_or_try_init(judged).await {
            Ok(check) => check,
            Err(deferred) => {
                self.forget(digest, &entry);
                return Err(deferred);
            }
        };
        match &check.outcome {
            Ok(grant) if grant.expires_at.is_some_and(|end| end <= now) => {
                let expired = WireError::new(ErrorCode::InvalidApiKey, "the API key has expired");
                Err(self.failed(failure_key, expired))
            }
            Ok(grant) => Ok(grant.clone()),
            Err(error) if is_wrong(&check.outcome) => Err(self.failed(failure_key, error.clone())),
            Err(error) => Err(error.clone()),
        }
    }

    /// Waits until a registry may be asked about a token that was not right before. After many wrong tokens of its
    /// origin or for its key id, it is deferred. If it returns, as the client of a right one does, it gets its turn.
    async fn question(&self, key: &FailureKey, token: Digest) -> Result<Question<'_>, WireError> {
        let origin = key.0;
        let question = async |permit| Question {
            wrong: &self.wrong,
            origin,
            is_wrong: true,
            _permit: permit,
            // The semaphore is never closed.
            _turn: self.questions.acquire().await.ok(),
        };
        let of_origin = self.wrong.look(&origin, WRONG);
        if of_origin.allowed && self.failures.look(key, FAILURES).allowed {
            let permit = self.asking.acquire(origin, of_origin.remaining as usize + 1);
            if permit.is_some() {
                return Ok(question(permit).await);
            }
        }
        let deferred = (origin, token);
        let returns = self.deferred.lock().remove(&deferred).is_some();
        let turn = if returns { Some(self.turns.take(origin, TURNS)) } else { None };
        match turn.filter(|turn| turn.allowed) {
            Some(turn) => {
                time::sleep(turn.reset.saturating_sub(Duration::from_mins(1) / TURNS.per_minute)).await;
                Ok(question(None).await)
            }
            None => {
                self.deferred.lock().insert(deferred, ());
                Err(too_many_wrong())
            }
        }
    }

    /// Forgets a check that was not made.
    fn forget(&self, token: Digest, entry: &Entry) {
        let mut checks = self.checks.lock();
        let is_same = |known: &Entry| Arc::ptr_eq(&known.check, &entry.check) && !known.check.initialized();
        if checks.peek(&token).is_some_and(is_same) {
            checks.remove(&token);
        }
    }

    /// Returns a token's entry. Its check is still valid, under way, or not yet started.
    fn entry(&self, token: Digest) -> Entry {
        let now = Instant::now();
        let is_believed = |entry: &Entry| entry.check.get().is_none_or(|check| check.until > now);
        let mut checks = self.checks.lock();
        let last = checks.get(&token);
        if let Some(entry) = last.filter(|entry| is_believed(entry)) {
            return entry.clone();
        }
        let confirmed = last.and_then(|entry| entry.check.get()?.confirmed.clone());
        let entry = Entry { check: Arc::default(), confirmed };
        checks.insert(token, entry.clone());
        entry
    }

    fn judge(&self, answer: Result<TokenGrant, WireError>, known: Option<Confirmed>) -> Check {
        let now = Instant::now();
        match answer {
            Ok(grant) => {
                let confirmed = Confirmed { grant: Arc::new(grant), at: now };
                let outcome = Ok(confirmed.grant.clone());
                Check { outcome, until: now + self.believed, confirmed: Some(confirmed) }
            }
            Err(error) if error.code == ErrorCode::InvalidApiKey => {
                Check { outcome: Err(error), until: now + REFUSAL_BELIEVED, confirmed: None }
            }
            // The last grant stays valid only if the registry does not respond. One that refuses this gateway has
            // responded.
            Err(error) => match known.filter(|_| error.code == ErrorCode::Unavailable) {
                Some(known) => unconfirmed(known),
                None => Check { outcome: Err(error), until: now + SILENCE_BELIEVED, confirmed: None },
            },
        }
    }

    /// Counts a failed attempt. Returns `error`, or a rate limit error after too many.
    fn failed(&self, key: (Option<Origin>, String), error: WireError) -> WireError {
        let verdict = self.failures.take(key, FAILURES);
        if verdict.allowed {
            return error;
        }
        WireError::new(ErrorCode::RateLimitExceeded, "too many tries with a wrong API key, wait before the next")
            .with_retry_after(verdict.retry_after)
    }
}

/// A question to a registry. It counts as one about a wrong token if nobody waits for the answer.
struct Question<'a> {
    wrong: &'a RateLimit<Option<Origin>>,
    origin: Option<Origin>,
    is_wrong: bool,
    _permit: Option<OriginPermit>,
    _turn: Option<SemaphorePermit<'a>>,
}

impl Question<'_> {
    fn answered(mut self, is_wrong: bool) {
        self.is_wrong = is_wrong;
    }
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        if self.is_wrong {
            self.wrong.take(self.origin, WRONG);
        }
    }
}

/// Accepts the last confirmed grant for a moment.
fn unconfirmed(known: Confirmed) -> Check {
    let (outcome, until) = (Ok(known.grant.clone()), Instant::now() + UNCONFIRMED_BELIEVED);
    Check { outcome, until, confirmed: Some(known) }
}

fn is_wrong(outcome: &Result<Arc<TokenGrant>, WireError>) -> bool {
    outcome.as_ref().is_err_and(|error| error.code == ErrorCode::InvalidApiKey)
}

fn too_many_wrong() -> WireError {
    let message = "too many wrong API keys came from this address: wait, then send this request again";
    WireError::new(ErrorCode::RateLimitExceeded, message).with_retry_after(DEFERRAL)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use futures_util::future::join_all;
    use protocol::PublicKey;
    use protocol::control::Scope;
    use protocol::policy::TenantPolicy;
    use protocol::token::{RANDOM_BYTES, TokenKind};

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000);

    fn invalid() -> WireError {
        WireError::new(ErrorCode::InvalidApiKey, "the API key is wrong, revoked or expired")
    }
    const ABSENCE_MAX: Duration = Duration::from_mins(10);

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

    /// An authentication, and the number of calls to its registry.
    struct Fixture {
        authentication: Authentication,
        calls: Cell<u32>,
    }

    impl Fixture {
        fn new() -> Self {
            Self { authentication: Authentication::new(Duration::from_secs(5), ABSENCE_MAX), calls: Cell::new(0) }
        }

        async fn check(&self, token: &str, answer: Result<TokenGrant, WireError>) -> Result<(), ErrorCode> {
            self.check_while(false, token, answer).await
        }

        async fn check_while(
            &self,
            is_registry_away: bool,
            token: &str,
            answer: Result<TokenGrant, WireError>,
        ) -> Result<(), ErrorCode> {
            self.check_from(None, is_registry_away, token, answer).await
        }

        async fn check_from(
            &self,
            origin: Option<Origin>,
            is_registry_away: bool,
            token: &str,
            answer: Result<TokenGrant, WireError>,
        ) -> Result<(), ErrorCode> {
            let ask = async {
                self.calls.set(self.calls.get() + 1);
                tokio::time::sleep(Duration::from_millis(10)).await;
                answer
            };
            let checked = self.authentication.check(Some(token), origin, NOW, is_registry_away, ask).await;
            checked.map(drop).map_err(|error| error.code)
        }

        /// Shows wrong tokens, each another one, at once.
        async fn flood(&self, origin: Option<Origin>, numbers: std::ops::Range<u32>) -> Vec<Result<(), ErrorCode>> {
            let tokens: Vec<String> = numbers.map(random_token).collect();
            join_all(tokens.iter().map(|token| self.check_from(origin, false, token, Err(invalid())))).await
        }
    }

    fn random_token(number: u32) -> String {
        let mut random = [7; RANDOM_BYTES];
        random[..4].copy_from_slice(&number.to_le_bytes());
        ApiToken::generate(TokenKind::Live, &random).to_string()
    }

    fn address(last: u8) -> Origin {
        Origin::of([192, 0, 2, last].into())
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_random_tokens_cost_few_questions_and_keep_no_right_one_out() {
        let fixture = Fixture::new();
        let here = Some(address(1));
        let show = async |seed: u8| fixture.check_from(here, false, &token(seed), Ok(grant(None))).await;
        show(1).await.expect("granted");
        tokio::time::advance(Duration::from_secs(5)).await;
        fixture.flood(here, 0..500).await;
        assert_eq!(show(1).await, Ok(()), "one that was right before");
        assert_eq!(show(2).await, Err(ErrorCode::RateLimitExceeded), "a new one is told to return");
        fixture.flood(here, 500..1_000).await;
        assert_eq!(show(2).await, Ok(()), "and then it is asked about");
        let other = fixture.check_from(Some(address(2)), false, &token(3), Ok(grant(None))).await;
        assert_eq!(other, Ok(()), "another address is not held up");
        assert!(fixture.calls.get() <= 100, "{} questions", fixture.calls.get());
    }

    #[tokio::test(start_paused = true)]
    async fn many_new_right_tokens_of_one_address_are_all_asked_about() {
        let fixture = Fixture::new();
        for number in 0..1_000 {
            let right = fixture.check_from(Some(address(1)), false, &random_token(number), Ok(grant(None))).await;
            assert_eq!(right, Ok(()), "token {number}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn returning_tokens_are_asked_about_five_times_a_second() {
        let fixture = Fixture::new();
        fixture.flood(Some(address(1)), 0..1_000).await;
        let before = fixture.calls.get();
        let began = Instant::now();
        for _ in 0..10 {
            fixture.flood(Some(address(1)), 0..1_000).await;
        }
        let allowed = 10 + 5 * began.elapsed().as_secs() as u32 + 60;
        assert!(fixture.calls.get() - before <= allowed, "{} of {allowed}", fixture.calls.get() - before);
    }

    #[tokio::test(start_paused = true)]
    async fn however_many_nodes_show_wrong_tokens_few_are_asked_about_at_a_time_and_a_right_one_gets_its_turn() {
        let fixture = Fixture::new();
        let node = |number: u32| {
            let mut key = [9; 32];
            key[..4].copy_from_slice(&number.to_le_bytes());
            Some(Origin::Node(PublicKey(key)))
        };
        let tokens: Vec<String> = (0..1_000).map(random_token).collect();
        let wrong = tokens.iter().zip(0..).map(|(token, number)| {
            let check = fixture.check_from(node(number), false, token, Err(invalid()));
            async move { check.await.expect_err("wrong") }
        });
        let valid = token(1);
        let right = fixture.check_from(node(5_000), false, &valid, Ok(grant(None)));
        let began = Instant::now();
        let (_, right) = tokio::join!(join_all(wrong), right);
        assert_eq!(right, Ok(()));
        assert_eq!(fixture.calls.get(), 1_001);
        // Each question takes 10 ms.
        assert!(began.elapsed() >= Duration::from_millis(150), "{:?}", began.elapsed());
    }

    /// Returns another token with the key id of `token(1)`: a key id is eight digits in base 62.
    fn with_key_id_of_1(number: u128) -> String {
        let mut random = [1; RANDOM_BYTES];
        let tail = u128::from_be_bytes([1; 16]) + number * 62_u128.pow(8);
        random[RANDOM_BYTES - 16..].copy_from_slice(&tail.to_be_bytes());
        ApiToken::generate(TokenKind::Live, &random).to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_knows_a_key_id_keeps_its_right_token_not_out() {
        let fixture = Fixture::new();
        for number in 1..50 {
            fixture.check(&with_key_id_of_1(number), Err(invalid())).await.expect_err("wrong");
        }
        assert_eq!(fixture.check(&token(1), Ok(grant(None))).await, Err(ErrorCode::RateLimitExceeded));
        assert_eq!(fixture.check(&token(1), Ok(grant(None))).await, Ok(()));
        assert!(fixture.calls.get() < 20, "{} questions", fixture.calls.get());
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_that_nobody_waits_for_is_counted() {
        let fixture = Fixture::new();
        for number in 0..200 {
            let wrong = random_token(number);
            let check = fixture.check_from(Some(address(1)), false, &wrong, Err(invalid()));
            let _ = tokio::time::timeout(Duration::from_millis(5), check).await;
        }
        assert!(fixture.calls.get() <= 100, "{} questions", fixture.calls.get());
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
    async fn a_crowd_of_wrong_tokens_pushes_out_no_token_in_use() {
        let fixture = Fixture::new();
        let crowd = async |first: usize| {
            for number in first..first + 2 * TOKENS_MAX {
                let token = random_token(number as u32);
                let origin = Some(Origin::of(std::net::Ipv4Addr::from_bits(number as u32).into()));
                let answer = async { Err(invalid()) };
                fixture.authentication.check(Some(&token), origin, NOW, false, answer).await.expect_err("wrong");
            }
        };
        crowd(0).await;
        for _ in 0..2 {
            fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
        }
        crowd(2 * TOKENS_MAX).await;
        fixture.check(&token(1), Err(invalid())).await.expect("believed");
        assert_eq!(fixture.calls.get(), 1);
        assert!(fixture.authentication.checks.lock().len() <= TOKENS_MAX);
    }

    fn away() -> Result<TokenGrant, WireError> {
        Err(WireError::new(ErrorCode::Unavailable, "away"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_grant_stands_for_ten_minutes_while_no_registry_answers() {
        let fixture = Fixture::new();
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
        let granted = Instant::now();
        while granted.elapsed() < ABSENCE_MAX {
            assert_eq!(fixture.check(&token(1), away()).await, Ok(()), "after {:?}", granted.elapsed());
            tokio::time::advance(Duration::from_secs(7)).await;
        }
        assert_eq!(fixture.check(&token(1), away()).await, Err(ErrorCode::Unavailable));
        assert_eq!(fixture.check(&token(2), away()).await, Err(ErrorCode::Unavailable), "never granted");
        tokio::time::advance(SILENCE_BELIEVED).await;
        fixture.check(&token(1), Ok(grant(None))).await.expect("a registry is back");
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_that_is_known_to_be_away_is_not_waited_for() {
        let fixture = Fixture::new();
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
        for _ in 0..20 {
            tokio::time::advance(Duration::from_secs(6)).await;
            assert_eq!(fixture.check_while(true, &token(1), away()).await, Ok(()));
        }
        assert_eq!(fixture.calls.get(), 1);
        assert_eq!(fixture.check_while(true, &token(2), away()).await, Err(ErrorCode::Unavailable));
        assert_eq!(fixture.calls.get(), 2, "one that has nothing to stand on is asked for");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_revoked_in_the_registrys_absence_is_refused_as_soon_as_it_is_back() {
        let fixture = Fixture::new();
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
        tokio::time::advance(Duration::from_mins(1)).await;
        fixture.check(&token(1), away()).await.expect("stands");
        tokio::time::advance(UNCONFIRMED_BELIEVED).await;
        assert_eq!(fixture.check(&token(1), Err(invalid())).await, Err(ErrorCode::InvalidApiKey));
        tokio::time::advance(REFUSAL_BELIEVED).await;
        assert_eq!(fixture.check(&token(1), away()).await, Err(ErrorCode::Unavailable), "and never stands again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_that_turns_the_gateway_away_is_not_silent() {
        let fixture = Fixture::new();
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
        tokio::time::advance(Duration::from_mins(1)).await;
        let expelled = Err(WireError::new(ErrorCode::NodeRevoked, "this gateway was revoked"));
        assert_eq!(fixture.check(&token(1), expelled).await, Err(ErrorCode::NodeRevoked));
    }

    #[tokio::test(start_paused = true)]
    async fn a_registry_that_is_away_is_no_verdict_on_the_token() {
        let fixture = Fixture::new();
        assert_eq!(fixture.check(&token(1), away()).await, Err(ErrorCode::Unavailable));
        tokio::time::advance(SILENCE_BELIEVED).await;
        fixture.check(&token(1), Ok(grant(None))).await.expect("granted");
    }
}
