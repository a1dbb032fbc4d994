//! Fetches model files from other nodes, resumes interrupted downloads, and frees disk space for them.
//!
//! No source is trusted: a file counts once all of its bytes have the digest that the registry lists.

pub(crate) mod disk;
pub(crate) mod sources;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use artifact_store::{ArtifactStore, FinishError, Partial};
use bytes::BytesMut;
use parking_lot::{Mutex, MutexGuard};
use protocol::artifact::ArtifactFetch;
use protocol::{Digest, ErrorCode};
use rpc::{ArtifactStream, CallError, Client, Directory};
use tokio::sync::Semaphore;
use tokio::time::{self, Instant};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use crate::config::CatalogUse;
use crate::listed::{Listed, ListedFile};
use crate::metrics::Metrics;
use disk::{FreeBytes, Shortage, Usage};
use sources::{AVOID_FOR, Source, Sources, blamed};

/// Files fetched at once. A node serves as many to one caller.
const FETCHES_MAX: usize = 2;
/// Bytes written at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// Consecutive rounds through all sources without a byte after which the fetch is given up.
const ROUNDS_MAX: u32 = 3;
/// The wait after such a round, and after a round in which a source was busy.
const ROUND_WAIT: Duration = Duration::from_secs(2);
/// How long to keep waiting for busy sources.
const BUSY_FOR: Duration = Duration::from_mins(10);
/// Consecutive digest mismatches after which the fetch is given up.
const MISMATCHES_MAX: u32 = 3;
/// A source that sends less than this within `SLOW_AFTER` is left for another.
const SLOW_BYTES: u64 = 64 * 1024;
const SLOW_AFTER: Duration = Duration::from_secs(30);
/// How often to check whether another process on this machine has completed its fetch of the same file.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Fetches files for one worker.
pub(crate) struct Fetcher {
    use_of: CatalogUse,
    client: Client,
    sources: Sources,
    store: ArtifactStore,
    listed: Listed,
    most_bytes: Option<u64>,
    free_bytes: FreeBytes,
    metrics: Metrics,
    permits: Semaphore,
    /// The files that are being fetched, with their lengths.
    under_way: Mutex<BTreeMap<Digest, u64>>,
    /// Held while disk space is freed.
    making_room: tokio::sync::Mutex<()>,
    blocking: TaskTracker,
}

/// What a fetcher is built from.
pub(crate) struct FetcherParts {
    pub(crate) use_of: CatalogUse,
    pub(crate) client: Client,
    pub(crate) directory: Directory,
    pub(crate) store: ArtifactStore,
    pub(crate) listed: Listed,
    /// The most bytes that fetched files may take together; `None` for no limit but the free space.
    pub(crate) most_bytes: Option<u64>,
    pub(crate) free_bytes: FreeBytes,
    pub(crate) metrics: Metrics,
}

/// Why a file was not fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("the registry no longer lists the model's file")]
    Withdrawn,
    #[error("the disk has no room for the model's file: {0}")]
    NoSpace(Shortage),
    #[error("the model's file could not be written: {0}")]
    Disk(#[from] io::Error),
    #[error("the model's file could not be fetched: {0}")]
    NoSource(String),
    #[error("what other nodes sent of the model's file had another digest, {MISMATCHES_MAX} times in a row")]
    Damaged,
}

/// How one source's turn ended before the file was complete.
enum Cut {
    /// It failed, does not have the file, or cannot be reached.
    Failed(String),
    /// It is busy serving other nodes.
    Busy(String),
    /// Its data does not match the listed file.
    Wrong(String),
    /// The file could not be written.
    Disk(io::Error),
}

impl Cut {
    fn of(error: CallError) -> Self {
        match error {
            CallError::Remote(error) if error.code == ErrorCode::Unavailable => Self::Busy(error.message),
            error => Self::Failed(error.to_string()),
        }
    }
}

/// Called with the bytes there are, the length of the file, and the bytes that were there at the beginning.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64, u64, u64) + Send + Sync);

type Shared = Arc<Mutex<Partial>>;

/// Marks a file as being fetched until dropped.
struct UnderWay<'a> {
    fetcher: &'a Fetcher,
    digest: Digest,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.fetcher.under_way().remove(&self.digest);
    }
}

