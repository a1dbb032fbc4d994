//! Decides which models are in memory: those that are asked for, as far as they fit.
//!
//! A pure function of facts about the models and the available memory, the machine's and its GPUs'. It reads no clock
//! and moves nothing; `ModelLoader` does both.
//!
//! Idle models are unloaded for wanted ones, the least recently used first. If only busy models could free enough
//! memory, the jobs of one model are served together. After a turn the model takes no more jobs, finishes those that
//! run, and the models are swapped. A model whose last job has only just ended counts as busy, because a client that
//! sends one request after another is about to send the next. So A A B B is served rather than A B A B, and no model
//! starves.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

/// How long a busy model stays in memory while others wait for it. They wait at least as long.
pub(crate) const TURN: Duration = Duration::from_secs(3);

/// How long a model stays in memory after its last job, within its turn, while another model is waited for. It covers
/// the pause of a client between two requests, and is shorter than most loads.
pub(crate) const LINGER: Duration = Duration::from_millis(250);

/// Whether a model is in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residency {
    /// Not in memory, and not being loaded.
    Unloaded,
    /// Waits for memory to be loaded.
    WaitingForMemory,
    /// Being loaded or unloaded.
    Changing,
    Loaded(Instant),
}

/// Memory of the machine and of its GPUs, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) host: u64,
    /// Unlimited if no model uses a GPU.
    pub(crate) gpu: u64,
}

impl Memory {
    pub(crate) fn holds(self, other: Self) -> bool {
        other.host <= self.host && other.gpu <= self.gpu
    }

    fn with(self, other: Self) -> Self {
        Self { host: self.host.saturating_add(other.host), gpu: self.gpu.saturating_add(other.gpu) }
    }

    fn at_most(self, other: Self) -> Self {
        Self { host: self.host.min(other.host), gpu: self.gpu.min(other.gpu) }
    }
}

/// What decides about the memory of one model.
#[derive(Debug, Clone)]
pub(crate) struct ResidencyFacts {
    pub(crate) residency: Residency,
    /// The memory it takes, in bytes, or would take with the context that most requests need.
    pub(crate) bytes: u64,
    /// The least memory it can take, with the shortest context, in bytes.
    pub(crate) bytes_min: u64,
    /// The GPU memory that it takes, in bytes, or would take with every layer that may be on a GPU.
    pub(crate) vram_bytes: u64,
    /// The GPU memory without which it is not loaded: all that its settings ask for, or nothing if they ask for what
    /// fits.
    pub(crate) vram_bytes_min: u64,
    /// It is never unloaded to free memory, nor because it is idle.
    pub(crate) is_pinned: bool,
    /// How long it stays loaded without work; `None` for ever.
    pub(crate) keep_alive: Option<Duration>,
    /// Jobs that run on it.
    pub(crate) jobs: u32,
    /// Since when jobs wait for it.
    pub(crate) waiting_since: Option<Instant>,
    /// When the last job, or the load, ended.
    pub(crate) last_used: Instant,
    /// It takes no more jobs.
    pub(crate) is_closed: bool,
}

/// What is to be done with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Load it, into at most this much memory.
    Load(Memory),
    /// It stays out until a job asks for it: it does not fit beside the others, and no job waits for it.
    StayOut,
    /// It cannot be loaded, whatever is unloaded: this is the most memory it could have.
    Refuse(Memory),
    /// Take no more jobs.
    Close,
    Open,
    /// Unload it: no job runs on it, and it takes none.
    Leave,
}

/// The orders, and when to decide again if nothing changes before.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) orders: Vec<(usize, Order)>,
    pub(crate) look_again: Option<Instant>,
}

impl ResidencyFacts {
    /// Returns the memory it takes, or would take.
    fn memory(&self) -> Memory {
        Memory { host: self.bytes, gpu: self.vram_bytes }
    }

    pub(crate) fn memory_min(&self) -> Memory {
        Memory { host: self.bytes_min, gpu: self.vram_bytes_min }
    }

