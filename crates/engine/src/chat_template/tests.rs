use serde_json::json;

use super::*;
use crate::model_runtime::{Message, Role, Tool, ToolCall, ToolChoice};

fn say(role: Role, content: &str) -> Message {
    Message::new(role, content)
}

fn render(source: &str, messages: &[Message]) -> Result<String, ChatTemplateError> {
    render_chat(source, &messages.to_vec().into())
}

fn render_chat(source: &str, chat: &Chat) -> Result<String, ChatTemplateError> {
    ChatTemplate::new(Some(source), "<s>", "</s>")?.render(chat, SystemTime::UNIX_EPOCH)
}

#[test]
fn a_model_without_a_template_speaks_chatml() {
    let template = ChatTemplate::new(None, "", "").expect("it compiles");
    let chat = vec![say(Role::System, "Be brief."), say(Role::User, "Hi <b>\"you\"</b>")].into();
    let prompt = template.render(&chat, SystemTime::UNIX_EPOCH);
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>\"you\"</b><|im_end|>\n\
                    <|im_start|>assistant\n";
    assert_eq!(prompt.as_deref(), Ok(expected));
}

#[test]
fn blocks_are_trimmed_as_the_authors_of_templates_expect() {
    let source = "{%- for message in messages %}\n    {%- if message['role'] == 'user' %}\n{{ bos_token }}[{{ \
                  message['content'] | trim }}]\n    {% endif %}\n{% endfor %}";
    assert_eq!(render(source, &[say(Role::User, " hi ")]).as_deref(), Ok("<s>[hi]\n"));
}

#[test]
fn python_methods_namespaces_and_loop_controls_work() {
    let source = "{% set state = namespace(last='') %}{% for m in messages %}{% if m.content.startswith('x') %}\
                  {% continue %}{% endif %}{% set state.last = m.content.split(' ')[-1].upper() %}{% endfor %}\
                  {{ state.last }}{{ messages[1:] | length }}{{ tools is defined }}{{ eos_token }}";
    let prompt = render(source, &[say(Role::User, "one two"), say(Role::User, "x")]);
    assert_eq!(prompt.as_deref(), Ok("TWO1True</s>"));
}

#[test]
fn a_refusal_by_the_template_concerns_the_messages() {
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok";
    assert_eq!(render(source, &[say(Role::User, "a")]).as_deref(), Ok("ok"));
    let error = render(source, &[say(Role::System, "a")]).expect_err("it raises");
    assert_eq!(error, ChatTemplateError::Refused("no system role".into()));
    let error = EngineError::from(error);
    assert!(matches!(error, EngineError::Unsupported { parameter, .. } if parameter == "messages"));
}

#[test]
fn an_endless_template_runs_out_of_fuel() {
    let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let error = render(source, &[]).expect_err("it never ends");
    assert!(matches!(&error, ChatTemplateError::Broken(reason) if reason.contains("fuel")), "{error}");
}

#[test]
fn a_template_that_makes_too_much_text_is_stopped() {
    let source = "{% set x = 'a' * 100000 %}{% for a in range(1000) %}{{ x }}{% endfor %}";
    assert!(matches!(render(source, &[]), Err(ChatTemplateError::Broken(_))));
    let doubling = "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(64) %}{% set n.x = n.x * 2 %}\
                    {% endfor %}{{ n.x }}";
    assert!(matches!(render(doubling, &[]), Err(ChatTemplateError::Broken(_))));
}

#[test]
fn a_template_that_does_not_parse_or_calls_what_is_not_there_is_broken() {
    for source in ["{% for %}", "{{ now() }}", "{% include 'other' %}", "{{ messages.x.y.z }}"] {
        assert!(matches!(render(source, &[]), Err(ChatTemplateError::Broken(_))), "{source}");
    }
}