impl Fetcher {
    pub(crate) fn new(parts: FetcherParts) -> Self {
        let FetcherParts { use_of, client, directory, store, listed, most_bytes, free_bytes, metrics } = parts;
        Self {
            use_of,
            sources: Sources::new(client.clone(), directory),
            client,
            store,
            listed,
            most_bytes,
            free_bytes,
            metrics,
            permits: Semaphore::new(FETCHES_MAX),
            under_way: Mutex::default(),
            making_room: tokio::sync::Mutex::default(),
            blocking: TaskTracker::new(),
        }
    }

    /// Returns the store of the files.
    pub(crate) fn store(&self) -> &ArtifactStore {
        &self.store
    }

    /// Returns the catalogue's entry of a file that may be fetched.
    pub(crate) fn fetchable(&self, digest: &Digest) -> Option<ListedFile> {
        self.listed.get(digest).filter(|_| self.use_of == CatalogUse::Fetch)
    }

    /// Returns whether the disk could hold a file, after evicting earlier fetched files if need be.
    pub(crate) fn could_take(&self, digest: &Digest, bytes: u64) -> bool {
        let left = bytes.saturating_sub(self.store.partial_bytes(digest));
        self.usage(Some(digest)).is_ok_and(|usage| usage.could_take(left))
    }

    /// Fetches a listed file unless it is here. Cancel safe: the bytes received so far are kept.
    pub(crate) async fn fetch(&self, digest: &Digest, progress: Progress<'_>) -> Result<(), FetchError> {
        let file = self.fetchable(digest).ok_or(FetchError::Withdrawn)?;
        tokio::select! {
            biased;
            () = self.listed.until_gone(digest) => Err(FetchError::Withdrawn),
            fetched = self.fetch_listed(digest, &file, progress) => fetched,
        }
    }

    async fn fetch_listed(&self, digest: &Digest, file: &ListedFile, progress: Progress<'_>) -> Result<(), FetchError> {
        // The semaphore is never closed.
        let _permit = self.permits.acquire().await;
        let Some(partial) = self.partial(digest).await? else { return Ok(()) };
        let begun_with = bytes_of(&partial);
        if begun_with > file.bytes {
            self.with(&partial, Partial::clear).await?;
        }
        let begun_with = bytes_of(&partial);
        let _under_way = self.make_room(digest, file.bytes, begun_with).await?;
        let begun = Instant::now();
        let note = |bytes: u64| progress(bytes, file.bytes, begun_with);
        note(begun_with);
        let mut is_resumed = begun_with > 0;
        let mut mismatches = 0;
        loop {
            let contributors = self.collect(digest, file, &partial, &note).await?;
            match self.with(&partial, Partial::finish).await {
                Ok(()) => {
                    let (bytes, took) = (file.bytes - begun_with, begun.elapsed());
                    let mib_per_sec = bytes as f64 / f64::from(1 << 20) / took.as_secs_f64().max(0.001);
                    let from: Vec<String> = contributors.iter().map(|source| source.peer.short()).collect();
                    info!(%digest, bytes, ?took, mib_per_sec, ?from, "a model's file is fetched");
                    return Ok(());
                }
                Err(FinishError::Io(error)) => return Err(error.into()),
                Err(FinishError::Mismatch { found }) => {
                    self.metrics.artifact_verify_failures.inc();
                    for peer in blamed(&contributors, is_resumed) {
                        let secs = AVOID_FOR.as_secs();
                        warn!(
                            node = peer.short(), %digest, %found,
                            "what a node sent of a model's file has another digest: it is dropped, and the node is not asked again for {secs} s"
                        );
                        self.sources.avoid(peer);
                    }
                    (is_resumed, mismatches) = (false, mismatches + 1);
                    if mismatches >= MISMATCHES_MAX {
                        return Err(FetchError::Damaged);
                    }
                }
            }
        }
    }

