use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// The token that ends an answer.
const END: u32 = 256;
/// A special token that writes `<|call|>`.
const CALL: u32 = 257;
/// A token with the text `": `, which is common in tokenizers.
const COLON: u32 = 258;

/// A vocabulary of all bytes and a few more tokens.
fn grammars() -> Grammars {
    let mut bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    bytes.extend([b"<|end|>".to_vec(), b"<|call|>".to_vec(), b"\": ".to_vec(), Vec::new()]);
    let special = (0..bytes.len() as u32).map(|token| token == END || token == CALL).collect();
    Grammars::new(TokenTable { bytes, special, eog: vec![END] }).expect("it is a vocabulary")
}

fn schema(schema: Value) -> OutputFormat {
    OutputFormat::JsonSchema(schema)
}

/// Returns whether a constraint accepts a text and lets the answer end after it.
fn takes(grammars: &Grammars, format: &OutputFormat, text: &str) -> bool {
    let mut constraint = grammars.constraint(format).expect("it compiles").expect("it is a form");
    for byte in text.bytes() {
        if !constraint.mask().expect("it goes on").allows(u32::from(byte)) {
            return false;
        }
        constraint.accept(u32::from(byte)).expect("it was allowed");
    }
    constraint.mask().expect("it goes on").allows(END)
}

