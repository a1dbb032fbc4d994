//! Adds model files of this machine to the artifact store, so that workers can serve them.
//!
//! A file is read and copied once. `taken-in.json` in the data folder maps a path to the digest of its bytes, valid
//! while the file's length and modification time stay the same. Workers serve the copy, which every load verifies.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{self, Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use artifact_store::{ArtifactStore, Import, Stored};
use metadata_store::RegistryStore;
use protocol::model::ModelEntry;
use protocol::{Digest, ModelName, ModelVersion};
use rpc::identity;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use worker::ServedModel;

use crate::data_folder::DataFolder;
use crate::model_file::{self, ModelFile, Take};
use crate::settings::Settings;

/// A model's file as named on the command line: `FILE` or `NAME=FILE`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NamedFile {
    name: Option<ModelName>,
    path: PathBuf,
}

/// Makes the path of a `FILE` or `NAME=FILE` absolute, so that it means the same in every working folder.
pub fn absolute(text: &str) -> String {
    let (name, file) = split(text);
    if crate::download::is_source(file) {
        return text.to_owned();
    }
    let file = path::absolute(file).unwrap_or_else(|_| file.into());
    match name {
        Some(name) => format!("{name}={}", file.display()),
        None => file.display().to_string(),
    }
}

/// Returns the text if it is a `FILE` or `NAME=FILE`, and `None` if it is the name of a model. A bare name may be
/// either: it counts as a file if that begins like a GGUF file.
pub fn as_file(text: &str) -> Option<&str> {
    let (name, file) = split(text);
    if crate::download::is_source(file) {
        return None;
    }
    let says_so = name.is_some() || file.contains('/') || file.to_lowercase().ends_with(".gguf");
    (says_so || begins_as_model(Path::new(file))).then_some(text)
}

fn begins_as_model(file: &Path) -> bool {
    let mut magic = [0; 4];
    file.is_file() && File::open(file).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"GGUF"
}

/// Makes a file the only model that the workers serve.
pub fn serve_only(settings: &mut Settings, file: &str) {
    settings.worker.models.clear();
    settings.models = vec![file.to_owned()];
}

/// Returns the path of a `FILE` or `NAME=FILE`, and the name if one is given.
pub fn name_and_path(text: &str) -> anyhow::Result<(Option<ModelName>, PathBuf)> {
    let NamedFile { name, path } = named(text)?;
    Ok((name, path::absolute(path)?))
}

/// Returns the digest of a `FILE` or `NAME=FILE`, if it is known without reading the file.
pub fn known_digest(data: &DataFolder, text: &str) -> anyhow::Result<Option<Digest>> {
    let file = ModelFile::open(Path::new(split(text).1))?;
    let known = read_index(&index(data)).remove(&path::absolute(file.first())?.display().to_string());
    let stamp = file.stamp()?;
    Ok(known.filter(|known| (known.bytes, known.modified_nanos) == stamp).map(|known| known.digest))
}

/// Adds the files that the settings name to the workers' models and to the store. Reports which files it copies.
pub async fn take_in(settings: &mut Settings, data: &DataFolder) -> anyhow::Result<()> {
    if let Some(source) = settings.models.iter().find(|text| crate::download::is_source(split(text).1)) {
        bail!("{source} is not a file on this machine; add it with `tether model add {}`", split(source).1);
    }
    let taken = settings.worker.models.iter().map(|model| model.model_id.clone()).collect();
    let added = served(&settings.models, taken)?;
    settings.worker.models.extend(added);
    if settings.worker.models.iter().all(|model| model.file.is_none()) {
        return Ok(());
    }
    data.create()?;
    let artifacts = ArtifactStore::in_folder(data.artifacts()).context("could not open the artifact store")?;
    let index = index(data);
    for model in &mut settings.worker.models {
        let Some(file) = model.file.clone() else { continue };
        let (artifacts, index) = (artifacts.clone(), index.clone());
        let taking = tokio::task::spawn_blocking(move || {
            // Ctrl-C ends the program here, and the next start deletes the incomplete copy.
            take(&artifacts, &index, &ModelFile::open(&file)?, Take::Copy, &CancellationToken::new())
        });
        let (Stored { digest, .. }, _) = taking.await??;
        let expected = *model.digest.get_or_insert(digest);
        ensure!(
            expected == digest,
            "{} has the digest {digest}, and the settings say {expected}",
            model.file.as_deref().unwrap_or(Path::new("")).display()
        );
    }
    Ok(())
}

