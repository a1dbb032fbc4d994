use std::collections::{BTreeMap, HashMap, VecDeque};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const MANY: Limits = Limits { jobs_max: 100_000, tenant_jobs_max: 100_000 };
const CLASSES: [ServiceClass; 3] = ServiceClass::ALL;

fn arrival(group: u8, tenant: usize, class: ServiceClass, weight: u32, cost: u64) -> Arrival<u8> {
    let tenant_id = format!("tenant-{tenant}").parse().expect("a tenant");
    Arrival { group, flow: FlowKey { tenant_id, class }, weight, cost }
}

fn standard(tenant: usize, cost: u64) -> Arrival<u8> {
    arrival(0, tenant, ServiceClass::Standard, 1, cost)
}

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// A stand-in for workers: each slot makes tokens at the same speed, on a virtual clock.
struct Bench {
    queue: FairQueue<u8>,
    now: f64,
    slots: usize,
    speed: f64,
    /// When each running job ends, its ticket, and its tokens.
    running: Vec<(f64, Ticket, u64)>,
    owner: HashMap<Ticket, (usize, u64)>,
    /// From when to when each tenant's jobs ran.
    served: Vec<(usize, f64, f64)>,
}

impl Bench {
    fn new(slots: usize, speed: f64) -> Self {
        let queue = FairQueue::new(MANY);
        Self { queue, now: 0.0, slots, speed, running: vec![], owner: HashMap::new(), served: vec![] }
    }

    /// Submits a job that turns out to have `tokens`.
    fn submit(&mut self, arrival: Arrival<u8>, tenant: usize, tokens: u64) {
        let accepted = self.queue.enter(arrival, seconds(self.now)).expect("few wait");
        self.owner.insert(accepted.ticket, (tenant, tokens));
    }

    fn fill(&mut self) {
        while self.running.len() < self.slots {
            let Some(ticket) = self.queue.release(seconds(self.now), |_| true) else { return };
            let (tenant, tokens) = self.owner[&ticket];
            let end = self.now + tokens as f64 / self.speed;
            self.served.push((tenant, self.now, end));
            self.running.push((end, ticket, tokens));
        }
    }

    /// Goes on to the end of the next job. Returns its tenant.
    fn step(&mut self) -> usize {
        self.fill();
        let next = (0..self.running.len()).min_by(|one, other| self.running[*one].0.total_cmp(&self.running[*other].0));
        let (end, ticket, tokens) = self.running.swap_remove(next.expect("jobs run"));
        self.now = end;
        self.queue.end(ticket, tokens);
        self.owner.remove(&ticket).expect("known").0
    }

