//! Limits how often a tenant's jobs go from a full worker to the next, so that an overload does not multiply itself.
//! Pure. Failures are not limited here: workers that fail are ejected, and the breakers open.

use std::collections::HashMap;

use protocol::TenantId;
use tokio::time::Instant;

/// Retries that a tenant may make at once.
const BURST: f64 = 100.0;
/// Retries a second that are always allowed, for tenants with few jobs.
const PER_SECOND: f64 = 1.0;
/// The tenants that are remembered. One that has not retried lately has its whole budget, and needs no entry.
const TENANTS_MAX: usize = 4096;

/// The budgets of all tenants. Each job adds a share of a retry, and each retry takes one.
#[derive(Debug)]
pub struct RetryBudgets {
    /// What a job adds.
    share: f64,
    tenants: HashMap<TenantId, Budget>,
}

#[derive(Debug, Clone, Copy)]
struct Budget {
    left: f64,
    at: Instant,
}

impl Budget {
    fn now(self, now: Instant) -> f64 {
        (self.left + now.duration_since(self.at).as_secs_f64() * PER_SECOND).min(BURST)
    }
}

impl RetryBudgets {
    /// Makes budgets of `percent` retries for each hundred jobs.
    pub fn new(percent: u32) -> Self {
        Self { share: f64::from(percent) / 100.0, tenants: HashMap::new() }
    }

    /// Adds the share of a job to its tenant's budget.
    pub fn job(&mut self, tenant: &TenantId, now: Instant) {
        if let Some(budget) = self.tenants.get_mut(tenant) {
            *budget = Budget { left: (budget.now(now) + self.share).min(BURST), at: now };
        }
    }

    /// Takes a retry. Returns whether there was one.
    pub fn take(&mut self, tenant: &TenantId, now: Instant) -> bool {
        if self.tenants.len() >= TENANTS_MAX && !self.tenants.contains_key(tenant) {
            self.forget(now);
        }
        let budget = self.tenants.entry(tenant.clone()).or_insert(Budget { left: BURST, at: now });
        let left = budget.now(now);
        let has_one = left >= 1.0;
        *budget = Budget { left: if has_one { left - 1.0 } else { left }, at: now };
        has_one
    }

    /// Forgets the tenants with a whole budget, or else the one that has most of it.
    fn forget(&mut self, now: Instant) {
        self.tenants.retain(|_, budget| budget.now(now) < BURST);
        if self.tenants.len() >= TENANTS_MAX {
            let richest = self.tenants.iter().max_by(|(_, one), (_, other)| one.now(now).total_cmp(&other.now(now)));
            if let Some(richest) = richest.map(|(tenant, _)| tenant.clone()) {
                self.tenants.remove(&richest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The time after which an empty budget allows a retry again.
    const WAIT: Duration = Duration::from_secs(1);

    fn tenant(name: &str) -> TenantId {
        name.parse().expect("tenant")
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenth_of_the_jobs_may_be_retried() {
        let (mut budgets, acme, now) = (RetryBudgets::new(10), tenant("acme"), Instant::now());
        let mut retried = 0;
        for _ in 0..10_000 {
            budgets.job(&acme, now);
            retried += u32::from(budgets.take(&acme, now));
        }
        let allowed = 1_000 + BURST as u32;
        assert!((allowed - 1..=allowed + 1).contains(&retried), "{retried}");
        assert!(budgets.take(&tenant("other"), now), "each tenant has its own");
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_budget_fills_again_with_time() {
        let (mut budgets, acme, now) = (RetryBudgets::new(0), tenant("acme"), Instant::now());
        while budgets.take(&acme, now) {}
        budgets.job(&acme, now);
        assert!(!budgets.take(&acme, now));
        assert!(budgets.take(&acme, now + WAIT));
        assert!(!budgets.take(&acme, now + WAIT));
        let later = now + Duration::from_hours(1);
        let allowed = (0..1_000).filter(|_| budgets.take(&acme, later)).count();
        assert_eq!(allowed, BURST as usize, "no more than at first");
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_with_a_whole_budget_are_forgotten() {
        let (mut budgets, now) = (RetryBudgets::new(10), Instant::now());
        for number in 0..3 * TENANTS_MAX {
            assert!(budgets.take(&tenant(&format!("t{number}")), now));
        }
        assert!(budgets.tenants.len() <= TENANTS_MAX);
        assert!(budgets.take(&tenant("one-more"), now + WAIT));
        assert_eq!(budgets.tenants.len(), 1);
    }
}
