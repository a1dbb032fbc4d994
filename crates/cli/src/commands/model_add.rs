//! `tether model add`: adds models to this machine's store and registers them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use artifact_store::{ArtifactStore, Import};
use engine::memory_plan::CONTEXT_DEFAULT;
use http::Uri;
use indicatif::DecimalBytes;
use protocol::control::{Catalog, ModelAdd};
use protocol::model::{ModelEntry, ModelFacts, ModelKey};
use protocol::{Digest, ModelName, ModelVersion};
use registry::models;

use super::{Context, Outcome};
use crate::args::{ModelAddArgs, ServerArgs};
use crate::client::{GatewayClient, Presence};
use crate::download::hugging_face::{self, Hub, Repository};
use crate::download::web::{self, Credential, Web};
use crate::download::{Downloads, Remote};
use crate::local_models;
use crate::model_caches::{Cache, Cached};
use crate::model_file::{self, ModelFile, PartName, Take};
use crate::operator::AdminClient;
use crate::output;
use crate::tiny_model;

/// The requested name and version, if any.
#[derive(Debug, Clone, Default)]
struct Wanted {
    name: Option<ModelName>,
    version: Option<ModelVersion>,
    description: Option<String>,
}

pub(super) async fn run(context: Context, args: ModelAddArgs) -> anyhow::Result<Outcome> {
    if let Some(cache) = args.from.as_deref().filter(|_| args.sources.is_empty()) {
        let Ok(cache) = cache.parse::<Cache>();
        return list_cache(&context, &cache);
    }
    let wanted = Wanted::of(&args)?;
    // A missing permission or an unreachable network is reported before anything is copied.
    let admin = AdminClient::of_registry(&args.server, &context.settings, &context.data, &context.env).await?;
    let added = add_all(&context, &admin, &args, &wanted).await;
    admin.leave().await?;
    let added = added?;
    if context.json {
        output::json(&added)?;
        return Ok(Outcome::Well);
    }
    let Some(first) = added.first() else { return Ok(Outcome::Well) };
    // Workers fetch a file from the registry's machine, or from a worker that has it.
    let gives = ["registry", "worker", "up"];
    let roles = context.data.roles();
    let is_given = context.data.registry_store().exists() || roles.iter().any(|role| gives.contains(role));
    if !is_given {
        output::line(
            "its file lies on this machine alone, where no registry and no worker runs, so that no other machine can \
             fetch it; add it on one that has such a node",
        );
    }
    output::line(next(&context, is_up(&context, &args).await, &first.key));
    Ok(Outcome::Well)
}

/// Returns whether a network runs here.
async fn is_up(context: &Context, args: &ModelAddArgs) -> bool {
    let client = GatewayClient::find(&args.server, &context.settings, &context.data, &context.env);
    matches!(client, Ok(client) if matches!(client.presence().await, Presence::Answers))
}

fn next(context: &Context, is_up: bool, key: &ModelKey) -> String {
    let program = context.program();
    let up = if is_up { String::new() } else { format!("  {program} up\n") };
    format!("\nNext:\n\n{up}  {program} run {} \"What is the capital of Japan?\"", key.model_id)
}

/// Lists the models in another program's cache.
fn list_cache(context: &Context, cache: &Cache) -> anyhow::Result<Outcome> {
    let models = cache.models(&context.env);
    if context.json {
        output::json(&models)?;
        return Ok(Outcome::Well);
    }
    if models.is_empty() {
        output::line(cache.nothing(&context.env));
        return Ok(Outcome::Finding);
    }
    let row = |model: &Cached| vec![output::one_line(&model.name), DecimalBytes(model.bytes).to_string()];
    output::table(&["MODEL", "SIZE"], &models.iter().map(row).collect::<Vec<_>>());
    output::line(format!(
        "\nNext:\n\n  {} model add --from {} {}",
        context.program(),
        cache.word(),
        output::one_line(&models[0].name)
    ));
    Ok(Outcome::Well)
}