    fn steps(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
        }
    }

    fn tokens_between(&self, tenant: usize, from: f64, to: f64) -> f64 {
        let of_tenant = self.served.iter().filter(|(owner, ..)| *owner == tenant);
        of_tenant.map(|(_, began, ended)| (ended.min(to) - began.max(from)).max(0.0) * self.speed).sum()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn shares_are_right_within_a_twentieth_over_any_ten_seconds(
        weights in vec(1u32..4, 2..5),
        lengths in vec(20u64..200, 64),
        estimate in 20u64..200,
    ) {
        let mut bench = Bench::new(16, 400.0);
        let mut lengths = lengths.into_iter().cycle();
        let mut submit = |bench: &mut Bench, tenant: usize| {
            let tokens = lengths.next().expect("a cycle");
            bench.submit(arrival(0, tenant, ServiceClass::Standard, weights[tenant], estimate), tenant, tokens);
        };
        // Every tenant always has jobs that wait.
        (0..weights.len()).for_each(|tenant| (0..40).for_each(|_| submit(&mut bench, tenant)));
        while bench.now < 32.0 {
            let tenant = bench.step();
            submit(&mut bench, tenant);
        }
        let sum: u32 = weights.iter().sum();
        for from in 1..20 {
            let from = f64::from(from);
            let served: Vec<f64> = (0..weights.len()).map(|t| bench.tokens_between(t, from, from + 10.0)).collect();
            for (tokens, weight) in served.iter().zip(&weights) {
                let (share, due) = (tokens / served.iter().sum::<f64>(), f64::from(*weight) / f64::from(sum));
                prop_assert!((share - due).abs() <= 0.05, "{share} of {due} from {from}, weights {weights:?}");
            }
        }
    }

    /// The bound: until a job starts, each other flow gets at most its weight times the virtual time that the job and
    /// those ahead of it in its flow take, and one job more; batch jobs get a twentieth of all besides.
    #[test]
    fn no_job_starves(arrivals in vec((0usize..6, 0usize..3, 1u64..500, 0u8..3), 1..300)) {
        const COST_MAX: u64 = 500;
        let mut queue = FairQueue::new(MANY);
        let mut due: BTreeMap<Ticket, u64> = BTreeMap::new();
        let (mut own_waiting, mut job_of) = (HashMap::new(), HashMap::new());
        let mut released = 0;
        let all_weights: u64 = 6 * CLASSES.iter().map(|class| factor(*class)).sum::<u64>();
        for (tenant, class, cost, releases) in arrivals {
            let class = CLASSES[class];
            let ticket = queue.enter(arrival(0, tenant, class, 1, cost), Duration::ZERO).expect("few wait").ticket;
            let own: &mut u64 = own_waiting.entry((tenant, class)).or_default();
            *own += cost;
            // Its flow may be ahead by one job when it comes.
            let time = (*own + COST_MAX).div_ceil(factor(class));
            due.insert(ticket, released + (time * all_weights + 18 * COST_MAX) * 20 / 19 + COST_MAX);
            job_of.insert(ticket, (tenant, class, cost));
            for _ in 0..releases {
                let Some(ticket) = queue.release(Duration::ZERO, |_| true) else { break };
                let (tenant, class, cost) = job_of[&ticket];
                *own_waiting.get_mut(&(tenant, class)).expect("known") -= cost;
                prop_assert!(released <= due[&ticket], "{released} tokens of others, {} at most", due[&ticket]);
                released += cost;
                queue.end(ticket, cost);
            }
        }
    }

    #[test]
    fn a_slot_is_free_only_if_no_job_that_may_use_it_waits(steps in vec((0u8..3, 0usize..4, 0usize..3, 0u8..8), 1..200)) {
        let mut queue = FairQueue::new(MANY);
        let mut waiting: HashMap<u8, usize> = HashMap::new();
        let mut group_of = HashMap::new();
        for (group, tenant, class, room) in steps {
            let ticket = queue.enter(arrival(group, tenant, CLASSES[class], 1, 10), Duration::ZERO).expect("few").ticket;
            group_of.insert(ticket, group);
            *waiting.entry(group).or_default() += 1;
            let has_room = |group: &u8| room >> group & 1 == 1;
            let is_due = waiting.iter().any(|(group, jobs)| has_room(group) && *jobs > 0);
            let released = queue.release(Duration::ZERO, has_room);
            prop_assert_eq!(released.is_some(), is_due);
            if let Some(ticket) = released {
                prop_assert!(has_room(&group_of[&ticket]));
                *waiting.get_mut(&group_of[&ticket]).expect("known") -= 1;
            }
        }
    }

    #[test]
    fn a_job_that_leaves_leaves_no_trace(
        steps in vec((0u8..2, 0usize..4, 0usize..3, 1u64..300, 0u8..2), 1..120),
        at in 0usize..120,
        stays in 0usize..20,
        extra in (0u8..2, 0usize..5, 0usize..3, 1u64..300),
    ) {
        let run = |extra: Option<(u8, usize, usize, u64)>| {
            let mut queue = FairQueue::new(MANY);
            let (mut costs, mut order, mut guest) = (HashMap::new(), vec![], None);
            for (number, (group, tenant, class, cost, releases)) in steps.iter().copied().enumerate() {
                if number == at && let Some((group, tenant, class, cost)) = extra {
                    let arrival = arrival(group, tenant, CLASSES[class], 1, cost);
                    guest = Some(queue.enter(arrival, Duration::ZERO).expect("few wait").ticket);
                }
                let is_over = number == at + stays;
                if is_over && let Some(guest) = guest.take() {
                    queue.leave(guest);
                }
                let arrival = arrival(group, tenant, CLASSES[class], 1, cost);
                let ticket = queue.enter(arrival, Duration::ZERO).expect("few wait").ticket;
                costs.insert(ticket, (number, cost));
                // Nothing is released while the guest waits, so that it cannot be released itself.
                for _ in 0..if guest.is_some() || number >= at && number <= at + stays { 0 } else { releases } {
                    let Some(ticket) = queue.release(Duration::ZERO, |_| true) else { break };
                    let (number, cost) = costs[&ticket];
                    order.push(number);
                    queue.end(ticket, cost / 2);
                }
            }
            if let Some(guest) = guest {
                queue.leave(guest);
            }
            while let Some(ticket) = queue.release(Duration::ZERO, |_| true) {
                order.push(costs[&ticket].0);
                queue.end(ticket, costs[&ticket].1);
            }
            (order, queue.is_clean())
        };
        let (without, is_clean) = run(None);
        prop_assert!(is_clean);
        prop_assert_eq!(run(Some(extra)), (without, true));
    }

    #[test]
    fn the_queue_is_bounded_and_whoever_is_within_its_share_is_not_refused(
        weights in vec(1u32..4, 2..6),
        arrivals in vec((0usize..6, 0usize..3), 1..200),
    ) {
        let limits = Limits { jobs_max: 24, tenant_jobs_max: 16 };
        let mut queue = FairQueue::new(limits);
        let mut waiting = vec![0u32; weights.len()];
        let mut owner = HashMap::new();
        let all: u32 = weights.iter().sum();
        for (tenant, class) in arrivals {
            let tenant = tenant % weights.len();
            let share = |tenant: usize| 24 * weights[tenant] / all;
            let is_within = |waiting: u32, tenant: usize| waiting < share(tenant).min(16);
            let was_within = is_within(waiting[tenant], tenant);
            match queue.enter(arrival(0, tenant, CLASSES[class], weights[tenant], 10), Duration::ZERO) {
                Ok(Accepted { ticket, shed }) => {
                    owner.insert(ticket, (tenant, CLASSES[class]));
                    waiting[tenant] += 1;
                    if let Some(shed) = shed {
                        let (loser, lost) = owner[&shed];
                        prop_assert!(loser == tenant && lost > CLASSES[class] || waiting[loser] > share(loser));
                        waiting[loser] -= 1;
                    }
                }
                Err(_) => prop_assert!(!was_within, "{waiting:?} {weights:?}"),
            }
            prop_assert!(queue.len() <= 24 && waiting.iter().all(|jobs| *jobs <= 16));
        }
    }

    #[test]
    fn jobs_of_a_tenant_and_class_keep_their_order(steps in vec((0usize..3, 0usize..3, 1u64..300, 0u8..3), 1..150)) {
        let mut queue = FairQueue::new(MANY);
        let mut flows: HashMap<(usize, usize), VecDeque<Ticket>> = HashMap::new();
        let mut flow_of = HashMap::new();
        for (number, (tenant, class, cost, releases)) in steps.into_iter().enumerate() {
            let accepted = queue.enter(arrival(0, tenant, CLASSES[class], 1, cost), Duration::ZERO).expect("few");
            flows.entry((tenant, class)).or_default().push_back(accepted.ticket);
            flow_of.insert(accepted.ticket, (tenant, class));
            for _ in 0..releases {
                let Some(ticket) = queue.release(Duration::ZERO, |_| true) else { break };
                let flow = flows.get_mut(&flow_of[&ticket]).expect("known");
                prop_assert_eq!(flow.front(), Some(&ticket));
                // One that finds no worker after all keeps its place.
                if number.is_multiple_of(3) {
                    queue.give_back(ticket, Duration::ZERO);
                } else {
                    flow.pop_front();
                }
            }
        }
    }
}

