//! Times one decision of the fair queue at several lengths: `cargo bench -p tether-orchestrator --bench fair_queue`.

#![allow(clippy::print_stdout)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use protocol::policy::ServiceClass;
use tether_orchestrator::fair_queue::{Arrival, FairQueue, FlowKey, Limits};

fn main() {
    println!("one decision, µs              p50      p99");
    for size in [100u64, 1_000, 10_000] {
        for tenants in [1, 100, 2_000] {
            let mut queue = FairQueue::new(Limits { jobs_max: usize::MAX, tenant_jobs_max: usize::MAX });
            for number in 0..size {
                queue.enter(arrival(number, tenants), Duration::ZERO).expect("no limit");
            }
            let mut times: Vec<f64> = (size..size + 20_000)
                .map(|number| {
                    let began = Instant::now();
                    let released = black_box(queue.release(Duration::from_millis(number), |_| true));
                    let micros = began.elapsed().as_secs_f64() * 1e6;
                    queue.end(released.expect("jobs wait"), 100 + number % 100);
                    queue.enter(arrival(number, tenants), Duration::from_millis(number)).expect("no limit");
                    micros
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let (median, high) = (times[times.len() / 2], times[times.len() * 99 / 100]);
            println!("{size:>6} jobs, {tenants:>5} tenants {median:>8.2} {high:>8.2}");
        }
    }
}

fn arrival(number: u64, tenants: u64) -> Arrival<u8> {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let tenant_id = format!("tenant-{}", mixed % tenants).parse().expect("a tenant");
    let class = ServiceClass::ALL[(mixed >> 8) as usize % 3];
    Arrival { group: 0, flow: FlowKey { tenant_id, class }, weight: 1 + (mixed % 3) as u32, cost: 50 + mixed % 500 }
}
