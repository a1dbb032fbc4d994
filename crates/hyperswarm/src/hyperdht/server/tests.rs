//! A flood of handshakes at a server and at its relay, in simulated time.

use std::collections::VecDeque;

use super::*;
use crate::crypto::noise::Initiator;
use crate::hyperdht::handshake::{Handshake, Mode};
use crate::hyperdht::router::{Decision, Origin, Router, Target};

const TARGET: Target = [1; 32];
const SERVER: &str = "10.0.0.1:1";
const RELAY: &str = "10.0.0.2:1";

/// How many handshakes the server's task gets through in a millisecond. One that opens costs half of that.
const PER_MILLISECOND: usize = 2;

fn address(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

/// A relay, a server that announced itself to it, and the server's task.
struct Simulation {
    now: Instant,
    relay: Router,
    server: Router,
    inbox: VecDeque<Vec<u8>>,
    answers: ResponseCache,
    key_pair: KeyPair,
    answered: Vec<Vec<u8>>,
}

impl Simulation {
    fn new() -> Self {
        let now = Instant::now();
        let (mut relay, mut server) = (Router::default(), Router::default());
        relay.learn(TARGET, address(SERVER), Bytes::new(), now);
        assert!(server.add_server(TARGET, Bytes::new()));
        let key_pair = KeyPair::from_seed(&[1; 32]);
        let (inbox, answers, answered) = (VecDeque::new(), ResponseCache::default(), Vec::new());
        Self { now, relay, server, inbox, answers, key_pair, answered }
    }

    /// Returns a message that opens.
    fn honest(&self, number: u16) -> Vec<u8> {
        let mut seed = [2; 32];
        seed[..2].copy_from_slice(&number.to_le_bytes());
        let prologue = namespace("hyperswarm/dht", 0);
        let client = KeyPair::from_seed(&seed);
        let (key, ephemeral) = (self.key_pair.public_key(), KeyPair::from_seed(&seed));
        Initiator::with_ephemeral(&client, key, &prologue, ephemeral).unwrap().send(b"payload").unwrap()
    }

    fn send_to_server(&mut self, mode: Mode, noise: &[u8], client: Option<SocketAddrV4>, from: SocketAddrV4) {
        let value = Handshake { mode, noise, peer_address: client, relay_address: None }.encode();
        let decision = self.server.on_handshake(&TARGET, &value, Origin { from, tid: 7 }, self.now);
        if let Decision::Serve { noise, .. } = decision
            && self.inbox.len() < INBOX_MAX
        {
            self.inbox.push_back(noise.to_vec());
        }
    }

    fn send_to_relay(&mut self, noise: &[u8], from: SocketAddrV4) {
        let value = Handshake { mode: Mode::FromClient, noise, peer_address: None, relay_address: None }.encode();
        let decision = self.relay.on_handshake(&TARGET, &value, Origin { from, tid: 7 }, self.now);
        if let Decision::Forward { value, to } = decision {
            assert_eq!(to, address(SERVER));
            let forwarded = Handshake::decode(&value).unwrap();
            self.send_to_server(forwarded.mode, forwarded.noise, forwarded.peer_address, address(RELAY));
        }
    }

    /// Lets the server's task work for a millisecond.
    fn pass_millisecond(&mut self) {
        let Self { answers, key_pair, .. } = self;
        for noise in self.inbox.drain(..self.inbox.len().min(PER_MILLISECOND)) {
            let make = || {
                Responder::new(key_pair, &namespace("hyperswarm/dht", 0)).receive(&noise).ok()?;
                Some((Bytes::from_static(b"answer"), Some(())))
            };
            if answers.get_or_make(&noise, self.now, make).is_some() {
                self.answered.push(noise);
            }
        }
        self.now += Duration::from_millis(1);
    }
}

#[test]
fn honest_handshakes_through_a_relay_succeed_while_garbage_floods_it_and_the_server() {
    let mut simulation = Simulation::new();
    let (at_server, at_relay) = (address("10.0.1.1:1"), address("10.0.1.2:1"));
    let mut honest = Vec::new();
    for millisecond in 0..20_000_u32 {
        // Four thousand datagrams a second from one host to the server. They claim to come from this host, from an
        // honest client, and from a client that differs each time.
        for part in 0..4_u32 {
            let garbage = [millisecond.to_le_bytes(), part.to_le_bytes()].concat();
            let client = match part {
                0 => address("127.0.0.1:1"),
                1 => address("10.0.2.7:1"),
                _ => SocketAddrV4::new((0x0b00_0000 + millisecond * 4 + part).into(), 1),
            };
            simulation.send_to_server(Mode::FromRelay, &garbage, Some(client), at_server);
        }
        // A thousand a second from another one to the relay, which passes on what it allows.
        simulation.send_to_relay(&millisecond.to_be_bytes(), at_relay);
        // Ten honest clients, each of which connects once a second. They send up to four copies, one a second.
        if millisecond % 100 == 50 && millisecond < 16_000 {
            let number = millisecond / 100;
            let from = SocketAddrV4::new([10, 0, 2, number as u8 % 10].into(), 1);
            honest.push((millisecond, simulation.honest(number as u16), from));
        }
        for (begun, noise, from) in &honest {
            let age = millisecond - begun;
            if age % 1_000 == 0 && age < 4_000 && !simulation.answered.contains(noise) {
                simulation.send_to_relay(noise, *from);
            }
        }
        simulation.pass_millisecond();
    }
    let lost = honest.iter().filter(|(_, noise, _)| !simulation.answered.contains(noise)).count();
    assert_eq!(lost, 0, "of {}", honest.len());
    assert_eq!(simulation.answered.len(), honest.len());
}

#[tokio::test]
async fn a_host_that_never_sends_on_its_streams_is_sent_to_on_few_of_them() {
    let (udx, any) = (udx::Udx::new(), SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
    let (socket, _datagrams) = udx.bind(any).unwrap();
    let half_open = |host: [u8; 4]| HalfOpen {
        stream: udx.stream(udx::StreamOptions::default()),
        remote_id: 1,
        session: Session {
            is_initiator: false,
            local_key: PublicKey([1; 32]),
            remote_key: PublicKey([2; 32]),
            tx: [1; 32],
            rx: [2; 32],
            hash: [3; 64],
        },
        path: Some((socket.clone(), SocketAddrV4::new(host.into(), 1))),
    };
    let mut waiting: Vec<HalfOpen> = Vec::new();
    for number in 0..200 {
        let mut next = half_open(if number % 2 == 0 { [10, 0, 0, 1] } else { [127, 0, 0, 1] });
        next.send_first_within_limit(waiting.iter().filter_map(HalfOpen::host));
        waiting.push(next);
    }
    let sent_to = |host: [u8; 4]| waiting.iter().filter(|one| one.host() == Some(host.into())).count();
    assert_eq!((sent_to([10, 0, 0, 1]), sent_to([127, 0, 0, 1])), (SENT_FIRST_MAX, 100));
}