#[test]
fn batch_jobs_get_a_twentieth_however_many_others_wait() {
    let mut bench = Bench::new(10, 100.0);
    let tenants = 200;
    for _ in 0..50 {
        (0..tenants).for_each(|t| bench.submit(arrival(0, t, ServiceClass::Interactive, 1, 100), t, 100));
        bench.submit(arrival(0, tenants, ServiceClass::Batch, 1, 100), tenants, 100);
    }
    bench.steps(800);
    let batch = bench.tokens_between(tenants, 0.0, bench.now) / (bench.now * 1_000.0);
    assert!((0.04..0.06).contains(&batch), "{batch}");
}

#[test]
fn urgent_classes_have_the_larger_share() {
    let mut bench = Bench::new(10, 100.0);
    for _ in 0..500 {
        for (tenant, class) in CLASSES.into_iter().enumerate() {
            bench.submit(arrival(0, tenant, class, 1, 50), tenant, 50);
        }
    }
    bench.steps(500);
    let share = |tenant| bench.tokens_between(tenant, 0.0, bench.now) / (bench.now * 1_000.0);
    let (interactive, standard, batch) = (share(0), share(1), share(2));
    assert!((1.8..2.2).contains(&(interactive / standard)), "{interactive} {standard}");
    assert!((0.03..0.07).contains(&batch), "{batch}");
}

