//! `tether nodes`: lists the live workers.

use protocol::control::Fleet;

use super::{Context, Outcome};
use crate::args::ServerArgs;
use crate::client::GatewayClient;
use crate::output;

pub(super) async fn run(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let fleet: Fleet = client.get("/admin/v1/nodes").await?;
    if context.json {
        output::json(&fleet)?;
        return Ok(Outcome::Well);
    }
    let rows: Vec<Vec<String>> = fleet
        .workers
        .iter()
        .map(|worker| {
            let report = &worker.report;
            let models: Vec<String> = report
                .model_cache
                .iter()
                .map(|model| format!("{} {}", model.key, format!("{:?}", model.state).to_lowercase()))
                .collect();
            vec![
                report.worker_id.short(),
                report.region.to_string(),
                report.gpu_class.clone(),
                format!("{}/{}", report.capacity.running, report.capacity.slots),
                format!("{}/{}", report.capacity.waiting, report.capacity.queue_max),
                models.join(", "),
                format!("{:.1} s ago", worker.age_ms as f64 / 1e3),
            ]
        })
        .collect();
    output::table(&["WORKER", "REGION", "CLASS", "RUNNING", "WAITING", "MODELS", "REPORTED"], &rows);
    Ok(Outcome::Well)
}
