//! Models, aliases and adapters: their names, their catalogue entries, and what workers offer.

use std::fmt;
use std::iter;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::clock::UnixMillis;
use crate::id::{AdapterName, Digest, MalformedId, ModelName, ModelVersion};

/// A model as a client names it: `name[@MAJOR.MINOR][:adapter]`. Without a version it is the newest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct ModelRef {
    /// Name without version or adapter.
    pub name: ModelName,
    /// Requested version; `None` for the newest.
    pub version: Option<ModelVersion>,
    /// Requested adapter; `None` for the plain model.
    pub adapter: Option<AdapterName>,
}

impl FromStr for ModelRef {
    type Err = MalformedId;

    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let (rest, adapter) = match text.split_once(':') {
            Some((rest, adapter)) => (rest, Some(adapter.parse()?)),
            None => (text, None),
        };
        let (name, version) = match rest.split_once('@') {
            Some((name, version)) => (name, Some(version.parse()?)),
            None => (rest, None),
        };
        Ok(Self { name: name.parse()?, version, adapter })
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.name)?;
        if let Some(version) = self.version {
            write!(formatter, "@{version}")?;
        }
        if let Some(adapter) = &self.adapter {
            write!(formatter, ":{adapter}")?;
        }
        Ok(())
    }
}

impl TryFrom<String> for ModelRef {
    type Error = MalformedId;

    fn try_from(text: String) -> Result<Self, MalformedId> {
        text.parse()
    }
}

impl From<ModelRef> for String {
    fn from(model: ModelRef) -> Self {
        model.to_string()
    }
}

/// Another name for a model, or one name for several models. A job for this name runs on the model that suits best.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasEntry {
    /// Name that clients request. It is a model's own name only if that model is one of its targets.
    pub alias: ModelName,
    /// Model that the alias stands for; never another alias.
    pub target: ModelRef,
    /// Further models that the alias stands for, without adapters; at most [`ALTERNATIVES_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alternatives: Vec<ModelRef>,
    /// Time when the alias was set.
    pub created_at: UnixMillis,
}

/// The maximum number of models that one name stands for, not counting the first.
pub const ALTERNATIVES_MAX: usize = 15;

impl AliasEntry {
    /// Returns the target and the alternatives, in order.
    pub fn targets(&self) -> impl Iterator<Item = &ModelRef> {
        iter::once(&self.target).chain(&self.alternatives)
    }

    /// Returns whether the alias is also the name of one of its targets.
    pub fn is_own_name(&self) -> bool {
        self.targets().any(|target| target.name == self.alias)
    }
}

/// One version of a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelKey {
    /// Name without version and adapter.
    pub model_id: ModelName,
    /// Version of the model. The bytes of a name and version never change.
    pub version: ModelVersion,
}

impl fmt::Display for ModelKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}@{}", self.model_id, self.version)
    }
}

/// A model version in the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelEntry {
    /// Name and version of the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// SHA-256 of the artifact; for a model of an adopted server, see [`remote_digest`].
    pub digest: Digest,
    /// Length of the artifact in bytes; 0 for a model of an adopted server.
    pub bytes: u64,
    /// Context length in tokens.
    pub context_length: u32,
    /// One-line description for people.
    #[serde(default)]
    pub description: String,
    /// Time of registration.
    pub created_at: UnixMillis,
    /// Facts from the model's file, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<ModelFacts>,
    /// True if an operator added the model: workers that have its artifact, or may fetch it, serve it. False if a
    /// worker offered it: only workers that offer it serve it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub added: bool,
    /// Whether workers never unload the model. A worker's own settings take precedence.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pin: bool,
    /// Seconds without work after which workers unload the model; -1 for never. A worker's own settings take
    /// precedence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_alive_secs: Option<i64>,
}

/// Facts from a model's file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ModelFacts {
    /// Name that the makers gave the model; empty if the file has none.
    pub name: String,
    /// Architecture, such as `llama`.
    pub architecture: String,
    /// Number of weights; 0 if unknown.
    pub parameters: u64,
    /// Quantisation of the weights, such as `Q4_K_M`.
    pub quantisation: String,
    /// Context length in tokens that the model was trained with; 0 if unknown.
    pub trained_context: u32,
    /// What the model can do, as far as its file shows.
    pub capabilities: Vec<Capability>,
    /// Whether the file has a chat template.
    pub chat_template: bool,
    /// Memory that the model takes with the default settings, in bytes; 0 if unknown.
    pub memory_bytes: u64,
}

/// The maximum length of a model's name, architecture or quantisation, in characters. Longer texts are cut.
const FACT_CHARS_MAX: usize = 128;

impl ModelFacts {
    /// Removes control characters from the texts, cuts them to 128 characters, and sorts and deduplicates the
    /// capabilities. The file is untrusted.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        for text in [&mut self.name, &mut self.architecture, &mut self.quantisation] {
            *text = text.chars().filter(|letter| !letter.is_control()).take(FACT_CHARS_MAX).collect();
        }
        self.capabilities.sort();
        self.capabilities.dedup();
        self
    }
}

