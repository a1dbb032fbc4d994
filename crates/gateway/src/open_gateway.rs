//! A gateway with both its doors, HTTP and RPC.

use std::net::SocketAddr;

use tokio_util::sync::CancellationToken;

use crate::gateway::Gateway;
use crate::http_bridge::{GatewayError, HttpBridge};
use crate::rpc_gateway::RpcGateway;

/// A gateway whose HTTP address is open, ready to serve.
pub struct OpenGateway {
    gateway: Gateway,
    http: HttpBridge,
}

impl Gateway {
    /// Opens the HTTP address, so that a caller learns it before requests come.
    pub async fn bind(self) -> Result<OpenGateway, GatewayError> {
        let http = HttpBridge::bind(self.clone()).await?;
        Ok(OpenGateway { gateway: self, http })
    }

    /// Serves until `stop`, and then until the requests under way are done or the drain time is over.
    pub async fn run(self, stop: CancellationToken) -> Result<(), GatewayError> {
        self.bind().await?.run(stop).await
    }
}

impl OpenGateway {
    /// Returns the address it serves HTTP on.
    pub fn address(&self) -> SocketAddr {
        self.http.address()
    }

    /// Returns the gateway, to be asked while it runs.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Serves HTTP and RPC until `stop`, and then until the requests under way are done or the drain time is over.
    pub async fn run(self, stop: CancellationToken) -> Result<(), GatewayError> {
        let Self { gateway, http } = self;
        let tracker = gateway.tracker().clone();
        // Background work goes on while requests drain: they may still need a peer.
        let drained = CancellationToken::new();
        let (tended, tending) = (gateway.clone(), drained.clone());
        tracker.spawn(async move { tended.tend(tending).await });
        let rpc = RpcGateway::new(gateway);
        tokio::join!(http.run(stop.clone(), drained.clone()), rpc.run(stop));
        drained.cancel();
        tracker.close();
        tracker.wait().await;
        Ok(())
    }
}
