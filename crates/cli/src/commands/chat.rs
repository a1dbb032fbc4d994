//! `tether chat`: chats with a model. If no network runs, one is started for the conversation.

use std::fs::{self, OpenOptions};
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use indicatif::ProgressBar;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep};

use self::conversation::Conversation;
use self::input::{COMMANDS, Input, Order};
use self::reader::Reader;
use super::reach::{missing_model, reach};
use super::{Context, Outcome};
use crate::args::ChatArgs;
use crate::client::{BrokenOff, ChatAnswer, GatewayClient, Piece, Refusal};
use crate::output::{self, Look, harmless, looking};
use crate::voice::{Screen, Voice};

mod conversation;
mod input;
mod reader;

const PROMPT: &str = "> ";
/// How often a loading model is retried.
const AGAIN_EVERY: Duration = Duration::from_secs(1);
/// A spinner appears when an answer takes longer than this.
const SPIN_AFTER: Duration = Duration::from_millis(300);

pub(super) async fn run(mut context: Context, args: ChatArgs) -> anyhow::Result<Outcome> {
    // A terminal that cannot move its cursor gets no editor, and Ctrl-C ends the program there.
    let can_edit = context.env.get("TERM") != Some("dumb");
    let is_person = can_edit && io::stdin().is_terminal() && io::stdout().is_terminal();
    let reached = reach(&mut context, &args.server, args.model.as_deref()).await?;
    // From here on Ctrl-C stops an answer and not the program.
    let interrupts = is_person.then(|| signal(SignalKind::interrupt())).transpose().context("no signals")?;
    let mut chat = Chat {
        client: reached.client.clone(),
        model: String::new(),
        conversation: Conversation::default(),
        screen: Screen::of_stdout(),
        load_timeout: Duration::from_secs(args.timeout),
        interrupts,
        ends_network: reached.is_own(),
        last: None,
        home: context.env.get("HOME").map(PathBuf::from),
        failures: 0,
    };
    chat.conversation.set_system(args.system.clone());
    let talked = chat.run(&context, reached.model.as_deref(), is_person).await;
    let stopped = reached.leave().await;
    talked.and(stopped)?;
    Ok(if chat.failures > 0 && !is_person { Outcome::Finding } else { Outcome::Well })
}

struct Chat {
    client: GatewayClient,
    model: String,
    conversation: Conversation,
    screen: Screen,
    /// How long to wait for a model that is being loaded.
    load_timeout: Duration,
    /// Ctrl-C signals, if they stop an answer.
    interrupts: Option<Signal>,
    /// Whether the network ends with the chat.
    ends_network: bool,
    last: Option<ChatAnswer>,
    home: Option<PathBuf>,
    failures: usize,
}

/// How a question ended.
enum End {
    Whole(ChatAnswer),
    Stopped,
    Failed(anyhow::Error),
}

impl Chat {
    async fn run(&mut self, context: &Context, model: Option<&str>, is_person: bool) -> anyhow::Result<()> {
        let mut reader = if is_person {
            context.data.create()?;
            Reader::of_person(&context.data.path().join("chat-history"))?
        } else {
            Reader::Lines
        };
        let Some(model) = self.choose(model, is_person, &mut reader).await? else { return Ok(()) };
        self.model = model;
        if is_person {
            output::line(format!("You talk with {}. /help lists commands, Ctrl-D ends.", self.model));
            if self.ends_network {
                self.aside("no network ran: one was started for this chat and ends with it");
            }
        }
        loop {
            let (read, back) = read(reader, if is_person { PROMPT } else { "" }).await?;
            reader = back;
            let Some(text) = read else { return Ok(()) };
            match input::parse(&text) {
                Ok(Input::Nothing) => {}
                Ok(Input::Say(question)) => self.ask(question).await,
                Ok(Input::Do(Order::Bye)) => return Ok(()),
                Ok(Input::Do(order)) => {
                    if let Err(error) = self.carry_out(order).await {
                        self.complain(&format!("{error:#}"));
                    }
                }
                Err(sentence) => self.complain(&sentence),
            }
        }
    }

