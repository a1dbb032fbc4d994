//! The names under which tools are offered to the model, and those by which the client knows them.

use std::collections::BTreeMap;

use protocol::Digest;
use serde::{Deserialize, Serialize};

/// The longest name that a function may have.
const NAME_BYTES_MAX: usize = 64;
/// Hexadecimal digits of the digest in a shortened name.
const DIGEST_DIGITS: usize = 12;

/// The tools that the client knows under something else than the function's name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ToolNames(BTreeMap<String, ToolName>);

/// A tool as the client knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ToolName {
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    /// Whether it takes free text instead of JSON.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) is_custom: bool,
}

impl ToolNames {
    /// Adds a tool, and returns the name of its function.
    pub(crate) fn add(&mut self, tool: ToolName) -> String {
        let function = function_name(tool.namespace.as_deref(), &tool.name);
        if tool.is_custom || tool.namespace.is_some() {
            self.0.insert(function.clone(), tool);
        }
        function
    }

    /// Returns the tool of a function.
    pub(crate) fn of(&self, function: &str) -> ToolName {
        let plain = || ToolName { name: function.to_owned(), namespace: None, is_custom: false };
        self.0.get(function).cloned().unwrap_or_else(plain)
    }
}

/// Returns the name of a tool's function: both parts of its name, joined. A name that no function may have is shortened
/// to letters, digits, `_` and `-`, with a digest that keeps it apart from others.
pub(crate) fn function_name(namespace: Option<&str>, name: &str) -> String {
    let Some(namespace) = namespace else { return name.to_owned() };
    let separator = if namespace.ends_with("__") { "" } else { "__" };
    let joined = format!("{namespace}{separator}{name}");
    let is_allowed = |character: char| character.is_ascii_alphanumeric() || matches!(character, '_' | '-');
    if joined.len() <= NAME_BYTES_MAX && joined.chars().all(is_allowed) {
        return joined;
    }
    let readable = name.chars().filter(|character| is_allowed(*character));
    let readable: String = readable.take(NAME_BYTES_MAX - DIGEST_DIGITS - 1).collect();
    format!("{readable}_{}", &Digest::of(joined.as_bytes()).to_string()[..DIGEST_DIGITS])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_and_a_name_make_one_name_and_come_apart_again() {
        let mut names = ToolNames::default();
        for (namespace, name, joined) in
            [("mcp__files__", "read", "mcp__files__read"), ("crm", "find", "crm__find"), ("a.b", "c", "")]
        {
            let tool = ToolName { name: name.into(), namespace: Some(namespace.into()), is_custom: false };
            let function = names.add(tool.clone());
            assert!(joined.is_empty() || function == joined, "{function}");
            assert_eq!(names.of(&function), tool);
        }
        let plain = ToolName { name: "read".into(), namespace: None, is_custom: false };
        assert_eq!((names.add(plain.clone()), names.of("read")), ("read".into(), plain));
    }

    #[test]
    fn a_name_that_no_function_may_have_is_shortened_and_stays_apart() {
        let long = "n".repeat(100);
        let names = [("a b", "f"), ("a.b", "f"), ("x", &long), ("y", &long)];
        let names = names.map(|(namespace, name)| function_name(Some(namespace), name));
        for name in &names {
            assert!(name.len() <= NAME_BYTES_MAX && !name.contains([' ', '.']), "{name}");
        }
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }
}
