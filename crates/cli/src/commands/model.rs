//! `tether model`: shows, names and removes the models of the network.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use artifact_store::ArtifactStore;
use engine::gguf::Header;
use indicatif::DecimalBytes;
use protocol::control::{
    AliasList, AliasSet, Catalog, Fleet, FleetWorker, Member, ModelKeep, ModelRemove, ModelResidency, ResidencyState,
    WorkerResidency,
};
use protocol::health::{DevicePlacement, ModelState};
use protocol::model::{AliasEntry, ModelEntry, ModelFacts, ModelKey, ModelRef};
use protocol::{Digest, ModelName};
use serde_json::{Value, json};

use super::model_add::model_name;
use super::{Context, Outcome};
use crate::args::{ModelAliasArgs, ServerArgs};
use crate::client::GatewayClient;
use crate::operator::{AdminClient, responds};
use crate::output;
use crate::tiny_model;

/// A worker has the model in memory.
const READY: &str = "ready";
/// Its file is on a worker's disk.
const ON_DISK: &str = "on disk";
/// A worker fetches its file at the first request.
const NOT_FETCHED: &str = "not fetched";
/// How often to check whether a model is loaded.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long to wait for a load.
const LOAD_WITHIN: Duration = Duration::from_mins(10);
/// The most lines of a chat template that are shown.
const TEMPLATE_LINES: usize = 12;
/// The most characters of such a line.
const TEMPLATE_CHARS: usize = 120;

/// Everything known about the network's models.
struct Models {
    /// The gateway's list, if one answers.
    listed: Option<Value>,
    catalog: Catalog,
    /// `None` if no gateway reports it.
    fleet: Option<Fleet>,
    /// Node names by public key, as far as they are known.
    names: BTreeMap<String, String>,
}

pub(super) async fn list(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let models = Models::look(&context, server).await?;
    let artifacts = artifacts(&context)?;
    if context.json {
        output::json(&models.as_json(artifacts.as_ref()))?;
        return Ok(Outcome::Well);
    }
    let head = ["MODEL", "SIZE", "QUANT", "CONTEXT", "STATE", "WHERE", "ALIASES"];
    let mut rows: Vec<Vec<String>> = vec![];
    for entry in &models.catalog.models {
        rows.push(models.row(entry, artifacts.as_ref()));
        let adapters = models.catalog.adapters.iter().filter(|adapter| adapter.key.model == entry.key);
        rows.extend(adapters.map(|adapter| {
            let size = DecimalBytes(adapter.bytes).to_string();
            vec![format!("{}:{}", entry.key, adapter.key.adapter), size, "adapter".into()]
        }));
    }
    if models.catalog.adapters.is_empty() {
        // A user who may not list the registered adapters still sees the served ones.
        let listed = models.listed.iter().filter_map(|listed| listed["data"].as_array()).flatten();
        let ids = listed.filter(|row| row["alias_of"].is_null()).filter_map(|row| row["id"].as_str());
        rows.extend(
            ids.filter(|id| id.contains(':')).map(|id| vec![id.to_owned(), String::new(), "adapter".to_owned()]),
        );
    }
    output::table(&head, &rows);
    let is_known = |name: &ModelName| models.catalog.models.iter().any(|entry| entry.key.model_id == *name);
    for entry in &models.catalog.aliases {
        for target in entry.targets().filter(|target| !is_known(&target.name)) {
            output::line(format!("{} stands for {target}, which is not there any more", entry.alias));
        }
    }
    Ok(Outcome::Well)
}

