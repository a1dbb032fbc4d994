//! Parses chat input: text for the model, or a command.

use crate::output::nearest;

/// Begins and ends a multi-line text.
const FENCE: &str = "\"\"\"";

/// The commands, each with its arguments and description.
pub(super) const COMMANDS: [(&str, &str, &str); 10] = [
    ("/help", "", "list the commands"),
    ("/model", "[NAME]", "list the models, or go on with another one"),
    ("/system", "[TEXT]", "show or set the system prompt; \"\" removes it"),
    ("/set", "[NAME VALUE]", "show or set temperature, top_p, seed, max_tokens; or default"),
    ("/retry", "", "ask the last question again"),
    ("/clear", "", "begin a new conversation; what /system and /set said stays"),
    ("/save", "FILE", "write the conversation to a new file, .md or .json"),
    ("/save!", "FILE", "the same, in place of a file that is there"),
    ("/show", "", "show model, settings and length of the conversation"),
    ("/bye", "", "end; Ctrl-D does, too"),
];

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Input {
    Nothing,
    /// Text for the model.
    Say(String),
    /// A command to the chat.
    Do(Order),
}

/// A command to the chat.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Order {
    Help,
    ListModels,
    UseModel(String),
    ShowSystem,
    SetSystem(Option<String>),
    ShowSampling,
    Set(Setting),
    Retry,
    Clear,
    Save { file: String, replaces: bool },
    Show,
    Bye,
}

/// A sampling parameter; `None` restores the model's default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Setting {
    Temperature(Option<f64>),
    TopP(Option<f64>),
    Seed(Option<u64>),
    MaxTokens(Option<u32>),
}

/// Returns whether an input is complete: no fence is open, and its last line does not end with a backslash.
pub(super) fn is_whole(text: &str) -> bool {
    match body(text).trim_start().strip_prefix(FENCE) {
        Some(fenced) => fenced.trim_end().ends_with(FENCE),
        None => !text.ends_with('\\'),
    }
}

/// Parses a complete input. The error is a message for the user.
pub(super) fn parse(text: &str) -> Result<Input, String> {
    let is_command = text.starts_with('/') && text[1..].starts_with(|first: char| first.is_ascii_alphabetic());
    if !is_command {
        let said = plain(text);
        return Ok(if said.trim().is_empty() { Input::Nothing } else { Input::Say(said) });
    }
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let rest = rest.trim();
    let nothing_follows = |order: Order| match rest {
        "" => Ok(order),
        _ => Err(format!("{word} stands alone; write a blank before it to say it to the model")),
    };
    let order = match word {
        "/help" => nothing_follows(Order::Help)?,
        "/model" | "/models" if rest.is_empty() => Order::ListModels,
        "/model" => Order::UseModel(rest.to_owned()),
        "/system" if rest.is_empty() => Order::ShowSystem,
        "/system" => Order::SetSystem(Some(plain(rest)).filter(|text| !matches!(text.trim(), "" | "\"\""))),
        "/set" if rest.is_empty() => Order::ShowSampling,
        "/set" => Order::Set(setting(rest)?),
        "/retry" => nothing_follows(Order::Retry)?,
        "/clear" => nothing_follows(Order::Clear)?,
        "/save" | "/save!" if rest.is_empty() => return Err(format!("name a file: {word} FILE.md, or FILE.json")),
        "/save" | "/save!" => Order::Save { file: rest.to_owned(), replaces: word.ends_with('!') },
        "/show" => nothing_follows(Order::Show)?,
        "/bye" | "/exit" | "/quit" => nothing_follows(Order::Bye)?,
        _ => {
            let meant = nearest(word, COMMANDS.iter().map(|(command, ..)| *command));
            let meant = meant.map_or_else(|| ".".to_owned(), |meant| format!("; did you mean {meant}?"));
            return Err(format!(
                "there is no command {word}{meant} /help lists them, and a blank before it makes it text for the model"
            ));
        }
    };
    Ok(Input::Do(order))
}

/// Returns the text after a command that takes a multi-line text, else the whole input.
fn body(text: &str) -> &str {
    match text.strip_prefix("/system") {
        Some(rest) if rest.starts_with(char::is_whitespace) => rest,
        _ => text,
    }
}

/// Removes the fences, or joins continued lines.
fn plain(text: &str) -> String {
    let trimmed = text.trim();
    match trimmed.strip_prefix(FENCE).and_then(|rest| rest.strip_suffix(FENCE)) {
        Some(fenced) => {
            let fenced = fenced.strip_prefix('\n').unwrap_or(fenced);
            fenced.strip_suffix('\n').unwrap_or(fenced).to_owned()
        }
        None => trimmed.replace("\\\n", "\n"),
    }
}

