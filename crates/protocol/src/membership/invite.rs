//! Invites: `tth_join_<everything a node needs to join, in base32><checksum>`, on one line, for one node.
//!
//! The base32 contains a version, the pool, the registry's key, the invite's id, its secret, its expiry, what it
//! allows, and addresses of the network's nodes. The checksum detects typing errors; it does not protect against
//! forgery. The registry's record decides what an invite allows; the text only informs the joining node.

use std::fmt;
use std::str::FromStr;

use super::certificate::Certificate;
use crate::clock::UnixMillis;
use crate::control::NodeRole;
use crate::id::{InviteId, PublicKey, Region};

/// Prefix of every invite.
pub const PREFIX: &str = "tth_join_";
/// Length of an invite's secret, in bytes.
pub const SECRET_BYTES: usize = 24;
/// The maximum length of an invite, in characters.
pub const INVITE_LENGTH_MAX: usize = 8 * 1024;
/// The maximum number of addresses in an invite.
pub const BOOTSTRAP_MAX: usize = 16;
/// The maximum number of regions in an invite.
pub const REGIONS_MAX: usize = 16;

const VERSION: u8 = 1;
const ROLES: [NodeRole; 4] = [NodeRole::Gateway, NodeRole::Orchestrator, NodeRole::Registry, NodeRole::Worker];
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const ADDRESS_BYTES_MAX: usize = 128;

/// Secret that proves possession of an invite. `Debug` does not write it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InviteSecret(pub [u8; SECRET_BYTES]);

/// Allows one node to join a pool. `Display` writes the whole invite; `Debug` leaves out the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    /// Public key of the pool's root.
    pub pool: PublicKey,
    /// Public key of the registry that redeems the invite.
    pub registry: PublicKey,
    /// Public id of the invite.
    pub id: InviteId,
    /// Secret that proves possession.
    pub secret: InviteSecret,
    /// Expiry of the invite.
    pub expires_at: UnixMillis,
    /// Roles that the node may have.
    pub roles: Vec<NodeRole>,
    /// Regions in which the node may act; empty for all.
    pub regions: Vec<Region>,
    /// Addresses of nodes in the network, as `host:port`.
    pub bootstrap: Vec<String>,
}

/// Why a text is not an invite. It never quotes the text, which contains a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedInvite {
    /// The text does not begin with [`PREFIX`].
    #[error("an invite begins with {PREFIX}")]
    Prefix,
    /// The text is longer than [`INVITE_LENGTH_MAX`].
    #[error("an invite has at most {INVITE_LENGTH_MAX} characters")]
    Length,
    /// The text contains a character that is not base32.
    #[error("invalid character at position {position} of the invite")]
    Alphabet {
        /// Position of the character, from 1.
        position: usize,
    },
    /// The text was cut, or a character was mistyped.
    #[error("the checksum does not match: the invite was cut or mistyped")]
    Checksum,
    /// The invite has a version that this program does not know.
    #[error("the invite has version {found}, and this program reads version {VERSION}")]
    Version {
        /// Version that was found.
        found: u8,
    },
    /// A part of the content is malformed.
    #[error("the invite's {part} is malformed")]
    Content {
        /// Name of the malformed part.
        part: &'static str,
    },
}

impl InviteSecret {
    /// Decodes a secret from hex, as a node sends it to the registry.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; SECRET_BYTES];
        hex::decode_to_slice(text, &mut bytes).ok()?;
        Some(Self(bytes))
    }

    /// Encodes the secret in hex, as a node sends it to the registry.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Debug for InviteSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("InviteSecret(…)")
    }
}

impl Invite {
    /// Returns whether the invite has expired.
    pub fn has_ended(&self, now: UnixMillis) -> bool {
        now >= self.expires_at
    }

    /// Returns whether a certificate is from the invite's pool and has all of its roles.
    pub fn promised(&self, certificate: &Certificate) -> bool {
        certificate.pool == self.pool && self.roles.iter().all(|role| certificate.roles.contains(role))
    }

