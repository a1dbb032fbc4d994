use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::model_runtime::{Message, Role, Tool};

const HERMES: &str = "<tool_call> </tool_call> <think> </think>";
const LLAMA: &str = "<|python_tag|>";
const MISTRAL: &str = "[TOOL_CALLS]";
const MISTRAL_NAMED: &str = "[TOOL_CALLS] [ARGS]";
const FUNCTION: &str = "<function=";
const HARMONY: &str = "<|channel|>";
const THINKER: &str = "<think> </think>";
const MISTRAL_THINKER: &str = "[TOOL_CALLS] [ARGS] [THINK] [/THINK]";

/// A call, assembled from its pieces.
type Called = (String, String);

fn chat() -> Chat {
    let tool = |name: &str| Tool {
        name: name.into(),
        description: None,
        parameters: Some(json!({
            "type": "object",
            "properties": { "place": { "type": "string" }, "days": { "type": "integer" } },
            "required": ["place"], "additionalProperties": false,
        })),
    };
    Chat { tools: vec![tool("weather"), tool("time")], ..vec![Message::new(Role::User, "?")].into() }
}

/// Returns the text, the reasoning and the calls of an answer that arrives in pieces.
fn parse<'a>(template: &str, prompt: &str, pieces: impl IntoIterator<Item = &'a str>) -> (String, String, Vec<Called>) {
    parse_to(&chat(), false, template, prompt, pieces)
}

fn parse_to<'a>(
    chat: &Chat,
    is_cut: bool,
    template: &str,
    prompt: &str,
    pieces: impl IntoIterator<Item = &'a str>,
) -> (String, String, Vec<Called>) {
    let mut parser = AnswerParser::new(AnswerFormat::detect(template), chat, prompt, 7);
    let mut deltas: Vec<Delta> = pieces.into_iter().map(|piece| parser.push(piece)).collect();
    let (last, calls) = parser.finish(is_cut);
    deltas.push(last);
    let (mut text, mut reasoning, mut called) = (String::new(), String::new(), Vec::<Called>::new());
    for delta in deltas {
        text.push_str(&delta.text);
        reasoning.push_str(&delta.reasoning);
        for call in delta.tool_calls {
            assert_eq!(call.id.is_some(), call.name.is_some());
            if let Some(name) = call.name {
                assert_eq!(call.index as usize, called.len(), "calls come in order");
                called.push((name, String::new()));
            }
            called[call.index as usize].1.push_str(&call.arguments);
        }
    }
    assert_eq!(calls, !called.is_empty());
    (text, reasoning, called)
}

fn letters(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive(|_: char| true)
}

#[track_caller]
fn check(template: &str, answer: &str, text: &str, reasoning: &str, calls: &[(&str, &str)]) {
    let calls = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect();
    let expected = (text.to_owned(), reasoning.to_owned(), calls);
    assert_eq!(parse(template, "", [answer]), expected, "at once");
    assert_eq!(parse(template, "", letters(answer)), expected, "letter by letter");
}

#[test]
fn hermes_and_qwen_write_json_in_tags() {
    let answer = "<think>\nRome.\n</think>\n\nI look.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \
                  \"Ro}me\"}}\n</tool_call>\n<tool_call>\n{\"arguments\": {}, \"name\": \"time\"}\n</tool_call>";
    check(HERMES, answer, "I look.", "Rome.", &[("weather", "{\"place\": \"Ro}me\"}"), ("time", "{}")]);
    let answer = "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"days\\\": 1}\"}</tool_call> Done.";
    check(HERMES, answer, "Done.", "", &[("weather", "{\"days\": 1}")]);
    let answer = "<tool_call>{\"name\": \"time\"}</tool_call>";
    check(HERMES, answer, "", "", &[("time", "{}")]);
}

