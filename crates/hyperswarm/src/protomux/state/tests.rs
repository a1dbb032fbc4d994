use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

#[derive(Debug)]
struct Peer {
    name: u64,
    key: u8,
    is_open: Cell<bool>,
    local_id: Cell<u64>,
}

type Handle = Rc<Peer>;

impl Member for Handle {
    fn shut(&self) {
        self.is_open.set(false);
    }
}

fn member(name: u64) -> Handle {
    Rc::new(Peer { name, key: 0, is_open: Cell::new(true), local_id: Cell::new(0) })
}

fn key(protocol: &str, id: &[u8]) -> Key {
    Key { protocol: protocol.to_owned(), id: id.to_owned() }
}

fn bytes(hex: &str) -> Bytes {
    hex::decode(hex).unwrap().into()
}

/// Returns the events as text.
fn happened(state: &mut State<Handle>) -> Vec<String> {
    let mut events = VecDeque::new();
    state.swap_events(&mut events);
    let word = |event: Event<Handle>| match event {
        Event::Message { member, kind, payload } => format!("{} got {kind} {}", member.name, hex::encode(payload)),
        Event::Opened { member, handshake } => format!("{} opened {}", member.name, hex::encode(handshake)),
        Event::Closed { member } => format!("{} closed", member.name),
        Event::Asked(ask) => format!("asked for {} {}", ask.key.protocol, hex::encode(&ask.key.id)),
        Event::Send(message) => format!("send {}", hex::encode(message)),
    };
    events.into_iter().map(word).collect()
}

fn asked(state: &mut State<Handle>) -> Ask {
    let mut events = VecDeque::new();
    state.swap_events(&mut events);
    match events.pop_front() {
        Some(Event::Asked(ask)) => ask,
        other => panic!("{other:?}"),
    }
}

// protomux 3.12 sent the following bytes.
const NODE_OPEN: &str = "0001010463686174020102026869";
const NODE_BATCH: &str = "00000105000374776f0401fd2c010000090102056f74686572000002020078000002030200010600046c617374";
const NODE_CLOSE: &str = "000301";
const NODE_REJECT: &str = "000201";

#[test]
fn control_messages_are_those_of_the_node_package() {
    let mut state = State::new(8, 1000);
    let announced = state.open(key("chat", &[1, 2]), b"\x02hi", member(1)).unwrap();
    assert_eq!(announced.local_id, 1);
    assert_eq!(format!("00{}", hex::encode(announced.message)), NODE_OPEN);
    assert_eq!(format!("00{}", hex::encode(state.close(1).unwrap())), NODE_CLOSE);
    let mut other = State::<Handle>::new(8, 1000);
    other.receive(bytes(NODE_OPEN)).unwrap();
    let ask = asked(&mut other);
    assert_eq!(format!("00{}", hex::encode(other.reject(&ask).unwrap())), NODE_REJECT);
}

#[test]
fn batches_of_the_node_package_are_read() {
    let mut state = State::new(8, 1000);
    state.open(key("chat", &[1, 2]), b"", member(1)).unwrap();
    state.open(key("other", &[]), b"", member(2)).unwrap();
    for message in [NODE_OPEN, "0100036f6e65", NODE_BATCH, NODE_CLOSE] {
        state.receive(bytes(message)).unwrap();
    }
    assert_eq!(
        happened(&mut state),
        [
            "1 opened 026869",
            "1 got 0 036f6e65",
            "1 got 0 0374776f",
            "1 got 1 fd2c01",
            "2 opened ",
            "2 got 0 78",
            "2 closed",
            "1 got 0 046c617374",
            "1 closed",
        ]
    );
}

#[test]
fn messages_before_the_answer_wait_for_it() {
    let mut state = State::new(8, 1000);
    state.receive(bytes(NODE_OPEN)).unwrap();
    state.receive(bytes("01000a")).unwrap();
    state.receive(bytes("01010b")).unwrap();
    let ask = asked(&mut state);
    assert!(state.pending_bytes > 0);
    assert_eq!(happened(&mut state), Vec::<String>::new());
    let announced = state.accept(&ask, b"", member(1)).unwrap().unwrap();
    assert_eq!(hex::encode(announced.message), "01010463686174020102");
    assert_eq!(happened(&mut state), ["1 opened 026869", "1 got 0 0a", "1 got 1 0b"]);
    assert_eq!(state.pending_bytes, 0);
    assert!(state.accept(&ask, b"", member(2)).is_none(), "it is accepted once");
}

