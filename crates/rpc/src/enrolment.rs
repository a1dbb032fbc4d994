//! Obtains a node's certificate and stores it next to the node's key.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protocol::control::{Enrolled, INVITE_REDEEM, InviteRedeem};
use protocol::membership::{Certificate, CertificateError, Invite, RevocationError, RevocationList};
use protocol::signature::Signed;
use protocol::{Clock, PublicKey, WireError, codec};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::client::{CallError, Client};
use crate::identity;
use crate::membership::Membership;

/// How long a registry may take to redeem an invite.
const REDEEM: Duration = Duration::from_secs(10);

/// What a node stores of its membership. It contains no secret; the node's key is stored in another file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Enrolment {
    /// The pool, identified by its root's public key.
    pub pool: PublicKey,
    /// The registry that admitted the node.
    pub registry: PublicKey,
    /// Addresses of bootstrap nodes, as `host:port`.
    #[serde(default)]
    pub bootstrap: Vec<String>,
    /// The node's certificate.
    pub certificate: Signed,
    /// The latest revocation list.
    pub revocations: Signed,
}

/// Why a node has no usable enrolment.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// The file cannot be read or written.
    #[error("could not use the enrolment file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file does not hold an enrolment.
    #[error("{} does not hold an enrolment; move it away and join again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The certificate is invalid, or has expired.
    #[error("the node cannot take part")]
    Certificate(#[from] CertificateError),
    /// The revocation list is invalid.
    #[error("the revocation list in the enrolment file is invalid")]
    Revocations(#[from] RevocationError),
}

/// Why a node could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The invite has expired.
    #[error("the invite has ended, ask for a new one; if it is new, see that this machine's clock is right")]
    Ended,
    /// The registry refused the invite.
    #[error("the registry refused the invite: {}", .0.message)]
    Refused(WireError),
    /// The registry did not respond.
    #[error("the registry did not answer")]
    Unreachable(#[source] CallError),
    /// The registry sent an invalid certificate.
    #[error("the registry sent an invalid certificate")]
    Certificate(#[from] CertificateError),
    /// The registry sent an invalid revocation list.
    #[error("the registry sent an invalid revocation list")]
    Revocations(#[from] RevocationError),
    /// The certificate is not what the invite promised.
    #[error("the registry gave another certificate than the invite promised")]
    NotAsPromised,
}

impl Enrolment {
    /// Redeems an invite for the key of the client's node.
    pub async fn redeem(client: &Client, invite: &Invite, name: &str, clock: &dyn Clock) -> Result<Self, JoinError> {
        if invite.has_ended(clock.now()) {
            return Err(JoinError::Ended);
        }
        let request = InviteRedeem { invite_id: invite.id, secret: invite.secret.to_hex(), name: name.to_owned() };
        let redeemed = client.call::<_, Enrolled>(invite.registry, INVITE_REDEEM, &request, REDEEM).await;
        let Enrolled { certificate, revocations } = redeemed.map_err(|error| match error {
            CallError::Remote(error) => JoinError::Refused(error),
            error => JoinError::Unreachable(error),
        })?;
        let checked = Certificate::verify(&certificate, invite.pool, client.public_key(), clock.now())?;
        if !invite.promised(&checked) {
            return Err(JoinError::NotAsPromised);
        }
        RevocationList::verify(&revocations, invite.pool)?;
        let bootstrap = invite.bootstrap.clone();
        Ok(Self { pool: invite.pool, registry: invite.registry, bootstrap, certificate, revocations })
    }

    /// Reads the enrolment in `path`, if there is one.
    pub fn load(path: &Path) -> Result<Option<Self>, EnrolmentError> {
        match fs::read(path) {
            Ok(bytes) => match codec::decode(&bytes) {
                Ok(enrolment) => Ok(Some(enrolment)),
                Err(_) => Err(EnrolmentError::Malformed { path: path.to_owned() }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(EnrolmentError::File { path: path.to_owned(), source }),
        }
    }

    /// Writes the enrolment atomically. Only its owner may read the file, like every file next to a key.
    pub fn save(&self, path: &Path) -> Result<(), EnrolmentError> {
        identity::replace_private(path, &codec::encode(self))
            .map_err(|source| EnrolmentError::File { path: path.to_owned(), source })
    }

    /// Makes the node's membership, which keeps the file at `path` up to date.
    pub fn membership(
        self,
        path: &Path,
        own_key: PublicKey,
        clock: Arc<dyn Clock>,
    ) -> Result<Membership, EnrolmentError> {
        let membership = Membership::new(self.pool, own_key, self.certificate.clone(), clock)?;
        membership.take_revocations(&self.revocations)?;
        let (registry, path) = (self.registry, path.to_owned());
        let keep = move |enrolled: &Enrolled| {
            let Enrolled { certificate, revocations } = enrolled.clone();
            if let Err(error) = (Self { certificate, revocations, ..self.clone() }).save(&path) {
                warn!(%error, "could not keep the node's certificate");
            }
        };
        Ok(membership.ask_registry(registry).keep_by(Arc::new(keep)))
    }
}