#[test]
fn deep_nesting_is_an_error_not_a_stack_overflow() {
    let source = "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}";
    assert!(matches!(render(source, &[]), Err(ChatTemplateError::Broken(_))));
    assert!(render(&format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000)), &[]).is_err());
}

fn weather() -> Tool {
    Tool {
        name: "weather".into(),
        description: Some("Tells <the> weather".into()),
        parameters: Some(json!({ "type": "object", "properties": { "place": { "type": "string" } } })),
    }
}

fn calls(arguments: &str) -> Message {
    let call = ToolCall { id: "call_1".into(), name: "weather".into(), arguments: arguments.into() };
    Message { tool_calls: vec![call], ..say(Role::Assistant, "") }
}

#[test]
fn json_is_written_as_python_writes_it() {
    let source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}";
    let arguments = r#"{"b":[1,2.5,1e-7,true,null,[],{}],"a":"<é\"\n>"}"#;
    let expected = r#"{"b": [1, 2.5, 1e-07, true, null, [], {}], "a": "<é\"\n>"}"#;
    assert_eq!(render(source, &[calls(arguments)]).as_deref(), Ok(expected));
    let source = source.replace("tojson", "tojson(indent=2, sort_keys=true, ensure_ascii=true)");
    let expected = "{\n  \"a\": \"<\\u00e9\\\"\\n>\",\n  \"b\": [\n    1,\n    2.5,\n    1e-07,\n    true,\n    null,\n    \
                    [],\n    {}\n  ]\n}";
    assert_eq!(render(&source, &[calls(arguments)]).as_deref(), Ok(expected));
    let source = source.replace("indent=2, sort_keys=true, ensure_ascii=true", "separators=(',', ':')");
    assert_eq!(render(&source, &[calls(r#"{"a": [1, 2]}"#)]).as_deref(), Ok(r#"{"a":[1,2]}"#));
    assert!(render("{{ nothing | tojson }}", &[say(Role::User, "")]).is_err());
}

#[test]
fn filters_and_tests_are_those_of_jinja2() {
    let source =
        "{{ '{\\n\\na\\n' | indent(2, first=true) }}|{{ none is iterable }}|{{ 'a' is iterable }}|{{ [] is iterable }}";
    assert_eq!(render(source, &[say(Role::User, "")]).as_deref(), Ok("  {\n\n  a\n|False|True|True"));
}

#[test]
fn generation_blocks_and_dates_are_those_of_hugging_face() {
    let source = "{%- generation -%} {{ messages[0].content }} {%- endgeneration %}{% raw %}{% if {% endraw %}\
                  {{ strftime_now('%d %b %Y') }}";
    assert_eq!(render(source, &[say(Role::User, "hi")]).as_deref(), Ok("hi{% if 01 Jan 1970"));
}

#[test]
fn content_comes_in_the_form_the_template_reads() {
    let parts = "{% for m in messages %}{{ m['content'][0]['text'] }};{% endfor %}";
    assert_eq!(render(parts, &[say(Role::User, "a"), say(Role::User, "b")]).as_deref(), Ok("a;b;"));
    let text =
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}parts{% endif %}{% endfor %}";
    assert_eq!(render(text, &[say(Role::User, "a")]).as_deref(), Ok("a"));
}

#[test]
fn arguments_come_in_the_form_the_template_reads() {
    let called = [say(Role::User, "?"), calls(r#"{"place":"Rome"}"#)];
    let walk = "{% for m in messages %}{% for c in m.tool_calls or [] %}";
    let object = format!("{walk}{{{{ c.function.arguments | tojson }}}}{{% endfor %}}{{% endfor %}}");
    assert_eq!(render(&object, &called).as_deref(), Ok(r#"{"place": "Rome"}"#));
    let pairs = format!(
        "{walk}{{% for k, v in c.function.arguments.items() %}}{{{{ k ~ '=' ~ v }}}}{{% endfor %}}{{% endfor %}}{{% endfor %}}"
    );
    assert_eq!(render(&pairs, &called).as_deref(), Ok("place=Rome"));
    let text = format!("{walk}{{{{ 'args: ' + c.function.arguments }}}}{{% endfor %}}{{% endfor %}}");
    assert_eq!(render(&text, &called).as_deref(), Ok(r#"args: {"place":"Rome"}"#));
    // What a model wrote need not be JSON, and is rendered unchanged.
    assert_eq!(render(&object, &[say(Role::User, "?"), calls("oops")]).as_deref(), Ok("\"oops\""));
}

#[test]
fn tools_are_offered_unless_they_must_not_be_called() {
    let source = "{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}{{ messages[0].content }}";
    let chat = Chat { tools: vec![weather()], ..vec![say(Role::User, "!")].into() };
    let shown = r#"[{"type": "function", "function": {"name": "weather", "description": "Tells <the> weather", "#
        .to_owned()
        + r#""parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}}]!"#;
    assert_eq!(render_chat(source, &chat), Ok(shown));
    let chat = Chat { tool_choice: ToolChoice::None, ..chat };
    assert_eq!(render_chat(source, &chat).as_deref(), Ok("none!"));
    let takes_tools = |source: &str| ChatTemplate::new(Some(source), "", "").map(|template| template.takes_tools());
    assert_eq!(takes_tools(source), Ok(true));
    assert_eq!(takes_tools("{{ messages[0].content }}"), Ok(false));
}

#[test]
fn a_template_for_tools_is_used_for_tools_only() {
    let template = ChatTemplate::new(Some("plain {{ bos_token }}"), "<s>", "").expect("it compiles");
    assert!(!template.takes_tools());
    let template = template.with_tool_use("{{ bos_token }} {{ tools[0].function.name }}").expect("it compiles");
    assert!(template.takes_tools());
    let chat = Chat::from(vec![say(Role::User, "!")]);
    assert_eq!(template.render(&chat, SystemTime::UNIX_EPOCH).as_deref(), Ok("plain <s>"));
    let chat = Chat { tools: vec![weather()], ..chat };
    assert_eq!(template.render(&chat, SystemTime::UNIX_EPOCH).as_deref(), Ok("<s> weather"));
}

#[test]
fn options_reach_the_template_and_hide_nothing_of_the_conversation() {
    let source = "{{ enable_thinking }} {{ messages[0].content }}{{ messages[0].reasoning_content }}{{ bos_token }}";
    let message = Message { reasoning: Some("hm".into()), ..say(Role::Assistant, "a") };
    let options = json!({ "enable_thinking": false, "messages": [], "bos_token": "forged" });
    let template_options = options.as_object().expect("it is an object").clone();
    let chat = Chat { template_options, ..vec![message].into() };
    assert_eq!(render_chat(source, &chat).as_deref(), Ok("False ahm<s>"));
}

/// Each snippet tests one feature. `interop/templates/snippets.py` records and checks the output of jinja2.
#[test]
fn snippets_render_as_jinja2_renders_them() {
    #[derive(serde::Deserialize)]
    struct Golden {
        variables: serde_json::Map<String, serde_json::Value>,
        snippets: Vec<Snippet>,
    }
    #[derive(serde::Deserialize)]
    struct Snippet {
        template: String,
        /// `None` if jinja2 fails.
        rendered: Option<String>,
    }
    let golden: Golden = serde_json::from_str(include_str!("snippets.json")).expect("it is JSON");
    let chat = Chat { template_options: golden.variables, ..vec![say(Role::User, "Hello there")].into() };
    let differences: Vec<String> = golden
        .snippets
        .into_iter()
        .filter_map(|Snippet { template, rendered }| {
            let ours = render_chat(&template, &chat);
            let is_same = ours.as_ref().ok() == rendered.as_ref();
            (!is_same).then(|| format!("{template}\n  jinja2: {rendered:?}\n  ours:   {ours:?}"))
        })
        .collect();
    assert!(differences.is_empty(), "{} differ:\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn a_request_that_a_template_fails_on_is_the_requests_fault_and_names_its_field() {
    let fails = |source: &str, chat: &Chat| {
        let error = EngineError::from(render_chat(source, chat).expect_err("it fails"));
        let EngineError::Unsupported { parameter, reason } = error else { panic!("{error:?}") };
        (parameter, reason)
    };
    let chat: Chat = vec![say(Role::User, "hi")].into();
    let option = |name: &str| {
        let options = json!({ name: 5, "other": "x" });
        Chat { template_options: options.as_object().expect("an object").clone(), ..chat.clone() }
    };
    let dated = "{{ messages[0].content }}{% if date_string is defined %}{{ date_string.upper() }}{% endif %}";
    assert_eq!(fails(dated, &option("date_string")).0, "chat_template_kwargs.date_string");
    let thinks = "{{ messages[0].content }}{{ (reasoning_effort or 'low') + '!' }}";
    assert_eq!(fails(thinks, &option("reasoning_effort")).0, "reasoning_effort");

    let walk = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{% for k, v in \
                c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}";
    let cut = vec![say(Role::User, "hi"), calls(r#"{"place": "Ro"#), Message { ..say(Role::Tool, "20") }];
    let (parameter, reason) = fails(walk, &cut.into());
    assert_eq!(parameter, "messages[1].tool_calls[0].function.arguments");
    assert!(reason.contains("must be a JSON object"), "{reason}");

    let typed = "{% for t in tools or [] %}{{ t.function.parameters.properties.place.type.upper() }}{% endfor %}\
                 {{ messages[0].content }}";
    let untyped = Tool { name: "g".into(), parameters: Some(json!({ "type": "object" })), ..weather() };
    let (parameter, _) = fails(typed, &Chat { tools: vec![weather(), untyped], ..chat.clone() });
    assert_eq!(parameter, "tools[1]");

    let short = "{% if messages | length > 2 %}{{ messages.none.none }}{% endif %}{{ messages[0].content }}";
    assert_eq!(
        fails(short, &vec![say(Role::User, "a"), say(Role::Assistant, "b"), say(Role::User, "c")].into()).0,
        "messages"
    );
    // No change to the request would help here.
    let (parameter, reason) = fails("{{ nothing.at.all }}", &chat);
    assert!(parameter == "messages" && reason.contains("takes no conversations"), "{reason}");
}

#[test]
fn a_template_that_renders_no_conversation_is_found_at_once() {
    let checked = |source: &str| ChatTemplate::new(Some(source), "", "").and_then(ChatTemplate::checked).map(drop);
    assert_eq!(checked("{{ messages[0].content }}"), Ok(()));
    assert_eq!(checked("{{ raise_exception('a system message must come first') }}"), Ok(()));
    assert!(matches!(checked("{{ nothing.at.all }}"), Err(ChatTemplateError::Broken(_))));
}

#[test]
fn a_model_without_a_template_takes_conversations_only_if_it_knows_chatml() {
    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny.gguf");
    let mut header = Header::parse(&std::fs::read(TINY).expect("the tiny model is there")).expect("it is valid");
    header.metadata.remove("tokenizer.chat_template");
    assert!(ChatTemplate::of_model(&header).is_ok(), "its vocabulary has the tokens of ChatML");
    header.metadata.remove("tokenizer.ggml.tokens");
    let error = EngineError::from(ChatTemplate::of_model(&header).expect_err("a base model"));
    let EngineError::Unsupported { parameter, reason } = error else { panic!("{error:?}") };
    assert!(parameter == "messages" && reason.contains("has no chat template; send it a prompt"), "{reason}");
}

#[test]
fn what_tools_may_leave_out_is_filled_in_for_templates_that_read_it() {
    let source = "{% for t in tools or [] %}{{ '// ' + t.function.description + ' ' + t.function.name }}\
                  {% for name in t.function.parameters.properties | items %}{{ name }}{% endfor %}{% endfor %}\
                  {{ messages[0].content }}";
    let bare = Tool { name: "f".into(), description: None, parameters: Some(json!({})) };
    let chat = Chat { tools: vec![bare], ..vec![say(Role::User, "hi")].into() };
    assert_eq!(render_chat(source, &chat).as_deref(), Ok("//  fhi"));
}

#[test]
fn ids_are_shortened_for_templates_that_take_nine_letters() {
    let source = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}\
                  {{ raise_exception('ids have 9 letters') }}{% endif %}<{{ c.id }} {{ c.function.arguments }}>{% endfor %}\
                  {% if m.tool_call_id is defined %}{% if m.tool_call_id | length != 9 %}\
                  {{ raise_exception('ids have 9 letters') }}{% endif %}[{{ m.tool_call_id }}]{% endif %}{{ m.content }}\
                  {% endfor %}";
    let call = |id: &str| ToolCall { id: id.into(), name: "weather".into(), arguments: "{}".into() };
    let answer = |id: &str| Message { tool_call_id: Some(id.into()), ..say(Role::Tool, "20") };
    let conversation = |ids: &[&str]| {
        let calls = Message { tool_calls: ids.iter().map(|id| call(id)).collect(), ..say(Role::Assistant, "") };
        let answers = ids.iter().map(|id| answer(id));
        Chat::from([say(Role::User, "?"), calls].into_iter().chain(answers).collect::<Vec<_>>())
    };
    let prompt = render_chat(source, &conversation(&["call_0123456789abcdef"])).expect("it renders");
    assert_eq!(prompt, "?<789abcdef {}>[789abcdef]20");
    assert_eq!(render_chat(source, &conversation(&["abc123xyz"])).as_deref(), Ok("?<abc123xyz {}>[abc123xyz]20"));
    // Two ids with the same end, a short id, and one that equals the end of another.
    let prompt = render_chat(source, &conversation(&["call_a_123456789", "call_b_123456789", "x", "123456789"]));
    let prompt = prompt.expect("it renders");
    let ids = |open: char, close: char| -> Vec<String> {
        prompt.split(open).skip(1).map(|part| part.split([' ', close]).next().unwrap_or_default().to_owned()).collect()
    };
    let (called, answered) = (ids('<', '>'), ids('[', ']'));
    assert_eq!(called, answered);
    assert_eq!(called.iter().collect::<std::collections::BTreeSet<_>>().len(), 4, "{called:?}");
    assert!(called.iter().all(|id| id.len() == 9), "{called:?}");
    // Other templates see the original ids.
    let source = "{% for m in messages %}{{ m.tool_call_id }}{{ m.tool_calls[0].id if m.tool_calls }}{% endfor %}";
    let prompt = render_chat(source, &conversation(&["call_1"])).expect("it renders");
    assert_eq!(prompt, "call_1call_1");
}

#[test]
fn a_last_message_is_continued_where_it_ends() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}\
                  {% if add_generation_prompt %}<assistant>{% endif %}";
    let continued = |source: &str, last: &str| {
        let messages = vec![say(Role::User, "Well, what?"), say(Role::Assistant, last)];
        render_chat(source, &Chat { continue_last: true, ..messages.into() })
    };
    assert_eq!(continued(source, "Well, ").as_deref(), Ok("<user>Well, what?</user><assistant>Well, "));
    let trims = source.replace("m.content", "m.content | trim");
    assert_eq!(continued(&trims, " Well, ").as_deref(), Ok("<user>Well, what?</user><assistant>Well,"));
    let error = continued("{{ messages[0].content }}", "Yes").expect_err("the message is not shown");
    assert!(matches!(error, ChatTemplateError::Unfit { parameter, .. } if parameter == "continue_final_message"));
}
