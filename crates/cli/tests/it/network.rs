//! `tether up` and the commands that speak with it, with real engines.

#![cfg(feature = "llama")]

use std::process::Stdio;

use protocol::Clock as _;
use rpc::SystemClock;
use rustix::process::Signal;

use crate::program::{Home, lives, signal, wait_for};

const QUESTION: [&str; 5] = ["run", "tether-tiny", "What is the capital of Japan?", "--temperature", "0"];

#[test]
fn the_network_answers_is_looked_at_and_ends_cleanly() {
    let home = Home::new();
    let up = home.up(&[("TETHER_WORKERS", "2")]);
    assert!(home.well(&QUESTION).contains("Tokyo"));

    let models = home.json(&["model", "list", "--json"]);
    assert_eq!(models["data"][0]["id"], "tether-tiny");
    assert!(home.well(&["model", "list"]).contains("tether-tiny"));
    assert!(home.well(&["nodes"]).contains("tether-tiny@1.0 ready"));
    let checks = home.json(&["doctor", "--json"]);
    assert!(checks.as_array().expect("a list").iter().all(|check| check["well"] == true), "{checks}");

    let second = home.command(&["up", "--bind", "127.0.0.1:0"]).output().expect("the program runs");
    assert_eq!(second.status.code(), Some(2), "two networks on one folder");

    let engines = up.children();
    assert_eq!(engines.len(), 2, "each worker's model has a process of its own");
    assert_eq!(up.end(), Some(0));
    assert!(!engines.iter().any(|engine| lives(*engine)), "an engine outlived the network");
}

#[test]
fn a_log_that_cannot_be_written_stops_neither_the_network_nor_a_request() {
    let home = Home::new();
    let up = home.up_on_a_full_disk();
    for _ in 0..3 {
        assert!(home.well(&QUESTION).contains("Tokyo"));
    }
    assert_eq!(up.end(), Some(0));
}

#[test]
fn an_answer_whose_reader_leaves_ends_quietly_and_one_on_a_full_disk_with_an_error() {
    let home = Home::new();
    let up = home.up(&[]);
    let mut asked = home.command(&["run", "tether-tiny", "Count to one hundred.", "--max-tokens", "400"]);
    let mut asked = asked.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program runs");
    // Nobody reads: the first piece finds a closed pipe.
    drop(asked.stdout.take());
    let ended = asked.wait_with_output().expect("it ends");
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(0), ""));

    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("a full disk");
    let ended = home.command(&QUESTION).stdout(full).output().expect("the program runs");
    let error = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(ended.status.code() == Some(2) && error.contains("could not be written to stdout"), "{error}");
    assert_eq!(up.end(), Some(0));
}

#[test]
fn keys_made_and_revoked_work_on_a_running_network() {
    let home = Home::new();
    let up = home.up(&[("TETHER_GATEWAY__TOKEN_CACHE_SECS", "0")]);
    let key = home.well(&["token", "create", "--tenant", "acme"]).trim().to_owned();
    let ask = || {
        let mut command = home.command(&QUESTION);
        command.env("TETHER_API_KEY", &key).output().expect("the program runs")
    };
    assert!(ask().status.success());
    // A tenant's key does not operate the network.
    let mut nodes = home.command(&["nodes"]);
    let refused = nodes.env("TETHER_API_KEY", &key).output().expect("the program runs");
    assert_eq!(refused.status.code(), Some(2));
    home.well(&["token", "revoke", &key[9..17]]);
    let refused = ask();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("401"));
    assert_eq!(up.end(), Some(0));
}

