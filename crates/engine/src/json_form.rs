//! The JSON layout that constraints require.

use serde_json::{Map, Value, json};

/// The keyword under which llguidance reads options, in the outermost schema.
const OPTIONS: &str = "x-guidance";
/// Keywords whose value maps names to schemas.
const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords whose value is a schema or a list of them.
const PARTS: [&str; 12] = [
    "items",
    "prefixItems",
    "additionalProperties",
    "additionalItems",
    "unevaluatedProperties",
    "contains",
    "anyOf",
    "oneOf",
    "allOf",
    "not",
    "if",
    "then",
];
/// Keywords whose value may be null.
const VALUES: [&str; 4] = ["const", "default", "enum", "examples"];

/// Sets llguidance's options for a schema. Of the options that a caller set, only `lenient` is kept.
pub(crate) fn with_options(schema: &Value) -> Value {
    let mut schema = match schema {
        // Only an object can carry options.
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    let lenient = is_lenient(&schema);
    if lenient {
        each_schema(&mut schema, &mut leave_out);
    }
    if let Some(keywords) = schema.as_object_mut() {
        let options = json!({
            "lenient": lenient,
            // Without this, llguidance rejects alternatives that it cannot prove to be mutually exclusive.
            "coerce_one_of": true,
            // Without this, every schema allows arbitrary whitespace, and a weak model would fill its answer with it.
            "whitespace_flexible": false,
            "item_separator": ", ?",
            "key_separator": ": ?",
        });
        keywords.insert(OPTIONS.into(), options);
    }
    schema
}

/// Returns whether keywords that a grammar cannot enforce are dropped from the schema, not refused.
pub(crate) fn is_lenient(schema: &Value) -> bool {
    schema[OPTIONS]["lenient"] == true
}

/// Marks a schema as lenient.
pub(crate) fn make_lenient(schema: &mut Value) {
    if let Some(keywords) = schema.as_object_mut() {
        keywords.insert(OPTIONS.into(), json!({ "lenient": true }));
    }
}

/// Removes the options that [`make_lenient`] wrote, for readers other than llguidance. Returns whether the schema was
/// lenient.
#[cfg(any(feature = "remote", test))]
pub(crate) fn take_lenient(schema: &mut Value) -> bool {
    let lenient = is_lenient(schema);
    if let Some(keywords) = schema.as_object_mut() {
        keywords.remove(OPTIONS);
    }
    lenient
}

/// Forbids additional properties in every schema that names its properties and does not mention others: a weak model
/// would invent properties without end. The parts of an `allOf` would forbid each other's properties, so a schema
/// with one is left unchanged.
pub(crate) fn close(schema: &mut Value) {
    let mut has_all_of = false;
    each_schema(schema, &mut |keywords| has_all_of |= keywords.contains_key("allOf"));
    if has_all_of {
        return;
    }
    each_schema(schema, &mut |keywords| {
        if keywords.get("properties").is_some_and(Value::is_object) && !keywords.contains_key("unevaluatedProperties") {
            keywords.entry("additionalProperties").or_insert(Value::Bool(false));
        }
    });
}

/// Drops null keywords, which schema generators write, and patterns that a finite automaton cannot match.
fn leave_out(keywords: &mut Map<String, Value>) {
    keywords.retain(|keyword, value| match value {
        Value::Null => VALUES.contains(&keyword.as_str()),
        Value::String(pattern) if keyword == "pattern" => !looks_around(pattern),
        _ => true,
    });
    if let Some(Value::Object(patterns)) = keywords.get_mut("patternProperties") {
        patterns.retain(|pattern, _| !looks_around(pattern));
    }
}

/// Returns whether a regular expression has a lookaround or a backreference.
fn looks_around(pattern: &str) -> bool {
    let refers_back = pattern.as_bytes().windows(2).any(|pair| pair[0] == b'\\' && (b'1'..=b'9').contains(&pair[1]));
    refers_back || ["(?=", "(?!", "(?<=", "(?<!", "(?P=", "\\k<"].iter().any(|part| pattern.contains(part))
}

fn each_schema(schema: &mut Value, visit: &mut dyn FnMut(&mut Map<String, Value>)) {
    let Some(keywords) = schema.as_object_mut() else { return };
    visit(keywords);
    for (keyword, value) in keywords.iter_mut() {
        match value {
            Value::Object(parts) if MAPS.contains(&keyword.as_str()) => {
                for part in parts.values_mut() {
                    each_schema(part, visit);
                }
            }
            Value::Array(parts) if PARTS.contains(&keyword.as_str()) => {
                for part in parts {
                    each_schema(part, visit);
                }
            }
            part if PARTS.contains(&keyword.as_str()) => each_schema(part, visit),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_closed_unless_they_speak_of_other_properties() {
        let closed = |mut schema: Value| {
            close(&mut schema);
            schema
        };
        let open = json!({
            "properties": {
                "a": { "type": "object", "properties": {} },
                "b": { "items": { "properties": { "c": {} }, "additionalProperties": true } },
                "d": { "type": "object" },
                "e": { "additionalProperties": { "type": "string" } },
            },
            "$defs": { "f": { "anyOf": [{ "properties": { "g": {} } }] } },
        });
        let expected = json!({
            "properties": {
                "a": { "type": "object", "properties": {}, "additionalProperties": false },
                "b": { "items": { "properties": { "c": {} }, "additionalProperties": true } },
                "d": { "type": "object" },
                "e": { "additionalProperties": { "type": "string" } },
            },
            "$defs": { "f": { "anyOf": [{ "properties": { "g": {} }, "additionalProperties": false }] } },
            "additionalProperties": false,
        });
        assert_eq!(closed(open), expected);
        let joined = json!({ "allOf": [{ "properties": { "a": {} } }, { "properties": { "b": {} } }] });
        assert_eq!(closed(joined.clone()), joined);
    }

    #[test]
    fn a_lenient_reading_leaves_out_what_cannot_be_kept() {
        let mut schema = json!({
            "type": "object", "title": null,
            "properties": { "a": { "pattern": "^(?!x)", "const": null }, "b": { "pattern": "^x$" }, "c": { "properties": null } },
        });
        assert_eq!(with_options(&schema)["properties"]["a"]["pattern"], "^(?!x)");
        make_lenient(&mut schema);
        let read = with_options(&schema);
        let expected = json!({ "a": { "const": null }, "b": { "pattern": "^x$" }, "c": {} });
        assert_eq!((&read["properties"], &read["x-guidance"]["lenient"]), (&expected, &Value::Bool(true)));
        assert!(take_lenient(&mut schema) && schema.get("x-guidance").is_none());
    }
}
