//! Parses JSON bodies. Error messages use JSON's terms instead of Rust's.

use std::fmt;
use std::marker::PhantomData;

use protocol::codec::{DecodeError, decode_within};
use protocol::{ErrorCode, WireError};
use serde::de::{self, DeserializeOwned};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// Parses a JSON object. Its length was already limited while it was received.
pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, WireError> {
    // The parser does not validate the contents of ignored fields, so the whole body is checked first.
    if let Err(error) = std::str::from_utf8(bytes) {
        return Err(not_json("invalid UTF-8", &bytes[..error.valid_up_to()]));
    }
    // serde would accept an array as the fields of a struct, in their order.
    let start = bytes.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(bytes.len());
    if bytes.get(start) != Some(&b'{') {
        return Err(not_json("expected an object", &bytes[..start]));
    }
    decode_within(bytes, usize::MAX).map_err(|error| match error {
        DecodeError::Malformed { path, reason } => {
            if let Some(field) = reason.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`')) {
                let path = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
                return invalid(&path, "is given more than once");
            }
            let reason = plain_types(&reason);
            // An error at the top level has no path.
            let message = if path == "." { reason } else { format!("{path}: {reason}") };
            WireError { message, ..DecodeError::Malformed { path, reason: String::new() }.into() }
        }
        error => error.into(),
    })
}

/// A text, or an array.
#[derive(Debug)]
pub(crate) enum TextOr<T> {
    Text(String),
    Array(Vec<T>),
}

/// Parses a text or an array. An untagged enum would hide where in the array an error is, so this is a visitor.
/// `expected` is part of the error.
pub(crate) fn text_or<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
    expected: &'static str,
) -> Result<TextOr<T>, D::Error> {
    struct Either<T>(&'static str, PhantomData<T>);

    impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Either<T> {
        type Value = TextOr<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str(self.0)
        }

        fn visit_str<E>(self, text: &str) -> Result<TextOr<T>, E> {
            Ok(TextOr::Text(text.to_owned()))
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<TextOr<T>, A::Error> {
            let mut all = vec![];
            while let Some(item) = items.next_element()? {
                all.push(item);
            }
            Ok(TextOr::Array(all))
        }
    }

    deserializer.deserialize_any(Either(expected, PhantomData))
}

/// Translates an error message of serde from Rust's terms to JSON's.
fn plain_types(reason: &str) -> String {
    const TYPES: [(&str, &str); 12] = [
        ("u8", "a whole number"),
        ("u32", "a whole number"),
        ("u64", "a whole number"),
        ("usize", "a whole number"),
        ("i64", "a whole number"),
        ("f32", "a number"),
        ("f64", "a number"),
        ("a sequence", "an array"),
        ("sequence", "an array"),
        ("a map", "an object"),
        ("map", "an object"),
        ("unit", "null"),
    ];
    let reason = &reason.replace("unknown variant", "unknown value");
    let Some((found, expected)) = reason.rsplit_once("expected ") else { return reason.clone() };
    let found = found.replace("invalid type: map", "invalid type: object");
    let found = found.replace("invalid type: sequence", "invalid type: array").replace("floating point", "number");
    let plain = TYPES.iter().find(|(rust, _)| *rust == expected).map(|(_, plain)| *plain);
    let is_type = ["struct ", "enum ", "internally tagged enum ", "tuple struct ", "newtype struct "]
        .iter()
        .any(|kind| expected.starts_with(kind));
    let expected = plain.unwrap_or(if is_type { "an object" } else { expected });
    format!("{found}expected {expected}")
}

/// Returns the error for invalid JSON right after the bytes `good`.
fn not_json(what: &str, good: &[u8]) -> WireError {
    let line = good.split(|byte| *byte == b'\n').count();
    let column = good.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    WireError::new(ErrorCode::InvalidJson, format!("not valid JSON: {what} at line {line} column {column}"))
}

pub(crate) fn invalid(param: &str, what: &str) -> WireError {
    WireError::new(ErrorCode::InvalidValue, format!("{param} {what}")).with_param(param)
}

/// Gives a field in an error the name that the client knows it by.
pub(crate) fn renamed(mut error: WireError, ours: &str, theirs: &str) -> WireError {
    if error.param.as_deref() == Some(ours) {
        error.param = Some(theirs.to_owned());
        error.message = error.message.replacen(ours, theirs, 1);
    }
    error
}

pub(crate) fn missing(param: &str) -> WireError {
    invalid(param, "is missing")
}

pub(crate) fn unsupported(param: impl Into<String>) -> WireError {
    let param = param.into();
    let message = format!("{param} is not supported here; leave it out");
    WireError::new(ErrorCode::UnsupportedParameter, message).with_param(param)
}

pub(crate) fn refuse_unless(harmless: bool, param: &str) -> Result<(), WireError> {
    if harmless { Ok(()) } else { Err(unsupported(param)) }
}

/// Returns whether a value is null, an empty array or an empty object.
pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}