fn refusal(grammars: &Grammars, format: &OutputFormat) -> String {
    match grammars.constraint(format) {
        Err(EngineError::Unsupported { parameter, reason }) if parameter == "response_format" => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_answer_follows_its_form_and_ends_where_it_may() {
    let grammars = grammars();
    let person = schema(json!({
        "type": "object", "required": ["name"], "additionalProperties": false,
        "properties": { "name": { "type": "string" }, "age": { "type": "integer", "minimum": 0 } },
    }));
    let lark = OutputFormat::Lark("start: \"a\" number+\nnumber: /[0-9]/".into());
    for (format, text, expected) in [
        (&OutputFormat::Json, r#"{"a": [1, {"b": null}]}"#, true),
        (&OutputFormat::Json, "[1]", false),
        (&OutputFormat::Json, r#"{"a": 1"#, false),
        (&person, r#"{"name": "Ann", "age": 7}"#, true),
        (&person, r#"{"age": 7}"#, false),
        (&person, r#"{"name": "Ann", "age": -7}"#, false),
        (&person, r#"{"name": "Ann", "size": 7}"#, false),
        (&OutputFormat::Regex("(yes|no)!?".into()), "no!", true),
        (&OutputFormat::Regex("(yes|no)!?".into()), "not", false),
        (&lark, "a12", true),
        (&lark, "a", false),
    ] {
        assert_eq!(takes(&grammars, format, text), expected, "{format:?} {text}");
    }
    assert!(grammars.constraint(&OutputFormat::Text).expect("it is free").is_none());
}

#[test]
fn tokens_are_allowed_by_the_bytes_they_write() {
    let grammars = grammars();
    let mut constraint = grammars.constraint(&OutputFormat::Json).expect("it compiles").expect("it is a form");
    for token in [u32::from(b'{'), u32::from(b'"'), u32::from(b'x')] {
        constraint.accept(token).expect("it is JSON");
    }
    let mask = constraint.mask().expect("it goes on");
    assert!(mask.allows(COLON));
    assert!(!mask.allows(CALL), "a special token is not text");
    assert!(!mask.allows(END), "the object is open");
    assert!(!mask.allows(259), "a token without bytes writes nothing");
}

#[test]
fn a_complete_answer_allows_nothing_but_its_end() {
    let grammars = grammars();
    let format = OutputFormat::Regex("ab".into());
    let mut constraint = grammars.constraint(&format).expect("it compiles").expect("it is a form");
    constraint.accept(u32::from(b'a')).expect("it begins so");
    let mut other = constraint.clone();
    constraint.accept(u32::from(b'b')).expect("it goes on so");
    assert!(constraint.is_complete());
    let mask = constraint.mask().expect("it is complete");
    assert!((0..260).all(|token| mask.allows(token) == (token == END)));
    assert!(!other.is_complete(), "a clone goes its own way");
    assert!(other.accept(u32::from(b'c')).is_err());
}

#[test]
fn a_refusal_says_where_the_schema_is_wrong() {
    let grammars = grammars();
    let of_property = |property: Value| {
        schema(json!({
            "type": "object", "properties": { "fine": { "$ref": "#/$defs/number" }, "list": { "items": property } },
            "$defs": { "number": { "type": "number" } },
        }))
    };
    assert!(grammars.constraint(&of_property(json!({ "$ref": "#/$defs/number" }))).is_ok());
    for property in [json!({ "type": "strin" }), json!({ "not": {} }), json!({ "type": "string", "pattern": "(" })] {
        let reason = refusal(&grammars, &of_property(property));
        assert!(reason.starts_with("at /properties/list/items: "), "{reason}");
    }
    let reason = refusal(&grammars, &of_property(json!({ "maxItems": 1_000_000 })));
    assert_eq!(reason, "at /properties/list/items/maxItems: at most 4096 can be counted");
    assert!(refusal(&grammars, &schema(json!("string"))).contains("is an object"));
    assert!(refusal(&grammars, &OutputFormat::Regex("(".into())).contains("regex"));
    assert!(refusal(&grammars, &OutputFormat::Lark("start: foo".into())).contains("foo"));
}

#[test]
fn nothing_is_fetched_for_a_schema() {
    for reference in ["http://example.com/schema.json", "file:///etc/passwd"] {
        refusal(&grammars(), &schema(json!({ "$ref": reference })));
    }
}

#[test]
fn a_vocabulary_that_cannot_be_constrained_is_an_error() {
    for table in [
        TokenTable::default(),
        TokenTable { bytes: vec![b"a".to_vec()], special: vec![false], eog: vec![] },
        TokenTable { bytes: vec![b"a".to_vec()], special: vec![false], eog: vec![7] },
    ] {
        assert!(matches!(Grammars::new(table), Err(EngineError::Unsupported { .. })));
    }
}

#[test]
fn a_bomb_costs_bounded_time_and_ends_in_an_answer_or_an_error() {
    let grammars = grammars();
    let chain = |link: fn(Value) -> Value| {
        let step = |index: u32| link(json!({ "$ref": format!("#/$defs/s{}", index + 1) }));
        let mut steps: serde_json::Map<_, _> = (0..1_500).map(|index| (format!("s{index}"), step(index))).collect();
        steps.insert("s1500".into(), json!({ "type": "null" }));
        json!({ "$defs": steps, "$ref": "#/$defs/s0" })
    };
    let property = |name: String, schema: Value| serde_json::Map::from_iter([(name, schema)]);
    let choice = |one: u32| {
        let options = (0..8).map(|other| json!({ "properties": property(format!("p{one}x{other}"), json!({})) }));
        json!({ "anyOf": options.collect::<Vec<_>>() })
    };
    let optional = (0..1_500).map(|index| (format!("p{index}"), json!({ "pattern": format!("^[a-z]{{{index}}}$") })));
    let patterns = (0..64).map(|index| (format!("^a{{{index}}}(b|c)*$"), json!({})));
    let bombs = [
        OutputFormat::Regex("((a{1,1000}){1,1000}){1,1000}".into()),
        OutputFormat::Regex("(((a|b)*a(a|b){1,1000}){1,1000}){1,1000}".into()),
        OutputFormat::Regex(".*a.{400}b.{300}|.*e.{200}".into()),
        OutputFormat::Regex(r"\p{L}{1,100}\w{3,1000}".repeat(200)),
        OutputFormat::Regex("(".repeat(10_000) + &")".repeat(10_000)),
        OutputFormat::Regex((0..15_000).map(|word| format!("w{word}")).collect::<Vec<_>>().join("|")),
        OutputFormat::Regex("a".repeat(10 << 20)),
        OutputFormat::Lark("start: start start | \"a\" | \"\"".into()),
        OutputFormat::Lark(format!("start: {}\"a\"{}", "(".repeat(5_000), ")".repeat(5_000))),
        OutputFormat::Lark("start: a{1,100000}\na: b{1,100000}\nb: \"x\"".into()),
        OutputFormat::Lark("start: %json { \"type\": \"array\", \"maxItems\": 1000000 }".into()),
        schema(json!({ "enum": (0..100_000).map(|value| format!("value{value}")).collect::<Vec<_>>() })),
        schema(json!({ "enum": (0..5_000).map(|value| format!("value{value}")).collect::<Vec<_>>() })),
        schema(json!({ "type": "string", "minLength": 1_000_000_000 })),
        schema(json!({ "type": "string", "minLength": 1_000_000, "pattern": "^(ab|c)*$" })),
        schema(json!({ "type": "array", "minItems": 4_096, "items": { "type": "array", "maxItems": 4_096 } })),
        schema(json!({ "type": "array", "maxItems": 1_000_000_000, "items": { "type": "integer" } })),
        schema(json!({ "type": "integer", "multipleOf": 999_999_937 })),
        schema(json!({ "$ref": "#" })),
        schema(json!({ "allOf": [{ "$ref": "#" }, { "$ref": "#" }] })),
        schema(json!({ "type": "object", "properties": { "a": { "$ref": "#" } }, "required": ["a"] })),
        schema(chain(|next| next)),
        schema(chain(|next| json!({ "properties": { "x": next } }))),
        schema(chain(|next| json!({ "allOf": [next.clone(), next] }))),
        schema(chain(|next| json!({ "anyOf": [next.clone(), next] }))),
        schema(json!({ "allOf": (0..8).map(choice).collect::<Vec<_>>() })),
        schema(json!({ "type": "object", "properties": optional.collect::<serde_json::Map<_, _>>() })),
        schema(json!({ "type": "object", "patternProperties": patterns.collect::<serde_json::Map<_, _>>() })),
        schema((0..100).fold(json!({}), |inner, _| json!({ "items": inner }))),
    ];
    for bomb in bombs {
        let name: String = format!("{bomb:?}").chars().take(100).collect();
        let begin = Instant::now();
        if let Ok(Some(mut constraint)) = grammars.constraint(&bomb) {
            for _ in 0..100 {
                let Ok(mask) = constraint.mask() else { break };
                let next = (0..260).rev().find(|token| mask.allows(*token)).expect("a mask is never empty");
                if next == END || constraint.accept(next).is_err() {
                    break;
                }
            }
        }
        // An optimised build takes far less than a second. Tests run unoptimised and in parallel.
        assert!(begin.elapsed() < Duration::from_mins(1), "{name} took {:?}", begin.elapsed());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_form_makes_the_compiler_panic(
        text in r#"[a-c(){}\[\]|*+?.^$\\0-9,:"/%<> \n]{0,40}"#,
    ) {
        let grammars = grammars();
        for format in [OutputFormat::Regex(text.clone()), OutputFormat::Lark(text.clone()), OutputFormat::Lark(format!("start: {text}"))] {
            if let Ok(Some(mut constraint)) = grammars.constraint(&format) {
                let _ = constraint.mask();
            }
        }
    }
}
