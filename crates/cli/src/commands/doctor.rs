//! `tether doctor`: says what is wrong, in one sentence each, and what to do about it.

use std::net::TcpListener;

use engine::{LoadOptions, VerifiedArtifact, no_progress};
use serde::Serialize;
use serde_json::Value;

use super::{Context, Outcome, process_runtime};
use crate::args::ServerArgs;
use crate::client::{GatewayClient, Presence};
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
    let roles = context.data.roles();
    match client.presence().await {
        Presence::Answers => {
            checks.push(check("gateway", gateway(&client).await));
            checks.push(check("API key", api_key(&client).await));
            checks.push(check("workers", workers(&client).await));
        }
        Presence::Closed(error) => checks.push(check("gateway", Err(format!("{error:#}")))),
        Presence::Absent(error) if server.url.is_some() => checks.push(check("gateway", Err(format!("{error:#}")))),
        Presence::Absent(_) if roles.contains(&"gateway") || roles.contains(&"up") => {
            let told = format!(
                "the gateway of this machine does not answer at {}; start it with `tether start`, or look at its log",
                client.url()
            );
            checks.push(check("gateway", Err(told)));
        }
        Presence::Absent(_) if roles.is_empty() => checks.push(check("gateway", port(&context))),
        Presence::Absent(_) => {}
    }
    let well = checks.iter().all(|check| check.well);
    if context.json {
        output::json(&checks)?;
    } else {
        for Check { name, well, detail } in &checks {
            output::line(format!("{}  {name:<13} {detail}", if *well { "ok" } else { "!!" }));
        }
        output::line(format!("\n{}", summary(&checks)));
    }
    Ok(if well { Outcome::Well } else { Outcome::Finding })
}

/// Says in a line how it stands. Checks come in the order in which things depend on each other, so that the first that
/// fails is the likeliest cause; only a running network needs no bootstrap node.
fn summary(checks: &[Check]) -> String {
    let mut wrong: Vec<&Check> = checks.iter().filter(|check| !check.well).collect();
    wrong.sort_by_key(|check| check.name == "bootstrap");
    match wrong[..] {
        [] => "all is well".to_owned(),
        [one] => format!("one thing is wrong: {}: {}", one.name, one.detail),
        [first, ..] => {
            format!("{} things are wrong; the likeliest cause is {}: {}", wrong.len(), first.name, first.detail)
        }
    }
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

/// Says whether the gateway answers, and whether it does so on its own.
async fn gateway(client: &GatewayClient) -> Result<String, String> {
    let ready: Value = client.get("/readyz").await.unwrap_or_default();
    let seconds = |name: &str| ready.get(name).and_then(Value::as_u64);
    match (seconds("registry_silent_secs"), seconds("closes_in_secs")) {
        (Some(silent), Some(left)) => Err(format!(
            "the gateway at {} has had no answer of a registry for {silent} s; it goes on with the keys, models and rules \
             it knows for another {left} s and refuses everything then; see that the registry runs",
            client.url()
        )),
        _ => Ok(format!("answers at {}", client.url())),
    }
}

async fn workers(client: &GatewayClient) -> Result<String, String> {
    match client.get::<Value>("/readyz").await {
        Ok(_) => Ok("a model is ready".to_owned()),
        Err(error) => Err(format!("{error:#}; look at `tether nodes` and the log")),
    }
}

fn port(context: &Context) -> Result<String, String> {
    let bind = context.settings.gateway.bind;
    match TcpListener::bind(bind) {
        Ok(_) => Ok(format!("no network runs; {bind} is free for `tether up`")),
        Err(error) => Err(format!("{bind} cannot be used ({error}); choose another with --bind or gateway.bind")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_names_the_first_thing_that_others_depend_on() {
        let well = || check("registry", Ok("answers".into()));
        let wrong = |name| check(name, Err(format!("{name} is away")));
        assert_eq!(summary(&[well()]), "all is well");
        assert_eq!(summary(&[well(), wrong("clock")]), "one thing is wrong: clock: clock is away");
        let told = summary(&[wrong("bootstrap"), wrong("orchestrators"), wrong("workers")]);
        assert_eq!(told, "3 things are wrong; the likeliest cause is orchestrators: orchestrators is away");
    }
}
