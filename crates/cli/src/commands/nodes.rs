//! `tether nodes`: lists the nodes of the network, once or continuously.

use std::time::Duration;

use protocol::WorkerId;
use protocol::control::{Fleet, FleetWorker, Member, NodeRole};
use protocol::health::ModelState;
use protocol::model::ModelKey;
use serde_json::json;

use super::{Context, Outcome};
use crate::args::NodesArgs;
use crate::client::GatewayClient;
use crate::operator::AdminClient;
use crate::output;

/// How often the list is refreshed while it is watched.
const EVERY: Duration = Duration::from_secs(1);
/// Moves the cursor to the top left and clears the rest of the terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// The members of the network, and the state of its workers.
struct Network {
    /// An error if no registry reports them, with the reason.
    members: Result<Vec<Member>, String>,
    /// An error if no gateway or orchestrator reports it, with the reason.
    fleet: Result<Fleet, String>,
}

pub(super) async fn run(context: Context, args: &NodesArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(&args.server, &context.settings, &context.data, &context.env)?;
    if args.watch {
        return watch(&context, args, &client).await;
    }
    let network = look(&context, args, &client).await?;
    if context.json {
        let workers = network.fleet.as_ref().map(|fleet| &fleet.workers).ok();
        output::json(&json!({ "workers": workers, "members": network.members.as_ref().ok() }))?;
    } else {
        output::shown(listed(&network));
    }
    Ok(Outcome::Well)
}

async fn watch(context: &Context, args: &NodesArgs, client: &GatewayClient) -> anyhow::Result<Outcome> {
    loop {
        // A gateway that is briefly unreachable is reported and does not end the watch.
        let shown = match look(context, args, client).await {
            Ok(network) => listed(&network),
            Err(error) => output::harmless(&format!("{error:#}")),
        };
        output::piece(CLEAR);
        output::shown(shown);
        tokio::select! {
            () = context.stop.cancelled() => return Ok(Outcome::Well),
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// Asks the gateway, or the registry itself if none responds. Fails if neither reports anything.
async fn look(context: &Context, args: &NodesArgs, client: &GatewayClient) -> anyhow::Result<Network> {
    let fleet = client.get::<Fleet>("/admin/v1/nodes").await;
    let members = AdminClient::Gateway(client.clone()).members().await;
    let is_member = args.server.url.is_none() && context.data.pool().is_ok_and(|pool| pool.is_some());
    let members = match members {
        Err(_) if is_member => {
            let admin = AdminClient::of_nodes(&args.server, &context.settings, &context.data, &context.env).await?;
            let members = admin.members().await;
            admin.leave().await?;
            members
        }
        members => members,
    };
    match (fleet, members) {
        (Err(error), Err(_)) => Err(error),
        (fleet, members) => {
            let why = |error: anyhow::Error| format!("{error:#}");
            Ok(Network { fleet: fleet.map_err(why), members: members.map_err(why) })
        }
    }
}

fn listed(network: &Network) -> String {
    let none = Fleet::default();
    let fleet = network.fleet.as_ref().unwrap_or(&none);
    let mut rows: Vec<(usize, Vec<String>)> = vec![];
    let mut strangers: Vec<&FleetWorker> = fleet.workers.iter().collect();
    for member in network.members.iter().flatten().filter(|member| member.node.revoked_at.is_none()) {
        let worker = fleet.workers.iter().find(|worker| worker.report.worker_id == member.node.public_key);
        strangers.retain(|other| Some(other.report.worker_id) != worker.map(|worker| worker.report.worker_id));
        let role = member.node.roles.first().copied().unwrap_or(NodeRole::Worker);
        rows.push((order(role), member_row(member, role, worker, network.fleet.is_ok())));
    }
    // Workers that the registry does not list, for instance because it cannot be asked.
    rows.extend(strangers.into_iter().map(|worker| (order(NodeRole::Worker), worker_row("", worker))));
    rows.sort();
    let rows: Vec<Vec<String>> = rows.into_iter().map(|(_, row)| row).collect();
    let head = ["NAME", "ROLE", "NODE", "REGION", "CLASS", "STATE", "RUNNING", "WAITING", "MODELS", "REPORTED"];
    let mut parts = vec![output::aligned(&head, &rows)];
    let names = |id: &WorkerId| {
        let member = network.members.iter().flatten().find(|member| member.node.public_key == *id);
        member.map_or_else(|| id.short(), |member| output::one_line(&member.node.name))
    };
    let failed: Vec<String> = failures(fleet)
        .map(|(worker, model, why)| format!("{model} on {} is in error: {why}", names(&worker)))
        .collect();
    if !failed.is_empty() {
        parts.push(failed.join("\n"));
    }
    if let Err(why) = &network.fleet {
        parts.push(output::harmless(&format!("how the workers are is not known: {why}")));
    }
    if let Err(why) = &network.members {
        parts.push(output::harmless(&format!("names and other nodes are not known: {why}")));
    }
    parts.join("\n\n")
}

/// Returns the models that failed, each with its worker and the reason.
pub(super) fn failures(fleet: &Fleet) -> impl Iterator<Item = (WorkerId, ModelKey, String)> {
    fleet.workers.iter().flat_map(|worker| {
        let failed = worker.report.model_cache.iter().filter(|model| model.state == ModelState::Error);
        failed.map(|model| {
            let why = model.reason.as_deref().unwrap_or("its log says why");
            (worker.report.worker_id, model.key.clone(), output::one_line(why))
        })
    })
}

fn order(role: NodeRole) -> usize {
    match role {
        NodeRole::Registry => 0,
        NodeRole::Orchestrator => 1,
        NodeRole::Gateway => 2,
        NodeRole::Worker => 3,
    }
}

fn member_row(member: &Member, role: NodeRole, worker: Option<&FleetWorker>, is_fleet_known: bool) -> Vec<String> {
    let node = &member.node;
    if let Some(worker) = worker {
        return worker_row(&node.name, worker);
    }
    let state = match (role, member.answers) {
        (_, Some(true)) => "answers",
        (_, Some(false)) => "does not answer",
        (NodeRole::Worker, None) if is_fleet_known => "not reporting",
        _ => "-",
    };
    let word = format!("{role:?}").to_lowercase();
    let unknown = String::new;
    let mut row = vec![node.name.clone(), word, node.public_key.short(), unknown(), unknown(), state.to_owned()];
    row.resize_with(10, unknown);
    row
}

fn worker_row(name: &str, worker: &FleetWorker) -> Vec<String> {
    let report = &worker.report;
    let state = |state: ModelState| report.model_cache.iter().any(|model| model.state == state);
    let state = match () {
        () if report.draining => "stopping",
        () if !report.activity.is_accepting() => report.activity.as_str(),
        () if state(ModelState::Ready) => "ready",
        () if state(ModelState::Loading) => "loading",
        () if state(ModelState::Error) => "error",
        () => "idle",
    };
    let models: Vec<String> = report
        .model_cache
        .iter()
        .map(|model| format!("{} {}", model.key, format!("{:?}", model.state).to_lowercase()))
        .collect();
    vec![
        name.to_owned(),
        "worker".to_owned(),
        report.worker_id.short(),
        report.region.to_string(),
        report.gpu_class.clone(),
        state.to_owned(),
        format!("{}/{}", report.capacity.running, report.capacity.slots),
        format!("{}/{}", report.capacity.waiting, report.capacity.queue_max),
        models.join(", "),
        format!("{:.1} s ago", worker.age_ms as f64 / 1e3),
    ]
}
