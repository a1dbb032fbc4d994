//! The certificate authority of the pool: invites, certificates and revocations, signed with the pool's root key.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac as _};
use metadata_store::{
    InviteRecord, NewCertificate, NodeRecord, PutInviteError, Redemption, RegistryStore, Revocation, StoreError,
};
use protocol::control::{
    Enrolled, InviteCreate, InviteCreated, InviteRedeem, NodeEntry, NodeList, NodeRenamed, NodeRevoked, NodeRole,
    PoolState,
};
use protocol::membership::invite::{BOOTSTRAP_MAX, REGIONS_MAX, SECRET_BYTES};
use protocol::membership::{
    BACKDATE, CERTIFICATE_LIFE, Certificate, Exclusion, INVITE_LIFE, Invite, InviteSecret, RevocationList,
    RevocationStamp, certificate, revocation,
};
use protocol::signature::{NodeKey, Signed};
use protocol::{Clock, ErrorCode, InviteId, ModelName, PublicKey, Region, UnixMillis, WireError};
use sha2::Sha256;
use subtle::ConstantTimeEq as _;
use tokio::sync::{RwLock, watch};
use tracing::{info, warn};

use crate::secret_checks::SecretChecks;
use crate::tokens::Pepper;

/// The longest name of a node, in characters.
const NAME_MAX: usize = 64;
/// The most models a certificate may name.
const MODELS_MAX: usize = 256;
/// A revocation outlives the certificates it voids by this much, for nodes whose clock is slow.
const REVOCATION_MARGIN: Duration = Duration::from_hours(24);

/// The roles, regions and models that a node is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Display name.
    pub name: String,
    pub roles: Vec<NodeRole>,
    /// The regions it is allowed in; empty for all.
    pub regions: Vec<Region>,
    /// The models it may serve; empty for all.
    pub models: Vec<ModelName>,
}

impl Grant {
    /// Allows a role everywhere, for all models.
    pub fn of(role: NodeRole, name: impl Into<String>) -> Self {
        Self { name: name.into(), roles: vec![role], regions: vec![], models: vec![] }
    }
}

/// Dependencies and settings of a [`CertificateAuthority`].
pub struct CertificateAuthorityParts {
    /// The pool's root key. Its holder decides which nodes belong to the pool.
    pub root: NodeKey,
    /// Stores nodes, invites and revocations.
    pub store: Arc<dyn RegistryStore>,
    pub clock: Arc<dyn Clock>,
    /// The HMAC key for secrets.
    pub pepper: Pepper,
    /// The registry that redeems the invites.
    pub registry: PublicKey,
    /// Default bootstrap addresses of invites, as `host:port`.
    pub bootstrap: Vec<String>,
    /// How long certificates are valid.
    pub certificate_life: Duration,
}

impl CertificateAuthorityParts {
    /// Makes the default parts: certificates valid for [`CERTIFICATE_LIFE`], and no bootstrap addresses.
    pub fn new(
        root: NodeKey,
        store: Arc<dyn RegistryStore>,
        clock: Arc<dyn Clock>,
        pepper: Pepper,
        registry: PublicKey,
    ) -> Self {
        Self { root, store, clock, pepper, registry, bootstrap: vec![], certificate_life: CERTIFICATE_LIFE }
    }
}

/// Makes and redeems invites, issues and renews certificates, and expels nodes. Clones share their state.
#[derive(Clone)]
pub struct CertificateAuthority(Arc<Inner>);

struct Inner {
    parts: CertificateAuthorityParts,
    checks: SecretChecks,
    /// Cached, because every node asks for it every two seconds.
    list: RwLock<Option<Arc<List>>>,
    /// Notifies of each revocation.
    changes: watch::Sender<u64>,
}

/// The current revocation list.
struct List {
    version: u64,
    /// Every key that was ever expelled.
    all: BTreeSet<PublicKey>,
    /// The signed list of keys whose certificates may still be valid.
    signed: Signed,
}

/// Why a certificate or list could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The system returned no random bytes.
    #[error("could not draw random bytes")]
    Random,
    /// The node was expelled.
    #[error("the node was revoked")]
    Revoked,
    /// A field of the request is invalid.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field at fault.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    #[error("could not read or write the registry's store")]
    Store(#[from] StoreError),
}

