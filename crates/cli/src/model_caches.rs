//! Finds the models that other programs keep on this machine: Ollama, LM Studio, the Hugging Face Hub's cache, or any
//! folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{anyhow, bail};
use protocol::{Digest, ModelName};
use serde::{Deserialize, Serialize};

use crate::download::hugging_face;
use crate::model_file::{self, PartName};
use crate::output;
use crate::settings::Env;

/// How deep a cache's folders are searched.
const DEPTH_MAX: usize = 6;
/// The most files that are examined, so that a search of `/` ends.
const ENTRIES_MAX: usize = 50_000;
/// The model folder of Ollama's service on Linux.
const OLLAMA_SERVICE: &str = "/usr/share/ollama/.ollama/models";
/// Ollama's media types of a model's weights, and of an adapter.
const OLLAMA_MODEL: &str = "application/vnd.ollama.image.model";
const OLLAMA_ADAPTER: &str = "application/vnd.ollama.image.adapter";

/// A place where other programs keep models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cache {
    Ollama,
    LmStudio,
    /// The cache of the Hub's programs.
    HuggingFace,
    /// Any folder with GGUF files.
    Folder(PathBuf),
}

/// A model in a cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cached {
    /// The name that its program uses.
    pub name: String,
    /// Its file, or the first part of it.
    pub path: PathBuf,
    /// The length of all its parts, in bytes.
    pub bytes: u64,
    /// The digest that its program recorded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

impl FromStr for Cache {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.to_lowercase().as_str() {
            "ollama" => Self::Ollama,
            "lmstudio" | "lm-studio" => Self::LmStudio,
            "huggingface" | "hf" => Self::HuggingFace,
            _ => Self::Folder(text.into()),
        })
    }
}

impl Cache {
    /// Returns its name on a command line.
    pub fn word(&self) -> String {
        match self {
            Self::Ollama => "ollama".to_owned(),
            Self::LmStudio => "lmstudio".to_owned(),
            Self::HuggingFace => "huggingface".to_owned(),
            Self::Folder(folder) => folder.display().to_string(),
        }
    }

    /// Returns the folders where it may be.
    pub fn folders(&self, env: &Env) -> Vec<PathBuf> {
        let below_home = |path: &str| env.get("HOME").map(|home| Path::new(home).join(path));
        match self {
            Self::Ollama => match env.get("OLLAMA_MODELS") {
                Some(folder) => vec![folder.into()],
                None => below_home(".ollama/models").into_iter().chain([OLLAMA_SERVICE.into()]).collect(),
            },
            Self::LmStudio => {
                [".lmstudio/models", ".cache/lm-studio/models"].into_iter().filter_map(below_home).collect()
            }
            Self::HuggingFace => {
                let named = env.get("HF_HUB_CACHE").map(PathBuf::from);
                named.or_else(|| Some(hugging_face::home(env)?.join("hub"))).into_iter().collect()
            }
            Self::Folder(folder) => vec![folder.clone()],
        }
    }

    /// Lists its models by name. Blocks.
    pub fn models(&self, env: &Env) -> Vec<Cached> {
        let mut models: Vec<Cached> = match self {
            Self::Ollama => self.folders(env).iter().flat_map(|folder| of_ollama(folder)).collect(),
            Self::HuggingFace => self.folders(env).iter().flat_map(|folder| of_hub(folder)).collect(),
            Self::LmStudio | Self::Folder(_) => self.folders(env).iter().flat_map(|folder| of_folder(folder)).collect(),
        };
        models.sort_by(|one, other| one.name.cmp(&other.name));
        models.dedup_by(|one, other| one.name == other.name);
        models
    }

    /// Finds a model by its name, or by the last part of it. Blocks.
    pub fn find(&self, env: &Env, wanted: &str) -> anyhow::Result<Cached> {
        let models = self.models(env);
        let is_named = |model: &&Cached| {
            let last = model.name.rsplit('/').next().unwrap_or_default();
            [&model.name, last, model.short_name()].iter().any(|name| name.eq_ignore_ascii_case(wanted))
        };
        if let Some(model) = models.iter().find(is_named) {
            return Ok(model.clone());
        }
        if models.is_empty() {
            bail!(self.nothing(env));
        }
        let near = output::nearest(wanted, models.iter().map(Cached::short_name));
        let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        let word = self.word();
        Err(anyhow!("{word} has no model {wanted:?}{near} `tether model add --from {word}` lists what it has"))
    }

    /// Returns a message that no model was found, with the folders that were searched.
    pub fn nothing(&self, env: &Env) -> String {
        let folders: Vec<String> = self.folders(env).iter().map(|folder| folder.display().to_string()).collect();
        format!("there is no model in {}", folders.join(" or "))
    }
}

impl Cached {
    /// Returns the last part of the name, by which the model can be found as well.
    fn short_name(&self) -> &str {
        let last = self.name.rsplit('/').next().unwrap_or(&self.name);
        last.strip_suffix(":latest").unwrap_or(last)
    }

