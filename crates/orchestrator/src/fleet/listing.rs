//! Keeps the list of workers within what one response may hold.

use std::collections::BTreeSet;

use protocol::codec;
use protocol::control::FleetWorker;
use protocol::health::HealthReport;

/// Maximum size of the list in bytes: half of what a response may have.
pub(crate) const LISTING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Accelerators of a worker whose report is shortened.
const ACCELERATORS_MAX: usize = 8;

/// Shortens the reports that are larger than their share, if all together are too large. Each says so.
pub(crate) fn bounded(mut workers: Vec<FleetWorker>, bytes_max: usize) -> Vec<FleetWorker> {
    let sizes: Vec<usize> = workers.iter().map(size).collect();
    if sizes.iter().sum::<usize>() <= bytes_max {
        return workers;
    }
    let share = bytes_max / workers.len();
    for (worker, _) in workers.iter_mut().zip(sizes).filter(|(_, size)| *size > share) {
        shorten(worker, share);
    }
    workers
}

fn size(worker: &FleetWorker) -> usize {
    codec::encode(worker).len()
}

/// Drops what schedulers alone need, and then models, until the report is as small as it must be.
fn shorten(worker: &mut FleetWorker, share: usize) {
    worker.shortened = true;
    worker.report.model_cache.iter_mut().for_each(|model| model.prefixes.clear());
    worker.report.accelerators.truncate(ACCELERATORS_MAX);
    let mut models = worker.report.supported.len();
    while size(worker) > share && models > 0 {
        models /= 2;
        keep(&mut worker.report, models);
    }
}

/// Keeps the first models, and what the report says about them.
fn keep(report: &mut HealthReport, models: usize) {
    report.supported.truncate(models);
    let kept: BTreeSet<_> = report.supported.iter().cloned().collect();
    report.model_cache.retain(|model| kept.contains(&model.key));
    report.to_fetch.retain(|model| kept.contains(model));
    for adapters in [&mut report.adapters, &mut report.pinned] {
        adapters.retain(|adapter| kept.contains(&adapter.model));
        adapters.truncate(models);
    }
}

#[cfg(test)]
mod tests {
    use protocol::health::{CachedModel, Capacity, ModelState};
    use protocol::model::ModelKey;
    use protocol::{Digest, PublicKey, UnixMillis};

    use super::*;

    fn worker(number: u8, models: usize) -> FleetWorker {
        let keys = (0..models).map(|model| ModelKey {
            model_id: format!("model-with-a-long-name-{model}").parse().expect("a name"),
            version: "1.0".parse().expect("a version"),
        });
        let supported: Vec<ModelKey> = keys.collect();
        let cached = |key: &ModelKey| CachedModel::new(key.clone(), Digest([0; 32]), ModelState::Ready);
        let key = PublicKey([number; 32]);
        let report = HealthReport {
            v: 1,
            worker_id: key,
            pub_key: key,
            region: "local".parse().expect("a region"),
            gpu_class: "cpu".into(),
            vram_gb: 0,
            accelerators: vec![],
            capacity: Capacity::default(),
            model_cache: supported.iter().map(cached).collect(),
            supported,
            to_fetch: vec![],
            adapters: vec![],
            pinned: vec![],
            latency_hops: 0,
            draining: false,
            activity: protocol::health::Activity::Accepting,
            continues: true,
            epoch: 1,
            seq: 1,
            issued_at: UnixMillis(0),
            not_after: UnixMillis(0),
        };
        FleetWorker { report, age_ms: 0, reserved: 0, shortened: false }
    }

    #[test]
    fn a_list_that_fits_is_not_touched() {
        let workers = vec![worker(1, 3), worker(2, 900)];
        assert_eq!(bounded(workers.clone(), LISTING_BYTES_MAX), workers);
    }

    #[test]
    fn large_reports_are_shortened_and_say_so_and_small_ones_are_whole() {
        let small = worker(1, 3);
        let workers = [vec![small.clone()], (2..=100).map(|number| worker(number, 1_000)).collect()].concat();
        let total = |workers: &[FleetWorker]| workers.iter().map(size).sum::<usize>();
        assert!(total(&workers) > LISTING_BYTES_MAX);
        let listed = bounded(workers, LISTING_BYTES_MAX);
        assert!(total(&listed) <= LISTING_BYTES_MAX);
        assert_eq!(listed.len(), 100, "every worker is listed");
        assert_eq!(listed[0], small);
        for worker in &listed[1..] {
            assert!(worker.shortened && worker.report.can_serve() && worker.report.supported.len() > 100);
        }
    }
}