/// The source of a model.
enum Source {
    Cached(Cached),
    File(PathBuf),
    Remote(RemoteSource),
}

/// Where a model is downloaded from.
enum RemoteSource {
    Url(Uri),
    Hub(Repository),
}

impl Source {
    fn of(text: &str) -> anyhow::Result<Self> {
        if let Some(remote) = RemoteSource::of(text) {
            return Ok(Self::Remote(remote?));
        }
        let path = std::path::absolute(text).with_context(|| format!("{text:?} is not a path"))?;
        // Other tools accept a Hub repository without the prefix `hf:`.
        let is_hubs = || matches!(Repository::of(&format!("hf:{text}")), Some(Ok(_)));
        if !path.exists() && !text.starts_with(['.', '/', '~']) && is_hubs() {
            bail!("there is no file {text}; if that is a model of the Hugging Face Hub, write it as hf:{text}");
        }
        Ok(Self::File(path))
    }
}

impl RemoteSource {
    /// Parses a Hub repository or a URL. Returns `None` for other texts.
    fn of(text: &str) -> Option<anyhow::Result<Self>> {
        if let Some(repository) = Repository::of(text) {
            return Some(repository.map(Self::Hub));
        }
        text.contains("://").then(|| Ok(Self::Url(web::parse(&hugging_face::file_of_page(text))?)))
    }
}

/// A model file on this machine that is to be registered.
struct Incoming {
    file: ModelFile,
    take: Take,
    /// Whether the file stays where it is.
    stays: bool,
    /// The expected digest, if known.
    expected: Option<Digest>,
    /// The name that its source suggests.
    name: Option<ModelName>,
}

async fn add_all(
    context: &Context,
    admin: &AdminClient,
    args: &ModelAddArgs,
    wanted: &Wanted,
) -> anyhow::Result<Vec<ModelEntry>> {
    let mut sources = vec![];
    let mut seen = BTreeSet::new();
    for text in &args.sources {
        let source = match args.from.as_deref().map(str::parse::<Cache>) {
            Some(Ok(cache)) => Source::Cached(cache.find(&context.env, text)?),
            None => Source::of(text)?,
        };
        // Several parts of one model are one source.
        let whole = PartName::of(text).map_or_else(|| text.clone(), |part| part.stem);
        if seen.insert(whole) {
            sources.push(source);
        }
    }
    let is_one = sources.len() == 1;
    ensure!(is_one || (wanted.name.is_none() && wanted.version.is_none()), "--name and --version are for one model");
    context.data.create()?;
    let artifacts = ArtifactStore::in_folder(context.data.artifacts()).context("could not open the artifact store")?;
    let mut added = vec![];
    for source in sources {
        let (entry, line) = match source {
            Source::File(path) => add(context, admin, &artifacts, Incoming::of_file(path).await?, wanted).await?,
            Source::Cached(cached) => {
                let path = cached.path.clone();
                let file = tokio::task::spawn_blocking(move || ModelFile::open(&path)).await??;
                let name = cached.model_name();
                let incoming = Incoming { file, take: Take::Link, stays: true, expected: cached.digest, name };
                add(context, admin, &artifacts, incoming, wanted).await?
            }
            Source::Remote(remote) => {
                let say = |label: String| {
                    if !context.json {
                        output::line(label);
                    }
                };
                add_remote(context, admin, &artifacts, remote, args.insecure, wanted, say).await?
            }
        };
        if !context.json {
            output::line(line);
        }
        added.push(entry);
    }
    Ok(added)
}

