//! Every call of the registry, made by every kind of node with every kind of API token.

use std::cell::Cell;
use std::collections::BTreeMap;

use metadata_store::{SqliteStore, StoreOptions};
use protocol::signature::NodeKey;
use protocol::{PublicKey, UnixMillis, codec};
use rpc::{CallError, Client, MemoryNetwork, StreamOptions};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::task::TaskTracker;

use super::*;
use crate::certificate_authority::CertificateAuthorityParts;

const WITHIN: Duration = Duration::from_secs(5);

struct FixedClock;

impl Clock for FixedClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(1_000_000)
    }
}

/// Who may make a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Anyone,
    Member,
    Only(NodeRole),
    /// Whoever brings the token of an operator.
    Operator,
}

/// The kinds of nodes that call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stranger,
    Certified(NodeRole),
    /// It was a gateway.
    Revoked,
}

const KINDS: [Kind; 6] = [
    Kind::Stranger,
    Kind::Certified(NodeRole::Gateway),
    Kind::Certified(NodeRole::Orchestrator),
    Kind::Certified(NodeRole::Registry),
    Kind::Certified(NodeRole::Worker),
    Kind::Revoked,
];

/// Every call with who may make it, and a request that is well formed. Requests of operators get a token besides.
fn calls() -> BTreeMap<&'static str, (Who, Value)> {
    let node = PublicKey([99; 32]);
    let model = json!({ "modelId": "m" });
    let by_operator = |request: Value| (Who::Operator, json!({ "request": request }));
    let token = json!({ "tenantId": "acme", "name": "n", "scopes": ["infer"] });
    let add = json!({ "modelId": "m", "digest": protocol::Digest([1; 32]), "bytes": 1, "contextLength": 512 });
    let adapter =
        json!({ "modelId": "m", "adapter": "a", "digest": protocol::Digest([1; 32]), "bytes": 1, "description": "" });
    let offer = json!({ "modelId": "m", "version": "1.0", "server": "s", "contextLength": 512 });
    BTreeMap::from([
        (CLOCK_READ, (Who::Anyone, json!({}))),
        (INVITE_REDEEM, (Who::Anyone, json!({ "inviteId": protocol::InviteId([0; 8]), "secret": "" }))),
        (CERTIFICATE_RENEW, (Who::Member, json!({}))),
        (POOL_STATE, (Who::Member, json!({ "version": 0 }))),
        (CATALOG_LIST, (Who::Member, json!({}))),
        (MODEL_OFFER, (Who::Only(NodeRole::Worker), offer)),
        (FETCH, (Who::Only(NodeRole::Worker), json!({ "digest": protocol::Digest([1; 32]) }))),
        (TOKEN_CHECK, (Who::Only(NodeRole::Gateway), json!({}))),
        (POLICY_GET, (Who::Only(NodeRole::Orchestrator), json!({ "tenantId": "acme" }))),
        (INVITE_CREATE, (Who::Operator, json!({ "roles": ["worker"] }))),
        (NODE_REVOKE, (Who::Operator, json!({ "publicKey": node }))),
        (NODE_LIST, (Who::Operator, json!({}))),
        (NODE_RENAME, (Who::Operator, json!({ "publicKey": node, "name": "n" }))),
        (OPERATOR_TOKEN_CREATE, by_operator(token)),
        (OPERATOR_TOKEN_LIST, (Who::Operator, json!({}))),
        (OPERATOR_TOKEN_REVOKE, by_operator(json!({ "keyId": "abcdefgh" }))),
        (OPERATOR_CHECK, (Who::Operator, json!({}))),
        (OPERATOR_CATALOG_LIST, (Who::Operator, json!({}))),
        (MODEL_ADD, by_operator(add)),
        (MODEL_REMOVE, by_operator(model.clone())),
        (MODEL_KEEP, by_operator(model)),
        (ALIAS_SET, by_operator(json!({ "alias": "b", "target": "m" }))),
        (ALIAS_REMOVE, by_operator(json!({ "alias": "b" }))),
        (ADAPTER_ADD, by_operator(adapter)),
        (ADAPTER_REMOVE, by_operator(json!({ "modelId": "m", "adapter": "a" }))),
        (OPERATOR_POLICY_GET, by_operator(json!({ "tenantId": "acme" }))),
        (OPERATOR_POLICY_SET, by_operator(json!({ "tenantId": "acme", "policy": { "tokensPerDay": 5 } }))),
        (OPERATOR_POLICY_LIST, (Who::Operator, json!({}))),
    ])
}

struct Scene {
    network: MemoryNetwork,
    registry: Arc<Registry>,
    tokens: TokenIssuer,
    keys: Cell<u32>,
    folder: TempDir,
    tasks: TaskTracker,
}

