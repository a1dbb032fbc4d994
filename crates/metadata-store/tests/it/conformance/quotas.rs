//! What tenants use, and what their limits refuse.

use std::collections::BTreeMap;

use protocol::quota::{Amount, QuotaLimits, QuotaRefusal, QuotaRule, QuotaUsage, Window};
use protocol::usage::TokenUsage;
use protocol::{TenantId, UnixMillis};
use tether_metadata_store::{
    DurableState, Finalised, JobKey, JobStore, NewJob, ReassignError, Reassignment, ReserveError, Reserved, Settlement,
    TerminalState, UsageCursor,
};

use super::Jobs;
use super::concurrency::{Random, at_once};
use super::samples::{LEASE, NOW, job, key, reassignment, settlement, tenant, worker};

/// No limit of a worker gets in the way.
const ROOM: u32 = 1_000;

fn of(number: u128, tokens: u64, limits: QuotaLimits) -> NewJob {
    NewJob { tokens, limits, worker_capacity: ROOM, ..job(number) }
}

/// The move of a job's attempt to worker 2, where it may use so many tokens.
fn moved(number: u128, from_attempt: u32, tokens: u64, limits: QuotaLimits) -> Reassignment {
    Reassignment { from_attempt, tokens, limits, worker_capacity: ROOM, ..reassignment(number) }
}

fn daily(tokens: u64) -> QuotaLimits {
    QuotaLimits { tokens_per_day: Some(tokens), ..QuotaLimits::default() }
}

fn billed(number: u128, prompt_tokens: u32, completion_tokens: u32) -> Settlement {
    Settlement {
        usage: Some(TokenUsage { prompt_tokens, completion_tokens, ..TokenUsage::default() }),
        ..settlement(number)
    }
}

async fn usage(store: &dyn JobStore, now: UnixMillis) -> QuotaUsage {
    store.quota_usage(&tenant("acme"), now).await.expect("reads")
}

fn amount(spent: u64, reserved: u64) -> Amount {
    Amount { spent, reserved }
}

/// Returns the rule that refused a job.
fn refused(outcome: Result<Reserved, ReserveError>) -> QuotaRule {
    match outcome {
        Err(ReserveError::Quota(refusal)) => refusal.state.rule,
        other => panic!("it does not fit: {other:?}"),
    }
}

pub(crate) async fn a_job_holds_its_tokens_until_it_is_settled(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 500, QuotaLimits::default())).await.expect("no limit applies");
    store.reserve(of(2, 70, QuotaLimits::default())).await.expect("no limit applies");
    let expected =
        QuotaUsage { minute_tokens: amount(0, 570), day_tokens: amount(0, 570), day_requests: amount(0, 2), jobs: 2 };
    assert_eq!(usage(store, NOW).await, expected);
    store.finalise(billed(1, 100, 20)).await.expect("settles");
    let expected =
        QuotaUsage { minute_tokens: amount(120, 70), day_tokens: amount(120, 70), day_requests: amount(1, 1), jobs: 1 };
    assert_eq!(usage(store, NOW).await, expected);
    store.finalise(billed(1, 100, 20)).await.expect("is settled already");
    assert_eq!(usage(store, NOW).await, expected);
}

pub(crate) async fn a_limit_admits_its_last_token_and_no_more(subject: Jobs) {
    let store = &*subject.store;
    let limits = QuotaLimits {
        requests_per_day: Some(4),
        tokens_per_minute: Some(100),
        tokens_per_day: Some(150),
        concurrent_jobs: Some(2),
    };
    assert_eq!(refused(store.reserve(of(1, 101, limits)).await), QuotaRule::TokensPerMinute);
    assert_eq!(store.reserve(of(1, 60, limits)).await, Ok(Reserved::New));
    assert_eq!(refused(store.reserve(of(2, 41, limits)).await), QuotaRule::TokensPerMinute);
    assert_eq!(store.reserve(of(2, 40, limits)).await, Ok(Reserved::New));
    assert_eq!(refused(store.reserve(of(3, 0, limits)).await), QuotaRule::ConcurrentJobs);
    store.finalise(billed(1, 30, 30)).await.expect("settles");
    store.finalise(billed(2, 30, 10)).await.expect("settles");
    let next_minute = |number, tokens| NewJob { now: Window::Minute.end(NOW), ..of(number, tokens, limits) };
    assert_eq!(refused(store.reserve(next_minute(3, 51)).await), QuotaRule::TokensPerDay);
    assert_eq!(store.reserve(next_minute(3, 49)).await, Ok(Reserved::New));
    assert_eq!(store.reserve(next_minute(4, 1)).await, Ok(Reserved::New));
    store.finalise(billed(3, 1, 0)).await.expect("settles");
    assert_eq!(refused(store.reserve(next_minute(5, 0)).await), QuotaRule::RequestsPerDay);
    assert_eq!(store.job(&key(5)).await, Ok(None), "nothing is left of a refusal");
    let next_day = NewJob { now: Window::Day.end(NOW), ..of(5, 100, limits) };
    assert_eq!(store.reserve(next_day).await, Ok(Reserved::New));
}

