//! Finds a model's files in a repository of the Hugging Face Hub.
//!
//! The Hub lists a repository's files at `/api/models/ORG/REPO/tree/main?recursive=true`, in pages connected by `Link`
//! headers. Files in its large file storage (LFS) have their SHA-256 there. A file is downloaded from
//! `/ORG/REPO/resolve/main/FILE`, which redirects to another server.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use http::{StatusCode, Uri};
use protocol::ModelName;
use serde::Deserialize;

use super::Remote;
use super::web::{Credential, Response, Web, host, parse, shown};
use crate::model_file::PartName;
use crate::model_names;
use crate::output;
use crate::settings::Env;

/// The Hub's URL, unless `HF_ENDPOINT` overrides it.
const ENDPOINT: &str = "https://huggingface.co";
/// The most pages of a list that are read; a page has a thousand files.
const PAGES_MAX: usize = 50;
/// Quantisations in order of preference if none is requested: small enough for most machines, and hardly worse than
/// larger ones.
const PREFERRED: [&str; 14] = [
    "Q4_K_M",
    "UD-Q4_K_XL",
    "Q4_K_S",
    "Q4_K_L",
    "Q4_0",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_1",
    "MXFP4",
    "Q5_K_M",
    "Q5_K_S",
    "Q6_K",
    "Q8_0",
    "Q3_K_M",
];

/// A repository, and which of its models is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// Its name, `ORG/REPO`.
    pub name: String,
    /// The requested quantisation or file name, if any.
    pub wanted: Option<String>,
}

/// The Hub, with the user's credential.
#[derive(Debug)]
pub struct Hub {
    endpoint: Uri,
    credential: Option<Credential>,
}

/// A model of a repository.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its quantisation, or its file name if that has none.
    pub label: String,
    /// Its file, or its parts in order.
    pub files: Vec<Remote>,
}

impl Found {
    /// Returns the length of all files, as far as the Hub reports it. The sum is an estimate only.
    pub fn bytes(&self) -> u64 {
        self.files.iter().filter_map(|file| file.bytes).fold(0, u64::saturating_add)
    }
}

/// A file in the Hub's list.
#[derive(Debug, Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

/// A file's entry in the large file storage (LFS).
#[derive(Debug, Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Repository {
    /// Parses `hf:ORG/REPO[:QUANT]`, `hf.co/ORG/REPO[:QUANT]`, and the Hub page of a repository or a file. Returns
    /// `None` for other texts.
    pub fn of(text: &str) -> Option<anyhow::Result<Self>> {
        let bare = text.strip_prefix("https://").unwrap_or(text);
        let rest = ["hf:", "hf.co/", "huggingface.co/"].iter().find_map(|prefix| bare.strip_prefix(prefix))?;
        let rest = rest.trim_start_matches('/').trim_end_matches('/');
        let of_main = ["/resolve/main/", "/blob/main/"].iter().find_map(|middle| rest.split_once(middle));
        let (name, wanted) = match of_main {
            Some((name, file)) => (name, file.split('?').next().and_then(|file| file.rsplit('/').next())),
            // A file of another revision is treated as a plain URL.
            None if rest.contains("/resolve/") || rest.contains("/blob/") => return None,
            None => rest.split_once(':').map_or((rest, None), |(name, wanted)| (name, Some(wanted))),
        };
        let name = name.strip_suffix("/tree/main").unwrap_or(name);
        let is_plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
        };
        let is_name = name.split_once('/').is_some_and(|(org, repo)| is_plain(org) && is_plain(repo));
        if !is_name || wanted.is_some_and(|wanted| wanted.is_empty() || wanted.chars().any(char::is_control)) {
            return Some(Err(anyhow!(
                "{text:?} names no model of the Hub; write it as hf:ORG/REPO or hf:ORG/REPO:QUANT"
            )));
        }
        Some(Ok(Self { name: name.to_owned(), wanted: wanted.map(str::to_owned) }))
    }

    /// Returns the model name that the repository's name suggests.
    pub fn model_name(&self) -> Option<ModelName> {
        let repo = self.name.rsplit('/').next()?;
        let lower = repo.to_lowercase();
        let bare = lower.strip_suffix("-gguf").or_else(|| lower.strip_suffix("_gguf")).unwrap_or(&lower);
        model_names::of_file(Path::new(&format!("{bare}.gguf")))
    }
}

