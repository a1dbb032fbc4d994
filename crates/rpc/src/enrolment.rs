//! What a node keeps of its admission beside its key, and how it comes by it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protocol::admission::{Certificate, CertificateError, Invite, RevocationError, RevocationList};
use protocol::control::{Enrolled, INVITE_REDEEM, InviteRedeem};
use protocol::signature::Signed;
use protocol::{Clock, PublicKey, WireError, codec};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::client::{CallError, Client};
use crate::identity;
use crate::membership::Membership;

/// How long a registry may take to redeem an invite.
const REDEEM: Duration = Duration::from_secs(10);

/// What a node keeps of its admission. It holds no secret: its key lies elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Enrolment {
    /// The pool: its root's public key.
    pub pool: PublicKey,
    /// The registry that admitted the node.
    pub registry: PublicKey,
    /// Addresses of nodes that know the network, `host:port`.
    #[serde(default)]
    pub bootstrap: Vec<String>,
    /// The node's certificate.
    pub certificate: Signed,
    /// The last list of expelled nodes.
    pub revocations: Signed,
}

/// Why a node has no enrolment.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// The file can't be used.
    #[error("could not use the enrolment file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file does not hold an enrolment.
    #[error("{} does not hold an enrolment; move it away and join again", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The certificate is no good, or no longer.
    #[error("the node cannot take part")]
    Certificate(#[from] CertificateError),
    /// The list of expelled nodes is no good.
    #[error("the revocation list in the enrolment file is no good")]
    Revocations(#[from] RevocationError),
}

/// Why a node could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The invite's time is over.
    #[error("the invite has ended, ask for a new one; if it is new, see that this machine's clock is right")]
    Ended,
    /// The registry refused it.
    #[error("the registry refused the invite: {}", .0.message)]
    Refused(WireError),
    /// The registry did not answer.
    #[error("the registry did not answer")]
    Unreachable(#[source] CallError),
    /// The registry sent a certificate that is no good.
    #[error("the registry sent a certificate that is no good")]
    Certificate(#[from] CertificateError),
    /// The registry sent a list that is no good.
    #[error("the registry sent a revocation list that is no good")]
    Revocations(#[from] RevocationError),
    /// The registry's certificate is not what the invite promised.
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

    /// Reads the enrolment in `path`, where there is one.
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

    /// Writes the enrolment, in whole or not at all. Its owner alone may read it, as all that lies beside a key.
    pub fn save(&self, path: &Path) -> Result<(), EnrolmentError> {
        identity::replace_private(path, &codec::encode(self))
            .map_err(|source| EnrolmentError::File { path: path.to_owned(), source })
    }

    /// Makes the node's membership, which keeps `path` up to date.
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