pub(crate) async fn a_job_is_settled_in_the_windows_in_which_it_was_reserved(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, daily(100))).await.expect("reserves");
    let tomorrow = Window::Day.end(NOW);
    let late = NewJob { now: tomorrow, ..of(2, 100, daily(100)) };
    assert_eq!(store.reserve(late).await, Ok(Reserved::New), "a new day has tokens of its own");
    store.finalise(Settlement { now: tomorrow, ..billed(1, 50, 10) }).await.expect("settles");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(60, 0));
    assert_eq!(usage(store, tomorrow).await.day_tokens, amount(0, 100));
    store.finalise(Settlement { now: tomorrow, ..billed(2, 5, 0) }).await.expect("settles");
    assert_eq!(usage(store, tomorrow).await.day_tokens, amount(5, 0));
    let after = NewJob { now: Window::Day.end(tomorrow), ..of(3, 1, daily(100)) };
    store.reserve(after).await.expect("reserves");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(0, 0), "old windows are removed");
}

pub(crate) async fn a_job_that_costs_nothing_gives_everything_back(subject: Jobs) {
    let store = &*subject.store;
    let nothing = TokenUsage::default();
    for (number, state, usage_of_it) in [
        (1, TerminalState::Failed, Some(TokenUsage { prompt_tokens: 9, ..nothing })),
        (2, TerminalState::Dead, None),
        (3, TerminalState::Cancelled, Some(nothing)),
    ] {
        store.reserve(of(number, 100, daily(100))).await.expect("there is room each time");
        let failed = Settlement { state, usage: usage_of_it, ..settlement(number) };
        assert_eq!(store.finalise(failed).await, Ok(Finalised::Settled));
        assert_eq!(usage(store, NOW).await, QuotaUsage::default(), "{state:?}");
    }
    store.reserve(of(4, 100, daily(100))).await.expect("there is room");
    assert_eq!(store.release_expired(LEASE, 9).await.expect("releases").len(), 1);
    assert_eq!(usage(store, NOW).await, QuotaUsage::default(), "an expired lease");
    assert_eq!(store.reserve(of(1, 100, daily(100))).await, Ok(Reserved::Again { attempt: 2 }));
    assert_eq!(usage(store, NOW).await.day_tokens, amount(0, 100), "a job that runs again reserves again");
}

pub(crate) async fn a_moved_job_takes_its_quota_along(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, daily(100))).await.expect("reserves");
    let before = usage(store, NOW).await;
    store.reassign(Reassignment { worker_capacity: ROOM, ..reassignment(1) }).await.expect("moves");
    assert_eq!(usage(store, NOW).await, before);
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(2), 1)]));
    let settle = Settlement { attempt: 2, worker_id: worker(2), ..billed(1, 10, 1) };
    store.finalise(settle).await.expect("settles");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(11, 0));
}

pub(crate) async fn a_move_raises_what_a_job_holds_and_never_lowers_it(subject: Jobs) {
    let store = &*subject.store;
    let limits = QuotaLimits {
        requests_per_day: Some(2),
        tokens_per_minute: Some(250),
        tokens_per_day: Some(250),
        concurrent_jobs: Some(2),
    };
    store.reserve(of(1, 100, limits)).await.expect("reserves");
    store.reserve(of(2, 50, limits)).await.expect("reserves");
    assert_eq!(store.reassign(moved(1, 1, 200, limits)).await, Ok(()), "it takes what is left, and counts once");
    let raised =
        QuotaUsage { minute_tokens: amount(0, 250), day_tokens: amount(0, 250), day_requests: amount(0, 2), jobs: 2 };
    assert_eq!(usage(store, NOW).await, raised);
    assert_eq!(store.reassign(moved(1, 2, 10, limits)).await, Ok(()));
    assert_eq!(usage(store, NOW).await, raised, "an earlier worker may have used as much");
    let settle = Settlement { attempt: 3, worker_id: worker(2), ..billed(1, 150, 60) };
    store.finalise(settle).await.expect("settles");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(200, 50), "it is billed up to what it held last");
}