/// Returns the download URL of a file's page on the Hub. Other URLs are returned unchanged.
pub fn file_of_page(url: &str) -> String {
    let is_hub = url.starts_with("https://huggingface.co/") || url.starts_with("https://hf.co/");
    if is_hub { url.replacen("/blob/", "/resolve/", 1) } else { url.to_owned() }
}

impl Hub {
    /// Finds the Hub and the user's token in the same places as its own programs.
    pub fn of(env: &Env) -> anyhow::Result<Self> {
        let endpoint = env.get("HF_ENDPOINT").unwrap_or(ENDPOINT).trim_end_matches('/');
        let endpoint = parse(endpoint).context("HF_ENDPOINT is wrong")?;
        let credential = token(env).map(|token| Credential::new(&endpoint, token));
        Ok(Self { endpoint, credential })
    }

    /// Returns the credential for the Hub.
    pub fn credential(&self) -> Option<&Credential> {
        self.credential.as_ref()
    }

    /// Returns the URL of a path on the Hub.
    fn url(&self, path: &str) -> anyhow::Result<Uri> {
        parse(&format!("{}{path}", self.endpoint.to_string().trim_end_matches('/')))
    }

    /// Lists a repository and chooses one of its models.
    pub async fn find(&self, web: &Web, repository: &Repository) -> anyhow::Result<Found> {
        let entries = self.list(web, repository).await?;
        let models = self.models(repository, entries)?;
        choose(repository, models)
    }

    async fn list(&self, web: &Web, repository: &Repository) -> anyhow::Result<Vec<Entry>> {
        let mut url = self.url(&format!("/api/models/{}/tree/main?recursive=true", repository.name))?;
        let mut entries: Vec<Entry> = vec![];
        for _ in 0..PAGES_MAX {
            let response = web.get(&url, self.credential(), &[]).await;
            let mut response = response.map_err(super::web::Failure::into_error)?;
            if response.status != StatusCode::OK {
                bail!(self.refused(repository, &response));
            }
            let next = response.header("link").and_then(next_page).map(str::to_owned);
            let page = response.document().await.with_context(|| format!("{} broke off", host(&url)))?;
            let page: Vec<Entry> = serde_json::from_slice(&page)
                .map_err(|_| anyhow!("{} does not list files as the Hub does", shown(&url)))?;
            entries.extend(page);
            match next {
                Some(next) => url = parse(&next).with_context(|| format!("{} lists its pages wrongly", host(&url)))?,
                None => return Ok(entries),
            }
        }
        bail!("{} has more files than can be looked through; give the address of the file itself", repository.name)
    }

    fn refused(&self, repository: &Repository, response: &Response) -> String {
        let (name, hub) = (&repository.name, host(&self.endpoint));
        let page = format!("{}/{name}", self.endpoint.to_string().trim_end_matches('/'));
        match (response.status.as_u16(), response.header("x-error-code"), &self.credential) {
            (401 | 403, Some("GatedRepo"), None) => {
                format!("{name} is gated: accept its terms on {page}, and set HF_TOKEN to a token of that account")
            }
            (401 | 403, Some("GatedRepo"), Some(_)) => {
                format!("{name} is gated: accept its terms on {page} with the account of the token")
            }
            (401 | 403, _, None) => format!(
                "{hub} shows no {name}: see that the name is right; if it is private or gated, accept its terms on {page} \
                 and set HF_TOKEN"
            ),
            (401 | 403, _, Some(_)) => format!(
                "{hub} does not show {name} to this token: see that the name is right and HF_TOKEN good, and accept the \
                 model's terms on {page}"
            ),
            (404, ..) => format!("{hub} has no repository {name}; see that its name is right"),
            (429, ..) => format!("{hub} limits requests at present; try again later, or set HF_TOKEN"),
            (status, ..) => format!("{hub} answers {status} for the list of {name}; try again later"),
        }
    }