    /// Reads the rest of a file from one source after the other, and returns the sources that sent some of it.
    async fn collect(
        &self,
        digest: &Digest,
        file: &ListedFile,
        partial: &Shared,
        note: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Vec<Source>, FetchError> {
        let mut contributors = vec![];
        let (mut rounds, mut fruitless_since) = (0, Instant::now());
        while bytes_of(partial) < file.bytes {
            let round_began_with = bytes_of(partial);
            let (mut said, mut is_busy) = (self.sources.nobody(), false);
            for source in self.sources.of(digest, &file.models).await {
                let before = bytes_of(partial);
                let cut = self.read_from(source, digest, file.bytes, partial, note).await;
                if bytes_of(partial) > before && !contributors.contains(&source) {
                    contributors.push(source);
                }
                let why = match cut {
                    Ok(()) => break,
                    Err(Cut::Disk(error)) => return Err(error.into()),
                    Err(Cut::Wrong(why)) => {
                        self.sources.avoid(source.peer);
                        why
                    }
                    Err(Cut::Busy(why)) => {
                        is_busy = true;
                        why
                    }
                    Err(Cut::Failed(why)) => why,
                };
                debug!(node = source.peer.short(), %digest, why, "a node does not send a model's file");
                said = format!("{}: {why}", source.peer.short());
                if bytes_of(partial) >= file.bytes {
                    break;
                }
            }
            if bytes_of(partial) > round_began_with {
                (rounds, fruitless_since) = (0, Instant::now());
                continue;
            }
            rounds += 1;
            let is_patient = is_busy && fruitless_since.elapsed() < BUSY_FOR;
            if rounds >= ROUNDS_MAX && !is_patient {
                return Err(FetchError::NoSource(said));
            }
            time::sleep(ROUND_WAIT).await;
        }
        Ok(contributors)
    }

    /// Reads the rest of a file from one source. The bytes received are kept, however it ends.
    async fn read_from(
        &self,
        source: Source,
        digest: &Digest,
        bytes: u64,
        partial: &Shared,
        note: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Cut> {
        let offset = bytes_of(partial);
        let wanted = ArtifactFetch { digest: *digest, offset };
        let mut stream = ArtifactStream::open(&self.client, source.peer, wanted).await.map_err(Cut::of)?;
        if stream.bytes != bytes {
            return Err(Cut::Wrong(format!("it has {} bytes of it, and the registry lists {bytes}", stream.bytes)));
        }
        let (mut came, mut block, mut writing) = (offset, BytesMut::with_capacity(2 * BLOCK_BYTES), None);
        let (mut window_began, mut window_bytes) = (Instant::now(), 0);
        let ended = loop {
            match stream.next().await {
                None if came < bytes => break Err(Cut::Failed(format!("it ended after {came} of {bytes} bytes"))),
                None => break Ok(()),
                Some(Err(error)) => break Err(Cut::of(error)),
                Some(Ok(more)) if more.len() as u64 > bytes - came => {
                    break Err(Cut::Wrong(format!("it sends more than the {bytes} bytes that the registry lists")));
                }
                Some(Ok(more)) => {
                    came += more.len() as u64;
                    window_bytes += more.len() as u64;
                    block.extend_from_slice(&more);
                }
            }
            if block.len() >= BLOCK_BYTES {
                // One block is written while the next one is received. Two are never written at once, since their order
                // matters.
                if let Some(written) = writing.take() {
                    note(finished(written).await.map_err(Cut::Disk)?);
                }
                writing = Some(self.append(partial, block.split().freeze()));
            }
            if window_began.elapsed() >= SLOW_AFTER {
                if window_bytes < SLOW_BYTES {
                    break Err(Cut::Failed("it sends too slowly".to_owned()));
                }
                (window_began, window_bytes) = (Instant::now(), 0);
            }
        };
        if let Some(written) = writing {
            finished(written).await.map_err(Cut::Disk)?;
        }
        note(finished(self.append(partial, block.freeze())).await.map_err(Cut::Disk)?);
        ended
    }

    /// Writes a block, and returns the file's length so far.
    fn append(&self, partial: &Shared, block: bytes::Bytes) -> tokio::task::JoinHandle<io::Result<u64>> {
        let partial = partial.clone();
        self.blocking.spawn_blocking(move || {
            let mut partial = lock(&partial);
            partial.append(&block)?;
            Ok(partial.bytes())
        })
    }

    /// Opens the partial file once no other process on this machine fetches it; `None` if the file is complete.
    async fn partial(&self, digest: &Digest) -> io::Result<Option<Shared>> {
        loop {
            let (store, digest) = (self.store.clone(), *digest);
            let look = move || {
                if store.contains(&digest) {
                    return Ok(Some(None));
                }
                let Some(partial) = store.partial(&digest)? else { return Ok(None) };
                // Another process may have completed the file before this one took the lock.
                if store.contains(&digest) {
                    partial.discard()?;
                    return Ok(Some(None));
                }
                Ok::<_, io::Error>(Some(Some(Arc::new(Mutex::new(partial)))))
            };
            if let Some(found) = finished(self.blocking.spawn_blocking(look)).await? {
                return Ok(found);
            }
            time::sleep(LOOK_EVERY).await;
        }
    }

    async fn with<T: Send + 'static, E: From<io::Error> + Send + 'static>(
        &self,
        partial: &Shared,
        act: impl FnOnce(&mut Partial) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let partial = partial.clone();
        let done = self.blocking.spawn_blocking(move || act(&mut lock(&partial)));
        done.await.unwrap_or_else(|error| Err(io::Error::other(error).into()))
    }

    /// Evicts fetched files, least recently used first, until there is space for a file.
    async fn make_room(&self, digest: &Digest, bytes: u64, there: u64) -> Result<UnderWay<'_>, FetchError> {
        let _making_room = self.making_room.lock().await;
        let wanted = bytes - there;
        let fetched = self.store.fetched()?;
        let mut usage = self.usage(Some(digest))?;
        let shortage = Shortage { wanted, usage };
        // Nothing is evicted unless that frees enough.
        let can_leave = fetched.iter().filter(|fetched| !self.store.is_in_use(&fetched.digest));
        if usage.missing(wanted) > can_leave.map(|fetched| fetched.bytes).sum() {
            return Err(FetchError::NoSpace(shortage));
        }
        let mut oldest = fetched.into_iter();
        while usage.missing(wanted) > 0 {
            let Some(next) = oldest.next() else { return Err(FetchError::NoSpace(shortage)) };
            let store = self.store.clone();
            if finished(self.blocking.spawn_blocking(move || store.evict(&next.digest))).await? {
                info!(digest = %next.digest, bytes = next.bytes, "a file that was fetched makes room for another");
            }
            usage = self.usage(Some(digest))?;
        }
        self.under_way().insert(*digest, bytes);
        Ok(UnderWay { fetcher: self, digest: *digest })
    }

    /// Measures the disk, for a file that is to be fetched besides those under way.
    fn usage(&self, wanted: Option<&Digest>) -> io::Result<Usage> {
        let under_way = self.under_way().clone();
        let others = under_way.iter().filter(|(digest, _)| Some(*digest) != wanted);
        let coming = others.map(|(digest, bytes)| bytes.saturating_sub(self.store.partial_bytes(digest))).sum();
        let partial = self.store.partials()?.iter().map(|digest| self.store.partial_bytes(digest)).sum();
        let fetched = self.store.fetched()?.iter().map(|fetched| fetched.bytes).sum();
        Ok(Usage { free: (self.free_bytes)(), most: self.most_bytes, fetched, partial, coming })
    }

    /// Returns the fetched files, complete or not.
    pub(crate) fn kept(&self) -> io::Result<Vec<Digest>> {
        let fetched = self.store.fetched()?.into_iter().map(|fetched| fetched.digest);
        Ok(fetched.chain(self.store.partials()?).collect())
    }

    /// Deletes fetched files, complete or not, for which `is_over` holds and that are not in use. Returns those that
    /// were deleted.
    pub(crate) async fn clear(&self, is_over: impl Fn(&Digest) -> bool) -> io::Result<Vec<Digest>> {
        let fetched = self.store.fetched()?.into_iter().map(|fetched| fetched.digest);
        let fetched: Vec<Digest> = fetched.filter(&is_over).collect();
        let partials: Vec<Digest> = self.store.partials()?.into_iter().filter(is_over).collect();
        let store = self.store.clone();
        let clear = move || {
            let mut gone = vec![];
            let mut note = |digest: Digest, done: io::Result<bool>| match done {
                Ok(true) => gone.push(digest),
                Ok(false) => {}
                // The remaining files are deleted all the same.
                Err(error) => warn!(%digest, %error, "a file that was fetched could not be deleted"),
            };
            for digest in fetched {
                note(digest, store.evict(&digest));
            }
            for digest in partials {
                // A partial file that is being fetched is still needed.
                let partial = store.partial(&digest).and_then(|partial| partial.map(Partial::discard).transpose());
                note(digest, partial.map(|discarded| discarded.is_some()));
            }
            Ok(gone)
        };
        finished(self.blocking.spawn_blocking(clear)).await
    }

    fn under_way(&self) -> MutexGuard<'_, BTreeMap<Digest, u64>> {
        self.under_way.lock()
    }
}

fn lock(partial: &Shared) -> MutexGuard<'_, Partial> {
    partial.lock()
}

fn bytes_of(partial: &Shared) -> u64 {
    lock(partial).bytes()
}

async fn finished<T>(work: tokio::task::JoinHandle<io::Result<T>>) -> io::Result<T> {
    work.await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[cfg(test)]
mod tests;