impl From<AuthorityError> for WireError {
    fn from(error: AuthorityError) -> Self {
        match error {
            AuthorityError::Revoked => Exclusion::Revoked.into(),
            AuthorityError::Invalid { field, .. } => {
                Self::new(ErrorCode::InvalidValue, error.to_string()).with_param(field)
            }
            AuthorityError::Random | AuthorityError::Store(_) => {
                warn!(%error, "the certificate authority failed");
                Self::new(ErrorCode::Unavailable, "the registry cannot do this now, try again")
            }
        }
    }
}

impl CertificateAuthority {
    pub fn new(parts: CertificateAuthorityParts) -> Self {
        let (checks, list, changes) = (SecretChecks::new(), RwLock::default(), watch::Sender::new(0));
        Self(Arc::new(Inner { parts, checks, list, changes }))
    }

    /// Returns the pool: the public half of the root key.
    pub fn pool(&self) -> PublicKey {
        self.0.parts.root.public_key()
    }

    /// Issues a certificate to a node without an invite.
    pub async fn certify(&self, node: PublicKey, grant: Grant) -> Result<Signed, AuthorityError> {
        let Inner { parts, .. } = &*self.0;
        if self.is_revoked(node).await? {
            return Err(AuthorityError::Revoked);
        }
        let Grant { name, roles, regions, models } = grant;
        let now = parts.clock.now();
        let not_before = UnixMillis(now.0.saturating_sub(BACKDATE.as_millis() as u64));
        let not_after = now.after(parts.certificate_life);
        let new = NewCertificate {
            public_key: node,
            name: name.chars().filter(|letter| !letter.is_control()).take(NAME_MAX).collect(),
            roles: roles.clone(),
            regions: regions.clone(),
            models: models.clone(),
            not_before,
            not_after,
            now,
        };
        let serial = parts.store.put_certificate(new).await?;
        let (v, pool) = (certificate::VERSION, self.pool());
        let certificate =
            Certificate { v, serial, pool, public_key: node, roles, regions, models, not_before, not_after };
        Ok(certificate.sign(&parts.root))
    }

    /// Makes an invite and returns it this once: only a hash of its secret is stored. The caller has checked the token.
    pub async fn invite(&self, new: InviteCreate) -> Result<InviteCreated, AuthorityError> {
        let Inner { parts, .. } = &*self.0;
        let InviteCreate { mut roles, regions, models, name, valid_secs, mut bootstrap, token: _ } = new;
        roles.sort();
        roles.dedup();
        let invalid = |field, reason| Err(AuthorityError::Invalid { field, reason });
        if roles.is_empty() {
            return invalid("roles", "name at least one role");
        }
        if roles.contains(&NodeRole::Registry) {
            return invalid("roles", "invites are for gateways, orchestrators and workers");
        }
        if regions.len() > REGIONS_MAX {
            return invalid("regions", "name fewer regions, or none for all");
        }
        if models.len() > MODELS_MAX {
            return invalid("models", "name fewer models, or none for all");
        }
        if name.chars().count() > NAME_MAX || name.chars().any(char::is_control) {
            return invalid("name", "a name has at most 64 printable characters");
        }
        if bootstrap.is_empty() {
            bootstrap.clone_from(&parts.bootstrap);
        }
        if bootstrap.len() > BOOTSTRAP_MAX || !bootstrap.iter().all(|address| Invite::is_address(address)) {
            return invalid("bootstrap", "name at most 16 addresses such as 192.0.2.1:49737");
        }
        let life = valid_secs.map_or(INVITE_LIFE, Duration::from_secs);
        if life.is_zero() || life > INVITE_LIFE {
            return invalid("validSecs", "an invite is good for 1 to 86400 seconds");
        }
        let now = parts.clock.now();
        let expires_at = now.after(life);
        let (mut id, mut secret) = (InviteId([0; 8]), InviteSecret([0; SECRET_BYTES]));
        getrandom::fill(&mut id.0).map_err(|_| AuthorityError::Random)?;
        getrandom::fill(&mut secret.0).map_err(|_| AuthorityError::Random)?;
        let record = InviteRecord {
            invite_id: id,
            hash: self.hash(id, &secret),
            name,
            roles: roles.clone(),
            regions: regions.clone(),
            models,
            created_at: now,
            expires_at,
            redeemed: None,
        };
        parts.store.put_invite(record).await.map_err(|error| match error {
            // A collision of 64 random bits means that the random generator is broken.
            PutInviteError::Taken { .. } => AuthorityError::Random,
            PutInviteError::Store(error) => error.into(),
        })?;
        let (pool, registry) = (self.pool(), parts.registry);
        let invite = Invite { pool, registry, id, secret, expires_at, roles, regions, bootstrap };
        info!(invite = %id, "invite made");
        Ok(InviteCreated { invite: invite.to_string(), invite_id: id, expires_at })
    }

