//! Downloads files into `downloads/` beside the store, and resumes interrupted downloads.
//!
//! Each source has a folder of its own, with the files under their own names and a note about each incomplete one. A
//! file is complete once the server has sent as much as it announced. Its contents are verified when it is added to the
//! store.

pub mod hugging_face;
pub mod web;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use artifact_store::ArtifactStore;
use http::{StatusCode, Uri};
use protocol::Digest;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use self::web::{Credential, Failure, Response, Web, host, shown};
use crate::model_file::{self, progress};

/// Returns whether a text names something to download: a URL, or a model of the Hugging Face Hub.
pub fn is_source(text: &str) -> bool {
    text.contains("://") || hugging_face::Repository::of(text).is_some()
}

/// Consecutive tries without a byte after which a download is given up.
const TRIES_MAX: u32 = 6;
/// The wait before the second try; it doubles with each further one.
const WAIT_FIRST: Duration = Duration::from_secs(1);

/// A file to download.
#[derive(Debug, Clone)]
pub struct Remote {
    pub url: Uri,
    /// The file's name, without folders.
    pub name: String,
    /// The length in bytes, if known.
    pub bytes: Option<u64>,
    /// The digest, if known.
    pub digest: Option<Digest>,
}

/// Downloads the files of one source into a folder of their own, which other processes are locked out of.
#[derive(Debug)]
pub struct Downloads<'a> {
    web: &'a Web,
    credential: Option<Credential>,
    folder: PathBuf,
    artifacts: &'a ArtifactStore,
    stop: &'a CancellationToken,
    wait_first: Duration,
    _lock: File,
}

/// The saved facts about an incomplete file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    url: String,
    etag: Option<String>,
    bytes: Option<u64>,
}

/// Why a try did not complete the file.
enum Cut {
    /// A retry may succeed.
    Passing(anyhow::Error),
    /// A retry may succeed if the server was reached before.
    Unreachable(anyhow::Error),
    Lasting(anyhow::Error),
}

impl From<Failure> for Cut {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Passing(error) => Self::Passing(error),
            Failure::Unreachable(error) => Self::Unreachable(error),
            Failure::Lasting(error) => Self::Lasting(error),
        }
    }
}

impl<'a> Downloads<'a> {
    /// Opens the folder of a source, such as a URL.
    pub fn of(
        source: &str,
        root: &Path,
        web: &'a Web,
        credential: Option<Credential>,
        artifacts: &'a ArtifactStore,
        stop: &'a CancellationToken,
    ) -> anyhow::Result<Self> {
        let folder = root.join(&Digest::of(source.as_bytes()).to_string()[..16]);
        fs::create_dir_all(&folder).with_context(|| format!("could not make {}", folder.display()))?;
        let path = folder.join("lock");
        let lock = File::create(&path).with_context(|| format!("could not write {}", path.display()))?;
        ensure!(lock.try_lock().is_ok(), "another `tether model add` downloads this at the moment");
        Ok(Self { web, credential, folder, artifacts, stop, wait_first: WAIT_FIRST, _lock: lock })
    }

    /// Sets the first wait between tries.
    #[must_use]
    pub fn waiting(self, wait_first: Duration) -> Self {
        Self { wait_first, ..self }
    }

