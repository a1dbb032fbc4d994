//! Calls to a registry, introductions, and the files in which a node keeps what it learned.

use std::cell::RefCell;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use metadata_store::{RegistryStore, SqliteStore};
use protocol::control::{
    ADAPTER_ADD, ADAPTER_REMOVE, ALIAS_REMOVE, ALIAS_SET, CATALOG_LIST, CERTIFICATE_RENEW, CLOCK_READ, Hello,
    INVITE_CREATE, INVITE_REDEEM, MODEL_ADD, MODEL_KEEP, MODEL_OFFER, MODEL_REMOVE, NODE_LIST, NODE_RENAME,
    NODE_REVOKE, NodeRole, OPERATOR_CATALOG_LIST, OPERATOR_POLICY_GET, OPERATOR_POLICY_LIST, OPERATOR_POLICY_SET,
    OPERATOR_TOKEN_CREATE, OPERATOR_TOKEN_LIST, OPERATOR_TOKEN_REVOKE, POLICY_GET, POOL_STATE, Scope, TOKEN_CHECK,
    TokenCreate,
};
use protocol::membership::Certificate;
use protocol::signature::NodeKey;
use protocol::{Clock, PublicKey, UnixMillis, codec};
use registry::{CertificateAuthority, CertificateAuthorityParts, Grant, Pepper, Registry, RegistryParts, TokenIssuer};
use rpc::transport::hyperswarm::KnownPeers;
use rpc::{CallError, Client, Enrolment, Membership, MemoryNetwork};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// The calls that admit nodes, name them and expel them.
const ADMISSION: &[&str] =
    &[INVITE_REDEEM, INVITE_CREATE, CERTIFICATE_RENEW, NODE_LIST, NODE_RENAME, NODE_REVOKE, POOL_STATE, CLOCK_READ];
/// The calls about API tokens and what their tenants may do.
const TOKENS: &[&str] = &[
    TOKEN_CHECK,
    OPERATOR_TOKEN_CREATE,
    OPERATOR_TOKEN_LIST,
    OPERATOR_TOKEN_REVOKE,
    POLICY_GET,
    OPERATOR_POLICY_GET,
    OPERATOR_POLICY_SET,
    OPERATOR_POLICY_LIST,
];
/// The calls about models, their aliases and adapters.
const CATALOG: &[&str] = &[
    ADAPTER_ADD,
    ADAPTER_REMOVE,
    MODEL_ADD,
    MODEL_REMOVE,
    MODEL_KEEP,
    MODEL_OFFER,
    ALIAS_SET,
    ALIAS_REMOVE,
    CATALOG_LIST,
    OPERATOR_CATALOG_LIST,
];

/// Calls of one input. Each is a line.
const CALLS_MAX: usize = 16;
const DEADLINE: Duration = Duration::from_secs(5);
/// Stands in an input for the operator's token, which differs from run to run.
const OPERATOR: &str = "OPERATOR";
const NOW: UnixMillis = UnixMillis(1_000_000);

/// Calls that admit nodes, rename them and expel them.
pub fn admission_call(bytes: &[u8]) {
    calls(ADMISSION, bytes);
}

/// Calls that issue, check and revoke API tokens.
pub fn token_call(bytes: &[u8]) {
    calls(TOKENS, bytes);
}

/// Calls that register models, aliases and adapters.
pub fn adapter_call(bytes: &[u8]) {
    calls(CATALOG, bytes);
}

/// An introduction, on a connection of the key that it names and on one of another key.
pub fn hello(bytes: &[u8]) {
    let Ok(hello) = codec::decode::<Hello>(bytes) else { return };
    let Some(signed) = &hello.certificate else { return };
    let Ok(claimed) = codec::decode::<Certificate>(signed.body.as_bytes()) else { return };
    let root = NodeKey::from_seed(&[100; 32]).public_key();
    let clock = Arc::new(At(claimed.not_before));
    if let Ok(membership) = Membership::new(claimed.pool, claimed.public_key, signed.clone(), clock) {
        const SECRET: [u8; 32] = [7; 32];
        let met = membership.meet_caller(claimed.public_key, &SECRET, &hello);
        assert!(met.is_ok() || hello.transcript.is_some(), "what certifies a node introduces it");
        let _ = membership.meet_callee(claimed.public_key, &SECRET, &hello);
        let of_another = membership.meet_caller(root, &SECRET, &hello);
        assert!(claimed.public_key == root || of_another.is_err(), "a certificate is one key's");
    }
}

