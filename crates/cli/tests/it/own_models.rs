//! A person's own GGUF file, from the command line to the answer.

#![cfg(feature = "llama")]

use std::fs;

use serde_json::Value;
use tether_cli::tiny_model;

use crate::program::{Home, wait_for};

/// Makes a file of the tiny model whose digest is another one's.
fn write_model(home: &Home, file: &str, tail: &[u8]) {
    fs::write(home.path().join(file), [tiny_model::BYTES, tail].concat()).expect("written");
}

/// Returns the registered models by name, as operators see them, or those that are served, as clients do.
fn listed(home: &Home, more: &[&str]) -> Vec<String> {
    let listed = home.json(&[&["model", "list", "--json"], more].concat());
    let models = listed["data"].as_array().expect("a list");
    models.iter().map(|model| model["id"].as_str().expect("a name").to_owned()).collect()
}

fn ids(home: &Home) -> Vec<String> {
    listed(home, &[])
}

fn ask(home: &Home, model: &str) -> Value {
    home.json(&["run", model, "What is the capital of Japan?", "--temperature", "0", "--json"])
}

#[test]
fn a_file_is_served_under_its_own_name_and_again_after_it_has_changed() {
    let home = Home::new();
    write_model(&home, "Mine-1M.Q8_0.gguf", b"1");
    let up = home.up_with(&["Mine-1M.Q8_0.gguf", "--workers", "1"], &[]);
    assert!(ids(&home).contains(&"mine-1m".to_owned()), "{:?}", ids(&home));
    let answer = ask(&home, "mine-1m");
    assert!(answer["text"].as_str().expect("text").contains("Tokyo"), "{answer}");
    assert_eq!(up.end(), Some(0));

    // The same name, other bytes: what clients get is what is served.
    write_model(&home, "Mine-1M.Q8_0.gguf", b"22");
    let up = home.up_with(&["Mine-1M.Q8_0.gguf", "other=Mine-1M.Q8_0.gguf", "--workers", "1"], &[]);
    wait_for("both versions to be listed", || ids(&home).contains(&"mine-1m@1.0".to_owned()));
    assert!(ask(&home, "mine-1m")["text"].as_str().expect("text").contains("Tokyo"));
    assert!(ask(&home, "other")["text"].as_str().expect("text").contains("Tokyo"));
    let mistyped = home.run(&["run", "mine-1", "hi"]);
    let errors = String::from_utf8_lossy(&mistyped.stderr);
    assert!(errors.contains("did you mean mine-1m?"), "{errors}");
    assert_eq!(up.end(), Some(0));
}

#[test]
fn a_file_is_asked_by_its_path_whether_or_not_a_network_runs() {
    let home = Home::new();
    write_model(&home, "Mine-1M.Q8_0.gguf", b"5");
    write_model(&home, "plain", b"6");
    write_model(&home, "other.gguf", b"7");
    let question = ["What is the capital of Japan?", "--temperature", "0"];
    let notes_of = |file: &str| {
        let output = home.run(&[&["run", file, "--verbose"], &question[..]].concat());
        let (text, notes) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{file}: {notes}");
        assert!(text.contains("Tokyo") && notes.contains(" of them cached; first token after "), "{notes}");
        notes.into_owned()
    };
    for file in ["Mine-1M.Q8_0.gguf", "mine=./plain", "plain"] {
        let notes = notes_of(file);
        assert!(notes.contains("loaded in ") && notes.contains("one was started for this question"), "{notes}");
    }

    let up = home.up_with(&["Mine-1M.Q8_0.gguf", "--workers", "1"], &[]);
    let notes = notes_of("./Mine-1M.Q8_0.gguf");
    assert!(notes.contains("loaded before") && !notes.contains("started"), "{notes}");
    let elsewhere = home.run(&["run", "other.gguf", "hi", "--url", &up.url]);
    let refused = String::from_utf8_lossy(&elsewhere.stderr);
    assert_eq!(elsewhere.status.code(), Some(2), "{refused}");
    assert!(refused.contains("does not serve other.gguf") && refused.contains("tether model add /"), "{refused}");
    // What it does not serve is added to it once.
    assert!(notes_of("new=other.gguf").contains("serves new=other.gguf as new@1.0 from now on"));
    assert!(ids(&home).contains(&"new".to_owned()), "{:?}", ids(&home));
    assert!(!notes_of("other.gguf").contains("from now on"));
    assert_eq!(up.end(), Some(0));
}

#[test]
fn clients_see_what_is_served_and_operators_what_is_registered() {
    let home = Home::new();
    write_model(&home, "mine.gguf", b"4");
    let up = home.up_with(&["mine.gguf", "--workers", "1"], &[]);
    let key = home.json(&["token", "create", "--tenant", "acme", "--json"]);
    fs::write(home.path().join("client-key"), key["token"].as_str().expect("a key")).expect("written");
    let of_client = ["--api-key-file", "client-key"];
    assert_eq!(listed(&home, &of_client), ["mine", "tether-tiny", "tether-tiny:pirate"]);
    assert_eq!(up.end(), Some(0));

    // The same network, without the file: its name stays in the registry.
    let up = home.up_with(&["--workers", "1"], &[]);
    assert_eq!(listed(&home, &of_client), ["tether-tiny", "tether-tiny:pirate"]);
    let all = home.json(&["model", "list", "--json"]);
    assert_eq!((&all["data"][0]["id"], &all["data"][0]["state"]), (&"mine".into(), &"unserved".into()), "{all}");
    let asked = home.run(&["run", "mine", "hi"]);
    let errors = String::from_utf8_lossy(&asked.stderr);
    assert!(errors.contains("503") && errors.contains("no worker serves mine@1.0 now"), "{errors}");
    assert_eq!(up.end(), Some(0));
}

#[test]
fn a_file_that_cannot_be_served_is_refused_at_once_and_by_name() {
    let home = Home::new();
    fs::write(home.path().join("picture.gguf"), b"\x89PNG").expect("written");
    fs::write(home.path().join("adapter.gguf"), tiny_model::ADAPTER_BYTES).expect("written");
    for (file, words) in [
        ("missing.gguf", "there is no file"),
        ("picture.gguf", "picture.gguf cannot be served"),
        ("adapter.gguf", "not a model"),
        ("Bad Name=picture.gguf", "lower-case"),
    ] {
        for command in [&["up", "--bind", "127.0.0.1:0", file][..], &["run", file, "hi"]] {
            let output = home.run(command);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command:?}: {errors}");
            assert!(errors.contains(words), "{command:?}: {errors}");
        }
    }
}

#[test]
fn the_settings_take_a_file_without_digest_or_version() {
    let home = Home::new();
    write_model(&home, "m.gguf", b"3");
    let settings = home.path().join("tether.toml");
    let text = "workers = 1\n[[worker.models]]\nmodel_id = \"of-settings\"\nfile = \"m.gguf\"\n";
    fs::write(&settings, text).expect("written");
    let up = home.up_with(&["--config", "tether.toml"], &[]);
    assert!(ids(&home).contains(&"of-settings".to_owned()), "{:?}", ids(&home));
    assert!(ask(&home, "of-settings")["text"].as_str().expect("text").contains("Tokyo"));
    assert_eq!(up.end(), Some(0));
}
