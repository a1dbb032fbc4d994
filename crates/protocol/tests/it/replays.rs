//! Captured health reports, sent again in every order.

use tether_protocol::UnixMillis;
use tether_protocol::codec;
use tether_protocol::health::{Capacity, EXPIRY, HealthReport, KIND};
use tether_protocol::id::Region;
use tether_protocol::presence::{Facts, HighWater, Rejection, verify};
use tether_protocol::signature::{NodeKey, Signed};

const NOW: UnixMillis = UnixMillis(1_700_000_000_000);
const REPORTS: usize = 200;
const REPLAYS: usize = 100_000;

fn region() -> Region {
    "eu-west".parse().expect("a region")
}

/// Returns the reports of a worker that was restarted in the middle, in their order.
fn captured(key: &NodeKey) -> Vec<(HighWater, Signed)> {
    let marks = (0..REPORTS as u64).map(|at| HighWater { epoch: 1 + at / 100, seq: at % 100 });
    marks.map(|mark| (mark, signed(key, mark))).collect()
}

fn signed(key: &NodeKey, HighWater { epoch, seq }: HighWater) -> Signed {
    let worker = key.public_key();
    let report = HealthReport {
        v: 1,
        worker_id: worker,
        pub_key: worker,
        region: region(),
        gpu_class: "cpu".into(),
        vram_gb: 0,
        accelerators: vec![],
        capacity: Capacity { slots: 4, running: 0, waiting: 0, queue_max: 8 },
        supported: vec![],
        to_fetch: vec![],
        adapters: vec![],
        pinned: vec![],
        model_cache: vec![],
        latency_hops: 1,
        draining: false,
        activity: tether_protocol::health::Activity::Accepting,
        continues: true,
        epoch,
        seq,
        issued_at: NOW,
        not_after: NOW.after(EXPIRY),
    };
    key.sign(KIND, String::from_utf8(codec::encode(&report)).expect("JSON is UTF-8"))
}

#[test]
fn of_100_000_replays_none_is_believed() {
    let (key, other) = (NodeKey::from_seed(&[7; 32]), NodeKey::from_seed(&[8; 32]));
    let captured = captured(&key);
    let decide = |signed: &Signed, high_water, peer: &NodeKey, region: Region| {
        let facts = Facts {
            remote_key: peer.public_key(),
            regions: &[region],
            check_worker: &|_| Ok(()),
            high_water,
            now: NOW,
        };
        verify(signed, &facts)
    };
    assert!(decide(&captured[0].1, None, &key, region()).is_ok());
    for round in 0..REPLAYS {
        // Every report up to the last accepted one comes again, at each of these times.
        let accepted = round % REPORTS;
        let (_, replayed) = &captured[(round / REPORTS) % (accepted + 1)];
        let mark = Some(captured[accepted].0);
        let (outcome, why) = match round % 4 {
            0 => (decide(replayed, mark, &other, region()), Rejection::Unbound),
            1 => (decide(replayed, mark, &key, "us-east".parse().expect("a region")), Rejection::WrongRegion),
            _ => (decide(replayed, mark, &key, region()), Rejection::Replay),
        };
        assert_eq!(outcome, Err(why), "round {round}");
    }
}
