//! `tether up`: the whole network in one process, until Ctrl-C.

use anyhow::Context as _;
use tokio::signal;

use super::{Context, Outcome, shipped, spinner};
use crate::adopt;
use crate::network::Network;
use crate::output;

pub(super) async fn run(mut context: Context) -> anyhow::Result<Outcome> {
    tokio::select! {
        adopted = adopt::adopt(&mut context.settings) => adopted?,
        asked = asked_to_stop() => return asked.map(|()| Outcome::Well),
    }
    let mut network = Network::start(&context.settings, &context.data, shipped()).await?;
    let waiting = spinner("loading models");
    let ready = tokio::select! {
        ready = network.ready() => ready,
        asked = asked_to_stop() => {
            waiting.finish_and_clear();
            asked?;
            network.stop().await?;
            return Ok(Outcome::Well);
        }
    };
    waiting.finish_and_clear();
    if let Err(error) = ready {
        // The network goes on trying; whoever watches should know.
        output::line(format!("not every model is ready: {error:#}"));
    }
    greet(&context, &network);
    let broken = tokio::select! {
        asked = asked_to_stop() => { asked?; None }
        error = network.broken() => Some(error),
    };
    output::line("stopping");
    let stopped = network.stop().await;
    match broken {
        Some(error) => Err(error),
        None => stopped.map(|()| Outcome::Well),
    }
}

fn greet(context: &Context, network: &Network) {
    let url = network.url();
    let key =
        if network.key_is_new { format!("{}  (made just now)", network.api_key) } else { network.api_key.clone() };
    let file = context.data.api_key_file();
    output::line(format!(
        "\nTether is up: {} workers in region {}\n\n  OpenAI address  {url}/v1\n  API key         {key}\n  \
         kept in         {}\n\nTry it:\n\n  curl {url}/v1/chat/completions \\\n    -H \"Authorization: Bearer $(cat {})\" \
         \\\n    -H 'Content-Type: application/json' \\\n    -d '{{\"model\":\"tether-tiny\",\"messages\":[{{\"role\":\"user\",\"content\":\"What is the capital of Japan?\"}}]}}'\
         \n\nNext:\n\n  tether run tether-tiny \"What is 3 + 4?\"\n  tether nodes\n  tether token create --name laptop\n  \
         tether doctor\n\nCtrl-C stops it.\n",
        network.workers.len(),
        context.settings.region,
        file.display(),
        file.display(),
    ));
}

/// Waits for Ctrl-C or a request to end.
pub(super) async fn asked_to_stop() -> anyhow::Result<()> {
    let mut terminate = signal::unix::signal(signal::unix::SignalKind::terminate()).context("no signals")?;
    tokio::select! {
        interrupted = signal::ctrl_c() => interrupted.context("no signals"),
        _ = terminate.recv() => Ok(()),
    }
}
