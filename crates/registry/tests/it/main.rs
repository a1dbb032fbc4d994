//! The registry as other nodes see it.

mod membership;
mod models;
mod offers;
mod policies;
mod timing;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metadata_store::{RegistryStore, SqliteStore, StoreOptions};
use protocol::control::{
    ADAPTER_ADD, ADAPTER_REMOVE, AdapterAdd, AdapterRemove, AdapterRemoved, ByOperator, CATALOG_LIST, Catalog, Empty,
    NodeRole, OPERATOR_TOKEN_CREATE, OPERATOR_TOKEN_LIST, OPERATOR_TOKEN_REVOKE, OperatorRequest, POLICY_GET,
    PolicyRequest, Scope, TOKEN_CHECK, TokenCheck, TokenCreate, TokenCreated, TokenGrant, TokenList, TokenRevoke,
    TokenRevoked,
};
use protocol::model::{AdapterEntry, ModelEntry, ModelKey};
use protocol::policy::TenantPolicy;
use protocol::signature::NodeKey;
use protocol::{Clock, Digest, ErrorCode, PublicKey, TenantId, UnixMillis, WireError};
use rpc::{CallError, Client, Membership, MemoryNetwork};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tether_registry::{
    CertificateAuthority, CertificateAuthorityParts, Grant, Pepper, Registry, RegistryParts, TokenIssuer, catalog,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

struct SetClock(AtomicU64);

impl Clock for SetClock {
    fn now(&self) -> UnixMillis {
        UnixMillis(self.0.load(Ordering::SeqCst))
    }
}

struct TestRegistry {
    network: MemoryNetwork,
    client: Client,
    stranger: Client,
    registry: PublicKey,
    tokens: TokenIssuer,
    authority: CertificateAuthority,
    store: Arc<dyn RegistryStore>,
    clock: Arc<SetClock>,
    folder: tempfile::TempDir,
    _tasks: TaskTracker,
}

async fn test() -> TestRegistry {
    let folder = tempfile::tempdir().expect("a folder");
    let store = SqliteStore::open(folder.path().join("registry.db"), StoreOptions::default()).expect("opened");
    let store: Arc<dyn RegistryStore> = Arc::new(store);
    let clock = Arc::new(SetClock(AtomicU64::new(1_000_000)));
    let network = MemoryNetwork::new();
    let gateway = NodeKey::from_seed(&[2; 32]);
    let transport = network.node(&NodeKey::from_seed(&[1; 32]));
    let registry = transport.public_key();
    let root = NodeKey::from_seed(&[100; 32]);
    let parts = CertificateAuthorityParts::new(root, store.clone(), clock.clone(), Pepper([9; 32]), registry);
    let authority =
        CertificateAuthority::new(CertificateAuthorityParts { bootstrap: vec!["192.0.2.1:49737".into()], ..parts });
    let certificate = authority.certify(gateway.public_key(), Grant::of(NodeRole::Gateway, "gateway")).await;
    let certificate = certificate.expect("issued");
    let member = Membership::new(authority.pool(), gateway.public_key(), certificate, clock.clone()).expect("good");
    let parts = RegistryParts {
        transport,
        region: "local".parse().expect("region"),
        clock: clock.clone(),
        store: store.clone(),
        artifacts: None,
        pepper: Pepper([9; 32]),
        authority: authority.clone(),
        version: "0".into(),
    };
    let tasks = TaskTracker::new();
    tasks.spawn(async move { Registry::run(parts, CancellationToken::new()).await.expect("runs") });
    TestRegistry {
        client: Client::new(network.node(&gateway)).with_membership(member),
        network: network.clone(),
        authority,
        stranger: Client::new(network.node(&NodeKey::from_seed(&[3; 32]))),
        registry,
        tokens: TokenIssuer::new(store.clone(), clock.clone(), Pepper([9; 32])),
        store,
        clock,
        folder,
        _tasks: tasks,
    }
}

impl TestRegistry {
    async fn ask<Reply: DeserializeOwned>(&self, method: &str, request: &impl Serialize) -> Result<Reply, CallError> {
        self.client.call(self.registry, method, request, Duration::from_secs(5)).await
    }

    /// Asks as an operator whose node belongs to no network.
    async fn operate<Reply: DeserializeOwned>(
        &self,
        method: &str,
        request: impl Serialize,
    ) -> Result<Reply, CallError> {
        let new = TokenCreate { scopes: vec![Scope::Admin], ..new_token(None) };
        let token = self.tokens.issue(new).await.expect("issued").token;
        let asked = ByOperator { token, request };
        self.stranger.call(self.registry, method, &asked, Duration::from_secs(5)).await
    }

    async fn check(&self, token: &str) -> Result<TokenGrant, CallError> {
        self.ask(TOKEN_CHECK, &TokenCheck { token: token.to_owned() }).await
    }
}

fn tenant() -> TenantId {
    "acme".parse().expect("tenant")
}

fn new_token(expires_at: Option<UnixMillis>) -> TokenCreate {
    let (name, scopes) = ("laptop".to_owned(), vec![Scope::Infer]);
    TokenCreate { tenant_id: tenant(), name, scopes, expires_at, requests_per_minute: None }
}

fn is_refused(outcome: &Result<TokenGrant, CallError>) -> bool {
    matches!(outcome, Err(CallError::Remote(WireError { code: ErrorCode::InvalidApiKey, .. })))
}

#[tokio::test]
async fn an_issued_token_is_good_for_its_tenant_and_scopes() {
    let test = test().await;
    let policy = TenantPolicy { requests_per_minute: Some(7), ..TenantPolicy::default() };
    test.store.put_policy(&tenant(), &policy).await.expect("kept");
    let token = test.tokens.issue(new_token(None)).await.expect("issued");
    let grant = test.check(&token.token).await.expect("good");
    assert_eq!(grant.tenant_id, tenant());
    assert_eq!(grant.scopes, [Scope::Infer]);
    assert_eq!(grant.policy, policy);
    assert_eq!(grant.key_id, token.key_id);
}

#[tokio::test]
async fn the_store_never_holds_the_secret() {
    let test = test().await;
    let token = test.tokens.issue(new_token(None)).await.expect("issued");
    test.store.close().await.expect("closed");
    for file in std::fs::read_dir(test.folder.path()).expect("a folder") {
        let bytes = std::fs::read(file.expect("a file").path()).expect("readable");
        let secret = &token.token.as_bytes()[18..];
        assert!(!bytes.windows(secret.len()).any(|window| window == secret));
    }
}

#[tokio::test]
async fn a_wrong_a_revoked_and_an_expired_token_are_refused_alike() {
    let test = test().await;
    let now = test.clock.now();
    let revoked = test.tokens.issue(new_token(None)).await.expect("issued");
    assert!(test.tokens.revoke(&revoked.key_id).await.expect("revoked").found);
    let expiring = test.tokens.issue(new_token(Some(now.after(Duration::from_mins(1))))).await.expect("issued");
    assert!(test.check(&expiring.token).await.is_ok());
    test.clock.0.store(now.0 + 60_000, Ordering::SeqCst);

    // Issued under another pepper: well formed, of a known shape, and never of this registry.
    let other = TokenIssuer::new(test.store.clone(), test.clock.clone(), Pepper([8; 32]));
    let foreign = other.issue(new_token(None)).await.expect("issued");

    let mut messages = std::collections::HashSet::new();
    for text in [revoked.token, expiring.token, foreign.token, "nonsense".into()] {
        let outcome = test.check(&text).await;
        assert!(is_refused(&outcome), "{outcome:?}");
        messages.insert(outcome.expect_err("refused").to_string());
    }
    assert_eq!(messages.len(), 1, "{messages:?}");
}

#[tokio::test]
async fn a_model_version_never_changes_its_artifact() {
    let test = test().await;
    let entry = |digest| ModelEntry {
        facts: None,
        added: false,
        pin: false,
        keep_alive_secs: None,
        key: ModelKey { model_id: "m".parse().expect("name"), version: "1.0".parse().expect("version") },
        digest: Digest([digest; 32]),
        bytes: 1,
        context_length: 512,
        description: String::new(),
        created_at: UnixMillis(1),
    };
    catalog::register(&*test.store, vec![entry(1)]).await.expect("registered");
    catalog::register(&*test.store, vec![entry(1)]).await.expect("the same again is fine");
    assert!(catalog::register(&*test.store, vec![entry(2)]).await.is_err());
    let listed: Catalog = test.ask(CATALOG_LIST, &Empty {}).await.expect("listed");
    assert_eq!(listed.models, [entry(1)]);
}

#[tokio::test]
async fn adapters_are_added_listed_and_forgotten_over_the_network() {
    let test = test().await;
    let version = |text: &str| text.parse().expect("version");
    let name = || "m".parse().expect("name");
    let models = ["1.9", "1.10"].map(|text| ModelEntry {
        facts: None,
        added: false,
        pin: false,
        keep_alive_secs: None,
        key: ModelKey { model_id: name(), version: version(text) },
        digest: Digest([1; 32]),
        bytes: 1,
        context_length: 512,
        description: String::new(),
        created_at: UnixMillis(1),
    });
    catalog::register(&*test.store, models.to_vec()).await.expect("registered");
    let new = AdapterAdd {
        model_id: name(),
        version: None,
        adapter: "pirate".parse().expect("name"),
        digest: Digest([2; 32]),
        bytes: 7,
        description: "Arr!".into(),
    };
    let added: AdapterEntry = test.operate(ADAPTER_ADD, &new).await.expect("added");
    assert_eq!(added.key.to_string(), "m@1.10:pirate", "of the newest version");
    assert_eq!(added.created_at, test.clock.now());
    let listed: Catalog = test.ask(CATALOG_LIST, &Empty {}).await.expect("listed");
    assert_eq!(listed.adapters, [added]);

    let other = AdapterAdd { digest: Digest([3; 32]), ..new.clone() };
    let of_nothing = AdapterAdd { model_id: "nothing".parse().expect("name"), ..new.clone() };
    let of_no_version = AdapterAdd { version: Some(version("9.0")), ..new.clone() };
    for (refused, code) in [
        (other, ErrorCode::InvalidValue),
        (of_nothing, ErrorCode::ModelNotFound),
        (of_no_version, ErrorCode::ModelNotFound),
    ] {
        let refusal = test.operate::<AdapterEntry>(ADAPTER_ADD, &refused).await.expect_err("refused");
        assert!(matches!(&refusal, CallError::Remote(error) if error.code == code), "{refusal}");
    }

    let old = AdapterRemove { model_id: name(), version: None, adapter: new.adapter };
    assert!(test.operate::<AdapterRemoved>(ADAPTER_REMOVE, &old).await.expect("answered").found);
    assert!(!test.operate::<AdapterRemoved>(ADAPTER_REMOVE, &old).await.expect("answered").found);
}

#[tokio::test]
async fn a_node_that_is_not_enrolled_learns_nothing() {
    let test = test().await;
    let token = test.tokens.issue(new_token(None)).await.expect("issued");
    let check = TokenCheck { token: token.token };
    let rules = PolicyRequest { tenant_id: tenant() };
    let deadline = Duration::from_secs(5);
    let refusals = [
        test.stranger.call::<_, TokenGrant>(test.registry, TOKEN_CHECK, &check, deadline).await.err(),
        test.stranger.call::<_, Catalog>(test.registry, CATALOG_LIST, &Empty {}, deadline).await.err(),
        test.stranger.call::<_, TenantPolicy>(test.registry, POLICY_GET, &rules, deadline).await.err(),
    ];
    for refusal in refusals {
        assert!(
            matches!(&refusal, Some(CallError::Remote(WireError { code: ErrorCode::NotEnrolled, .. }))),
            "{refusal:?}"
        );
    }
}

#[tokio::test]
async fn tokens_are_issued_listed_and_revoked_over_the_network() {
    let test = test().await;
    let new = TokenCreate { requests_per_minute: Some(9), ..new_token(None) };
    let created: TokenCreated = test.operate(OPERATOR_TOKEN_CREATE, &new).await.expect("issued");
    let grant = test.check(&created.token).await.expect("good");
    assert_eq!(grant.policy.requests_per_minute, Some(9));
    let token = test.tokens.issue(TokenCreate { scopes: vec![Scope::Admin], ..new_token(None) }).await;
    let request = OperatorRequest { token: token.expect("issued").token };
    let listed: TokenList = test.ask(OPERATOR_TOKEN_LIST, &request).await.expect("listed");
    assert!(listed.tokens.iter().any(|token| token.key_id == created.key_id), "{listed:?}");
    let revoke = TokenRevoke { key_id: created.key_id };
    assert!(test.operate::<TokenRevoked>(OPERATOR_TOKEN_REVOKE, &revoke).await.expect("revoked").found);
    assert!(is_refused(&test.check(&created.token).await));
    let nobody = TokenRevoke { key_id: "nobody00".into() };
    assert!(!test.operate::<TokenRevoked>(OPERATOR_TOKEN_REVOKE, &nobody).await.expect("answered").found);
}