pub(crate) async fn a_move_that_exceeds_a_limit_changes_nothing(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, daily(250))).await.expect("reserves");
    store.reserve(of(2, 50, daily(250))).await.expect("reserves");
    let before = (usage(store, NOW).await, store.job(&key(1)).await);
    let Err(ReassignError::Quota(refusal)) = store.reassign(moved(1, 1, 201, daily(250))).await else {
        panic!("it does not fit");
    };
    let QuotaRefusal { state, wanted } = *refusal;
    assert_eq!((state.rule, state.reserved, wanted), (QuotaRule::TokensPerDay, 50, 201));
    assert_eq!((usage(store, NOW).await, store.job(&key(1)).await), before);
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 2)]));
    assert_eq!(store.finalise(billed(1, 10, 1)).await, Ok(Finalised::Settled), "its first attempt still has it");
}

pub(crate) async fn a_move_is_counted_in_the_windows_in_which_its_job_was_reserved(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, daily(250))).await.expect("reserves");
    let tomorrow = Window::Day.end(NOW);
    let late = Reassignment { now: tomorrow, ..moved(1, 1, 200, daily(250)) };
    store.reassign(late).await.expect("moves");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(0, 200));
    assert_eq!(usage(store, tomorrow).await.day_tokens, amount(0, 0));
    let late = Reassignment { now: tomorrow, ..moved(1, 2, 251, daily(250)) };
    assert!(matches!(store.reassign(late).await, Err(ReassignError::Quota(_))));
}

pub(crate) async fn a_reservation_that_does_not_count_holds_no_quota(subject: Jobs) {
    let store = &*subject.store;
    let limits = QuotaLimits { requests_per_day: Some(1), concurrent_jobs: Some(1), ..daily(100) };
    let second = |number| NewJob { counts: false, ..of(number, 0, limits) };
    store.reserve(of(1, 100, limits)).await.expect("reserves");
    let one_job = usage(store, NOW).await;
    for number in [2, 3] {
        assert_eq!(store.reserve(second(number)).await, Ok(Reserved::New));
    }
    assert_eq!(usage(store, NOW).await, one_job);
    assert_eq!(store.active_reservations().await, Ok(vec![(worker(1), 3)]), "it holds a slot");
    let end = Settlement { state: TerminalState::Cancelled, usage: Some(TokenUsage::default()), ..settlement(2) };
    assert_eq!(store.finalise(end).await, Ok(Finalised::Settled));
    store.finalise(billed(1, 10, 1)).await.expect("settles");
    assert_eq!(store.release_expired(LEASE, 9).await.expect("releases").len(), 1, "the other one");
    assert_eq!(store.active_reservations().await, Ok(vec![]));
    let after = usage(store, NOW).await;
    assert_eq!((after.day_tokens, after.day_requests, after.jobs), (amount(11, 0), amount(1, 0), 0));
    let states =
        [store.job(&key(2)).await, store.job(&key(3)).await].map(|job| job.expect("reads").expect("kept").state);
    assert_eq!(states, [TerminalState::Cancelled, TerminalState::Failed].map(DurableState::Settled));
}

pub(crate) async fn a_resend_needs_no_quota(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, daily(100))).await.expect("reserves");
    assert!(matches!(store.reserve(of(1, 100, daily(100))).await, Ok(Reserved::Duplicate(_))));
    assert_eq!(usage(store, NOW).await.day_tokens, amount(0, 100));
}

pub(crate) async fn nothing_is_billed_beyond_what_was_reserved(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, daily(100))).await.expect("reserves");
    store.finalise(billed(1, 60, 50)).await.expect("settles");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(100, 0));
    let ledger = store.usage(&tenant("acme"), UsageCursor::default(), 9).await.expect("reads");
    assert_eq!((ledger[0].usage.prompt_tokens, ledger[0].usage.completion_tokens), (60, 40));
}

pub(crate) async fn without_limits_of_tokens_a_job_is_billed_what_it_used(subject: Jobs) {
    let store = &*subject.store;
    store.reserve(of(1, 100, QuotaLimits::default())).await.expect("reserves");
    store.finalise(Settlement { is_bounded: false, ..billed(1, 60, 50) }).await.expect("settles");
    assert_eq!(usage(store, NOW).await.day_tokens, amount(110, 0));
    let ledger = store.usage(&tenant("acme"), UsageCursor::default(), 9).await.expect("reads");
    assert_eq!((ledger[0].usage.prompt_tokens, ledger[0].usage.completion_tokens), (60, 50));
}

