//! The way through Tether beside other routers, as a user deploys it: `make bench-gateway`.
//!
//! Each router is a process of its own on one core. The clients and an upstream without latency, in the format of
//! OpenAI, share another core; Tether's worker adopts the upstream. The routers are measured in turns, so that each
//! figure stands beside the others of the same minute.

#![allow(clippy::print_stdout, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../support/baseline.rs"]
#[allow(dead_code)]
mod baseline;
mod load;
mod routers;
mod upstream;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use baseline::percentile;
use load::Load;
use routers::Router;

/// How often each router is measured.
const TURNS: usize = 3;
const WARM_UP: usize = 300;
/// Requests of one client, one after another, in a turn.
const ALONE: usize = 1_000;
/// Requests of each of the concurrent clients in a turn.
const TOGETHER: usize = 100;
const CLIENTS: usize = 64;
/// Streams at once, and events of each, where events are counted.
const STREAMS: usize = 16;
const EVENTS: usize = 200;

/// The figures of a router, one for each turn.
#[derive(Default)]
struct Figures(BTreeMap<&'static str, Vec<f64>>);

impl Figures {
    fn add(&mut self, name: &'static str, value: f64) {
        self.0.entry(name).or_default().push(value);
    }

    fn median(&self, name: &str) -> f64 {
        let mut values = self.0[name].clone();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }
}

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let upstream = upstream::start();
    let direct = Load::new(upstream, None, "bench");
    let routers = routers::start(folder.path(), upstream);
    let loads: Vec<Load> = routers.iter().map(Router::load).collect();
    let mut figures: Vec<Figures> = routers.iter().map(|_| Figures::default()).collect();
    for load in &loads {
        load.one_after_another(WARM_UP, false);
    }
    let (mut bare, mut syncs) = (Figures::default(), vec![]);
    for _ in 0..TURNS {
        syncs.extend(two_syncs(folder.path()));
        let floor = percentile(&direct.one_after_another(ALONE, false), 50);
        let first = percentile(&direct.one_after_another(ALONE / 4, true), 50);
        bare.add("alone", floor);
        bare.add("first", first);
        for ((router, load), figures) in routers.iter().zip(&loads).zip(&mut figures) {
            measure(router, load, (floor, first), figures);
        }
    }
    println!(
        "upstream without a router: p50 {:.3} ms, first event {:.3} ms",
        bare.median("alone"),
        bare.median("first")
    );
    println!("two fdatasync of 4 KiB:    p50 {:.3} ms\n", percentile(&syncs, 50));
    println!(
        "{:<16}{:>10}{:>10}{:>11}{:>10}{:>11}{:>9}",
        "", "added p50", "first", "requests/s", "CPU", "CPU", "memory"
    );
    println!("{:<16}{:>10}{:>10}{:>11}{:>10}{:>11}{:>9}", "", "ms", "ms", "64 clients", "µs/req.", "µs/event", "MiB");
    for (router, figures) in routers.iter().zip(&figures) {
        let of = |name| figures.median(name);
        println!(
            "{:<16}{:>10.3}{:>10.3}{:>11.0}{:>10.0}{:>11.1}{:>9.0}",
            router.name,
            of("added"),
            of("first"),
            of("rate"),
            of("cpu"),
            of("event"),
            of("memory")
        );
    }
}

/// Measures a router once. `bare` is what the upstream takes without a router: a whole answer, and its first event.
fn measure(router: &Router, load: &Load, bare: (f64, f64), figures: &mut Figures) {
    figures.add("added", percentile(&load.one_after_another(ALONE, false), 50) - bare.0);
    figures.add("first", percentile(&load.one_after_another(ALONE / 4, true), 50) - bare.1);
    let (began, before) = (Instant::now(), router.cpu());
    load.together(CLIENTS, TOGETHER);
    let count = (CLIENTS * TOGETHER) as f64;
    figures.add("rate", count / began.elapsed().as_secs_f64());
    figures.add("cpu", (router.cpu() - before) / count * 1e6);
    let before = router.cpu();
    load.streams(STREAMS, EVENTS);
    figures.add("event", (router.cpu() - before) / (STREAMS * EVENTS) as f64 * 1e6);
    figures.add("memory", router.memory_mib());
}

/// Measures what two durable writes take, one after the other, in the folder in which Tether keeps its jobs.
fn two_syncs(folder: &Path) -> Vec<Duration> {
    let mut file = std::fs::File::create(folder.join("sync")).unwrap();
    let mut sync = || {
        file.write_all(&[7; 4096]).unwrap();
        file.sync_data().unwrap();
    };
    (0..200)
        .map(|_| {
            let began = Instant::now();
            sync();
            sync();
            began.elapsed()
        })
        .collect()
}
