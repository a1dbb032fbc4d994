//! Offers this worker's models to a registry, so that clients can name them.

use std::time::Duration;

use protocol::WireError;
use protocol::control::{Empty, MODEL_OFFER, NodeRole};
use protocol::error_code::Blame;
use protocol::model::ModelOffer;
use rpc::{CallError, Client, Directory};

/// How long a registry may take to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Offers models to registries.
#[derive(Clone)]
pub(crate) struct Offers {
    client: Client,
    directory: Directory,
}

/// Why an offered model is not listed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OfferError {
    #[error("the registry does not list it: {0}")]
    Refused(WireError),
    #[error("no registry answers")]
    NoRegistry,
}

impl Offers {
    pub(crate) fn new(client: Client, directory: Directory) -> Self {
        Self { client, directory }
    }

    /// Returns once a registry lists the model. Waits up to `found_within` for a registry to be found.
    pub(crate) async fn make(&self, offer: &ModelOffer, found_within: Duration) -> Result<(), OfferError> {
        self.directory.wait_for(NodeRole::Registry, found_within).await;
        for registry in self.directory.find(NodeRole::Registry) {
            match self.client.call::<_, Empty>(registry, MODEL_OFFER, offer, RESPONSE_TIMEOUT).await {
                Ok(Empty {}) => return Ok(()),
                Err(CallError::Remote(refusal)) if refusal.code.blame() == Blame::Caller => {
                    return Err(OfferError::Refused(refusal));
                }
                // It cannot read its store, or does not respond: try the next one.
                Err(_) => {}
            }
        }
        Err(OfferError::NoRegistry)
    }
}