/// Downloads a model and registers it. Prints the download size first.
async fn add_remote(
    context: &Context,
    admin: &AdminClient,
    artifacts: &ArtifactStore,
    source: RemoteSource,
    insecure: bool,
    wanted: &Wanted,
    say: impl FnOnce(String),
) -> anyhow::Result<(ModelEntry, String)> {
    let (web, hub) = (Web::new(insecure), Hub::of(&context.env)?);
    let fetch = match source {
        RemoteSource::Url(url) => {
            let (remotes, name) = of_url(&url)?;
            // The credential is sent to the Hub only, in case this is one of its files.
            Fetch { source: url.to_string(), remotes, credential: hub.credential().cloned(), name }
        }
        RemoteSource::Hub(repository) => {
            let found = context.stop.run_until_cancelled(hub.find(&web, &repository)).await;
            let found = found.context("stopped; nothing was downloaded")??;
            let label = output::one_line(&found.label);
            say(format!("{}: {label}, {}", repository.name, DecimalBytes(found.bytes())));
            Fetch {
                source: format!("{}:{}", repository.name, found.label),
                remotes: found.files,
                credential: hub.credential().cloned(),
                name: repository.model_name(),
            }
        }
    };
    download(context, admin, artifacts, &web, fetch, wanted).await
}

/// Returns the model of a `[NAME=]URL` or `[NAME=]hf:ORG/REPO`. Downloads and registers it unless that was done before.
pub(super) async fn of_source(context: &Context, server: &ServerArgs, text: &str) -> anyhow::Result<ModelKey> {
    let (name, source) = local_models::split(text);
    let remote = RemoteSource::of(source)
        .with_context(|| format!("{source:?} is neither a URL nor a model of the Hugging Face Hub"))??;
    context.data.create()?;
    let artifacts = ArtifactStore::in_folder(context.data.artifacts()).context("could not open the artifact store")?;
    let admin = AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await?;
    let found = async {
        let wanted = Wanted { name: name.map(model_name).transpose()?, ..Wanted::default() };
        let index = local_models::index(&context.data);
        if let Some(digest) = local_models::digest_of_source(&index, source).filter(|digest| artifacts.contains(digest))
        {
            let catalog = admin.catalog().await?;
            let is_it = |key: &ModelKey| wanted.name.as_ref().is_none_or(|name| key.model_id == *name);
            let known = catalog.models.iter().find(|entry| entry.digest == digest && is_it(&entry.key));
            if let Some(entry) = known {
                return Ok(entry.key.clone());
            }
        }
        let (entry, line) = add_remote(context, &admin, &artifacts, remote, false, &wanted, output::note).await?;
        output::note(line);
        local_models::remember_source(&index, source, entry.digest, entry.bytes);
        Ok(entry.key)
    };
    let found = found.await;
    admin.leave().await?;
    found
}

/// Adds one file and registers it, under the given name or the one that the file suggests.
pub(super) async fn add_file(
    context: &Context,
    server: &ServerArgs,
    path: PathBuf,
    name: Option<ModelName>,
) -> anyhow::Result<ModelEntry> {
    let incoming = Incoming::of_file(path).await?;
    let admin = AdminClient::of_registry(server, &context.settings, &context.data, &context.env).await?;
    let artifacts = ArtifactStore::in_folder(context.data.artifacts()).context("could not open the artifact store")?;
    let wanted = Wanted { name, ..Wanted::default() };
    let added = add(context, &admin, &artifacts, incoming, &wanted).await;
    admin.leave().await?;
    added.map(|(entry, _)| entry)
}

impl Incoming {
    async fn of_file(path: PathBuf) -> anyhow::Result<Self> {
        let file = tokio::task::spawn_blocking(move || ModelFile::open(&path)).await??;
        let name = file.name();
        Ok(Self { file, take: Take::Copy, stays: true, expected: None, name })
    }
}

/// The downloads that make up one model.
struct Fetch {
    source: String,
    /// Its file, or its parts.
    remotes: Vec<Remote>,
    credential: Option<Credential>,
    name: Option<ModelName>,
}

