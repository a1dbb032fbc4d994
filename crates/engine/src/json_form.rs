//! How JSON is written where a form demands it.

use serde_json::{Value, json};

/// Sets how llguidance reads a schema; nobody else may.
pub(crate) fn with_options(schema: &Value) -> Value {
    let mut schema = match schema {
        // Only an object takes options.
        Value::Bool(true) => json!({}),
        other => other.clone(),
    };
    if let Some(keywords) = schema.as_object_mut() {
        let options = json!({
            // Alternatives that exclude each other need not be proved to.
            "coerce_one_of": true,
            // A weak model would fill its answer with blanks, which every schema allows otherwise.
            "whitespace_flexible": false,
            "item_separator": ", ?",
            "key_separator": ": ?",
        });
        keywords.insert("x-guidance".into(), options);
    }
    schema
}
