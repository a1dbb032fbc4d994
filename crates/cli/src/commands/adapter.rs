//! `tether model adapter`: adds, lists and removes LoRA adapters.

use anyhow::Context as _;
use artifact_store::ArtifactStore;
use protocol::control::{AdapterAdd, AdapterList, AdapterRemoved};
use protocol::model::{AdapterEntry, ModelRef};

use super::{Context, Outcome};
use crate::args::{AdapterAddArgs, ServerArgs};
use crate::client::GatewayClient;
use crate::output;

pub(super) async fn add(context: Context, args: AdapterAddArgs) -> anyhow::Result<Outcome> {
    let ModelRef { name: model_id, version, .. } = model(&args.model)?;
    let adapter = args.name.parse()?;
    let client = GatewayClient::find(&args.server, &context.settings, &context.data, &context.env)?;
    context.data.create()?;
    let artifacts = ArtifactStore::in_folder(context.data.artifacts()).context("could not open the artifact store")?;
    let file = args.file.clone();
    let stored = tokio::task::spawn_blocking(move || artifacts.put_file(&file)).await?;
    let stored = stored.with_context(|| format!("could not take {} in", args.file.display()))?;
    let new = AdapterAdd {
        model_id,
        version,
        adapter,
        digest: stored.digest,
        bytes: stored.bytes,
        description: args.description,
    };
    let added: AdapterEntry = client.post("/admin/v1/adapters", &new).await?;
    if context.json {
        output::json(&added)?;
    } else {
        output::line(format!(
            "{} is registered. Workers that have its file in their store serve it with these lines under the model:\n\n\
             [[worker.models.adapters]]\nname = \"{}\"\ndigest = \"{}\"",
            added.key, added.key.adapter, added.digest
        ));
    }
    Ok(Outcome::Well)
}

pub(super) async fn list(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let AdapterList { adapters } = client.get("/admin/v1/adapters").await?;
    if context.json {
        output::json(&adapters)?;
        return Ok(Outcome::Well);
    }
    let row = |entry: AdapterEntry| {
        let digest = entry.digest.to_string().chars().take(12).collect();
        vec![entry.key.to_string(), entry.bytes.to_string(), digest, entry.description]
    };
    let rows: Vec<Vec<String>> = adapters.into_iter().map(row).collect();
    output::table(&["ADAPTER", "BYTES", "DIGEST", "DESCRIPTION"], &rows);
    Ok(Outcome::Well)
}

pub(super) async fn remove(
    context: Context,
    model_name: &str,
    name: &str,
    server: &ServerArgs,
) -> anyhow::Result<Outcome> {
    let adapter = ModelRef { adapter: Some(name.parse()?), ..model(model_name)? };
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let removed: AdapterRemoved = client.delete(&format!("/admin/v1/adapters/{adapter}")).await?;
    if removed.found {
        output::line(format!("{adapter} is forgotten; requests for it are refused within 5 seconds"));
        Ok(Outcome::Well)
    } else {
        output::line(format!("there is no adapter {adapter}; `tether model adapter list` shows them"));
        Ok(Outcome::Finding)
    }
}

/// Parses a model's name, and refuses an adapter in it.
fn model(text: &str) -> anyhow::Result<ModelRef> {
    let model: ModelRef = text.parse()?;
    anyhow::ensure!(model.adapter.is_none(), "{text}: give the model and the adapter's name apart");
    Ok(model)
}