    /// Returns whether a text is an address that an invite may contain.
    pub fn is_address(text: &str) -> bool {
        let Some((host, port)) = text.rsplit_once(':') else { return false };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']' | b'@');
        let number = port.parse::<u16>().is_ok_and(|port| port > 0);
        text.len() <= ADDRESS_BYTES_MAX
            && !host.is_empty()
            && host.bytes().all(plain)
            && number
            && port.bytes().all(|byte| byte.is_ascii_digit())
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&self.pool.0);
        bytes.extend_from_slice(&self.registry.0);
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(&self.expires_at.0.to_be_bytes());
        let bit = |(index, role)| u8::from(self.roles.contains(role)) << index;
        bytes.push(ROLES.iter().enumerate().map(bit).sum());
        let regions = self.regions.iter().take(REGIONS_MAX).map(Region::as_str).collect::<Vec<_>>();
        let addresses = self.bootstrap.iter().take(BOOTSTRAP_MAX).map(String::as_str);
        for texts in [regions, addresses.filter(|address| Self::is_address(address)).collect()] {
            bytes.push(texts.len() as u8);
            for text in texts {
                bytes.push(text.len() as u8);
                bytes.extend_from_slice(text.as_bytes());
            }
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, MalformedInvite> {
        let content = |part| MalformedInvite::Content { part };
        let mut reader = Reader(bytes);
        let version = reader.byte().ok_or(content("version"))?;
        if version != VERSION {
            return Err(MalformedInvite::Version { found: version });
        }
        let pool = PublicKey(reader.array().ok_or(content("pool"))?);
        let registry = PublicKey(reader.array().ok_or(content("registry"))?);
        let id = InviteId(reader.array().ok_or(content("id"))?);
        let secret = InviteSecret(reader.array().ok_or(content("secret"))?);
        let expires_at = UnixMillis(u64::from_be_bytes(reader.array().ok_or(content("end"))?));
        let bits = reader.byte().filter(|bits| *bits < 1 << ROLES.len()).ok_or(content("roles"))?;
        let roles = ROLES.into_iter().enumerate().filter(|(index, _)| bits >> index & 1 == 1);
        let roles = roles.map(|(_, role)| role).collect();
        let regions = reader.texts(REGIONS_MAX).ok_or(content("regions"))?;
        let regions = regions.into_iter().map(str::parse).collect::<Result<_, _>>().map_err(|_| content("regions"))?;
        let bootstrap = reader.texts(BOOTSTRAP_MAX).ok_or(content("addresses"))?;
        if !bootstrap.iter().all(|address| Self::is_address(address)) {
            return Err(content("addresses"));
        }
        let bootstrap = bootstrap.into_iter().map(str::to_owned).collect();
        if !reader.0.is_empty() {
            return Err(content("end of text"));
        }
        Ok(Self { pool, registry, id, secret, expires_at, roles, regions, bootstrap })
    }
}

/// Reads an invite's bytes from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn array<const LENGTH: usize>(&mut self) -> Option<[u8; LENGTH]> {
        self.take(LENGTH)?.try_into().ok()
    }

    fn texts(&mut self, max: usize) -> Option<Vec<&'a str>> {
        let count = usize::from(self.byte()?);
        if count > max {
            return None;
        }
        (0..count)
            .map(|_| {
                let length = usize::from(self.byte()?);
                std::str::from_utf8(self.take(length)?).ok()
            })
            .collect()
    }
}

/// Encodes bytes in base32: five bits per character, the last one padded with zeros.
fn to_base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 8 / 5 + 1);
    let (mut held, mut bits) = (0_u32, 0);
    for byte in bytes {
        held = held << 8 | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            text.push(char::from(ALPHABET[(held >> bits & 31) as usize]));
        }
        held &= (1 << bits) - 1;
    }
    if bits > 0 {
        text.push(char::from(ALPHABET[(held << (5 - bits) & 31) as usize]));
    }
    text
}

/// Decodes base32 from [`to_base32`]. The error has the position of an invalid character.
fn from_base32(text: &str) -> Result<Vec<u8>, MalformedInvite> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut held, mut bits) = (0_u32, 0);
    for (index, character) in text.bytes().enumerate() {
        let unknown = MalformedInvite::Alphabet { position: PREFIX.len() + index + 1 };
        let value = ALPHABET.iter().position(|known| *known == character).ok_or(unknown)?;
        held = held << 5 | value as u32;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
        }
        held &= (1 << bits) - 1;
    }
    // An invite has one spelling: the remaining bits are fewer than those of a character, and zero.
    if bits >= 5 || held != 0 { Err(MalformedInvite::Checksum) } else { Ok(bytes) }
}

impl FromStr for Invite {
    type Err = MalformedInvite;

    fn from_str(text: &str) -> Result<Self, MalformedInvite> {
        let coded = text.strip_prefix(PREFIX).ok_or(MalformedInvite::Prefix)?;
        if text.len() > INVITE_LENGTH_MAX {
            return Err(MalformedInvite::Length);
        }
        let bytes = from_base32(coded)?;
        let (covered, written) = bytes.split_last_chunk::<4>().ok_or(MalformedInvite::Checksum)?;
        if crc32fast::hash(covered).to_be_bytes() != *written {
            return Err(MalformedInvite::Checksum);
        }
        Self::from_bytes(covered)
    }
}

