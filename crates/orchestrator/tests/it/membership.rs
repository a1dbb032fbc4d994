//! Who may give an orchestrator jobs and reports, and who gets jobs.

use std::time::Duration;

use protocol::control::{
    ARTIFACT_HOLDERS, ArtifactHolders, ArtifactHoldersRequest, Empty, FLEET_LIST, Fleet, JOB_EXPLAIN, MODEL_MOVE,
    NodeRole,
};
use protocol::infer::InferChunk;
use protocol::membership::Certificate;
use protocol::{Digest, ErrorCode, WireError, codec};
use rpc::{CallError, Client};
use tether_orchestrator::Config;
use tokio::time::{self, Instant};

use crate::stand::{Manner, Stand, certificate, key, membership, model, stand, submit};

const SECOND: Duration = Duration::from_secs(1);

fn code<T>(outcome: &Result<T, CallError>) -> Option<ErrorCode> {
    match outcome {
        Err(CallError::Remote(error)) => Some(error.code),
        _ => None,
    }
}

/// A client of a node that has this certificate.
fn client(stand: &Stand, number: u8, certificate: &Certificate) -> Client {
    Client::new(stand.network.node(&key(number))).with_membership(membership(certificate))
}

fn rejected(stand: &Stand, reason: &str) -> bool {
    let line = format!("tether_presence_rejected_total{{reason=\"{reason}\"}} ");
    stand.metrics.encode().lines().any(|found| found.starts_with(&line) && !found.ends_with(" 0"))
}

#[tokio::test]
async fn a_stranger_gets_nothing_and_gives_nothing() {
    let stand = stand(Config::default()).await;
    let friend = stand.worker(1, Manner::Answer(1)).await;
    let stranger = Client::new(stand.network.node(&key(66)));
    let submitted = submit(&stranger, stand.orchestrator, &stand.job()).await;
    assert_eq!(code(&submitted.map(drop)), Some(ErrorCode::NotEnrolled));
    for method in [FLEET_LIST, JOB_EXPLAIN] {
        let job = protocol::control::ExplainRequest { correlation_id: stand.job().correlation_id };
        let asked = stranger.call::<_, Fleet>(stand.orchestrator, method, &job, SECOND).await;
        assert_eq!(code(&asked), Some(ErrorCode::NotEnrolled), "{method}");
    }
    let report = friend.report_body(|report| {
        report.worker_id = key(66).public_key();
        report.pub_key = report.worker_id;
    });
    let signed =
        key(66).sign(protocol::health::KIND, String::from_utf8(protocol::codec::encode(&report)).expect("JSON"));
    let method = protocol::control::PRESENCE_REPORT;
    let reported = stranger.call::<_, Empty>(stand.orchestrator, method, &signed, SECOND).await;
    assert_eq!(code(&reported), Some(ErrorCode::NotEnrolled));
    assert!(rejected(&stand, "not_enrolled"));
    assert_eq!(stand.fleet().await.workers.len(), 1);
    assert_eq!(friend.jobs_seen(), 0);
}

#[tokio::test]
async fn a_certificate_for_one_role_is_none_for_another() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Answer(1)).await;
    let refused = submit(&worker.client, stand.orchestrator, &stand.job()).await.map(drop);
    assert_eq!(code(&refused), Some(ErrorCode::NotEnrolled));
    let gateway = certificate(2, NodeRole::Gateway);
    let pretender = stand.certified_worker(&gateway, Manner::Answer(1), 2);
    assert_eq!(code(&pretender.report(&stand, |_| {}).await), Some(ErrorCode::NotEnrolled));
    assert!(rejected(&stand, "role"));
    assert_eq!(stand.fleet().await.workers.len(), 1);
    assert!(stand.membership.is_member(key(2).public_key()));
}

#[tokio::test]
async fn a_worker_reads_who_has_a_file_and_nothing_else_of_the_fleet() {
    let stand = stand(Config::default()).await;
    let (asking, holder) = (stand.worker(1, Manner::Answer(1)).await, stand.worker(2, Manner::Answer(1)).await);
    let job = protocol::control::ExplainRequest { correlation_id: stand.job().correlation_id };
    let requests = [
        (FLEET_LIST, serde_json::json!({})),
        (JOB_EXPLAIN, serde_json::json!(job)),
        (MODEL_MOVE, serde_json::json!({ "modelId": model().model_id, "version": model().version, "load": true })),
    ];
    for (method, request) in requests {
        let asked = asking.client.call::<_, serde_json::Value>(stand.orchestrator, method, &request, SECOND).await;
        assert_eq!(code(&asked), Some(ErrorCode::NotEnrolled), "{method}");
    }
    for (models, expected) in [(vec![model()], vec![holder.key.public_key()]), (vec![], vec![])] {
        let request = ArtifactHoldersRequest { digest: Digest([1; 32]), models };
        let asked = asking.client.call::<_, ArtifactHolders>(stand.orchestrator, ARTIFACT_HOLDERS, &request, SECOND);
        assert_eq!(asked.await.expect("listed").workers, expected);
    }
}