#[test]
fn a_newcomer_starts_before_a_crowd_of_one_tenant() {
    let mut queue = FairQueue::new(MANY);
    for _ in 0..50 {
        queue.enter(standard(0, 100), Duration::ZERO).expect("few wait");
    }
    let first = queue.release(Duration::ZERO, |_| true).expect("one waits");
    let newcomer = queue.enter(standard(1, 100), Duration::ZERO).expect("few wait").ticket;
    assert_eq!(queue.release(Duration::ZERO, |_| true), Some(newcomer));
    assert!(first < newcomer);
}

#[test]
fn an_answer_longer_than_expected_is_charged_while_it_runs() {
    let mut queue = FairQueue::new(MANY);
    for tenant in [0, 1, 0, 1, 0, 1] {
        queue.enter(standard(tenant, 100), Duration::ZERO).expect("few wait");
    }
    let (long, short) = (queue.release(Duration::ZERO, |_| true), queue.release(Duration::ZERO, |_| true));
    queue.charge(long.expect("one waits"), 100_000);
    queue.charge(short.expect("one waits"), 90);
    let next: Vec<u64> =
        std::iter::from_fn(|| queue.release(Duration::ZERO, |_| true)).map(|ticket| ticket.0).collect();
    assert_eq!(next, [3, 5, 2, 4], "those of the tenant whose answer is long come last");
}

#[test]
fn a_group_that_had_no_room_does_not_catch_up() {
    let mut queue = FairQueue::new(MANY);
    for _ in 0..20 {
        queue.enter(arrival(0, 0, ServiceClass::Standard, 1, 100), Duration::ZERO).expect("few wait");
        queue.enter(arrival(1, 1, ServiceClass::Standard, 1, 100), Duration::ZERO).expect("few wait");
    }
    (0..10).for_each(|_| assert!(queue.release(Duration::ZERO, |group| *group == 0).is_some()));
    let groups = std::iter::from_fn(|| queue.release(Duration::ZERO, |_| true)).take(6).map(|ticket| ticket.0 % 2);
    assert!((3..=4).contains(&groups.sum::<u64>()), "it gets one job more at most");
}

#[test]
fn the_wait_is_known_once_jobs_were_released() {
    let mut bench = Bench::new(10, 100.0);
    assert_eq!(bench.queue.expected_wait(&standard(0, 100)), Some(Duration::ZERO));
    (0..200).for_each(|_| bench.submit(standard(0, 100), 0, 100));
    bench.fill();
    assert_eq!(bench.queue.expected_wait(&standard(0, 100)), None);
    bench.steps(50);
    // 1,000 tokens a second. The other tenant is due with its first job.
    let wait = |tenant| bench.queue.expected_wait(&standard(tenant, 100)).expect("known").as_secs_f64();
    let waiting = bench.queue.len() as f64 * 0.1;
    assert!((0.8 * waiting..1.2 * waiting).contains(&wait(0)), "{} of {waiting}", wait(0));
    assert!(wait(1) < 0.3, "{}", wait(1));
    let rows = bench.queue.list().pop().expect("one group").1;
    assert_eq!((rows.len(), rows[0].tokens_ahead, rows[1].tokens_ahead), (bench.queue.len(), 0, 100));
}

#[test]
fn no_job_waits_if_none_may() {
    let mut queue = FairQueue::new(Limits { jobs_max: 0, tenant_jobs_max: 16 });
    assert_eq!(queue.enter(standard(0, 1), Duration::ZERO), Err(TooMany::OfAll));
    assert!(queue.is_clean());
}

#[test]
fn a_stored_weight_is_no_larger_than_one_that_can_be_set() {
    for class in CLASSES {
        assert_eq!(flow_weight(u32::MAX, class), flow_weight(WEIGHT_MAX, class));
        assert!(span(1, flow_weight(u32::MAX, class)) < span(100, flow_weight(u32::MAX, class)));
    }
}
