//! Serves a process's metrics over HTTP, for Prometheus to scrape.

use std::net::SocketAddr;

use anyhow::Context as _;
use axum::Router;
use axum::http::header;
use axum::routing::get;
use observability::Exposition;
use tokio::net::TcpListener;
use tracing::warn;

use crate::output;
use crate::settings::Settings;

/// Content type of OpenMetrics text.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A bound address that serves metrics once `serve` runs.
pub struct MetricsServer {
    listener: TcpListener,
    metrics: Exposition,
}

impl MetricsServer {
    pub async fn bind(address: SocketAddr, metrics: Exposition) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await;
        let listener =
            listener.with_context(|| format!("could not listen on {address}; choose another with --metrics-listen"))?;
        Ok(Self { listener, metrics })
    }

    /// Binds the address in the settings, if there is one, and prints it.
    pub async fn open(settings: &Settings, metrics: &Exposition) -> anyhow::Result<Option<Self>> {
        let Some(address) = settings.metrics_listen else { return Ok(None) };
        let server = Self::bind(address, metrics.clone()).await?;
        let address = server.address()?;
        if !address.ip().is_loopback() {
            warn!(%address, "metrics beyond this machine: whoever reaches this address reads them without a key");
        }
        output::line(format!("metrics at http://{address}/metrics"));
        Ok(Some(server))
    }

    pub fn address(&self) -> anyhow::Result<SocketAddr> {
        self.listener.local_addr().context("a socket without an address")
    }

    /// Serves the metrics until this future is dropped.
    pub async fn serve(self) {
        let Self { listener, metrics } = self;
        let show = move || {
            let text = metrics.encode();
            async move { ([(header::CONTENT_TYPE, OPEN_METRICS)], text) }
        };
        // A failed connection does not end the server.
        let _ = axum::serve(listener, Router::new().route("/metrics", get(show))).await;
    }
}