/// Returns the file or the parts that a URL stands for, and the name that it suggests for the model.
fn of_url(url: &Uri) -> anyhow::Result<(Vec<Remote>, Option<ModelName>)> {
    let last = url.path().rsplit('/').next().unwrap_or_default();
    ensure!(!last.is_empty(), "{} is not the address of a file", web::shown(url));
    let plain = |letter: char| if letter.is_ascii_alphanumeric() || "-_.".contains(letter) { letter } else { '_' };
    let local = |name: &str| {
        let name: String = name.chars().map(plain).collect();
        format!("{}.gguf", name.strip_suffix(".gguf").unwrap_or(&name))
    };
    let remote = |url: Uri, name: &str| Remote { url, name: local(name), bytes: None, digest: None };
    let name = model_file::name_of(Path::new(&local(last)));
    let Some(part) = PartName::of(last).filter(|part| part.count > 1) else {
        return Ok((vec![remote(url.clone(), last)], name));
    };
    let text = url.to_string();
    let parts = part.all().map(|part| Ok(remote(web::parse(&text.replacen(last, &part, 1))?, &part)));
    Ok((parts.collect::<anyhow::Result<_>>()?, name))
}

/// Downloads a model and registers it.
async fn download(
    context: &Context,
    admin: &AdminClient,
    artifacts: &ArtifactStore,
    web: &Web,
    fetch: Fetch,
    wanted: &Wanted,
) -> anyhow::Result<(ModelEntry, String)> {
    let Fetch { source, remotes, credential, name } = fetch;
    let mut lengths = remotes.iter().map(|remote| remote.bytes);
    let bytes = lengths.try_fold(0_u64, |sum, bytes| bytes.map(|bytes| sum.saturating_add(bytes)));
    // Everything that can be refused is refused before hours of download.
    let wants = name_for(wanted, name.as_ref(), &source)?;
    check_free(&admin.catalog().await?, &wants, wanted.version, bytes.filter(|_| remotes.len() == 1))?;
    let downloads = Downloads::of(&source, &context.data.downloads(), web, credential, artifacts, &context.stop)?;
    let copies = if remotes.len() > 1 { 2 } else { 1 };
    let left = bytes.map_or(0, |bytes| bytes.saturating_mul(copies).saturating_sub(downloads.bytes()));
    model_file::check_room(artifacts, left)?;
    let mut paths = vec![];
    for remote in &remotes {
        let path = downloads.fetch(remote).await?;
        if remotes.len() > 1 {
            downloads.verify(remote, &path).await?;
        }
        paths.push(path);
    }
    let first = paths[0].clone();
    let file = match tokio::task::spawn_blocking(move || ModelFile::open(&first)).await? {
        Ok(file) => file,
        Err(error) => {
            // Downloading it again would not help.
            downloads.clear();
            return Err(error.context(format!("{source} is downloaded, and is not kept")));
        }
    };
    let expected = remotes.first().and_then(|remote| remote.digest).filter(|_| remotes.len() == 1);
    let incoming = Incoming { file, take: Take::Link, stays: false, expected, name: Some(wants) };
    let added = add(context, admin, artifacts, incoming, wanted).await;
    if added.as_ref().is_err_and(anyhow::Error::is::<Damaged>) {
        downloads.clear();
        return added;
    }
    let added = added?;
    downloads.clear();
    Ok(added)
}

/// The downloaded bytes do not have the announced digest.
#[derive(Debug, thiserror::Error)]
#[error("what came of {file} has the digest {found} and should have {expected}; it is not kept, try again")]
struct Damaged {
    file: String,
    found: Digest,
    expected: Digest,
}

fn name_for(wanted: &Wanted, made: Option<&ModelName>, source: &str) -> anyhow::Result<ModelName> {
    let Some(name) = wanted.name.as_ref().or(made) else {
        bail!("{source}: no name can be made of this file's; give it one with --name");
    };
    ensure!(*name != tiny_model::key().model_id, "{name} comes with the program; choose another name with --name");
    Ok(name.clone())
}

