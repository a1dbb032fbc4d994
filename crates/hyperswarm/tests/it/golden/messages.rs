use serde_json::Value;
use tether_hyperswarm::dht_rpc::{INVALID_TOKEN, Message, Request, Response, UNKNOWN_COMMAND, node_id};

use super::{bytes, cases, fixed, optional_bytes, optional_fixed, parsed, read};

fn check_request(case: &Value) {
    let value = optional_bytes(&case["value"]);
    let expected = Request {
        tid: parsed(&case["tid"]),
        to: parsed(&case["to"]),
        id: optional_fixed(&case["id"]),
        token: optional_fixed(&case["token"]),
        internal: case["internal"] == true,
        command: parsed(&case["command"]),
        target: optional_fixed(&case["target"]),
        value: value.as_deref(),
    };
    let mut out = Vec::new();
    expected.encode(&mut out);
    assert_eq!(out, bytes(&case["bytes"]), "{case}");
    assert_eq!(Message::decode(&bytes(&case["bytes"])), Ok(Message::Request(expected)), "{case}");
}

#[test]
fn requests_are_the_same_with_every_flag() {
    let golden = read("dht_messages");
    assert_eq!(cases(&golden["requests"]).len(), 32);
    cases(&golden["requests"]).iter().for_each(check_request);
    golden["commands"].as_object().expect("by name").values().for_each(check_request);
}

#[test]
fn responses_are_the_same_with_every_flag() {
    let golden = read("dht_messages");
    assert_eq!(cases(&golden["responses"]).len(), 32);
    for case in cases(&golden["responses"]) {
        let value = optional_bytes(&case["value"]);
        let expected = Response {
            tid: parsed(&case["tid"]),
            to: parsed(&case["to"]),
            id: optional_fixed(&case["id"]),
            token: optional_fixed(&case["token"]),
            closer_nodes: parsed::<Option<_>>(&case["closer_nodes"]).unwrap_or_default(),
            error: parsed(&case["error"]),
            value: value.as_deref(),
        };
        let mut out = Vec::new();
        expected.encode(&mut out);
        assert_eq!(out, bytes(&case["bytes"]), "{case}");
        assert_eq!(Message::decode(&bytes(&case["bytes"])), Ok(Message::Response(expected)), "{case}");
    }
}

#[test]
fn a_refused_token_is_told_as_error_two() {
    let golden = read("dht_messages");
    let wire = bytes(&golden["refused_token"]["response"]);
    let Ok(Message::Response(response)) = Message::decode(&wire) else { panic!("a response") };
    assert_eq!((response.error, UNKNOWN_COMMAND), (INVALID_TOKEN, 1));
    assert!(response.token.is_some() && !response.closer_nodes.is_empty());
}

#[test]
fn ids_come_from_addresses() {
    for case in cases(&read("crypto")["node_ids"]) {
        assert_eq!(node_id(parsed(&case["address"])), fixed(&case["id"]));
    }
}
