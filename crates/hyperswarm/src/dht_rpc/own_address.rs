//! Chooses the address of a node that is bound to every address of its host.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};

/// Returns the address at which other hosts reach a socket of this host, as far as this host can tell.
pub fn reachable(bound: SocketAddrV4) -> SocketAddrV4 {
    let ip = if bound.ip().is_unspecified() { own_ip() } else { *bound.ip() };
    SocketAddrV4::new(ip, bound.port())
}

fn own_ip() -> Ipv4Addr {
    choose(way_out(), &interfaces())
}

/// Prefers the address of the default route, then one of a local network. A host without either can only reach itself.
fn choose(way_out: Option<Ipv4Addr>, interfaces: &[Ipv4Addr]) -> Ipv4Addr {
    let is_usable = |ip: &Ipv4Addr| !ip.is_unspecified() && !ip.is_loopback();
    let local = || interfaces.iter().copied().filter(is_usable).min_by_key(Ipv4Addr::is_link_local);
    way_out.filter(is_usable).or_else(local).unwrap_or(Ipv4Addr::LOCALHOST)
}

/// Returns the address of the interface that routes to other networks. Sends nothing.
fn way_out() -> Option<Ipv4Addr> {
    let documentation = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 1), 9);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(documentation).ok()?;
    match socket.local_addr().ok()? {
        SocketAddr::V4(address) => Some(*address.ip()),
        SocketAddr::V6(_) => None,
    }
}

fn interfaces() -> Vec<Ipv4Addr> {
    let all = if_addrs::get_if_addrs().unwrap_or_default();
    all.iter()
        .filter_map(|interface| match interface.ip() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_is_taken_then_a_local_network_then_loopback() {
        let ip = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        let all = ["127.0.0.1", "169.254.7.7", "192.168.1.5", "10.0.0.5"].map(ip);
        assert_eq!(choose(Some(ip("10.0.0.5")), &all), ip("10.0.0.5"));
        assert_eq!(choose(None, &all), ip("192.168.1.5"));
        assert_eq!(choose(Some(Ipv4Addr::UNSPECIFIED), &all[..2]), ip("169.254.7.7"));
        assert_eq!(choose(None, &all[..1]), Ipv4Addr::LOCALHOST);
        assert_eq!(choose(None, &[]), Ipv4Addr::LOCALHOST);
    }

    #[test]
    fn an_address_that_was_chosen_is_kept() {
        let bound = "127.0.0.1:7".parse().unwrap();
        assert_eq!(reachable(bound), bound);
        let any = reachable("0.0.0.0:7".parse().unwrap());
        assert!(!any.ip().is_unspecified() && any.port() == 7, "{any}");
    }
}
