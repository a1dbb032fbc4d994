//! Names and ids. They are checked on construction, so a value of these types is always well formed.

use std::fmt;
use std::str::FromStr;

use inference::name::is_model_name;
pub use inference::name::{AdapterName, MalformedId};
use inference::text_id;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

fn is_slug(text: &str) -> bool {
    let word =
        |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    text.len() <= 64 && text.split('-').all(word)
}

text_id! {
    /// A model's name, such as `llama3.1-8b`.
    ModelName, "model", "lower-case letters and digits in words joined by '.' or '-', at most 64 characters",
    "^[a-z0-9]+([.-][a-z0-9]+)*$", is_model_name
}

text_id! {
    /// A region's slug, such as `eu-west`.
    Region, "region", "lower-case letters and digits in words joined by '-', at most 64 characters",
    "^[a-z0-9]+(-[a-z0-9]+)*$", is_slug
}

text_id! {
    /// The tenant that pays for a job.
    TenantId, "tenantId", "lower-case letters and digits in words joined by '-', at most 64 characters",
    "^[a-z0-9]+(-[a-z0-9]+)*$", is_slug
}

text_id! {
    /// Identifies a resent request. The same token never runs a job twice.
    RetryToken, "retryToken", "1 to 128 visible ASCII characters", "^[!-~]{1,128}$",
    |text| (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// A model's version, `MAJOR.MINOR`. The greater version is the newer one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelVersion {
    /// `MAJOR` of `MAJOR.MINOR`, which is compared first.
    pub major: u32,
    /// `MINOR` of `MAJOR.MINOR`.
    pub minor: u32,
}

impl FromStr for ModelVersion {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        // A version has one spelling, without signs and leading zeros, so that a topic has one name.
        let number = |digits: &str| {
            let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
            if plain { digits.parse::<u32>().ok() } else { None }
        };
        text.split_once('.')
            .and_then(|(major, minor)| Some(Self { major: number(major)?, minor: number(minor)? }))
            .ok_or_else(|| MalformedId::new("version", text, "MAJOR.MINOR, such as 1.0"))
    }
}

impl fmt::Display for ModelVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.major, self.minor)
    }
}

/// The maximum length of a model's name, in bytes.
const MODEL_NAME_BYTES_MAX: usize = 64;

impl ModelName {
    /// Derives a name from a model's name elsewhere: `Qwen/Qwen3-8B` becomes `qwen3-8b`, `llama3.2:3b` becomes
    /// `llama3.2-3b`. Returns `None` if no letter or digit is left.
    pub fn made_of(text: &str) -> Option<Self> {
        let last = text.trim_end_matches('/').rsplit(['/', '\\']).next()?.to_lowercase();
        let last = last.strip_suffix(".gguf").unwrap_or(&last);
        let last = last.strip_suffix(":latest").unwrap_or(last);
        let mut name = String::new();
        for letter in last.chars() {
            match letter {
                'a'..='z' | '0'..='9' => name.push(letter),
                // One mark joins two words, and no mark comes first.
                _ if name.is_empty() || name.ends_with(['.', '-']) => {}
                '.' => name.push('.'),
                _ => name.push('-'),
            }
        }
        name.truncate(MODEL_NAME_BYTES_MAX);
        name.trim_end_matches(['.', '-']).parse().ok()
    }
}

/// Defines serde and schema through `FromStr` and `Display`.
macro_rules! as_text {
    ($name:ident, $pattern:literal, $description:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern, "description": $description })
            }
        }
    };
}

as_text!(ModelVersion, "^(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)$", "MAJOR.MINOR");

/// Id of a job, a UUID. It stays the same from the client's request to the settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CorrelationId(pub Uuid);

impl CorrelationId {
    /// Derives the id of a job from its retry token, for a caller that names no id: a UUIDv5, so that a repeat gets
    /// the same one.
    pub fn of_retry(tenant_id: &TenantId, token: &RetryToken) -> Self {
        const NAMESPACE: Uuid = Uuid::from_u128(0x9c1f_44a1_6d0e_4f0b_8f43_72cf_1d5b_60ae);
        // No tenant id contains a space.
        Self(Uuid::new_v5(&NAMESPACE, format!("{} {}", tenant_id.as_str(), token.as_str()).as_bytes()))
    }
}

impl FromStr for CorrelationId {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        // Only the hyphenated form is accepted.
        let uuid = if text.len() == 36 { Uuid::try_parse(text).ok() } else { None };
        uuid.map(Self).ok_or_else(|| MalformedId::new("correlationId", text, "a hyphenated UUID"))
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(formatter)
    }
}