    fn is_in(&self) -> bool {
        matches!(self.residency, Residency::Loaded(_))
    }

    fn can_leave(&self) -> bool {
        self.jobs == 0 && (self.is_closed || self.waiting_since.is_none())
    }

    /// Returns when it is unloaded because it is idle.
    fn idle_until(&self) -> Option<Instant> {
        let is_idle = self.is_in() && !self.is_pinned && self.jobs == 0 && self.waiting_since.is_none();
        self.keep_alive.filter(|_| is_idle).and_then(|keep_alive| self.last_used.checked_add(keep_alive))
    }

    /// Returns until when its last client may send the next request, within its turn.
    fn lingers_until(&self, waiting_since: Instant) -> Instant {
        if self.is_closed { self.last_used } else { (self.last_used + LINGER).min(self.turn_ends(waiting_since)) }
    }

    /// Returns when its turn ends for the sake of a model that has been waited for since `waiting_since`.
    fn turn_ends(&self, waiting_since: Instant) -> Instant {
        let begun =
            if let Residency::Loaded(since) = self.residency { since.max(waiting_since) } else { waiting_since };
        begun + TURN
    }
}

/// Returns the orders for all models. `room` is the memory that is available now.
pub(crate) fn decide(models: &[ResidencyFacts], room: Memory, now: Instant) -> Decision {
    let mut decision = Decision::default();
    let mut leaving = BTreeSet::new();
    for (index, model) in models.iter().enumerate() {
        match model.idle_until() {
            Some(until) if until <= now => drop(leaving.insert(index)),
            until => decision.look_again_at(until),
        }
    }
    let mut closing = BTreeSet::new();
    // A model that is being moved would falsify the measured memory.
    if !models.iter().any(|model| model.residency == Residency::Changing)
        && leaving.is_empty()
        && let Some(asking) = first_asking(models)
    {
        make_room(models, asking, room, now, &mut leaving, &mut closing, &mut decision);
    }
    for (index, model) in models.iter().enumerate().filter(|(_, model)| model.is_in()) {
        if leaving.contains(&index) {
            decision.orders.push((index, Order::Leave));
        } else if closing.contains(&index) != model.is_closed {
            decision.orders.push((index, if model.is_closed { Order::Open } else { Order::Close }));
        }
    }
    decision
}

/// Returns the memory that a model could have if all others that may be unloaded were unloaded.
pub(crate) fn most(models: &[ResidencyFacts], room: Memory) -> Memory {
    let others = models.iter().filter(|model| model.is_in() && !model.is_pinned);
    others.fold(room, |sum, model| sum.with(model.memory()))
}

/// Returns the next model to load: the one that jobs have waited for longest, then a pinned one, then the first.
fn first_asking(models: &[ResidencyFacts]) -> Option<usize> {
    let asking = models.iter().enumerate().filter(|(_, model)| model.residency == Residency::WaitingForMemory);
    let next = asking
        .min_by_key(|(index, model)| (model.waiting_since.is_none(), model.waiting_since, !model.is_pinned, *index));
    next.map(|(index, _)| index)
}

