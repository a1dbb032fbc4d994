//! Invites, nodes and revocations.

use std::time::Duration;

use protocol::control::NodeRole;
use protocol::{InviteId, PublicKey, UnixMillis};
use tether_metadata_store::{
    InviteRecord, InviteRedemption, NewCertificate, NodeRecord, PutInviteError, Redemption, Revocation,
};

use super::Registry;
use super::samples::{LEASE, NOW, worker};

pub(crate) const ID: InviteId = InviteId([7; 8]);

pub(crate) fn invite() -> InviteRecord {
    InviteRecord {
        invite_id: ID,
        hash: [4; 32],
        name: "the box under the artifact_server".into(),
        roles: vec![NodeRole::Worker],
        regions: vec!["eu-west".parse().expect("a region")],
        models: vec!["tether-tiny".parse().expect("a name")],
        created_at: NOW,
        expires_at: LEASE,
        redeemed: None,
    }
}

fn certificate(node: PublicKey) -> NewCertificate {
    let InviteRecord { name, roles, regions, models, .. } = invite();
    NewCertificate { public_key: node, name, roles, regions, models, not_before: NOW, not_after: LEASE, now: NOW }
}

pub(crate) async fn an_invite_is_found_as_it_was_written(subject: Registry) {
    let store = subject.store;
    assert_eq!(store.invite(ID).await, Ok(None));
    store.put_invite(invite()).await.expect("is added");
    assert_eq!(store.invite(ID).await, Ok(Some(invite())));
    let other = InviteRecord { hash: [5; 32], ..invite() };
    assert_eq!(store.put_invite(other).await, Err(PutInviteError::Taken { invite_id: ID }));
    assert_eq!(store.invite(ID).await, Ok(Some(invite())));
}

pub(crate) async fn an_invite_is_redeemed_by_one_node_only(subject: Registry) {
    let store = subject.store;
    assert_eq!(store.redeem_invite(ID, worker(1), NOW).await, Ok(Redemption::Unknown));
    store.put_invite(invite()).await.expect("is added");
    assert_eq!(store.redeem_invite(ID, worker(1), NOW).await, Ok(Redemption::Done));
    assert_eq!(store.redeem_invite(ID, worker(2), NOW).await, Ok(Redemption::Used));
    assert_eq!(store.redeem_invite(ID, worker(1), LEASE).await, Ok(Redemption::Again));
    let redeemed = Some(InviteRedemption { node: worker(1), at: NOW });
    assert_eq!(store.invite(ID).await, Ok(Some(InviteRecord { redeemed, ..invite() })));
}

pub(crate) async fn a_certificate_has_a_number_greater_than_all_before(subject: Registry) {
    let store = subject.store;
    assert_eq!(store.put_certificate(certificate(worker(1))).await, Ok(1));
    assert_eq!(store.put_certificate(certificate(worker(2))).await, Ok(2));
    let later = NOW.after(Duration::from_secs(5));
    let next = NewCertificate { roles: vec![NodeRole::Gateway], models: vec![], now: later, ..certificate(worker(1)) };
    assert_eq!(store.put_certificate(next.clone()).await, Ok(3));
    let record = |serial, new: NewCertificate| NodeRecord {
        public_key: new.public_key,
        serial,
        name: new.name,
        roles: new.roles,
        regions: new.regions,
        models: new.models,
        joined_at: NOW,
        not_before: NOW,
        not_after: LEASE,
        revoked_at: None,
    };
    let (first, second) = (record(3, next), record(2, certificate(worker(2))));
    assert_eq!(store.node(worker(1)).await, Ok(Some(first.clone())));
    assert_eq!(store.node(worker(3)).await, Ok(None));
    assert_eq!(store.nodes().await, Ok(vec![first, second]));
}

pub(crate) async fn a_revoked_node_keeps_its_first_time_and_version(subject: Registry) {
    let store = subject.store;
    store.put_certificate(certificate(worker(1))).await.expect("is written");
    assert_eq!(store.revocations().await, Ok(vec![]));
    let version = store.revoke_node(worker(1), NOW).await.expect("revokes");
    assert_eq!(store.revoke_node(worker(1), LEASE).await, Ok(version));
    assert_eq!(store.node(worker(1)).await.expect("readable").expect("there").revoked_at, Some(NOW));
    let revocation = Revocation { public_key: worker(1), version, revoked_at: NOW };
    assert_eq!(store.revocations().await, Ok(vec![revocation]));
}

pub(crate) async fn versions_of_the_revocation_list_grow_whatever_the_clock_says(subject: Registry) {
    let store = subject.store;
    let mut last = 0;
    for (number, now) in [(1, NOW), (2, NOW), (3, UnixMillis(5)), (4, LEASE)] {
        // A key that was never admitted can be expelled as well.
        let version = store.revoke_node(worker(number), now).await.expect("revokes");
        assert!(version > last && version >= now.0, "{version}");
        last = version;
    }
    assert_eq!(store.revocations().await.expect("readable").len(), 4);
}