    /// Groups the files that make up one model. Image projectors are left out, since this engine does not load them.
    fn models(&self, repository: &Repository, entries: Vec<Entry>) -> anyhow::Result<Vec<Found>> {
        let mut sets: BTreeMap<String, Vec<(String, Entry)>> = BTreeMap::new();
        for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
            let name = entry.path.rsplit('/').next().unwrap_or_default().to_owned();
            let lower = name.to_lowercase();
            let is_model =
                lower.strip_suffix(".gguf").is_some() && !lower.contains("mmproj") && !lower.contains("imatrix");
            if is_model && !name.chars().any(char::is_control) {
                let stem = PartName::of(&entry.path).map_or_else(|| entry.path.clone(), |part| part.stem);
                sets.entry(stem).or_default().push((name, entry));
            }
        }
        let mut models = vec![];
        for (stem, mut files) in sets {
            files.sort_by(|(one, _), (other, _)| one.cmp(other));
            let expected = files.first().and_then(|(name, _)| PartName::of(name)).map_or(1, |part| part.count as usize);
            // A set with missing parts cannot be loaded.
            if files.len() != expected {
                continue;
            }
            let label = label(&stem);
            let files = files.into_iter().map(|(name, entry)| self.remote(repository, name, entry));
            models.push(Found { label, files: files.collect::<anyhow::Result<_>>()? });
        }
        Ok(models)
    }

    fn remote(&self, repository: &Repository, name: String, entry: Entry) -> anyhow::Result<Remote> {
        let url = self.url(&format!("/{}/resolve/main/{}", repository.name, encoded(&entry.path)))?;
        let digest = entry.lfs.as_ref().and_then(|lfs| lfs.oid.parse().ok());
        let bytes = entry.lfs.as_ref().map_or(entry.size, |lfs| lfs.size);
        Ok(Remote { url, name, bytes: Some(bytes).filter(|bytes| *bytes > 0), digest })
    }
}

/// Chooses the requested model, or one with a sensible quantisation.
fn choose(repository: &Repository, mut models: Vec<Found>) -> anyhow::Result<Found> {
    let name = &repository.name;
    ensure!(
        !models.is_empty(),
        "{name} has no model in the GGUF format; look for a repository whose name ends in -GGUF"
    );
    let position = match &repository.wanted {
        None => PREFERRED
            .iter()
            .find_map(|label| models.iter().position(|model| model.label.eq_ignore_ascii_case(label)))
            .or_else(|| (0..models.len()).min_by_key(|index| models[*index].bytes())),
        Some(wanted) => models.iter().position(|model| is_meant(model, wanted)),
    };
    let Some(position) = position else {
        let wanted = repository.wanted.as_deref().unwrap_or_default();
        let mut labels: Vec<&str> = models.iter().map(|model| model.label.as_str()).collect();
        labels.sort_unstable();
        let near = output::nearest(&wanted.to_uppercase(), labels.iter().copied());
        let near = near.map(|near| format!("; did you mean {name}:{near}?")).unwrap_or_default();
        bail!("{name} has no {wanted:?}{near} It has {}", labels.join(", "));
    };
    Ok(models.swap_remove(position))
}

fn is_meant(model: &Found, wanted: &str) -> bool {
    model.label.eq_ignore_ascii_case(wanted)
        || model.files.iter().any(|file| {
            let stem = file.name.strip_suffix(".gguf").unwrap_or(&file.name);
            file.name.eq_ignore_ascii_case(wanted) || stem.eq_ignore_ascii_case(wanted)
        })
}

/// Returns the quantisation at the end of a file name, or the whole name.
fn label(stem: &str) -> String {
    let name = stem.rsplit('/').next().unwrap_or(stem);
    let name = name.strip_suffix(".gguf").unwrap_or(name);
    let found = name.rfind(['.', '-']).filter(|mark| model_names::is_quantisation(&name[mark + 1..].to_lowercase()));
    match found {
        None => name.to_owned(),
        Some(mark) => {
            let before = name[..mark].to_lowercase();
            let dynamic =
                if before.strip_suffix("ud").is_some_and(|rest| rest.ends_with(['-', '.'])) { "UD-" } else { "" };
            format!("{dynamic}{}", name[mark + 1..].to_uppercase())
        }
    }
}

/// Returns the URL of a list's next page from a `Link` header.
fn next_page(link: &str) -> Option<&str> {
    let parts = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    let (_, rest) = parts.split_once('<')?;
    Some(rest.split_once('>')?.0)
}

