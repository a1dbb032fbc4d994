//! Tokens: a host must return the token that it received before a node stores anything for it.

use std::io::Write;
use std::net::Ipv4Addr;
use std::time::Duration;

use tokio::time::Instant;

use super::message::Token;
use crate::crypto::keyed_hash;

/// How long one secret issues tokens. They are accepted for twice as long.
const ROTATION: Duration = Duration::from_millis(7_500);

/// Issues and verifies tokens. A token is valid for a host, whatever the port.
pub(super) struct Tokens {
    current: [u8; 32],
    previous: [u8; 32],
    rotated: Instant,
}

impl Tokens {
    /// Starts with two random secrets.
    pub(super) fn new(current: [u8; 32], previous: [u8; 32], now: Instant) -> Self {
        Self { current, previous, rotated: now }
    }

    /// Returns the token of a host.
    pub(super) fn issue(&self, host: Ipv4Addr) -> Token {
        token(&self.current, host)
    }

    /// Returns whether this token was issued to a host recently.
    pub(super) fn accepts(&self, token_: &Token, host: Ipv4Addr) -> bool {
        token(&self.current, host) == *token_ || token(&self.previous, host) == *token_
    }

    /// Rotates the secrets when it is time. The new one comes from `random`.
    pub(super) fn rotate(&mut self, now: Instant, random: impl FnOnce() -> [u8; 32]) {
        if now.duration_since(self.rotated) >= ROTATION {
            self.previous = std::mem::replace(&mut self.current, random());
            self.rotated = now;
        }
    }
}

fn token(secret: &[u8; 32], host: Ipv4Addr) -> Token {
    // The host is hashed as text, as in the Node package.
    let mut text = [0; 15];
    let mut rest = &mut text[..];
    write!(rest, "{host}").expect("an IPv4 address has at most 15 characters");
    let length = 15 - rest.len();
    keyed_hash(secret, &[&text[..length]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_is_that_of_the_node_package() {
        let tokens = Tokens::new([3; 32], [4; 32], Instant::now());
        assert_eq!(
            hex::encode(tokens.issue(Ipv4Addr::new(192, 168, 100, 200))),
            "53b858ef8797458a1525157fc1f0e2215f98ce6ba58c87a93d1c28476bbbc5b4"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_outlives_one_rotation_and_no_more() {
        let start = Instant::now();
        let host = Ipv4Addr::LOCALHOST;
        let mut tokens = Tokens::new([1; 32], [2; 32], start);
        let token = tokens.issue(host);
        assert!(tokens.accepts(&token, host));
        assert!(!tokens.accepts(&token, Ipv4Addr::new(127, 0, 0, 2)));

        tokens.rotate(start + Duration::from_secs(7), || [3; 32]);
        assert_eq!(tokens.issue(host), token, "too early to rotate");
        tokens.rotate(start + Duration::from_secs(8), || [3; 32]);
        assert_ne!(tokens.issue(host), token);
        assert!(tokens.accepts(&token, host));
        tokens.rotate(start + Duration::from_secs(16), || [4; 32]);
        assert!(!tokens.accepts(&token, host));
    }
}
