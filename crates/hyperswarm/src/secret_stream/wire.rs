//! The transport below the encryption: a UDX stream, or memory in tests, where time can be paused.

use bytes::Bytes;

use super::Closed;
use crate::udx;

#[cfg(test)]
pub(crate) use self::memory::pair;

pub(super) enum Wire {
    Udx(udx::Stream),
    #[cfg(test)]
    Memory(memory::End),
}

impl Wire {
    pub(super) fn write(&self, bytes: Bytes) -> Result<(), Closed> {
        match self {
            Self::Udx(stream) => stream.write(bytes).map_err(|_| Closed),
            #[cfg(test)]
            Self::Memory(end) => end.write(bytes),
        }
    }

    pub(super) async fn room(&self) -> Result<(), Closed> {
        match self {
            Self::Udx(stream) => stream.room().await.map_err(|_| Closed),
            #[cfg(test)]
            Self::Memory(end) => end.room().await,
        }
    }

    pub(super) async fn read(&self) -> Result<Option<Bytes>, udx::StreamError> {
        match self {
            Self::Udx(stream) => stream.read().await,
            #[cfg(test)]
            Self::Memory(end) => Ok(end.read().await),
        }
    }

    pub(super) fn end(&self) {
        match self {
            Self::Udx(stream) => stream.end(),
            #[cfg(test)]
            Self::Memory(end) => end.end(),
        }
    }

    pub(super) fn destroy(&self) {
        match self {
            Self::Udx(stream) => stream.destroy(),
            #[cfg(test)]
            Self::Memory(end) => end.destroy(),
        }
    }

    pub(super) async fn closed(&self) {
        match self {
            Self::Udx(stream) => stream.closed().await,
            #[cfg(test)]
            Self::Memory(end) => end.closed().await,
        }
    }
}

#[cfg(test)]
mod memory {
    use std::collections::VecDeque;
    use std::sync::Arc;

    use bytes::Bytes;
    use parking_lot::Mutex;
    use tokio::sync::watch;
    use tokio_util::sync::CancellationToken;

    use super::super::{Closed, Options, SecretStream};
    use super::Wire;
    use crate::crypto::PublicKey;
    use crate::crypto::noise::Session;

    /// The queue length above which `room` waits.
    const ROOM_BYTES: usize = 256 * 1024;

    #[derive(Default)]
    struct Queue {
        pieces: VecDeque<Bytes>,
        bytes: usize,
        ended: bool,
    }

    /// One end of an in-memory stream.
    pub(in super::super) struct End {
        outgoing: Arc<watch::Sender<Queue>>,
        incoming: Arc<watch::Sender<Queue>>,
        destroyed: CancellationToken,
        ends: Arc<Mutex<usize>>,
    }

    impl End {
        pub(super) fn write(&self, bytes: Bytes) -> Result<(), Closed> {
            if self.destroyed.is_cancelled() || self.outgoing.borrow().ended {
                return Err(Closed);
            }
            self.outgoing.send_modify(|queue| {
                queue.bytes += bytes.len();
                queue.pieces.push_back(bytes);
            });
            Ok(())
        }

        pub(super) async fn room(&self) -> Result<(), Closed> {
            let mut queue = self.outgoing.subscribe();
            let room = queue.wait_for(|queue| queue.bytes < ROOM_BYTES || queue.ended);
            match self.destroyed.run_until_cancelled(room).await {
                Some(Ok(queue)) if !queue.ended => Ok(()),
                _ => Err(Closed),
            }
        }

        pub(super) async fn read(&self) -> Option<Bytes> {
            let mut queue = self.incoming.subscribe();
            let some = queue.wait_for(|queue| !queue.pieces.is_empty() || queue.ended);
            self.destroyed.run_until_cancelled(some).await?.ok()?;
            let mut piece = None;
            self.incoming.send_modify(|queue| {
                piece = queue.pieces.pop_front();
                queue.bytes -= piece.as_ref().map_or(0, Bytes::len);
            });
            piece
        }

        pub(super) fn end(&self) {
            let mut first = false;
            self.outgoing.send_modify(|queue| first = !std::mem::replace(&mut queue.ended, true));
            let mut ends = self.ends.lock();
            *ends += usize::from(first);
            if *ends == 2 {
                self.destroyed.cancel();
            }
        }

        pub(super) fn destroy(&self) {
            self.destroyed.cancel();
        }

        pub(super) async fn closed(&self) {
            self.destroyed.cancelled().await;
        }
    }

    impl Drop for End {
        fn drop(&mut self) {
            if !self.outgoing.borrow().ended {
                self.destroy();
            }
        }
    }

    /// Returns the two sides of a connection, the initiator's first.
    pub(crate) fn pair(options: &Options) -> (SecretStream, SecretStream) {
        let queues: [Arc<watch::Sender<Queue>>; 2] = std::array::from_fn(|_| Arc::new(watch::Sender::default()));
        let (destroyed, ends) = (CancellationToken::new(), Arc::default());
        let side = |is_initiator: bool| {
            let (out, back) = if is_initiator { (0, 1) } else { (1, 0) };
            let end = End {
                outgoing: queues[out].clone(),
                incoming: queues[back].clone(),
                destroyed: destroyed.clone(),
                ends: Arc::clone(&ends),
            };
            let session = Session {
                is_initiator,
                local_key: PublicKey([1 + out as u8; 32]),
                remote_key: PublicKey([1 + back as u8; 32]),
                tx: [1 + out as u8; 32],
                rx: [1 + back as u8; 32],
                hash: [5; 64],
            };
            SecretStream::over(Wire::Memory(end), session, options)
        };
        (side(true), side(false))
    }
}
