//! Addresses at which a service of this machine can be reached.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _, UdpSocket};

/// Returns the URLs of a service that listens on an address. The first works on this machine. If the service listens on
/// every address, the second works on other machines.
pub fn urls(listens: SocketAddr, tls: bool) -> Vec<String> {
    let scheme = if tls { "https" } else { "http" };
    let mut hosts = vec![from_here(listens)];
    if listens.ip().is_unspecified()
        && let Some(outward) = outward(listens.is_ipv6())
    {
        hosts.push(SocketAddr::new(outward, listens.port()));
    }
    hosts.into_iter().map(|host| format!("{scheme}://{host}")).collect()
}

/// Parses an address to listen on as people write it: a port alone means this machine, and names are resolved. Text
/// that cannot be resolved is returned unchanged.
pub fn to_bind(text: &str) -> String {
    if let Ok(port) = text.parse::<u16>() {
        return SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port).to_string();
    }
    let mut found = text.to_socket_addrs().into_iter().flatten();
    // Prefer IPv4 if a name has both.
    let found = found.find(SocketAddr::is_ipv4).or_else(|| text.to_socket_addrs().ok()?.next());
    found.map_or_else(|| text.to_owned(), |address| address.to_string())
}

/// Returns the address at which this machine reaches one of its own services.
pub fn from_here(listens: SocketAddr) -> SocketAddr {
    let ip = match listens.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listens.port())
}

/// Returns this machine's address on its default route. Nothing is sent.
fn outward(v6: bool) -> Option<IpAddr> {
    // Addresses reserved for documentation: no machine has them, and every default route covers them.
    let (any, far): (IpAddr, IpAddr) = if v6 {
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into())
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((far, 9)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_or_a_name_is_enough_to_listen_on() {
        assert_eq!(to_bind("7070"), "127.0.0.1:7070");
        assert_eq!(to_bind("localhost:7070"), "127.0.0.1:7070");
        assert_eq!(to_bind("[::1]:80"), "[::1]:80");
        assert_eq!(to_bind("nowhere"), "nowhere");
    }

    #[test]
    fn an_address_that_means_every_address_is_no_address_to_call() {
        let first = |text: &str| urls(text.parse().expect("an address"), false).remove(0);
        assert_eq!(first("0.0.0.0:7070"), "http://127.0.0.1:7070");
        assert_eq!(first("[::]:7070"), "http://[::1]:7070");
        assert_eq!(first("192.0.2.7:80"), "http://192.0.2.7:80");
        assert_eq!(urls("127.0.0.1:1".parse().expect("an address"), true), ["https://127.0.0.1:1"]);
        for url in urls("0.0.0.0:7070".parse().expect("an address"), false) {
            assert!(!url.contains("0.0.0.0"), "{url}");
        }
    }
}