    /// Downloads a file, or the rest of it, and returns its path. Ends early when stopped; the bytes received are kept
    /// for the next time.
    pub async fn fetch(&self, remote: &Remote) -> anyhow::Result<PathBuf> {
        let path = self.folder.join(&remote.name);
        let (mut tries, mut wait) = (0, self.wait_first);
        loop {
            let before = length(&path);
            let tried = self.stop.run_until_cancelled(self.attempt(remote, &path)).await;
            let Some(tried) = tried else {
                bail!("stopped; the same command goes on with what came of {}", remote.name)
            };
            match tried {
                Ok(()) => {
                    make_private(&path).with_context(|| format!("could not change {}", path.display()))?;
                    return Ok(path);
                }
                Err(Cut::Lasting(error)) => return Err(error),
                // Without a network, waiting does not help.
                Err(Cut::Unreachable(error)) if before == 0 && tries == 0 => return Err(error),
                Err(Cut::Passing(error) | Cut::Unreachable(error)) => {
                    // A server that sends a little each time is slow, which is not a failure.
                    (tries, wait) = if length(&path) > before { (1, self.wait_first) } else { (tries + 1, 2 * wait) };
                    if tries >= TRIES_MAX {
                        return Err(
                            error.context(format!("{TRIES_MAX} tries failed; the same command goes on from here"))
                        );
                    }
                    tracing::info!(error = %format!("{error:#}"), "the download goes on in {} ms", wait.as_millis());
                    if self.stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
                        bail!("stopped; the same command goes on with what came of {}", remote.name);
                    }
                }
            }
        }
    }

    /// Returns how many bytes have been downloaded.
    pub fn bytes(&self) -> u64 {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
    }

    /// Checks that a downloaded file has the expected digest, and discards it otherwise.
    pub async fn verify(&self, remote: &Remote, path: &Path) -> anyhow::Result<()> {
        let Some(expected) = remote.digest else { return Ok(()) };
        let (shown, stop, whole) = (remote.name.clone(), self.stop.clone(), path.to_owned());
        let hashed = tokio::task::spawn_blocking(move || {
            let file = File::open(&whole)?;
            let bar = progress(file.metadata()?.len(), &format!("checking {shown}"));
            artifact_store::hash(&file, |done| {
                bar.set_position(done);
                if stop.is_cancelled() { Err(model_file::stopped()) } else { Ok(()) }
            })
        });
        let found = hashed.await?.with_context(|| format!("could not read {}", path.display()))?.digest;
        if found != expected {
            self.discard(path);
            bail!("what came of {} has the digest {found} and should have {expected}; try again", remote.name);
        }
        Ok(())
    }

    /// Deletes the downloads, once they are in the store.
    pub fn clear(self) {
        // Leftovers do no harm.
        let _ = fs::remove_dir_all(&self.folder);
    }

    /// Discards a file that turned out to be wrong.
    pub fn discard(&self, path: &Path) {
        let _ = fs::remove_file(path);
        let _ = fs::remove_file(note_of(path));
    }

    async fn attempt(&self, remote: &Remote, path: &Path) -> Result<(), Cut> {
        let mut note = read_note(path).filter(|note| note.url == remote.url.to_string());
        if remote.bytes.is_some_and(|bytes| note.is_some() && length(path) == bytes) {
            return Ok(());
        }
        // Only a strong ETag or a known digest shows that the rest belongs to the same file.
        let etag = note.as_ref().and_then(|note| note.etag.clone()).filter(|etag| !etag.starts_with("W/"));
        let have = length(path);
        let goes_on = have > 0 && note.is_some() && (etag.is_some() || remote.digest.is_some());
        let mut headers = vec![];
        if goes_on {
            headers.push(("range", format!("bytes={have}-")));
            headers.extend(etag.map(|etag| ("if-range", etag)));
        }
        let response = self.web.get(&remote.url, self.credential.as_ref(), &headers).await?;
        let offset = match response.status {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if goes_on => match range(&response) {
                Some((start, whole)) if start == have => {
                    if let (Some(whole), Some(known)) = (whole, note.as_ref().and_then(|note| note.bytes))
                        && whole != known
                    {
                        return Err(self.begin_again(path, "the file has changed"));
                    }
                    have
                }
                _ => return Err(self.begin_again(path, "the server sends another part than was asked for")),
            },
            StatusCode::RANGE_NOT_SATISFIABLE if goes_on => {
                if range(&response).is_some_and(|(_, whole)| whole == Some(have)) {
                    return Ok(());
                }
                return Err(self.begin_again(path, "the file has become shorter"));
            }
            status => return Err(refused(remote, status)),
        };
        let announced = response.header("content-length").and_then(|length| length.parse::<u64>().ok());
        let whole = announced.map(|rest| offset.saturating_add(rest)).or(remote.bytes);
        if let (Some(whole), Some(known)) = (whole, remote.bytes)
            && whole != known
        {
            return Err(Cut::Lasting(anyhow!(
                "{} has {whole} bytes, and the list of files says {known}; try again later",
                remote.name
            )));
        }
        let rest = whole.unwrap_or(0).saturating_sub(offset);
        model_file::check_room(self.artifacts, rest).map_err(Cut::Lasting)?;
        if offset == 0 {
            let etag = response.header("etag").map(str::to_owned);
            note = Some(Note { url: remote.url.to_string(), etag, bytes: whole });
            write_note(path, note.as_ref()).map_err(|error| Cut::Lasting(error.into()))?;
        }
        self.receive(remote, path, response, offset, whole).await
    }

    async fn receive(
        &self,
        remote: &Remote,
        path: &Path,
        mut response: Response,
        offset: u64,
        whole: Option<u64>,
    ) -> Result<(), Cut> {
        let written =
            |error: io::Error| Cut::Lasting(anyhow!(error).context(format!("could not write {}", path.display())));
        // A complete file is read-only and may be hard-linked into the store, so it is replaced and not overwritten.
        if offset == 0
            && let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(written(error));
        }
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(written)?;
        file.set_len(offset).map_err(written)?;
        let mut file = io::BufWriter::with_capacity(1 << 20, file);
        // A server that announces no length may fill the free space of the disk, but no more.
        let most = whole.unwrap_or_else(|| self.artifacts.room_bytes().unwrap_or(u64::MAX).saturating_add(offset));
        let bar = progress(whole.unwrap_or(0), &format!("downloading {}", remote.name.escape_debug()));
        bar.set_position(offset);
        bar.reset_eta();
        let mut have = offset;
        let outcome = loop {
            match response.chunk().await {
                Ok(None) => break Ok(()),
                Ok(Some(bytes)) => {
                    have += bytes.len() as u64;
                    if have > most {
                        break Err(Cut::Lasting(anyhow!(
                            "{} sends more than the {most} bytes that {} has; that is not kept",
                            host(&response.url),
                            remote.name
                        )));
                    }
                    file.write_all(&bytes).map_err(written)?;
                    bar.set_position(have);
                }
                Err(error) => {
                    break Err(Cut::Passing(anyhow!("{} broke off: {error}", host(&response.url))));
                }
            }
        };
        bar.finish_and_clear();
        file.flush().map_err(written)?;
        drop(file);
        match outcome {
            Ok(()) if whole.is_some_and(|whole| have < whole) => {
                Err(Cut::Passing(anyhow!("{} broke off", host(&response.url))))
            }
            Err(Cut::Lasting(error)) => {
                self.discard(path);
                Err(Cut::Lasting(error))
            }
            outcome => outcome,
        }
    }

    fn begin_again(&self, path: &Path, why: &str) -> Cut {
        self.discard(path);
        Cut::Passing(anyhow!("{why}; it is downloaded from its beginning"))
    }
}