#[test]
fn qwen_coder_writes_parameters_in_tags() {
    let answer = "<tool_call>\n<function=weather>\n<parameter=place>\n12\n</parameter>\n<parameter=days>\n2\n\
                  </parameter>\n</function>\n</tool_call>";
    check(HERMES, answer, "", "", &[("weather", r#"{"place": "12", "days": 2}"#)]);
    check(HERMES, "<function=time>\n</function>", "", "", &[("time", "{}")]);
}

#[test]
fn llama_writes_an_object_in_place_of_an_answer() {
    let call = r#"{"name": "weather", "parameters": {"place": "Rome"}}"#;
    let called = [("weather", r#"{"place": "Rome"}"#)];
    check(LLAMA, call, "", "", &called);
    check(LLAMA, &format!("<|python_tag|>{call}"), "", "", &called);
    check(LLAMA, &format!("{call}; {call}"), "", "", &[called[0], called[0]]);
    for no_call in [r#"{"name": "Ann", "parameters": {}}"#, r#"{"size": 1}"#, "{", " {} ", "<|python_tag|>print(1)"] {
        check(LLAMA, no_call, no_call, "", &[]);
    }
}

#[test]
fn mistral_writes_a_list_or_names() {
    let list = "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"days\": [1]}}, {\"name\": \"time\", \"arguments\": {}}]";
    check(MISTRAL, list, "", "", &[("weather", "{\"days\": [1]}"), ("time", "{}")]);
    let named = "Well.[TOOL_CALLS]weather[CALL_ID]123456789[ARGS]{\"days\": 1}[TOOL_CALLS]time[ARGS]{}";
    check(MISTRAL_NAMED, named, "Well.", "", &[("weather", "{\"days\": 1}"), ("time", "{}")]);
}

#[test]
fn functions_are_written_as_tags() {
    let answer = "<function=weather>{\"days\": 1}</function>\n<function=time>{}</function>";
    check(FUNCTION, answer, "", "", &[("weather", "{\"days\": 1}"), ("time", "{}")]);
}

#[test]
fn harmony_speaks_in_channels() {
    let answer = "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary<|message|>One \
                  moment. <|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json\
                  <|message|>{\"days\": 1}<|call|>";
    check(HARMONY, answer, "One moment. ", "Look.", &[("weather", "{\"days\": 1}")]);
    let answer = " to=functions.time<|channel|>commentary json<|message|>{}";
    check(HARMONY, answer, "", "", &[("time", "{}")]);
    check(HARMONY, "<|channel|>final<|message|>Yes.<|return|>", "Yes.", "", &[]);
    check(HARMONY, "Just <so>.", "Just <so>.", "", &[]);
}

#[test]
fn what_is_no_call_comes_out_as_it_was_written() {
    for (template, answer) in [
        (HERMES, "a <tool_call>\n{\"name\": 1}\n</tool_call>"),
        (HERMES, " <tool_call>{\"name\": \"weather\", "),
        (HERMES, "<tool_call>no</tool_call> <tool"),
        (HERMES, "<function=a b>{}</function>"),
        (HERMES, "a < b <function"),
        (MISTRAL, "[TOOL_CALLS]\n I will { call"),
        (MISTRAL, "[TOOL_CALLS] ["),
        (FUNCTION, "<function=weather>oops"),
        (THINKER, "No thought <think> here </think>  "),
    ] {
        check(template, answer, answer, "", &[]);
    }
}

#[test]
fn a_thought_may_begin_in_the_prompt_and_need_not_end() {
    let answer = ["Hm", ".\n</thi", "nk>\n\nYes"];
    let expected = ("Yes".to_owned(), "Hm.".to_owned(), vec![]);
    assert_eq!(parse(THINKER, "<|Assistant|><think>\n", answer), expected);
    let closed = parse(THINKER, "<think>\n\n</think>\n\n", ["Yes"]);
    assert_eq!(closed, ("Yes".to_owned(), String::new(), vec![]));
    check(THINKER, "<think>Hm </th", "", "Hm </th", &[]);
}

#[test]
fn without_tools_nothing_is_a_call() {
    let call = "<tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call>";
    for chat in [Chat { tools: vec![], ..chat() }, Chat { tool_choice: ToolChoice::None, ..chat() }] {
        let mut parser = AnswerParser::new(AnswerFormat::detect(HERMES), &chat, "", 0);
        assert_eq!(parser.push(call).text, call);
        assert_eq!(parser.finish(false), (Delta::default(), false));
    }
}

#[test]
fn arguments_come_as_they_are_written() {
    let mut parser = AnswerParser::new(AnswerFormat::detect(HERMES), &chat(), "", 1);
    assert_eq!(parser.push("Hi <tool").text, "Hi");
    assert_eq!(parser.push("_call>{\"name\": \"weather\", \"arguments\": "), Delta::default());
    let begun = parser.push("{\"pla").tool_calls;
    assert_eq!((begun[0].name.as_deref(), begun[0].arguments.as_str()), (Some("weather"), "{\"pla"));
    let more = ToolCallDelta { arguments: "ce\"".into(), ..ToolCallDelta::default() };
    assert_eq!(parser.push("ce\"").tool_calls, [more]);
}

#[test]
fn ids_follow_from_the_seed_and_differ_within_a_conversation() {
    let ids = |messages: usize, seed: u64, template: &str| {
        let said = vec![Message::new(Role::User, "?"); messages];
        let chat = Chat { messages: said, ..chat() };
        let call = "<function=time>{}</function>[TOOL_CALLS][{\"name\": \"time\"}]";
        let mut parser = AnswerParser::new(AnswerFormat::detect(template), &chat, "", seed);
        let delta = parser.push(&call.repeat(2));
        delta.tool_calls.into_iter().filter_map(|call| call.id).collect::<Vec<_>>()
    };
    let first = ids(1, 7, FUNCTION);
    assert_eq!(first, ids(1, 7, FUNCTION));
    assert_ne!(first[0], first[1]);
    assert!(ids(1, 8, FUNCTION).iter().chain(&ids(3, 7, FUNCTION)).all(|id| !first.contains(id)));
    assert!(ids(1, 7, MISTRAL).iter().all(|id| id.len() == 9), "Mistral's templates insist");
}

#[test]
fn families_are_told_by_their_templates() {
    let format = |template: &str| {
        let format = AnswerFormat::detect(template);
        (format.thought.is_some(), format.calls)
    };
    assert_eq!(format(HERMES), (true, Some(CallSyntax::Hermes)));
    assert_eq!(format(LLAMA), (false, Some(CallSyntax::Llama)));
    assert_eq!(format("<|start_header_id|>{\"name\": \"\", \"parameters\": "), (false, Some(CallSyntax::Llama)));
    assert_eq!(format(MISTRAL_NAMED), (false, Some(CallSyntax::Mistral { is_named: true })));
    assert_eq!(format(HARMONY), (false, Some(CallSyntax::Harmony)));
    assert_eq!(format("{{ messages[0].content }}"), (false, None));
    assert_eq!(AnswerFormat::detect(MISTRAL).preserved_tokens(), ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"]);
}

#[cfg(feature = "llama")]
mod required {
    use super::*;
    use crate::grammar::{Grammars, TokenTable};

    const END: u32 = 256;

    fn grammars() -> Grammars {
        let mut bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        bytes.push(b"<|end|>".to_vec());
        let special = (0..=256).map(|token| token == END).collect();
        Grammars::new(TokenTable { bytes, special, eog: vec![END] }).expect("it is a vocabulary")
    }

    fn takes(format: &OutputFormat, text: &str) -> bool {
        let mut constraint = grammars().constraint(format).expect("it compiles").expect("it is a form");
        let goes_on = text.bytes().all(|byte| {
            constraint.mask().expect("it goes on").allows(byte.into()) && constraint.accept(byte.into()).is_ok()
        });
        goes_on && constraint.mask().expect("it goes on").allows(END)
    }

    #[test]
    fn a_required_call_is_one_that_the_parser_reads() {
        let weather = r#"{"place": "Rome"}"#;
        for (template, answer) in [
            (HERMES, format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {weather}}}\n</tool_call>")),
            (
                HERMES,
                format!(
                    "<think>\nHm.\n</think>\n\n<tool_call>\n{{\"name\": \"weather\", \"arguments\": {weather}}}\n</tool_call>"
                ),
            ),
            (LLAMA, format!("{{\"name\": \"weather\", \"parameters\": {weather}}}")),
            (MISTRAL, format!("[TOOL_CALLS][{{\"name\": \"weather\", \"arguments\": {weather}}}]")),
            (MISTRAL_NAMED, format!("[TOOL_CALLS]weather[ARGS]{weather}")),
            (FUNCTION, format!("<function=weather>{weather}</function>")),
            (HARMONY, format!("<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{weather}")),
        ] {
            for tool_choice in [ToolChoice::Required, ToolChoice::Function("weather".into())] {
                let chat = Chat { tool_choice, ..chat() };
                let format = AnswerFormat::detect(template).constraint(&chat, &OutputFormat::Text, "");
                let format = format.expect("a call is required");
                assert!(takes(&format, &answer), "{template}: {answer}");
                assert!(!takes(&format, &answer.replace("place", "size")), "{template}");
                assert!(!takes(&format, "Sunny."), "{template}");
            }
            let chat = Chat { tool_choice: ToolChoice::Function("time".into()), ..chat() };
            let format = AnswerFormat::detect(template).constraint(&chat, &OutputFormat::Text, "");
            assert!(!takes(&format.expect("a call is required"), &answer), "another one is required");
            let (_, _, calls) = parse(template, "", [answer.as_str()]);
            assert_eq!(calls, [("weather".to_owned(), weather.to_owned())]);
        }
    }

    #[test]
    fn thoughts_come_before_json() {
        let constraint =
            |prompt: &str| AnswerFormat::detect(THINKER).constraint(&Chat::default(), &OutputFormat::Json, prompt);
        let free = constraint("").expect("a thought may come");
        assert!(takes(&free, "{}") && takes(&free, "<think>Hm.</think>\n\n{}"));
        let begun = constraint("<think>\n").expect("a thought was begun");
        assert!(takes(&begun, "Hm.</think>{}") && !takes(&begun, "{}"));
        assert_eq!(constraint("<think>\n\n</think>\n\n"), None);
        let plain = AnswerFormat::default();
        assert_eq!(plain.constraint(&chat(), &OutputFormat::Json, ""), None);
    }
}

/// Returns what a family writes where it calls, thinks, and fails to.
fn markup(template: &str) -> Vec<&'static str> {
    match template {
        HERMES => vec![
            "<tool_call>{\"name\": \"time\"}</tool_call>",
            "<tool_call>{\"name\": \"time\", \"arguments\": {}}",
            "<tool_call>no",
            "<tool_call>\n{\"\0\"",
            "<function=time>\n</function>\n</tool_call>",
            "<function=time><x",
            "<think>\nHm.\n</think>\n\n",
        ],
        LLAMA => vec![
            "{\"name\": \"time\", \"parameters\": {}}",
            "{\"name\": \"Ann\"}",
            "<|python_tag|>{\"name\": \"time\"}",
            "<|python_tag|>no",
            ";",
        ],
        FUNCTION => {
            vec!["<function=time>{}</function>", "<function=time></function>", "<function=time>no", "<function="]
        }
        HARMONY => vec![
            "<|channel|>analysis<|message|>Hm.<|end|>",
            "<|start|>assistant",
            "<|channel|>final<|message|>",
            "<|channel|>commentary to=functions.time<|message|>{}<|call|>",
        ],
        THINKER => vec!["<think>\nHm.\n</think>\n\n", "<think>", "</think>"],
        _ => vec![
            "[TOOL_CALLS][{\"name\": \"time\"}]",
            "[TOOL_CALLS]time[ARGS]{}",
            "[TOOL_CALLS] [ no {",
            "[TOOL_CALLS] no {",
            ", {\"name\": \"time\"}",
            ", {",
            "]",
            "[THINK]Hm. [/THINK]\n",
        ],
    }
}

/// Returns a family's template, and an answer of its markup, the pieces of all families' markup, and text, also of
/// lengths around the parser's limits.
fn soup(templates: Vec<&'static str>) -> impl Strategy<Value = (&'static str, String)> {
    prop::sample::select(templates).prop_flat_map(|template| {
        let markup = prop::sample::select(markup(template));
        let tags = prop::sample::select(vec![
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "[THINK]",
            "[/THINK]",
            "<|python_tag|>",
            "[TOOL_CALLS]",
            "[CALL_ID]",
            "[ARGS]",
            "[",
            "]",
            "<function=",
            "weather",
            "time>",
            "</function>",
            "<parameter=",
            "place>",
            "</parameter>",
            "<|channel|>",
            "analysis",
            "commentary",
            "<|message|>",
            "<|end|>",
            "<|start|>",
            "<|call|>",
            " to=functions.",
            "{\"name\": \"weather\", ",
            "\"arguments\": ",
            "\"parameters\": ",
            "{",
            "}",
            "\"",
            "\\",
            ",",
            ":",
            "1",
            ";",
            "<",
            ">",
            "{\"place\": \"Rome\"}",
        ]);
        let text = prop::sample::select(vec![" ", "\n", "\n\n", "x", "é", "\u{a0}", "\u{fffd}"]);
        let lengths = prop::sample::select(vec![120_usize, 250, 500, 4_080]);
        let long = (prop::sample::select(vec![" ", "x", "é"]), lengths)
            .prop_map(|(text, bytes)| text.repeat(bytes / text.len()));
        let long_head = (4_000_usize..4_700)
            .prop_map(|bytes| format!("<tool_call>{{\"id\": \"{}\", \"name\": \"time\"}}", "x".repeat(bytes)));
        let owned = |text: &str| text.to_owned();
        let fragment = prop_oneof![
            20 => markup.prop_map(owned),
            10 => tags.prop_map(owned),
            20 => text.prop_map(owned),
            1 => long,
            1 => long_head,
        ];
        prop::collection::vec(fragment, 0..16).prop_map(move |fragments| (template, fragments.concat()))
    })
}

fn cut<'a>(answer: &'a str, cuts: &[usize]) -> Vec<&'a str> {
    let mut rest = answer;
    let mut pieces = Vec::new();
    for cut in cuts {
        let (piece, after) = rest.split_at(rest.ceil_char_boundary(*cut));
        pieces.push(piece);
        rest = after;
    }
    pieces.push(rest);
    pieces
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_048))]

    #[test]
    fn any_split_of_an_answer_gives_the_same(
        (template, answer) in soup(vec![
            HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, MISTRAL_THINKER, FUNCTION, HARMONY, THINKER,
        ]),
        prompt in prop::sample::select(vec!["", "<think>\n"]),
        (one_call, is_cut) in any::<(bool, bool)>(),
        cuts in prop_oneof![
            prop::collection::vec(1_usize..7, 0..200),
            prop::collection::vec(1_usize..700, 0..20),
        ],
    ) {
        let chat = Chat { one_call, ..chat() };
        let whole = parse_to(&chat, is_cut, template, prompt, [answer.as_str()]);
        prop_assert_eq!(parse_to(&chat, is_cut, template, prompt, cut(&answer, &cuts)), whole);
    }

    #[test]
    fn an_answer_without_calls_and_thoughts_comes_out_as_it_was_written(
        (template, answer) in soup(vec![LLAMA, MISTRAL, MISTRAL_NAMED, FUNCTION]),
    ) {
        let (text, _, calls) = parse(template, "", [answer.as_str()]);
        prop_assert!(!calls.is_empty() || text == answer, "{:?}", text);
    }
}

