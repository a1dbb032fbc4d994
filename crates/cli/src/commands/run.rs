//! `tether run`: asks a model. Where no network runs, one is started for the question.

use std::io::IsTerminal as _;

use anyhow::{anyhow, bail};
use serde_json::{Value, json};

use super::{Context, Outcome, shipped, spinner};
use crate::args::RunArgs;
use crate::client::{ChatAnswer, GatewayClient, Presence, usual_url};
use crate::local_models;
use crate::network::Network;
use crate::output;

pub(super) async fn run(mut context: Context, args: RunArgs) -> anyhow::Result<Outcome> {
    let client = GatewayClient::find(&args.server, &context.settings, &context.data, &context.env)?;
    match client.presence().await {
        Presence::Answers => return ask(&client, &args, context.json).await,
        Presence::Closed(error) => return Err(error),
        Presence::Absent(error) if args.server.url.is_some() => return Err(error),
        Presence::Absent(_) => {}
    }
    // A network of another folder is likely the one that is meant.
    let usual = GatewayClient::here(&usual_url(&context.settings), None, &context.settings, &context.data)?;
    if usual.url() != client.url() && !matches!(usual.presence().await, Presence::Absent(_)) {
        bail!(
            "no network of {} runs, but one answers at {}; name its folder with --data-dir, or give --url and \
             --api-key-file",
            context.data.path().display(),
            usual.url()
        );
    }
    // Any free port: this network is nobody else's.
    context.settings.gateway.bind.set_port(0);
    context.settings.workers = 1;
    local_models::take_in(&mut context.settings, &context.data).await?;
    let waiting = spinner("no network runs here: starting one for this question");
    let network = Network::start(&context.settings, &context.data, shipped()).await?;
    let ready = network.ready().await;
    waiting.finish_and_clear();
    let asked = match ready {
        Ok(()) => {
            let key = Some(network.api_key.clone());
            let client = GatewayClient::here(&network.url(), key, &context.settings, &context.data)?;
            ask(&client, &args, context.json).await.map(drop)
        }
        Err(error) => Err(error),
    };
    network.stop().await?;
    asked?;
    output::note(format!(
        "no network of {} ran: one was started for this question and has ended; `{} up` keeps one running",
        context.data.path().display(),
        context.program()
    ));
    Ok(Outcome::Well)
}

/// Returns what to say of a model that the network does not have, with the name that may be meant. Returns nothing where
/// the network has it, or does not say.
async fn missing_model(client: &GatewayClient, asked: &str) -> Option<anyhow::Error> {
    let listed: Value = client.models().await.ok()?;
    let names: Vec<&str> = listed["data"].as_array()?.iter().filter_map(|model| model["id"].as_str()).collect();
    // A version or an adapter may be asked for that the list does not show by itself.
    let name = asked.split(['@', ':']).next().unwrap_or(asked);
    if names.iter().any(|known| known.split(['@', ':']).next() == Some(name)) {
        return None;
    }
    Some(match output::nearest(asked, names) {
        Some(meant) => anyhow!("there is no model {asked:?}; did you mean {meant}? `tether list` shows all"),
        None => anyhow!("there is no model {asked:?}; `tether list` shows those that there are"),
    })
}

/// Asks, and says which model may be meant where there is none of that name.
async fn ask(client: &GatewayClient, args: &RunArgs, as_json: bool) -> anyhow::Result<Outcome> {
    match stream(client, args, as_json).await {
        Ok(()) => Ok(Outcome::Well),
        Err(error) => Err(missing_model(client, &args.model).await.unwrap_or(error)),
    }
}

async fn stream(client: &GatewayClient, args: &RunArgs, as_json: bool) -> anyhow::Result<()> {
    let answer = client
        .chat(&body(args), |text| {
            if !as_json {
                output::piece(text);
            }
        })
        .await?;
    if as_json {
        output::json(&told(&answer))?;
    } else if !answer.text.ends_with('\n') || std::io::stdout().is_terminal() {
        output::line("");
    }
    Ok(())
}

fn body(args: &RunArgs) -> Value {
    let mut body = json!({
        "model": args.model,
        "messages": [{ "role": "user", "content": args.prompt }],
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    for (name, value) in [
        ("max_tokens", args.max_tokens.map(Value::from)),
        ("temperature", args.temperature.map(Value::from)),
        ("seed", args.seed.map(Value::from)),
    ] {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    body
}

fn told(answer: &ChatAnswer) -> Value {
    json!({
        "text": answer.text,
        "requestId": answer.correlation_id,
        "attempts": answer.attempts,
        "completionTokens": answer.completion_tokens,
        "firstTokenMs": answer.first_token.as_secs_f64() * 1e3,
    })
}