fn make_room(
    models: &[ResidencyFacts],
    asking: usize,
    room: Memory,
    now: Instant,
    leaving: &mut BTreeSet<usize>,
    closing: &mut BTreeSet<usize>,
    decision: &mut Decision,
) {
    let wanted = &models[asking];
    let mut others: Vec<usize> =
        (0..models.len()).filter(|index| models[*index].is_in() && !models[*index].is_pinned).collect();
    let most = most(models, room);
    let order = if room.holds(wanted.memory()) {
        Some(Order::Load(room))
    } else if !most.holds(wanted.memory_min()) {
        Some(Order::Refuse(most))
    } else if wanted.waiting_since.is_none() && !wanted.is_pinned && models.iter().any(ResidencyFacts::is_in) {
        Some(Order::StayOut)
    } else {
        None
    };
    if let Some(order) = order {
        decision.orders.push((asking, order));
        return;
    }
    // Models that can be unloaded go first, least recently used first; busy ones follow, the longest in memory first.
    others.sort_by_key(|index| {
        let model = &models[*index];
        let since = if let Residency::Loaded(since) = model.residency { since } else { now };
        if model.can_leave() { (false, model.last_used) } else { (true, since) }
    });
    let needed = wanted.memory().at_most(most);
    let mut sum = room;
    for index in others {
        let model = &models[index];
        // Skip a model that would only free the kind of memory that is not short.
        if sum.holds(needed) || (needed.host <= sum.host && model.vram_bytes == 0) {
            continue;
        }
        sum = sum.with(model.memory());
        if model.can_leave() {
            match wanted.waiting_since.map(|since| model.lingers_until(since)) {
                Some(until) if until > now => decision.look_again_at(Some(until)),
                _ => drop(leaving.insert(index)),
            }
            continue;
        }
        match wanted.waiting_since.map(|since| model.turn_ends(since)) {
            Some(ends) if ends <= now => drop(closing.insert(index)),
            ends => decision.look_again_at(ends),
        }
    }
    if sum == room {
        // It takes what is available, with a shorter context.
        decision.orders.push((asking, Order::Load(room)));
    }
}