pub(super) async fn show(context: Context, model: &str, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let models = Models::look(&context, server).await?;
    let artifacts = artifacts(&context)?;
    let entry = models.find(model)?;
    let (states, ends) = (models.states(&entry.key), models.aliases_of(&entry.key));
    let template = template(artifacts.as_ref(), &entry.digest);
    if context.json {
        let mut shown = serde_json::to_value(entry)?;
        shown["state"] = models.state(entry, artifacts.as_ref()).into();
        shown["where"] = states.iter().map(|(node, state)| json!({ "node": node, "state": state })).collect();
        shown["aliases"] = ends.into();
        shown["template"] = template.into();
        output::json(&shown)?;
        return Ok(Outcome::Well);
    }
    let mut lines = vec![(entry.key.to_string(), String::new())];
    let mut say = |what: &str, text: String| {
        if !text.is_empty() {
            lines.push((what.to_owned(), text));
        }
    };
    let facts = entry.facts.clone().unwrap_or_default();
    say("made as", output::one_line(&facts.name));
    say("architecture", output::one_line(&facts.architecture));
    say("parameters", if facts.parameters > 0 { count(facts.parameters) } else { String::new() });
    say("quantisation", output::one_line(&facts.quantisation));
    say("size", size(entry.bytes));
    say("memory", if facts.memory_bytes > 0 { format!("about {}", size(facts.memory_bytes)) } else { String::new() });
    say("context", context_of(entry, &facts));
    say("can do", facts.capabilities.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    if entry.description != facts.name {
        say("described as", output::one_line(&entry.description));
    }
    say("digest", format!("sha256:{}", entry.digest));
    say("state", models.state(entry, artifacts.as_ref()));
    say("where", states.iter().map(|(node, state)| format!("{node} {state}")).collect::<Vec<_>>().join(", "));
    for (node, placement) in models.device_placements(&entry.key) {
        say("computed", format!("on {node}: {}", output::one_line(&placement.to_string())));
    }
    say("kept", kept(entry));
    say("aliases", ends.join(", "));
    let adapters = models.catalog.adapters.iter().filter(|adapter| adapter.key.model == entry.key);
    say("adapters", adapters.map(|adapter| adapter.key.adapter.to_string()).collect::<Vec<_>>().join(", "));
    let width = lines.iter().skip(1).map(|(what, _)| what.len()).max().unwrap_or(0);
    for (number, (what, text)) in lines.iter().enumerate() {
        output::line(if number == 0 { what.clone() } else { format!("  {what:<width$}  {text}") });
    }
    if let Some(template) = template {
        output::line("\n  chat template");
        for line in template {
            output::line(format!("    {line}"));
        }
    } else if facts.chat_template {
        output::line("\n  It has a chat template; where its file lies, this shows it.");
    }
    Ok(Outcome::Well)
}

pub(super) async fn remove(context: Context, model: &str, force: bool, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let ModelRef { name: model_id, version, adapter } = model_ref(model)?;
    ensure!(adapter.is_none(), "{model} is an adapter; `tether model adapter rm` forgets adapters");
    ensure!(model_id != tiny_model::key().model_id, "{model_id} comes with the program and is always there");
    let admin = AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await?;
    let removed = admin.remove_model(ModelRemove { model_id, version, force }).await;
    admin.leave().await?;
    let removed = removed?;
    // Other machines decide for themselves what they keep; this one deletes what the network no longer needs.
    let is_registrys = server.url.is_none() && context.data.registry_store().exists();
    let (mut freed, mut deleted) = (0, vec![]);
    if let Some(artifacts) = artifacts(&context)?.filter(|_| is_registrys) {
        let settings = &context.settings.worker.models;
        for digest in removed.unused.iter().filter(|digest| !settings.iter().any(|it| it.digest == Some(**digest))) {
            let bytes = artifacts.peek(digest).and_then(|file| file.metadata()).map_or(0, |metadata| metadata.len());
            if artifacts.remove(digest).context("could not delete the model's file")? {
                freed += bytes;
                deleted.push(*digest);
            }
        }
    }
    if context.json {
        output::json(&json!({ "removed": removed, "deleted": deleted, "freedBytes": freed }))?;
        return Ok(Outcome::Well);
    }
    let files = if deleted.is_empty() { String::new() } else { format!("; its file is deleted, {}", size(freed)) };
    output::line(format!("{} is forgotten{files}", removed.key));
    for alias in &removed.aliases {
        output::line(format!("so is {alias}, which stood for it"));
    }
    Ok(Outcome::Well)
}

/// Loads a model and waits until it is in memory; with a `keep_alive` of 0, unloads it instead.
pub(super) async fn load(
    context: Context,
    model: &str,
    keep_alive_secs: Option<i64>,
    server: &ServerArgs,
) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let path = format!("/admin/v1/models/{}/load", model_ref(model)?);
    let begun = Instant::now();
    let mut body = keep_alive_secs.map_or_else(|| json!({}), |secs| json!({ "keepAliveSecs": secs }));
    let wanted = if keep_alive_secs == Some(0) { ResidencyState::Unloaded } else { ResidencyState::Loaded };
    loop {
        let residency: ModelResidency = client.post(&path, &body).await?;
        // The `keep_alive` is sent once.
        body = json!({});
        let is_loading = residency.workers.iter().any(|worker| worker.state == ResidencyState::Loading);
        if !is_loading || begun.elapsed() >= LOAD_WITHIN {
            return print_residency(&context, client, &residency, wanted).await;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Pins or unpins a model on its workers.
pub(super) async fn pin(context: Context, model: &str, pin: bool, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let ModelRef { name: model_id, version, adapter } = model_ref(model)?;
    ensure!(adapter.is_none(), "{model} is an adapter; pin its model");
    let admin = AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await?;
    let kept = admin.keep_model(ModelKeep { model_id, version, pin: Some(pin), keep_alive_secs: None }).await;
    admin.leave().await?;
    let kept = kept?;
    if context.json {
        output::json(&kept)?;
    } else if pin {
        let key = &kept.key;
        output::line(format!(
            "{key} is pinned: workers that may serve it load it within seconds, and keep it in memory"
        ));
    } else {
        output::line(format!("{} is no longer pinned; it is unloaded when idle", kept.key));
    }
    Ok(Outcome::Well)
}

pub(super) async fn unload(context: Context, model: &str, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let path = format!("/admin/v1/models/{}/unload", model_ref(model)?);
    let residency: ModelResidency = client.post(&path, &json!({})).await?;
    print_residency(&context, client, &residency, ResidencyState::Unloaded).await
}

/// Prints whether a model is in memory. The outcome says whether every worker has it in the wanted state.
async fn print_residency(
    context: &Context,
    client: GatewayClient,
    residency: &ModelResidency,
    wanted: ResidencyState,
) -> anyhow::Result<Outcome> {
    let ModelResidency { key, workers } = residency;
    ensure!(!workers.is_empty(), "no worker serves {key}; `{} model list` shows where models are", context.program());
    let outcome = if workers.iter().all(|worker| worker.state == wanted) { Outcome::Well } else { Outcome::Finding };
    if context.json {
        output::json(residency)?;
        return Ok(outcome);
    }
    let names = names(client).await;
    for WorkerResidency { worker_id, state, reason } in workers {
        let worker = names.get(&worker_id.to_string()).cloned().unwrap_or_else(|| worker_id.short());
        let state = match state {
            ResidencyState::Loaded => "in memory",
            ResidencyState::Loading => "being loaded",
            ResidencyState::Unloaded => "not in memory",
            ResidencyState::InUse => "in use",
            ResidencyState::Failed => "not loaded",
            ResidencyState::Unknown => "not known",
        };
        let reason = reason.as_ref().map(|reason| format!(": {}", reason.escape_debug())).unwrap_or_default();
        output::line(format!("{key} at {worker}: {state}{reason}"));
    }
    Ok(outcome)
}

pub(super) async fn alias(context: Context, args: ModelAliasArgs) -> anyhow::Result<Outcome> {
    let alias = model_name(&args.alias)?;
    let mut targets = args.targets.iter().map(|target| model_ref(target)).collect::<Result<Vec<_>, _>>()?.into_iter();
    let admin = AdminClient::of_registry(&args.server, &context.settings, &context.data, &context.env).await?;
    let done = match targets.next() {
        Some(target) => {
            let set = admin.set_alias(AliasSet { alias, target, alternatives: targets.collect() }).await;
            set.and_then(|set| say_alias(&context, &set))
        }
        None => admin.remove_alias(alias.clone()).await.map(|removed| {
            if removed.found {
                output::line(format!("{alias} is forgotten; requests for it are refused within 5 seconds"));
                Outcome::Well
            } else {
                output::line(format!("there is no alias {alias}; `tether model list` shows them"));
                Outcome::Finding
            }
        }),
    };
    admin.leave().await?;
    done
}

fn say_alias(context: &Context, set: &AliasEntry) -> anyhow::Result<Outcome> {
    if context.json {
        output::json(set)?;
    } else {
        let targets: Vec<String> = set.targets().map(ModelRef::to_string).collect();
        output::line(format!("{} stands for {} within 5 seconds", set.alias, targets.join(", ")));
    }
    Ok(Outcome::Well)
}

/// Returns node names by public key, as far as they are known.
async fn names(client: GatewayClient) -> BTreeMap<String, String> {
    let members: Vec<Member> = AdminClient::Gateway(client).members().await.unwrap_or_default();
    let named = members.into_iter().filter(|member| !member.node.name.is_empty());
    named.map(|member| (member.node.public_key.to_string(), output::one_line(&member.node.name))).collect()
}

impl Models {
    /// Asks the gateway, or if none responds the registry or its store.
    async fn look(context: &Context, server: &ServerArgs) -> anyhow::Result<Self> {
        let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
        let has_registry = context.data.registry_store().exists() || context.data.pool()?.is_some();
        if server.url.is_some() || !has_registry || responds(&client).await? {
            let listed = client.models().await?;
            let catalog = of_gateway(&client, &listed).await;
            let fleet = client.get("/admin/v1/nodes").await.ok();
            return Ok(Self { listed: Some(listed), catalog, fleet, names: names(client).await });
        }
        let admin = AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await?;
        let catalog = admin.catalog().await;
        admin.leave().await?;
        Ok(Self { listed: None, catalog: catalog?, fleet: None, names: BTreeMap::new() })
    }

    /// Finds a model by its name, with or without a version, or by an alias.
    fn find(&self, text: &str) -> anyhow::Result<&ModelEntry> {
        let mut wanted = model_ref(text)?;
        if let Some(alias) =
            self.catalog.aliases.iter().find(|entry| entry.alias == wanted.name && !entry.is_own_name())
        {
            let targets: Vec<String> = alias.targets().map(ModelRef::to_string).collect();
            if targets.len() > 1 {
                return Err(anyhow!("{} stands for {}: name one of them", alias.alias, targets.join(", ")));
            }
            wanted = alias.target.clone();
        }
        let versions = self.catalog.models.iter().filter(|entry| entry.key.model_id == wanted.name);
        let found = match wanted.version {
            Some(version) => versions.into_iter().find(|entry| entry.key.version == version),
            None => versions.max_by_key(|entry| entry.key.version),
        };
        found.ok_or_else(|| {
            let names = self.catalog.models.iter().map(|entry| entry.key.model_id.as_str());
            match output::nearest(text, names) {
                Some(meant) => anyhow!("there is no model {text:?}; did you mean {meant}? `tether list` shows all"),
                None => anyhow!("there is no model {text:?}; `tether list` shows those that there are"),
            }
        })
    }

    /// Returns the workers that serve a model, each with the model's state there.
    fn states(&self, key: &ModelKey) -> Vec<(String, String)> {
        let workers = self.fleet.iter().flat_map(|fleet| &fleet.workers);
        let serving = workers.filter(|worker| !worker.report.draining && worker.report.supported.contains(key));
        serving.map(|worker| (self.name_of(worker), state_on(worker, key))).collect()
    }

    /// Returns a model's placement on each worker that has it in memory.
    fn device_placements(&self, key: &ModelKey) -> Vec<(String, &DevicePlacement)> {
        let workers = self.fleet.iter().flat_map(|fleet| &fleet.workers);
        let placed = workers.filter_map(|worker| {
            let cached = worker.report.model_cache.iter().find(|cached| cached.key == *key)?;
            Some((self.name_of(worker), cached.placement.as_ref()?))
        });
        placed.collect()
    }

    fn name_of(&self, worker: &FleetWorker) -> String {
        let key = worker.report.worker_id;
        self.names.get(&key.to_string()).cloned().unwrap_or_else(|| key.short())
    }

    /// Returns the best state that a model has on any worker.
    fn state(&self, entry: &ModelEntry, artifacts: Option<&ArtifactStore>) -> String {
        let rank = |state: &str| match state {
            READY => 4,
            ON_DISK => 2,
            NOT_FETCHED => 1,
            failed if failed.starts_with("failed") => 0,
            _ => 3,
        };
        let states = self.states(&entry.key);
        if let Some((_, best)) = states.iter().max_by_key(|(_, state)| rank(state)) {
            return best.clone();
        }
        // A user who may not see the workers still sees the gateway's state.
        let rows = self.listed.iter().filter_map(|listed| listed["data"].as_array()).flatten();
        let mut rows = rows.filter(|row| is_row_of(row, entry));
        match rows.find_map(|row| row["state"].as_str()) {
            Some("idle") => ON_DISK.to_owned(),
            Some(state) if state != "unserved" => state.to_owned(),
            _ if artifacts.is_some_and(|artifacts| artifacts.contains(&entry.digest)) => ON_DISK.to_owned(),
            _ => "not served".to_owned(),
        }
    }

    fn aliases_of(&self, key: &ModelKey) -> Vec<String> {
        let is_newest = self
            .catalog
            .models
            .iter()
            .all(|entry| entry.key.model_id != key.model_id || entry.key.version <= key.version);
        let stands = |target: &&ModelRef| {
            target.name == key.model_id && target.version.map_or(is_newest, |version| version == key.version)
        };
        let shown = |entry: &AliasEntry| {
            entry.targets().find(stands).map(|target| match &target.adapter {
                Some(adapter) => format!("{} (:{adapter})", entry.alias),
                None => entry.alias.to_string(),
            })
        };
        self.catalog.aliases.iter().filter_map(shown).collect()
    }

    fn row(&self, entry: &ModelEntry, artifacts: Option<&ArtifactStore>) -> Vec<String> {
        let nodes = node_states(&self.states(&entry.key));
        let facts = entry.facts.clone().unwrap_or_default();
        vec![
            entry.key.to_string(),
            if entry.bytes > 0 { size(entry.bytes) } else { "-".to_owned() },
            output::one_line(&facts.quantisation),
            entry.context_length.to_string(),
            self.state(entry, artifacts),
            nodes,
            self.aliases_of(&entry.key).join(", "),
        ]
    }

    /// Returns the gateway's list with further facts, or a list of the same form if no gateway answers.
    fn as_json(&self, artifacts: Option<&ArtifactStore>) -> Value {
        let mut list = self.listed.clone().unwrap_or_else(|| {
            let rows = self.catalog.models.iter().map(|entry| {
                let id =
                    if self.is_newest(&entry.key) { entry.key.model_id.to_string() } else { entry.key.to_string() };
                json!({
                    "id": id, "object": "model", "version": entry.key.version, "digest": entry.digest,
                    "bytes": entry.bytes, "context_length": entry.context_length, "facts": entry.facts,
                    "description": entry.description, "state": self.state(entry, artifacts),
                })
            });
            json!({ "object": "list", "data": rows.collect::<Vec<_>>() })
        });
        for row in list["data"].as_array_mut().into_iter().flatten() {
            if let Some(entry) = self.catalog.models.iter().find(|entry| is_row_of(row, entry)) {
                let nodes = self.states(&entry.key);
                row["where"] = nodes.iter().map(|(node, state)| json!({ "node": node, "state": state })).collect();
                row["aliases"] = self.aliases_of(&entry.key).into();
            }
        }
        list
    }

    fn is_newest(&self, key: &ModelKey) -> bool {
        self.catalog.models.iter().all(|entry| entry.key.model_id != key.model_id || entry.key.version <= key.version)
    }
}

/// Returns the nodes that have a model, those with it in memory first. A node that would have to fetch the file does
/// not count.
fn node_states(states: &[(String, String)]) -> String {
    let named = |(node, state): &(String, String)| match state.as_str() {
        READY => node.clone(),
        ON_DISK => format!("{node} (disk)"),
        failed if failed.starts_with("failed") => format!("{node} (failed)"),
        state => format!("{node} ({state})"),
    };
    let mut there: Vec<_> = states.iter().filter(|(_, state)| state != NOT_FETCHED).collect();
    there.sort_by_key(|(_, state)| (state != READY, state == ON_DISK));
    there.into_iter().map(named).collect::<Vec<_>>().join(", ")
}

/// Returns the catalogue through a gateway: complete for an operator, otherwise only what the list shows.
async fn of_gateway(client: &GatewayClient, listed: &Value) -> Catalog {
    let mut catalog = AdminClient::catalog_of_list(listed);
    if let Ok(AliasList { aliases }) = client.get("/admin/v1/aliases").await {
        catalog.aliases = aliases;
    }
    if let Ok(protocol::control::AdapterList { adapters }) = client.get("/admin/v1/adapters").await {
        catalog.adapters = adapters;
    }
    catalog
}

/// Returns whether a row of a gateway's list is a model's own, and not an adapter's.
fn is_row_of(row: &Value, entry: &ModelEntry) -> bool {
    let name = row["id"].as_str().unwrap_or_default().split('@').next().unwrap_or_default();
    row["alias_of"].is_null()
        && name == entry.key.model_id.as_str()
        && row["version"].as_str() == Some(entry.key.version.to_string().as_str())
}

fn state_on(worker: &FleetWorker, key: &ModelKey) -> String {
    let report = &worker.report;
    let Some(cached) = report.model_cache.iter().find(|cached| cached.key == *key) else {
        return if report.to_fetch.contains(key) { NOT_FETCHED } else { ON_DISK }.to_owned();
    };
    match (cached.state, cached.loading) {
        (ModelState::Ready, _) => READY.to_owned(),
        (ModelState::Loading, Some(progress)) if progress.fetching => format!("fetching {} %", progress.percent),
        (ModelState::Loading, Some(progress)) => format!("loading {} %", progress.percent),
        (ModelState::Loading, None) => "loading".to_owned(),
        (ModelState::Error, _) => cached
            .reason
            .as_deref()
            .map_or_else(|| "failed".to_owned(), |why| format!("failed: {}", output::one_line(why))),
    }
}

fn artifacts(context: &Context) -> anyhow::Result<Option<ArtifactStore>> {
    let folder = context.data.artifacts();
    if !folder.exists() {
        return Ok(None);
    }
    let artifacts = ArtifactStore::in_folder(folder).context("could not open the artifact store")?;
    Ok(Some(tiny_model::embedded_in(artifacts)))
}

/// Returns the first lines of a model's chat template, safe for a terminal, if its file is here.
fn template(artifacts: Option<&ArtifactStore>, digest: &Digest) -> Option<Vec<String>> {
    let header = if *digest == tiny_model::digest() {
        Header::parse(tiny_model::BYTES).ok()?
    } else {
        Header::read(&artifacts?.peek(digest).ok()?).ok()?
    };
    let template = header.chat_template()?;
    let mut lines: Vec<String> =
        template.lines().take(TEMPLATE_LINES).map(|line| line.escape_debug().take(TEMPLATE_CHARS).collect()).collect();
    if template.lines().count() > TEMPLATE_LINES {
        lines.push("…".to_owned());
    }
    Some(lines)
}

/// Returns how long workers keep a model in memory, if an operator has set that.
fn kept(entry: &ModelEntry) -> String {
    match (entry.pin, entry.keep_alive_secs) {
        (true, _) => "pinned".to_owned(),
        (false, Some(secs)) if secs < 0 => "for ever, unless others need its memory".to_owned(),
        (false, Some(secs)) => format!("{secs} s without work"),
        (false, None) => String::new(),
    }
}

fn context_of(entry: &ModelEntry, facts: &ModelFacts) -> String {
    match facts.trained_context {
        0 => format!("{} tokens", entry.context_length),
        trained => format!("{} tokens, trained with {trained}", entry.context_length),
    }
}

fn model_ref(text: &str) -> anyhow::Result<ModelRef> {
    text.parse().map_err(|error| anyhow!("{text:?} names no model: {error}"))
}

fn size(bytes: u64) -> String {
    DecimalBytes(bytes).to_string()
}

/// Formats a number of parameters for people.
fn count(parameters: u64) -> String {
    let number = parameters as f64;
    match parameters {
        1_000_000_000.. => format!("{:.1} billion", number / 1e9),
        1_000_000.. => format!("{:.1} million", number / 1e6),
        _ => parameters.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_node_that_has_the_model_and_says_where() {
        let state = |node: &str, state: &str| (node.to_owned(), state.to_owned());
        let states = [
            state("a", ON_DISK),
            state("b", NOT_FETCHED),
            state("c", "fetching 43 %"),
            state("d", READY),
            state("e", "failed: no room"),
        ];
        assert_eq!(node_states(&states), "d, c (fetching 43 %), e (failed), a (disk)");
        assert_eq!(node_states(&states[1..2]), "");
    }
}