/// A capability of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// `/v1/completions`: continues a text.
    Completion,
    /// `/v1/chat/completions`: answers a conversation.
    Chat,
    /// Calls the functions that a request offers.
    Tools,
    /// Reasons before it answers.
    Reasoning,
    /// Was made for text embeddings.
    Embeddings,
    /// A capability that this version does not know.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Capability {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Completion => "completion",
            Self::Chat => "chat",
            Self::Tools => "tools",
            Self::Reasoning => "reasoning",
            Self::Embeddings => "embeddings",
            Self::Unknown => "unknown",
        })
    }
}

/// A model that a worker offers to the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelOffer {
    /// Name and version under which the worker serves the model.
    #[serde(flatten)]
    pub key: ModelKey,
    /// File or server that runs under this name.
    #[serde(flatten)]
    pub source: OfferedSource,
    /// Context length in tokens.
    pub context_length: u32,
    /// Facts from the model's file, if the worker has read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<ModelFacts>,
}

/// The file or the server of an offered model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, rename_all_fields = "camelCase")]
pub enum OfferedSource {
    /// A file that the worker has verified.
    Artifact {
        /// SHA-256 of the file.
        digest: Digest,
        /// Length of the file in bytes; at least 1.
        bytes: u64,
    },
    /// A server that the worker has adopted.
    Server {
        /// The model's name on that server, 1 to [`SERVED_AS_BYTES_MAX`] bytes.
        served_as: String,
    },
}

/// The maximum length of a model's name on its server, in bytes.
pub const SERVED_AS_BYTES_MAX: usize = 256;

/// Returns the digest of an adopted server's model, whose bytes the network has not seen: the SHA-256 of `remote:` and
/// the model's name on its server. Equal digests mean equal names and nothing more.
pub fn remote_digest(served_as: &str) -> Digest {
    Digest::of(format!("remote:{served_as}").as_bytes())
}

/// An adapter of one version of a model. It fits no other version, because it was made for these weights.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterKey {
    /// The model's name and version.
    #[serde(flatten)]
    pub model: ModelKey,
    /// Name of the adapter, unique for the model version.
    pub adapter: AdapterName,
}

impl fmt::Display for AdapterKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.model, self.adapter)
    }
}

/// A LoRA adapter in the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AdapterEntry {
    /// Model and name of the adapter.
    #[serde(flatten)]
    pub key: AdapterKey,
    /// SHA-256 of the artifact.
    pub digest: Digest,
    /// Length of the artifact in bytes.
    pub bytes: u64,
    /// One-line description for people.
    #[serde(default)]
    pub description: String,
    /// Time of registration.
    pub created_at: UnixMillis,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_reads_back_as_it_is_written() {
        for text in ["tether-tiny", "tether-tiny@1.0", "tether-tiny:pirate", "tether-tiny@1.0:pirate"] {
            assert_eq!(text.parse::<ModelRef>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn an_offer_says_what_answers_for_the_model() {
        let key = ModelKey { model_id: "m".parse().expect("a name"), version: "1.0".parse().expect("a version") };
        let digest = Digest::of(b"model");
        let file = ModelOffer {
            key: key.clone(),
            source: OfferedSource::Artifact { digest, bytes: 5 },
            context_length: 512,
            facts: None,
        };
        let server = ModelOffer {
            key,
            source: OfferedSource::Server { served_as: "org/m".into() },
            context_length: 512,
            facts: None,
        };
        let head = r#"{"modelId":"m","version":"1.0""#;
        for (offer, source) in
            [(file, format!(r#""digest":"{digest}","bytes":5"#)), (server, r#""servedAs":"org/m""#.to_owned())]
        {
            let text = format!(r#"{head},{source},"contextLength":512}}"#);
            assert_eq!(serde_json::to_string(&offer).expect("it is written"), text);
            assert_eq!(serde_json::from_str::<ModelOffer>(&text).expect("it reads"), offer);
        }
    }

    #[test]
    fn facts_of_another_version_are_read_and_those_of_strangers_are_cut() {
        let text = r#"{"quantisation":"Q4_K_M","capabilities":["chat","sings","chat"],"later":1}"#;
        let facts: ModelFacts = serde_json::from_str(text).expect("it reads");
        assert_eq!(facts.capabilities, [Capability::Chat, Capability::Unknown, Capability::Chat]);
        let long = ModelFacts { name: format!("\u{1b}[2Jname{}", "x".repeat(1_000)), ..facts }.bounded();
        assert!(long.name.starts_with("[2Jname") && long.name.len() == 128, "{}", long.name);
        assert_eq!(long.capabilities, [Capability::Chat, Capability::Unknown]);
    }

    #[test]
    fn a_malformed_reference_names_the_part_that_offends() {
        for (text, part) in
            [("", "model"), ("M", "model"), ("m@1", "version"), ("m:", "adapter"), ("m@1.0:A", "adapter")]
        {
            assert_eq!(text.parse::<ModelRef>().expect_err(text).part, part);
        }
    }
}