    /// Returns the name that the model can have in the network.
    pub fn model_name(&self) -> Option<ModelName> {
        let is_file = self.path.extension().is_some_and(|ending| ending == "gguf");
        if is_file { model_file::name_of(&self.path) } else { ModelName::made_of(&self.name) }
    }
}

/// Returns the caches of this machine that have models, each with its models. Blocks.
pub fn found(env: &Env) -> Vec<(Cache, Vec<Cached>)> {
    let known = [Cache::Ollama, Cache::LmStudio, Cache::HuggingFace];
    let with_models = known.into_iter().map(|cache| {
        let models = cache.models(env);
        (cache, models)
    });
    with_models.filter(|(_, models)| !models.is_empty()).collect()
}

/// A manifest of Ollama, which lists a model's layers.
#[derive(Debug, Deserialize)]
struct Manifest {
    layers: Vec<Layer>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: String,
}

/// Reads `manifests/REGISTRY/NAMESPACE/MODEL/TAG`, whose layers are in `blobs/sha256-…`.
fn of_ollama(folder: &Path) -> Vec<Cached> {
    let manifests = folder.join("manifests");
    let named = |path: PathBuf| {
        let manifest: Manifest = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        let mut weights = manifest.layers.iter().filter(|layer| layer.media_type == OLLAMA_MODEL);
        // A model with an adapter would answer differently without it, and a model of several files is not supported.
        let (Some(layer), None) = (weights.next(), weights.next()) else { return None };
        if manifest.layers.iter().any(|layer| layer.media_type == OLLAMA_ADAPTER) {
            return None;
        }
        let digest: Digest = layer.digest.strip_prefix("sha256:")?.parse().ok()?;
        let blob = folder.join("blobs").join(format!("sha256-{digest}"));
        let bytes = fs::metadata(&blob).ok()?.len();
        let name = path.strip_prefix(&manifests).ok()?.to_str()?;
        let name = name.strip_prefix("registry.ollama.ai/").unwrap_or(name);
        let (model, tag) = name.strip_prefix("library/").unwrap_or(name).rsplit_once('/')?;
        Some(Cached { name: format!("{model}:{tag}"), path: blob, bytes, digest: Some(digest) })
    };
    files(&manifests).into_iter().filter_map(named).collect()
}

/// Reads `models--ORG--REPO/snapshots/REVISION/FILE`, where files are links to blobs.
fn of_hub(folder: &Path) -> Vec<Cached> {
    let repositories = fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().to_str()?.strip_prefix("models--")?.replace("--", "/");
        Some((name, entry.path()))
    });
    let models = repositories.flat_map(|(repository, path)| {
        let current = fs::read_to_string(path.join("refs/main")).unwrap_or_default();
        let snapshots = path.join("snapshots");
        let current = Some(snapshots.join(current.trim())).filter(|path| *path != snapshots && path.is_dir());
        let models = of_folder(&current.unwrap_or(snapshots));
        models.into_iter().map(move |model| {
            let file = model.name.rsplit('/').next().unwrap_or(&model.name);
            Cached { name: format!("{repository}/{file}"), ..model }
        })
    });
    models.collect()
}

/// Finds GGUF files below a folder; the parts of a split model count as one.
fn of_folder(folder: &Path) -> Vec<Cached> {
    let mut models: BTreeMap<String, Vec<(PathBuf, u64)>> = BTreeMap::new();
    for path in files(folder) {
        let Some(name) = path.strip_prefix(folder).ok().and_then(Path::to_str) else { continue };
        let lower = name.to_lowercase();
        // An image projector is not a model by itself.
        if lower.strip_suffix(".gguf").is_none() || lower.contains("mmproj") {
            continue;
        }
        // A link whose blob is gone has no length.
        let Ok(bytes) = fs::metadata(&path).map(|metadata| metadata.len()) else { continue };
        let whole = PartName::of(name).map_or_else(|| name.to_owned(), |part| format!("{}.gguf", part.stem));
        models.entry(whole).or_default().push((path, bytes));
    }
    let cached = models.into_iter().filter_map(|(name, mut parts)| {
        parts.sort();
        let bytes = parts.iter().map(|(_, bytes)| bytes).sum();
        let expected = parts.first()?.0.to_str().and_then(PartName::of).map_or(1, |part| part.count as usize);
        let (path, _) = parts.first().filter(|_| parts.len() == expected)?.clone();
        Some(Cached { name, path, bytes, digest: None })
    });
    cached.collect()
}

/// Lists the files below a folder, up to a depth and a number.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut waiting = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = waiting.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if found.len() + waiting.len() >= ENTRIES_MAX {
                return found;
            }
            let path = entry.path();
            // Links to folders are not followed: they may form a cycle.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => waiting.push((path, depth + 1)),
                Ok(kind) if !kind.is_dir() => found.push(path),
                _ => {}
            }
        }
    }
    found
}
