//! `tether doctor`: says what is wrong, in one sentence each, and what to do about it.

use std::net::TcpListener;

use engine::{LoadOptions, VerifiedArtifact, no_progress};
use serde::Serialize;
use serde_json::Value;

use super::{Context, Outcome, process_runtime};
use crate::args::ServerArgs;
use crate::client::GatewayClient;
use crate::{output, tiny_model};

mod network;

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    well: bool,
    detail: String,
}

pub(super) async fn run(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let mut checks = vec![
        // Whoever got here has settings that read.
        check("settings", Ok(format!("region {}, {} workers", context.settings.region, context.settings.workers))),
        check("data folder", data_folder(&context)),
        check("keys", keys(&context)),
        check("engine", engine(&context).await),
    ];
    checks.extend(network::checks(&context).await);
    if client.answers().await {
        checks.push(check("gateway", Ok(format!("answers at {}", client.url()))));
        checks.push(check("API key", api_key(&client).await));
        checks.push(check("workers", workers(&client).await));
    } else if server.url.is_some() {
        checks.push(check("gateway", Err(format!("nothing answers at {}", client.url()))));
    } else {
        checks.push(check("gateway", port(&context)));
    }
    let well = checks.iter().all(|check| check.well);
    if context.json {
        output::json(&checks)?;
    } else {
        for Check { name, well, detail } in &checks {
            output::line(format!("{}  {name:<12} {detail}", if *well { "ok" } else { "!!" }));
        }
    }
    Ok(if well { Outcome::Well } else { Outcome::Finding })
}

fn check(name: &'static str, found: Result<String, String>) -> Check {
    let well = found.is_ok();
    let (Ok(detail) | Err(detail)) = found;
    Check { name, well, detail }
}

fn data_folder(context: &Context) -> Result<String, String> {
    let folder = context.data.path();
    context.data.create().map_err(|error| format!("{error:#}"))?;
    tempfile::tempfile_in(folder)
        .map_err(|error| format!("{} cannot be written: {error}; name another with --data-dir", folder.display()))?;
    Ok(folder.display().to_string())
}

/// Files that their owner alone may read.
fn keys(context: &Context) -> Result<String, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut files = vec![context.data.api_key_file(), context.data.path().join("pepper")];
    if let Ok(nodes) = std::fs::read_dir(context.data.path().join("nodes")) {
        files.extend(nodes.flatten().map(|node| node.path()));
    }
    let mut count = 0;
    for file in files {
        let Ok(metadata) = std::fs::metadata(&file) else { continue };
        count += 1;
        if metadata.permissions().mode() & 0o077 != 0 {
            return Err(format!("{0} can be read by others; run: chmod 600 {0}", file.display()));
        }
    }
    Ok(if count == 0 { "made at the first start".to_owned() } else { format!("{count} files, private") })
}

/// Loads the model that comes with the program, in a process of its own, as a worker would.
async fn engine(context: &Context) -> Result<String, String> {
    let text = |error: &dyn std::fmt::Display| format!("the built-in model does not load: {error}");
    let mut file = tempfile::tempfile_in(context.data.path()).map_err(|error| text(&error))?;
    std::io::Write::write_all(&mut file, tiny_model::BYTES).map_err(|error| text(&error))?;
    let artifact = VerifiedArtifact {
        file,
        sha256: tiny_model::digest().to_string(),
        bytes: tiny_model::BYTES.len() as u64,
        parts: vec![],
    };
    let runtime = process_runtime().map_err(|error| text(&error))?;
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let loaded = runtime.load(artifact, options, no_progress()).await.map_err(|error| text(&error))?;
    let detail = runtime.describe().detail;
    runtime.unload(loaded.id).await.map_err(|error| text(&error))?;
    Ok(format!("loads the built-in model; {detail}"))
}

async fn api_key(client: &GatewayClient) -> Result<String, String> {
    let models: Value = client.get("/v1/models").await.map_err(|error| format!("{error:#}"))?;
    Ok(format!("good; {} models", models["data"].as_array().map_or(0, Vec::len)))
}

async fn workers(client: &GatewayClient) -> Result<String, String> {
    match client.get::<Value>("/readyz").await {
        Ok(_) => Ok("a model is ready".to_owned()),
        Err(error) => Err(format!("no worker has a model ready; look at `tether nodes` and the log ({error:#})")),
    }
}

fn port(context: &Context) -> Result<String, String> {
    let bind = context.settings.gateway.bind;
    match TcpListener::bind(bind) {
        Ok(_) => Ok(format!("no network runs; {bind} is free for `tether up`")),
        Err(error) => Err(format!("{bind} cannot be used ({error}); choose another with --bind or gateway.bind")),
    }
}
