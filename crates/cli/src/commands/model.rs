//! `tether model`: looks at the models of the network.

use serde_json::Value;

use super::{Context, Outcome};
use crate::args::ServerArgs;
use crate::client::GatewayClient;
use crate::output;

pub(super) async fn list(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let models: Value = client.models().await?;
    if context.json {
        output::json(&models)?;
        return Ok(Outcome::Well);
    }
    let text = |model: &Value, field: &str| match &model[field] {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Array(items) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    };
    let rows: Vec<Vec<String>> = models["data"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|model| {
            let digest: String = text(model, "digest").chars().take(12).collect();
            vec![
                text(model, "id"),
                text(model, "state"),
                text(model, "context_length"),
                text(model, "replicas"),
                digest,
            ]
        })
        .collect();
    output::table(&["MODEL", "STATE", "CONTEXT", "REPLICAS", "DIGEST"], &rows);
    Ok(Outcome::Well)
}
