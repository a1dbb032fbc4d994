//! `tether doctor`: reports what is wrong, in one sentence each, and what to do about it.

use std::collections::BTreeSet;
use std::net::TcpListener;

use engine::{LoadOptions, Sandbox, VerifiedArtifact, no_progress};
use protocol::control::Fleet;
use protocol::health::ModelState;
use protocol::model::ModelKey;
use serde::Serialize;
use serde_json::Value;

use super::{Context, Outcome, nodes, process_runtime};
use crate::args::ServerArgs;
use crate::client::{GatewayClient, Presence};
use crate::output::Look;
use crate::settings::Settings;
use crate::{output, tiny_model};

mod devices;
mod network;

/// The result of one check.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    /// Whether the network can answer as far as this check goes.
    well: bool,
    /// Whether it deserves attention all the same.
    doubtful: bool,
    detail: String,
}

pub(super) async fn run(context: Context, server: &ServerArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(server, &context.settings, &context.data, &context.env)?;
    let mut checks = vec![
        // The settings are valid, or the command would not have got here.
        check("settings", Ok(settings(&context))),
        check("data folder", data_folder(&context)),
        check("keys", keys(&context)),
    ];
    checks.extend(engine(&context).await);
    checks.extend(devices::checks(&context.settings).await);
    checks.extend(network::checks(&context).await);
    let roles = context.data.roles();
    match client.presence().await {
        Presence::Answers => {
            checks.push(check("gateway", gateway(&client).await));
            checks.push(check("API key", api_key(&client).await));
            let fleet = client.get::<Fleet>("/admin/v1/nodes").await.unwrap_or_default();
            checks.push(workers(&client, &fleet).await);
            checks.extend(devices::device_placements(&fleet));
        }
        Presence::Closed(error) | Presence::Foreign(error) => {
            checks.push(check("gateway", Err(format!("{error:#}"))));
        }
        Presence::Absent(error) if server.url.is_some() => checks.push(check("gateway", Err(format!("{error:#}")))),
        Presence::Absent(_) if roles.contains(&"gateway") || roles.contains(&"up") => {
            let reason = format!(
                "the gateway of this machine does not answer at {}; start it with `tether start`, or look at its log",
                client.url()
            );
            checks.push(check("gateway", Err(reason)));
        }
        Presence::Absent(_) if roles.is_empty() => checks.push(check("gateway", port(&context))),
        Presence::Absent(_) => {}
    }
    let well = checks.iter().all(|check| check.well);
    if context.json {
        output::json(&checks)?;
    } else {
        for Check { name, well, doubtful, detail } in &checks {
            let (look, mark) = match (well, doubtful) {
                (false, _) => (Look::Bad, "!!"),
                (true, true) => (Look::Doubtful, "! "),
                (true, false) => (Look::Good, "ok"),
            };
            let detail = output::harmless(detail);
            output::shown(format!("{}  {name:<13} {detail}", output::looking(look, mark)));
        }
        output::line(format!("\n{}", summary(&checks)));
    }
    Ok(if well { Outcome::Well } else { Outcome::Finding })
}

/// Returns a summary line. Checks are in the order of their dependencies, so that the first failed one is the likeliest
/// cause. Only the bootstrap check comes last: a running network needs no bootstrap node.
fn summary(checks: &[Check]) -> String {
    let mut wrong: Vec<&Check> = checks.iter().filter(|check| !check.well).collect();
    wrong.sort_by_key(|check| check.name == "bootstrap");
    match wrong[..] {
        [] => match checks.iter().filter(|check| check.doubtful).count() {
            0 => "all is well".to_owned(),
            count => format!("nothing stands in the way; look at the {} marked with !", output::counted(count, "line")),
        },
        [one] => format!("one thing is wrong: {}: {}", one.name, one.detail),
        [first, ..] => {
            format!("{} things are wrong; the likeliest cause is {}: {}", wrong.len(), first.name, first.detail)
        }
    }
}

