//! Passes open files from a worker to its engine process.
//!
//! Descriptors travel over a Unix socket that carries nothing else: one message for each model or adapter, in the
//! order of the frames that refer to them. A message is sent before its frame, so it has arrived when the frame does.
//! No path is ever sent, so the bytes that are loaded are the bytes that were verified.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

use super::frame::FileInfo;
use crate::model_runtime::VerifiedArtifact;

/// The maximum number of files of one model; Linux passes at most 253 descriptors at once.
pub const FILES_MAX: usize = 250;

/// Returns the descriptions of an artifact's files that go into a frame, in order.
pub fn describe(artifact: &VerifiedArtifact) -> Vec<FileInfo> {
    files(artifact).map(|file| FileInfo { sha256: file.sha256.clone(), bytes: file.bytes }).collect()
}

/// Sends the files of an artifact. Does not block if the socket is non-blocking.
pub fn send(socket: &UnixStream, artifact: &VerifiedArtifact) -> io::Result<()> {
    let descriptors: Vec<BorrowedFd<'_>> = files(artifact).map(|file| file.file.as_fd()).collect();
    if descriptors.len() > FILES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("more than {FILES_MAX} files")));
    }
    let rights = SendAncillaryMessage::ScmRights(&descriptors);
    let mut space = vec![MaybeUninit::uninit(); rights.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(rights);
    // At least one byte must accompany descriptors.
    rustix::net::sendmsg(socket, &[IoSlice::new(&[0])], &mut control, SendFlags::empty())?;
    Ok(())
}

/// Receives the files that a frame refers to. Does not block if the socket is non-blocking.
pub fn receive(socket: &UnixStream, infos: &[FileInfo]) -> io::Result<VerifiedArtifact> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut [0])], &mut control, RecvFlags::empty())?;
    let files: Vec<File> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .map(File::from)
        .collect();
    if files.len() != infos.len() {
        let problem = format!("{} files came for {}", files.len(), infos.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let verified = |(file, FileInfo { sha256, bytes }): (File, &FileInfo)| VerifiedArtifact {
        file,
        sha256: sha256.clone(),
        bytes: *bytes,
        parts: Vec::new(),
    };
    let mut verified = files.into_iter().zip(infos).map(verified);
    let first = verified.next().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no file came"))?;
    Ok(VerifiedArtifact { parts: verified.collect(), ..first })
}

/// Opens the files anew, so that each has a position of its own: the worker may read through the descriptors it sent.
/// A file that cannot be opened by its descriptor's path is kept as it came.
pub(super) fn reopened(artifact: VerifiedArtifact) -> VerifiedArtifact {
    let file = File::open(format!("/proc/self/fd/{}", artifact.file.as_raw_fd())).unwrap_or(artifact.file);
    VerifiedArtifact { file, parts: artifact.parts.into_iter().map(reopened).collect(), ..artifact }
}

fn files(artifact: &VerifiedArtifact) -> impl Iterator<Item = &VerifiedArtifact> {
    std::iter::once(artifact).chain(&artifact.parts)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn artifact(text: &str, parts: Vec<VerifiedArtifact>) -> VerifiedArtifact {
        let mut file = tempfile::tempfile().expect("temporary files work");
        file.write_all(text.as_bytes()).expect("it is written");
        file.rewind().expect("it seeks");
        VerifiedArtifact { file, sha256: format!("digest of {text}"), bytes: text.len() as u64, parts }
    }

    fn read(artifact: &VerifiedArtifact) -> String {
        std::io::read_to_string(&artifact.file).expect("it can be read")
    }

    fn sockets() -> (UnixStream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("sockets work");
        theirs.set_nonblocking(true).expect("it is ours");
        (ours, theirs)
    }

    #[test]
    fn files_arrive_in_their_order_one_artifact_after_another() {
        let (ours, theirs) = sockets();
        let model = artifact("one", vec![artifact("two", Vec::new()), artifact("three", Vec::new())]);
        let adapter = artifact("four", Vec::new());
        let infos = [describe(&model), describe(&adapter)];
        send(&ours, &model).expect("there is room");
        send(&ours, &adapter).expect("there is room");
        drop((model, adapter));
        let model = receive(&theirs, &infos[0]).expect("it is there");
        assert_eq!(read(&model), "one");
        assert_eq!(model.parts.iter().map(read).collect::<Vec<_>>(), ["two", "three"]);
        assert_eq!((model.parts[1].sha256.as_str(), model.parts[1].bytes), ("digest of three", 5));
        let adapter = receive(&theirs, &infos[1]).expect("it is there");
        assert_eq!((read(&adapter).as_str(), adapter.parts.len()), ("four", 0));
    }

    #[test]
    fn the_largest_model_fits_one_message_and_a_larger_one_is_refused() {
        let (ours, theirs) = sockets();
        let parts = |count| (1..count).map(|_| artifact("part", Vec::new())).collect();
        let largest = artifact("first", parts(FILES_MAX));
        send(&ours, &largest).expect("there is room");
        let received = receive(&theirs, &describe(&largest)).expect("it is there");
        assert_eq!(read(received.parts.last().expect("it has parts")), "part");
        assert!(send(&ours, &artifact("first", parts(FILES_MAX + 1))).is_err());
    }

    #[test]
    fn another_number_of_files_than_announced_is_an_error() {
        let (ours, theirs) = sockets();
        let info = FileInfo { sha256: String::new(), bytes: 0 };
        send(&ours, &artifact("one", Vec::new())).expect("there is room");
        assert!(receive(&theirs, &[info.clone(), info.clone()]).is_err());
        assert!(receive(&theirs, &[info]).is_err(), "nothing is left");
    }
}
