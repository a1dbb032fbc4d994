//! Fuzzing entry point: the channels of a connection whose peer sends arbitrary bytes.

use std::collections::VecDeque;

use bytes::Bytes;

use super::state::{Event, Key, Member, State};

#[derive(Debug, Clone)]
struct Nobody;

impl Member for Nobody {
    fn shut(&self) {}
}

/// Reads consecutive frames, each prefixed by its length in one byte, and responds to the requests in them.
pub fn play(script: &[u8]) {
    let key = |name: &str| Key { protocol: name.into(), id: Vec::new() };
    let mut state = State::new(16, 4096);
    // One channel waits for the peer from the start. The peer's script may open both names.
    assert!(state.open(key("a"), &[], Nobody).is_ok());
    let (mut rest, mut events) = (script, VecDeque::new());
    while let [length, more @ ..] = rest {
        let (frame, more) = more.split_at(more.len().min(usize::from(*length)));
        rest = more;
        let mut borne = state.receive(Bytes::copy_from_slice(frame));
        loop {
            state.swap_events(&mut events);
            for event in events.drain(..) {
                answer(&mut state, event, *length);
            }
            if borne.is_err() || state.is_crowded() || !state.has_unread() {
                break;
            }
            borne = state.read_on();
        }
        // A crowded connection is read no further until the pending channels are accepted or rejected. Here all of them
        // are.
        assert!(!state.is_crowded(), "what was asked for was answered");
        if borne.is_err() {
            break;
        }
    }
    state.shut_all();
    assert!(!state.is_crowded() && !state.has_unread());
}

/// Handles an event, in a way that depends on the frame's length.
fn answer(state: &mut State<Nobody>, event: Event<Nobody>, length: u8) {
    match event {
        Event::Asked(ask) if length.is_multiple_of(2) => drop(state.accept(&ask, b"hello", Nobody)),
        Event::Asked(ask) => drop(state.reject(&ask)),
        Event::Closed { .. } => drop(state.open(Key { protocol: "b".into(), id: Vec::new() }, &[], Nobody)),
        Event::Message { .. } if length.is_multiple_of(5) => drop(state.close(1)),
        _ => {}
    }
}