    /// Returns the model to begin with: the one that was named, the only one, or the one that the user chooses.
    async fn choose(
        &self,
        named: Option<&str>,
        is_person: bool,
        reader: &mut Reader,
    ) -> anyhow::Result<Option<String>> {
        let served = self.served().await?;
        if let Some(named) = named {
            return find(&served, named, &self.client).await.map(Some);
        }
        let whole: Vec<&String> = served.iter().filter(|name| !name.contains(':')).collect();
        match whole[..] {
            [] => bail!("no model is served; `tether doctor` says why"),
            [only] => return Ok(Some(only.clone())),
            _ if !is_person => bail!(
                "several models are served: {}; name one, as `tether chat MODEL`",
                whole.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ")
            ),
            _ => {}
        }
        self.list(&served);
        loop {
            // Nothing else runs meanwhile, so blocking is fine.
            let Some(text) = tokio::task::block_in_place(|| reader.read("Which one, by number or name? "))? else {
                return Ok(None);
            };
            match find(&served, text.trim(), &self.client).await {
                _ if text.trim().is_empty() => {}
                Ok(model) => return Ok(Some(model)),
                Err(error) => output::note(format!("{error:#}")),
            }
        }
    }

    /// Returns the names of the served models.
    async fn served(&self) -> anyhow::Result<Vec<String>> {
        let listed: Value = self.client.get("/v1/models").await?;
        let models = listed["data"].as_array().into_iter().flatten();
        Ok(models.filter_map(|model| model["id"].as_str()).map(harmless).collect())
    }

    fn list(&self, served: &[String]) {
        for (number, model) in (1..).zip(served) {
            let here = if *model == self.model { "  (this one)" } else { "" };
            output::line(format!("{number:>3}  {model}{here}"));
        }
    }

    async fn carry_out(&mut self, order: Order) -> anyhow::Result<()> {
        match order {
            Order::Help => output::line(help()),
            Order::ListModels => self.list(&self.served().await?),
            Order::UseModel(named) => {
                self.model = find(&self.served().await?, &named, &self.client).await?;
                output::line(format!("{} goes on with the conversation", self.model));
            }
            Order::ShowSystem => output::line(self.conversation.system().unwrap_or("no system prompt is set")),
            Order::SetSystem(text) => {
                self.conversation.set_system(text);
                self.confirm("it counts from the next question on");
            }
            Order::ShowSampling => output::line(self.conversation.sampling()),
            Order::Set(setting) => {
                self.conversation.set(setting);
                self.confirm(&self.conversation.sampling());
            }
            Order::Retry => match self.conversation.take_last() {
                Some(question) => self.ask(question).await,
                None => bail!("nothing was asked yet"),
            },
            Order::Clear => {
                self.conversation.clear();
                self.confirm("a new conversation");
            }
            Order::Save { file, replaces } => {
                let file = self.in_home(&file);
                save(&file, &self.written(&file)?, replaces)?;
                output::line(format!("saved to {}", file.display()));
            }
            Order::Show => self.show(),
            Order::Bye => {}
        }
        Ok(())
    }

    fn show(&self) {
        let said = output::counted(self.conversation.turns(), "answer");
        output::line(format!("model     {} at {}", self.model, self.client.url()));
        output::line(format!("system    {}", self.conversation.system().unwrap_or("nothing")));
        output::line(format!("settings  {}", self.conversation.sampling()));
        let tokens = self.last.as_ref().map(|answer| answer.prompt_tokens + answer.completion_tokens);
        let tokens = tokens.map(|tokens| format!(", {tokens} tokens at the last one")).unwrap_or_default();
        output::line(format!("so far    {said}{tokens}"));
    }

    /// Expands `~/` to the home folder.
    fn in_home(&self, file: &str) -> PathBuf {
        match (file.strip_prefix("~/"), &self.home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => file.into(),
        }
    }

    fn written(&self, file: &Path) -> anyhow::Result<String> {
        let ending = file.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        match ending.as_str() {
            "md" | "markdown" => Ok(self.conversation.markdown()),
            "json" => Ok(self.conversation.json(&self.model)),
            _ => bail!("{}: name a file that ends in .md or .json", file.display()),
        }
    }

