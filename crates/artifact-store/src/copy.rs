//! Copies and hashes files, with one thread for each of the two.

use std::fs::File;
use std::io::{self, Read, Seek as _, Write};
use std::sync::mpsc;
use std::thread;

use protocol::Digest;
use sha2::{Digest as _, Sha256};

use crate::artifact_store::Stored;

const BUFFER_BYTES: usize = 1 << 20;
/// Bytes that the kernel copies at a time.
#[cfg(target_os = "linux")]
const STEP_BYTES: usize = 8 << 20;
/// Buffers in flight between reading and hashing.
const BUFFERS: usize = 4;

/// Why a copy failed, by side.
#[derive(Debug)]
pub(crate) enum Copy {
    Source(io::Error),
    TooLarge,
    Target(io::Error),
}

/// Hashes an open file from its start and rewinds it. `progress` receives the number of bytes at each step; an error
/// from it aborts the operation.
pub fn hash(mut file: &File, mut progress: impl FnMut(u64) -> io::Result<()>) -> io::Result<Stored> {
    file.rewind()?;
    // One byte more than expected: a file that grows meanwhile ends the read and gets another digest.
    let length = file.metadata()?.len().saturating_add(1);
    let hashed = copy_hashed(file.take(length), io::sink(), u64::MAX, &mut progress).map_err(|error| match error {
        Copy::Source(error) | Copy::Target(error) => error,
        Copy::TooLarge => io::ErrorKind::FileTooLarge.into(),
    })?;
    file.rewind()?;
    Ok(hashed)
}

/// Copies a file into an empty one and hashes the copy on the way.
pub(crate) fn copy_file_hashed(
    source: &File,
    target: &mut File,
    bytes_max: u64,
    progress: &mut impl FnMut(u64) -> io::Result<()>,
) -> Result<Stored, Copy> {
    #[cfg(target_os = "linux")]
    if let Some(copied) = copy_in_kernel(source, target, bytes_max, progress) {
        return copied;
    }
    copy_hashed(source, target, bytes_max, progress)
}

/// Copies in the kernel, which takes half the time, while another thread hashes the bytes already copied. Returns
/// `None` if the kernel cannot copy between these files.
#[cfg(target_os = "linux")]
fn copy_in_kernel(
    source: &File,
    target: &File,
    bytes_max: u64,
    progress: &mut impl FnMut(u64) -> io::Result<()>,
) -> Option<Result<Stored, Copy>> {
    use std::os::unix::fs::FileExt as _;

    use rustix::fs::copy_file_range;

    let (mut from, mut to) = (0, 0);
    // If the kernel cannot copy, the first step fails.
    let mut count = copy_file_range(source, Some(&mut from), target, Some(&mut to), STEP_BYTES).ok()?;
    Some(thread::scope(|scope| {
        let (copied, to_hash) = mpsc::channel::<u64>();
        let hasher = scope.spawn(move || {
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; BUFFER_BYTES];
            let mut done = 0;
            for end in to_hash {
                while done < end {
                    let step = (end - done).min(BUFFER_BYTES as u64) as usize;
                    target.read_exact_at(&mut buffer[..step], done)?;
                    hasher.update(&buffer[..step]);
                    done += step as u64;
                }
            }
            Ok::<_, io::Error>(Digest(hasher.finalize().into()))
        });
        // Syncing while copying shortens the final sync.
        let (settled, to_sync) = mpsc::sync_channel::<()>(1);
        let syncer = scope.spawn(move || to_sync.into_iter().try_for_each(|()| target.sync_data()));
        while count > 0 {
            step(to, bytes_max, progress)?;
            // A send fails only if the thread has failed, and its error is returned at the end. A full channel means
            // that the syncer is busy and will sync later.
            let _ = copied.send(to);
            let _ = settled.try_send(());
            count = match copy_file_range(source, Some(&mut from), target, Some(&mut to), STEP_BYTES) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => 1,
                Err(error) => return Err(Copy::Target(error.into())),
            };
        }
        drop((copied, settled));
        syncer.join().expect("syncing does not panic").map_err(Copy::Target)?;
        let digest = hasher.join().expect("hashing does not panic").map_err(Copy::Target)?;
        Ok(Stored { digest, bytes: to })
    }))
}

/// Copies a source to a target and hashes the bytes on the way.
pub(crate) fn copy_hashed(
    mut source: impl Read,
    mut target: impl Write,
    bytes_max: u64,
    progress: &mut impl FnMut(u64) -> io::Result<()>,
) -> Result<Stored, Copy> {
    let mut first = vec![0; BUFFER_BYTES];
    let count = fill(&mut source, &mut first)?;
    if count < BUFFER_BYTES {
        // For so few bytes, a second thread would take longer.
        let bytes = count as u64;
        step(bytes, bytes_max, progress)?;
        target.write_all(&first[..count]).map_err(Copy::Target)?;
        return Ok(Stored { digest: Digest(Sha256::digest(&first[..count]).into()), bytes });
    }
    thread::scope(|scope| {
        let (filled, to_hash) = mpsc::sync_channel::<(Vec<u8>, usize)>(BUFFERS);
        let (hashed, free) = mpsc::channel();
        let hasher = scope.spawn(move || {
            let mut hasher = Sha256::new();
            for (buffer, count) in to_hash {
                hasher.update(&buffer[..count]);
                // The last buffers are not reused.
                let _ = hashed.send(buffer);
            }
            hasher.finalize()
        });
        let mut spare = BUFFERS - 1;
        let mut bytes = 0_u64;
        let mut next = (first, count);
        while next.1 > 0 {
            bytes += next.1 as u64;
            step(bytes, bytes_max, progress)?;
            target.write_all(&next.0[..next.1]).map_err(Copy::Target)?;
            filled.send(next).expect("the hasher waits for more");
            let mut buffer = if spare > 0 {
                spare -= 1;
                vec![0; BUFFER_BYTES]
            } else {
                free.recv().expect("the hasher gives back what it took")
            };
            let count = fill(&mut source, &mut buffer)?;
            next = (buffer, count);
        }
        drop(filled);
        let digest = hasher.join().expect("hashing does not panic");
        Ok(Stored { digest: Digest(digest.into()), bytes })
    })
}

fn step(bytes: u64, bytes_max: u64, progress: &mut impl FnMut(u64) -> io::Result<()>) -> Result<(), Copy> {
    if bytes > bytes_max {
        return Err(Copy::TooLarge);
    }
    progress(bytes).map_err(Copy::Source)
}

/// Fills the buffer, unless the source ends first.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> Result<usize, Copy> {
    let mut count = 0;
    while count < buffer.len() {
        match source.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Copy::Source(error)),
        }
    }
    Ok(count)
}
