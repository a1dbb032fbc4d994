//! Runs a gateway's HTTP and RPC servers.

use std::net::SocketAddr;

use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::batches::BatchWorker;
use crate::config::seconds;
use crate::gateway::Gateway;
use crate::http_bridge::{GatewayError, HttpBridge};
use crate::rpc_gateway::RpcGateway;

/// A gateway whose HTTP address is bound, ready to serve.
pub struct OpenGateway {
    gateway: Gateway,
    http: HttpBridge,
}

impl Gateway {
    /// Binds the HTTP address, so that the caller knows it before the gateway serves.
    pub async fn bind(self) -> Result<OpenGateway, GatewayError> {
        let http = HttpBridge::bind(self.clone()).await?;
        Ok(OpenGateway { gateway: self, http })
    }

    /// Serves until `stop`, then drains: waits for the requests under way, at most for the drain time.
    pub async fn run(self, stop: CancellationToken) -> Result<(), GatewayError> {
        self.bind().await?.run(stop).await
    }
}

impl OpenGateway {
    /// Returns the address of the HTTP server.
    pub fn address(&self) -> SocketAddr {
        self.http.address()
    }

    /// Returns the address for Ollama's clients, if it has one.
    pub fn ollama_address(&self) -> Option<SocketAddr> {
        self.http.ollama_address()
    }

    /// Returns the gateway, for use while it runs.
    pub fn gateway(&self) -> &Gateway {
        &self.gateway
    }

    /// Serves HTTP and RPC until `stop`, then drains: waits for the requests under way, at most for the drain time.
    pub async fn run(self, stop: CancellationToken) -> Result<(), GatewayError> {
        let Self { gateway, http } = self;
        let tracker = gateway.tracker().clone();
        // Background tasks go on while requests drain, since these may still need a peer.
        let drained = CancellationToken::new();
        let (tended, tending) = (gateway.clone(), drained.clone());
        tracker.spawn(async move { tended.tend(tending).await });
        let (cutting, stopping, finished) = (gateway.clone(), stop.clone(), drained.clone());
        tracker.spawn(async move {
            let drain = seconds(cutting.config().drain_secs);
            stopping.cancelled().await;
            finished.run_until_cancelled(time::sleep(drain)).await;
            cutting.cut().cancel();
        });
        let batches = BatchWorker::new(gateway.clone());
        let rpc = RpcGateway::new(gateway);
        tokio::join!(http.run(stop.clone(), drained.clone()), rpc.run(stop.clone()), batches.run(stop));
        drained.cancel();
        tracker.close();
        tracker.wait().await;
        Ok(())
    }
}