    /// Asks, shows the answer as it arrives, and records the outcome.
    async fn ask(&mut self, question: String) {
        let mut said = String::new();
        let mut voice = Voice::new(self.screen);
        let mut has_shown = false;
        let end = self
            .answer(&question, |piece| {
                has_shown = true;
                output::piece(&voice.says(piece));
                if let Piece::Text(text) = piece {
                    said.push_str(text);
                }
            })
            .await;
        if has_shown {
            output::piece(voice.ends());
        }
        let is_whole = matches!(end, End::Whole(_));
        if is_whole || !said.is_empty() {
            self.conversation.answered(&self.model, question, said, is_whole);
        } else {
            self.conversation.failed(question);
        }
        match end {
            End::Whole(answer) => {
                if answer.finish_reason == "length" {
                    self.aside(&format!("the answer reached its limit of {} tokens", answer.completion_tokens));
                }
                self.last = Some(answer);
            }
            End::Stopped => self.aside("stopped"),
            End::Failed(error) => self.complain(&failure(&error, &self.model, has_shown)),
        }
        if self.interrupts.is_some() {
            // An empty line separates the answer from the next question.
            output::line("");
        }
    }

    /// Waits for the model to be loaded, and then for the end of the answer or Ctrl-C.
    async fn answer(&mut self, question: &str, mut on_piece: impl FnMut(Piece<'_>)) -> End {
        let body = self.conversation.request(&self.model, question);
        let deadline = Instant::now() + self.load_timeout;
        let bar = ProgressBar::new_spinner().with_message(format!("{} is thinking", self.model));
        let (client, interrupts) = (&self.client, &mut self.interrupts);
        // Ctrl-C from before the question stops nothing.
        while interrupts.as_mut().is_some_and(|signals| futures_util::FutureExt::now_or_never(signals.recv()).is_some())
        {
        }
        let asking = async {
            loop {
                let answer = client.chat(&body, |piece| {
                    bar.finish_and_clear();
                    on_piece(piece);
                });
                let error = match answer.await {
                    Ok(answer) => return End::Whole(answer),
                    Err(error) => error,
                };
                match error.downcast_ref::<Refusal>() {
                    Some(refusal) if refusal.code == "model_loading" && Instant::now() + AGAIN_EVERY < deadline => {
                        bar.set_message(harmless(&refusal.message));
                        sleep(AGAIN_EVERY).await;
                    }
                    Some(refusal) if refusal.code == "model_not_found" => {
                        return End::Failed(missing_model(client, &self.model).await.unwrap_or(error));
                    }
                    _ => return End::Failed(error),
                }
            }
        };
        let spinning = async {
            sleep(SPIN_AFTER).await;
            if !bar.is_finished() {
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            std::future::pending::<()>().await;
        };
        let end = tokio::select! {
            end = asking => end,
            () = pressed(interrupts) => End::Stopped,
            () = spinning => End::Stopped,
        };
        bar.finish_and_clear();
        end
    }

    /// Prints a remark that is not part of the conversation.
    fn aside(&self, text: &str) {
        match self.screen {
            Screen::Pipe => output::note(text),
            Screen::Plain => output::line(format!("({text})")),
            Screen::Coloured => output::shown(looking(Look::Aside, &harmless(&format!("({text})")))),
        }
    }

    /// Confirms to an interactive user that a command is done.
    fn confirm(&self, text: &str) {
        if self.interrupts.is_some() {
            self.aside(text);
        }
    }

    fn complain(&mut self, text: &str) {
        self.failures += 1;
        output::note(text);
    }
}

/// Reads the next input on a blocking thread: a person may take hours.
async fn read(mut reader: Reader, prompt: &'static str) -> anyhow::Result<(Option<String>, Reader)> {
    tokio::task::spawn_blocking(move || Ok((reader.read(prompt)?, reader))).await?
}

/// Waits for Ctrl-C, if it stops an answer.
async fn pressed(interrupts: &mut Option<Signal>) {
    match interrupts {
        Some(signals) => drop(signals.recv().await),
        None => std::future::pending().await,
    }
}

/// Returns a model by its number in the list or by its name.
async fn find(served: &[String], named: &str, client: &GatewayClient) -> anyhow::Result<String> {
    if let Ok(number) = named.parse::<usize>()
        && !served.iter().any(|model| model == named)
    {
        let model = number.checked_sub(1).and_then(|index| served.get(index));
        return model.cloned().with_context(|| format!("there is no model {number}; the list has {}", served.len()));
    }
    match missing_model(client, named).await {
        Some(error) => Err(error),
        None => Ok(named.to_owned()),
    }
}

/// Explains why a question got no answer, or only part of one, and what to do.
fn failure(error: &anyhow::Error, model: &str, has_shown: bool) -> String {
    let refusal = error.downcast_ref::<Refusal>().map(|refusal| (&refusal.code, &refusal.message));
    let broken = error.downcast_ref::<BrokenOff>().map(|broken| (&broken.code, &broken.message));
    match refusal.or(broken) {
        Some((code, message)) if code == "context_length_exceeded" => {
            format!("{message} (/clear begins a new conversation)")
        }
        Some((_, message)) if has_shown => {
            format!("the answer of {model} broke off: {message}; what came of it is kept, and /retry asks again")
        }
        Some((_, message)) => format!("{message} (/retry asks again)"),
        None => format!("{error:#}; /retry asks again"),
    }
}

/// Writes a file. An existing one is overwritten only if `replaces` is set.
fn save(file: &Path, text: &str, replaces: bool) -> anyhow::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true);
    let opened = if replaces { options.truncate(true).open(file) } else { options.create_new(true).open(file) };
    let mut opened = opened.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            anyhow!("{0} is there already; choose another name, or replace it with /save! {0}", file.display())
        }
        _ => anyhow!("{} cannot be written: {error}", file.display()),
    })?;
    let written = opened.write_all(text.as_bytes());
    if written.is_err() && !replaces {
        // Half a conversation is of no use.
        let _ = fs::remove_file(file);
    }
    written.with_context(|| format!("{} cannot be written", file.display()))
}

