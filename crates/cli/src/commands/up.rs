//! `tether up`: the whole network in one process, until Ctrl-C.

use std::convert::Infallible;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::signal;
use tokio_util::sync::CancellationToken;
use worker::Adoption;

use super::{Context, Outcome, model_add, shipped};
use crate::addresses;
use crate::args::ServerArgs;
use crate::download::is_source;
use crate::local_models;
use crate::metrics_server::MetricsServer;
use crate::model_caches;
use crate::network::Network;
use crate::output;
use crate::tiny_model;

pub(super) async fn run(mut context: Context) -> anyhow::Result<Outcome> {
    let is_web = |text: &String| is_source(local_models::split(text).1);
    let (sources, files): (Vec<_>, _) = context.settings.models.drain(..).partition(is_web);
    context.settings.models = files;
    for source in sources {
        // It is served like every added model.
        Box::pin(model_add::of_source(&context, &ServerArgs::default(), &source)).await?;
    }
    local_models::take_in(&mut context.settings, &context.data).await?;
    let stop = context.stop.clone();
    // Checked before anything starts: a URL may be invalid.
    let adoption = context.settings.adopt.as_deref().map(Adoption::new).transpose()?;
    let mut network = Network::start(&context.settings, &context.data, shipped()).await?;
    let metrics = match MetricsServer::open(&context.settings, &network.metrics.exposition).await {
        Ok(metrics) => metrics,
        Err(error) => {
            network.stop().await?;
            return Err(error);
        }
    };
    let serving = async {
        if let Some(server) = metrics {
            server.serve().await;
        }
        std::future::pending::<()>().await;
    };
    if context.settings.network.up_listen.is_some() {
        // Other machines rely on this network, so `tether start` must be able to restart it. A trial run leaves nothing
        // behind.
        context.keep_flags()?;
    }
    // A plain line: a spinner would share its line with the log.
    output::line("loading models");
    let ready = tokio::select! {
        ready = network.ready() => ready,
        () = stop.cancelled() => {
            network.stop().await?;
            return Ok(Outcome::Well);
        }
    };
    if let Err(error) = ready {
        // The network keeps trying, but the user should know.
        output::line(format!("not every model is ready: {error:#}"));
    }
    let found = found(&context, &network).await;
    let is_awaited = network.workers.iter().all(|worker| worker.adopted_count() == 0);
    let awaited = adoption.filter(|_| is_awaited).map(|adoption| adoption.addresses());
    output::line(greeting(&context, &network, awaited.as_deref(), found.as_deref()));
    let broken = tokio::select! {
        () = stop.cancelled() => None,
        () = serving => None,
        error = network.broken() => Some(error),
    };
    output::line("stopping");
    let stopped = network.stop().await;
    match broken {
        Some(error) => Err(error),
        None => stopped.map(|()| Outcome::Well),
    }
}

/// Suggests models in another program's cache, if the network serves no model of the user's own.
async fn found(context: &Context, network: &Network) -> Option<String> {
    if network.served_models().iter().any(|key| *key != tiny_model::key()) {
        return None;
    }
    let env = context.env.clone();
    let found = tokio::task::spawn_blocking(move || model_caches::found(&env)).await.ok()?;
    let (cache, models) = found.first()?;
    let more = found.iter().map(|(_, models)| models.len()).sum::<usize>() - 1;
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let (name, word) = (models.first()?.name.escape_debug(), cache.word());
    Some(format!("Found on this machine: {name}{more}; {} model add --from {word} {name}", context.program()))
}

fn greeting(context: &Context, network: &Network, awaited: Option<&str>, found: Option<&str>) -> String {
    let greeting = Greeting {
        workers: network.workers.len(),
        region: context.settings.region.as_str(),
        models: network.served_models().iter().map(|key| key.model_id.to_string()).collect(),
        urls: addresses::urls(network.address, network.tls),
        certificate: context.settings.gateway.tls_cert.as_deref(),
        key: if network.key_is_new { format!("{}  (made just now)", network.api_key) } else { network.api_key.clone() },
        key_file: context.data.api_key_file(),
        program: context.program(),
        invite: network.invite.as_deref(),
        awaited,
        found,
    };
    greeting.to_string()
}

/// Facts to print about a network that has just started.
struct Greeting<'a> {
    workers: usize,
    region: &'a str,
    /// The models that are ready; the first one is used in the examples.
    models: Vec<String>,
    /// URLs of the gateway; the first works on this machine.
    urls: Vec<String>,
    certificate: Option<&'a Path>,
    key: String,
    key_file: PathBuf,
    /// The beginning of command lines for this network.
    program: String,
    /// An invite for a worker, if other machines may join.
    invite: Option<&'a str>,
    /// Models of other programs, if the user has none.
    found: Option<&'a str>,
    /// Where servers to adopt are looked for, while none responds.
    awaited: Option<&'a str>,
}

