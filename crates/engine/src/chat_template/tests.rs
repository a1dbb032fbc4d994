use serde_json::json;

use super::*;
use crate::model_runtime::{ChatMessage, Tool, ToolCall};

fn say(role: &str, content: &str) -> ChatMessage {
    ChatMessage::new(role, content)
}

fn render(source: &str, messages: &[ChatMessage]) -> Result<String, ChatTemplateError> {
    render_chat(source, &messages.to_vec().into())
}

fn render_chat(source: &str, chat: &Chat) -> Result<String, ChatTemplateError> {
    ChatTemplate::new(Some(source), "<s>", "</s>")?.render(chat, SystemTime::UNIX_EPOCH)
}

#[test]
fn a_model_without_a_template_speaks_chatml() {
    let template = ChatTemplate::new(None, "", "").expect("it compiles");
    let chat = vec![say("system", "Be brief."), say("user", "Hi <b>\"you\"</b>")].into();
    let prompt = template.render(&chat, SystemTime::UNIX_EPOCH);
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>\"you\"</b><|im_end|>\n\
                    <|im_start|>assistant\n";
    assert_eq!(prompt.as_deref(), Ok(expected));
}

#[test]
fn blocks_are_trimmed_as_the_authors_of_templates_expect() {
    let source = "{%- for message in messages %}\n    {%- if message['role'] == 'user' %}\n{{ bos_token }}[{{ \
                  message['content'] | trim }}]\n    {% endif %}\n{% endfor %}";
    assert_eq!(render(source, &[say("user", " hi ")]).as_deref(), Ok("<s>[hi]\n"));
}

#[test]
fn python_methods_namespaces_and_loop_controls_work() {
    let source = "{% set state = namespace(last='') %}{% for m in messages %}{% if m.content.startswith('x') %}\
                  {% continue %}{% endif %}{% set state.last = m.content.split(' ')[-1].upper() %}{% endfor %}\
                  {{ state.last }}{{ messages[1:] | length }}{{ tools is defined }}{{ eos_token }}";
    let prompt = render(source, &[say("user", "one two"), say("user", "x")]);
    assert_eq!(prompt.as_deref(), Ok("TWO1True</s>"));
}

#[test]
fn a_refusal_by_the_template_concerns_the_messages() {
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok";
    assert_eq!(render(source, &[say("user", "a")]).as_deref(), Ok("ok"));
    let error = render(source, &[say("system", "a")]).expect_err("it raises");
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

fn calls(arguments: &str) -> ChatMessage {
    let call = ToolCall { id: "call_1".into(), name: "weather".into(), arguments: arguments.into() };
    ChatMessage { tool_calls: vec![call], ..say("assistant", "") }
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
    assert!(render("{{ nothing | tojson }}", &[say("user", "")]).is_err());
}

#[test]
fn filters_and_tests_are_those_of_jinja2() {
    let source =
        "{{ '{\\n\\na\\n' | indent(2, first=true) }}|{{ none is iterable }}|{{ 'a' is iterable }}|{{ [] is iterable }}";
    assert_eq!(render(source, &[say("user", "")]).as_deref(), Ok("  {\n\n  a\n|False|True|True"));
}

#[test]
fn generation_blocks_and_dates_are_those_of_hugging_face() {
    let source = "{%- generation -%} {{ messages[0].content }} {%- endgeneration %}{% raw %}{% if {% endraw %}\
                  {{ strftime_now('%d %b %Y') }}";
    assert_eq!(render(source, &[say("user", "hi")]).as_deref(), Ok("hi{% if 01 Jan 1970"));
}

#[test]
fn content_comes_in_the_form_the_template_reads() {
    let parts = "{% for m in messages %}{{ m['content'][0]['text'] }};{% endfor %}";
    assert_eq!(render(parts, &[say("user", "a"), say("user", "b")]).as_deref(), Ok("a;b;"));
    let text =
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}parts{% endif %}{% endfor %}";
    assert_eq!(render(text, &[say("user", "a")]).as_deref(), Ok("a"));
}

#[test]
fn arguments_come_in_the_form_the_template_reads() {
    let called = [say("user", "?"), calls(r#"{"place":"Rome"}"#)];
    let walk = "{% for m in messages %}{% for c in m.tool_calls or [] %}";
    let object = format!("{walk}{{{{ c.function.arguments | tojson }}}}{{% endfor %}}{{% endfor %}}");
    assert_eq!(render(&object, &called).as_deref(), Ok(r#"{"place": "Rome"}"#));
    let pairs = format!(
        "{walk}{{% for k, v in c.function.arguments.items() %}}{{{{ k ~ '=' ~ v }}}}{{% endfor %}}{{% endfor %}}{{% endfor %}}"
    );
    assert_eq!(render(&pairs, &called).as_deref(), Ok("place=Rome"));
    let text = format!("{walk}{{{{ 'args: ' + c.function.arguments }}}}{{% endfor %}}{{% endfor %}}");
    assert_eq!(render(&text, &called).as_deref(), Ok(r#"args: {"place":"Rome"}"#));
    // What a model wrote need not be JSON, and is told as it was.
    assert_eq!(render(&object, &[say("user", "?"), calls("oops")]).as_deref(), Ok("\"oops\""));
}

#[test]
fn tools_are_offered_unless_they_must_not_be_called() {
    let source = "{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}{{ messages[0].content }}";
    let chat = Chat { tools: vec![weather()], ..vec![say("user", "!")].into() };
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
    let chat = Chat::from(vec![say("user", "!")]);
    assert_eq!(template.render(&chat, SystemTime::UNIX_EPOCH).as_deref(), Ok("plain <s>"));
    let chat = Chat { tools: vec![weather()], ..chat };
    assert_eq!(template.render(&chat, SystemTime::UNIX_EPOCH).as_deref(), Ok("<s> weather"));
}

#[test]
fn options_reach_the_template_and_hide_nothing_of_the_conversation() {
    let source = "{{ enable_thinking }} {{ messages[0].content }}{{ messages[0].reasoning_content }}{{ bos_token }}";
    let message = ChatMessage { reasoning: Some("hm".into()), ..say("assistant", "a") };
    let options = json!({ "enable_thinking": false, "messages": [], "bos_token": "forged" });
    let template_options = options.as_object().expect("it is an object").clone();
    let chat = Chat { template_options, ..vec![message].into() };
    assert_eq!(render_chat(source, &chat).as_deref(), Ok("False ahm<s>"));
}
