//! A model's GGUF file on this machine, whole or split, which is to be added to the store.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context as _, anyhow, bail, ensure};
use artifact_store::{ArtifactStore, Import, Stored};
use engine::gguf::{self, Header, Joined};
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use protocol::ModelName;
use protocol::model::ModelFacts;
use tokio_util::sync::CancellationToken;
use worker::model_facts;

use crate::model_names;

/// Files smaller than this are copied without a progress bar.
const QUIET_BYTES: u64 = 16 << 20;
/// Space that is left free on the disk, since other programs write there too.
const SPARE_BYTES: u64 = 32 << 20;

/// A model's file or its parts, with the header that shows whether the engine can load it.
#[derive(Debug)]
pub struct ModelFile {
    paths: Vec<PathBuf>,
    files: Vec<File>,
    header: Header,
    joined: Option<Joined>,
}

/// How a file is added to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    Copy,
    /// As a hard link if the file system supports it. For files that never change, such as those in other programs'
    /// caches.
    Link,
}

/// The name of a part of a split model: `NAME-00002-of-00003.gguf`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartName {
    /// The path before the numbers, including the folder.
    pub stem: String,
    /// The number of parts.
    pub count: u32,
}

impl PartName {
    /// Parses a file's name or path. Returns `None` for the file of a whole model.
    pub fn of(path: &str) -> Option<Self> {
        let rest = path.strip_suffix(".gguf")?;
        let (rest, count) = rest.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let digits = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
        let (number, count): (u32, u32) = (digits(number)?, digits(count)?);
        (1..=count).contains(&number).then(|| Self { stem: stem.to_owned(), count })
    }

    /// Returns the names of all parts, in order.
    pub fn all(&self) -> impl Iterator<Item = String> + '_ {
        (1..=self.count).map(|number| format!("{}-{number:05}-of-{:05}.gguf", self.stem, self.count))
    }
}

impl ModelFile {
    /// Opens a model's file, with all its parts if it is split. Refuses a file that the engine could not load. Blocks.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let paths = match path.to_str().and_then(PartName::of) {
            Some(part) if part.count > 1 => part.all().map(PathBuf::from).collect(),
            _ => vec![path.to_owned()],
        };
        let files = paths.iter().map(|part| open(part, path)).collect::<anyhow::Result<Vec<_>>>()?;
        Self::read(paths, files).with_context(|| format!("{} cannot be served", path.display()))
    }

    fn read(paths: Vec<PathBuf>, files: Vec<File>) -> anyhow::Result<Self> {
        if let [file] = &files[..] {
            let header = Header::read(file)?;
            let parts = header.unsigned("split.count").unwrap_or(1);
            ensure!(
                parts <= 1,
                "it is one of {parts} parts and not named like one; name them …-00001-of-{parts:05}.gguf and so on"
            );
            gguf::check_model(&header).map_err(|problem| anyhow!(problem))?;
            return Ok(Self { paths, files, header, joined: None });
        }
        let joined = Joined::of(&files).map_err(|problem| anyhow!(problem))?;
        Ok(Self { paths, files, header: joined.header.clone(), joined: Some(joined) })
    }

    /// Returns the model name that the file name suggests, without its quantisation.
    pub fn name(&self) -> Option<ModelName> {
        name_of(self.first())
    }

    /// Returns the facts about the model in the file's header.
    pub fn facts(&self) -> ModelFacts {
        model_facts::of(&self.header)
    }

    /// Returns the header of the whole model.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Returns the length that it will have in the store.
    pub fn bytes(&self) -> anyhow::Result<u64> {
        match (&self.joined, &self.files[..]) {
            (Some(joined), _) => Ok(joined.bytes()),
            (None, [file, ..]) => {
                Ok(file.metadata().with_context(|| format!("could not read {}", self.first().display()))?.len())
            }
            (None, []) => Ok(0),
        }
    }

    /// Returns what changes when a file is modified: the length of all parts, and the latest modification time.
    pub fn stamp(&self) -> anyhow::Result<(u64, u128)> {
        let mut stamp = (0, 0);
        for file in &self.files {
            let metadata = file.metadata().with_context(|| format!("could not read {}", self.first().display()))?;
            let since = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            stamp = (stamp.0 + metadata.len(), stamp.1.max(since.unwrap_or_default().as_nanos()));
        }
        Ok(stamp)
    }

    /// Returns the path of the file, or of the first part.
    pub fn first(&self) -> &Path {
        &self.paths[0]
    }

    /// Returns whether it is split.
    pub fn is_split(&self) -> bool {
        self.joined.is_some()
    }

    /// Adds it to the store, as one file. Leaves nothing behind if it fails or is stopped. Blocks.
    pub fn put(
        &self,
        artifacts: &ArtifactStore,
        take: Take,
        stop: &CancellationToken,
    ) -> anyhow::Result<(Stored, Import)> {
        let shown = self.first().display();
        let bytes = self.bytes()?;
        if take == Take::Copy || self.is_split() {
            check_room(artifacts, bytes)?;
        }
        let verb = if take == Take::Link && !self.is_split() { "checking" } else { "copying" };
        let bar = progress(bytes, &format!("{verb} {}", file_name(self.first())));
        let went = |done: u64| {
            bar.set_position(done);
            if stop.is_cancelled() { Err(stopped()) } else { Ok(()) }
        };
        let put = match &self.joined {
            Some(joined) => {
                let reader = Watched { reader: joined.reader(&self.files), done: 0, went };
                artifacts.put(reader, bytes).map(|stored| (stored, Import::Copied))
            }
            None if take == Take::Link => artifacts.put_link(self.first(), bytes, went),
            None => artifacts.put_open(&self.files[0], bytes, went),
        };
        bar.finish_and_clear();
        if stop.is_cancelled() {
            bail!("stopped; nothing of {shown} was kept");
        }
        put.with_context(|| format!("could not take {shown} in"))
    }
}

