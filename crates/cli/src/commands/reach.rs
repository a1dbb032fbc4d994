//! Finds a running network, or starts one that ends with this command.

use std::time::Duration;

use anyhow::{anyhow, bail};
use protocol::Digest;
use protocol::control::Fleet;
use protocol::model::{ModelEntry, ModelKey};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::{Context, model_add, nodes, shipped, spinner};
use crate::args::ServerArgs;
use crate::client::{GatewayClient, Presence, Refusal, usual_url};
use crate::download::is_source;
use crate::local_models;
use crate::network::Network;
use crate::output;

/// How long a worker may take to serve a model that was just added.
const SERVED_WITHIN: Duration = Duration::from_secs(20);
/// How often to check whether one does.
const SERVED_AGAIN: Duration = Duration::from_millis(100);

/// A network that responds.
pub(super) struct Reached {
    pub(super) client: GatewayClient,
    /// The requested model, by its name in the network.
    pub(super) model: Option<String>,
    /// How long the network took from its start until its models were ready; `None` if it was already running.
    pub(super) load: Option<Duration>,
    own: Option<Network>,
}

/// Finds the network of the arguments, else of the data folder. If none runs, starts one that ends with the command.
/// `named` may be a model of the network, a model file, or a source to download.
pub(super) async fn reach(context: &mut Context, server: &ServerArgs, named: Option<&str>) -> anyhow::Result<Reached> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let file = named.and_then(local_models::as_file);
    let source = named.filter(|named| is_source(local_models::split(named).1));
    match client.presence().await {
        Presence::Answers => {
            let model = match (file, source) {
                (Some(file), _) => Some(model_of_file(context, server, &client, file).await?),
                (None, Some(source)) => Some(model_of_source(context, server, &client, source).await?),
                (None, None) => named.map(str::to_owned),
            };
            return Ok(Reached { client, model, load: None, own: None });
        }
        Presence::Closed(error) => return Err(error),
        // The user probably means that network, unless they gave a file or a source.
        Presence::Foreign(error) if file.is_none() && source.is_none() => return Err(error),
        Presence::Absent(error) if server.url.is_some() => return Err(error),
        Presence::Absent(_) | Presence::Foreign(_) => {}
    }
    // The user probably means the network of another folder, unless they gave a file or a source.
    let usual = GatewayClient::here(&usual_url(&context.settings), None, &context.settings, &context.data)?;
    if file.is_none()
        && source.is_none()
        && usual.url() != client.url()
        && !matches!(usual.presence().await, Presence::Absent(_))
    {
        bail!(
            "no network of {} runs, but one answers at {}; name its folder with --data-dir, or give --url and \
             --api-key-file",
            context.data.path().display(),
            usual.url()
        );
    }
    if let Some(source) = source {
        let key = Box::pin(model_add::of_source(context, server, source)).await?;
        return start(context, Some(&key.to_string()), None).await;
    }
    start(context, named, file).await
}

/// Starts a network for this command alone.
async fn start(context: &mut Context, named: Option<&str>, file: Option<&str>) -> anyhow::Result<Reached> {
    // Any free port: no other program uses this network.
    context.settings.gateway.bind.set_port(0);
    context.settings.workers = 1;
    if let Some(file) = file {
        local_models::serve_only(&mut context.settings, file);
    }
    local_models::take_in(&mut context.settings, &context.data).await?;
    let of_file = || context.settings.worker.models.first().map(|model| model.model_id.to_string());
    let model = if file.is_some() { of_file() } else { named.map(str::to_owned) };
    let waiting = spinner("no network runs here: starting one");
    let began = Instant::now();
    let network = Network::start(&context.settings, &context.data, shipped()).await?;
    let ready = network.ready().await;
    waiting.finish_and_clear();
    let client = GatewayClient::here(&network.url(), Some(network.api_key.clone()), &context.settings, &context.data);
    match (ready, client) {
        (Ok(()), Ok(client)) => Ok(Reached { client, model, load: Some(began.elapsed()), own: Some(network) }),
        (Err(error), _) | (_, Err(error)) => {
            network.stop().await?;
            Err(error)
        }
    }
}

