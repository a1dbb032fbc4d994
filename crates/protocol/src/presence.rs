//! Decides whether to accept a health report. A pure function: cheap checks run before the signature is verified.

use std::time::Duration;

use crate::clock::UnixMillis;
use crate::codec;
use crate::health::{self, EXPIRY, HealthReport};
use crate::id::{PublicKey, Region};
use crate::membership::Exclusion;
use crate::signature::Signed;

/// The maximum difference between a worker's clock and ours.
pub const SKEW_MAX: Duration = Duration::from_secs(5);

/// The last accepted report of a worker. A later report has a greater pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct HighWater {
    /// Epoch of the worker, which increases with each start.
    pub epoch: u64,
    /// Number of the report within the epoch.
    pub seq: u64,
}

/// Why a report was dropped. [`Rejection::reason`] is the label of its counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Rejection {
    /// The report is larger than [`health::REPORT_BYTES_MAX`].
    #[error("the report is too large")]
    TooLarge,
    /// The bytes are not a health report.
    #[error("the report is malformed")]
    Malformed,
    /// The report has another version of the contract.
    #[error("the report has another version")]
    Version,
    /// The report is not from the key of the connection that delivered it.
    #[error("the report is not bound to its connection")]
    Unbound,
    /// The report is for another region.
    #[error("the report is for another region")]
    WrongRegion,
    /// The node may not be a worker, or not in this region.
    #[error("{0}")]
    Excluded(Exclusion),
    /// The clocks differ by too much.
    #[error("the clocks differ by more than 5 s")]
    Skew,
    /// The report has expired, or its expiry is too late.
    #[error("the report has expired")]
    Expired,
    /// The report is not newer than the last accepted one.
    #[error("the report is a replay")]
    Replay,
    /// The signature does not verify.
    #[error("the signature does not verify")]
    BadSignature,
}

impl Rejection {
    /// Returns the label of the rejection's counter.
    pub fn reason(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::Version => "version",
            Self::Unbound => "unbound",
            Self::WrongRegion => "region",
            Self::Excluded(exclusion) => exclusion.reason(),
            Self::Skew => "skew",
            Self::Expired => "expired",
            Self::Replay => "replay",
            Self::BadSignature => "bad_sig",
        }
    }
}

/// Facts for a decision about a report.
pub struct Facts<'a> {
    /// Public key of the connection's peer.
    pub remote_key: PublicKey,
    /// Regions whose workers are accepted.
    pub regions: &'a [Region],
    /// Checks that the key may be a worker in the report's region.
    pub check_worker: &'a dyn Fn(&Region) -> Result<(), Exclusion>,
    /// The last accepted report of this worker.
    pub high_water: Option<HighWater>,
    /// Current time by the receiver's clock.
    pub now: UnixMillis,
}