pub(crate) async fn quotas_are_each_tenants_own(subject: Jobs) {
    let store = &*subject.store;
    let other = JobKey { tenant_id: tenant("other"), ..key(1) };
    store.reserve(of(1, 100, daily(100))).await.expect("reserves");
    assert_eq!(store.reserve(NewJob { key: other, ..of(1, 100, daily(100)) }).await, Ok(Reserved::New));
    assert_eq!(store.quota_tenants(NOW, 9).await, Ok(vec![tenant("acme"), tenant("other")]));
    assert_eq!(store.quota_tenants(NOW, 1).await, Ok(vec![tenant("acme")]));
    assert_eq!(store.quota_tenants(Window::Day.end(NOW), 9).await, Ok(vec![]));
}

pub(crate) async fn of_64_jobs_exactly_those_run_for_which_there_are_tokens(subject: Jobs) {
    let outcomes =
        at_once(&subject, |store, number| async move { store.reserve(of(number, 10, daily(105))).await }).await;
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Ok(Reserved::New)).count(), 10);
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, Err(ReserveError::Quota(_)))).count(), 54);
    assert_eq!(usage(&*subject.store, NOW).await.day_tokens, amount(0, 100));
}

/// What quotas do, in their shortest form.
#[derive(Debug, Default)]
struct Book {
    /// The tokens and the requests of each window.
    windows: BTreeMap<(TenantId, &'static str, UnixMillis), (Amount, Amount)>,
    /// What each running job holds, since when.
    running: BTreeMap<u128, (TenantId, u64, UnixMillis)>,
}

impl Book {
    fn windows_of(&mut self, tenant: &TenantId, at: UnixMillis, change: impl Fn(&mut (Amount, Amount))) {
        for window in Window::ALL {
            change(self.windows.entry((tenant.clone(), window.as_str(), window.start(at))).or_default());
        }
    }

    fn reserve(&mut self, number: u128, tenant: TenantId, tokens: u64, at: UnixMillis) {
        self.windows_of(&tenant, at, |(held, requests)| {
            held.reserved += tokens;
            requests.reserved += 1;
        });
        self.running.insert(number, (tenant, tokens, at));
    }

    /// Checks that a job may use so many tokens, besides what the others of its tenant use.
    fn check_raise(&self, number: u128, tokens: u64, limits: &QuotaLimits) -> Result<(), QuotaRefusal> {
        let (tenant, held, at) = &self.running[&number];
        if tokens <= *held {
            return Ok(());
        }
        let mut others = Self { windows: self.windows.clone(), running: BTreeMap::new() };
        others.windows_of(tenant, *at, |(amount, _)| amount.reserved -= held);
        let limits = QuotaLimits { requests_per_day: None, concurrent_jobs: None, ..*limits };
        others.usage(tenant, *at).check(&limits, tokens, *at)
    }

    /// Returns whether the job holds more than before.
    fn raise(&mut self, number: u128, tokens: u64) -> bool {
        let (tenant, held, at) = self.running[&number].clone();
        let more = tokens.saturating_sub(held);
        self.windows_of(&tenant, at, |(amount, _)| amount.reserved += more);
        self.running.insert(number, (tenant, held + more, at));
        more > 0
    }

    fn end(&mut self, number: u128, spent: u64) {
        let (tenant, tokens, at) = self.running.remove(&number).expect("it runs");
        self.windows_of(&tenant, at, |(held, requests)| {
            held.reserved -= tokens;
            held.spent += spent;
            requests.reserved -= 1;
            requests.spent += u64::from(spent > 0);
        });
    }