fn check(name: &'static str, found: Result<String, String>) -> Check {
    let well = found.is_ok();
    let (Ok(detail) | Err(detail)) = found;
    Check { name, well, doubtful: false, detail }
}

fn settings(context: &Context) -> String {
    let Settings { region, workers, .. } = &context.settings;
    format!("region {region}, {} in `tether up`", output::counted(*workers as usize, "worker"))
}

fn data_folder(context: &Context) -> Result<String, String> {
    let folder = context.data.path();
    context.data.create().map_err(|error| format!("{error:#}"))?;
    tempfile::tempfile_in(folder)
        .map_err(|error| format!("{} cannot be written: {error}; name another with --data-dir", folder.display()))?;
    Ok(folder.display().to_string())
}

/// Checks that only their owner may read the key files, and the folder with the stores.
fn keys(context: &Context) -> Result<String, String> {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = context.data.path();
    if std::fs::metadata(folder).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0) {
        return Err(format!("others can read the folder {0}; run: chmod 700 {0}", folder.display()));
    }
    let mut files = vec![context.data.api_key_file()];
    files.extend(["pepper", "root.key", "gateway.secret"].map(|name| folder.join(name)));
    if let Ok(nodes) = std::fs::read_dir(folder.join("nodes")) {
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
    Ok(if count == 0 {
        "made at the first start".to_owned()
    } else {
        format!("{}, private", output::counted(count, "file"))
    })
}

/// Loads the built-in model in a process of its own, as a worker would, and reports how that process closed its
/// sandbox.
async fn engine(context: &Context) -> Vec<Check> {
    match load_the_built_in_model(context).await {
        Ok((detail, sandbox)) => {
            let engine = check("engine", Ok(format!("loads the built-in model; {detail}")));
            [Some(engine), sandbox.map(|sandbox| sandbox_check(&sandbox))].into_iter().flatten().collect()
        }
        Err(error) => vec![check("engine", Err(format!("the built-in model does not load: {error}")))],
    }
}

fn sandbox_check(sandbox: &Sandbox) -> Check {
    Check { doubtful: !sandbox.is_complete(), ..check("sandbox", Ok(sandbox.to_string())) }
}

async fn load_the_built_in_model(context: &Context) -> Result<(String, Option<Sandbox>), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut file = tempfile::tempfile_in(context.data.path()).map_err(|error| text(&error))?;
    std::io::Write::write_all(&mut file, tiny_model::BYTES).map_err(|error| text(&error))?;
    let artifact = VerifiedArtifact {
        file,
        sha256: tiny_model::digest().to_string(),
        bytes: tiny_model::BYTES.len() as u64,
        parts: vec![],
    };
    let runtime = process_runtime().map_err(|error| text(&error))?;
    // The same options as a worker's, so that a GPU is tested too.
    let sandbox = context.settings.worker.engine_sandbox;
    let options = LoadOptions { threads: 1, gpu_layers: None, sandbox, ..LoadOptions::default() };
    let loaded = runtime.load(artifact, options, no_progress()).await.map_err(|error| text(&error))?;
    let detail = runtime.describe().detail;
    runtime.unload(loaded.id).await.map_err(|error| text(&error))?;
    Ok((detail, loaded.sandbox))
}

async fn api_key(client: &GatewayClient) -> Result<String, String> {
    let models: Value = client.get("/v1/models").await.map_err(|error| format!("{error:#}"))?;
    Ok(format!("good; {} listed", output::counted(models["data"].as_array().map_or(0, Vec::len), "model")))
}

/// Returns an error if the gateway, which responds, no longer hears from a registry.
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

/// Returns whether models are ready, and which are not. Only an operator's key may see which.
async fn workers(client: &GatewayClient, fleet: &Fleet) -> Check {
    let ready = client.get::<Value>("/readyz").await;
    models(ready.map(drop).map_err(|error| format!("{error:#}")), fleet)
}

