//! `tether model add`: takes models into this machine's store and registers them.

use std::collections::BTreeSet;

use anyhow::{Context as _, bail, ensure};
use artifact_store::{ArtifactStore, Way};
use engine::memory_plan::CONTEXT_DEFAULT;
use indicatif::DecimalBytes;
use protocol::control::{Catalog, ModelAdd};
use protocol::model::{ModelEntry, ModelFacts, ModelKey};
use protocol::{ModelName, ModelVersion};
use registry::models;

use super::{Context, Outcome};
use crate::args::ModelAddArgs;
use crate::client::{GatewayClient, Presence};
use crate::local_models;
use crate::model_file::{ModelFile, Take};
use crate::model_names;
use crate::operator::Desk;
use crate::output;
use crate::tiny_model;

/// What a model is to be called, where that is said.
#[derive(Debug, Clone, Default)]
struct Wanted {
    name: Option<ModelName>,
    version: Option<ModelVersion>,
    description: Option<String>,
}

pub(super) async fn run(context: Context, args: ModelAddArgs) -> anyhow::Result<Outcome> {
    let wanted = Wanted::of(&args)?;
    // A key that may not, or a network that does not answer, is said before anything is copied.
    let desk = Desk::of_tokens(&args.server, &context.settings, &context.data, &context.env).await?;
    let added = add_all(&context, &desk, &args, &wanted).await;
    desk.leave().await?;
    let added = added?;
    if context.json {
        output::json(&added)?;
        return Ok(Outcome::Well);
    }
    let Some(first) = added.first() else { return Ok(Outcome::Well) };
    output::line(next(&context, desk_runs(&context, &args).await.as_deref(), &first.key));
    Ok(Outcome::Well)
}

/// Returns where the network is that runs here, where one does.
async fn desk_runs(context: &Context, args: &ModelAddArgs) -> Option<String> {
    let client = GatewayClient::find(&args.server, &context.settings, &context.data, &context.env).ok()?;
    matches!(client.presence().await, Presence::Answers).then(|| client.url().to_owned())
}

fn next(context: &Context, running: Option<&str>, key: &ModelKey) -> String {
    let program = context.program();
    let up = match running {
        None => format!("  {program} up"),
        Some(url) => format!("  {program} up    (again: the network at {url} serves it from its next start on)"),
    };
    format!("\nNext:\n\n{up}\n  {program} run {} \"What is the capital of Japan?\"", key.model_id)
}

async fn add_all(
    context: &Context,
    desk: &Desk,
    args: &ModelAddArgs,
    wanted: &Wanted,
) -> anyhow::Result<Vec<ModelEntry>> {
    let mut files = vec![];
    let mut seen = BTreeSet::new();
    for source in &args.sources {
        let path = std::path::absolute(source).with_context(|| format!("{source:?} is no path"))?;
        let file = tokio::task::spawn_blocking(move || ModelFile::open(&path)).await??;
        // Whoever names all parts of a model names one model.
        if seen.insert(file.first().to_owned()) {
            files.push(file);
        }
    }
    let is_one = files.len() == 1;
    ensure!(is_one || (wanted.name.is_none() && wanted.version.is_none()), "--name and --version are for one model");
    let mut added = vec![];
    for file in files {
        added.push(add(context, desk, file, Take::Copy, wanted).await?);
    }
    Ok(added)
}