impl fmt::Display for Invite {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.to_bytes();
        let checksum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&checksum.to_be_bytes());
        write!(formatter, "{PREFIX}{}", to_base32(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn invite() -> Invite {
        Invite {
            pool: PublicKey([1; 32]),
            registry: PublicKey([2; 32]),
            id: InviteId([3; 8]),
            secret: InviteSecret([4; SECRET_BYTES]),
            expires_at: UnixMillis(1_700_000_000_000),
            roles: vec![NodeRole::Gateway, NodeRole::Worker],
            regions: vec!["eu-west".parse().expect("region")],
            bootstrap: vec!["192.0.2.1:49737".into(), "node.example.com:7000".into()],
        }
    }

    proptest! {
        #[test]
        fn an_invite_reads_back_as_it_is_written(
            keys in any::<[[u8; 32]; 2]>(),
            id in any::<[u8; 8]>(),
            secret in any::<[u8; SECRET_BYTES]>(),
            end in any::<u64>(),
            roles in proptest::sample::subsequence(ROLES.to_vec(), 0..=4),
            regions in prop::collection::vec("[a-z0-9]{1,20}", 0..REGIONS_MAX),
            bootstrap in prop::collection::vec("[a-z0-9.-]{1,20}:[1-9][0-9]{0,3}", 0..BOOTSTRAP_MAX),
        ) {
            let regions = regions.iter().map(|text| text.parse().expect("region")).collect();
            let invite = Invite {
                pool: PublicKey(keys[0]),
                registry: PublicKey(keys[1]),
                id: InviteId(id),
                secret: InviteSecret(secret),
                expires_at: UnixMillis(end),
                roles,
                regions,
                bootstrap,
            };
            let text = invite.to_string();
            prop_assert!(text.len() <= INVITE_LENGTH_MAX);
            prop_assert_eq!(text.parse::<Invite>(), Ok(invite));
        }

        #[test]
        fn every_change_of_a_single_character_is_refused(position in 0_usize..250, character in any::<char>()) {
            let text = invite().to_string();
            let position = position % text.len();
            prop_assume!(!text[position..].starts_with(character));
            let changed = format!("{}{character}{}", &text[..position], &text[position + 1..]);
            prop_assert!(changed.parse::<Invite>().is_err());
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "(tth_join_)?([a-z2-7]{0,300}|.{0,60})") {
            let _ = text.parse::<Invite>();
        }

        #[test]
        fn no_bytes_behind_a_good_checksum_make_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = [vec![VERSION], bytes].concat();
            bytes.extend_from_slice(&crc32fast::hash(&bytes).to_be_bytes());
            let text = format!("{PREFIX}{}", to_base32(&bytes));
            if let Ok(invite) = text.parse::<Invite>() {
                prop_assert_eq!(invite.to_string(), text);
            }
        }
    }

    #[test]
    fn an_error_says_what_is_wrong() {
        let text = invite().to_string();
        let refused = |text: &str| text.parse::<Invite>().expect_err("malformed");
        assert_eq!(refused(""), MalformedInvite::Prefix);
        assert_eq!(refused(&text.replace("join", "live")), MalformedInvite::Prefix);
        assert_eq!(refused(&text.replacen("tth_join_", "tth_join_1", 1)), MalformedInvite::Alphabet { position: 10 });
        assert_eq!(refused(PREFIX), MalformedInvite::Checksum);
        for cut in PREFIX.len() + 1..text.len() {
            assert_eq!(refused(&text[..cut]), MalformedInvite::Checksum, "cut at {cut}: no character is to blame");
        }
        assert_eq!(refused(&format!("{PREFIX}{}", "a".repeat(INVITE_LENGTH_MAX))), MalformedInvite::Length);
        let recoded = |bytes: &[u8]| {
            let checksum = crc32fast::hash(bytes).to_be_bytes();
            format!("{PREFIX}{}", to_base32(&[bytes, &checksum].concat()))
        };
        assert_eq!(refused(&recoded(&[9, 9])), MalformedInvite::Version { found: 9 });
        assert_eq!(refused(&recoded(&[1, 9])), MalformedInvite::Content { part: "pool" });
        let longer = [invite().to_bytes(), vec![0]].concat();
        assert_eq!(refused(&recoded(&longer)), MalformedInvite::Content { part: "end of text" });
    }

    #[test]
    fn debug_output_and_errors_keep_the_secret() {
        let invite = invite();
        let shown = format!("{invite:?}");
        assert!(!shown.contains(&invite.secret.to_hex()) && !shown.contains("4, 4"), "{shown}");
        assert_eq!(InviteSecret::from_hex(&invite.secret.to_hex()), Some(invite.secret));
        assert_eq!(InviteSecret::from_hex("04"), None);
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["127.0.0.1:49737", "node1.example.com:1", "[::1]:80", "abc@10.0.0.1:49737"] {
            assert!(Invite::is_address(good), "{good}");
        }
        for bad in ["", "host", ":80", "host:", "host:0", "host:65536", "host:+1", "a b:1", "a/b:1", "ä:1"] {
            assert!(!Invite::is_address(bad), "{bad}");
        }
    }

    #[test]
    fn a_typical_invite_fits_two_lines_of_a_terminal() {
        let text = Invite { bootstrap: vec!["192.0.2.1:49737".into()], ..invite() }.to_string();
        assert!(text.len() <= 240, "{}", text.len());
    }
}
