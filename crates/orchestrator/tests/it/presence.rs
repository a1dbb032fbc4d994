use std::sync::Arc;

use metadata_store::{JobStore as _, SqliteStore};
use protocol::UnixMillis;
use protocol::health::{EXPIRY, KIND, REPORT_BYTES_MAX};
use protocol::presence::HighWater;
use protocol::signature::Signed;
use tether_orchestrator::Config;

use crate::stand::{Manner, key, stand, stand_on};

#[tokio::test]
async fn replayed_forged_stale_and_unbound_reports_are_dropped_and_counted_by_reason() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let other = stand.worker(2, Manner::Answer(1)).await;

    let good = worker.sign(&worker.report_body(|_| {}));
    worker.push(&stand, &good).await.expect("new");
    worker.push(&stand, &good).await.expect_err("the same again");
    other.push(&stand, &worker.sign(&worker.report_body(|_| {}))).await.expect_err("another's report");
    let honest = worker.sign(&worker.report_body(|_| {}));
    let forged = Signed { body: honest.body.replace("\"slots\":4", "\"slots\":9"), ..honest };
    worker.push(&stand, &forged).await.expect_err("changed on the way");
    worker.report(&stand, |report| report.issued_at = UnixMillis(report.issued_at.0 - 6000)).await.expect_err("stale");
    worker.report(&stand, |report| report.region = "mars".parse().expect("region")).await.expect_err("elsewhere");

    worker
        .report(&stand, |report| report.not_after = report.issued_at.after(EXPIRY * 2))
        .await
        .expect_err("for too long");
    worker.report(&stand, |report| report.v = 2).await.expect_err("of another version");
    worker.report(&stand, |report| report.worker_id = other.key.public_key()).await.expect_err("in another's name");
    let malformed = worker.key.sign(KIND, "{}".into());
    worker.push(&stand, &malformed).await.expect_err("no report");
    let large = worker.key.sign(KIND, " ".repeat(REPORT_BYTES_MAX + 1));
    worker.push(&stand, &large).await.expect_err("too large");

    let text = stand.metrics.encode();
    for (reason, times) in [
        ("replay", 1),
        ("unbound", 2),
        ("bad_sig", 1),
        ("skew", 1),
        ("region", 1),
        ("expired", 1),
        ("version", 1),
        ("malformed", 1),
        ("too_large", 1),
    ] {
        let line = format!("tether_presence_rejected_total{{reason=\"{reason}\"}} {times}");
        assert!(text.contains(&line), "{line}\n{text}");
    }
    assert!(stand.fleet().await.workers.iter().all(|worker| worker.report.capacity.slots == 4));
}

#[tokio::test]
async fn marks_outlive_the_orchestrator_so_that_old_reports_stay_replays() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let id = worker.key.public_key();
    for _ in 0..300 {
        let marks = stand.store.high_waters().await.expect("readable");
        if marks.iter().any(|(worker, _)| *worker == id) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the mark was not written within three seconds");
}

#[tokio::test]
async fn a_job_waits_for_a_worker_that_was_known_before_a_restart() {
    let store = Arc::new(SqliteStore::in_memory().expect("a store"));
    store.raise_high_water(vec![(key(1).public_key(), HighWater { epoch: 0, seq: 1 })]).await.expect("written");
    let stand = stand_on(store, Config::default()).await;
    let job = stand.job();
    let returning = async {
        // By then, a job without a worker would have been refused.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        stand.worker(1, Manner::Answer(2)).await
    };
    let (answer, _worker) = tokio::join!(stand.answer(&job), returning);
    assert_eq!(answer.expect("answered").len(), 3);
}
