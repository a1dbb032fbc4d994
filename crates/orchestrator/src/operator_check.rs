//! Has the region's registries check the tokens of operators.

use std::time::Duration;

use protocol::control::{Empty, NodeRole, OPERATOR_CHECK, OperatorRequest};
use protocol::{ErrorCode, WireError};
use rpc::{Client, Directory};

/// How long a registry may take to respond. A gateway waits two seconds for the whole call.
const DEADLINE: Duration = Duration::from_millis(800);

/// Operators are people: a gateway's certificate is not enough for what they may do.
pub(crate) struct OperatorCheck {
    client: Client,
    directory: Directory,
}

impl OperatorCheck {
    pub(crate) fn new(client: Client, directory: Directory) -> Self {
        Self { client, directory }
    }

    /// Fails unless a registry says that the token may operate the network.
    pub(crate) async fn check(&self, token: &str) -> Result<(), WireError> {
        let request = OperatorRequest { token: token.to_owned() };
        let mut error = WireError::new(ErrorCode::Unavailable, "no registry answers, which has to check the API key")
            .with_retry_after(Duration::from_secs(1));
        for registry in self.directory.find(NodeRole::Registry) {
            match self.client.call(registry, OPERATOR_CHECK, &request, DEADLINE).await {
                Ok(Empty {}) => return Ok(()),
                Err(failed) => error = failed.into(),
            }
            // Only a registry that did not judge the token leaves the judgement to the next one.
            if !matches!(error.code, ErrorCode::Unavailable | ErrorCode::DeadlineExceeded) {
                break;
            }
        }
        Err(error)
    }
}
