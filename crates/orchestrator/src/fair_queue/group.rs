//! The waiting jobs that the same workers may run.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use protocol::policy::ServiceClass;

use super::drain::Drain;
use super::{BATCH_ONE_IN, FlowKey, Jobs, Ticket, Waiting, span};

/// After so many releases, flows are forgotten that are neither waiting nor ahead of the others.
const SWEEP_EVERY: u32 = 256;

#[derive(Default)]
pub(super) struct Group {
    flows: HashMap<FlowKey, Flow>,
    /// The flows with waiting jobs, by the counter that each would have after its next one.
    urgent: BTreeSet<(u64, Ticket, FlowKey)>,
    batch: BTreeSet<(u64, Ticket, FlowKey)>,
    /// Virtual time: the counter of the flow that was served last, which never falls.
    time: u64,
    /// The group's own counter, between groups.
    counter: u64,
    /// Sum of the weights of the flows with waiting jobs.
    weight: u64,
    /// Tokens of the guaranteed share that waiting batch jobs have not had yet, times [`BATCH_ONE_IN`].
    batch_credit: u64,
    drain: Drain,
    /// Released jobs that have not ended.
    running: usize,
    releases: u32,
}

#[derive(Default)]
struct Flow {
    /// Tokens that it was given, divided by its weight.
    counter: u64,
    weight: u64,
    /// The waiting jobs and their costs.
    waiting: BTreeMap<Ticket, u64>,
    waiting_cost: u64,
    /// Released jobs that have not ended.
    running: u32,
}

impl Flow {
    fn next(&self) -> Option<(Ticket, u64)> {
        self.waiting.first_key_value().map(|(ticket, cost)| (*ticket, *cost))
    }

    /// Returns its position among the flows, if it has a waiting job.
    fn rank(&self, key: &FlowKey) -> Option<(u64, Ticket, FlowKey)> {
        let (ticket, cost) = self.next()?;
        Some((self.counter.saturating_add(span(cost, self.weight)), ticket, key.clone()))
    }

    /// Returns the tokens that it is given until virtual time `end`, of those that wait.
    fn until(&self, end: u64) -> u64 {
        let time = u128::from(end.saturating_sub(self.counter)) * u128::from(self.weight) / u128::from(super::SCALE);
        u64::try_from(time).unwrap_or(u64::MAX).min(self.waiting_cost)
    }
}

impl Group {
    pub(super) fn is_waiting(&self) -> bool {
        self.weight > 0
    }

    /// Returns whether one of these jobs waits.
    pub(super) fn has(&self, jobs: Jobs) -> bool {
        self.first(jobs).is_some()
    }

    /// Returns whether nothing waits and nothing runs.
    pub(super) fn is_idle(&self) -> bool {
        !self.is_waiting() && self.running == 0
    }

    /// Returns the group's own counter.
    pub(super) fn counter(&self) -> u64 {
        self.counter
    }

    pub(super) fn enter(&mut self, ticket: Ticket, key: &FlowKey, weight: u64, cost: u64, now: Duration) {
        if !self.is_waiting() {
            self.drain.begin(now);
        }
        let time = self.time;
        self.change(key, |flow| {
            if flow.waiting.is_empty() {
                flow.counter = flow.counter.max(time);
                flow.weight = weight;
            }
            flow.waiting.insert(ticket, cost);
            flow.waiting_cost += cost;
        });
    }

    pub(super) fn leave(&mut self, ticket: Ticket, key: &FlowKey) {
        self.change(key, |flow| {
            flow.waiting_cost -= flow.waiting.remove(&ticket).unwrap_or_default();
        });
        self.forget(key);
    }

    /// Returns the group's position among those that have room. A group that had none meanwhile does not catch up.
    pub(super) fn rank(&mut self, time: u64, jobs: Jobs) -> (u64, Ticket) {
        self.counter = self.counter.max(time);
        let Some((_, ticket, key)) = self.first(jobs) else { return (u64::MAX, Ticket(u64::MAX)) };
        let cost = self.flows.get(key).and_then(Flow::next).map_or(0, |(_, cost)| cost);
        (self.counter.saturating_add(span(cost, self.weight)), *ticket)
    }

    /// Releases the next of these jobs.
    pub(super) fn release(&mut self, now: Duration, jobs: Jobs) -> Option<Ticket> {
        let (_, ticket, key) = self.first(jobs)?.clone();
        let weight = self.weight;
        let mut served = (0, 0);
        self.change(&key, |flow| {
            let cost = flow.waiting.remove(&ticket).unwrap_or_default();
            served = (flow.counter, cost);
            flow.waiting_cost -= cost;
            flow.counter = flow.counter.saturating_add(span(cost, flow.weight));
            flow.running += 1;
        });
        let (counter, cost) = served;
        self.time = self.time.max(counter);
        self.counter = self.counter.saturating_add(span(cost, weight));
        self.credit_batch(key.class, cost);
        self.drain.released(cost, now);
        self.running += 1;
        self.releases = self.releases.wrapping_add(1);
        if self.releases.is_multiple_of(SWEEP_EVERY) {
            self.sweep();
        }
        Some(ticket)
    }

