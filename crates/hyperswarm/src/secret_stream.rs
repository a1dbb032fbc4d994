//! Encrypted messages on a [`udx::Stream`], compatible with the Node package `@hyperswarm/secret-stream`.
//!
//! [`Sealer`] and [`Opener`] turn messages into bytes and back, and do no I/O. [`SecretStream`] connects them to a
//! stream. It sends an empty message as a keep-alive when it has been silent for a while, so that a dead peer is
//! noticed.

mod cipher;
mod frames;
mod message_budget;
mod wire;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::frames::{DecryptError, FIRST_FRAME_BYTES, MESSAGE_BYTES_MAX, Opener, Sealer, TooLong};
pub use self::message_budget::MessageBudget;
use self::message_budget::{Account, FREE_BYTES, Held};
use self::wire::Wire;
use crate::crypto::noise::Session;
use crate::crypto::{PublicKey, keyed_hash, random};
use crate::udx;

#[cfg(test)]
pub(crate) use self::wire::pair as memory_pair;

/// How long a message above the limit waits for the limit to be raised, before the stream is destroyed.
const RAISED_WITHIN: Duration = Duration::from_secs(5);

/// Options of a [`SecretStream`].
#[derive(Debug, Clone)]
pub struct Options {
    /// The silence after which an empty keep-alive message is sent. `None` disables keep-alives.
    pub keep_alive: Option<Duration>,
    /// Limits that apply until [`SecretStream::lift_limits`].
    pub limits: Option<MessageLimits>,
}

impl Default for Options {
    fn default() -> Self {
        Self { keep_alive: Some(Duration::from_secs(5)), limits: None }
    }
}

/// Limits on what a peer may send that has not proven yet that it may use more memory.
#[derive(Debug, Clone)]
pub struct MessageLimits {
    /// The maximum length of a message. A longer one waits a few seconds for [`SecretStream::allow_messages`] or
    /// [`SecretStream::lift_limits`], because the proof may be the message before it. Then the stream is destroyed.
    pub message_bytes_max: usize,
    /// Limits the bytes of the messages of many streams together.
    pub budget: Arc<MessageBudget>,
}

/// Why a message could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The message is too long. The stream stays usable.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The stream is closed.
    #[error("the stream is closed")]
    Closed,
}

/// The stream is closed, so no more messages can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub struct Closed;

