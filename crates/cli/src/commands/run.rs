//! `tether run`: asks a model. Where no network runs, one is started for the question.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use protocol::control::Fleet;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{Context, Outcome, nodes, shipped, spinner};
use crate::args::RunArgs;
use crate::client::{ChatAnswer, GatewayClient, Presence, Refusal, usual_url};
use crate::local_models;
use crate::network::Network;
use crate::output;

/// The most of stdin that is read, in bytes: more than any model takes.
const STDIN_MAX: u64 = 64 << 20;
/// How often it is asked whether a model is loaded.
const AGAIN_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(mut context: Context, mut args: RunArgs) -> anyhow::Result<Outcome> {
    let prompt = prompt(args.prompt.as_deref())?;
    args.prompt = Some(prompt);
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
    // A model that never was ready is not listed. Only a key that operates the network learns why.
    let fleet: Fleet = client.get("/admin/v1/nodes").await.unwrap_or_default();
    let mut failures = nodes::failures(&fleet);
    if let Some((worker, model, why)) = failures.find(|(_, model, _)| model.model_id.as_str() == name) {
        return Some(anyhow!("{model} on {} is in error: {why}", worker.short()));
    }
    Some(match output::nearest(asked, names) {
        Some(meant) => anyhow!("there is no model {asked:?}; did you mean {meant}? `tether list` shows all"),
        None => anyhow!("there is no model {asked:?}; `tether list` shows those that there are"),
    })
}

/// Asks, and says which model may be meant where no model has that name.
async fn ask(client: &GatewayClient, args: &RunArgs, as_json: bool) -> anyhow::Result<Outcome> {
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    let mut is_told = false;
    loop {
        let error = match stream(client, args, as_json).await {
            Ok(()) => return Ok(Outcome::Well),
            Err(error) => error,
        };
        match error.downcast_ref::<Refusal>() {
            Some(refusal) if refusal.code == "model_loading" && Instant::now() + AGAIN_EVERY < deadline => {
                if !std::mem::replace(&mut is_told, true) {
                    output::note(format!("waiting: {}", refusal.message));
                }
                sleep(AGAIN_EVERY).await;
            }
            _ => return Err(missing_model(client, &args.model).await.unwrap_or(error)),
        }
    }
}

/// Returns what to ask: the argument, and what is piped in behind it.
fn prompt(given: Option<&str>) -> anyhow::Result<String> {
    let stdin = io::stdin();
    let piped = match given {
        None if stdin.is_terminal() => bail!("what is to be asked? write it behind the model, or pipe it in"),
        None | Some("-") => true,
        // Somebody else's terminal, or /dev/null, has nothing to say; a file or a pipe was given on purpose.
        Some(_) => {
            let kind = stdin.as_fd().try_clone_to_owned().and_then(|stdin| File::from(stdin).metadata());
            kind.is_ok_and(|kind| kind.is_file() || kind.file_type().is_fifo())
        }
    };
    let mut text = String::new();
    if piped {
        stdin.lock().take(STDIN_MAX + 1).read_to_string(&mut text).context("stdin cannot be read as text")?;
        if text.len() as u64 > STDIN_MAX {
            bail!("stdin has more than {} MiB, which no model takes", STDIN_MAX >> 20);
        }
    }
    joined(given.filter(|given| *given != "-"), text.trim_end())
}

fn joined(given: Option<&str>, piped: &str) -> anyhow::Result<String> {
    match (given.unwrap_or_default(), piped) {
        ("", "") => bail!("there is nothing to ask: the prompt is empty"),
        (given, "") => Ok(given.to_owned()),
        ("", piped) => Ok(piped.to_owned()),
        (given, piped) => Ok(format!("{given}\n\n{piped}")),
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
    let mut messages = vec![json!({ "role": "user", "content": args.prompt })];
    if let Some(system) = &args.system {
        messages.insert(0, json!({ "role": "system", "content": system }));
    }
    let mut body = json!({
        "model": args.model,
        "messages": messages,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_piped_in_comes_behind_what_is_asked() {
        let joined = |given, piped| joined(given, piped).ok();
        assert_eq!(joined(Some("sum up:"), "a\nb").as_deref(), Some("sum up:\n\na\nb"));
        assert_eq!(joined(None, "a").as_deref(), Some("a"));
        assert_eq!(joined(Some("a"), "").as_deref(), Some("a"));
        assert_eq!(joined(None, ""), None);
    }
}