/// The file of the peers that a node knew in its last run.
pub fn known_peers(bytes: &[u8]) {
    let file = file_of(bytes);
    let known = KnownPeers::read(file.path());
    assert_eq!(KnownPeers::read(file_of(&codec::encode(&known)).path()), known);
}

/// The file of a node's enrolment, up to the membership that comes of it.
pub fn enrolment_file(bytes: &[u8]) {
    let file = file_of(bytes);
    match Enrolment::load(file.path()) {
        Ok(Some(enrolment)) => {
            let own_key = match codec::decode::<Certificate>(enrolment.certificate.body.as_bytes()) {
                Ok(certificate) => certificate.public_key,
                Err(_) => enrolment.registry,
            };
            let _ = enrolment.membership(file.path(), own_key, Arc::new(At(NOW)));
        }
        Ok(None) => unreachable!("the file exists"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Makes the calls of an input at a new registry. The first byte of a line chooses the method, the second the caller,
/// and the rest is the request.
fn calls(methods: &[&str], bytes: &[u8]) {
    thread_local!(static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) });
    RUNTIME.with_borrow_mut(|runtime| {
        let runtime = runtime.get_or_insert_with(|| Builder::new_current_thread().enable_all().build().expect("built"));
        runtime.block_on(async {
            let registry = TestRegistry::start().await;
            for line in bytes.split(|byte| *byte == b'\n').take(CALLS_MAX) {
                let [method, caller, request @ ..] = line else { continue };
                let method = methods[usize::from(*method) % methods.len()];
                registry.call(method, *caller, request).await;
            }
        });
    });
}

struct TestRegistry {
    key: PublicKey,
    callers: Vec<Client>,
    token: String,
    _stop: DropGuard,
}

impl TestRegistry {
    /// Starts a registry in memory, with a gateway, an orchestrator, a worker and a stranger as its callers.
    async fn start() -> Self {
        let store: Arc<dyn RegistryStore> = Arc::new(SqliteStore::in_memory().expect("opened"));
        let clock: Arc<dyn Clock> = Arc::new(At(NOW));
        let network = MemoryNetwork::new();
        let transport = network.node(&NodeKey::from_seed(&[1; 32]));
        let (key, pepper, root) = (transport.public_key(), Pepper([9; 32]), NodeKey::from_seed(&[100; 32]));
        let parts = CertificateAuthorityParts::new(root, store.clone(), clock.clone(), pepper.clone(), key);
        let authority = CertificateAuthority::new(parts);
        let mut callers = vec![Client::new(network.node(&NodeKey::from_seed(&[2; 32])))];
        for (seed, role) in (3..).zip([NodeRole::Gateway, NodeRole::Orchestrator, NodeRole::Worker]) {
            let node = NodeKey::from_seed(&[seed; 32]);
            let certificate = authority.certify(node.public_key(), Grant::of(role, "node")).await.expect("issued");
            let member = Membership::new(authority.pool(), node.public_key(), certificate, clock.clone());
            callers.push(Client::new(network.node(&node)).with_membership(member.expect("good")));
        }
        let new = TokenCreate {
            tenant_id: "acme".parse().expect("a tenant"),
            name: "operator".into(),
            scopes: vec![Scope::Admin],
            expires_at: None,
            requests_per_minute: None,
        };
        let token = TokenIssuer::new(store.clone(), clock.clone(), pepper.clone()).issue(new).await.expect("issued");
        let region = "local".parse().expect("a region");
        let version = "0".to_owned();
        let parts = RegistryParts { transport, region, clock, store, artifacts: None, pepper, authority, version };
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        tasks.spawn(Registry::run(parts, stop.clone()));
        Self { key, callers, token: token.token, _stop: stop.drop_guard() }
    }

    async fn call(&self, method: &str, caller: u8, request: &[u8]) {
        let Ok(request) = std::str::from_utf8(request) else { return };
        let request = request.replace(OPERATOR, &self.token);
        let request = serde_json::from_str(&request).unwrap_or(Value::String(request));
        let caller = &self.callers[usize::from(caller) % self.callers.len()];
        let outcome = caller.call::<_, Value>(self.key, method, &request, DEADLINE).await;
        assert!(matches!(outcome, Ok(_) | Err(CallError::Remote(_))), "{method} {request}: {outcome:?}");
    }
}

/// A clock that stands.
struct At(UnixMillis);

impl Clock for At {
    fn now(&self) -> UnixMillis {
        self.0
    }
}

fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("it is written");
    file
}
