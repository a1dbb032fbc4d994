//! What the Node packages put on the wire, as `interop/hyperswarm/golden.js` wrote it.

mod channels;
mod connections;
mod crypto;
mod messages;
mod records;
mod secret_stream;
mod udx;
mod values;

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Reads one of the files.
pub(crate) fn read(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// The cases of a list, of which there is at least one.
pub(crate) fn cases(value: &Value) -> &[Value] {
    let cases = value.as_array().expect("a list");
    assert!(!cases.is_empty());
    cases
}

/// Bytes that are written in hexadecimal; `null` stands for no bytes.
pub(crate) fn bytes(value: &Value) -> Vec<u8> {
    hex::decode(value.as_str().unwrap_or_default()).expect("hexadecimal")
}

pub(crate) fn optional_bytes(value: &Value) -> Option<Vec<u8>> {
    value.as_str().map(|text| hex::decode(text).expect("hexadecimal"))
}

pub(crate) fn fixed<const N: usize>(value: &Value) -> [u8; N] {
    bytes(value).try_into().expect("as many bytes as that")
}

pub(crate) fn optional_fixed<const N: usize>(value: &Value) -> Option<[u8; N]> {
    value.is_string().then(|| fixed(value))
}

/// An address, a number, a list of them, or whatever else JSON says as it is.
pub(crate) fn parsed<T: DeserializeOwned>(value: &Value) -> T {
    T::deserialize(value).unwrap_or_else(|error| panic!("{value}: {error}"))
}
