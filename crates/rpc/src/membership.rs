//! Pool membership as one node sees it: its own certificate, the certificates that peers showed, and the revocations.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use protocol::control::{Enrolled, Hello, NodeRole};
use protocol::membership::transcript::{Ends, VERSIONS};
use protocol::membership::{
    Certificate, CertificateError, Exclusion, RevocationError, RevocationList, RevocationStamp, STAMP_AHEAD_MAX,
    STAMP_FRESH, STATE_EVERY, Transcript, TranscriptError, VersionMismatch, Versions,
};
use protocol::signature::Signed;
use protocol::{Clock, ErrorCode, PublicKey, Region, UnixMillis, WireError};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;

/// The maximum number of stored certificates. Only certificates that the root signed are stored, so strangers cannot
/// fill it.
const PEERS_MAX: usize = 65_536;
/// A registry that responded to neither of two consecutive requests counts as away.
const AWAY_AFTER: Duration = Duration::from_secs(STATE_EVERY.as_secs() * 2 + 1);

/// Decides who belongs to the pool, and what they may do. Clones share their state.
///
/// [`crate::Client`] and [`crate::Server`] pass it the certificates that peers show, and [`crate::MembershipTask`]
/// keeps it up to date. Code that has to admit a peer asks it.
#[derive(Clone)]
pub struct Membership(Option<Arc<Inner>>);

/// Called with each new certificate or revocation list, for example to write it to a file. It may block.
pub type Keep = Arc<dyn Fn(&Enrolled) + Send + Sync>;

struct Inner {
    pool: PublicKey,
    own_key: PublicKey,
    clock: Arc<dyn Clock>,
    versions: Versions,
    registry: Option<PublicKey>,
    keep: Option<Keep>,
    state: RwLock<State>,
    /// Counts the changes of who is admitted, which are revocations.
    changes: watch::Sender<u64>,
}

struct State {
    /// Certificates by key, including this node's own.
    known: HashMap<PublicKey, Known>,
    version: u64,
    revoked: BTreeSet<PublicKey>,
    list: Option<Arc<Signed>>,
    /// When the newest stamp that confirmed the list was issued; initially when this was created.
    confirmed: Instant,
}

/// A certificate that was valid when it arrived.
#[derive(Clone)]
struct Known {
    certificate: Arc<Certificate>,
    signed: Arc<Signed>,
    /// Whether this node and the key's node speak a version of the protocol in common.
    compatible: Result<(), VersionMismatch>,
}

impl Membership {
    /// Gives every node every role, for tests and for networks without certificates.
    pub fn unchecked() -> Self {
        Self(None)
    }

