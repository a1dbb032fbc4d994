//! `tether nodes`: lists the live workers, once or as they change.

use std::time::Duration;

use protocol::control::{Fleet, FleetWorker};

use super::up::asked_to_stop;
use super::{Context, Outcome};
use crate::args::NodesArgs;
use crate::client::GatewayClient;
use crate::output;

/// How often the list is taken anew while it is watched.
const EVERY: Duration = Duration::from_secs(1);
/// Moves the terminal's cursor to its first line and clears what follows.
const CLEAR: &str = "\x1b[H\x1b[2J";

pub(super) async fn run(context: Context, args: &NodesArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(&args.server, &context.settings, &context.data, &context.env)?;
    if args.watch {
        return watch(&client).await;
    }
    let fleet: Fleet = client.get("/admin/v1/nodes").await?;
    if context.json {
        output::json(&fleet)?;
    } else {
        output::line(listed(&fleet));
    }
    Ok(Outcome::Well)
}

async fn watch(client: &GatewayClient) -> anyhow::Result<Outcome> {
    let asked = asked_to_stop();
    tokio::pin!(asked);
    loop {
        // A gateway that is away for a moment is worth a line, and no end.
        let shown = match client.get::<Fleet>("/admin/v1/nodes").await {
            Ok(fleet) => listed(&fleet),
            Err(error) => format!("{error:#}"),
        };
        output::piece(&format!("{CLEAR}{shown}\n"));
        tokio::select! {
            asked = &mut asked => return asked.map(|()| Outcome::Well),
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

fn listed(fleet: &Fleet) -> String {
    let rows: Vec<Vec<String>> = fleet.workers.iter().map(row).collect();
    output::aligned(&["WORKER", "REGION", "CLASS", "RUNNING", "WAITING", "MODELS", "REPORTED"], &rows)
}

fn row(worker: &FleetWorker) -> Vec<String> {
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
}