impl fmt::Display for Greeting<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workers, region, models, urls, program, .. } = self;
        let served = if models.is_empty() { "no model yet".to_owned() } else { models.join(", ") };
        let plural = if *workers == 1 { "" } else { "s" };
        writeln!(out, "\nTether is up: {workers} worker{plural} in region {region}, serving {served}\n")?;
        let url = urls.first().map_or("", String::as_str);
        writeln!(out, "  OpenAI address  {url}/v1")?;
        for url in urls.iter().skip(1) {
            writeln!(out, "  from elsewhere  {url}/v1")?;
        }
        writeln!(out, "  API key         {}", self.key)?;
        writeln!(out, "  kept in         {}", self.key_file.display())?;
        if let Some(addresses) = self.awaited {
            writeln!(out, "\nNo server to adopt answers yet at {addresses}; its models join as soon as one does.")?;
        }
        if let Some(model) = models.first() {
            let trust = self.certificate.map(|file| format!(" --cacert {}", file.display())).unwrap_or_default();
            let body = format!(
                r#"{{"model":"{model}","messages":[{{"role":"user","content":"What is the capital of Japan?"}}]}}"#
            );
            writeln!(out, "\nTry it:\n\n  curl{trust} {url}/v1/chat/completions \\")?;
            writeln!(out, "    -H \"Authorization: Bearer $(cat {})\" \\", self.key_file.display())?;
            writeln!(out, "    -H 'Content-Type: application/json' \\\n    -d '{body}'")?;
            writeln!(out, "\nNext:\n\n  {program} chat {model}\n  {program} run {model} \"What is 3 + 4?\"")?;
        } else {
            writeln!(out, "\nNo model is ready: {program} doctor says why.\n\nNext:\n")?;
        }
        writeln!(out, "  {program} nodes\n  {program} token create --name laptop\n  {program} doctor")?;
        if let Some(invite) = self.invite {
            writeln!(
                out,
                "\nOn another machine, to run jobs there, too (`{program} invite` makes a line for each further one):"
            )?;
            writeln!(out, "\n  tether join {invite}")?;
        }
        if let Some(found) = self.found {
            writeln!(out, "\n{found}")?;
        }
        writeln!(out, "\nCtrl-C stops it.")
    }
}

/// Keeps this process running when its terminal closes: SIGHUP is a request to reload, where anything can be reloaded.
/// Registering a signal handler once replaces the default action for good.
pub(super) fn outlive_terminal() -> anyhow::Result<()> {
    signal::unix::signal(signal::unix::SignalKind::hangup()).context("no signals").map(drop)
}

/// Listens for Ctrl-C and SIGTERM from this call on. The returned future cancels the token at the first of them, and
/// never completes. Call it before a command does anything that the user may want to stop.
pub(super) fn listen_for_stop(stop: CancellationToken) -> anyhow::Result<impl Future<Output = Infallible>> {
    let mut interrupt = signal::unix::signal(signal::unix::SignalKind::interrupt()).context("no signals")?;
    let mut terminate = signal::unix::signal(signal::unix::SignalKind::terminate()).context("no signals")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
        std::future::pending().await
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting() -> Greeting<'static> {
        Greeting {
            workers: 1,
            region: "local",
            models: vec!["mine".into(), "tether-tiny".into()],
            urls: vec!["http://127.0.0.1:7070".into()],
            certificate: None,
            key: "tth_live_x".into(),
            key_file: "/d/api-key".into(),
            program: "tether".into(),
            invite: None,
            found: None,
            awaited: None,
        }
    }

    #[test]
    fn the_hints_name_what_is_served_where_it_is_and_whose_it_is() {
        let text = greeting().to_string();
        assert!(text.contains("serving mine, tether-tiny"), "{text}");
        assert!(text.contains(r#""model":"mine""#) && text.contains("  tether run mine "), "{text}");
        assert!(text.contains("  tether chat mine\n"), "{text}");
        let elsewhere = Greeting {
            urls: vec!["https://127.0.0.1:1".into(), "https://192.0.2.7:1".into()],
            certificate: Some(Path::new("/c.pem")),
            program: "tether --data-dir /d".into(),
            ..greeting()
        };
        let text = elsewhere.to_string();
        assert!(text.contains("from elsewhere  https://192.0.2.7:1/v1"), "{text}");
        assert!(text.contains("curl --cacert /c.pem https://127.0.0.1:1/v1"), "{text}");
        assert!(text.contains("  tether --data-dir /d nodes"), "{text}");
    }

    #[test]
    fn a_network_that_can_be_joined_says_how() {
        assert!(!greeting().to_string().contains("tether join"));
        let text = Greeting { invite: Some("tth_join_x"), ..greeting() }.to_string();
        assert!(text.contains("\n  tether join tth_join_x\n") && text.contains("`tether invite`"), "{text}");
    }

    #[test]
    fn models_of_other_programs_are_named_with_the_command_that_adds_one() {
        let text = Greeting { found: Some("Found on this machine: llama3.2:3b"), ..greeting() }.to_string();
        assert!(text.contains("\nFound on this machine: llama3.2:3b\n"), "{text}");
    }

    #[test]
    fn a_network_without_a_model_gives_no_example_that_would_fail() {
        let text = Greeting { models: vec![], ..greeting() }.to_string();
        assert!(text.contains("tether doctor says why") && !text.contains("curl"), "{text}");
    }
}
