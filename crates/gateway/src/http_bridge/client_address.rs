//! Finds the address of a request's client behind trusted proxies.

use std::net::{IpAddr, SocketAddr};

use http::uri::Authority;
use http::{HeaderMap, header};

use crate::config::{ProxyHeader, ProxyNetwork};

const X_FORWARDED_FOR: &str = "x-forwarded-for";

/// Headers with which proxies say that they passed a request on.
const PASSED_ON: [&str; 4] = ["forwarded", X_FORWARDED_FOR, "x-real-ip", "via"];

/// Returns whether a request from loopback was made by a program of this machine for itself: no proxy passed it on, and
/// no web page made it under a name that was pointed at this machine. In HTTP/2, `authority` names the host.
pub(super) fn is_direct(headers: &HeaderMap, authority: Option<&Authority>, is_own: fn(IpAddr) -> bool) -> bool {
    let host = match headers.get(header::HOST).map(|host| host.to_str().ok()?.parse().ok()) {
        Some(None) => return false,
        Some(host) => host,
        None => authority.cloned(),
    };
    let is_ours = host.is_none_or(|host: Authority| {
        let name = host.host().trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(is_own)
    });
    is_ours && !PASSED_ON.iter().any(|name| headers.contains_key(*name))
}

/// Returns whether a peer is a trusted proxy.
pub(super) fn is_proxy(peer: IpAddr, proxies: &[ProxyNetwork]) -> bool {
    proxies.iter().any(|network| network.contains(peer))
}

/// Returns the address of the client: that of the peer, or what trusted proxies say in their headers.
///
/// Each proxy appends the address that it sees, so the client is the last one that is not a proxy's. What stands before
/// it is the client's own word. If the two headers disagree, one of them was written by the client, and the request
/// counts as the proxy's own.
pub(super) fn client_address(
    peer: IpAddr,
    headers: &HeaderMap,
    proxies: &[ProxyNetwork],
    header: ProxyHeader,
) -> IpAddr {
    let peer = peer.to_canonical();
    if !is_proxy(peer, proxies) {
        return peer;
    }
    let listed = || last_client(peer, &listed(headers), proxies);
    let forwarded = || last_client(peer, &forwarded(headers), proxies);
    let named = match header {
        ProxyHeader::Either => (listed(), forwarded()),
        ProxyHeader::XForwardedFor => (listed(), None),
        ProxyHeader::Forwarded => (None, forwarded()),
    };
    match named {
        (Some(one), Some(other)) if one != other => peer,
        (one, other) => one.or(other).unwrap_or(peer),
    }
}

/// Returns the last hop that is not a proxy, or else the first one. An unreadable hop counts as the proxy after it.
fn last_client(peer: IpAddr, hops: &[Option<IpAddr>], proxies: &[ProxyNetwork]) -> Option<IpAddr> {
    let mut nearest = peer;
    for hop in hops.iter().rev() {
        let Some(hop) = *hop else { return Some(nearest) };
        nearest = hop;
        if !is_proxy(hop, proxies) {
            break;
        }
    }
    (!hops.is_empty()).then_some(nearest)
}

/// Returns the hops in `X-Forwarded-For`, in the order of its lines.
fn listed(headers: &HeaderMap) -> Vec<Option<IpAddr>> {
    lines(headers, X_FORWARDED_FOR).flat_map(|line| line.split(',')).map(|hop| address(hop.trim())).collect()
}

/// Returns the hops in `Forwarded` (RFC 7239), in the order of its lines.
fn forwarded(headers: &HeaderMap) -> Vec<Option<IpAddr>> {
    lines(headers, header::FORWARDED.as_str()).flat_map(|line| split_unquoted(line, ',')).map(forwarded_for).collect()
}

fn lines<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).into_iter().map(|line| line.to_str().unwrap_or_default())
}

/// Reads an address, which may have a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]:80`.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse().ok().or_else(|| Some(text.parse::<SocketAddr>().ok()?.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

/// Reads `for` of an element of `Forwarded`, such as `for="[2001:db8::1]:80";proto=https`.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    // An open quote may have swallowed what a proxy appended.
    if !element.matches('"').count().is_multiple_of(2) {
        return None;
    }
    let mut pairs = split_unquoted(element, ';').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.find(|(name, _)| name.trim().eq_ignore_ascii_case("for"))?;
    address(value.trim().trim_matches('"'))
}