as_text!(CorrelationId, "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$", "a hyphenated UUID");

/// Defines an id of fixed length, written in lower-case hex.
macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $length:literal, $part:literal, $expected:literal, $pattern:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $length]);

        impl FromStr for $name {
            type Err = MalformedId;

            fn from_str(text: &str) -> Result<Self, MalformedId> {
                let mut bytes = [0; $length];
                let lower = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
                match hex::decode_to_slice(text, &mut bytes) {
                    Ok(()) if lower => Ok(Self(bytes)),
                    _ => Err(MalformedId::new($part, text, $expected)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "{}({})", stringify!($name), hex::encode(self.0))
            }
        }

        as_text!($name, $pattern, $expected);
    };
}

hex_id! {
    /// A node's ed25519 public key, which is also its Hyperswarm address.
    PublicKey, 32, "publicKey", "64 lower-case hex digits", "^[0-9a-f]{64}$"
}

hex_id! {
    /// A W3C trace id, the same on all nodes that a request touches.
    TraceId, 16, "traceId", "32 lower-case hex digits", "^[0-9a-f]{32}$"
}

hex_id! {
    /// SHA-256 of an artifact's bytes.
    Digest, 32, "digest", "64 lower-case hex digits", "^[0-9a-f]{64}$"
}

hex_id! {
    /// MAC of an introduction's transcript; see [`crate::membership::transcript`].
    TranscriptProof, 32, "proof", "64 lower-case hex digits", "^[0-9a-f]{64}$"
}

hex_id! {
    /// Public id of an invite.
    InviteId, 8, "inviteId", "16 lower-case hex digits", "^[0-9a-f]{16}$"
}

hex_id! {
    /// Digest of a prompt's prefix; see [`crate::prefix`].
    PrefixDigest, 8, "prefix", "16 lower-case hex digits", "^[0-9a-f]{16}$"
}

/// Id of a worker: its public key.
pub type WorkerId = PublicKey;

impl PublicKey {
    /// Returns the first eight hex digits, for display and logs.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}

impl Digest {
    /// Returns the SHA-256 of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_name_has_words_joined_by_dots_or_hyphens() {
        for good in ["llama3.1-8b", "tether-tiny", "a", "mixtral-8x7b"] {
            assert_eq!(good.parse::<ModelName>().expect("well formed").as_str(), good);
        }
        for bad in ["", "-a", "a-", "a..b", "A", "a b", "a/b", "ä", &"a".repeat(65)] {
            assert_eq!(bad.parse::<ModelName>().expect_err("malformed").part, "model");
        }
    }

    #[test]
    fn a_version_has_one_spelling() {
        assert_eq!("1.10".parse::<ModelVersion>().expect("well formed"), ModelVersion { major: 1, minor: 10 });
        for bad in ["1", "1.", ".1", "1.0.0", "01.0", "+1.0", "1.x", "1.4294967296"] {
            assert!(bad.parse::<ModelVersion>().is_err(), "{bad}");
        }
        assert!("1.10".parse::<ModelVersion>().expect("good") > "1.9".parse().expect("good"));
    }

    #[test]
    fn a_key_is_lower_case_hex_and_nothing_else() {
        let text = "ab".repeat(32);
        assert_eq!(text.parse::<PublicKey>().expect("well formed").to_string(), text);
        for bad in [text.to_uppercase(), "ab".repeat(31), format!("{text}ab"), "zz".repeat(32)] {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_malformed_name_is_quoted_only_in_part() {
        let error = "X".repeat(10_000).parse::<Region>().expect_err("malformed");
        assert_eq!(error.found.len(), 80);
    }

    #[test]
    fn names_of_servers_become_names_of_the_network() {
        for (served_as, expected) in [
            ("Qwen/Qwen2.5-7B-Instruct", Some("qwen2.5-7b-instruct")),
            ("llama3.2:3b", Some("llama3.2-3b")),
            ("nomic-embed-text:latest", Some("nomic-embed-text")),
            ("/srv/models/tiny.Q4_K_M.gguf", Some("tiny.q4-k-m")),
            ("C:\\models\\Phi 4 (mini).gguf", Some("phi-4-mini")),
            ("--..--", None),
            ("模型", None),
            ("", None),
        ] {
            assert_eq!(ModelName::made_of(served_as).map(|name| name.to_string()).as_deref(), expected, "{served_as}");
        }
        assert_eq!(ModelName::made_of(&"a-".repeat(60)).expect("a name").as_str().len(), 63);
    }
}
