//! How nodes join, stay and are expelled.

use std::sync::atomic::Ordering;
use std::time::Duration;

use protocol::control::{
    CATALOG_LIST, CERTIFICATE_RENEW, Catalog, Empty, Enrolled, INVITE_CREATE, INVITE_REDEEM, InviteCreate,
    InviteCreated, InviteRedeem, NODE_LIST, NODE_REVOKE, NodeList, NodeRevoke, NodeRevoked, NodeRole, OperatorRequest,
    POOL_STATE, PoolState, PoolStateRequest, Scope, TOKEN_CHECK, TokenCheck, TokenCreate, TokenGrant,
};
use protocol::membership::{CERTIFICATE_LIFE, Certificate, Invite, InviteSecret, RevocationList, RevocationStamp};
use protocol::signature::NodeKey;
use protocol::{Clock as _, ErrorCode, InviteId, PublicKey};
use rpc::{CallError, Client, Enrolment, JoinError, Membership};

use crate::{TestRegistry, new_token, test};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);

fn key(seed: u8) -> NodeKey {
    NodeKey::from_seed(&[seed; 32])
}

fn code<T: std::fmt::Debug>(outcome: Result<T, CallError>) -> ErrorCode {
    match outcome {
        Err(CallError::Remote(error)) => error.code,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

fn joined_code(outcome: Result<Enrolment, JoinError>) -> ErrorCode {
    match outcome {
        Err(JoinError::Refused(error)) => error.code,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

impl TestRegistry {
    async fn token(&self, scopes: &[Scope]) -> String {
        let new = TokenCreate { scopes: scopes.to_vec(), ..new_token(None) };
        self.tokens.issue(new).await.expect("issued").token
    }

    /// A client of a node that is nobody yet.
    fn newcomer(&self, seed: u8) -> Client {
        Client::new(self.network.node(&key(seed)))
    }

    async fn invite(&self) -> Invite {
        let request = InviteCreate {
            token: self.token(&[Scope::Admin]).await,
            roles: vec![NodeRole::Worker],
            regions: vec!["local".parse().expect("region")],
            models: vec!["tether-tiny".parse().expect("name")],
            name: "the box under the test".into(),
            valid_secs: None,
            bootstrap: vec![],
        };
        // Any node may bring an operator's token: it is the token that counts.
        let created: InviteCreated =
            self.stranger.call(self.registry, INVITE_CREATE, &request, SECOND).await.expect("made");
        created.invite.parse().expect("well formed")
    }

    async fn join(&self, client: &Client, invite: &Invite) -> Result<Enrolment, JoinError> {
        Enrolment::redeem(client, invite, "", &*self.clock).await
    }

    /// Makes a node a member and returns its client.
    async fn member(&self, seed: u8) -> Client {
        let client = self.newcomer(seed);
        let enrolment = self.join(&client, &self.invite().await).await.expect("joined");
        let path = self.folder.path().join(format!("{seed}.json"));
        let membership = enrolment.membership(&path, key(seed).public_key(), self.clock.clone()).expect("good");
        Client::new(self.network.node(&key(seed))).with_membership(membership)
    }

    fn pass(&self, time: Duration) {
        self.clock.0.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn an_invite_makes_a_node_a_member_with_what_it_allows() {
    let test = test().await;
    let invite = test.invite().await;
    assert_eq!((invite.registry, invite.pool), (test.registry, test.authority.pool()));
    assert_eq!(
        (invite.roles.clone(), invite.bootstrap.clone()),
        (vec![NodeRole::Worker], vec!["192.0.2.1:49737".into()])
    );
    let newcomer = test.newcomer(10);
    assert_eq!(
        code(newcomer.call::<_, Catalog>(test.registry, CATALOG_LIST, &Empty {}, SECOND).await),
        ErrorCode::NotEnrolled
    );

    let enrolment = test.join(&newcomer, &invite).await.expect("joined");
    let own_key = key(10).public_key();
    let certificate =
        Certificate::verify(&enrolment.certificate, invite.pool, own_key, test.clock.now()).expect("good");
    assert_eq!(certificate.roles, [NodeRole::Worker]);
    assert_eq!(certificate.regions.len(), 1);
    assert_eq!(certificate.models.len(), 1);
    assert_eq!(certificate.not_after, test.clock.now().after(CERTIFICATE_LIFE));

    let path = test.folder.path().join("enrolment.json");
    let membership = enrolment.membership(&path, own_key, test.clock.clone()).expect("good");
    let member = Client::new(test.network.node(&key(10))).with_membership(membership);
    member.call::<_, Catalog>(test.registry, CATALOG_LIST, &Empty {}, SECOND).await.expect("a member may ask");
    // Clients' tokens are the gateways' business.
    let check = TokenCheck { token: String::new() };
    assert_eq!(
        code(member.call::<_, TokenGrant>(test.registry, TOKEN_CHECK, &check, SECOND).await),
        ErrorCode::NotEnrolled
    );
    // The registry shows its own certificate.
    member.meet(test.registry, SECOND).await.expect("met");
    assert!(member.membership().has_role(test.registry, NodeRole::Registry));
}

#[tokio::test]
async fn an_invite_brings_one_node_in_and_that_node_may_ask_again() {
    let test = test().await;
    let invite = test.invite().await;
    let first = test.newcomer(10);
    let one = test.join(&first, &invite).await.expect("joined");
    assert_eq!(joined_code(test.join(&test.newcomer(11), &invite).await), ErrorCode::InviteUsed);
    // Its reply may have been lost.
    let again = test.join(&first, &invite).await.expect("the same node");
    assert_ne!(again.certificate, one.certificate);
}

#[tokio::test]
async fn wrong_expired_and_unknown_invites_are_refused_each_with_its_own_code() {
    let test = test().await;
    let (invite, newcomer) = (test.invite().await, test.newcomer(10));
    let unknown = Invite { id: InviteId([0; 8]), ..invite.clone() };
    assert_eq!(joined_code(test.join(&newcomer, &unknown).await), ErrorCode::InviteUnknown);
    let wrong = Invite { secret: InviteSecret([0; 24]), ..invite.clone() };
    assert_eq!(joined_code(test.join(&newcomer, &wrong).await), ErrorCode::InviteWrongSecret);
    let garbled = InviteRedeem { invite_id: invite.id, secret: "x".into(), name: String::new() };
    let refused = newcomer.call::<_, Enrolled>(test.registry, INVITE_REDEEM, &garbled, SECOND).await;
    assert_eq!(code(refused), ErrorCode::InviteWrongSecret);
    test.pass(HOUR * 24);
    let outcome = test.join(&newcomer, &invite).await;
    assert!(matches!(outcome, Err(JoinError::Ended)), "{outcome:?}");
    // A node whose clock is behind learns it from the registry.
    let fresh = Invite { expires_at: test.clock.now().after(HOUR), ..invite };
    assert_eq!(joined_code(test.join(&newcomer, &fresh).await), ErrorCode::InviteExpired);
    assert_eq!(test.authority.nodes().await.expect("readable").nodes.len(), 2, "the gateway and the registry");
}

#[tokio::test]
async fn whoever_guesses_at_invites_is_slowed_down() {
    let test = test().await;
    let invite = test.invite().await;
    let wrong = Invite { secret: InviteSecret([0; 24]), ..invite.clone() };
    let guesser = test.newcomer(10);
    let mut codes = vec![];
    for _ in 0..20 {
        codes.push(joined_code(test.join(&guesser, &wrong).await));
    }
    assert_eq!(codes.iter().filter(|code| **code == ErrorCode::RateLimitExceeded).count(), 10);
    test.join(&test.newcomer(11), &invite).await.expect("another node is not held up");
}

#[tokio::test]
async fn strangers_with_wrong_secrets_lock_out_no_operator_and_no_invite() {
    let test = test().await;
    let (invite, token) = (test.invite().await, test.token(&[Scope::Admin]).await);
    let bogus = InviteRedeem { invite_id: InviteId([0; 8]), secret: "x".into(), name: String::new() };
    let mut limited = 0;
    for stranger in 100..160 {
        let stranger = test.newcomer(stranger);
        for _ in 0..10 {
            let refused = stranger.call::<_, Enrolled>(test.registry, INVITE_REDEEM, &bogus, SECOND).await;
            limited += u32::from(code(refused) == ErrorCode::RateLimitExceeded);
            let request = OperatorRequest { token: "nonsense".into() };
            let refused = stranger.call::<_, NodeList>(test.registry, NODE_LIST, &request, SECOND).await;
            limited += u32::from(code(refused) == ErrorCode::RateLimitExceeded);
        }
    }
    assert_eq!(limited, 0, "each key has its own ten attempts of each kind");

    let revoke = NodeRevoke { token, public_key: key(50).public_key() };
    let revoked = test.stranger.call::<_, NodeRevoked>(test.registry, NODE_REVOKE, &revoke, SECOND).await;
    assert!(!revoked.expect("an operator's token is right").found);
    test.join(&test.newcomer(10), &invite).await.expect("an invite's secret is right");
}

#[tokio::test]
async fn only_an_operators_token_makes_invites_revokes_and_lists() {
    let test = test().await;
    let infer = test.token(&[Scope::Infer]).await;
    for (token, expected) in [(infer, ErrorCode::InsufficientScope), ("nonsense".into(), ErrorCode::InvalidApiKey)] {
        let invite = InviteCreate {
            token: token.clone(),
            roles: vec![NodeRole::Worker],
            regions: vec![],
            models: vec![],
            name: String::new(),
            valid_secs: None,
            bootstrap: vec![],
        };
        assert_eq!(code(test.ask::<InviteCreated>(INVITE_CREATE, &invite).await), expected);
        let revoke = NodeRevoke { token: token.clone(), public_key: test.registry };
        assert_eq!(code(test.ask::<NodeRevoked>(NODE_REVOKE, &revoke).await), expected);
        assert_eq!(code(test.ask::<NodeList>(NODE_LIST, &OperatorRequest { token }).await), expected);
    }
    // Wrong tokens are counted by key.
    let request = OperatorRequest { token: "nonsense".into() };
    let mut limited = 0;
    for _ in 0..20 {
        limited += u32::from(code(test.ask::<NodeList>(NODE_LIST, &request).await) == ErrorCode::RateLimitExceeded);
    }
    assert!(limited > 0);
}

#[tokio::test]
async fn an_invite_that_makes_no_sense_is_refused_by_its_field() {
    let test = test().await;
    let good = InviteCreate {
        token: String::new(),
        roles: vec![NodeRole::Worker],
        regions: vec![],
        models: vec![],
        name: String::new(),
        valid_secs: Some(60),
        bootstrap: vec![],
    };
    test.authority.invite(good.clone()).await.expect("made");
    for (request, field) in [
        (InviteCreate { roles: vec![], ..good.clone() }, "roles"),
        (InviteCreate { roles: vec![NodeRole::Worker, NodeRole::Registry], ..good.clone() }, "roles"),
        (InviteCreate { valid_secs: Some(0), ..good.clone() }, "validSecs"),
        (InviteCreate { valid_secs: Some(86_401), ..good.clone() }, "validSecs"),
        (InviteCreate { bootstrap: vec!["nowhere".into()], ..good.clone() }, "bootstrap"),
        (InviteCreate { name: "x".repeat(65), ..good.clone() }, "name"),
        (InviteCreate { name: "\u{1b}[2J".into(), ..good.clone() }, "name"),
        (InviteCreate { models: vec!["m".parse().expect("name"); 257], ..good }, "models"),
    ] {
        let error = test.authority.invite(request).await.expect_err("refused").to_string();
        assert!(error.starts_with(field), "{error}");
    }
}

#[tokio::test]
async fn a_member_gets_its_next_certificate_and_nobody_else_does() {
    let test = test().await;
    let member = test.member(10).await;
    let before = member.membership().own().expect("a member");
    test.pass(HOUR * 24 * 20);
    let renewed: Enrolled = member.call(test.registry, CERTIFICATE_RENEW, &Empty {}, SECOND).await.expect("renewed");
    member.membership().renew(renewed.certificate).expect("good");
    let after = member.membership().own().expect("a member");
    assert!(after.serial > before.serial && after.not_after > before.not_after);
    assert_eq!((&after.roles, &after.regions, &after.models), (&before.roles, &before.regions, &before.models));
    let stranger = test.stranger.call::<_, Enrolled>(test.registry, CERTIFICATE_RENEW, &Empty {}, SECOND).await;
    assert_eq!(code(stranger), ErrorCode::NotEnrolled);
    // Twenty days later the first one has ended, and the second one goes on.
    test.pass(HOUR * 24 * 20);
    member.call::<_, Catalog>(test.registry, CATALOG_LIST, &Empty {}, SECOND).await.expect("still a member");
    test.pass(HOUR * 24 * 20);
    assert_eq!(
        code(member.call::<_, Enrolled>(test.registry, CERTIFICATE_RENEW, &Empty {}, SECOND).await),
        ErrorCode::NotEnrolled
    );
}

#[tokio::test]
async fn a_revoked_node_is_out_at_once_for_good_and_everybody_is_told() {
    let test = test().await;
    let (member, other) = (test.member(10).await, test.member(11).await);
    let expelled = key(10).public_key();
    let state = |version| PoolStateRequest { version };
    let at_first: PoolState = other.call(test.registry, POOL_STATE, &state(0), SECOND).await.expect("told");
    assert_eq!((at_first.version, at_first.revocations), (0, None));
    let stamp = RevocationStamp::verify(&at_first.stamp.expect("a stamp"), test.authority.pool()).expect("valid");
    assert_eq!((stamp.version, stamp.issued_at), (0, test.clock.now()));
    member.call::<_, Catalog>(test.registry, CATALOG_LIST, &Empty {}, SECOND).await.expect("a member");

    let token = test.token(&[Scope::Admin]).await;
    let request = NodeRevoke { token: token.clone(), public_key: expelled };
    let revoked: NodeRevoked = test.ask(NODE_REVOKE, &request).await.expect("revoked");
    assert!(revoked.found);
    let pool: PoolState = other.call(test.registry, POOL_STATE, &state(0), SECOND).await.expect("told");
    let list = RevocationList::verify(&pool.revocations.expect("news"), test.authority.pool()).expect("good");
    assert_eq!((list.version, list.keys.into_iter().collect::<Vec<_>>()), (revoked.version, vec![expelled]));
    let known: PoolState = other.call(test.registry, POOL_STATE, &state(revoked.version), SECOND).await.expect("told");
    assert_eq!(known.revocations, None);

    tokio::time::sleep(SECOND / 10).await;
    for method in [CATALOG_LIST, CERTIFICATE_RENEW] {
        let refused = member.call::<_, Empty>(test.registry, method, &Empty {}, SECOND).await;
        assert_eq!(code(refused), ErrorCode::NodeRevoked, "{method}");
    }
    // A new invite does not bring the same key back.
    let invite = test.invite().await;
    assert_eq!(joined_code(test.join(&member, &invite).await), ErrorCode::NodeRevoked);
    test.join(&test.newcomer(12), &invite).await.expect("the invite is not used up by that");
    let nodes = test.ask::<NodeList>(NODE_LIST, &OperatorRequest { token }).await.expect("listed").nodes;
    let of = |key: PublicKey| nodes.iter().find(|node| node.public_key == key).expect("listed");
    assert!(of(expelled).revoked_at.is_some() && of(key(11).public_key()).revoked_at.is_none());
    assert_eq!(of(key(12).public_key()).name, "the box under the test");
}

#[tokio::test]
async fn a_key_that_was_never_admitted_can_be_expelled_and_the_list_forgets_it_in_time() {
    let test = test().await;
    // The registry has certified itself before time passes.
    test.invite().await;
    let lost = key(50).public_key();
    let first = test.authority.revoke(lost).await.expect("revoked");
    assert!(!first.found);
    let list = |signed| RevocationList::verify(&signed, test.authority.pool()).expect("good");
    assert!(list(test.authority.revocations().await.expect("made")).keys.contains(&lost));
    test.pass(CERTIFICATE_LIFE + HOUR * 25);
    let second = test.authority.revoke(key(51).public_key()).await.expect("revoked");
    assert!(second.version > first.version);
    let later = list(test.authority.revocations().await.expect("made"));
    assert!(!later.keys.contains(&lost), "its certificate, if it had one, ended long ago");
    // It is refused all the same.
    assert_eq!(joined_code(test.join(&test.newcomer(50), &test.invite().await).await), ErrorCode::NodeRevoked);
}

#[tokio::test]
async fn the_store_never_holds_an_invites_secret() {
    let test = test().await;
    let invite = test.invite().await;
    test.store.close().await.expect("closed");
    let (raw, hex) = (invite.secret.0.to_vec(), invite.secret.to_hex().into_bytes());
    for file in std::fs::read_dir(test.folder.path()).expect("a folder") {
        let bytes = std::fs::read(file.expect("a file").path()).expect("readable");
        assert!(
            ![&raw, &hex].iter().any(|secret| bytes.windows(secret.len()).any(|window| window == secret.as_slice()))
        );
    }
}

#[tokio::test]
async fn another_pools_root_admits_nobody_here() {
    let test = test().await;
    let (pretender, node) = (key(101), key(20));
    let certificate = Certificate {
        pool: pretender.public_key(),
        public_key: node.public_key(),
        ..Certificate::verify(
            &test
                .authority
                .certify(node.public_key(), tether_registry::Grant::of(NodeRole::Gateway, "g"))
                .await
                .expect("issued"),
            test.authority.pool(),
            node.public_key(),
            test.clock.now(),
        )
        .expect("good")
    };
    let signed = certificate.sign(&pretender);
    let foreign =
        Membership::new(pretender.public_key(), node.public_key(), signed, test.clock.clone()).expect("good there");
    let client = Client::new(test.network.node(&node)).with_membership(foreign);
    assert_eq!(
        code(client.call::<_, Catalog>(test.registry, CATALOG_LIST, &Empty {}, SECOND).await),
        ErrorCode::NotEnrolled
    );
}