    /// Redeems an invite and makes the node a member. The same node may redeem it again if the reply was lost.
    pub async fn redeem(&self, node: PublicKey, request: InviteRedeem) -> Result<Enrolled, WireError> {
        let Inner { parts, checks, .. } = &*self.0;
        let InviteRedeem { invite_id, secret, name } = request;
        let unavailable = |error: StoreError| WireError::from(AuthorityError::from(error));
        let record = checks.check(node, self.matching_invite(node, invite_id, &secret)).await?;
        // A caller with the right secret may learn the invite's state.
        let now = parts.clock.now();
        let is_own = record.redeemed.is_some_and(|redeemed| redeemed.node == node);
        if record.redeemed.is_some() && !is_own {
            return Err(used());
        }
        if now >= record.expires_at {
            return Err(WireError::new(ErrorCode::InviteExpired, "the invite has ended, ask for a new one"));
        }
        if self.is_revoked(node).await.map_err(unavailable)? {
            return Err(Exclusion::Revoked.into());
        }
        match parts.store.redeem_invite(invite_id, node, now).await.map_err(unavailable)? {
            Redemption::Done | Redemption::Again => {}
            Redemption::Used => return Err(used()),
            Redemption::Unknown => return Err(unknown()),
        }
        // The operator's name for the node takes precedence over the node's own.
        let name = if record.name.is_empty() { name } else { record.name };
        let grant = Grant { name, roles: record.roles, regions: record.regions, models: record.models };
        let certificate = self.certify(node, grant).await?;
        info!(invite = %invite_id, node = node.short(), "a node has joined");
        Ok(Enrolled { certificate, revocations: self.revocations().await? })
    }

    /// Returns the invite if this is its secret.
    async fn matching_invite(&self, node: PublicKey, id: InviteId, secret: &str) -> Result<InviteRecord, WireError> {
        let record = self.0.parts.store.invite(id).await.map_err(AuthorityError::from)?;
        let record = record.ok_or_else(unknown)?;
        let matches: bool =
            InviteSecret::from_hex(secret).is_some_and(|secret| self.hash(id, &secret).ct_eq(&record.hash).into());
        if matches {
            return Ok(record);
        }
        warn!(invite = %id, node = node.short(), "an invite was shown with a wrong secret");
        Err(WireError::new(ErrorCode::InviteWrongSecret, "the invite's secret is wrong"))
    }

    /// Issues a member's next certificate, with the roles, regions and models in the registry's records.
    pub async fn renew(&self, node: PublicKey) -> Result<Enrolled, WireError> {
        let Inner { parts, .. } = &*self.0;
        let record = parts.store.node(node).await.map_err(AuthorityError::from)?;
        let record = record.ok_or(Exclusion::NotEnrolled)?;
        if parts.clock.now() >= record.not_after {
            return Err(Exclusion::Ended.into());
        }
        let NodeRecord { name, roles, regions, models, .. } = record;
        let certificate = self.certify(node, Grant { name, roles, regions, models }).await?;
        Ok(Enrolled { certificate, revocations: self.revocations().await? })
    }

