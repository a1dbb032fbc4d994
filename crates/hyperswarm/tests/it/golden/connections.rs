use serde_json::Value;
use tether_hyperswarm::crypto::PublicKey;
use tether_hyperswarm::hyperdht::handshake::{Handshake, Mode};
use tether_hyperswarm::hyperdht::holepunch::{Holepunch, HolepunchPayload};
use tether_hyperswarm::hyperdht::noise_payload::{
    Firewall, HolepunchInfo, NoisePayload, Refusal, RelayInfo, RelayThrough, UdxInfo,
};

use super::{bytes, cases, fixed, optional_fixed, parsed, read};

fn firewall(case: &Value) -> Firewall {
    match case["firewall"].as_u64().expect("a number") {
        0 => Firewall::Unknown,
        1 => Firewall::Open,
        2 => Firewall::Consistent,
        _ => Firewall::Random,
    }
}

fn mode(case: &Value) -> Mode {
    match case["name"].as_str().expect("a name") {
        "from_client" => Mode::FromClient,
        "from_server" => Mode::FromServer,
        "from_relay" => Mode::FromRelay,
        "from_second_relay" => Mode::FromSecondRelay,
        "reply" => Mode::Reply,
        other => panic!("{other} is not known here"),
    }
}

fn payload(case: &Value) -> NoisePayload {
    let list = |field: &str| if case[field].is_null() { Vec::new() } else { parsed(&case[field]) };
    NoisePayload {
        version: 1,
        refusal: match case["error"].as_u64().expect("a number") {
            0 => None,
            1 => Some(Refusal::Aborted),
            2 => Some(Refusal::VersionMismatch),
            3 => Some(Refusal::TryLater),
            other => Some(Refusal::Other(other)),
        },
        firewall: firewall(case),
        holepunch: case["holepunch"].is_object().then(|| HolepunchInfo {
            id: parsed(&case["holepunch"]["id"]),
            relays: cases(&case["holepunch"]["relays"])
                .iter()
                .map(|relay| RelayInfo { relay_address: parsed(&relay["relay"]), peer_address: parsed(&relay["peer"]) })
                .collect(),
        }),
        addresses4: list("addresses4"),
        addresses6: parsed(&case["addresses6"]),
        udx: case["udx"].is_object().then(|| UdxInfo {
            reusable_socket: case["udx"]["reusable_socket"] == true,
            id: parsed(&case["udx"]["id"]),
            seq: parsed(&case["udx"]["seq"]),
        }),
        secret_stream: case["secret_stream"].is_object(),
        relay_through: case["relay_through"].is_object().then(|| RelayThrough {
            public_key: PublicKey(fixed(&case["relay_through"]["public_key"])),
            token: fixed(&case["relay_through"]["token"]),
        }),
        relay_addresses: list("relay_addresses"),
    }
}

#[test]
fn noise_payloads_say_the_same_in_every_part() {
    let golden = read("noise_payload");
    for case in cases(&golden["cases"]) {
        let expected = payload(case);
        assert_eq!(NoisePayload::decode(&bytes(&case["bytes"])).as_ref(), Ok(&expected), "{case}");
        // An empty list of relays may be said or left out, and Node's own peers leave it out.
        if case["relay_addresses"].as_array().is_none_or(|list| !list.is_empty()) {
            assert_eq!(expected.encode(), bytes(&case["bytes"]), "{case}");
        }
    }
    let later = NoisePayload::decode(&bytes(&golden["later_version"]["bytes"])).expect("told as such");
    assert!(!later.is_compatible());
}

#[test]
fn handshakes_pass_in_every_mode() {
    for case in cases(&read("router_values")["handshakes"]) {
        let noise = bytes(&case["noise"]);
        let expected = Handshake {
            mode: mode(case),
            noise: &noise,
            peer_address: parsed(&case["peer_address"]),
            relay_address: parsed(&case["relay_address"]),
        };
        assert_eq!(expected.encode(), bytes(&case["bytes"]), "{case}");
        assert_eq!(Handshake::decode(&bytes(&case["bytes"])), Ok(expected));
    }
}

#[test]
fn hole_punches_pass_in_every_mode() {
    for case in cases(&read("router_values")["holepunches"]) {
        let payload = bytes(&case["payload"]);
        let expected = Holepunch {
            mode: mode(case),
            id: parsed(&case["id"]),
            payload: &payload,
            peer_address: parsed(&case["peer_address"]),
        };
        assert_eq!(expected.encode(), bytes(&case["bytes"]), "{case}");
        assert_eq!(Holepunch::decode(&bytes(&case["bytes"])), Ok(expected));
    }
}

#[test]
fn notes_about_a_hole_punch_say_the_same() {
    let golden = read("holepunch_payload");
    for case in cases(&golden["cases"]) {
        let expected = HolepunchPayload {
            error: parsed(&case["error"]),
            firewall: firewall(case),
            round: parsed(&case["round"]),
            connected: case["connected"] == true,
            punching: case["punching"] == true,
            addresses: parsed(&case["addresses"]),
            remote_address: parsed(&case["remote_address"]),
            token: optional_fixed(&case["token"]),
            remote_token: optional_fixed(&case["remote_token"]),
        };
        assert_eq!(expected.encode(), bytes(&case["bytes"]), "{case}");
        assert_eq!(HolepunchPayload::open(&bytes(&case["sealed"]), &fixed(&golden["secret"])), Some(expected));
    }
}