/// Gives each model with a file the registry's version that has its bytes, or a new one. A version never changes its
/// artifact, and clients that name no version get the newest one.
pub async fn settle_versions(models: &mut [ServedModel], store: &dyn RegistryStore) -> anyhow::Result<()> {
    let listed = store.models().await?;
    for model in models.iter_mut().filter(|model| model.file.is_some()) {
        let version = version_of(&model.model_id, model.version, model.digest(), &listed);
        if version != model.version {
            info!(model = %model.model_id, %version, "served as a new version, since the file has changed");
            model.version = version;
        }
    }
    Ok(())
}

fn version_of(name: &ModelName, wanted: ModelVersion, digest: Digest, listed: &[ModelEntry]) -> ModelVersion {
    let versions = || listed.iter().filter(|entry| entry.key.model_id == *name);
    let Some(newest) = versions().max_by_key(|entry| entry.key.version) else { return wanted };
    if newest.digest == digest || wanted > newest.key.version {
        return if newest.digest == digest { newest.key.version } else { wanted };
    }
    ModelVersion { minor: newest.key.version.minor.saturating_add(1), ..newest.key.version }
}

/// Splits `NAME=FILE`, or a `FILE` without a name.
pub fn split(text: &str) -> (Option<&str>, &str) {
    // A path may contain an equals sign, and a name contains no slash.
    match text.split_once('=') {
        Some((name, file)) if !name.contains(['/', '\\']) && !Path::new(text).exists() => (Some(name), file),
        _ => (None, text),
    }
}

/// Returns a served model for each file. Two quantisations of one model are named by their whole file names.
fn served(files: &[String], mut taken: BTreeSet<ModelName>) -> anyhow::Result<Vec<ServedModel>> {
    let files = files.iter().map(|text| named(text)).collect::<anyhow::Result<Vec<_>>>()?;
    let short = |file: &NamedFile| file.name.clone().or_else(|| model_file::name_of(&file.path));
    let mut wanted: BTreeMap<ModelName, usize> = BTreeMap::new();
    for name in files.iter().filter_map(short) {
        *wanted.entry(name).or_default() += 1;
    }
    let mut models = vec![];
    for file in &files {
        let alone = |name: &ModelName| wanted.get(name) == Some(&1) && !taken.contains(name);
        let whole = || ModelName::made_of(&file.path.to_string_lossy());
        let name = file.name.clone().or_else(|| short(file).filter(alone).or_else(whole)).with_context(|| {
            format!("{0}: no name can be made of this file's; give it one, as NAME={0}", file.path.display())
        })?;
        if !taken.insert(name.clone()) {
            bail!(
                "{1}: another model is called {0} already; give this one a name, as NAME={1}",
                name,
                file.path.display()
            );
        }
        models.push(ServedModel::of_file(name, file.path.clone()));
    }
    Ok(models)
}

fn named(text: &str) -> anyhow::Result<NamedFile> {
    let (name, file) = split(text);
    let name = name.map(str::parse).transpose().with_context(|| format!("{text} names no model"))?;
    Ok(NamedFile { name, path: file.into() })
}

/// A file that was added to the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    bytes: u64,
    modified_nanos: u128,
    digest: Digest,
}

/// Returns the digest of a model's file, and adds it to the store unless it is there. Blocks.
pub fn take(
    artifacts: &ArtifactStore,
    index: &Path,
    file: &ModelFile,
    how: Take,
    stop: &CancellationToken,
) -> anyhow::Result<(Stored, Import)> {
    let path = path::absolute(file.first())?.display().to_string();
    let mut known = read_index(index);
    let (bytes, modified_nanos) = file.stamp()?;
    if let Some(known) = known.get(&path)
        && (known.bytes, known.modified_nanos) == (bytes, modified_nanos)
        && artifacts.contains(&known.digest)
    {
        // The file may have been fetched from another node. From here on it is not evicted as such.
        artifacts.unmark(&known.digest).context("could not mark the model's file")?;
        return Ok((Stored { digest: known.digest, bytes: file.bytes()? }, Import::Known));
    }
    let (stored, import) = file.put(artifacts, how, stop)?;
    info!(file = path, digest = %stored.digest, bytes = stored.bytes, "the model's file is in the store");
    known.insert(path, Known { bytes, modified_nanos, digest: stored.digest });
    // If this fails, the next start only has to read the file again.
    if let Err(error) = write_index(index, &known) {
        warn!(file = %index.display(), %error, "could not write down which files are in the store");
    }
    Ok((stored, import))
}