/// Makes a complete file read-only: the store takes it as it is.
fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    fs::set_permissions(path, fs::Permissions::from_mode(0o400))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn note_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

fn read_note(path: &Path) -> Option<Note> {
    serde_json::from_slice(&fs::read(note_of(path)).ok()?).ok()
}

fn write_note(path: &Path, note: Option<&Note>) -> io::Result<()> {
    fs::write(note_of(path), serde_json::to_vec(&note)?)
}

/// Parses `Content-Range`: the start of the part, and the length of the whole.
fn range(response: &Response) -> Option<(u64, Option<u64>)> {
    let (part, whole) = response.header("content-range")?.strip_prefix("bytes ")?.split_once('/')?;
    let start = if part == "*" { 0 } else { part.split_once('-')?.0.parse().ok()? };
    Some((start, whole.parse().ok()))
}

/// Explains why a server refuses a file.
fn refused(remote: &Remote, status: StatusCode) -> Cut {
    let url = shown(&remote.url);
    match status.as_u16() {
        401 | 403 => Cut::Lasting(anyhow!(
            "{} refuses {} ({status}); a file of the Hub wants HF_TOKEN, and its terms accepted on the model's page",
            host(&remote.url),
            remote.name
        )),
        404 | 410 => Cut::Lasting(anyhow!("there is nothing at {url} ({status}); see that it is written right")),
        416 => Cut::Lasting(anyhow!("{url} has no such part ({status}); try again, from the beginning")),
        429 | 500..=599 => Cut::Passing(anyhow!("{} answers {status}", host(&remote.url))),
        _ => Cut::Lasting(anyhow!("{url} answers {status} and no file")),
    }
}
