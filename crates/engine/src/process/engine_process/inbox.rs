//! Handles the messages of an engine process, frame by frame.

use tokio::sync::mpsc;

use super::{Ending, EngineProcess, Item, Loading};
use crate::model_runtime::{EngineError, Event, RuntimeInfo};
use crate::process::frame::{Reply, ToParent};
use crate::process::pipe::FrameReader;

/// Receives the frames of a process.
pub(super) struct Inbox<'a> {
    pub(super) process: &'a EngineProcess,
    pub(super) loading: Option<Loading>,
    pub(super) info: Option<RuntimeInfo>,
}

impl Inbox<'_> {
    /// Handles frames until there are no more, and returns the reason.
    pub(super) async fn read(&mut self, mut frames: FrameReader) -> Ending {
        loop {
            match frames.next().await {
                Ok(Some(message)) => {
                    if let Err(nonsense) = self.take(message) {
                        return Ending::Fault(nonsense);
                    }
                }
                Ok(None) => return Ending::Closed,
                Err(error) => return Ending::Fault(error.to_string()),
            }
        }
    }

    fn take(&mut self, message: ToParent) -> Result<(), String> {
        {
            let mut state = self.process.state();
            state.heard += 1;
            state.expects_reply = false;
        }
        match message {
            ToParent::Hello { info, .. } => self.info = Some(info),
            ToParent::Progress { share } => {
                if let Some(loading) = &self.loading {
                    (loading.progress)(share);
                }
            }
            ToParent::Loaded { model, state } => {
                self.process.state().snapshot = Some(state);
                let info = self.info.clone().ok_or("it loaded before it said hello")?;
                if let Some(Loading { loaded, .. }) = self.loading.take() {
                    let _ = loaded.send(Ok((model, info)));
                }
            }
            ToParent::NotLoaded { error } => {
                if let Some(Loading { loaded, .. }) = self.loading.take() {
                    let _ = loaded.send(Err(error));
                }
            }
            ToParent::State { state } => self.process.state().snapshot = Some(state),
            ToParent::Reply { id, reply } => self.reply(id, reply),
            ToParent::Accepted { id } => {
                if let Some(generation) = self.process.state().generations.get_mut(&id)
                    && let Some(admitted) = generation.admitted.take()
                {
                    let _ = admitted.send(Ok(()));
                }
            }
            ToParent::Refused { id, error } => {
                let generation = self.process.state().generations.remove(&id);
                if let Some(admitted) = generation.and_then(|generation| generation.admitted) {
                    let _ = admitted.send(Err(error));
                }
            }
            ToParent::Event { id, event } => return self.hand(id, Ok(event)),
            ToParent::Failed { id, error } => return self.hand(id, Err(error)),
        }
        Ok(())
    }

    fn reply(&self, id: u64, reply: Result<Reply, EngineError>) {
        let asker = self.process.state().queries.remove(&id);
        let unheard = match asker {
            Some(asker) => asker.send(reply).err(),
            None => Some(reply),
        };
        // If the caller is gone, nobody knows the adapter's id, so nobody else would free it.
        if let Some(Ok(Reply::Adapter(adapter))) = unheard {
            self.process.forget_adapter(adapter);
        }
    }

    fn hand(&self, id: u64, item: Item) -> Result<(), String> {
        let end = item.as_ref().map_or(true, Event::is_last);
        let mut state = self.process.state();
        // Events of a cancelled generation may still be in flight.
        let Some(generation) = state.generations.get_mut(&id) else { return Ok(()) };
        generation.unacknowledged += 1;
        generation.started |= matches!(item, Ok(Event::Started { .. }));
        if let Err(mpsc::error::TrySendError::Full(_)) = generation.events.try_send(item) {
            return Err("it sent more events than it had credit for".into());
        }
        if end {
            state.generations.remove(&id);
        }
        Ok(())
    }
}
