//! What goes wrong in a simulated network: drawn from the seed, each fault with its end.

use std::fmt;
use std::time::Duration;

use fastrand::Rng;

use crate::faulty_store;
use crate::network::{Network, Node};

/// Something that goes wrong for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A node ends without warning, and starts again.
    Crash(Node),
    /// Two nodes do not reach each other.
    Cut(Node, Node),
    /// Messages between two nodes wait.
    Hold(Node, Node),
    /// Messages between two nodes are lost, and in the end their connections break.
    Lose(Node, Node),
    /// A node stands still, as far as others can tell.
    Freeze(Node),
    /// Messages to and from a node take long.
    Slow(Node, Duration),
    /// A worker's engine stands still while the worker reports.
    Hang(u8),
    /// Generations of a worker break off after some tokens.
    Break(u8, u32, u32),
    /// Somebody uses a worker's machine, so the worker pauses.
    Occupy(u8),
    /// A worker's clock is wrong by milliseconds.
    Skew(u8, i64),
    /// An orchestrator's disk fails.
    Disk(u8, faulty_store::Trouble),
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

impl Fault {
    /// Draws a fault of a network of these nodes, some of which are clients.
    pub fn random(nodes: &[Node], random: &mut Rng) -> Self {
        let of = |wanted: fn(&Node) -> bool, random: &mut Rng| {
            let some: Vec<Node> = nodes.iter().copied().filter(wanted).collect();
            some[random.usize(..some.len())]
        };
        let any = |random: &mut Rng| of(|node| !matches!(node, Node::Client(_)), random);
        let worker = |random: &mut Rng| match of(|node| matches!(node, Node::Worker(_)), random) {
            Node::Worker(number) => number,
            _ => 0,
        };
        let orchestrator = |random: &mut Rng| match of(|node| matches!(node, Node::Orchestrator(_)), random) {
            Node::Orchestrator(number) => number,
            _ => 0,
        };
        match random.u8(..15) {
            0..=2 => Self::Crash(Node::Worker(worker(random))),
            3 => Self::Crash(of(|node| !matches!(node, Node::Client(_) | Node::Worker(_)), random)),
            4 => Self::Cut(any(random), any(random)),
            5 => Self::Hold(any(random), any(random)),
            6 => Self::Freeze(any(random)),
            7 => Self::Slow(any(random), Duration::from_millis(random.u64(5..400))),
            8 => Self::Hang(worker(random)),
            9 => Self::Break(worker(random), random.u32(1..4), random.u32(0..20)),
            10 => Self::Skew(worker(random), random.i64(-120_000..120_000)),
            11 => Self::Lose(any(random), any(random)),
            12 => Self::Occupy(worker(random)),
            13 => {
                let client = of(|node| matches!(node, Node::Client(_)), random);
                let gateway = of(|node| matches!(node, Node::Gateway(_)), random);
                [Self::Cut, Self::Hold, Self::Lose][random.usize(..3)](gateway, client)
            }
            _ => {
                let troubles =
                    [faulty_store::Trouble::Overloaded, faulty_store::Trouble::Full, faulty_store::Trouble::Lying];
                Self::Disk(orchestrator(random), troubles[random.usize(..troubles.len())])
            }
        }
    }

    pub fn begin(&self, network: &mut Network) {
        match *self {
            Self::Crash(node) => network.crash(node),
            Self::Cut(one, other) => network.links.cut(one.public_key(), other.public_key()),
            Self::Hold(one, other) => network.links.hold(one.public_key(), other.public_key()),
            Self::Lose(one, other) => network.links.lose(one.public_key(), other.public_key()),
            Self::Freeze(node) => {
                for other in network.nodes() {
                    network.links.hold(node.public_key(), other.public_key());
                }
                if let Node::Worker(number) = node {
                    network.troubles[usize::from(number)].freeze(true);
                }
            }
            Self::Slow(node, delay) => network.links.slow(node.public_key(), delay),
            Self::Hang(worker) => network.troubles[usize::from(worker)].freeze(true),
            Self::Break(worker, generations, after) => {
                network.troubles[usize::from(worker)].break_next(generations, after);
            }
            Self::Occupy(worker) => network.owners[usize::from(worker)].use_machine(true),
            Self::Skew(worker, skew_ms) => network.skew(worker, skew_ms),
            Self::Disk(orchestrator, trouble) => network.disks[usize::from(orchestrator)].set(trouble),
        }
    }

    pub fn end(&self, network: &mut Network) {
        match *self {
            Self::Crash(node) => network.restart(node),
            Self::Cut(one, other) | Self::Hold(one, other) => {
                network.links.heal(one.public_key(), other.public_key());
            }
            Self::Lose(one, other) => network.links.give_up(one.public_key(), other.public_key()),
            Self::Freeze(node) => {
                for other in network.nodes() {
                    network.links.heal(node.public_key(), other.public_key());
                }
                if let Node::Worker(number) = node {
                    network.troubles[usize::from(number)].freeze(false);
                }
            }
            Self::Slow(node, _) => network.links.speed_up(node.public_key()),
            Self::Hang(worker) => network.troubles[usize::from(worker)].freeze(false),
            Self::Break(..) => {}
            Self::Occupy(worker) => network.owners[usize::from(worker)].use_machine(false),
            Self::Skew(worker, _) => network.skew(worker, 0),
            Self::Disk(orchestrator, _) => {
                network.disks[usize::from(orchestrator)].set(faulty_store::Trouble::None);
            }
        }
    }

    /// Returns whether two faults concern the same thing, so that the end of one would end the other.
    pub fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Crash(one), Self::Crash(other)) => one == other,
            (Self::Disk(one, _), Self::Disk(other, _)) => one == other,
            _ => false,
        }
    }
}