#[tokio::test]
async fn a_certificate_for_other_regions_counts_for_nothing_here() {
    let stand = stand(Config::default()).await;
    let elsewhere =
        |number, role| Certificate { regions: vec!["mars".parse().expect("region")], ..certificate(number, role) };
    let worker = stand.certified_worker(&elsewhere(1, NodeRole::Worker), Manner::Answer(1), 1);
    assert_eq!(code(&worker.report(&stand, |_| {}).await), Some(ErrorCode::NotEnrolled));
    assert!(rejected(&stand, "certificate_region"));
    let gateway = client(&stand, 2, &elsewhere(2, NodeRole::Gateway));
    let refused = submit(&gateway, stand.orchestrator, &stand.job()).await.map(drop);
    assert_eq!(code(&refused), Some(ErrorCode::NotEnrolled));
}

#[tokio::test]
async fn a_worker_gets_no_job_for_a_model_that_its_certificate_does_not_name() {
    let stand = stand(Config::default()).await;
    let limited = |number, model: &str| Certificate {
        models: vec![model.parse().expect("name")],
        ..certificate(number, NodeRole::Worker)
    };
    let other = stand.certified_worker(&limited(1, "other"), Manner::Answer(1), 1);
    other.report(&stand, |_| {}).await.expect("believed");
    let refused = stand.answer(&stand.job()).await.expect_err("nobody may serve it");
    assert_eq!(refused.code, ErrorCode::NoCapacity);
    assert_eq!(stand.fleet().await.workers[0].report.supported, []);
    let allowed = stand.certified_worker(&limited(2, model().model_id.as_str()), Manner::Answer(1), 2);
    allowed.report(&stand, |_| {}).await.expect("believed");
    stand.answer(&stand.job()).await.expect("answered");
    assert_eq!((other.jobs_seen(), allowed.jobs_seen()), (0, 1));
}

/// The five seconds count from then on.
async fn until_the_registry_is_known(stand: &Stand) {
    while stand.membership.version() != 0 || !stand.membership.is_member(key(200).public_key()) {
        time::sleep(SECOND / 100).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_revoked_worker_leaves_within_five_seconds_and_its_jobs_go_elsewhere() {
    let stand = stand(Config::default()).await;
    let (first, second) = stand.pair(Manner::DieAfter(0), Manner::Answer(1)).await;
    *first.manner.lock() = Manner::Mute;
    let expelled = first.key.public_key();
    assert_eq!(stand.fleet().await.workers.len(), 2);
    until_the_registry_is_known(&stand).await;
    stand.revoke(expelled);
    let begun = Instant::now();
    while stand.fleet().await.workers.len() > 1 {
        assert!(begun.elapsed() <= SECOND * 5, "it is still there after {:?}", begun.elapsed());
        time::sleep(SECOND / 50).await;
    }
    stand.answer(&stand.job()).await.expect("answered");
    assert_eq!((first.jobs_seen(), second.jobs_seen()), (0, 1));
    // Its reports are refused, and counted.
    let refused = first.report(&stand, |_| {}).await;
    assert!(matches!(&refused, Err(CallError::Remote(WireError { code: ErrorCode::NodeRevoked, .. }))), "{refused:?}");
    assert!(rejected(&stand, "revoked"));
}

#[tokio::test(start_paused = true)]
async fn a_job_that_runs_on_a_worker_when_it_is_revoked_is_cut_off_and_continues_elsewhere() {
    let stand = stand(Config::default()).await;
    let worker = stand.worker(1, Manner::Hang).await;
    let job = stand.job();
    let mut stream = stand.submit(&job).await.expect("the first chunk came");
    stream.next().await.expect("a chunk").expect("a good one");
    stand.worker(2, Manner::Answer(3)).await;
    until_the_registry_is_known(&stand).await;
    stand.revoke(worker.key.public_key());
    let begun = Instant::now();
    let next = stream.next().await.expect("a chunk").expect("a good one");
    let next: InferChunk = codec::decode(&next).expect("a chunk");
    assert!(begun.elapsed() <= SECOND * 5, "{:?}", begun.elapsed());
    assert_eq!((next.seq, next.attempt), (1, 2));
    time::timeout(SECOND, worker.cancelled.notified()).await.expect("the worker was told to stop");
    assert_ne!(stand.settled(&job).await.state, metadata_store::DurableState::Reserved);
}