#[test]
fn what_is_said_after_a_call_that_is_none_is_not_given_its_space_again() {
    let answer = "<think>\nHm.\n</think>\n\nI \0\0\0n\0\0a\0\0 \"add\"\n<tool_call>\n{\"\0\0, \"argumentl_c\0\x05<tool_\
                  \u{fffd}\u{fffd}a\u{fffd}\u{fffd}><function=add><funcll";
    let text = "I \0\0\0n\0\0a\0\0 \"add\"\n<tool_call>\n{\"\0\0, \"argumentl_c\0\x05<tool_\
                \u{fffd}\u{fffd}a\u{fffd}\u{fffd}><funcll";
    check(HERMES, answer, text, "Hm.", &[("add", "{}")]);
}

#[test]
fn what_is_no_call_among_calls_is_text_like_any_other() {
    let call = "<tool_call>{\"name\": \"time\"}</tool_call>";
    let time = ("time", "{}");
    check(HERMES, &format!("Sure: {call}\n<tool_call>no"), "Sure: <tool_call>no", "", &[time]);
    check(HERMES, &format!("<tool_call>no{call} done"), "<tool_call>no done", "", &[time]);
    check(HERMES, &format!("<tool_call>{call}"), "<tool_call>", "", &[time]);
    check(HERMES, &format!(" <tool_call>no {call}"), " <tool_call>no", "", &[time]);
}