    /// Makes the membership of a node in a pool, given the node's certificate.
    pub fn new(
        pool: PublicKey,
        own_key: PublicKey,
        certificate: Signed,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CertificateError> {
        let own = Certificate::verify(&certificate, pool, own_key, clock.now())?;
        let known = Known { certificate: Arc::new(own), signed: Arc::new(certificate), compatible: Ok(()) };
        let state = State {
            known: HashMap::from([(own_key, known)]),
            version: 0,
            revoked: BTreeSet::new(),
            list: None,
            confirmed: Instant::now(),
        };
        let changes = watch::Sender::new(0);
        let (versions, registry, keep, state) = (VERSIONS, None, None, RwLock::new(state));
        Ok(Self(Some(Arc::new(Inner { pool, own_key, clock, versions, registry, keep, state, changes }))))
    }

    /// Sets a registry to ask when none is found by topic. Must be called before the membership is cloned.
    #[must_use]
    pub fn ask_registry(mut self, registry: PublicKey) -> Self {
        if let Some(inner) = self.0.as_mut().and_then(Arc::get_mut) {
            inner.registry = Some(registry);
        }
        self
    }

    /// Sets the versions of the protocol that the node speaks, for tests of nodes of other versions. Must be called
    /// before the membership is cloned.
    #[must_use]
    pub fn speaking(mut self, versions: Versions) -> Self {
        if let Some(inner) = self.0.as_mut().and_then(Arc::get_mut) {
            inner.versions = versions;
        }
        self
    }

    /// Sets the function that stores new certificates and lists, so that they outlive the process. Must be called
    /// before the membership is cloned.
    #[must_use]
    pub fn keep_by(mut self, keep: Keep) -> Self {
        if let Some(inner) = self.0.as_mut().and_then(Arc::get_mut) {
            inner.keep = Some(keep);
        }
        self
    }

    /// Returns whether a key belongs to the pool, in any role.
    pub fn is_member(&self, key: PublicKey) -> bool {
        self.standing(key).is_ok()
    }

    /// Returns whether a key may act in a role.
    pub fn has_role(&self, key: PublicKey, role: NodeRole) -> bool {
        self.check_role(key, role, None).is_ok()
    }

    /// Checks that a key may act in a role and, if given, in a region. Otherwise returns the reason why not.
    pub fn check_role(&self, key: PublicKey, role: NodeRole, region: Option<&Region>) -> Result<(), Exclusion> {
        match self.standing(key)? {
            Some(certificate) => certificate.check_use(role, region),
            None => Ok(()),
        }
    }

    /// Returns a key's certificate, or the reason why the key is excluded. If membership is not checked, every key is
    /// accepted, and has no certificate.
    pub fn standing(&self, key: PublicKey) -> Result<Option<Arc<Certificate>>, Exclusion> {
        let Some(inner) = &self.0 else { return Ok(None) };
        let state = inner.read();
        if state.revoked.contains(&key) {
            return Err(Exclusion::Revoked);
        }
        let known = state.known.get(&key).ok_or(Exclusion::NotEnrolled)?;
        known.certificate.check_time(inner.clock.now()).map_err(|_| Exclusion::Ended)?;
        known.compatible.map_err(Exclusion::Version)?;
        Ok(Some(known.certificate.clone()))
    }

    /// Returns whether a key was revoked.
    pub fn is_revoked(&self, key: PublicKey) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.read().revoked.contains(&key))
    }

    /// Returns the revoked keys.
    pub fn revoked(&self) -> Vec<PublicKey> {
        self.0.as_ref().map_or_else(Vec::new, |inner| inner.read().revoked.iter().copied().collect())
    }

    /// Waits until a key is revoked, forever if it never is. Cancel safe.
    pub async fn until_revoked(&self, key: PublicKey) {
        let mut changes = self.changes();
        while !self.is_revoked(key) {
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Returns a channel that changes with each revocation.
    pub fn changes(&self) -> watch::Receiver<u64> {
        match &self.0 {
            Some(inner) => inner.changes.subscribe(),
            None => watch::Sender::new(0).subscribe(),
        }
    }

    /// Returns the pool, if membership is checked.
    pub fn pool(&self) -> Option<PublicKey> {
        self.0.as_ref().map(|inner| inner.pool)
    }

    /// Returns this node's own certificate, if membership is checked.
    pub fn own(&self) -> Option<Arc<Certificate>> {
        let inner = self.0.as_ref()?;
        inner.read().known.get(&inner.own_key).map(|known| known.certificate.clone())
    }

    /// Returns the serial number of this node's certificate, if membership is checked.
    pub(crate) fn serial(&self) -> Option<u64> {
        self.own().map(|own| own.serial)
    }

    /// Returns this node's introduction on a connection that it opened and that has this secret, if membership is
    /// checked.
    pub(crate) fn introduction(&self, callee: PublicKey, secret: &[u8; 32]) -> Option<Hello> {
        let inner = self.0.as_ref()?;
        let transcript = Transcript::of_caller(inner.ends(secret, inner.own_key, callee), inner.versions);
        Some(Hello { certificate: inner.own_certificate(), transcript })
    }

    /// Processes the introduction of a caller on a connection that proved `caller` and has this secret. Returns this
    /// node's own introduction.
    pub fn meet_caller(&self, caller: PublicKey, secret: &[u8; 32], hello: &Hello) -> Result<Hello, WireError> {
        let Some(inner) = &self.0 else { return Ok(Hello::default()) };
        let ends = inner.ends(secret, caller, inner.own_key);
        let known = inner.check_certificate(caller, hello)?;
        let (common, transcript) =
            Transcript::meet_caller(ends, inner.versions, hello.transcript.as_ref()).map_err(refused)?;
        inner.learn_peer(caller, known, common.map(drop));
        Ok(Hello { certificate: inner.own_certificate(), transcript })
    }

    /// Processes the introduction of a callee, in response to this node's own on the same connection.
    pub fn meet_callee(&self, callee: PublicKey, secret: &[u8; 32], hello: &Hello) -> Result<(), WireError> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let ends = inner.ends(secret, inner.own_key, callee);
        let known = inner.check_certificate(callee, hello)?;
        let common = Transcript::meet_callee(ends, inner.versions, hello.transcript.as_ref()).map_err(refused)?;
        inner.learn_peer(callee, known, common.map(drop));
        Ok(())
    }

    /// Replaces this node's certificate by its next one.
    pub fn renew(&self, signed: Signed) -> Result<(), CertificateError> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let certificate = Certificate::verify(&signed, inner.pool, inner.own_key, inner.clock.now())?;
        let (certificate, signed) = (Arc::new(certificate), Arc::new(signed));
        inner.learn(inner.own_key, Known { certificate, signed, compatible: Ok(()) });
        Ok(())
    }

    /// Returns the version of the revocation list; 0 before the first one.
    pub fn version(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.read().version)
    }

    /// Applies a revocation list. Returns whether it is newer than the current one.
    pub fn take_revocations(&self, signed: &Signed) -> Result<bool, RevocationError> {
        let Some(inner) = &self.0 else { return Ok(false) };
        let list = RevocationList::verify(signed, inner.pool)?;
        let is_newer = {
            let mut state = inner.write();
            let is_newer = list.version > state.version;
            // The empty list has version 0 and is stored like any other.
            if is_newer || list.version == state.version && state.list.is_none() {
                state.version = list.version;
                state.revoked = list.keys;
                state.list = Some(Arc::new(signed.clone()));
            }
            is_newer
        };
        if is_newer {
            inner.changes.send_modify(|count| *count += 1);
        }
        Ok(is_newer)
    }

    /// Applies a registry's stamp. Returns whether it is fresh and confirms the list that this node has, or the reason
    /// why it is invalid. A stamp that is older counts from when it was issued: a registry that withholds revocations
    /// cannot look alive by an old one.
    pub(crate) fn take_stamp(&self, signed: &Signed) -> Result<bool, RevocationError> {
        let Some(inner) = &self.0 else { return Ok(true) };
        let stamp = RevocationStamp::verify(signed, inner.pool)?;
        let now = inner.clock.now();
        let age = now.since(stamp.issued_at);
        let mut state = inner.write();
        if stamp.version != state.version || stamp.issued_at.since(now) > STAMP_AHEAD_MAX {
            return Ok(false);
        }
        // The age includes the difference of the clocks, so that of a fresh stamp counts as none.
        let is_fresh = age <= STAMP_FRESH;
        let age = if is_fresh { Duration::ZERO } else { age };
        if let Some(issued) = Instant::now().checked_sub(age) {
            state.confirmed = state.confirmed.max(issued);
        }
        Ok(is_fresh)
    }

    /// Returns how long no registry has reported the revocations to this node. It is zero if membership is not checked.
    pub fn registry_silence(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |inner| inner.read().confirmed.elapsed())
    }

    /// Returns whether the registries are away: several requests were made since one responded.
    pub fn is_registry_away(&self) -> bool {
        self.registry_silence() > AWAY_AFTER
    }

    /// Records that a registry reported this node as revoked. The list itself is only sent to members.
    pub(crate) fn note_expelled(&self) {
        if let Some(inner) = &self.0
            && inner.write().revoked.insert(inner.own_key)
        {
            inner.changes.send_modify(|count| *count += 1);
        }
    }

    /// Returns whether membership is checked.
    pub fn is_checked(&self) -> bool {
        self.0.is_some()
    }

    /// Returns the registry that the node was given when it joined.
    pub(crate) fn registry(&self) -> Option<PublicKey> {
        self.0.as_ref().and_then(|inner| inner.registry)
    }

    /// Returns whether this node's certificate is due for renewal.
    pub(crate) fn is_due(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| self.own().is_some_and(|own| own.is_due(inner.clock.now())))
    }

    /// Returns what has to be stored, and the function that stores it.
    pub(crate) fn to_keep(&self) -> Option<(Keep, Enrolled)> {
        let inner = self.0.as_ref()?;
        let keep = inner.keep.clone()?;
        let state = inner.read();
        let certificate = (*state.known.get(&inner.own_key)?.signed).clone();
        let revocations = (**state.list.as_ref()?).clone();
        Some((keep, Enrolled { certificate, revocations }))
    }
}

