//! How many jobs may wait, and whose job is shed for another.

use std::collections::{BTreeSet, HashMap};

use protocol::TenantId;
use protocol::policy::{ServiceClass, WEIGHT_MAX};

use super::{FlowKey, SCALE, Ticket};

/// How many jobs may wait.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub jobs_max: usize,
    pub tenant_jobs_max: usize,
}

/// Why a job may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooMany {
    /// As many jobs of its tenant wait as may.
    OfTenant,
    /// As many jobs wait as may, and no tenant has more of them for its weight than this one.
    OfAll,
}

pub(super) struct Entered {
    pub(super) shed: Option<Ticket>,
}

pub(super) struct Bounds {
    limits: Limits,
    waiting: usize,
    tenants: HashMap<TenantId, Tenant>,
    /// The tenants by the jobs that wait of each, divided by its weight.
    by_load: BTreeSet<(u64, TenantId)>,
}

struct Tenant {
    weight: u32,
    /// Its waiting jobs; the last is the newest of the least urgent class.
    jobs: BTreeSet<(ServiceClass, Ticket)>,
}

fn load(jobs: usize, weight: u32) -> u64 {
    (jobs as u64).saturating_mul(SCALE) / u64::from(weight.clamp(1, WEIGHT_MAX))
}

impl Bounds {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, waiting: 0, tenants: HashMap::new(), by_load: BTreeSet::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    pub(super) fn is_clean(&self) -> bool {
        self.waiting == 0 && self.tenants.is_empty() && self.by_load.is_empty()
    }

    /// Adds a job. The one that is to be shed for it still counts until it leaves.
    pub(super) fn enter(&mut self, ticket: Ticket, flow: &FlowKey, weight: u32) -> Result<Entered, TooMany> {
        let shed = self.to_shed(flow, weight)?;
        self.put(ticket, flow, weight);
        Ok(Entered { shed })
    }

    /// Adds a job that was taken in before, however many wait.
    pub(super) fn force(&mut self, ticket: Ticket, flow: &FlowKey, flow_weight: u64) {
        let weight = flow_weight / super::factor(flow.class);
        self.put(ticket, flow, u32::try_from(weight).unwrap_or(u32::MAX));
    }

    pub(super) fn leave(&mut self, ticket: Ticket, flow: &FlowKey) {
        let Some(tenant) = self.tenants.get_mut(&flow.tenant_id) else { return };
        let before = load(tenant.jobs.len(), tenant.weight);
        if !tenant.jobs.remove(&(flow.class, ticket)) {
            return;
        }
        self.waiting -= 1;
        self.by_load.remove(&(before, flow.tenant_id.clone()));
        if tenant.jobs.is_empty() {
            self.tenants.remove(&flow.tenant_id);
        } else {
            self.by_load.insert((load(tenant.jobs.len(), tenant.weight), flow.tenant_id.clone()));
        }
    }

    /// Returns the job that must leave for a new one, if any.
    fn to_shed(&self, flow: &FlowKey, weight: u32) -> Result<Option<Ticket>, TooMany> {
        let own = self.tenants.get(&flow.tenant_id);
        let own_jobs = own.map_or(0, |tenant| tenant.jobs.len());
        let less_urgent = || own.and_then(Tenant::last).filter(|(class, _)| *class > flow.class);
        if own_jobs >= self.limits.tenant_jobs_max {
            return less_urgent().map(|(_, ticket)| Some(ticket)).ok_or(TooMany::OfTenant);
        }
        if self.waiting < self.limits.jobs_max {
            return Ok(None);
        }
        let mine = load(own_jobs + 1, weight);
        let heaviest = self.by_load.last().filter(|(load, tenant)| *load > mine && *tenant != flow.tenant_id);
        let last = match heaviest {
            Some((_, tenant)) => self.tenants.get(tenant).and_then(Tenant::last),
            None => less_urgent(),
        };
        last.map(|(_, ticket)| Some(ticket)).ok_or(TooMany::OfAll)
    }

    fn put(&mut self, ticket: Ticket, flow: &FlowKey, weight: u32) {
        let id = &flow.tenant_id;
        let tenant = self.tenants.entry(id.clone()).or_insert_with(|| Tenant { weight, jobs: BTreeSet::new() });
        if !tenant.jobs.is_empty() {
            self.by_load.remove(&(load(tenant.jobs.len(), tenant.weight), id.clone()));
        }
        tenant.weight = weight;
        tenant.jobs.insert((flow.class, ticket));
        self.waiting += 1;
        self.by_load.insert((load(tenant.jobs.len(), weight), id.clone()));
    }
}

impl Tenant {
    fn last(&self) -> Option<(ServiceClass, Ticket)> {
        self.jobs.last().copied()
    }
}