#[test]
fn what_is_said_around_calls_keeps_its_space() {
    let call = "<tool_call>{\"name\": \"time\"}</tool_call>";
    let time = &[("time", "{}")];
    check(HERMES, &format!("Sure: {call} done"), "Sure: done", "", time);
    check(HERMES, &format!("Sure.\n\n{call}\n<b>Done"), "Sure.\n\n<b>Done", "", time);
    check(HERMES, &format!("Sure:{call} done"), "Sure: done", "", time);
    check(HERMES, &format!("One {call}\n{call} two"), "One two", "", &[("time", "{}"), ("time", "{}")]);
    check(HERMES, &format!("{call} done"), "done", "", time);
    check(HERMES, &format!("Sure: {call}\n"), "Sure:", "", time);
    check(FUNCTION, "Sure:<function=time>{}</function> done", "Sure: done", "", time);
    check(MISTRAL, "Sure:[TOOL_CALLS][{\"name\": \"time\"}] done", "Sure: done", "", time);
}

#[test]
fn markup_that_the_limit_cut_is_never_shown() {
    for (template, answer) in [
        (HERMES, "I look. <tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \"Rome\"}}\n</tool_call>"),
        (
            HERMES,
            "I look. <tool_call>\n<function=weather>\n<parameter=place>\nRome\n</parameter>\n</function>\n</tool_call>",
        ),
        (LLAMA, "<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"place\": \"Rome\"}}"),
        (LLAMA, "{\"name\": \"weather\", \"parameters\": {\"place\": \"Rome\"}}"),
        (MISTRAL, "I look. [TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"place\": \"Rome\"}}]"),
        (MISTRAL_NAMED, "I look. [TOOL_CALLS]weather[ARGS]{\"place\": \"Rome\"}"),
        (FUNCTION, "I look. <function=weather>{\"place\": \"Rome\"}</function>"),
        (
            HARMONY,
            "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"place\": \"Rome\"}<|call|>",
        ),
        (HERMES, "<think>\nRome.\n</think>\n\nI look."),
    ] {
        for cut in 1..answer.len() {
            let mut parser = AnswerParser::new(AnswerFormat::detect(template), &chat(), "", 7);
            let mut shown = String::new();
            for piece in letters(&answer[..cut]) {
                let delta = parser.push(piece);
                shown = shown + &delta.text + &delta.reasoning;
            }
            let (last, _) = parser.finish(true);
            shown = shown + &last.text + &last.reasoning;
            assert!("I look. Rome.I look.".contains(shown.trim()), "{template} cut at {cut}: {shown:?}");
        }
    }
    // If the limit cuts only text, the text is output in full.
    let mut parser = AnswerParser::new(AnswerFormat::detect(HERMES), &chat(), "", 7);
    let shown = parser.push("a < b ").text + &parser.finish(true).0.text;
    assert_eq!(shown, "a < b ");
}