#[test]
fn opening_answers_what_the_peer_asked_for() {
    let mut state = State::new(8, 1000);
    state.receive(bytes(NODE_OPEN)).unwrap();
    let ask = asked(&mut state);
    state.open(key("chat", &[1, 2]), b"", member(1)).unwrap();
    assert_eq!(happened(&mut state), ["1 opened 026869"]);
    assert!(state.accept(&ask, b"", member(2)).is_none());
    assert_eq!(state.reject(&ask), None);
}

#[test]
fn one_channel_of_a_name_can_be_opened() {
    let mut state = State::new(2, 1000);
    state.open(key("chat", &[]), b"", member(1)).unwrap();
    assert_eq!(state.open(key("chat", &[]), b"", member(2)).unwrap_err(), Refusal::Duplicate);
    state.open(key("chat", &[1]), b"", member(3)).unwrap();
    assert_eq!(state.open(key("chat", &[2]), b"", member(4)).unwrap_err(), Refusal::TooMany);
}

#[test]
fn an_id_is_free_when_both_sides_know() {
    let mut state = State::new(8, 1000);
    state.open(key("chat", &[1, 2]), b"", member(1)).unwrap();
    state.close(1).unwrap();
    assert_eq!(state.open(key("b", &[]), b"", member(2)).unwrap().local_id, 2, "the peer may be answering the first");
    // The peer's answer to the closed channel frees its id, and is delivered to nobody.
    state.receive(bytes(NODE_OPEN)).unwrap();
    state.receive(bytes("01000a")).unwrap();
    assert_eq!(happened(&mut state), Vec::<String>::new());
    assert_eq!(state.open(key("c", &[]), b"", member(3)).unwrap().local_id, 1);
    // A rejection frees the id too.
    state.receive(bytes("000202")).unwrap();
    assert_eq!(happened(&mut state), ["2 closed"]);
    assert_eq!(state.open(key("d", &[]), b"", member(4)).unwrap().local_id, 2);
}

#[test]
fn a_peer_that_closes_unanswered_learns_that_its_id_is_free() {
    let mut state = State::new(8, 1000);
    state.receive(bytes(NODE_OPEN)).unwrap();
    let ask = asked(&mut state);
    state.receive(bytes(NODE_CLOSE)).unwrap();
    assert_eq!(happened(&mut state), ["send 0201"]);
    assert!(state.accept(&ask, b"", member(1)).is_none());
    assert_eq!(state.pending_bytes, 0);
    state.receive(bytes(NODE_OPEN)).unwrap();
    assert!(state.accept(&ask, b"", member(1)).is_none(), "the next one of the same id is another");
}

#[test]
fn ids_that_are_not_free_are_violations() {
    let open = |id: u8| Bytes::from(vec![0, 1, id, 1, b'a', 0]);
    let mut state = State::<Handle>::new(8, 1000);
    assert_eq!(state.receive(open(2)), Err(Violation::InvalidOpen), "ids grow by one");
    assert_eq!(state.receive(open(0)), Err(Violation::InvalidOpen), "the control channel is there");
    state.receive(open(1)).unwrap();
    assert_eq!(state.receive(open(1)), Err(Violation::InvalidOpen), "it is taken");
    assert_eq!(state.receive(bytes("000201")), Err(Violation::InvalidReject), "nothing was opened here");
}

#[test]
fn a_batch_in_a_batch_is_a_violation() {
    let mut state = State::<Handle>::new(8, 1000);
    assert_eq!(state.receive(bytes("000000020001")), Err(Violation::NestedBatch));
}

