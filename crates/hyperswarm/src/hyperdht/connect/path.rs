//! Decides how to reach a server that has responded to the handshake.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::hyperdht::noise_payload::{Firewall, NoisePayload};

/// How to reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// The server accepts packets from anyone at this address.
    Straight(SocketAddrV4),
    /// The server is firewalled but this node is not: the server connects to this node.
    Await,
    /// Both are behind the same router; the server may be reachable at this local address.
    Local(SocketAddrV4),
    /// Only hole punching could connect them.
    None,
}

/// The facts that a client has once the server has responded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    /// The node that delivered the response.
    pub(super) relay: SocketAddrV4,
    /// The server's address as the relay sees it; `None` when the server itself was asked.
    pub(super) server: Option<SocketAddrV4>,
    /// This node's address as the relay sees it.
    pub(super) client: SocketAddrV4,
    /// This node's address in its own network.
    pub(super) local: Ipv4Addr,
    /// Whether others can reach this node.
    pub(super) is_open: bool,
    /// The payload of the server's response.
    pub(super) payload: &'a NoisePayload,
}

impl Path {
    /// Decides as the Node package does.
    pub(super) fn choose(facts: Facts<'_>) -> Self {
        let Facts { payload, .. } = facts;
        let Some(server) = facts.server else { return Self::Straight(facts.relay) };
        let is_punchable = payload.holepunch.as_ref().is_some_and(|holepunch| !holepunch.relays.is_empty());
        if payload.firewall == Firewall::Open || !is_punchable {
            return Self::Straight(straight(&payload.addresses4, server));
        }
        if facts.is_open {
            return Self::Await;
        }
        if facts.client.ip() != server.ip() {
            return Self::None;
        }
        local(&payload.addresses4, facts.local).map_or(Self::None, Self::Local)
    }
}

/// Returns the first public address, or else the address at which the relay sees the server.
fn straight(addresses: &[SocketAddrV4], seen: SocketAddrV4) -> SocketAddrV4 {
    let public = |address: &&SocketAddrV4| !is_private(*address.ip()) && !is_reserved(*address.ip());
    addresses.iter().find(public).copied().filter(|address| address.port() != 0).unwrap_or(seen)
}

/// Returns an address of a server behind the same router, preferably one in this node's own network.
fn local(addresses: &[SocketAddrV4], own: Ipv4Addr) -> Option<SocketAddrV4> {
    let usable = || addresses.iter().filter(|address| !is_reserved(*address.ip()) && address.port() != 0);
    let shared = |address: &SocketAddrV4| {
        address.ip().octets().iter().zip(own.octets()).take_while(|(one, other)| **one == *other).count()
    };
    // `max_by_key` returns the last of several equal elements, and the server lists its best address first.
    usable().rev().max_by_key(|address| shared(address)).copied()
}

/// Returns whether an address belongs to a private network.
fn is_private(ip: Ipv4Addr) -> bool {
    let [first, second, ..] = ip.octets();
    let is_carrier_grade = first == 100 && (64..128).contains(&second);
    ip.is_private() || ip.is_loopback() || ip.is_link_local() || is_carrier_grade
}

/// Returns whether no host can have this address.
fn is_reserved(ip: Ipv4Addr) -> bool {
    let [first, second, third, _] = ip.octets();
    let is_protocol = (first, second, third) == (192, 0, 0);
    let is_benchmark = first == 198 && (18..20).contains(&second);
    first == 0 || first >= 224 || is_protocol || is_benchmark || ip.is_documentation()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hyperdht::noise_payload::{HolepunchInfo, RelayInfo};

    fn address(text: &str) -> SocketAddrV4 {
        text.parse().unwrap()
    }

    fn firewalled(addresses4: Vec<SocketAddrV4>) -> NoisePayload {
        let relay = RelayInfo { relay_address: address("1.1.1.1:1"), peer_address: address("2.2.2.2:2") };
        let holepunch = Some(HolepunchInfo { id: 0, relays: vec![relay] });
        NoisePayload { holepunch, addresses4, ..NoisePayload::default() }
    }

    fn facts(payload: &NoisePayload) -> Facts<'_> {
        Facts {
            relay: address("1.1.1.1:1"),
            server: Some(address("2.2.2.2:2")),
            client: address("3.3.3.3:3"),
            local: [192, 168, 1, 9].into(),
            is_open: false,
            payload,
        }
    }

    #[test]
    fn an_open_server_is_reached_where_it_says_or_where_its_relay_sees_it() {
        let mut payload = NoisePayload { firewall: Firewall::Open, ..NoisePayload::default() };
        assert_eq!(Path::choose(facts(&payload)), Path::Straight(address("2.2.2.2:2")));
        payload.addresses4 = vec![address("192.168.1.7:5"), address("2.2.2.2:7")];
        assert_eq!(Path::choose(facts(&payload)), Path::Straight(address("2.2.2.2:7")));
        // Private addresses are used if hole punching is impossible, as there is nothing better to try.
        payload.firewall = Firewall::Consistent;
        assert_eq!(Path::choose(facts(&payload)), Path::Straight(address("2.2.2.2:7")));
        let direct = Facts { server: None, ..facts(&payload) };
        assert_eq!(Path::choose(direct), Path::Straight(address("1.1.1.1:1")));
    }

    #[test]
    fn a_firewalled_server_comes_to_an_open_client_or_is_near_or_out_of_reach() {
        let payload = firewalled(vec![address("192.168.1.7:5")]);
        assert_eq!(Path::choose(Facts { is_open: true, ..facts(&payload) }), Path::Await);
        let behind_one_router = Facts { client: address("2.2.2.2:9"), ..facts(&payload) };
        assert_eq!(Path::choose(behind_one_router), Path::Local(address("192.168.1.7:5")));
        assert_eq!(Path::choose(facts(&payload)), Path::None);
        let nowhere = firewalled(Vec::new());
        assert_eq!(Path::choose(Facts { payload: &nowhere, ..behind_one_router }), Path::None);
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddrV4> {
        texts.iter().map(|text| address(text)).collect()
    }

    #[test]
    fn the_first_public_address_is_taken() {
        let seen = "5.6.7.8:9".parse().unwrap();
        let private = ["10.0.0.1:1", "127.0.0.1:1", "192.168.1.1:1", "172.31.0.1:1", "169.254.0.1:1", "100.64.0.1:1"];
        let reserved = ["0.1.2.3:1", "192.0.2.1:1", "198.19.0.1:1", "198.51.100.1:1", "203.0.113.1:1", "240.0.0.1:1"];
        assert_eq!(straight(&addresses(&private), seen), seen);
        assert_eq!(straight(&addresses(&reserved), seen), seen);
        let public = addresses(&["10.0.0.1:1", "88.99.3.86:49737", "8.8.8.8:1"]);
        assert_eq!(straight(&public, seen), public[1]);
        assert_eq!(straight(&addresses(&["8.8.8.8:0"]), seen), seen);
    }

    #[test]
    fn behind_one_router_the_address_of_our_network_is_taken() {
        let server = addresses(&["172.17.0.1:5", "192.168.1.7:5", "192.168.2.7:5", "255.255.255.255:5"]);
        assert_eq!(local(&server, [192, 168, 1, 9].into()), Some(server[1]));
        assert_eq!(local(&server, [10, 0, 0, 1].into()), Some(server[0]));
        assert_eq!(local(&[], [10, 0, 0, 1].into()), None);
    }
}
