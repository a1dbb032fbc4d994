//! `tether bootstrap`, `registry`, `orchestrator`, `gateway` and `worker`: each runs one node of a network of
//! processes, until Ctrl-C. `tether join` ends here too.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use protocol::control::NodeRole;
use registry::{CertificateAuthority, CertificateAuthorityParts, TokenIssuer};
use rpc::transport::hyperswarm::BootstrapNode;
use rpc::{Enrolment, Membership};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use worker::WorkerHandle;

use super::{Context, Outcome, process_runtime};
use crate::args::NodeArgs;
use crate::data_folder::DataFolder;
use crate::local_models;
use crate::metrics::Metrics;
use crate::metrics_server::MetricsServer;
use crate::node::{Node, Pool, at_last_port, enrolment};
use crate::output;
use crate::services::{Services, first_key, open_job_store, open_registry_store, run_gateway};
use crate::tiny_model;

/// How often to check whether orchestrators accept the worker's reports.
const TELL_EVERY: Duration = Duration::from_secs(1);
/// A warning is logged if a worker takes longer than this to load its models.
const LOADING: Duration = Duration::from_mins(1);

/// Runs a bootstrap node.
pub(super) async fn bootstrap(context: Context, args: &NodeArgs) -> anyhow::Result<Outcome> {
    follow_parent(args)?;
    context.data.create()?;
    let _lock = context.data.lock(&["bootstrap"])?;
    let network = &context.settings.network;
    let bootstrap = network.bootstrap_addresses().await?;
    let start = async |listen| BootstrapNode::start(listen, bootstrap.clone(), network.public_address);
    let node = at_last_port(network.listen, context.data.listen_address("bootstrap"), start).await?;
    context.data.write_listen_address("bootstrap", node.local_address())?;
    context.keep_flags()?;
    output::line(format!(
        "bootstrap node on UDP {0}; nodes find each other with --bootstrap {0}",
        node.reachable_address()
    ));
    match MetricsServer::open(&context.settings, &Metrics::of(&["bootstrap"]).exposition).await? {
        Some(server) => drop(context.stop.run_until_cancelled(server.serve()).await),
        None => context.stop.cancelled().await,
    }
    node.stop().await;
    Ok(Outcome::Well)
}

/// Runs a registry. The first one of a data folder founds a network.
pub(super) async fn registry(context: Context, args: &NodeArgs) -> anyhow::Result<Outcome> {
    follow_parent(args)?;
    let data = &context.data;
    data.create()?;
    let _lock = data.lock(&["registry"])?;
    let store = open_registry_store(&data.registry_store())?;
    let clock: Arc<dyn protocol::Clock> = context.clock.clone();
    let tokens = TokenIssuer::new(store.clone(), clock.clone(), data.pepper()?);
    let (_, key_is_new) = first_key(data, &tokens).await?;
    registry::catalog::register(&*store, vec![tiny_model::entry(clock.now())]).await?;
    store.put_adapter(tiny_model::adapter_entry(clock.now())).await?;

    let node = Node::start(&context.settings, data, "registry", &[]).await?;
    let mut bootstrap = context.settings.network.bootstrap.clone();
    if bootstrap.is_empty() {
        // The registry is the network's first bootstrap node.
        bootstrap.push(node.address().to_string());
    }
    data.write_pool(&Pool { registry: node.public_key(), bootstrap: bootstrap.clone() })?;
    context.keep_flags()?;
    let mut parts = CertificateAuthorityParts::new(
        data.root_key()?,
        store.clone(),
        clock.clone(),
        data.pepper()?,
        node.public_key(),
    );
    parts.bootstrap.clone_from(&bootstrap);
    let authority = CertificateAuthority::new(parts);
    output::line(format!("registry {} on UDP {}", node.public_key(), node.address()));
    if key_is_new {
        output::line(format!("the API key that operates the network is kept in {}", data.api_key_file().display()));
    }
    output::line("next: tether invite --role orchestrator, --role gateway and --role worker, each for one node");

    let services = services(&context, "registry", clock);
    let stop = CancellationToken::new();
    let run = services.registry(node.transport(), store.clone(), authority, stop.clone());
    let outcome = run_until_stopped(&context.stop, &services, &node, &stop, run).await;
    store.close().await.context("could not close the store")?;
    outcome
}

/// Runs an enrolled node in its role.
pub(super) async fn enrolled(context: Context, role: NodeRole, args: &NodeArgs) -> anyhow::Result<Outcome> {
    follow_parent(args)?;
    context.data.create()?;
    let name = name(role)?;
    let _lock = context.data.lock(&[name])?;
    let Enrolment { bootstrap, .. } = enrolment(&context.data, name)?;
    let node = Node::start(&context.settings, &context.data, name, &bootstrap).await?;
    context.keep_flags()?;
    Box::pin(run_role(&context, role, &node)).await
}