    /// Expels a key, whether or not it was ever admitted here.
    pub async fn revoke(&self, node: PublicKey) -> Result<NodeRevoked, AuthorityError> {
        let Inner { parts, .. } = &*self.0;
        let found = parts.store.node(node).await?.is_some();
        let version = parts.store.revoke_node(node, parts.clock.now()).await?;
        *self.0.list.write().await = None;
        self.0.changes.send_modify(|count| *count += 1);
        info!(node = node.short(), found, "node revoked");
        Ok(NodeRevoked { found, version })
    }

    /// Renames a node. The name is for display only; permissions depend on the node's key.
    pub async fn rename(&self, node: PublicKey, name: &str) -> Result<NodeRenamed, AuthorityError> {
        if name.is_empty() || name.chars().count() > NAME_MAX || name.chars().any(char::is_control) {
            return Err(AuthorityError::Invalid { field: "name", reason: "a name has 1 to 64 printable characters" });
        }
        Ok(NodeRenamed { found: self.0.parts.store.rename_node(node, name).await? })
    }

    /// Lists every node that was ever admitted.
    pub async fn nodes(&self) -> Result<NodeList, AuthorityError> {
        let entry = |node: NodeRecord| NodeEntry {
            public_key: node.public_key,
            name: node.name,
            roles: node.roles,
            regions: node.regions,
            models: node.models,
            serial: node.serial,
            joined_at: node.joined_at,
            not_after: node.not_after,
            revoked_at: node.revoked_at,
        };
        Ok(NodeList { nodes: self.0.parts.store.nodes().await?.into_iter().map(entry).collect() })
    }

    /// Returns the signed list of expelled keys. Keys revoked so long ago that their certificates have expired are left
    /// out.
    pub async fn revocations(&self) -> Result<Signed, AuthorityError> {
        Ok(self.list().await?.signed.clone())
    }

    /// Returns the version of the list, and the list itself if it differs from `version`.
    pub async fn state(&self, version: u64) -> Result<PoolState, AuthorityError> {
        // The time is read first, so that no stamp of an old list is dated after a revocation.
        let (v, pool, issued_at) = (revocation::VERSION, self.pool(), self.0.parts.clock.now());
        let list = self.list().await?;
        let revocations = (list.version != version).then(|| list.signed.clone());
        let stamp = RevocationStamp { v, pool, version: list.version, issued_at }.sign(&self.0.parts.root);
        Ok(PoolState { version: list.version, revocations, stamp: Some(stamp) })
    }

    /// Notifies of each revocation.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    async fn list(&self) -> Result<Arc<List>, StoreError> {
        let Inner { parts, list: kept, .. } = &*self.0;
        if let Some(list) = &*kept.read().await {
            return Ok(list.clone());
        }
        let mut kept = kept.write().await;
        if let Some(list) = &*kept {
            return Ok(list.clone());
        }
        let revoked = parts.store.revocations().await?;
        let version = revoked.last().map_or(0, |last| last.version);
        let (v, pool, now) = (revocation::VERSION, self.pool(), parts.clock.now());
        let matters = parts.certificate_life.max(CERTIFICATE_LIFE) + REVOCATION_MARGIN;
        let still = |revocation: &&Revocation| now.since(revocation.revoked_at) <= matters;
        let keys = revoked.iter().filter(still).map(|revocation| revocation.public_key).collect();
        let signed = RevocationList { v, pool, version, keys }.sign(&parts.root);
        let all = revoked.iter().map(|revocation| revocation.public_key).collect();
        let list = Arc::new(List { version, all, signed });
        *kept = Some(list.clone());
        Ok(list)
    }

    async fn is_revoked(&self, node: PublicKey) -> Result<bool, StoreError> {
        Ok(self.list().await?.all.contains(&node))
    }

    fn hash(&self, id: InviteId, secret: &InviteSecret) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0.parts.pepper.0).expect("HMAC takes keys of any length");
        // Separates domains, because the pepper also hashes API tokens.
        mac.update(b"tether/invite/v1\0");
        mac.update(&id.0);
        mac.update(&secret.0);
        mac.finalize().into_bytes().into()
    }
}

fn unknown() -> WireError {
    WireError::new(ErrorCode::InviteUnknown, "the registry knows no such invite")
}

fn used() -> WireError {
    WireError::new(ErrorCode::InviteUsed, "the invite was used by another node, ask for a new one")
}