/// Splits text at a separator outside of quotes.
fn split_unquoted(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    text.split(move |character| {
        quoted ^= character == '"';
        character == separator && !quoted
    })
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn client(peer: &str, headers: &[(&'static str, &str)]) -> String {
        client_by(ProxyHeader::Either, peer, headers)
    }

    fn client_by(header: ProxyHeader, peer: &str, headers: &[(&'static str, &str)]) -> String {
        let proxies = ["10.0.0.0/8", "2001:db8:1::/48"].map(|text| text.parse().expect("a network"));
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_static(name), HeaderValue::from_str(value).expect("a value"));
        }
        client_address(peer.parse().expect("an address"), &map, &proxies, header).to_string()
    }

    #[test]
    fn only_a_trusted_proxy_says_who_its_client_is() {
        let header = [("x-forwarded-for", "192.0.2.1")];
        assert_eq!(client("198.51.100.9", &header), "198.51.100.9");
        assert_eq!(client("10.1.1.1", &header), "192.0.2.1");
        assert_eq!(client("::ffff:10.1.1.1", &header), "192.0.2.1");
        assert_eq!(client("10.1.1.1", &[]), "10.1.1.1");
    }

    #[test]
    fn the_last_hop_that_is_no_proxy_is_the_client_whatever_stands_before_it() {
        for (value, expected) in [
            ("203.0.113.5, 192.0.2.1", "192.0.2.1"),
            ("192.0.2.1, 10.2.2.2,10.3.3.3", "192.0.2.1"),
            ("nonsense, 192.0.2.1:4711", "192.0.2.1"),
            ("192.0.2.1, nonsense", "10.1.1.1"),
            ("192.0.2.1, nonsense, 10.2.2.2", "10.2.2.2"),
            ("10.2.2.2, 10.3.3.3", "10.2.2.2"),
            ("[2001:db8:2::1]:80", "2001:db8:2::1"),
            ("2001:db8:2::1, 2001:db8:1::7", "2001:db8:2::1"),
            ("", "10.1.1.1"),
        ] {
            assert_eq!(client("10.1.1.1", &[("x-forwarded-for", value)]), expected, "{value:?}");
        }
        let lines = [("x-forwarded-for", "203.0.113.5"), ("x-forwarded-for", "192.0.2.1")];
        assert_eq!(client("10.1.1.1", &lines), "192.0.2.1");
    }

    #[test]
    fn the_standard_header_is_read_as_well() {
        for (value, expected) in [
            ("for=192.0.2.1", "192.0.2.1"),
            ("For=203.0.113.5;by=x, proto=https;FOR=\"192.0.2.1:80\"", "192.0.2.1"),
            ("for=\"[2001:db8:2::1]:80\";by=\"a,b;c\"", "2001:db8:2::1"),
            ("for=192.0.2.1, for=_hidden", "10.1.1.1"),
            ("for=192.0.2.1, proto=https", "10.1.1.1"),
            ("for=203.0.113.5;x=\", for=192.0.2.1", "10.1.1.1"),
        ] {
            assert_eq!(client("10.1.1.1", &[("forwarded", value)]), expected, "{value:?}");
        }
    }

    #[test]
    fn a_client_that_writes_the_other_header_itself_counts_as_the_proxy() {
        let both = |forwarded| client("10.1.1.1", &[("x-forwarded-for", "192.0.2.1"), ("forwarded", forwarded)]);
        assert_eq!(both("for=192.0.2.1"), "192.0.2.1");
        assert_eq!(both("for=203.0.113.5"), "10.1.1.1");
    }

    #[test]
    fn a_proxy_whose_header_is_configured_is_believed_whatever_the_other_one_says() {
        let headers = [("x-forwarded-for", "192.0.2.1"), ("forwarded", "for=203.0.113.5")];
        assert_eq!(client_by(ProxyHeader::XForwardedFor, "10.1.1.1", &headers), "192.0.2.1");
        assert_eq!(client_by(ProxyHeader::Forwarded, "10.1.1.1", &headers), "203.0.113.5");
        assert_eq!(client_by(ProxyHeader::Forwarded, "10.1.1.1", &headers[..1]), "10.1.1.1");
    }

    proptest! {
        #[test]
        fn no_header_panics_or_moves_a_client_that_is_no_proxy(value in "[ -~]{0,60}") {
            for name in ["x-forwarded-for", "forwarded"] {
                client("10.1.1.1", &[(name, &value)]);
                prop_assert_eq!(client("198.51.100.9", &[(name, &value)]), "198.51.100.9");
            }
            prop_assert_eq!(client("10.1.1.1", &[("x-forwarded-for", &format!("{value}, 192.0.2.1"))]), "192.0.2.1");
            let forwarded = client("10.1.1.1", &[("forwarded", &format!("{value}, for=192.0.2.1"))]);
            prop_assert!(["192.0.2.1", "10.1.1.1"].contains(&&*forwarded), "{}", forwarded);
        }
    }
}
