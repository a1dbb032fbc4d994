//! Decides which waiting job runs next, and which one is shed when too many wait. Pure: it reads no clock.
//!
//! Jobs that the same workers may run form a *group*. Within a group, the jobs of one tenant and class form a *flow*,
//! in the order of their arrival. Each flow has a counter of the tokens it was given, divided by its weight; the next
//! job is the one whose flow would have the smallest counter after it (weighted fair queueing in virtual time). A flow
//! that returns is lifted to the virtual time of its group, so that nobody saves up a share while idle. Between groups
//! the same rule applies, because they may share workers.

mod bounds;
mod drain;
mod group;

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use protocol::TenantId;
use protocol::policy::{ServiceClass, WEIGHT_MAX};

use self::bounds::{Bounds, Entered};
use self::group::Group;

pub use self::bounds::{Limits, TooMany};

/// A job's share of capacity relative to that of a standard job of the same tenant, in eighths.
const fn factor(class: ServiceClass) -> u64 {
    match class {
        ServiceClass::Interactive => 16,
        ServiceClass::Standard => 8,
        ServiceClass::Batch => 1,
    }
}

/// One batch token is guaranteed for each so many of all tokens, however many other flows there are.
pub const BATCH_ONE_IN: u64 = 20;

/// Units of virtual time for one token at a weight of one eighth.
const SCALE: u64 = 1 << 12;

/// Number of a waiting job. Later arrivals have greater ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// The jobs of one tenant and class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    pub tenant_id: TenantId,
    pub class: ServiceClass,
}

/// A job that is to wait.
#[derive(Debug, Clone)]
pub struct Arrival<G> {
    /// The workers that may run it.
    pub group: G,
    pub flow: FlowKey,
    /// The share of its tenant, relative to others.
    pub weight: u32,
    /// Expected tokens of its prompt and answer.
    pub cost: u64,
}

/// A job that arrived, and the one that was shed for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    pub ticket: Ticket,
    pub shed: Option<Ticket>,
}

/// A waiting job, as [`FairQueue::list`] shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Waiting {
    pub ticket: Ticket,
    /// Tokens that are expected to be given to others before it starts.
    pub tokens_ahead: u64,
    /// Whether its flow has had more of its share than the flow that is next.
    pub is_over_share: bool,
}

/// Jobs that wait, and the shares that flows have had.
pub struct FairQueue<G> {
    groups: HashMap<G, Group>,
    jobs: HashMap<Ticket, Job<G>>,
    bounds: Bounds,
    next: u64,
    /// Virtual time between groups.
    time: u64,
}

/// A job that waits, or that was released and has not ended.
struct Job<G> {
    group: G,
    flow: FlowKey,
    /// Tokens that its flow is charged.
    cost: u64,
    is_waiting: bool,
}

/// Which jobs may be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Jobs {
    All,
    /// All but batch jobs.
    Urgent,
}

/// Returns the virtual time that tokens take at a weight.
fn span(tokens: u64, weight: u64) -> u64 {
    tokens.saturating_mul(SCALE) / weight.max(1)
}

/// Returns the weight of a flow. A stored policy may have a larger one of its tenant than can be set.
fn flow_weight(weight: u32, class: ServiceClass) -> u64 {
    u64::from(weight.clamp(1, WEIGHT_MAX)) * factor(class)
}

impl<G: Clone + Eq + Hash> FairQueue<G> {
    pub fn new(limits: Limits) -> Self {
        Self { groups: HashMap::new(), jobs: HashMap::new(), bounds: Bounds::new(limits), next: 0, time: 0 }
    }

    /// Returns how many jobs wait.
    pub fn len(&self) -> usize {
        self.bounds.len()
    }

    /// Returns whether no job waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether no job waits and no flow is remembered.
    pub fn is_clean(&self) -> bool {
        self.groups.is_empty() && self.jobs.is_empty() && self.bounds.is_clean()
    }

    /// Adds a job. If too many wait, the newest job of the tenant that is the farthest over its share is shed for it, a
    /// batch job first; if that is this one, it is refused.
    pub fn enter(&mut self, arrival: Arrival<G>, now: Duration) -> Result<Accepted, TooMany> {
        let ticket = Ticket(self.next);
        let Entered { shed } = self.bounds.enter(ticket, &arrival.flow, arrival.weight)?;
        self.next += 1;
        if let Some(shed) = shed {
            self.leave(shed);
        }
        let Arrival { group, flow, weight, cost } = arrival;
        let cost = cost.max(1);
        let weight = flow_weight(weight, flow.class);
        self.groups.entry(group.clone()).or_default().enter(ticket, &flow, weight, cost, now);
        self.jobs.insert(ticket, Job { group, flow, cost, is_waiting: true });
        Ok(Accepted { ticket, shed })
    }

