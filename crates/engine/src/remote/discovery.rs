//! Detects a server's software and its models.

use std::time::Duration;

use serde_json::json;

use super::dialect::{Dialect, Listed, add_show, read_lm_studio, read_models, read_props, read_tags};
use super::http_client::{HttpClient, HttpError, ServerAddress};

/// The maximum number of models that are read from one server; further ones are ignored.
pub const MODELS_MAX: usize = 256;

/// A server and its models.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub dialect: Dialect,
    pub models: Vec<Listed>,
}

/// Asks a server for its models, and then for the details that its dialect offers. Each response may take `within`.
pub(super) async fn survey(http: &HttpClient, server: &ServerAddress, within: Duration) -> Result<Survey, HttpError> {
    let models = http.get(server, "/v1/models", within).await?;
    let (mut models, dialect) = read_models(&models).ok_or(HttpError::NoModels)?;
    let answer = async |path| http.get(server, path, within).await.ok();
    let dialect = if let Some(dialect) = dialect {
        if dialect == Dialect::LlamaServer
            && let Some(context) = answer("/props").await.and_then(|props| read_props(&props))
        {
            for model in &mut models {
                model.context_length = Some(context);
            }
        }
        dialect
    } else if let Some(tags) = answer("/api/tags").await.and_then(|tags| read_tags(&tags)) {
        models = tags;
        models.truncate(MODELS_MAX);
        for model in &mut models {
            if let Ok(show) = http.ask(server, "/api/show", &json!({"model": model.name}), within).await {
                add_show(model, &show);
            }
        }
        Dialect::Ollama
    } else if let Some(listed) = answer("/api/v0/models").await.and_then(|models| read_lm_studio(&models)) {
        models = listed;
        Dialect::LmStudio
    } else {
        Dialect::Other
    };
    models.truncate(MODELS_MAX);
    Ok(Survey { dialect, models })
}

/// Returns whether a server lists a model.
pub(super) async fn lists(
    http: &HttpClient,
    server: &ServerAddress,
    model: &str,
    within: Duration,
) -> Result<bool, HttpError> {
    let body = http.get(server, "/v1/models", within).await?;
    let listed = read_models(&body).is_some_and(|(models, _)| models.iter().any(|listed| listed.name == model));
    Ok(listed)
}