    fn usage(&self, tenant: &TenantId, now: UnixMillis) -> QuotaUsage {
        let of = |window: Window| {
            let key = (tenant.clone(), window.as_str(), window.start(now));
            self.windows.get(&key).copied().unwrap_or_default()
        };
        QuotaUsage {
            minute_tokens: of(Window::Minute).0,
            day_tokens: of(Window::Day).0,
            day_requests: of(Window::Day).1,
            jobs: self.running.values().filter(|(owner, ..)| owner == tenant).count() as u32,
        }
    }
}

/// What happened in a random history.
#[derive(Debug, Default)]
struct Seen {
    admitted: u32,
    refused: BTreeMap<QuotaRule, u32>,
    raised: u32,
    raises_refused: u32,
}

pub(crate) async fn random_operations_use_what_the_reference_says(subject: Jobs) {
    let mut seen = Seen::default();
    for seed in 0..4 {
        random_history(&*subject.store, seed, &mut seen).await;
    }
    assert!(seen.admitted > 100, "{seen:?}");
    assert_eq!(seen.refused.len(), 4, "every limit refused something: {seen:?}");
    assert!(seen.raised > 20 && seen.raises_refused > 10, "{seen:?}");
}

async fn random_history(store: &dyn JobStore, seed: u64, seen: &mut Seen) {
    let (mut random, mut book) = (Random(seed), Book::default());
    let (mut next, mut now) = (u128::from(seed) * 1_000_000, NOW);
    let limits = QuotaLimits {
        requests_per_day: Some(12),
        tokens_per_minute: Some(300),
        tokens_per_day: Some(900),
        concurrent_jobs: Some(4),
    };
    for _ in 0..400 {
        let owner = tenant(&format!("tenant-{seed}-{}", random.below(2)));
        let chosen = book.running.keys().nth(random.below(4) as usize).copied();
        match (random.below(8), chosen) {
            (0..4, _) => {
                next += 1;
                let (tokens, before) = (random.below(200), book.usage(&owner, now));
                let key = JobKey { tenant_id: owner.clone(), ..key(next) };
                let lease_until = now.after(std::time::Duration::from_mins(3));
                match store.reserve(NewJob { key, now, lease_until, ..of(next, tokens, limits) }).await {
                    Ok(Reserved::New) => {
                        assert_eq!(before.check(&limits, tokens, now), Ok(()), "seed {seed}");
                        book.reserve(next, owner.clone(), tokens, now);
                        seen.admitted += 1;
                    }
                    Err(ReserveError::Quota(refusal)) => {
                        assert_eq!(before.check(&limits, tokens, now), Err(*refusal), "seed {seed}");
                        *seen.refused.entry(refusal.state.rule).or_default() += 1;
                    }
                    other => panic!("seed {seed}: {other:?}"),
                }
            }
            (4, Some(number)) => {
                let (tenant_id, ..) = book.running[&number].clone();
                let key = JobKey { tenant_id, ..key(number) };
                let attempt = store.job(&key).await.expect("reads").expect("it runs").attempt;
                let (tokens, lease_until) = (random.below(300), now.after(std::time::Duration::from_mins(3)));
                let to =
                    Reassignment { key, worker_id: worker(1), now, lease_until, ..moved(0, attempt, tokens, limits) };
                match (store.reassign(to).await, book.check_raise(number, tokens, &limits)) {
                    (Ok(()), Ok(())) => seen.raised += u32::from(book.raise(number, tokens)),
                    (Err(ReassignError::Quota(refusal)), Err(expected)) if *refusal == expected => {
                        seen.raises_refused += 1;
                    }
                    other => panic!("seed {seed}: {other:?}"),
                }
            }
            (5 | 6, Some(number)) => {
                let (tenant_id, tokens, _) = book.running[&number].clone();
                let key = JobKey { tenant_id, ..key(number) };
                let attempt = store.job(&key).await.expect("reads").expect("it runs").attempt;
                let used = random.below(tokens + 50);
                let usage = TokenUsage { completion_tokens: used as u32, ..TokenUsage::default() };
                let is_billed = random.below(3) > 0;
                let state = if is_billed { TerminalState::Completed } else { TerminalState::Failed };
                let settle = Settlement { key, attempt, state, usage: Some(usage), now, ..settlement(0) };
                assert_eq!(store.finalise(settle).await, Ok(Finalised::Settled), "seed {seed}");
                book.end(number, if is_billed { used.min(tokens) } else { 0 });
            }
            (7, _) if random.below(4) == 0 => {
                for expired in store.release_expired(now, 100).await.expect("releases") {
                    book.end(expired.key.correlation_id.0.as_u128(), 0);
                }
            }
            _ => now = now.after(std::time::Duration::from_secs(random.below(900))),
        }
        let used = store.quota_usage(&owner, now).await.expect("reads");
        assert_eq!(used, book.usage(&owner, now), "seed {seed}");
        assert!(used.day_tokens.taken() <= 900 && used.minute_tokens.taken() <= 300, "seed {seed}: {used:?}");
        assert!(used.day_requests.taken() <= 12 && used.jobs <= 4, "seed {seed}: {used:?}");
    }
    for expired in store.release_expired(UnixMillis(u64::MAX >> 1), 1_000).await.expect("releases") {
        book.end(expired.key.correlation_id.0.as_u128(), 0);
    }
    for owner in 0..2 {
        let used = store.quota_usage(&tenant(&format!("tenant-{seed}-{owner}")), now).await.expect("reads");
        assert_eq!((used.jobs, used.day_tokens.reserved, used.minute_tokens.reserved), (0, 0, 0), "seed {seed}");
    }
}