/// Returns the digest of what was last downloaded from a source.
pub fn digest_of_source(index: &Path, source: &str) -> Option<Digest> {
    read_index(index).remove(source).map(|known| known.digest)
}

/// Remembers the digest of what was downloaded from a source.
pub fn remember_source(index: &Path, source: &str, digest: Digest, bytes: u64) {
    let mut known = read_index(index);
    known.insert(source.to_owned(), Known { bytes, modified_nanos: 0, digest });
    // If this fails, the source only has to be asked again.
    if let Err(error) = write_index(index, &known) {
        warn!(file = %index.display(), %error, "could not write down where a model came from");
    }
}

/// Returns the file that maps paths and download sources to digests.
pub fn index(data: &DataFolder) -> PathBuf {
    data.path().join("taken-in.json")
}

/// Reads the index. A missing or damaged file counts as empty.
fn read_index(index: &Path) -> BTreeMap<String, Known> {
    fs::read(index).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
}

fn write_index(index: &Path, known: &BTreeMap<String, Known>) -> std::io::Result<()> {
    identity::replace_private(index, &serde_json::to_vec_pretty(known)?)
}

#[cfg(test)]
mod tests {
    use protocol::UnixMillis;
    use protocol::model::ModelKey;

    use super::*;
    use crate::tiny_model;