/// Takes a file in and registers it.
async fn add(
    context: &Context,
    desk: &Desk,
    file: ModelFile,
    how: Take,
    wanted: &Wanted,
) -> anyhow::Result<ModelEntry> {
    let shown = file.first().display().to_string();
    let Some(name) = wanted.name.clone().or_else(|| file.name()) else {
        bail!("{shown}: no name can be made of this file's; give it one with --name");
    };
    ensure!(name != tiny_model::key().model_id, "{name} comes with the program; choose another name with --name");
    let catalog = desk.catalog().await?;
    check_free(&catalog, &name, wanted.version, file.bytes()?)?;
    context.data.create()?;
    let artifacts = ArtifactStore::in_folder(context.data.artifacts()).context("could not open the artifact store")?;
    let (facts, context_length) = (file.facts(), file.header().context_length().unwrap_or(0).min(CONTEXT_DEFAULT));
    let (stored, way) = {
        let (artifacts, index, stop) = (artifacts.clone(), local_models::index(&context.data), context.stop.clone());
        tokio::task::spawn_blocking(move || local_models::take(&artifacts, &index, &file, how, &stop)).await??
    };
    let new = ModelAdd {
        model_id: name,
        version: wanted.version,
        digest: stored.digest,
        bytes: stored.bytes,
        context_length,
        description: wanted.description.clone().unwrap_or_else(|| facts.name.clone()),
        facts: Some(facts),
    };
    match register(context, desk, new).await {
        Ok(entry) => {
            if !context.json {
                output::line(told(&entry, way));
            }
            Ok(entry)
        }
        Err(error) => {
            // What is in nobody's list is of no use.
            let is_listed = |entry: &ModelEntry| entry.digest == stored.digest;
            if way != Way::Known && !catalog.models.iter().any(is_listed) {
                artifacts.remove(&stored.digest).context("could not take the file out of the store again")?;
            }
            Err(error)
        }
    }
}

async fn register(context: &Context, desk: &Desk, new: ModelAdd) -> anyhow::Result<ModelEntry> {
    if context.stop.is_cancelled() {
        bail!("stopped; the model is not registered");
    }
    desk.add_model(new).await
}

/// Refuses before the copy what would be refused after it. Files of different lengths differ.
fn check_free(catalog: &Catalog, name: &ModelName, version: Option<ModelVersion>, bytes: u64) -> anyhow::Result<()> {
    let may_be_same = catalog.models.iter().any(|entry| {
        entry.key.model_id == *name
            && version.is_none_or(|version| entry.key.version == version)
            && entry.bytes == bytes
    });
    if !may_be_same {
        models::free_key(catalog, name, version, None)?;
    }
    Ok(())
}

fn told(entry: &ModelEntry, way: Way) -> String {
    let how = match way {
        Way::Known => ", whose file was in the store already",
        Way::Linked => ", whose file takes no further room",
        Way::Cloned | Way::Copied => "",
    };
    let facts = entry.facts.as_ref().map(|facts| format!(": {}", summary(facts, entry.bytes))).unwrap_or_default();
    format!("{} is added{how}{facts}", entry.key)
}

fn summary(facts: &ModelFacts, bytes: u64) -> String {
    let mut parts = vec![DecimalBytes(bytes).to_string(), facts.quantisation.clone()];
    parts.push(format!("{} tokens of context", facts.trained_context));
    parts.extend(facts.capabilities.iter().map(ToString::to_string));
    if facts.memory_bytes > 0 {
        parts.push(format!("about {} of memory", DecimalBytes(facts.memory_bytes)));
    }
    parts.join(", ")
}

impl Wanted {
    fn of(args: &ModelAddArgs) -> anyhow::Result<Self> {
        let name = args.name.as_deref().map(model_name).transpose()?;
        let version = args.version.as_deref().map(|text| {
            text.parse().map_err(|_| anyhow::anyhow!("{text:?} is no version; write it as MAJOR.MINOR, such as 1.0"))
        });
        Ok(Self { name, version: version.transpose()?, description: args.description.clone() })
    }
}

/// Reads a name of a model, or says which one comes near.
pub(super) fn model_name(text: &str) -> anyhow::Result<ModelName> {
    text.parse().map_err(|_| {
        let near = model_names::of(text).map(|name| format!("; {name} is")).unwrap_or_default();
        anyhow::anyhow!("{text:?} is no name of a model, which has lower-case letters, digits, dots and hyphens{near}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_capitals_gets_one_without_offered() {
        let told = model_name("My Model_7B").expect_err("capitals").to_string();
        assert!(told.ends_with("; my-model-7b is"), "{told}");
        assert!(!model_name("模型").expect_err("no letters").to_string().contains(';'));
        assert_eq!(model_name("qwen3-8b").expect("good").as_str(), "qwen3-8b");
    }
}
