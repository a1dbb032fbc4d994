//! Limits of constraints, and the search for the part of a schema that is at fault.

use serde_json::Value;

/// The maximum length of a schema, an expression or a grammar, in bytes.
const BYTES_MAX: usize = 128 << 10;
/// The maximum nesting depth of a schema.
const DEPTH_MAX: usize = 64;
/// The maximum count of items or properties; each takes a symbol of the grammar.
const COUNT_MAX: u64 = 4_096;
/// The maximum number of property name patterns in all; each is compared with every other.
const PATTERNS_MAX: usize = 64;
/// The maximum number of parts of a schema that are tried to find the fault.
const TRIES_MAX: usize = 64;

/// Keywords whose value maps names to schemas.
const MAPS: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];
/// Keywords whose value is a schema or a list of them.
const PARTS: [&str; 8] =
    ["items", "prefixItems", "additionalProperties", "additionalItems", "anyOf", "oneOf", "allOf", "not"];

/// Rejects a text that is too long.
pub(super) fn check_text(text: &str) -> Result<(), String> {
    if text.len() > BYTES_MAX { Err(format!("it is longer than {BYTES_MAX} bytes")) } else { Ok(()) }
}

/// Rejects a grammar that is too long or that contains a schema beyond the limits.
pub(super) fn check_lark(grammar: &str) -> Result<(), String> {
    check_text(grammar)?;
    for after in grammar.split("%json").skip(1) {
        // The compiler reports invalid JSON, since it knows the line.
        if let Some(Ok(schema)) = serde_json::Deserializer::from_str(after).into_iter::<Value>().next() {
            check_schema(&schema)?;
        }
    }
    Ok(())
}

/// Rejects a schema that exceeds a limit the compiler does not enforce, and names the place.
pub(super) fn check_schema(schema: &Value) -> Result<(), String> {
    if !schema.is_object() && !schema.is_boolean() {
        return Err("a schema is an object".into());
    }
    let mut size = Size { bytes: BYTES_MAX, patterns: PATTERNS_MAX };
    size.take(schema, &mut Vec::new())
}

/// The remaining budget for the rest of a schema.
struct Size {
    bytes: usize,
    patterns: usize,
}

impl Size {
    fn take<'a>(&mut self, value: &'a Value, path: &mut Vec<&'a str>) -> Result<(), String> {
        if path.len() > DEPTH_MAX {
            return Err(format!("it nests deeper than {DEPTH_MAX}"));
        }
        let bytes = match value {
            Value::String(text) => text.len() + 2,
            Value::Array(parts) => parts.len() + 2,
            Value::Object(parts) => parts.keys().map(|key| key.len() + 4).sum::<usize>() + 2,
            _ => 4,
        };
        self.bytes = self.bytes.checked_sub(bytes).ok_or_else(|| format!("it is longer than {BYTES_MAX} bytes"))?;
        match value {
            Value::Array(parts) => parts.iter().try_for_each(|part| self.enter("-", part, path)),
            Value::Object(parts) => parts.iter().try_for_each(|(key, part)| {
                self.check_keyword(key, part).map_err(|reason| format!("at {}: {reason}", pointer(path, key)))?;
                self.enter(key, part, path)
            }),
            _ => Ok(()),
        }
    }

    fn enter<'a>(&mut self, key: &'a str, part: &'a Value, path: &mut Vec<&'a str>) -> Result<(), String> {
        path.push(key);
        self.take(part, path)?;
        path.pop();
        Ok(())
    }

    fn check_keyword(&mut self, key: &str, value: &Value) -> Result<(), String> {
        match key {
            "minItems" | "maxItems" | "minProperties" | "maxProperties"
                if value.as_f64().is_some_and(|count| count > COUNT_MAX as f64) =>
            {
                return Err(format!("at most {COUNT_MAX} can be counted"));
            }
            "patternProperties" => {
                let patterns = value.as_object().map_or(0, serde_json::Map::len);
                self.patterns = self
                    .patterns
                    .checked_sub(patterns)
                    .ok_or_else(|| format!("at most {PATTERNS_MAX} patterns can be told apart"))?;
            }
            _ => {}
        }
        Ok(())
    }
}

fn pointer(path: &[&str], key: &str) -> String {
    path.iter().chain([&key]).flat_map(|step| ["/", step]).collect()
}

/// Finds the smallest part that is faulty by itself. Returns its JSON pointer, empty for the whole schema, and the
/// fault.
pub(super) fn locate(schema: &Value, fault: String, find_fault: impl Fn(&Value) -> Option<String>) -> (String, String) {
    let mut found = (String::new(), fault);
    let mut within = schema;
    let mut tries = 0;
    'descend: loop {
        for (path, part) in parts(within) {
            tries += 1;
            if tries > TRIES_MAX {
                return found;
            }
            if let Some(fault) = find_fault(&with_definitions(part, schema)) {
                found = (found.0 + &path, fault);
                within = part;
                continue 'descend;
            }
        }
        return found;
    }
}

/// Returns the direct subschemas of a schema, with their JSON pointers.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let maps = MAPS.into_iter().filter_map(|key| Some((key, schema.get(key)?.as_object()?)));
    let named = maps.flat_map(|(key, map)| map.iter().map(move |(name, part)| (format!("/{key}/{name}"), part)));
    let held = PARTS.into_iter().filter_map(|key| Some((key, schema.get(key)?)));
    let listed = held.flat_map(|(key, value)| match value {
        Value::Array(parts) => parts.iter().zip(0..).map(|(part, index)| (format!("/{key}/{index}"), part)).collect(),
        part => vec![(format!("/{key}"), part)],
    });
    named.chain(listed).filter(|(_, part)| part.is_object()).collect()
}

/// Copies the definitions of the whole schema into a part, so that the part can refer to them.
fn with_definitions(part: &Value, whole: &Value) -> Value {
    let mut part = part.clone();
    if let Some(keywords) = part.as_object_mut() {
        for key in ["$defs", "definitions"] {
            if let Some(definitions) = whole.get(key) {
                keywords.entry(key).or_insert_with(|| definitions.clone());
            }
        }
    }
    part
}
