//! `tether run`: asks a model. If no network runs, one is started for the question.

use std::fs::File;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::reach::{Reached, missing_model, reach};
use super::{Context, Outcome};
use crate::args::RunArgs;
use crate::client::{ChatAnswer, GatewayClient, Refusal};
use crate::output;
use crate::voice::{Screen, Voice};

/// The most bytes that are read from stdin: more than any model's context holds.
const STDIN_MAX: u64 = 64 << 20;
/// How often a loading model is retried.
const AGAIN_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(mut context: Context, mut args: RunArgs) -> anyhow::Result<Outcome> {
    let prompt = prompt(args.prompt.as_deref())?;
    args.prompt = Some(prompt);
    let reached = reach(&mut context, &args.server, Some(&args.model)).await?;
    if let Some(model) = &reached.model {
        args.model.clone_from(model);
    }
    let outcome = ask(&reached, &args, context.json).await;
    let is_own = reached.is_own();
    reached.leave().await?;
    outcome?;
    if is_own {
        output::note(format!(
            "no network of {} ran: one was started for this question and has ended; `{} up` keeps one running",
            context.data.path().display(),
            context.program()
        ));
    }
    Ok(Outcome::Well)
}

/// Asks, and suggests a model if none has the requested name.
async fn ask(reached: &Reached, args: &RunArgs, as_json: bool) -> anyhow::Result<()> {
    let client = &reached.client;
    let began = Instant::now();
    let deadline = began + Duration::from_secs(args.timeout);
    let mut load = Load::of(reached, args).await;
    let mut is_noted = false;
    loop {
        let error = match stream(client, args, as_json).await {
            Ok(None) => return Ok(()),
            Ok(Some(answer)) => {
                if args.verbose {
                    output::note(figures(&answer, load));
                }
                return Ok(());
            }
            Err(error) => error,
        };
        match error.downcast_ref::<Refusal>() {
            Some(refusal) if refusal.code == "model_loading" && Instant::now() + AGAIN_EVERY < deadline => {
                if !std::mem::replace(&mut is_noted, true) {
                    output::note(format!("waiting: {}", refusal.message));
                }
                sleep(AGAIN_EVERY).await;
                load = Load::Took(began.elapsed());
            }
            _ => return Err(missing_model(client, &args.model).await.unwrap_or(error)),
        }
    }
}

/// When the model was loaded.
#[derive(Debug, Clone, Copy)]
enum Load {
    Before,
    /// During the question: the time to the first token includes it.
    Meanwhile,
    /// For the question, in this time.
    Took(Duration),
}

impl Load {
    /// Checks whether a model is loaded before the question, if statistics are wanted.
    async fn of(reached: &Reached, args: &RunArgs) -> Self {
        if let Some(time) = reached.load {
            return Self::Took(time);
        }
        if !args.verbose {
            return Self::Before;
        }
        let listed: anyhow::Result<Value> = reached.client.get(&format!("/v1/models/{}", args.model)).await;
        if listed.is_ok_and(|model| model["state"] == "ready") { Self::Before } else { Self::Meanwhile }
    }
}

/// Returns the line with an answer's statistics.
fn figures(answer: &ChatAnswer, load: Load) -> String {
    let ChatAnswer { prompt_tokens, cached_tokens, completion_tokens, first_token, rest, .. } = answer;
    let load = match load {
        Load::Before => "loaded before".to_owned(),
        Load::Meanwhile => "loaded before the first token".to_owned(),
        Load::Took(time) => format!("loaded in {:.2} s", time.as_secs_f64()),
    };
    // The first token is computed by the prefill, so it does not count towards the decode speed.
    let further = f64::from(completion_tokens.saturating_sub(1));
    let speed =
        if rest.is_zero() { String::new() } else { format!(" at {:.1} a second", further / rest.as_secs_f64()) };
    format!(
        "{prompt_tokens} prompt tokens, {cached_tokens} of them cached; first token after {} ms; {completion_tokens} \
         tokens{speed}; {load}",
        first_token.as_millis()
    )
}

/// Returns the prompt: the argument, followed by piped input.
fn prompt(given: Option<&str>) -> anyhow::Result<String> {
    let stdin = io::stdin();
    let piped = match given {
        None if stdin.is_terminal() => bail!("the prompt is missing; write it after the model, or pipe it in"),
        None | Some("-") => true,
        // Another program's terminal or /dev/null has no input for us; a file or a pipe was given on purpose.
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

/// Prints an answer as it arrives. Returns `None` if its reader left before the end, as `head` does.
async fn stream(client: &GatewayClient, args: &RunArgs, as_json: bool) -> anyhow::Result<Option<ChatAnswer>> {
    let mut voice = Voice::new(Screen::of_stdout());
    let (tell, unwritten) = oneshot::channel();
    let mut tell = Some(tell);
    let body = body(args);
    let asked = client.chat(&body, |piece| {
        if !as_json
            && let Err(error) = output::try_piece(&voice.says(piece))
            && let Some(tell) = tell.take()
        {
            let _ = tell.send(error);
        }
    });
    let answer = tokio::select! {
        biased;
        Ok(error) = unwritten => return unwritten_answer(error).map(|()| None),
        answer = asked => answer?,
    };
    if as_json {
        output::json(&json_of(&answer))?;
    } else {
        output::piece(voice.ends());
    }
    Ok(Some(answer))
}

/// Returns an error unless the answer could not be written because its reader left.
fn unwritten_answer(error: io::Error) -> anyhow::Result<()> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(error).context("the answer could not be written to stdout"),
    }
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

fn json_of(answer: &ChatAnswer) -> Value {
    json!({
        "text": answer.text,
        "requestId": answer.correlation_id,
        "attempts": answer.attempts,
        "promptTokens": answer.prompt_tokens,
        "cachedTokens": answer.cached_tokens,
        "completionTokens": answer.completion_tokens,
        "firstTokenMs": answer.first_token.as_secs_f64() * 1e3,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_answer_took_is_told_in_a_line() {
        let answer = ChatAnswer {
            prompt_tokens: 36,
            cached_tokens: 12,
            completion_tokens: 21,
            first_token: Duration::from_millis(43),
            rest: Duration::from_millis(200),
            ..ChatAnswer::default()
        };
        assert_eq!(
            figures(&answer, Load::Took(Duration::from_millis(905))),
            "36 prompt tokens, 12 of them cached; first token after 43 ms; 21 tokens at 100.0 a second; loaded in 0.91 s"
        );
        let one = ChatAnswer { completion_tokens: 1, rest: Duration::ZERO, ..answer };
        assert!(figures(&one, Load::Before).ends_with("1 tokens; loaded before"));
    }

    #[test]
    fn what_is_piped_in_comes_behind_what_is_asked() {
        let joined = |given, piped| joined(given, piped).ok();
        assert_eq!(joined(Some("sum up:"), "a\nb").as_deref(), Some("sum up:\n\na\nb"));
        assert_eq!(joined(None, "a").as_deref(), Some("a"));
        assert_eq!(joined(Some("a"), "").as_deref(), Some("a"));
        assert_eq!(joined(None, ""), None);
    }
}