/// Returns the model of a running network that has the bytes of a file. If there is no such model and the network is
/// this folder's, adds the file to it.
async fn model_of_file(
    context: &Context,
    server: &ServerArgs,
    client: &GatewayClient,
    file: &str,
) -> anyhow::Result<String> {
    if let Some(digest) = local_models::known_digest(&context.data, file)?
        && let Some(model) = model_of_digest(&client.models().await?, digest)
    {
        return Ok(model);
    }
    let (name, path) = local_models::name_and_path(file)?;
    if let Some(url) = &server.url {
        let shown = path.display();
        bail!("the network at {url} does not serve {file}; add it where a worker runs, by `tether model add {shown}`");
    }
    let ModelEntry { key, .. } = model_add::add_file(context, server, path, name).await?;
    output::note(format!(
        "the network that runs serves {file} as {key} from now on; `{} model rm {key}` takes it out",
        context.program()
    ));
    served(client, &key).await?;
    Ok(key.to_string())
}

/// Returns the model of a URL or a Hub repository. Adds it to this folder's network unless that was done before.
async fn model_of_source(
    context: &Context,
    server: &ServerArgs,
    client: &GatewayClient,
    source: &str,
) -> anyhow::Result<String> {
    if let Some(url) = &server.url {
        let source = local_models::split(source).1;
        bail!("the network at {url} is another machine's; add the model there, by `tether model add {source}`");
    }
    let key = Box::pin(model_add::of_source(context, server, source)).await?;
    served(client, &key).await?;
    Ok(key.to_string())
}

/// Waits until a worker serves a model that was just added.
async fn served(client: &GatewayClient, key: &ModelKey) -> anyhow::Result<()> {
    let deadline = Instant::now() + SERVED_WITHIN;
    loop {
        match client.get::<Value>(&format!("/v1/models/{key}")).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is::<Refusal>() && Instant::now() < deadline => sleep(SERVED_AGAIN).await,
            Err(error) => return Err(error.context("no worker of this data folder serves it yet")),
        }
    }
}

fn model_of_digest(listed: &Value, digest: Digest) -> Option<String> {
    let digest = digest.to_string();
    let is_it = |model: &&Value| model["digest"].as_str() == Some(&digest) && model["state"] != "unserved";
    let ids = listed["data"].as_array()?.iter().filter(is_it).filter_map(|model| model["id"].as_str());
    // An adapter's row has the digest of its model.
    ids.filter(|id| !id.contains(':')).map(str::to_owned).next()
}

impl Reached {
    /// Returns whether this command started the network and ends it.
    pub(super) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Stops the network if this command started it.
    pub(super) async fn leave(self) -> anyhow::Result<()> {
        match self.own {
            Some(network) => network.stop().await,
            None => Ok(()),
        }
    }
}

/// Returns an error for a model that the network does not have, with a suggestion. Returns `None` if the network has
/// it, or cannot be asked.
pub(super) async fn missing_model(client: &GatewayClient, model_name: &str) -> Option<anyhow::Error> {
    let listed: Value = client.models().await.ok()?;
    let names: Vec<&str> = listed["data"].as_array()?.iter().filter_map(|model| model["id"].as_str()).collect();
    // The requested version or adapter may exist without a row of its own in the list.
    let name = model_name.split(['@', ':']).next().unwrap_or(model_name);
    if names.iter().any(|known| known.split(['@', ':']).next() == Some(name)) {
        return None;
    }
    // A model that was never ready is not listed. Only an operator's key may see why.
    let fleet: Fleet = client.get("/admin/v1/nodes").await.unwrap_or_default();
    let mut failures = nodes::failures(&fleet);
    if let Some((worker, model, why)) = failures.find(|(_, model, _)| model.model_id.as_str() == name) {
        return Some(anyhow!("{model} on {} is in error: {why}", worker.short()));
    }
    Some(match output::nearest(model_name, names) {
        Some(meant) => anyhow!("there is no model {model_name:?}; did you mean {meant}? `tether list` shows all"),
        None => anyhow!("there is no model {model_name:?}; `tether list` shows those that there are"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_is_asked_by_the_name_that_the_network_has_for_its_bytes() {
        let digest = Digest::of(b"mine");
        let row =
            |id: &str, digest: Digest, state: &str| json!({ "id": id, "digest": digest.to_string(), "state": state });
        let other = row("other", Digest::of(b"other"), "ready");
        let listed = json!({ "data": [other, row("mine:adapter", digest, "ready"), row("mine@1.0", digest, "idle")] });
        assert_eq!(model_of_digest(&listed, digest).as_deref(), Some("mine@1.0"));
        let gone = json!({ "data": [row("mine", digest, "unserved")] });
        assert_eq!(model_of_digest(&gone, digest), None);
    }
}