fn setting(text: &str) -> Result<Setting, String> {
    let (name, value) = text.split_once(char::is_whitespace).map_or((text, ""), |(name, value)| (name, value.trim()));
    let number = |top: f64| {
        let number = value.parse().ok().filter(|number: &f64| (0.0..=top).contains(number));
        number.map(Some).ok_or_else(|| format!("{name} is a number from 0 to {top}, or default"))
    };
    let is_default = value == "default";
    Ok(match name {
        "temperature" => Setting::Temperature(if is_default { None } else { number(2.0)? }),
        "top_p" => Setting::TopP(if is_default { None } else { number(1.0)? }),
        "seed" if is_default => Setting::Seed(None),
        "seed" => Setting::Seed(Some(value.parse().map_err(|_| "seed is a whole number, or default".to_owned())?)),
        "max_tokens" if is_default => Setting::MaxTokens(None),
        "max_tokens" => {
            let count = value.parse().ok().filter(|count| *count > 0);
            Setting::MaxTokens(Some(count.ok_or("max_tokens is a whole number from 1 on, or default")?))
        }
        _ => {
            let meant = nearest(name, ["temperature", "top_p", "seed", "max_tokens"]);
            let meant = meant.map_or_else(|| ".".to_owned(), |meant| format!("; did you mean {meant}?"));
            return Err(format!(
                "there is no setting {name:?}{meant} There are temperature, top_p, seed and max_tokens"
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        match parse(text).expect(text) {
            Input::Say(text) => text,
            other => panic!("{text:?} is {other:?}"),
        }
    }

    #[test]
    fn a_text_goes_on_behind_a_backslash_and_within_fences() {
        for open in ["a\\", "\"\"\"", "\"\"\"a", "  \"\"\"a\n", "\"\"\"a\"\" ", "/system \"\"\"a\nb", "\"\"\"\""] {
            assert!(!is_whole(open), "{open:?}");
        }
        for whole in
            ["", "a", "a\\\nb", "\"\"\"a\nb\"\"\"", "\"\"\"\"\"\"", "\"\"\"a\\\"\"\" ", "say \"\"\"", "/system a"]
        {
            assert!(is_whole(whole), "{whole:?}");
        }
        assert_eq!(said("\"\"\"\na\n  b \\\nc\n\"\"\""), "a\n  b \\\nc", "fences keep the text as it is");
        assert_eq!(said("a\\\nb"), "a\nb");
        assert_eq!(said("  hi there "), "hi there");
        assert_eq!(parse("\"\"\"\n\"\"\""), Ok(Input::Nothing));
        assert_eq!(parse("  \t"), Ok(Input::Nothing));
    }

    #[test]
    fn a_slash_and_a_letter_begin_a_command_and_all_else_is_text() {
        let orders = [
            ("/help", Order::Help),
            ("/model", Order::ListModels),
            ("/model m@1.0:a", Order::UseModel("m@1.0:a".into())),
            ("/system", Order::ShowSystem),
            ("/system Be brief. ", Order::SetSystem(Some("Be brief.".into()))),
            ("/system \"\"\"Be\nbrief.\"\"\"", Order::SetSystem(Some("Be\nbrief.".into()))),
            ("/system \"\"", Order::SetSystem(None)),
            ("/set", Order::ShowSampling),
            ("/retry ", Order::Retry),
            ("/clear", Order::Clear),
            ("/save a b.md", Order::Save { file: "a b.md".into(), replaces: false }),
            ("/save! a.json", Order::Save { file: "a.json".into(), replaces: true }),
            ("/show", Order::Show),
            ("/quit", Order::Bye),
        ];
        for (text, order) in orders {
            assert_eq!(parse(text), Ok(Input::Do(order)), "{text}");
        }
        for text in ["/ 2", "/2", "//", "a /help"] {
            assert_eq!(said(text), text);
        }
        assert_eq!(said(" /help"), "/help");
    }

    #[test]
    fn settings_are_checked_before_they_are_sent() {
        for (text, setting) in [
            ("/set temperature 0.5", Setting::Temperature(Some(0.5))),
            ("/set temperature default", Setting::Temperature(None)),
            ("/set top_p  1", Setting::TopP(Some(1.0))),
            ("/set seed 7", Setting::Seed(Some(7))),
            ("/set max_tokens 20", Setting::MaxTokens(Some(20))),
            ("/set max_tokens default", Setting::MaxTokens(None)),
        ] {
            assert_eq!(parse(text), Ok(Input::Do(Order::Set(setting))), "{text}");
        }
    }

    #[test]
    fn what_is_mistyped_gets_a_sentence_that_says_what_to_do() {
        for (text, words) in [
            ("/hlep", "did you mean /help?"),
            ("/etc/passwd", "a blank before it"),
            ("/clear all", "stands alone"),
            ("/save", "FILE.md"),
            ("/set temprature 1", "did you mean temperature?"),
            ("/set temperature hot", "from 0 to 2"),
            ("/set temperature NaN", "from 0 to 2"),
            ("/set top_p 1.1", "from 0 to 1"),
            ("/set seed -1", "whole number"),
            ("/set max_tokens 0", "from 1 on"),
            ("/set max_tokens", "from 1 on"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