fn help() -> String {
    let begin = |name: &str, what: &str| format!("{name} {what}");
    let width = COMMANDS.iter().map(|(name, what, _)| begin(name, what).len()).max().unwrap_or(0);
    let mut lines: Vec<String> =
        COMMANDS.iter().map(|(name, what, does)| format!("  {:width$}  {does}", begin(name, what))).collect();
    lines.push(String::new());
    lines.push(
        "  \"\"\" begins a text of several lines and ends it; so do a \\ at a line's end, and Alt-Enter.".to_owned(),
    );
    lines.push("  Ctrl-C stops an answer, and what came of it is kept.".to_owned());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_never_written_over_another_unasked() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("a.md");
        save(&file, "one", false).expect("a new file");
        let error = save(&file, "two", false).expect_err("it is there").to_string();
        assert!(error.contains("is there already") && error.contains("/save! "), "{error}");
        assert_eq!(fs::read_to_string(&file).expect("read"), "one");
        save(&file, "2", true).expect("replaced");
        assert_eq!(fs::read_to_string(&file).expect("read"), "2");
        let error = save(&folder.path().join("no/a.md"), "", false).expect_err("no folder").to_string();
        assert!(error.contains("cannot be written"), "{error}");
    }

    #[test]
    fn a_failure_says_what_to_do() {
        let broken = |code: &str| anyhow!(BrokenOff { code: code.into(), message: "it fell over".into() });
        assert!(failure(&broken("worker_failed"), "m", true).ends_with("is kept, and /retry asks again"));
        assert_eq!(failure(&broken("worker_failed"), "m", false), "it fell over (/retry asks again)");
        assert!(failure(&broken("context_length_exceeded"), "m", false).contains("/clear"));
        assert!(failure(&anyhow!("nothing answers"), "m", false).contains("/retry"));
    }

    #[test]
    fn the_help_names_every_command() {
        let help = help();
        assert!(COMMANDS.iter().all(|(name, ..)| help.contains(&format!("  {name} "))), "{help}");
    }
}