/// Returns the error that the other node gets if its transcript was rejected.
fn refused(error: TranscriptError) -> WireError {
    WireError::new(ErrorCode::NotEnrolled, error.to_string())
}

impl Inner {
    fn ends<'a>(&self, secret: &'a [u8; 32], caller: PublicKey, callee: PublicKey) -> Ends<'a> {
        Ends { secret, pool: self.pool, caller, callee }
    }

    fn own_certificate(&self) -> Option<Signed> {
        self.read().known.get(&self.own_key).map(|known| (*known.signed).clone())
    }

    /// Returns the certificate that a peer shows, if it shows one and it is valid.
    fn check_certificate(&self, key: PublicKey, hello: &Hello) -> Result<Option<Known>, WireError> {
        let Some(signed) = &hello.certificate else { return Ok(None) };
        {
            let state = self.read();
            if state.revoked.contains(&key) {
                return Err(Exclusion::Revoked.into());
            }
            // A certificate that is known already is not verified again.
            if let Some(known) = state.known.get(&key).filter(|known| *known.signed == *signed) {
                return Ok(Some(known.clone()));
            }
        }
        let certificate = Certificate::verify(signed, self.pool, key, self.clock.now())?;
        let (certificate, signed) = (Arc::new(certificate), Arc::new(signed.clone()));
        Ok(Some(Known { certificate, signed, compatible: Ok(()) }))
    }

    fn learn_peer(&self, key: PublicKey, known: Option<Known>, compatible: Result<(), VersionMismatch>) {
        let Some(known) = known else { return };
        let before = self.read().known.get(&key).map_or(Ok(()), |known| known.compatible);
        if let Err(mismatch) = compatible
            && before != compatible
        {
            warn!(peer = key.short(), "a node of this network is not used: {mismatch}");
        }
        self.learn(key, Known { compatible, ..known });
    }

    /// Stores a certificate, unless a later one of the same key is known.
    fn learn(&self, key: PublicKey, new: Known) {
        let now = self.clock.now();
        let mut state = self.write();
        if state.known.get(&key).is_some_and(|known| known.certificate.serial > new.certificate.serial) {
            return;
        }
        if state.known.len() >= PEERS_MAX && !state.known.contains_key(&key) {
            state.make_room(self.own_key, now);
        }
        state.known.insert(key, new);
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write()
    }
}

impl State {
    /// Removes expired and revoked certificates, or else the one that expires first.
    fn make_room(&mut self, own_key: PublicKey, now: UnixMillis) {
        let Self { known, revoked, .. } = self;
        known.retain(|key, known| *key == own_key || known.certificate.not_after > now && !revoked.contains(key));
        if known.len() >= PEERS_MAX {
            let others = known.iter().filter(|(key, _)| **key != own_key);
            let first = others.min_by_key(|(key, known)| (known.certificate.not_after, **key)).map(|(key, _)| *key);
            // Its node shows it again as soon as it is refused.
            first.map(|key| known.remove(&key));
        }
    }
}

impl fmt::Debug for Membership {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(inner) => write!(formatter, "Membership({} in {})", inner.own_key.short(), inner.pool.short()),
            None => formatter.write_str("Membership(unchecked)"),
        }
    }
}