    fn names(files: &[&str], taken: &[&str]) -> anyhow::Result<Vec<String>> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        let taken = taken.iter().map(|name| name.parse().expect("a name")).collect();
        Ok(served(&files, taken)?.into_iter().map(|model| model.model_id.to_string()).collect())
    }

    #[test]
    fn files_are_named_by_themselves_or_by_whoever_gives_them() {
        let given = ["/m/A.Q4_0.gguf", "/m/B.Q4_0.gguf", "/m/B.Q8_0.gguf", "mine=/m/c.gguf"];
        assert_eq!(names(&given, &[]).expect("named"), ["a", "b.q4-0", "b.q8-0", "mine"]);
        assert_eq!(names(&["/m/tiny.Q4_0.gguf"], &["tiny"]).expect("named"), ["tiny.q4-0"]);
        for (given, word) in [
            (vec!["/m/a.gguf", "/n/a.gguf"], "NAME=/n/a.gguf"),
            (vec!["/m/模型.gguf"], "NAME=/m/模型.gguf"),
            (vec!["Mine=/m/a.gguf"], "lower-case"),
        ] {
            let error = format!("{:#}", names(&given, &[]).expect_err(word));
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_path_is_made_absolute_and_keeps_its_name() {
        let here = std::env::current_dir().expect("a folder");
        assert_eq!(absolute("a.gguf"), here.join("a.gguf").display().to_string());
        assert_eq!(absolute("m=a.gguf"), format!("m={}", here.join("a.gguf").display()));
        assert_eq!(absolute("/m/x=y.gguf"), "/m/x=y.gguf");
    }

    #[tokio::test]
    async fn what_is_to_be_downloaded_is_no_file() {
        for text in ["hf:org/repo:Q4_K_M", "mine=hf:org/repo", "https://models.example/m.gguf", "mine=http://a/m.gguf"]
        {
            assert_eq!((absolute(text).as_str(), as_file(text)), (text, None));
        }
        let folder = tempfile::tempdir().expect("a folder");
        let mut settings = Settings { models: vec!["mine=hf:org/repo".into()], ..Settings::default() };
        let refused = take_in(&mut settings, &DataFolder::at(folder.path())).await.expect_err("no file");
        assert!(refused.to_string().contains("tether model add hf:org/repo"), "{refused}");
    }

    fn listed(version: &str, bytes: &[u8]) -> ModelEntry {
        let key = ModelKey { model_id: "mine".parse().expect("name"), version: version.parse().expect("version") };
        let (context_length, description, created_at) = (1, String::new(), UnixMillis(0));
        ModelEntry {
            key,
            digest: Digest::of(bytes),
            bytes: 1,
            context_length,
            description,
            created_at,
            facts: None,
            added: false,
            pin: false,
            keep_alive_secs: None,
        }
    }

    #[test]
    fn a_changed_file_is_a_new_version() {
        let name = "mine".parse().expect("name");
        let version = |wanted: &str, bytes: &[u8], listed: &[ModelEntry]| {
            version_of(&name, wanted.parse().expect("version"), Digest::of(bytes), listed).to_string()
        };
        let both = [listed("1.0", b"first"), listed("1.1", b"second")];
        assert_eq!(version("1.0", b"first", &[]), "1.0");
        assert_eq!(version("1.0", b"first", &both[..1]), "1.0");
        assert_eq!(version("1.0", b"second", &both[..1]), "1.1");
        assert_eq!(version("1.0", b"second", &both), "1.1");
        assert_eq!(version("1.0", b"first", &both), "1.2", "what clients get is what is served");
        assert_eq!(version("2.0", b"third", &both), "2.0");
    }

    struct Folder {
        folder: tempfile::TempDir,
        artifacts: ArtifactStore,
    }

    impl Folder {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let artifacts = ArtifactStore::in_folder(folder.path().join("artifacts")).expect("a store");
            Self { folder, artifacts }
        }

        fn take(&self, file: &str) -> anyhow::Result<Digest> {
            let folder = self.folder.path();
            let file = ModelFile::open(&folder.join(file))?;
            let index = folder.join("taken-in.json");
            Ok(take(&self.artifacts, &index, &file, Take::Copy, &CancellationToken::new())?.0.digest)
        }

        fn write(&self, file: &str, bytes: &[u8]) {
            fs::write(self.folder.path().join(file), bytes).expect("written");
        }
    }

    #[test]
    fn a_file_is_copied_once_and_again_when_it_has_changed() {
        let folder = Folder::new();
        folder.write("m.gguf", tiny_model::BYTES);
        let digest = folder.take("m.gguf").expect("taken in");
        assert_eq!(digest, tiny_model::digest());
        assert!(folder.artifacts.contains(&digest));
        // The index is trusted only for a file that has not changed.
        let index = folder.folder.path().join("taken-in.json");
        let other = Digest::of(b"other");
        folder.artifacts.put(&b"other"[..], 5).expect("stored");
        let text = fs::read_to_string(&index).expect("an index").replace(&digest.to_string(), &other.to_string());
        fs::write(&index, text).expect("written");
        assert_eq!(folder.take("m.gguf").expect("known"), other);
        folder.write("m.gguf", &[tiny_model::BYTES, b"longer"].concat());
        assert_eq!(folder.take("m.gguf").expect("read again"), Digest::of(&[tiny_model::BYTES, b"longer"].concat()));
        fs::write(&index, b"{").expect("written");
        folder.take("m.gguf").expect("a damaged index costs a copy and nothing else");
    }

    #[test]
    fn what_could_not_be_served_is_refused_before_it_is_copied() {
        let folder = Folder::new();
        folder.write("picture.gguf", b"\x89PNG\r\n\x1a\n");
        folder.write("adapter.gguf", tiny_model::ADAPTER_BYTES);
        folder.write("cut.gguf", &tiny_model::BYTES[..tiny_model::BYTES.len() / 2]);
        for (file, word) in [
            ("picture.gguf", "GGUF"),
            ("adapter.gguf", "adapter"),
            ("cut.gguf", "beyond the end"),
            ("missing.gguf", "there is no file"),
            (".", "not a file"),
        ] {
            let error = format!("{:#}", folder.take(file).expect_err(file));
            assert!(error.contains(word), "{file}: {error}");
        }
        let stored = fs::read_dir(folder.folder.path().join("artifacts/sha256")).expect("a folder").count();
        assert_eq!(stored, 0);
    }
}