#[test]
fn where_one_call_is_wanted_the_answer_ends_behind_it() {
    let call = |number: u8| format!("{{\"name\": \"weather\", \"arguments\": {{\"place\": \"{number}\"}}}}");
    for (template, answer) in [
        (HERMES, format!("Well. <tool_call>{}</tool_call><tool_call>{}</tool_call> Done.", call(1), call(2))),
        (LLAMA, format!("{}; {}", call(1), call(2))),
        (MISTRAL, format!("[TOOL_CALLS][{}, {}]", call(1), call(2))),
        (
            HARMONY,
            "<|channel|>commentary to=functions.weather<|message|>{\"place\": \"1\"}<|call|>\
             <|start|>assistant<|channel|>commentary to=functions.weather<|message|>{}<|call|>"
                .to_owned(),
        ),
    ] {
        let chat = Chat { one_call: true, ..chat() };
        for pieces in [vec![answer.as_str()], letters(&answer).collect()] {
            let mut parser = AnswerParser::new(AnswerFormat::detect(template), &chat, "", 7);
            let mut arguments = String::new();
            for piece in pieces {
                assert!(!parser.is_done() || arguments.contains('1'), "{template}: before the call");
                for call in parser.push(piece).tool_calls {
                    assert_eq!(call.index, 0, "{template}");
                    arguments += &call.arguments;
                }
            }
            assert!(parser.is_done(), "{template}");
            let (rest, calls) = parser.finish(false);
            assert_eq!((rest, calls), (Delta::default(), true), "{template}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&arguments).expect(template), json!({"place": "1"}));
        }
    }
}