impl Decision {
    fn look_again_at(&mut self, at: Option<Instant>) {
        self.look_again = self.look_again.into_iter().chain(at).min();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Memory of a machine without a GPU.
    fn host(bytes: u64) -> Memory {
        Memory { host: bytes, gpu: u64::MAX }
    }

    struct Scene {
        begin: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Self { begin: Instant::now() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.begin + SECOND * u32::try_from(seconds).expect("few")
        }

        fn model(&self, residency: Residency, bytes: u64) -> ResidencyFacts {
            ResidencyFacts {
                residency,
                bytes,
                bytes_min: bytes / 2,
                vram_bytes: 0,
                vram_bytes_min: 0,
                is_pinned: false,
                keep_alive: Some(SECOND * 300),
                jobs: 0,
                waiting_since: None,
                last_used: self.begin,
                is_closed: false,
            }
        }

        fn resident(&self, bytes: u64, last_used: u64) -> ResidencyFacts {
            ResidencyFacts { last_used: self.at(last_used), ..self.model(Residency::Loaded(self.begin), bytes) }
        }

        fn wanted(&self, bytes: u64, since: u64) -> ResidencyFacts {
            ResidencyFacts { waiting_since: Some(self.at(since)), ..self.model(Residency::WaitingForMemory, bytes) }
        }
    }

    #[test]
    fn what_fits_is_loaded_beside_the_others() {
        let scene = Scene::new();
        let models = [scene.resident(60, 0), scene.wanted(40, 5)];
        assert_eq!(decide(&models, host(40), scene.at(5)).orders, [(1, Order::Load(host(40)))]);
    }

    #[test]
    fn the_least_recently_used_make_room_and_no_more_than_needed() {
        let scene = Scene::new();
        let models = [scene.resident(30, 9), scene.resident(30, 3), scene.resident(30, 6), scene.wanted(50, 10)];
        assert_eq!(decide(&models, host(10), scene.at(10)).orders, [(1, Order::Leave), (2, Order::Leave)]);
        // Both are still being moved.
        let moving = [scene.resident(30, 9), scene.model(Residency::Changing, 30), scene.wanted(50, 10)];
        assert_eq!(decide(&moving, host(10), scene.at(10)).orders, []);
    }

    #[test]
    fn what_is_pinned_stays() {
        let scene = Scene::new();
        let pinned = ResidencyFacts { is_pinned: true, ..scene.resident(60, 0) };
        let models = [pinned.clone(), scene.resident(30, 5), scene.wanted(40, 6)];
        assert_eq!(decide(&models, host(10), scene.at(6)).orders, [(1, Order::Leave)]);
        let models = [pinned.clone(), scene.wanted(90, 6)];
        assert_eq!(decide(&models, host(10), scene.at(1_000)).orders, [(1, Order::Refuse(host(10)))]);
        assert_eq!(decide(&[pinned], host(10), scene.at(1_000_000)), Decision::default());
    }

    #[test]
    fn a_model_that_never_fits_takes_nobodys_place() {
        let scene = Scene::new();
        let models = [scene.resident(30, 0), scene.wanted(100, 1)];
        assert_eq!(decide(&models, host(10), scene.at(1)).orders, [(1, Order::Refuse(host(40)))]);
        // A model that fits only with a shorter context gets all there is.
        let models = [scene.resident(50, 0), scene.wanted(100, 1)];
        assert_eq!(decide(&models, host(10), scene.at(1)).orders, [(0, Order::Leave)]);
        assert_eq!(decide(&models[1..], host(60), scene.at(1)).orders, [(0, Order::Load(host(60)))]);
    }

    #[test]
    fn a_model_that_nobody_waits_for_takes_nobodys_place() {
        let scene = Scene::new();
        let models = [
            scene.resident(30, 0),
            scene.model(Residency::WaitingForMemory, 20),
            scene.model(Residency::WaitingForMemory, 5),
        ];
        assert_eq!(decide(&models, host(10), scene.at(1)).orders, [(1, Order::StayOut)]);
        assert_eq!(decide(&models[2..], host(10), scene.at(1)).orders, [(0, Order::Load(host(10)))]);
    }

    #[test]
    fn a_busy_model_has_its_turn_and_then_lets_no_more_in() {
        let scene = Scene::new();
        let busy = ResidencyFacts { jobs: 2, ..scene.resident(60, 0) };
        let models = [busy.clone(), scene.wanted(60, 10)];
        let early = decide(&models, host(10), scene.at(12));
        assert_eq!(early, Decision { orders: vec![], look_again: Some(scene.at(13)) });
        assert_eq!(decide(&models, host(10), scene.at(13)).orders, [(0, Order::Close)]);
        let closed = ResidencyFacts { is_closed: true, ..busy.clone() };
        assert_eq!(decide(&[closed.clone(), scene.wanted(60, 10)], host(10), scene.at(14)).orders, []);
        // Its last job has ended, and the wanted model's turn comes before its own waiting jobs.
        let done = ResidencyFacts { jobs: 0, waiting_since: Some(scene.at(13)), ..closed.clone() };
        assert_eq!(decide(&[done, scene.wanted(60, 10)], host(10), scene.at(15)).orders, [(0, Order::Leave)]);
        // Nobody waits for the other model any more.
        assert_eq!(decide(&[closed], host(10), scene.at(14)).orders, [(0, Order::Open)]);
        // A model that was only just loaded has its turn first.
        let young = ResidencyFacts { residency: Residency::Loaded(scene.at(12)), ..busy };
        assert_eq!(decide(&[young, scene.wanted(60, 2)], host(10), scene.at(13)).look_again, Some(scene.at(15)));
    }

    #[test]
    fn an_idle_model_leaves_after_its_time_and_one_that_is_kept_does_not() {
        let scene = Scene::new();
        let models = [scene.resident(30, 7), ResidencyFacts { keep_alive: None, ..scene.resident(30, 7) }];
        let before = decide(&models, host(100), scene.at(306));
        assert_eq!(before, Decision { orders: vec![], look_again: Some(scene.at(307)) });
        assert_eq!(decide(&models, host(100), scene.at(307)).orders, [(0, Order::Leave)]);
        let busy = [
            ResidencyFacts { jobs: 1, ..scene.resident(30, 7) },
            ResidencyFacts { waiting_since: Some(scene.at(8)), ..scene.resident(30, 7) },
        ];
        assert_eq!(decide(&busy, host(100), scene.at(9_999)), Decision::default());
    }

    #[test]
    fn whoever_waited_longest_is_next() {
        let scene = Scene::new();
        let models = [scene.model(Residency::WaitingForMemory, 10), scene.wanted(10, 5), scene.wanted(10, 4)];
        assert_eq!(decide(&models, host(10), scene.at(6)).orders, [(2, Order::Load(host(10)))]);
    }

    #[test]
    fn models_make_room_on_a_gpu_as_they_do_in_memory() {
        let scene = Scene::new();
        let on_gpu = |vram_bytes, last_used| ResidencyFacts { vram_bytes, ..scene.resident(1, last_used) };
        let wants = |vram_bytes| ResidencyFacts { vram_bytes, ..scene.wanted(1, 20) };
        let room = |gpu| Memory { host: 100, gpu };
        // It fits beside the others.
        let models = [on_gpu(60, 0), wants(40)];
        assert_eq!(decide(&models, room(40), scene.at(20)).orders, [(1, Order::Load(room(40)))]);
        // The least recently used are unloaded, and only those on the GPU.
        let models = [scene.resident(50, 1), on_gpu(30, 9), on_gpu(30, 3), on_gpu(30, 6), wants(50)];
        assert_eq!(decide(&models, room(10), scene.at(20)).orders, [(2, Order::Leave), (3, Order::Leave)]);
        // Busy models have their turn.
        let busy = ResidencyFacts { jobs: 1, ..on_gpu(60, 0) };
        assert_eq!(decide(&[busy.clone(), wants(50)], room(10), scene.at(22)).orders, []);
        assert_eq!(decide(&[busy, wants(50)], room(10), scene.at(23)).orders, [(0, Order::Close)]);
    }

    #[test]
    fn a_model_that_no_gpu_holds_takes_what_there_is_unless_its_settings_say_how_much() {
        let scene = Scene::new();
        let wants = |vram_bytes_min| ResidencyFacts { vram_bytes: 90, vram_bytes_min, ..scene.wanted(1, 0) };
        let room = |gpu| Memory { host: 100, gpu };
        let pinned = ResidencyFacts { vram_bytes: 60, is_pinned: true, ..scene.resident(1, 0) };
        let with = |wanted| [pinned.clone(), wanted];
        assert_eq!(decide(&with(wants(0)), room(10), scene.at(1)).orders, [(1, Order::Load(room(10)))]);
        assert_eq!(decide(&with(wants(90)), room(10), scene.at(1)).orders, [(1, Order::Refuse(room(10)))]);
        // Every idle model is unloaded first.
        let idle = ResidencyFacts { vram_bytes: 20, ..scene.resident(1, 0) };
        let models = [pinned.clone(), idle, wants(0)];
        assert_eq!(decide(&models, room(10), scene.at(1)).orders, [(1, Order::Leave)]);
    }

    #[test]
    fn a_model_stays_for_a_moment_after_its_last_job_but_not_beyond_its_turn() {
        let scene = Scene::new();
        let after = |millis| scene.at(5) + Duration::from_millis(millis);
        let models = [scene.resident(60, 5), scene.wanted(60, 4)];
        let early = decide(&models, host(10), after(200));
        assert_eq!(early, Decision { orders: vec![], look_again: Some(after(250)) });
        assert_eq!(decide(&models, host(10), after(250)).orders, [(0, Order::Leave)]);
        // Its turn has ended meanwhile.
        let models = [scene.resident(60, 5), scene.wanted(60, 1)];
        assert_eq!(decide(&models, host(10), after(0)).orders, [(0, Order::Leave)]);
    }

    /// Simulates three models of which one fits at a time, wanted again and again, with ticks of one second.
    fn play(asks: &[(u64, usize)], job_seconds: u64) -> (usize, Vec<u64>) {
        play_on(SECOND, asks, job_seconds, |_| None)
    }

    /// The same with ticks of any length. `pause` returns after how many ticks a model is wanted again once a job of it
    /// has ended.
    fn play_on(
        tick: Duration,
        asks: &[(u64, usize)],
        job_ticks: u64,
        pause: impl Fn(usize) -> Option<u64>,
    ) -> (usize, Vec<u64>) {
        let scene = Scene::new();
        let mut asks = asks.to_vec();
        let mut models = vec![scene.model(Residency::Unloaded, 10); 3];
        let mut waiting: Vec<Vec<u64>> = vec![vec![]; 3];
        let mut running: Vec<(usize, u64)> = vec![];
        let (mut loads, mut waits) = (0, vec![]);
        for at in 0..5_000 {
            let now = scene.begin + tick * u32::try_from(at).expect("few");
            running.retain(|(model, end)| {
                let runs = *end > at;
                if !runs {
                    models[*model].jobs -= 1;
                    models[*model].last_used = now;
                    asks.extend(pause(*model).map(|pause| (at + pause, *model)));
                }
                runs
            });
            for (_, model) in asks.extract_if(.., |(asked_at, _)| *asked_at == at) {
                waiting[model].push(at);
            }
            for model in 0..3 {
                if models[model].residency == Residency::Unloaded && !waiting[model].is_empty() {
                    models[model].residency = Residency::WaitingForMemory;
                }
                models[model].waiting_since = waiting[model].first().map(|since| scene.at(*since));
            }
            let room =
                if models.iter().any(|model| model.residency == Residency::Changing || model.is_in()) { 0 } else { 10 };
            for (model, order) in decide(&models, host(room), now).orders {
                match order {
                    Order::Load(_) => {
                        loads += 1;
                        models[model].residency = Residency::Loaded(now);
                        models[model].last_used = now;
                    }
                    Order::Close => models[model].is_closed = true,
                    Order::Open => models[model].is_closed = false,
                    Order::Leave => {
                        assert_eq!(models[model].jobs, 0);
                        models[model].residency = Residency::Unloaded;
                        models[model].is_closed = false;
                    }
                    Order::StayOut | Order::Refuse(_) => panic!("all of them fit alone"),
                }
            }
            for model in 0..3 {
                if models[model].is_in() && !models[model].is_closed {
                    for since in std::mem::take(&mut waiting[model]) {
                        waits.push(at - since);
                        models[model].jobs += 1;
                        running.push((model, at + job_ticks));
                    }
                    models[model].waiting_since = None;
                }
            }
        }
        (loads, waits)
    }

    proptest! {
        #[test]
        fn nobody_waits_for_ever(
            asks in proptest::collection::vec((0_u64..400, 0_usize..3), 1..300),
            job_seconds in 1_u64..20,
        ) {
            let (_, waits) = play(&asks, job_seconds);
            prop_assert_eq!(waits.len(), asks.len(), "every job is served");
            // Two other models have their turns before, each with jobs that were admitted at its end.
            let most = 3 * (TURN.as_secs() + job_seconds + 3);
            prop_assert!(waits.iter().all(|wait| *wait <= most), "{:?} of {most}", waits.iter().max());
        }
    }

    #[test]
    fn under_alternating_load_a_model_serves_many_jobs_for_each_load() {
        let asks: Vec<_> = (0..2_000).map(|number: u64| (number / 4, (number % 2) as usize)).collect();
        let (loads, waits) = play(&asks, 1);
        assert!(waits.len() == 2_000 && loads * 5 <= waits.len(), "{loads} loads of {} jobs", waits.len());
    }
    #[test]
    fn two_clients_that_ask_one_thing_after_another_do_not_cost_a_load_for_each_request() {
        // Jobs of 300 ms, and 50 ms until the next request of the same client.
        let (loads, waits) = play_on(SECOND / 20, &[(0, 0), (1, 1)], 6, |_| Some(1));
        assert!(waits.len() > 500 && loads * 5 <= waits.len(), "{loads} loads of {} jobs", waits.len());
    }
}