#[test]
fn a_batch_of_countless_items_is_read_in_portions() {
    let mut state = State::new(8, 1000);
    state.open(key("chat", &[1, 2]), b"", member(1)).unwrap();
    state.receive(bytes(NODE_OPEN)).unwrap();
    assert_eq!(happened(&mut state).len(), 1);
    let mut batch = vec![0, 0, 1];
    batch.extend([1, 7].repeat(100_000));
    state.receive(batch.into()).unwrap();
    let mut read = 0;
    loop {
        let portion = happened(&mut state).len();
        assert!(portion <= EVENTS_MAX);
        read += portion;
        if !state.has_unread() {
            break;
        }
        state.read_on().unwrap();
    }
    assert_eq!(read, 100_000);
}

#[test]
fn a_batch_waits_while_too_much_is_pending() {
    let mut state = State::new(8, 1000);
    state.receive(bytes(NODE_OPEN)).unwrap();
    let ask = asked(&mut state);
    let mut batch = vec![0, 0, 1];
    batch.extend([1, 7].repeat(100));
    state.receive(batch.into()).unwrap();
    assert!(state.is_crowded() && state.has_unread());
    assert!(state.pending_bytes < 2000);
    state.accept(&ask, b"", member(1)).unwrap().unwrap();
    let mut read = happened(&mut state).len();
    state.read_on().unwrap();
    read += happened(&mut state).len();
    assert_eq!(read, 101);
    assert!(!state.is_crowded() && !state.has_unread());
}

#[test]
fn asking_for_too_much_is_rejected() {
    let mut state = State::<Handle>::new(2, 1000);
    for id in 1..=3 {
        state.receive(Bytes::from(vec![0, 1, id, 1, b'a', 1, id])).unwrap();
    }
    assert_eq!(happened(&mut state), ["asked for a 01", "asked for a 02", "send 0203"]);
    let mut long = vec![0, 1, 3, 0xfd, 0x01, 0x10];
    long.resize(6 + 0x1001 + 1, b'a');
    *long.last_mut().unwrap() = 0;
    state.receive(long.into()).unwrap();
    assert_eq!(happened(&mut state), ["send 0203"]);
}

#[test]
fn unknown_control_messages_and_empty_ones_are_ignored() {
    let mut state = State::<Handle>::new(2, 1000);
    state.receive(Bytes::new()).unwrap();
    state.receive(bytes("0009ffff")).unwrap();
    state.receive(bytes("0500ff")).unwrap();
    assert_eq!(happened(&mut state), Vec::<String>::new());
}

/// One side of an in-memory connection.
struct Side {
    state: State<Handle>,
    open: Vec<Handle>,
    asks: Vec<Ask>,
    outbox: VecDeque<Vec<u8>>,
}

/// A step that a test performs on one side.
#[derive(Debug, Clone)]
enum Step {
    Open(u8),
    Close(usize),
    Send(usize),
    Answer(usize, bool),
    Deliver,
}

fn step() -> impl Strategy<Value = (bool, Step)> {
    let step = prop_oneof![
        3 => (0_u8..3).prop_map(Step::Open),
        2 => (0_usize..8).prop_map(Step::Close),
        3 => (0_usize..8).prop_map(Step::Send),
        2 => (0_usize..8, any::<bool>()).prop_map(|(nth, accepts)| Step::Answer(nth, accepts)),
        6 => Just(Step::Deliver),
    ];
    (any::<bool>(), step)
}

impl Side {
    fn new() -> Self {
        Self { state: State::new(16, usize::MAX), open: Vec::new(), asks: Vec::new(), outbox: VecDeque::new() }
    }

    fn control(&mut self, message: &[u8]) {
        self.outbox.push_back([&[0], message].concat());
    }

    fn begin(&mut self, name: u64, key: u8, announce: impl FnOnce(&mut State<Handle>, Handle) -> Option<Announced>) {
        let peer = Rc::new(Peer { name, key, is_open: Cell::new(true), local_id: Cell::new(0) });
        if let Some(announced) = announce(&mut self.state, Rc::clone(&peer)) {
            peer.local_id.set(announced.local_id);
            self.control(&announced.message);
            self.open.push(peer);
        }
    }

    fn close(&mut self, nth: usize) {
        let peer = self.open.swap_remove(nth);
        peer.shut();
        let message = self.state.close(peer.local_id.get()).unwrap();
        self.control(&message);
    }

