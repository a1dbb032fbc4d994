//! The task that reads a connection and dispatches its messages.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::timeout;
use tracing::debug;

use super::channel::{Link, Responder};
use super::inbox::Delivery;
use super::pairing::Incoming;
use super::state::{Ask, Event, Key, Violation};
use super::{Reading, Shared};
use crate::secret_stream::ReceiveError;

/// Why reading ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("this side closed the connection")]
    Stopped,
    #[error("the peer ended the connection")]
    Ended,
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error("a message is not one of its channel's protocol")]
    InvalidMessage,
    #[error("the peer asks for more and takes no answers")]
    Stalled,
}

/// Reads until the connection ends, then closes the open channels.
pub(super) async fn run(shared: Arc<Shared>) {
    let end = match read(&shared).await {
        Ok(never) => match never {},
        Err(end) => end,
    };
    debug!(reason = %end, "connection ends");
    // No channel can be opened from here on.
    shared.stop.cancel();
    let mut events = VecDeque::new();
    {
        let mut state = shared.state();
        state.shut_all();
        state.swap_events(&mut events);
    }
    for event in events {
        if let Event::Closed { member } = event {
            member.inbox().shut();
        }
    }
    shared.pairings().clear();
    if matches!(end, End::Stopped | End::Ended) {
        shared.stream.end();
        // Further messages of the peer are discarded, but its end is awaited.
        let ended = async { while let Ok(Some(_)) = shared.stream.receive().await {} };
        let _ = timeout(shared.options.linger, async {
            ended.await;
            shared.stream.closed().await;
        })
        .await;
    }
    shared.stream.destroy();
}

async fn read(shared: &Arc<Shared>) -> Result<std::convert::Infallible, End> {
    let mut events = VecDeque::new();
    let mut message = None;
    loop {
        let reading = shared.take_events(message.take(), &mut events)?;
        if events.is_empty() {
            message = match reading {
                Reading::Continues => next(shared).await?,
                Reading::Unfinished => None,
                Reading::Waits => room_for_pending(shared).await?,
            };
            continue;
        }
        let mut answered = false;
        for event in events.drain(..) {
            answered |= act(shared, event).await?;
        }
        if answered {
            // A peer that does not read the responses gets no more of them.
            wait(shared, async { timeout(shared.options.stall, shared.stream.room()).await })
                .await?
                .map_err(|_| End::Stalled)?
                .ok();
        }
        if reading == Reading::Continues {
            message = shared.stream.try_receive()?;
        }
    }
}

/// Waits for the next message, or for events that other tasks caused.
async fn next(shared: &Shared) -> Result<Option<Bytes>, End> {
    tokio::select! {
        biased;
        () = shared.stop.cancelled() => Err(End::Stopped),
        () = shared.wake.notified() => Ok(None),
        message = shared.stream.receive() => message?.map(Some).ok_or(End::Ended),
    }
}

/// Waits until a pending channel is accepted or rejected.
async fn room_for_pending(shared: &Arc<Shared>) -> Result<Option<Bytes>, End> {
    wait(shared, shared.wake.notified()).await.map(|()| None)
}

/// Handles an event. Returns whether something was sent.
async fn act(shared: &Arc<Shared>, event: Event<Arc<Link>>) -> Result<bool, End> {
    match event {
        Event::Message { member, kind, payload } => return deliver(shared, &member, kind, payload).await,
        Event::Opened { member, handshake } => member.opened(handshake),
        Event::Closed { member } => member.inbox().shut(),
        Event::Asked(ask) => return Ok(ask_for(shared, ask)),
        Event::Send(message) => {
            // The next read notices a closed connection.
            let _ = shared.outgoing.control(&message);
            return Ok(true);
        }
    }
    Ok(false)
}

async fn deliver(shared: &Arc<Shared>, link: &Arc<Link>, kind: u64, mut payload: Bytes) -> Result<bool, End> {
    loop {
        let responder = Responder { shared, link };
        match link.inbox().deliver(responder, kind, payload) {
            Delivery::Taken => return Ok(false),
            Delivery::Answered => return Ok(true),
            Delivery::Overflow => {
                debug!("a channel's consumer did not keep up");
                shared.close(link);
                return Ok(true);
            }
            Delivery::Invalid => return Err(End::InvalidMessage),
            Delivery::Full(returned) => {
                payload = returned;
                wait(shared, link.inbox().room()).await?;
            }
        }
    }
}

/// Passes a channel of the peer to the pairing of its protocol. Returns whether it was rejected instead.
fn ask_for(shared: &Arc<Shared>, ask: Ask) -> bool {
    let Some(handle) = shared.handle.upgrade() else { return false };
    let sender = {
        let pairings = shared.pairings();
        let any = Key { protocol: ask.key.protocol.clone(), id: Vec::new() };
        pairings.get(&*ask.key).or_else(|| pairings.get(&any)).cloned()
    };
    let incoming = Incoming::new(handle, ask);
    // Dropped, and so rejected, if there is no pairing for it.
    match sender {
        Some(sender) => sender.try_send(incoming).is_err(),
        None => true,
    }
}

/// Waits for a future unless the connection ends first.
async fn wait<T>(shared: &Arc<Shared>, something: impl Future<Output = T>) -> Result<T, End> {
    tokio::select! {
        () = shared.stop.cancelled() => Err(End::Stopped),
        () = shared.stream.closed() => Err(End::Ended),
        result = something => Ok(result),
    }
}