/// Returns the model name that a file name suggests, without its quantisation and part number.
pub fn name_of(path: &Path) -> Option<ModelName> {
    let whole = path.to_str().and_then(PartName::of).map(|part| PathBuf::from(format!("{}.gguf", part.stem)));
    model_names::of_file(whole.as_deref().unwrap_or(path))
}

/// Checks that the store's disk has space for this many more bytes.
pub fn check_room(artifacts: &ArtifactStore, bytes: u64) -> anyhow::Result<()> {
    // If the system does not report the free space, the copy itself will fail when there is too little.
    let Ok(room) = artifacts.room_bytes() else { return Ok(()) };
    ensure!(
        room >= bytes.saturating_add(SPARE_BYTES),
        "the model takes {} and the disk of the data folder has {} free; make room, or choose another disk with --data-dir",
        DecimalBytes(bytes),
        DecimalBytes(room)
    );
    Ok(())
}

/// Returns a progress bar, visible on a terminal only.
pub fn progress(bytes: u64, message: &str) -> ProgressBar {
    if bytes < QUIET_BYTES {
        return ProgressBar::hidden();
    }
    let template = "{msg} {wide_bar} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template);
    let bar = ProgressBar::new(bytes).with_message(message.to_owned());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Returns a file's name, escaped for display.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().escape_debug().to_string()
}

/// Returns the error of a reader that was stopped.
pub fn stopped() -> io::Error {
    io::Error::other("stopped")
}

fn open(part: &Path, named: &Path) -> anyhow::Result<File> {
    let shown = part.display();
    let file = File::open(part).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if part != named => {
            anyhow!("{shown} is missing; all parts of a model must lie in one folder")
        }
        io::ErrorKind::NotFound => anyhow!("there is no file {shown}"),
        _ => anyhow::Error::new(error).context(format!("could not open {shown}")),
    })?;
    let metadata = file.metadata().with_context(|| format!("could not read {shown}"))?;
    ensure!(metadata.is_file(), "{shown} is not a file; name a model in the GGUF format");
    Ok(file)
}

/// Reports how many bytes have been read, and stops when the callback returns an error.
struct Watched<R, F> {
    reader: R,
    done: u64,
    went: F,
}

impl<R: Read, F: FnMut(u64) -> io::Result<()>> Read for Watched<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.done += count as u64;
        (self.went)(self.done)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_known_by_their_names() {
        let part = PartName::of("/m/Qwen3-8B-Q4_K_M-00002-of-00003.gguf").expect("a part");
        let all: Vec<String> = part.all().collect();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0], "/m/Qwen3-8B-Q4_K_M-00001-of-00003.gguf");
        assert_eq!(name_of(Path::new(&all[2])).expect("a name").as_str(), "qwen3-8b");
        for whole in ["m.gguf", "m-00004-of-00003.gguf", "m-1-of-3.gguf", "m-00001-of-00003.bin", "-of-.gguf"] {
            assert_eq!(PartName::of(whole), None, "{whole}");
        }
    }
}
