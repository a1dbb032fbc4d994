//! Golden vectors for tests, made by the Node package `hyperdht` 6.34.0.

use std::collections::HashMap;

/// Returns the bytes of one message of `messages.json`.
pub(super) fn golden(message: &str, name: &str) -> Vec<u8> {
    let all: HashMap<String, HashMap<String, String>> = serde_json::from_str(include_str!("messages.json")).unwrap();
    hex::decode(&all[message][name]).unwrap()
}