#[test]
fn an_engine_that_is_killed_costs_no_answer_and_comes_back() {
    let home = Home::new();
    let up = home.up(&[("TETHER_WORKERS", "2")]);
    let engines = up.children();
    for engine in &engines {
        signal(*engine, Signal::KILL);
        assert!(home.well(&QUESTION).contains("Tokyo"));
        wait_for("the engine to come back", || {
            let now = up.children();
            now.len() == 2 && !now.contains(engine)
        });
        // An older report may still tell of the engine that is gone.
        let back = SystemClock.now();
        wait_for("every worker to report that it is ready", || {
            let fleet = home.json(&["nodes", "--json"]);
            let workers = fleet["workers"].as_array().cloned().unwrap_or_default();
            workers.iter().all(|worker| {
                let report = &worker["report"];
                report["modelCache"][0]["state"] == "ready" && report["issuedAt"].as_u64() > Some(back.0)
            })
        });
    }
    assert_eq!(up.end(), Some(0));
}

#[test]
fn the_only_engine_is_killed_while_idle_and_the_next_question_is_answered() {
    let home = Home::new();
    let up = home.up(&[("TETHER_WORKERS", "1")]);
    for _ in 0..4 {
        let engines = up.children();
        for engine in &engines {
            signal(*engine, Signal::KILL);
        }
        assert!(home.well(&QUESTION).contains("Tokyo"));
        wait_for("the engine to come back", || up.children().len() == 1 && up.children() != engines);
    }
    assert_eq!(up.end(), Some(0));
}

#[test]
fn a_network_that_was_killed_leaves_no_engine_and_starts_again() {
    let home = Home::new();
    let mut up = home.up(&[]);
    let engines = up.children();
    let key = up.key.clone();
    up.kill();
    wait_for("the engines to notice", || !engines.iter().any(|engine| lives(*engine)));
    let up = home.up(&[]);
    assert_eq!(up.key, key, "the first key is made once");
    assert!(home.well(&QUESTION).contains("Tokyo"));
    assert_eq!(up.end(), Some(0));
}

#[test]
fn the_demonstration_ends_well_and_leaves_nothing_behind() {
    let home = Home::new();
    let temporary = home.path().join("tmp");
    std::fs::create_dir(&temporary).expect("made");
    let output = home.command(&["demo"]).env("TMPDIR", &temporary).output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for expected in ["Tokyo", "kill -9", "3 + 4 = 7", "time to first token", "tokens/s"] {
        assert!(text.contains(expected), "{expected} is missing:\n{text}");
    }
    assert!(!home.data().exists());
    assert_eq!(std::fs::read_dir(&temporary).expect("a folder").count(), 0);
}

#[test]
fn adapters_are_added_listed_and_forgotten() {
    let home = Home::new();
    let up = home.up(&[]);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lora-pirate.gguf");
    let add = ["model", "adapter", "add", "tether-tiny", "privateer", file, "--description", "The same again."];
    let added = home.well(&add);
    let digest = "2ec0d1f8ab8df23b24fccadad97868d7b9bbd466f18ab6c37ff4844a4f69b05b";
    assert!(added.contains("[[worker.models.adapters]]") && added.contains(digest), "{added}");
    assert!(home.data().join("artifacts/sha256/2e").join(digest).is_file());
    let names = || -> Vec<String> {
        let listed = home.json(&["model", "adapter", "list", "--json"]);
        let adapters = listed.as_array().expect("a list").iter();
        adapters.map(|entry| entry["adapter"].as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(names(), ["pirate", "privateer"], "one comes with the program");
    assert!(home.well(&["model", "adapter", "list"]).contains("The same again."));
    home.well(&["model", "adapter", "rm", "tether-tiny", "privateer"]);
    assert_eq!(names(), ["pirate"]);
    assert_eq!(home.run(&["model", "adapter", "rm", "tether-tiny", "privateer"]).status.code(), Some(1));
    assert_eq!(up.end(), Some(0));
}

#[test]
fn up_serves_its_metrics_at_the_address_of_the_setting() {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    let home = Home::new();
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let up = home.up(&[("TETHER_METRICS_LISTEN", &free.to_string())]);
    let mut stream = TcpStream::connect(free).expect("it listens");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("answered");
    assert!(text.starts_with("HTTP/1.1 200") && text.contains("tether_build_info"), "{text}");
    assert_eq!(up.end(), Some(0));
}