/// Why no further message can be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The other side sent something that is not a valid sealed message. The stream was destroyed.
    #[error(transparent)]
    Open(#[from] DecryptError),
    /// The other side ended the stream in the middle of a message.
    #[error("the stream ended inside a message")]
    CutOff,
    /// The other side sent more than this side allows it. The stream was destroyed.
    #[error("the peer sends more than it may")]
    TooMuch,
    /// The underlying stream failed.
    #[error(transparent)]
    Stream(#[from] udx::StreamError),
}

/// A connection that carries encrypted messages in order. Clones share it. Dropping the last one destroys the
/// connection, or, if it was ended, closes it once everything sent is delivered.
#[derive(Clone)]
pub struct SecretStream {
    shared: Arc<Shared>,
}

struct Shared {
    wire: Wire,
    session: Session,
    sealing: Mutex<Sealing>,
    opening: tokio::sync::Mutex<Opening>,
    message_bytes_max: AtomicUsize,
    /// What this stream holds of the budget that limits it, until the limits are lifted.
    account: Mutex<Option<Arc<Account>>>,
    limits_raised: Notify,
    stop: CancellationToken,
    tasks: TaskTracker,
}

struct Sealing {
    sealer: Sealer,
    frames: BytesMut,
    last_sent: Instant,
}

struct Opening {
    opener: Opener,
    failed: Option<DecryptError>,
    /// The buffered bytes that count towards the budget.
    held: Option<Held>,
    /// Until when a message that is too long waits for a higher limit.
    raised_until: Option<Instant>,
}

impl SecretStream {
    /// Encrypts a stream with the session of a handshake, and sends the first frame.
    pub fn new(stream: udx::Stream, session: Session, options: Options) -> Self {
        Self::over(Wire::Udx(stream), session, &options)
    }

    fn over(wire: Wire, session: Session, options: &Options) -> Self {
        let (mut sealer, first_frame) = Sealer::new(&session, random());
        sealer.set_small(options.limits.is_some());
        // If the stream is closed already, the first use reports it.
        let _ = wire.write(Bytes::copy_from_slice(&first_frame));
        let sealing = Sealing { sealer, frames: BytesMut::new(), last_sent: Instant::now() };
        let mut opener = Opener::new(&session);
        opener.set_small(options.limits.is_some());
        let opening = Opening { opener, failed: None, held: None, raised_until: None };
        let limits = options.limits.as_ref();
        let shared = Arc::new_cyclic(|shared: &Weak<Shared>| Shared {
            wire,
            session,
            sealing: Mutex::new(sealing),
            opening: tokio::sync::Mutex::new(opening),
            message_bytes_max: AtomicUsize::new(limits.map_or(MESSAGE_BYTES_MAX, |limits| limits.message_bytes_max)),
            account: Mutex::new(limits.map(|limits| account(limits, shared.clone()))),
            limits_raised: Notify::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        if let Some(silence) = options.keep_alive.filter(|silence| !silence.is_zero()) {
            shared.tasks.spawn(keep_alive(Arc::downgrade(&shared), shared.stop.clone(), silence));
        }
        shared.tasks.close();
        Self { shared }
    }

    /// Returns the other side's public key, which the handshake verified.
    pub fn remote_key(&self) -> PublicKey {
        self.shared.session.remote_key
    }

    /// Returns this side's key.
    pub fn local_key(&self) -> PublicKey {
        self.shared.session.local_key
    }

    /// Returns whether this side opened the connection.
    pub fn is_initiator(&self) -> bool {
        self.shared.session.is_initiator
    }

    /// Returns the handshake hash, which is the same on both sides and unique to this connection.
    pub fn handshake_hash(&self) -> &[u8; 64] {
        &self.shared.session.hash
    }

    /// Returns a secret that only the two sides of this connection know, for a purpose that both name alike.
    pub fn export(&self, purpose: &[u8]) -> [u8; 32] {
        let Session { is_initiator, tx, rx, hash, .. } = &self.shared.session;
        let key = if *is_initiator { tx } else { rx };
        keyed_hash(key, &[purpose, hash])
    }

    /// Sends one message, given in parts. Never waits; see [`SecretStream::room`] for backpressure.
    pub fn send(&self, parts: &[&[u8]]) -> Result<(), SendError> {
        self.send_framed(&[], parts)
    }

    /// Sends one message that starts with `head`.
    pub(crate) fn send_framed(&self, head: &[u8], parts: &[&[u8]]) -> Result<(), SendError> {
        self.shared.seal(&mut self.shared.sealing(), head, parts)
    }

    /// Waits until the send queue is short enough for more.
    pub async fn room(&self) -> Result<(), Closed> {
        self.shared.wire.room().await
    }

    /// Returns the next message, or `None` when the other side has ended the stream. Only one task may receive at a
    /// time.
    ///
    /// Cancel safe.
    pub async fn receive(&self) -> Result<Option<Bytes>, ReceiveError> {
        let mut opening = self.shared.opening.lock().await;
        loop {
            if let Some(message) = self.shared.open(&mut opening)? {
                return Ok(Some(message));
            }
            if opening.opener.is_next_too_long() {
                self.shared.wait_for_higher_limit(&mut opening).await?;
                continue;
            }
            // There is no await between the read and the feed, so a dropped future loses no bytes.
            match self.shared.wire.read().await? {
                Some(bytes) => self.shared.feed(&mut opening, &bytes)?,
                None if opening.opener.is_between_messages() => return Ok(None),
                None => return Err(ReceiveError::CutOff),
            }
        }
    }

    /// Waits for the other side's first frame, which only a participant of the handshake can send. Cancel safe.
    pub async fn opened(&self) -> Result<(), ReceiveError> {
        let mut opening = self.shared.opening.lock().await;
        while !self.shared.start(&mut opening)? {
            match self.shared.wire.read().await? {
                Some(bytes) => opening.opener.feed(&bytes),
                None => return Err(ReceiveError::CutOff),
            }
        }
        Ok(())
    }

    /// Sets how long a message of the other side may be while limits apply.
    pub fn allow_messages(&self, bytes_max: usize) {
        self.shared.message_bytes_max.store(bytes_max.min(MESSAGE_BYTES_MAX), Ordering::Relaxed);
        self.shared.limits_raised.notify_one();
    }

    /// Lifts the limits of this stream and of the stream below it, because the other side has proven who it is.
    pub fn lift_limits(&self) {
        let account = self.shared.account.lock().take();
        if let Some(account) = account {
            account.lift();
        }
        self.shared.sealing().sealer.set_small(false);
        self.allow_messages(MESSAGE_BYTES_MAX);
        if let Some(stream) = self.stream() {
            stream.lift_limits();
        }
    }

    /// Returns the next message if it has arrived already.
    pub(crate) fn try_receive(&self) -> Result<Option<Bytes>, ReceiveError> {
        match self.shared.opening.try_lock() {
            Ok(mut opening) => Ok(self.shared.open(&mut opening)?),
            Err(_) => Ok(None),
        }
    }

    /// Tells the other side that no more messages follow those sent so far.
    pub fn end(&self) {
        self.shared.wire.end();
    }

    /// Closes both directions at once. Undelivered data is lost.
    pub fn destroy(&self) {
        self.shared.wire.destroy();
    }

    /// Waits until both directions are closed.
    pub async fn closed(&self) {
        self.shared.wire.closed().await;
    }

    /// Returns the underlying stream, for its address and its statistics.
    pub fn stream(&self) -> Option<&udx::Stream> {
        match &self.shared.wire {
            Wire::Udx(stream) => Some(stream),
            #[cfg(test)]
            Wire::Memory(_) => None,
        }
    }
}

impl fmt::Debug for SecretStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SecretStream").field("remote_key", &self.remote_key()).finish_non_exhaustive()
    }
}

impl Shared {
    fn sealing(&self) -> MutexGuard<'_, Sealing> {
        self.sealing.lock()
    }

    /// Seals into the stream's queue under the lock, so that messages are queued in the order of their nonces.
    fn seal(&self, sealing: &mut Sealing, head: &[u8], parts: &[&[u8]]) -> Result<(), SendError> {
        sealing.sealer.seal(head, parts, &mut sealing.frames)?;
        sealing.last_sent = Instant::now();
        self.wire.write(sealing.frames.split().freeze()).map_err(|_| SendError::Closed)
    }

    fn start(&self, opening: &mut Opening) -> Result<bool, DecryptError> {
        if let Some(error) = opening.failed {
            return Err(error);
        }
        opening.opener.start_cipher().inspect_err(|error| {
            opening.failed = Some(*error);
            self.wire.destroy();
        })
    }

    fn open(&self, opening: &mut Opening) -> Result<Option<Bytes>, DecryptError> {
        if let Some(error) = opening.failed {
            return Err(error);
        }
        opening.opener.set_message_bytes_max(self.message_bytes_max.load(Ordering::Relaxed));
        let message = opening.opener.pop().inspect_err(|error| {
            opening.failed = Some(*error);
            self.wire.destroy();
        })?;
        Ok(message.map(|message| match &mut opening.held {
            Some(held) if message.len() > FREE_BYTES => held.give_to(message),
            _ => message,
        }))
    }

    /// Adds received bytes, unless the budget does not allow them.
    fn feed(&self, opening: &mut Opening, bytes: &[u8]) -> Result<(), ReceiveError> {
        let account = self.account.lock().clone();
        opening.opener.set_small(account.is_some());
        opening.opener.feed(bytes);
        let Some(account) = account else {
            opening.held = None;
            return Ok(());
        };
        let counted = opening.opener.buffered_bytes().saturating_sub(FREE_BYTES);
        if opening.held.get_or_insert_with(|| Held::none(&account)).set(counted) {
            return Ok(());
        }
        self.wire.destroy();
        Err(ReceiveError::TooMuch)
    }

    /// Waits until the next message, which is too long, may be longer. Cancel safe.
    async fn wait_for_higher_limit(&self, opening: &mut Opening) -> Result<(), ReceiveError> {
        let until = *opening.raised_until.get_or_insert_with(|| Instant::now() + RAISED_WITHIN);
        tokio::select! {
            () = self.limits_raised.notified() => {
                opening.raised_until = None;
                return Ok(());
            }
            () = self.wire.closed() => return Err(ReceiveError::CutOff),
            () = time::sleep_until(until) => {}
        }
        self.wire.destroy();
        Err(ReceiveError::TooMuch)
    }
}

fn account(limits: &MessageLimits, stream: Weak<Shared>) -> Arc<Account> {
    Account::new(limits.budget.clone(), move || {
        if let Some(stream) = stream.upgrade() {
            stream.wire.destroy();
        }
    })
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The underlying stream is also destroyed with its last handle, unless it was ended.
        self.stop.cancel();
    }
}

/// Sends an empty message after each silence, until the stream closes.
async fn keep_alive(shared: Weak<Shared>, stop: CancellationToken, silence: Duration) {
    loop {
        let due = {
            let Some(shared) = shared.upgrade() else { return };
            let mut sealing = shared.sealing();
            if sealing.last_sent.elapsed() >= silence && shared.seal(&mut sealing, &[], &[]).is_err() {
                return;
            }
            sealing.last_sent + silence
        };
        if stop.run_until_cancelled(time::sleep_until(due)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