/// Adds a file and registers it. Also returns what to print about it.
async fn add(
    context: &Context,
    admin: &AdminClient,
    artifacts: &ArtifactStore,
    incoming: Incoming,
    wanted: &Wanted,
) -> anyhow::Result<(ModelEntry, String)> {
    let Incoming { file, take, stays, expected, name } = incoming;
    let shown = file.first().display().to_string();
    let name = name_for(wanted, name.as_ref(), &shown)?;
    let catalog = admin.catalog().await?;
    check_free(&catalog, &name, wanted.version, Some(file.bytes()?))?;
    let (facts, context_length) = (file.facts(), file.header().context_length().unwrap_or(0).min(CONTEXT_DEFAULT));
    let put = {
        let (artifacts, index, stop) = (artifacts.clone(), local_models::index(&context.data), context.stop.clone());
        tokio::task::spawn_blocking(move || {
            if stays {
                local_models::take(&artifacts, &index, &file, take, &stop)
            } else {
                file.put(&artifacts, take, &stop)
            }
        })
    };
    let (stored, import) = put.await??;
    let is_listed = |entry: &ModelEntry| entry.digest == stored.digest;
    let is_known = import == Import::Known || catalog.models.iter().any(is_listed);
    // A file that no model in the catalogue uses is deleted again.
    let forget = || if is_known { Ok(false) } else { artifacts.remove(&stored.digest) };
    if let Some(expected) = expected.filter(|expected| *expected != stored.digest) {
        forget().context("could not take the file out of the store again")?;
        bail!(Damaged { file: shown, found: stored.digest, expected });
    }
    let new = ModelAdd {
        model_id: name,
        version: wanted.version,
        digest: stored.digest,
        bytes: stored.bytes,
        context_length,
        description: wanted.description.clone().unwrap_or_else(|| facts.name.clone()),
        facts: Some(facts),
    };
    match register(context, admin, new).await {
        Ok(entry) => {
            // A downloaded file belongs to the store only, so it counts as copied.
            let line =
                if stays { added_line(&entry, take, import) } else { added_line(&entry, Take::Copy, Import::Copied) };
            Ok((entry, line))
        }
        Err(error) => {
            forget().context("could not take the file out of the store again")?;
            Err(error)
        }
    }
}

async fn register(context: &Context, admin: &AdminClient, new: ModelAdd) -> anyhow::Result<ModelEntry> {
    if context.stop.is_cancelled() {
        bail!("stopped; the model is not registered");
    }
    admin.add_model(new).await
}

/// Refuses before the copy what the registry would refuse after it. Files of different lengths differ.
fn check_free(
    catalog: &Catalog,
    name: &ModelName,
    version: Option<ModelVersion>,
    bytes: Option<u64>,
) -> anyhow::Result<()> {
    let may_be_same = catalog.models.iter().any(|entry| {
        entry.key.model_id == *name
            && version.is_none_or(|version| entry.key.version == version)
            && bytes.is_none_or(|bytes| entry.bytes == bytes)
    });
    if !may_be_same {
        models::free_key(catalog, name, version, None)?;
    }
    Ok(())
}

fn added_line(entry: &ModelEntry, take: Take, import: Import) -> String {
    let how = match (import, take) {
        (Import::Known, _) => " (its file was in the store already)",
        (Import::Linked | Import::Cloned, Take::Link) => " (its file takes no further room)",
        (Import::Copied, Take::Link) => " (its file had to be copied: it is split, or lies on another disk)",
        _ => "",
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
            text.parse().map_err(|_| anyhow::anyhow!("{text:?} is not a version; write it as MAJOR.MINOR, such as 1.0"))
        });
        Ok(Self { name, version: version.transpose()?, description: args.description.clone() })
    }
}

/// Parses a model's name. The error suggests a valid name that is similar.
pub(super) fn model_name(text: &str) -> anyhow::Result<ModelName> {
    text.parse().map_err(|_| {
        let near = ModelName::made_of(text).map(|name| format!("; {name} is")).unwrap_or_default();
        anyhow::anyhow!("{text:?} is no name of a model, which has lower-case letters, digits, dots and hyphens{near}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_capitals_gets_one_without_offered() {
        let error = model_name("My Model_7B").expect_err("capitals").to_string();
        assert!(error.ends_with("; my-model-7b is"), "{error}");
        assert!(!model_name("模型").expect_err("no letters").to_string().contains(';'));
        assert_eq!(model_name("qwen3-8b").expect("good").as_str(), "qwen3-8b");
    }
}
