//! Times one scheduling decision over fleets of several sizes: `cargo bench -p tether-orchestrator`.

#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::time::Instant;

use protocol::health::{CachedModel, Capacity, HealthReport, ModelState};
use protocol::model::ModelKey;
use protocol::prefix::PrefixChain;
use protocol::{Digest, PublicKey, UnixMillis};
use tether_orchestrator::fleet::{Fleet, Wanted};
use tether_orchestrator::scheduler::{affinity::Weights, place};

fn main() {
    let model = ModelKey { model_id: "m".parse().expect("name"), version: "1.0".parse().expect("version") };
    let prompt = PrefixChain::NONE;
    println!("one decision, µs         p50      p99");
    for size in [10u32, 1000, 10_000] {
        let fleet = fleet_of(size, &model);
        let now = tokio::time::Instant::now();
        let weights = Weights::default();
        let wanted = Wanted {
            model: &model,
            digest: None,
            adapter: None,
            prefix: &prompt,
            short_context: 0,
            continuation: None,
            regions: None,
        };
        let mut times: Vec<f64> = (0..2000)
            .map(|_| {
                let began = Instant::now();
                black_box(fleet.with_candidates(&[wanted], now, |candidates| place(candidates, &[], &weights, &[])));
                began.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("{size:>6} workers       {:>8.1} {:>8.1}", times[times.len() / 2], times[times.len() * 99 / 100]);
    }
}

fn fleet_of(size: u32, model: &ModelKey) -> Fleet {
    let fleet = Fleet::new("local".parse().expect("region"), vec!["near".parse().expect("region")]);
    for number in 0..size {
        // Scattered ids, loads and speeds, the same in every run.
        let mixed = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut id = [0; 32];
        id[..8].copy_from_slice(&mixed.to_be_bytes());
        id[8..12].copy_from_slice(&number.to_be_bytes());
        let region = ["local", "near", "far"][(mixed >> 60) as usize % 3];
        fleet.update(
            HealthReport {
                v: 1,
                worker_id: PublicKey(id),
                pub_key: PublicKey(id),
                region: region.parse().expect("region"),
                gpu_class: "cpu".into(),
                vram_gb: 0,
                accelerators: vec![],
                capacity: Capacity { slots: 8, running: (mixed >> 20) as u32 % 12, waiting: 0, queue_max: 8 },
                supported: vec![model.clone()],
                to_fetch: vec![],
                adapters: vec![],
                pinned: vec![],
                model_cache: vec![CachedModel {
                    tokens_per_second: (mixed >> 30 & 63) as f32,
                    ..CachedModel::new(
                        model.clone(),
                        Digest([0; 32]),
                        if mixed.is_multiple_of(5) { ModelState::Loading } else { ModelState::Ready },
                    )
                }],
                latency_hops: 0,
                draining: false,
                activity: protocol::health::Activity::Accepting,
                continues: true,
                epoch: 1,
                seq: 0,
                issued_at: UnixMillis(0),
                not_after: UnixMillis(0),
            },
            tokio::time::Instant::now(),
        );
    }
    fleet
}