    /// Removes a job that waits. Does nothing if it does not wait.
    pub fn leave(&mut self, ticket: Ticket) {
        let Some(job) = self.jobs.remove(&ticket) else { return };
        if !job.is_waiting {
            self.jobs.insert(ticket, job);
            return;
        }
        self.bounds.leave(ticket, &job.flow);
        self.in_group(&job.group, |group| group.leave(ticket, &job.flow));
    }

    /// Releases the next job of those whose group has room.
    pub fn release(&mut self, now: Duration, has_room: impl FnMut(&G) -> bool) -> Option<Ticket> {
        self.release_among(now, Jobs::All, has_room)
    }

    /// Releases the next job that is not a batch job, of those whose group has room for such a job.
    pub fn release_urgent(&mut self, now: Duration, has_room: impl FnMut(&G) -> bool) -> Option<Ticket> {
        self.release_among(now, Jobs::Urgent, has_room)
    }

    fn release_among(&mut self, now: Duration, jobs: Jobs, mut has_room: impl FnMut(&G) -> bool) -> Option<Ticket> {
        let time = self.time;
        let eligible = self.groups.iter_mut().filter(|(key, group)| group.has(jobs) && has_room(key));
        let (_, next) = eligible.map(|(key, group)| (group.rank(time, jobs), key)).min_by_key(|(rank, _)| *rank)?;
        let key = next.clone();
        let group = self.groups.get_mut(&key)?;
        self.time = self.time.max(group.counter());
        let ticket = group.release(now, jobs)?;
        let job = self.jobs.get_mut(&ticket)?;
        job.is_waiting = false;
        self.bounds.leave(ticket, &job.flow);
        Some(ticket)
    }

    /// Takes a released job back to its place, because it could not run. It cannot be refused.
    pub fn give_back(&mut self, ticket: Ticket, now: Duration) {
        let Some(job) = self.jobs.get_mut(&ticket).filter(|job| !job.is_waiting) else { return };
        job.is_waiting = true;
        let (key, flow, cost) = (job.group.clone(), job.flow.clone(), job.cost);
        let Some(group) = self.groups.get_mut(&key) else { return };
        let weight = group.end(&flow, cost, 0);
        self.bounds.force(ticket, &flow, weight);
        group.enter(ticket, &flow, weight, cost, now);
    }

    /// Charges a released job's flow for so many tokens in all, if they are more than it was charged.
    pub fn charge(&mut self, ticket: Ticket, tokens: u64) {
        let Some(job) = self.jobs.get_mut(&ticket).filter(|job| !job.is_waiting && tokens > job.cost) else { return };
        let (charged, flow) = (std::mem::replace(&mut job.cost, tokens), &job.flow);
        if let Some(group) = self.groups.get_mut(&job.group) {
            group.correct(flow, charged, tokens);
        }
    }

    /// Forgets a released job, and charges its flow for the tokens that it took.
    pub fn end(&mut self, ticket: Ticket, tokens: u64) {
        let Some(job) = self.jobs.remove(&ticket) else { return };
        if job.is_waiting {
            self.jobs.insert(ticket, job);
            return self.leave(ticket);
        }
        self.in_group(&job.group, |group| {
            group.end(&job.flow, job.cost, tokens);
        });
    }

    /// Returns the groups with waiting jobs.
    pub fn groups(&self) -> impl Iterator<Item = &G> {
        self.groups.iter().filter(|(_, group)| group.is_waiting()).map(|(key, _)| key)
    }

    /// Returns how long a job would wait that arrives now, or `None` if the speed of its group is not known yet.
    pub fn expected_wait(&self, arrival: &Arrival<G>) -> Option<Duration> {
        let Some(group) = self.groups.get(&arrival.group).filter(|group| group.is_waiting()) else {
            return Some(Duration::ZERO);
        };
        let weight = flow_weight(arrival.weight, arrival.flow.class);
        group.time_for(group.ahead_of_arrival(&arrival.flow, weight, arrival.cost.max(1)))
    }

    /// Returns how long a group takes for so many tokens, or `None` if its speed is not known yet.
    pub fn time_for(&self, group: &G, tokens: u64) -> Option<Duration> {
        self.groups.get(group)?.time_for(tokens)
    }

    /// Returns the waiting jobs of each group, the next first.
    pub fn list(&self) -> Vec<(&G, Vec<Waiting>)> {
        let waiting = self.groups.iter().filter(|(_, group)| group.is_waiting());
        waiting.map(|(key, group)| (key, group.list())).collect()
    }

    fn in_group(&mut self, key: &G, act: impl FnOnce(&mut Group)) {
        let Some(group) = self.groups.get_mut(key) else { return };
        act(group);
        if group.is_idle() {
            self.groups.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
