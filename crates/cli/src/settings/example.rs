//! Generates a settings file with every setting, its default and its description, which is the setting's doc comment.

use std::fmt::Write as _;

use anyhow::Context as _;
use schemars::schema_for;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::Settings;

const HEAD: &str = "# Every setting of Tether with its default. Flags take precedence over TETHER_* variables (TETHER_GATEWAY__BIND\n\
                    # for gateway.bind), these over this file, and this file over the defaults.\n\n";

/// Returns a settings file with every setting at its default.
pub fn example() -> anyhow::Result<String> {
    let defaults = Table::try_from(Settings::default()).context("the defaults do not write")?;
    let schema = schema_for!(Settings).to_value();
    let mut text = HEAD.to_owned();
    write_table(&mut text, "", &defaults, &schema, &schema);
    Ok(text)
}

/// Returns the names of all settings that are not tables, such as `gateway.bind`.
pub(super) fn names() -> Vec<String> {
    let schema = schema_for!(Settings).to_value();
    let mut names = vec![];
    add_names(&mut names, "", &schema, &schema);
    names
}

fn add_names(names: &mut Vec<String>, path: &str, schema: &Json, root: &Json) {
    for name in properties(schema) {
        let full = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let inner = resolve(&schema["properties"][name], root);
        if inner["properties"].is_object() {
            add_names(names, &full, inner, root);
        } else {
            names.push(full);
        }
    }
}

/// Writes a table: first its settings, then those without a default, then the tables in it.
fn write_table(text: &mut String, path: &str, table: &Table, schema: &Json, root: &Json) {
    let is_table =
        |value: &Value| value.is_table() || value.as_array().is_some_and(|items| items.iter().any(Value::is_table));
    for (name, value) in table.iter().filter(|(_, value)| !is_table(value)) {
        describe(text, schema, name, root);
        let _ = writeln!(text, "{name} = {value}");
    }
    for name in properties(schema).filter(|name| !table.contains_key(*name)) {
        describe(text, schema, name, root);
        let _ = writeln!(text, "# {name} =");
    }
    for (name, value) in table.iter().filter(|(_, value)| is_table(value)) {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let inner = resolve(&schema["properties"][name], root);
        let _ = writeln!(text);
        describe(text, schema, name, root);
        match value {
            Value::Array(items) => {
                let item = resolve(&inner["items"], root);
                for table in items.iter().filter_map(Value::as_table) {
                    let _ = writeln!(text, "[[{path}]]");
                    write_table(text, &path, table, item, root);
                }
            }
            value => {
                let _ = writeln!(text, "[{path}]");
                write_table(text, &path, value.as_table().unwrap_or(&Table::new()), inner, root);
            }
        }
    }
}

fn properties(schema: &Json) -> impl Iterator<Item = &str> {
    schema["properties"].as_object().into_iter().flatten().map(|(name, _)| name.as_str())
}

fn describe(text: &mut String, schema: &Json, name: &str, root: &Json) {
    let property = &schema["properties"][name];
    let description = property["description"].as_str().or_else(|| resolve(property, root)["description"].as_str());
    for line in description.unwrap_or_default().lines() {
        let _ = writeln!(text, "# {line}");
    }
}

/// Resolves a schema's reference.
fn resolve<'a>(schema: &'a Json, root: &'a Json) -> &'a Json {
    let target = schema["$ref"].as_str().and_then(|reference| root.pointer(reference.trim_start_matches('#')));
    target.unwrap_or(schema)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_told_with_what_it_does() {
        let text = example().expect("written");
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if line.contains(" =") && !line.starts_with("# Every") {
                assert!(lines[number - 1].starts_with("# "), "{line} is not described");
            }
        }
        assert!(text.contains("# tls_cert ="), "settings without a default are told too");
    }
}