fn models(ready: Result<(), String>, fleet: &Fleet) -> Check {
    let failed: Vec<String> = nodes::failures(fleet)
        .map(|(worker, model, why)| format!("{model} on {} is in error: {why}", worker.short()))
        .collect();
    let cached = fleet.workers.iter().flat_map(|worker| &worker.report.model_cache);
    let ready_keys: BTreeSet<&ModelKey> =
        cached.filter(|model| model.state == ModelState::Ready).map(|model| &model.key).collect();
    let detail = match ready {
        Ok(()) if ready_keys.is_empty() => Ok("a model is ready".to_owned()),
        Ok(()) => {
            let verb = if ready_keys.len() == 1 { "is" } else { "are" };
            Ok(format!("{} {verb} ready", output::counted(ready_keys.len(), "model")))
        }
        Err(error) if failed.is_empty() => Err(format!("{error}; look at `tether nodes` and the log")),
        Err(error) => Err(error),
    };
    let doubtful = !failed.is_empty();
    let all = |detail: String| [vec![detail], failed.clone()].concat().join("; ");
    Check { doubtful, ..check("workers", detail.map(all).map_err(all)) }
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
    use engine::Target;
    use protocol::control::FleetWorker;

    use super::*;

    #[test]
    fn a_failed_model_is_told_beside_one_that_is_ready() {
        let text = r#"{"v":1,"workerId":"KEY","pubKey":"KEY","region":"local","gpuClass":"cpu","vramGB":0,"accelerators":[],
            "capacity":{"slots":1,"running":0,"waiting":0,"queueMax":1},"supported":[],"latencyHops":0,"epoch":1,"seq":1,
            "issuedAt":0,"notAfter":1,"modelCache":[
                {"modelId":"good","version":"1.0","digest":"KEY","state":"ready"},
                {"modelId":"bad","version":"1.0","digest":"KEY","state":"error","reason":"it is\u001b[2Jcut"}]}"#;
        let report = serde_json::from_str(&text.replace("KEY", &"ab".repeat(32))).expect("a report");
        let fleet = Fleet { workers: vec![FleetWorker { report, age_ms: 0, reserved: 0, shortened: false }] };
        let check = models(Ok(()), &fleet);
        assert_eq!(check.detail, "1 model is ready; bad@1.0 on abababab is in error: it is\\u{1b}[2Jcut");
        assert!(check.well && check.doubtful);
        assert!(summary(&[check]).starts_with("nothing stands in the way"));
        let check = models(Err("no worker has a model ready".into()), &fleet);
        assert!(!check.well && check.detail.contains("bad@1.0"), "{check:?}");
        assert_eq!(models(Ok(()), &Fleet::default()).detail, "a model is ready");
    }

    #[test]
    fn a_sandbox_with_gaps_deserves_attention_and_says_what_is_missing() {
        let closed = vec![Target::Network, Target::Processes];
        let on = |gaps| Sandbox::On { closed: closed.clone(), gaps, means: vec!["seccomp".into()] };
        let whole = sandbox_check(&on(vec![]));
        assert!(whole.well && !whole.doubtful);
        assert_eq!(whole.detail, "no network, no other processes (seccomp)");
        let gap = sandbox_check(&on(vec!["files within reach: this kernel has no Landlock".into()]));
        assert!(gap.well && gap.doubtful && gap.detail.ends_with("no Landlock"), "{gap:?}");
        let off = sandbox_check(&Sandbox::Off);
        assert!(off.doubtful && off.detail.contains("worker.engine_sandbox"), "{off:?}");
    }

    #[test]
    fn the_last_line_names_the_first_thing_that_others_depend_on() {
        let well = || check("registry", Ok("answers".into()));
        let wrong = |name| check(name, Err(format!("{name} is away")));
        assert_eq!(summary(&[well()]), "all is well");
        assert_eq!(summary(&[well(), wrong("clock")]), "one thing is wrong: clock: clock is away");
        let line = summary(&[wrong("bootstrap"), wrong("orchestrators"), wrong("workers")]);
        assert_eq!(line, "3 things are wrong; the likeliest cause is orchestrators: orchestrators is away");
    }
}