impl Scene {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = SqliteStore::open(folder.path().join("registry.db"), StoreOptions::default()).expect("opened");
        let (store, clock): (Arc<dyn RegistryStore>, Arc<dyn Clock>) = (Arc::new(store), Arc::new(FixedClock));
        let (network, pepper) = (MemoryNetwork::new(), Pepper([9; 32]));
        let transport = network.node(&NodeKey::from_seed(&[1; 32]));
        let root = NodeKey::from_seed(&[100; 32]);
        let own_key = transport.public_key();
        let authority = CertificateAuthority::new(CertificateAuthorityParts::new(
            root,
            store.clone(),
            clock.clone(),
            pepper.clone(),
            own_key,
        ));
        let certificate = authority.certify(own_key, own_grant()).await.expect("issued");
        let membership = Membership::new(authority.pool(), own_key, certificate, clock.clone()).expect("valid");
        let tokens = TokenIssuer::new(store.clone(), clock.clone(), pepper.clone());
        let (region, version): (Region, _) = ("local".parse().expect("a region"), "0".to_owned());
        let artifacts = None;
        let parts = RegistryParts { transport, region, clock, store, artifacts, pepper, authority, version };
        let operator_checks = SecretChecks::new();
        let offered = tokio::sync::Mutex::default();
        let registry =
            Arc::new(Registry { parts, tokens: tokens.clone(), operator_checks, membership, artifacts: None, offered });
        let tasks = TaskTracker::new();
        let server = registry.serve(registry.server());
        tasks.spawn(server.run(CancellationToken::new(), DRAIN));
        Self { network, registry, tokens, keys: Cell::new(0), folder, tasks }
    }

    /// A node with a key of its own, so that its wrong tokens are counted apart.
    async fn node(&self, kind: Kind) -> Client {
        self.keys.set(self.keys.get() + 1);
        let mut seed = [7; 32];
        seed[..4].copy_from_slice(&self.keys.get().to_le_bytes());
        let key = NodeKey::from_seed(&seed);
        let client = Client::new(self.network.node(&key));
        let role = match kind {
            Kind::Stranger => return client,
            Kind::Certified(role) => role,
            Kind::Revoked => NodeRole::Gateway,
        };
        let (authority, own_key) = (&self.registry.parts.authority, key.public_key());
        let certificate = authority.certify(own_key, Grant::of(role, "node")).await.expect("issued");
        let membership = Membership::new(authority.pool(), own_key, certificate, Arc::new(FixedClock)).expect("valid");
        if kind == Kind::Revoked {
            authority.revoke(own_key).await.expect("revoked");
            self.registry.take_revocations().await.expect("taken");
        }
        client.with_membership(membership)
    }

    async fn token(&self, scopes: &[Scope]) -> TokenCreated {
        let (name, scopes) = ("n".to_owned(), scopes.to_vec());
        let tenant_id = "acme".parse().expect("a tenant");
        let new = TokenCreate { tenant_id, name, scopes, expires_at: None, requests_per_minute: None };
        self.tokens.issue(new).await.expect("issued")
    }

    /// Makes a call, and returns the code of its refusal if it was refused for who makes it.
    async fn is_denied(&self, caller: &Client, method: &'static str, request: &Value) -> Option<ErrorCode> {
        let (registry, deadline) = (self.registry.parts.transport.public_key(), WITHIN);
        let outcome = if method == FETCH {
            let options = StreamOptions { accept_within: WITHIN, deadline: Some(WITHIN), stall: WITHIN };
            caller.open_stream(registry, method, codec::encode(request).into(), options).await.map(drop)
        } else {
            caller.call::<_, Value>(registry, method, request, deadline).await.map(drop)
        };
        let code = match outcome {
            Ok(()) => return None,
            Err(CallError::Remote(error)) => error.code,
            Err(error) => panic!("{method} is answered: {error}"),
        };
        let denials = [
            ErrorCode::NotEnrolled,
            ErrorCode::NodeRevoked,
            ErrorCode::InvalidApiKey,
            ErrorCode::InsufficientScope,
            ErrorCode::UnknownMethod,
        ];
        denials.contains(&code).then_some(code)
    }
}

#[tokio::test]
async fn every_call_says_who_may_make_it() {
    let scene = Scene::new().await;
    let server = scene.registry.serve(scene.registry.server());
    let served: BTreeMap<_, _> = server.methods().filter(|(name, _)| !name.starts_with("node.")).collect();
    let expected = calls();
    assert_eq!(served.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, access) in served {
        let expected = match expected[name].0 {
            Who::Anyone | Who::Operator => Access::Anyone,
            Who::Member => Access::Members,
            Who::Only(role) => Access::Role(role),
        };
        assert_eq!(*access, expected, "{name}");
    }
}

#[tokio::test]
async fn a_call_is_made_by_those_it_is_for_and_by_nobody_else() {
    let scene = Scene::new().await;
    let (infer, admin) = (scene.token(&[Scope::Infer]).await, scene.token(&[Scope::Infer, Scope::Admin]).await);
    let revoked = scene.token(&[Scope::Admin]).await;
    scene.tokens.revoke(&revoked.key_id).await.expect("revoked");
    let tokens = [
        ("", Some(ErrorCode::InvalidApiKey)),
        ("nonsense", Some(ErrorCode::InvalidApiKey)),
        (&revoked.token, Some(ErrorCode::InvalidApiKey)),
        (&infer.token, Some(ErrorCode::InsufficientScope)),
        (&admin.token, None),
    ];
    for (method, (who, request)) in calls() {
        for kind in KINDS {
            for (token, denial_of_token) in tokens {
                let mut request = request.clone();
                // What a gateway asks about a token is not a call of that token's owner.
                request["token"] = json!(if method == TOKEN_CHECK { &infer.token } else { token });
                let has_role = |role: NodeRole| kind == Kind::Certified(role);
                let expected = match (kind, who) {
                    (Kind::Revoked, _) => Some(ErrorCode::NodeRevoked),
                    (_, Who::Operator) => denial_of_token,
                    (Kind::Stranger, Who::Member) => Some(ErrorCode::NotEnrolled),
                    (_, Who::Anyone | Who::Member) => None,
                    (_, Who::Only(role)) => (!has_role(role)).then_some(ErrorCode::NotEnrolled),
                };
                let caller = scene.node(kind).await;
                let denied = scene.is_denied(&caller, method, &request).await;
                assert_eq!(denied, expected, "{method} by {kind:?} with the token {token:?}");
            }
        }
    }
    drop((scene.folder, scene.tasks));
}