/// Runs the service of a node that is on the network already.
pub(super) async fn run_role(context: &Context, role: NodeRole, node: &Node) -> anyhow::Result<Outcome> {
    let membership = node.membership(context.clock.clone())?;
    info!(role = node.name, key = %node.public_key(), address = %node.address(), "on the network");
    output::line(format!("{} {} on UDP {}", node.name, node.public_key(), node.address()));
    let mut services = services(context, name(role)?, context.clock.clone());
    let shown = services.clone();
    let stop = CancellationToken::new();
    match role {
        NodeRole::Orchestrator => {
            let store = open_job_store(&context.data.orchestrator_store())?;
            let run = services.orchestrator(node.transport(), store.clone(), membership, stop.clone());
            let outcome = run_until_stopped(&context.stop, &shown, node, &stop, run).await;
            store.close().await.context("could not close the store")?;
            outcome
        }
        NodeRole::Gateway => {
            let open = services.gateway(node.transport(), membership).await?;
            let scheme = if context.settings.gateway.tls_cert.is_some() { "https" } else { "http" };
            output::line(format!("OpenAI address {scheme}://{}/v1", open.address()));
            output::line(
                "ask it with an API key: the first lies in the registry's data folder, `tether token create` makes more",
            );
            let run = Box::pin(run_gateway(open, stop.clone()));
            let outcome = run_until_stopped(&context.stop, &shown, node, &stop, run).await;
            context.data.forget_address();
            outcome
        }
        NodeRole::Worker => {
            let run = Box::pin(worker(&mut services, node, membership, stop.clone()));
            run_until_stopped(&context.stop, &shown, node, &stop, run).await
        }
        NodeRole::Registry => bail!("a registry needs no invite; start it with `tether registry`"),
    }
}

async fn worker(
    services: &mut Services,
    node: &Node,
    membership: Membership,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    local_models::take_in(&mut services.settings, &services.data).await?;
    let epoch = services.data.next_epoch(node.name, 0)?;
    let worker = services.worker(node.transport(), &node.key, epoch, membership, process_runtime()?)?;
    let handle = worker.handle();
    let loading = async {
        match tokio::time::timeout(LOADING, handle.ready()).await {
            Ok(Ok(())) => output::line("every model is loaded"),
            Ok(Err(error)) => warn!("not every model is ready: {error:#}"),
            Err(_) => warn!("models are still loading after {} s", LOADING.as_secs()),
        }
    };
    let telling = tell_doctor(&services.data, &handle);
    tokio::join!(worker.run(stop.clone()), stop.run_until_cancelled(loading), stop.run_until_cancelled(telling));
    Ok(())
}

/// Records whether orchestrators accept the worker's reports, for `tether doctor` to read.
async fn tell_doctor(data: &DataFolder, handle: &WorkerHandle) {
    let mut written = None;
    loop {
        let unheard = handle.unheard();
        if written.as_ref() != Some(&unheard) {
            if let Err(error) = data.write_unheard(unheard.as_deref()) {
                warn!(%error, "could not write down whether the network hears this worker");
            }
            written = Some(unheard);
        }
        tokio::time::sleep(TELL_EVERY).await;
    }
}

/// Runs a service until it is asked to stop or ends by itself, and takes its node off the network.
async fn run_until_stopped(
    stop_requested: &CancellationToken,
    services: &Services,
    node: &Node,
    stop: &CancellationToken,
    run: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<Outcome> {
    let show = MetricsServer::open(&services.settings, &services.metrics.exposition).await?;
    let show = async {
        if let Some(server) = show {
            stop.run_until_cancelled(server.serve()).await;
        }
    };
    let keep = node.keep_peers(stop);
    let ask = async {
        stop.run_until_cancelled(stop_requested.cancelled()).await;
        stop.cancel();
    };
    let run = async {
        let outcome = run.await;
        let by_itself = !stop.is_cancelled();
        stop.cancel();
        outcome.map(|()| by_itself)
    };
    let (outcome, (), (), ()) = tokio::join!(run, ask, keep, show);
    node.stop().await;
    match outcome {
        Ok(false) => Ok(Outcome::Well),
        Ok(true) => bail!("the {} ended by itself", node.name),
        Err(error) => Err(error),
    }
}

fn services(context: &Context, role: &str, clock: Arc<dyn protocol::Clock>) -> Services {
    Services { settings: context.settings.clone(), data: context.data.clone(), metrics: Metrics::of(&[role]), clock }
}

/// Returns the name of a role's files.
pub(super) fn name(role: NodeRole) -> anyhow::Result<&'static str> {
    match role {
        NodeRole::Gateway => Ok("gateway"),
        NodeRole::Orchestrator => Ok("orchestrator"),
        NodeRole::Worker => Ok("worker"),
        NodeRole::Registry => bail!("a registry needs no invite; start it with `tether registry`"),
    }
}

/// Ends this process with its parent, if the arguments ask for that.
pub(super) fn follow_parent(args: &NodeArgs) -> anyhow::Result<()> {
    end_with_parent(args.with_parent)
}

pub(super) fn end_with_parent(is_wanted: bool) -> anyhow::Result<()> {
    #[cfg(target_os = "linux")]
    if is_wanted {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
            .context("could not be tied to the process that started it")?;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = is_wanted;
    Ok(())
}