/// Returns the report if it is valid. The caller then raises the worker's high-water mark to it.
pub fn verify(signed: &Signed, facts: &Facts<'_>) -> Result<HealthReport, Rejection> {
    if signed.body.len() > health::REPORT_BYTES_MAX {
        return Err(Rejection::TooLarge);
    }
    if signed.key != facts.remote_key {
        return Err(Rejection::Unbound);
    }
    let report: HealthReport = codec::decode(signed.body.as_bytes()).map_err(|_| Rejection::Malformed)?;
    if report.v != 1 {
        return Err(Rejection::Version);
    }
    if report.worker_id != facts.remote_key || report.pub_key != facts.remote_key {
        return Err(Rejection::Unbound);
    }
    if !facts.regions.contains(&report.region) {
        return Err(Rejection::WrongRegion);
    }
    (facts.check_worker)(&report.region).map_err(Rejection::Excluded)?;
    if report.issued_at.distance(facts.now) > SKEW_MAX {
        return Err(Rejection::Skew);
    }
    if report.not_after < facts.now || report.not_after > report.issued_at.after(EXPIRY) {
        return Err(Rejection::Expired);
    }
    if facts.high_water.is_some_and(|mark| HighWater { epoch: report.epoch, seq: report.seq } <= mark) {
        return Err(Rejection::Replay);
    }
    signed.verify(health::KIND).map_err(|_| Rejection::BadSignature)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Capacity;
    use crate::signature::NodeKey;

    const NOW: UnixMillis = UnixMillis(1_700_000_000_000);

    fn key() -> NodeKey {
        NodeKey::from_seed(&[7; 32])
    }

    fn report() -> HealthReport {
        HealthReport {
            v: 1,
            worker_id: key().public_key(),
            pub_key: key().public_key(),
            region: "eu-west".parse().expect("region"),
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
            activity: crate::health::Activity::Accepting,
            continues: true,
            epoch: 3,
            seq: 5,
            issued_at: NOW,
            not_after: NOW.after(EXPIRY),
        }
    }

    fn decide(
        report: &HealthReport,
        change: impl FnOnce(&mut Signed, &mut Facts<'_>),
    ) -> Result<HealthReport, Rejection> {
        let mut signed = key().sign(health::KIND, String::from_utf8(codec::encode(report)).expect("JSON is UTF-8"));
        let regions = ["eu-west".parse().expect("region")];
        let mut facts = Facts {
            remote_key: key().public_key(),
            regions: &regions,
            check_worker: &|_| Ok(()),
            high_water: None,
            now: NOW,
        };
        change(&mut signed, &mut facts);
        verify(&signed, &facts)
    }

    #[test]
    fn an_honest_report_is_believed() {
        assert_eq!(decide(&report(), |_, _| {}), Ok(report()));
    }

    #[test]
    fn each_kind_of_false_report_is_dropped_for_its_own_reason() {
        let other = NodeKey::from_seed(&[8; 32]).public_key();
        let rejects = |report: HealthReport, why| assert_eq!(decide(&report, |_, _| {}), Err(why));
        rejects(HealthReport { v: 2, ..report() }, Rejection::Version);
        rejects(HealthReport { worker_id: other, ..report() }, Rejection::Unbound);
        rejects(HealthReport { region: "us-east".parse().expect("region"), ..report() }, Rejection::WrongRegion);
        rejects(HealthReport { issued_at: UnixMillis(NOW.0 - 5_001), ..report() }, Rejection::Skew);
        rejects(HealthReport { issued_at: UnixMillis(NOW.0 + 5_001), ..report() }, Rejection::Skew);
        rejects(HealthReport { not_after: UnixMillis(NOW.0 - 1), ..report() }, Rejection::Expired);
        rejects(HealthReport { not_after: NOW.after(EXPIRY * 2), ..report() }, Rejection::Expired);
        let decides = |change: &dyn Fn(&mut Signed, &mut Facts<'_>), why| {
            assert_eq!(decide(&report(), |signed, facts| change(signed, facts)), Err(why));
        };
        let stranger = Exclusion::NotEnrolled;
        decides(&|_, facts| facts.check_worker = &|_| Err(Exclusion::NotEnrolled), Rejection::Excluded(stranger));
        decides(&|_, facts| facts.check_worker = &|_| Err(Exclusion::Revoked), Rejection::Excluded(Exclusion::Revoked));
        decides(&|_, facts| facts.remote_key = other, Rejection::Unbound);
        decides(&|_, facts| facts.high_water = Some(HighWater { epoch: 3, seq: 5 }), Rejection::Replay);
        decides(&|_, facts| facts.high_water = Some(HighWater { epoch: 4, seq: 1 }), Rejection::Replay);
        decides(
            &|signed, _| signed.body = signed.body.replace("\"running\":0", "\"running\":1"),
            Rejection::BadSignature,
        );
        decides(&|signed, _| signed.body.push('x'), Rejection::Malformed);
        decides(&|signed, _| signed.body = " ".repeat(health::REPORT_BYTES_MAX + 1), Rejection::TooLarge);
    }

    #[test]
    fn a_restarted_worker_is_believed_again_from_its_first_report() {
        let restarted = HealthReport { epoch: 4, seq: 0, ..report() };
        let mark = HighWater { epoch: 3, seq: 900 };
        assert!(decide(&restarted, |_, facts| facts.high_water = Some(mark)).is_ok());
    }
}