    /// Ends a released job that was charged for `charged` tokens and took `tokens`. Returns the weight of its flow.
    pub(super) fn end(&mut self, key: &FlowKey, charged: u64, tokens: u64) -> u64 {
        self.correct(key, charged, tokens);
        self.running = self.running.saturating_sub(1);
        let Some(flow) = self.flows.get_mut(key) else { return super::factor(key.class) };
        flow.running = flow.running.saturating_sub(1);
        let weight = flow.weight;
        self.forget(key);
        weight
    }

    /// Corrects what a flow is charged for a job.
    pub(super) fn correct(&mut self, key: &FlowKey, charged: u64, tokens: u64) {
        self.change(key, |flow| {
            let counter = flow.counter.saturating_sub(span(charged, flow.weight));
            flow.counter = counter.saturating_add(span(tokens, flow.weight));
        });
    }

    pub(super) fn time_for(&self, tokens: u64) -> Option<Duration> {
        self.drain.time_for(tokens)
    }

    /// Returns the tokens that are given to jobs before one that arrives now.
    pub(super) fn ahead_of_arrival(&self, key: &FlowKey, weight: u64, cost: u64) -> u64 {
        let flow = self.flows.get(key);
        let counter = flow.map_or(self.time, |flow| flow.counter.max(self.time));
        let own = flow.map_or(0, |flow| flow.waiting_cost);
        own + self.ahead(key, counter.saturating_add(span(own + cost, weight)))
    }

    /// Returns the waiting jobs, the next first.
    pub(super) fn list(&self) -> Vec<Waiting> {
        let least = self.first(Jobs::All).and_then(|(_, _, key)| self.flows.get(key)).map_or(0, |flow| flow.counter);
        let mut rows: Vec<(u64, Ticket, u64, bool)> = vec![];
        for flow in self.flows.values() {
            let mut own = 0;
            for (ticket, cost) in &flow.waiting {
                own += cost;
                let end = flow.counter.saturating_add(span(own, flow.weight));
                rows.push((end, *ticket, *cost, flow.counter > least));
            }
        }
        rows.sort_unstable();
        let mut tokens_ahead = 0u64;
        let row = |(_, ticket, cost, is_over_share): (u64, Ticket, u64, bool)| {
            let waiting = Waiting { ticket, tokens_ahead, is_over_share };
            tokens_ahead = tokens_ahead.saturating_add(cost);
            waiting
        };
        rows.into_iter().map(row).collect()
    }

    /// Returns the tokens that other flows are given until virtual time `end`.
    fn ahead(&self, key: &FlowKey, end: u64) -> u64 {
        let others = self.flows.iter().filter(|(other, _)| *other != key);
        others.map(|(_, flow)| flow.until(end)).fold(0, u64::saturating_add)
    }

    /// Returns the flow whose job is next.
    fn first(&self, jobs: Jobs) -> Option<&(u64, Ticket, FlowKey)> {
        let (urgent, batch) = (self.urgent.first(), self.batch.first().filter(|_| jobs == Jobs::All));
        let (Some(soonest), Some(waiting)) = (urgent, batch) else { return urgent.or(batch) };
        let cost = self.flows.get(&waiting.2).and_then(Flow::next).map_or(0, |(_, cost)| cost);
        let is_due = self.batch_credit >= cost.saturating_mul(BATCH_ONE_IN);
        Some(if is_due || waiting < soonest { waiting } else { soonest })
    }

    /// Counts what batch jobs are owed, or were given.
    fn credit_batch(&mut self, class: ServiceClass, cost: u64) {
        self.batch_credit = if self.batch.is_empty() {
            0
        } else if class == ServiceClass::Batch {
            self.batch_credit.saturating_sub(cost.saturating_mul(BATCH_ONE_IN))
        } else {
            self.batch_credit.saturating_add(cost)
        };
    }

    /// Changes a flow, and moves it to its new position.
    fn change(&mut self, key: &FlowKey, act: impl FnOnce(&mut Flow)) {
        let flow = self.flows.entry(key.clone()).or_default();
        let order = if key.class == ServiceClass::Batch { &mut self.batch } else { &mut self.urgent };
        if let Some(rank) = flow.rank(key) {
            order.remove(&rank);
            self.weight -= flow.weight;
        }
        act(flow);
        if let Some(rank) = flow.rank(key) {
            order.insert(rank);
            self.weight += flow.weight;
        }
    }

    /// Forgets a flow that a new one would equal.
    fn forget(&mut self, key: &FlowKey) {
        if self.flows.get(key).is_some_and(|flow| flow.is_forgettable(self.time)) {
            self.flows.remove(key);
        }
    }

    fn sweep(&mut self) {
        let time = self.time;
        self.flows.retain(|_, flow| !flow.is_forgettable(time));
    }
}

impl Flow {
    fn is_forgettable(&self, time: u64) -> bool {
        self.waiting.is_empty() && self.running == 0 && self.counter <= time
    }
}
