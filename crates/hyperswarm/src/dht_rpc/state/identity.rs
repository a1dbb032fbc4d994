//! What others see of this node, and whether it lasts.

use std::net::{Ipv4Addr, SocketAddrV4};

use super::{Job, State, Via};
use crate::dht_rpc::message::{Id, node_id};
use crate::dht_rpc::nat_sampler::{NatSampler, Reflexive};

impl State {
    /// Returns the socket that this node sends from.
    pub(in crate::dht_rpc) fn via(&self) -> Via {
        if self.firewalled { Via::Client } else { Via::Server }
    }

    pub(in crate::dht_rpc) fn id(&self) -> Option<Id> {
        (!self.ephemeral).then(|| *self.table.id())
    }

    /// Returns the configured address, or the one that other nodes agree on.
    pub(in crate::dht_rpc) fn own_address(&self) -> Option<Reflexive> {
        let configured = self.configured_address.map(|own| Reflexive { host: *own.ip(), port: Some(own.port()) });
        configured.or(self.sampler.address())
    }

    pub(in crate::dht_rpc) fn own_host_and_port(&self) -> Option<SocketAddrV4> {
        self.configured_address.or_else(|| self.sampler.host_and_port())
    }

    pub(in crate::dht_rpc) fn remote_address(&self) -> Option<SocketAddrV4> {
        self.own_host_and_port().filter(|address| !self.firewalled && address.port() == self.server_port)
    }

    /// Returns up to five nodes that can test whether this node is reachable.
    pub(in crate::dht_rpc) fn witnesses(&self) -> Vec<SocketAddrV4> {
        let mut nodes: Vec<_> = self.table.latest().take(5).map(|node| node.address).collect();
        if nodes.len() < 5 {
            nodes.extend(self.bootstrap.iter().filter(|node| !nodes.contains(node)).copied().collect::<Vec<_>>());
        }
        nodes
    }

    /// Evaluates the responses that reached the server socket: the hosts that responded, and where they saw this node.
    /// Returns whether they prove that there is no firewall.
    pub(in crate::dht_rpc) fn on_witnesses(&mut self, asked: usize, seen: &[(Ipv4Addr, SocketAddrV4)]) -> bool {
        let mut sampler = NatSampler::default();
        for (witness, address) in seen {
            sampler.add(*witness, *address);
        }
        let enough = if asked >= 5 { 3 } else { 1 };
        let Some(address) = sampler.host_and_port() else { return false };
        // A mapped port cannot be announced to others, because they derive the node's id from the address they see.
        let is_open = seen.len() >= enough
            && self.own_address().is_some_and(|own| own.host == *address.ip())
            && address.port() == self.server_port;
        if is_open {
            self.firewalled = false;
            self.passing_samples.clear();
            self.sampler = sampler;
        }
        is_open
    }

    /// Makes the node persistent if its address is certain. Returns whether it did.
    pub(in crate::dht_rpc) fn settle_identity(&mut self) -> bool {
        match self.own_host_and_port() {
            Some(address) if !self.firewalled && self.ephemeral => {
                self.become_persistent(address);
                true
            }
            _ => false,
        }
    }

    pub(super) fn become_persistent(&mut self, address: SocketAddrV4) {
        self.ephemeral = false;
        let id = node_id(address);
        if *self.table.id() != id {
            self.table.move_to(id);
            if self.bootstrapped {
                self.start(Job::Refresh(id));
            }
        }
    }
}
