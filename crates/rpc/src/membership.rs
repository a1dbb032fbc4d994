//! Who belongs to the pool, as one node knows it: its own certificate, those that peers showed, and who was expelled.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use protocol::admission::{Certificate, CertificateError, Exclusion, RevocationError, RevocationList, STATE_EVERY};
use protocol::control::{Enrolled, Hello, NodeRole};
use protocol::signature::Signed;
use protocol::{Clock, PublicKey, Region, UnixMillis, WireError};
use tokio::sync::watch;
use tokio::time::Instant;

/// Certificates kept at most. Only what the root signed gets in, so that strangers cannot fill it.
const PEERS_MAX: usize = 65_536;
/// A registry that left two questions in a row without an answer is away.
const AWAY_AFTER: Duration = Duration::from_secs(STATE_EVERY.as_secs() * 2 + 1);

/// Says who belongs to the pool and may do what. Clones are the same.
///
/// [`crate::Client`] and [`crate::Server`] show each other's certificates to it, and [`crate::MembershipTask`] keeps it
/// up to date; it is asked by whoever has to admit a peer.
#[derive(Clone)]
pub struct Membership(Option<Arc<Inner>>);

/// What is done with a certificate or a list that came, such as keeping it in a file. It may block.
pub type Keep = Arc<dyn Fn(&Enrolled) + Send + Sync>;

struct Inner {
    pool: PublicKey,
    own_key: PublicKey,
    clock: Arc<dyn Clock>,
    registry: Option<PublicKey>,
    keep: Option<Keep>,
    state: RwLock<State>,
    /// Counts what changes who is admitted: revocations.
    changes: watch::Sender<u64>,
}

struct State {
    /// By key, this node's own among them.
    known: HashMap<PublicKey, Known>,
    version: u64,
    revoked: BTreeSet<PublicKey>,
    list: Option<Arc<Signed>>,
    /// When a registry last told the state of the pool; the start, before the first time.
    confirmed: Instant,
}

/// A certificate that was found good when it came.
#[derive(Clone)]
struct Known {
    certificate: Arc<Certificate>,
    signed: Arc<Signed>,
}

impl Membership {
    /// Admits everybody to everything: for tests, and for networks that need no admission.
    pub fn unchecked() -> Self {
        Self(None)
    }

