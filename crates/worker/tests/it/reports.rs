//! What orchestrators learn of a worker, and when.

use engine::MockOptions;
use protocol::control::{Empty, PRESENCE_DESCRIBE};
use protocol::health::{EXPIRY, ModelState};
use protocol::infer::{InferRequest, Input, Message, Role};
use protocol::prefix::PrefixChain;
use protocol::presence::{self, Facts, HighWater};
use protocol::signature::Signed;
use protocol::{Clock as _, Topic};
use tether_worker::Config;
use tokio::time;

use crate::{Orchestrator, SECOND, Scene, config, key, next, read, region, request, slow, states, text};

#[tokio::test(start_paused = true)]
async fn a_report_comes_at_least_every_five_seconds() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    time::sleep(SECOND * 30).await;
    let received = scene.orchestrator.received();
    assert!(received.windows(2).all(|pair| pair[1].at - pair[0].at <= SECOND * 5));
    // Nothing changes, so there is little more than the heartbeat.
    assert!((6..=10).contains(&received.len()), "{} reports", received.len());
}

#[tokio::test(start_paused = true)]
async fn orchestrators_know_a_worker_within_two_seconds_of_its_start() {
    let scene = Scene::new(config(), MockOptions { load: SECOND, ..MockOptions::default() }).await;
    time::sleep(SECOND / 2).await;
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Loading], "it is known before it is ready");
    time::sleep(SECOND * 3 / 2).await;
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_that_is_found_is_told_at_once_and_not_at_the_next_heartbeat() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    for seed in 3..8 {
        // At any moment between two heartbeats.
        time::sleep(SECOND / 10 * 17).await;
        let joined = Orchestrator::join(&scene.world.network, seed, &scene.world).await;
        time::sleep(SECOND * 2).await;
        assert!(!joined.received().is_empty(), "the one of seed {seed} was not told");
    }
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_that_asks_gets_a_report_of_the_present() {
    let scene = Scene::ready(config(), slow()).await;
    let mut stream = scene.open(&request()).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    let id = scene.handle.worker_id();
    let ask = || scene.orchestrator.client.call::<_, Signed>(id, PRESENCE_DESCRIBE, &Empty {}, SECOND);
    let signed = ask().await.expect("answered");
    let before = scene.orchestrator.last();
    let high_water = Some(HighWater { epoch: before.epoch, seq: before.seq });
    let now = scene.world.clock.now();
    let facts = Facts { remote_key: id, regions: &[region()], check_worker: &|_| Ok(()), high_water, now };
    let report = presence::verify(&signed, &facts).expect("believed");
    assert_eq!((report.capacity.running, report.issued_at), (1, now));
    // What is pushed afterwards is later than what was told.
    time::sleep(SECOND * 6).await;
    assert!(scene.orchestrator.last().seq > report.seq);
}

#[tokio::test(start_paused = true)]
async fn a_report_says_who_the_worker_is_and_what_it_can_do() {
    let scene = Scene::ready(Config { latency_hops: 4, ..config() }, MockOptions::default()).await;
    let report = scene.orchestrator.last();
    assert_eq!((report.worker_id, report.pub_key), (scene.handle.worker_id(), scene.handle.worker_id()));
    assert_eq!((report.gpu_class.as_str(), report.vram_gb, report.latency_hops), ("cpu", 0, 4));
    assert_eq!((report.region.clone(), report.supported.clone()), (region(), vec![key()]));
    assert_eq!((report.capacity.slots, report.capacity.queue_max, report.draining), (4, 64, false));
    assert_eq!(report.model_cache[0].digest, protocol::Digest::of(crate::MODEL_BYTES));
    assert_eq!(states(&report), [ModelState::Ready]);
    assert_eq!(report.not_after, report.issued_at.after(EXPIRY));
}

#[tokio::test(start_paused = true)]
async fn a_report_tells_which_prompts_are_at_hand_until_their_engine_dies() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    let at_hand = || scene.orchestrator.last().model_cache[0].prefixes.clone();
    assert_eq!(at_hand(), []);
    let asked = Input { messages: Some(vec![Message::new(Role::User, "hello")]), ..Input::default() };
    let mut job = InferRequest { input: asked, ..request() };
    let (chunks, _) = read(scene.open(&job).await.expect("accepted")).await;
    time::sleep(SECOND / 2).await;
    let answer = Message::new(Role::Assistant, text(&chunks));
    job.input.messages.as_mut().expect("a conversation").push(answer);
    assert_eq!(at_hand(), PrefixChain::of(&job).marks().collect::<Vec<_>>(), "question and answer");
    scene.kill_engine().await;
    time::sleep(SECOND * 3).await;
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready], "another engine is there");
    assert_eq!(at_hand(), []);
}

#[tokio::test(start_paused = true)]
async fn epoch_stays_and_seq_rises_with_each_report() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    time::sleep(SECOND * 20).await;
    let reports = scene.orchestrator.reports();
    assert!(reports.iter().all(|report| report.epoch == 7));
    assert!(reports.windows(2).all(|pair| pair[0].seq < pair[1].seq));
}

#[tokio::test(start_paused = true)]
async fn a_change_is_reported_soon_and_many_changes_together() {
    let scene = Scene::ready(config(), slow()).await;
    let before = scene.orchestrator.received().len();
    let mut stream = scene.open(&request()).await.expect("accepted");
    next(&mut stream).await.expect("it runs").expect("and well");
    time::sleep(SECOND / 4).await;
    assert_eq!(scene.orchestrator.last().capacity.running, 1);
    for _ in 0..20 {
        drop(scene.open(&request()).await.expect("accepted"));
        time::sleep(SECOND / 20).await;
    }
    let more = scene.orchestrator.received().len() - before;
    assert!((2..=10).contains(&more), "{more} reports in 1.25 s");
}

#[tokio::test(start_paused = true)]
async fn an_orchestrator_that_joins_later_is_told_within_seconds() {
    let scene = Scene::ready(config(), MockOptions::default()).await;
    time::sleep(SECOND * 7).await;
    let second = Orchestrator::join(&scene.world.network, 3, &scene.world).await;
    time::sleep(SECOND * 5 / 2).await;
    assert_eq!(states(&second.last()), [ModelState::Ready]);
    // And both are told from then on.
    let (first_count, second_count) = (scene.orchestrator.received().len(), second.received().len());
    time::sleep(SECOND * 10).await;
    assert!(scene.orchestrator.received().len() >= first_count + 2);
    assert!(second.received().len() >= second_count + 2);
}

#[tokio::test(start_paused = true)]
async fn a_model_topic_is_announced_only_while_its_model_answers() {
    let scene = Scene::new(config(), MockOptions { load: SECOND * 3, ..MockOptions::default() }).await;
    let topic = Topic::Model(key().model_id, key().version, region());
    time::sleep(SECOND).await;
    assert!(scene.is_found_under(&Topic::Presence(region())).await);
    assert!(!scene.is_found_under(&topic).await);
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Loading]);
    time::sleep(SECOND * 3).await;
    assert!(scene.is_found_under(&topic).await);
    assert_eq!(states(&scene.orchestrator.last()), [ModelState::Ready]);
    scene.kill_engine().await;
    time::sleep(SECOND).await;
    assert!(!scene.is_found_under(&topic).await);
    time::sleep(SECOND * 5).await;
    assert!(scene.is_found_under(&topic).await);
}
