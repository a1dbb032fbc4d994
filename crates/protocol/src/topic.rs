//! Topics: the names under which nodes find each other (T4, ADR-0002).

use std::fmt;
use std::str::FromStr;

use blake2::digest::consts::U32;
use blake2::{Blake2b, Digest as _};

use crate::id::{CorrelationId, MalformedId, ModelName, ModelVersion, Region};

/// A topic. Its text is in lower case and separated by slashes. Its name on the DHT is [`Topic::key`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// `tether/presence/<region>`: the workers of a region.
    Presence(Region),
    /// `tether/models/<model>/<version>/<region>`: the workers of a region that serve a model.
    Model(ModelName, ModelVersion, Region),
    /// `tether/control/<region>`: the orchestrators, gateways and registries of a region.
    Control(Region),
    /// `tether/jobs/<correlationId>`: a job, while it lasts.
    Job(CorrelationId),
}

impl Topic {
    /// Returns the topic's 32-byte name on the DHT: the BLAKE2b-256 of its text.
    pub fn key(&self) -> [u8; 32] {
        Blake2b::<U32>::digest(self.to_string().as_bytes()).into()
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Presence(region) => write!(formatter, "tether/presence/{region}"),
            Self::Model(model, version, region) => write!(formatter, "tether/models/{model}/{version}/{region}"),
            Self::Control(region) => write!(formatter, "tether/control/{region}"),
            Self::Job(correlation_id) => write!(formatter, "tether/jobs/{correlation_id}"),
        }
    }
}

impl FromStr for Topic {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        const EXPECTED: &str = "tether/presence/<region>, tether/models/<model>/<version>/<region>, \
                                tether/control/<region> or tether/jobs/<correlationId>";
        let parts: Vec<&str> = text.splitn(6, '/').collect();
        match parts.as_slice() {
            ["tether", "presence", region] => Ok(Self::Presence(region.parse()?)),
            ["tether", "models", model, version, region] => {
                Ok(Self::Model(model.parse()?, version.parse()?, region.parse()?))
            }
            ["tether", "control", region] => Ok(Self::Control(region.parse()?)),
            // A job's topic is in lower case like all others, although a UUID may have upper-case digits.
            ["tether", "jobs", id] if !id.bytes().any(|byte| byte.is_ascii_uppercase()) => Ok(Self::Job(id.parse()?)),
            ["tether", "jobs", id] => Err(MalformedId::new("correlationId", id, "a lower-case hyphenated UUID")),
            ["tether", "presence" | "control"] | ["tether", "models", _, _] => {
                Err(MalformedId::new("region", "", "every topic ends with its region"))
            }
            ["tether", kind, ..] if !matches!(*kind, "presence" | "models" | "control" | "jobs") => {
                Err(MalformedId::new("kind", kind, "presence, models, control or jobs"))
            }
            _ => Err(MalformedId::new("topic", text, EXPECTED)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_reads_back_as_it_is_written() {
        for text in [
            "tether/presence/eu-west",
            "tether/models/llama3.1-8b/1.0/us-east",
            "tether/control/sa-east",
            "tether/jobs/018f3c2e-7b1a-7c3d-9e4f-5a6b7c8d9e0f",
        ] {
            assert_eq!(text.parse::<Topic>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn a_malformed_topic_names_the_part_that_offends() {
        for (text, part) in [
            ("tether/presence/EU", "region"),
            ("tether/presence", "region"),
            ("tether/models/Llama/1.0/eu-west", "model"),
            ("tether/models/llama/1/eu-west", "version"),
            ("tether/models/llama/1.0", "region"),
            ("tether/models/llama/1.0/eu west", "region"),
            ("tether/jobs/7", "correlationId"),
            ("tether/jobs/018F3C2E-7B1A-7C3D-9E4F-5A6B7C8D9E0F", "correlationId"),
            ("tether/workers/eu-west", "kind"),
            ("other/presence/eu-west", "topic"),
            ("tether/presence/eu-west/x", "topic"),
            ("", "topic"),
        ] {
            assert_eq!(text.parse::<Topic>().expect_err(text).part, part, "{text}");
        }
    }

    #[test]
    fn a_topic_key_is_the_blake2b_256_of_its_text() {
        // Computed with Python: hashlib.blake2b(b"tether/presence/eu-west", digest_size=32).hexdigest()
        let topic: Topic = "tether/presence/eu-west".parse().expect("well formed");
        assert_eq!(hex::encode(topic.key()), PRESENCE_EU_WEST);
    }

    const PRESENCE_EU_WEST: &str = "51294c7ce52e89a01f2cd3c8b90b833ad59b47fed16e1cafb98894d66c507a89";
}