    /// Makes the membership of a node in a pool, by the certificate it has.
    pub fn new(
        pool: PublicKey,
        own_key: PublicKey,
        certificate: Signed,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CertificateError> {
        let own = Certificate::verify(&certificate, pool, own_key, clock.now())?;
        let known = Known { certificate: Arc::new(own), signed: Arc::new(certificate) };
        let state = State {
            known: HashMap::from([(own_key, known)]),
            version: 0,
            revoked: BTreeSet::new(),
            list: None,
            confirmed: Instant::now(),
        };
        let changes = watch::Sender::new(0);
        let (registry, keep, state) = (None, None, RwLock::new(state));
        Ok(Self(Some(Arc::new(Inner { pool, own_key, clock, registry, keep, state, changes }))))
    }

    /// Names a registry to ask when none is found by topic. Called before the membership is cloned.
    #[must_use]
    pub fn ask_registry(mut self, registry: PublicKey) -> Self {
        if let Some(inner) = self.0.as_mut().and_then(Arc::get_mut) {
            inner.registry = Some(registry);
        }
        self
    }

    /// Has what comes kept, so that it outlives the process. Called before the membership is cloned.
    #[must_use]
    pub fn keep_by(mut self, keep: Keep) -> Self {
        if let Some(inner) = self.0.as_mut().and_then(Arc::get_mut) {
            inner.keep = Some(keep);
        }
        self
    }

    /// Returns whether a key belongs to the pool, whatever its role.
    pub fn is_member(&self, key: PublicKey) -> bool {
        self.standing(key).is_ok()
    }

    /// Returns whether a key may act in a role.
    pub fn has_role(&self, key: PublicKey, role: NodeRole) -> bool {
        self.admit(key, role, None).is_ok()
    }

    /// Says why a key may not act in a role and, where one is named, a region.
    pub fn admit(&self, key: PublicKey, role: NodeRole, region: Option<&Region>) -> Result<(), Exclusion> {
        match self.standing(key)? {
            Some(certificate) => certificate.check_use(role, region),
            None => Ok(()),
        }
    }

    /// Returns a key's certificate, or why it is nobody; without admission everybody is somebody and has none.
    pub fn standing(&self, key: PublicKey) -> Result<Option<Arc<Certificate>>, Exclusion> {
        let Some(inner) = &self.0 else { return Ok(None) };
        let state = inner.read();
        if state.revoked.contains(&key) {
            return Err(Exclusion::Revoked);
        }
        let known = state.known.get(&key).ok_or(Exclusion::NotEnrolled)?;
        known.certificate.check_time(inner.clock.now()).map_err(|_| Exclusion::Ended)?;
        Ok(Some(known.certificate.clone()))
    }

    /// Returns whether a key was expelled.
    pub fn is_revoked(&self, key: PublicKey) -> bool {
        self.0.as_ref().is_some_and(|inner| inner.read().revoked.contains(&key))
    }

    /// Returns who was expelled.
    pub fn revoked(&self) -> Vec<PublicKey> {
        self.0.as_ref().map_or_else(Vec::new, |inner| inner.read().revoked.iter().copied().collect())
    }

    /// Waits until a key is expelled, for ever where that does not happen. Cancel safe.
    pub async fn until_revoked(&self, key: PublicKey) {
        let mut changes = self.changes();
        while !self.is_revoked(key) {
            if changes.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Tells of each revocation.
    pub fn changes(&self) -> watch::Receiver<u64> {
        match &self.0 {
            Some(inner) => inner.changes.subscribe(),
            None => watch::Sender::new(0).subscribe(),
        }
    }

    /// Returns the pool, where there is admission.
    pub fn pool(&self) -> Option<PublicKey> {
        self.0.as_ref().map(|inner| inner.pool)
    }

    /// Returns this node's own certificate, where there is admission.
    pub fn own(&self) -> Option<Arc<Certificate>> {
        let inner = self.0.as_ref()?;
        inner.read().known.get(&inner.own_key).map(|known| known.certificate.clone())
    }

    /// Returns how this node introduces itself, where there is admission, and its certificate's number.
    pub(crate) fn introduction(&self) -> Option<(u64, Hello)> {
        let inner = self.0.as_ref()?;
        let known = inner.read().known.get(&inner.own_key).cloned()?;
        Some((known.certificate.serial, Hello { certificate: Some((*known.signed).clone()) }))
    }

    /// Takes a peer's introduction over a connection that proved `remote_key`.
    pub fn meet(&self, remote_key: PublicKey, hello: &Hello) -> Result<(), WireError> {
        let (Some(inner), Some(signed)) = (&self.0, &hello.certificate) else { return Ok(()) };
        {
            let state = inner.read();
            if state.revoked.contains(&remote_key) {
                return Err(Exclusion::Revoked.into());
            }
            // The same again costs no signature.
            if state.known.get(&remote_key).is_some_and(|known| *known.signed == *signed) {
                return Ok(());
            }
        }
        let certificate = Certificate::verify(signed, inner.pool, remote_key, inner.clock.now())?;
        inner.learn(remote_key, Known { certificate: Arc::new(certificate), signed: Arc::new(signed.clone()) });
        Ok(())
    }

    /// Takes this node's next certificate.
    pub fn renew(&self, signed: Signed) -> Result<(), CertificateError> {
        let Some(inner) = &self.0 else { return Ok(()) };
        let certificate = Certificate::verify(&signed, inner.pool, inner.own_key, inner.clock.now())?;
        inner.learn(inner.own_key, Known { certificate: Arc::new(certificate), signed: Arc::new(signed) });
        Ok(())
    }

    /// Returns the version of the revocation list, 0 before the first.
    pub fn version(&self) -> u64 {
        self.0.as_ref().map_or(0, |inner| inner.read().version)
    }

    /// Takes a revocation list. Says whether it is newer than what is known.
    pub fn take_revocations(&self, signed: &Signed) -> Result<bool, RevocationError> {
        let Some(inner) = &self.0 else { return Ok(false) };
        let list = RevocationList::verify(signed, inner.pool)?;
        let is_newer = {
            let mut state = inner.write();
            let is_newer = list.version > state.version;
            // The list of nobody has version 0 and is kept like any other.
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

    /// Notes that a registry has just told the state of the pool.
    pub(crate) fn confirm(&self) {
        if let Some(inner) = &self.0 {
            inner.write().confirmed = Instant::now();
        }
    }

    /// Returns for how long no registry has told this node who was expelled. Without admission nobody is waited for.
    pub fn registry_silence(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |inner| inner.read().confirmed.elapsed())
    }

    /// Returns whether no registry answers: it was asked several times since one did.
    pub fn is_registry_away(&self) -> bool {
        self.registry_silence() > AWAY_AFTER
    }

    /// Takes a registry's word that this node was expelled; the list itself is told to members only.
    pub(crate) fn note_expelled(&self) {
        if let Some(inner) = &self.0
            && inner.write().revoked.insert(inner.own_key)
        {
            inner.changes.send_modify(|count| *count += 1);
        }
    }

    /// Returns whether there is admission.
    pub fn is_checked(&self) -> bool {
        self.0.is_some()
    }

    /// Returns the registry that the node was told of when it joined.
    pub(crate) fn registry(&self) -> Option<PublicKey> {
        self.0.as_ref().and_then(|inner| inner.registry)
    }

    /// Returns whether this node needs its next certificate.
    pub(crate) fn is_due(&self) -> bool {
        self.0.as_ref().is_some_and(|inner| self.own().is_some_and(|own| own.is_due(inner.clock.now())))
    }

    /// Returns what is to be kept, and by whom.
    pub(crate) fn to_keep(&self) -> Option<(Keep, Enrolled)> {
        let inner = self.0.as_ref()?;
        let keep = inner.keep.clone()?;
        let state = inner.read();
        let certificate = (*state.known.get(&inner.own_key)?.signed).clone();
        let revocations = (**state.list.as_ref()?).clone();
        Some((keep, Enrolled { certificate, revocations }))
    }
}

impl Inner {
    /// Keeps a certificate, unless a later one of the same key is known.
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
    /// Forgets what has ended and who was expelled; where that is nobody, whose certificate ends first.
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