/// Percent-encodes a path for a URL.
fn encoded(path: &str) -> String {
    let mut text = String::new();
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// Returns the user's token for the Hub: from the environment, or from where `hf auth login` stores it.
fn token(env: &Env) -> Option<String> {
    let from_env = env.get("HF_TOKEN").or_else(|| env.get("HUGGING_FACE_HUB_TOKEN")).map(str::to_owned);
    let file = env.get("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home(env)?.join("token")));
    let kept = || std::fs::read_to_string(file?).ok();
    from_env.or_else(kept).map(|token| token.trim().to_owned()).filter(|token| !token.is_empty())
}

/// Returns the home folder of the Hub's programs.
pub fn home(env: &Env) -> Option<PathBuf> {
    if let Some(folder) = env.get("HF_HOME") {
        return Some(folder.into());
    }
    let cache =
        env.get("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(Path::new(env.get("HOME")?).join(".cache")));
    Some(cache?.join("huggingface"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(text: &str) -> Option<(String, Option<String>)> {
        let found = Repository::of(text)?.ok()?;
        Some((found.name, found.wanted))
    }

    #[test]
    fn a_repository_is_named_as_people_name_it() {
        let plain = Some(("org/Repo-1.5_x".to_owned(), None));
        for text in ["hf:org/Repo-1.5_x", "hf.co/org/Repo-1.5_x", "https://huggingface.co/org/Repo-1.5_x/tree/main"] {
            assert_eq!(repository(text), plain, "{text}");
        }
        assert_eq!(repository("hf:o/r:Q4_K_M"), Some(("o/r".into(), Some("Q4_K_M".into()))));
        for text in ["hf:org", "hf:org/", "hf:../r", "hf:o/r/x", "hf:o/r:", "hf:o/r?x"] {
            assert!(Repository::of(text).expect("meant for the Hub").is_err(), "{text}");
        }
        let of_file = Some(("o/r".to_owned(), Some("x.gguf".to_owned())));
        assert_eq!(repository("https://huggingface.co/o/r/resolve/main/sub/x.gguf?download=true"), of_file);
        assert_eq!(repository("https://huggingface.co/o/r/blob/main/x.gguf"), of_file);
        for text in ["https://huggingface.co/o/r/resolve/v2/x.gguf", "https://hub.example/o/r", "o/r", "/hf:o/r"] {
            assert!(Repository::of(text).is_none(), "{text}");
        }
        let page = file_of_page("https://huggingface.co/o/r/blob/v2/x.gguf");
        assert_eq!(page, "https://huggingface.co/o/r/resolve/v2/x.gguf");
        let named = Repository::of("hf:bartowski/Qwen2.5-7B-Instruct-GGUF").expect("the Hub's").expect("a name");
        assert_eq!(named.model_name().expect("a name").as_str(), "qwen2.5-7b-instruct");
    }

    fn found(labels: &[&str]) -> Vec<Found> {
        let model = |stem: &&str| {
            let remote = Remote {
                url: Uri::from_static("https://hub.example/x"),
                name: format!("{stem}.gguf"),
                bytes: Some(stem.len() as u64),
                digest: None,
            };
            Found { label: label(stem), files: vec![remote] }
        };
        labels.iter().map(model).collect()
    }

    fn chosen(stems: &[&str], wanted: Option<&str>) -> anyhow::Result<String> {
        let repository = Repository { name: "o/r".into(), wanted: wanted.map(str::to_owned) };
        choose(&repository, found(stems)).map(|model| model.files[0].name.clone())
    }

    #[test]
    fn a_quantisation_is_chosen_by_name_or_by_what_suits_most() {
        let many = ["m-Q2_K", "m-Q4_K_M", "m-UD-Q4_K_XL", "m.Q8_0", "m-f16"];
        assert_eq!(chosen(&many, None).expect("found"), "m-Q4_K_M.gguf");
        assert_eq!(chosen(&many, Some("q8_0")).expect("found"), "m.Q8_0.gguf");
        assert_eq!(chosen(&many, Some("UD-Q4_K_XL")).expect("found"), "m-UD-Q4_K_XL.gguf");
        assert_eq!(chosen(&many, Some("m-f16.gguf")).expect("found"), "m-f16.gguf");
        assert_eq!(chosen(&["m-Q8_0", "m-Q5_K_M"], None).expect("found"), "m-Q5_K_M.gguf");
        assert_eq!(chosen(&["weights", "m"], None).expect("found"), "m.gguf", "the smallest");
        let error = chosen(&many, Some("Q4_K_S")).expect_err("not there").to_string();
        assert!(error.contains("did you mean o/r:Q4_K_M?") && error.contains("Q8_0"), "{error}");
        assert!(chosen(&[], None).expect_err("none").to_string().contains("-GGUF"));
    }

    #[test]
    fn lists_have_pages_and_paths_are_written_as_urls() {
        let link = r#"<https://hub.example/a?cursor=x>; rel="next", <https://hub.example/b>; rel="last""#;
        assert_eq!(next_page(link), Some("https://hub.example/a?cursor=x"));
        assert_eq!(next_page(r#"<https://hub.example/b>; rel="last""#), None);
        assert_eq!(encoded("Q4 K/m#1.gguf"), "Q4%20K/m%231.gguf");
    }
}
