//! Names that are checked on construction. A value of these types is always well formed.

/// A malformed name, with the format that was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{part} {found:?} is malformed: {expected}")]
pub struct MalformedId {
    /// Part of the name, such as `region`.
    pub part: &'static str,
    /// Text that was found, cut to 80 characters.
    pub found: String,
    /// Description of what is accepted.
    pub expected: &'static str,
}

impl MalformedId {
    /// Makes the error. It quotes at most the first 80 characters of `found`.
    pub fn new(part: &'static str, found: &str, expected: &'static str) -> Self {
        Self { part, found: found.chars().take(80).collect(), expected }
    }
}

/// Defines a checked, cheaply cloned text id with its serde, display and schema.
#[macro_export]
macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $part:literal, $expected:literal, $pattern:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::name::MalformedId;

            fn from_str(text: &str) -> Result<Self, $crate::name::MalformedId> {
                let check: fn(&str) -> bool = $check;
                if check(text) { Ok(Self(text.into())) } else { Err($crate::name::MalformedId::new($part, text, $expected)) }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(formatter, "{}({})", stringify!($name), self.0)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str> as serde::Deserialize>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern, "description": $expected })
            }
        }
    };
}

/// Returns whether a model or an adapter may have this name.
pub fn is_model_name(text: &str) -> bool {
    let word =
        |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    text.len() <= 64 && text.split(['.', '-']).all(word)
}

text_id! {
    /// Name of a LoRA adapter, in the format of a model's name.
    AdapterName, "adapter", "lower-case letters and digits in words joined by '.' or '-', at most 64 characters",
    "^[a-z0-9]+([.-][a-z0-9]+)*$", is_model_name
}