    /// Handles the events. Returns the messages, each with its receiver.
    fn settle(&mut self) -> Vec<(Handle, Bytes)> {
        let mut events = VecDeque::new();
        self.state.swap_events(&mut events);
        let mut messages = Vec::new();
        for event in events {
            match event {
                Event::Message { member, payload, .. } => messages.push((member, payload)),
                Event::Asked(ask) => self.asks.push(ask),
                Event::Send(message) => self.control(&message),
                Event::Opened { .. } | Event::Closed { .. } => {}
            }
        }
        self.open.retain(|peer| peer.is_open.get());
        messages
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever two sides do, and however late they learn of it, no message goes astray and no id is lost.
    #[test]
    fn two_sides_never_disagree(steps in proptest::collection::vec(step(), 0..200)) {
        let mut sides = [Side::new(), Side::new()];
        let mut names = 0;
        // Which channel of one side is paired with which channel of the other.
        let mut partners: HashMap<u64, u64> = HashMap::new();
        let all_closed = std::iter::repeat_n([(false, Step::Close(0)), (true, Step::Close(0))], 16).flatten();
        let refused = std::iter::repeat_n([(false, Step::Answer(0, false)), (true, Step::Answer(0, false))], 64).flatten();
        let delivered = std::iter::repeat_n([(false, Step::Deliver), (true, Step::Deliver)], 600).flatten();
        let ending = delivered.clone().chain(refused).chain(delivered.clone()).chain(all_closed).chain(delivered);
        for (is_second, step) in steps.into_iter().chain(ending) {
            let [first, second] = &mut sides;
            let (side, other) = if is_second { (second, first) } else { (first, second) };
            names += 1;
            match step {
                Step::Open(id) => side.begin(names, id, |state, peer| state.open(key("p", &[id]), b"", peer).ok()),
                Step::Close(nth) if nth < side.open.len() => side.close(nth),
                Step::Send(nth) if nth < side.open.len() => {
                    let peer = &side.open[nth];
                    let mut message = vec![peer.local_id.get() as u8, 0, peer.key];
                    message.extend_from_slice(&peer.name.to_le_bytes());
                    side.outbox.push_back(message);
                }
                Step::Answer(nth, accepts) if nth < side.asks.len() => {
                    let ask = side.asks.swap_remove(nth);
                    if accepts {
                        let accept = |state: &mut State<Handle>, peer| state.accept(&ask, b"", peer)?.ok();
                        side.begin(names, ask.key.id[0], accept);
                    } else if let Some(message) = side.state.reject(&ask) {
                        side.control(&message);
                    }
                }
                Step::Deliver => {
                    if let Some(message) = other.outbox.pop_front() {
                        prop_assert_eq!(side.state.receive(message.into()), Ok(()));
                    }
                }
                _ => {}
            }
            for (peer, payload) in side.settle() {
                let sender = u64::from_le_bytes(payload[1..].try_into().unwrap());
                prop_assert_eq!(payload[0], peer.key);
                prop_assert_eq!(*partners.entry(peer.name).or_insert(sender), sender);
                prop_assert_eq!(*partners.entry(sender).or_insert(peer.name), peer.name);
            }
        }
        for side in &sides {
            prop_assert!(side.open.is_empty() && side.outbox.is_empty());
            prop_assert_eq!(side.state.free.len(), side.state.local.len());
            prop_assert!(side.state.remote.iter().all(|remote| matches!(remote, Remote::Free)));
            prop_assert!(side.state.groups.is_empty());
            prop_assert_eq!((side.state.asked, side.state.pending_bytes), (0, 0));
        }
    }

    #[test]
    fn foreign_bytes_never_panic(messages: Vec<Vec<u8>>) {
        let mut state = State::new(4, 1000);
        state.open(key("a", &[]), b"", member(1)).unwrap();
        for message in messages {
            if state.receive(message.into()).is_err() { break }
        }
    }

    #[test]
    fn foreign_control_messages_never_panic(
        messages in proptest::collection::vec((0_u8..4, proptest::collection::vec(0_u8..6, 0..12)), 0..20),
    ) {
        let mut state = State::new(4, 1000);
        state.open(key("a", &[]), b"", member(1)).unwrap();
        for (kind, rest) in messages {
            let _ = state.receive([&[0, kind], &rest[..]].concat().into());
        }
    }
}
