//! Models that are added by command: `tether model add`, `list`, `show`, `alias` and `rm`.

#![cfg(feature = "llama")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;
use tether_cli::tiny_model;

use crate::program::{Home, signal, wait_for};

/// Writes a model of its own digest: bytes behind the last tensor belong to nothing.
fn write_model(home: &Home, file: &str, tail: &[u8]) {
    fs::write(home.path().join(file), [tiny_model::BYTES, tail].concat()).expect("written");
}

/// Returns the files of the store.
fn stored(home: &Home) -> usize {
    fn files(folder: &Path) -> usize {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
    }
    files(&home.data().join("artifacts"))
}

fn refused(home: &Home, arguments: &[&str]) -> String {
    let output = home.run(arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    String::from_utf8(output.stderr).expect("text")
}

fn row(home: &Home, id: &str) -> Value {
    let listed = home.json(&["model", "list", "--json"]);
    let rows = listed["data"].as_array().expect("a list").clone();
    rows.into_iter().find(|row| row["id"] == id).unwrap_or_else(|| panic!("no {id} in {listed}"))
}

fn ask(home: &Home, model: &str) -> String {
    let answer = home.json(&["run", model, "What is the capital of Japan?", "--temperature", "0", "--json"]);
    answer["text"].as_str().expect("a text").to_owned()
}

#[test]
fn a_model_that_is_added_is_served_by_the_next_network() {
    let home = Home::apart();
    write_model(&home, "Tiny-Two.Q8_0.gguf", b"2");
    let output = home.well(&["model", "add", "Tiny-Two.Q8_0.gguf"]);
    for word in ["tiny-two@1.0 is added: ", "512 tokens of context", "chat", "tether up", "tether run tiny-two"] {
        assert!(output.contains(word), "{word}: {output}");
    }
    // The same again costs nothing and changes nothing.
    assert!(home.well(&["model", "add", "Tiny-Two.Q8_0.gguf"]).contains("in the store already"));
    assert_eq!(row(&home, "tiny-two")["state"], "on disk");
    let shown = home.well(&["model", "show", "tiny-two"]);
    for word in ["architecture  llama", "chat template", "<|im_start|>", "state         on disk", "sha256:"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    fs::remove_file(home.path().join("Tiny-Two.Q8_0.gguf")).expect("it is no longer needed");
    // Without a network, one is started for the question.
    assert!(ask(&home, "tiny-two").contains("Tokyo"));

    let up = home.up_with(&["--workers", "1"], &[]);
    home.well(&["model", "alias", "gpt-4o-mini", "tiny-two"]);
    assert!(ask(&home, "gpt-4o-mini").contains("Tokyo"));
    // It is in memory since it was asked, and a report tells that.
    wait_for("the list to show it in memory", || {
        let listed = home.well(&["list"]);
        let line = listed.lines().find(|line| line.starts_with("tiny-two@1.0")).unwrap_or_else(|| panic!("{listed}"));
        ["ready", "worker-1", "gpt-4o-mini"].iter().all(|word| line.contains(word))
    });
    assert_eq!(row(&home, "tiny-two")["where"][0]["state"], "ready");
    assert!(home.well(&["model", "unload", "gpt-4o-mini"]).contains("tiny-two@1.0 at worker-1: not in memory"));
    wait_for("the engine to end", || up.children().len() == 1);
    assert!(home.well(&["model", "load", "tiny-two"]).contains("in memory"));
    assert_eq!(up.children().len(), 2);
    // How long it stays is said for the network, and kept by the registry.
    assert!(home.well(&["model", "pin", "tiny-two"]).contains("tiny-two@1.0 is pinned"));
    assert!(home.well(&["model", "show", "tiny-two"]).contains("kept          pinned"));
    assert!(home.well(&["model", "unpin", "tiny-two"]).contains("no longer pinned"));
    let output = home.well(&["model", "load", "tiny-two", "--keep-alive", "0"]);
    assert!(output.contains("not in memory"), "{output}");
    wait_for("the engine to end", || up.children().len() == 1);
    assert!(home.well(&["model", "load", "tiny-two", "--keep-alive", "1h"]).contains("in memory"));
    assert!(home.well(&["model", "show", "tiny-two"]).contains("3600 s without work"));
    assert!(refused(&home, &["model", "load", "tiny-two", "--keep-alive", "soon"]).contains("30s"));
    assert!(refused(&home, &["model", "load", "tiny-too"]).contains("does not exist"));
    assert_eq!(home.json(&["model", "show", "gpt-4o-mini", "--json"])["modelId"], "tiny-two");
    let held = refused(&home, &["model", "rm", "tiny-two"]);
    assert!(held.contains("in the memory of worker"), "{held}");
    assert_eq!(up.end(), Some(0));

    let named = refused(&home, &["model", "rm", "tiny-two"]);
    assert!(named.contains("gpt-4o-mini"), "{named}");
    let output = home.well(&["model", "rm", "tiny-two", "--force"]);
    assert!(output.contains("its file is deleted") && output.contains("so is gpt-4o-mini"), "{output}");
    assert_eq!(stored(&home), 0);
    assert!(refused(&home, &["model", "show", "tiny-two"]).contains("there is no model"));
    assert_eq!(home.run(&["model", "alias", "gpt-4o-mini", "--rm"]).status.code(), Some(1));
}

#[test]
fn a_model_is_added_to_a_network_that_runs() {
    let home = Home::apart();
    write_model(&home, "mine.gguf", b"m");
    let up = home.up_with(&["--workers", "1"], &[]);
    let output = home.well(&["model", "add", "mine.gguf", "--name", "ours", "--version", "2.1"]);
    assert!(output.contains("ours@2.1 is added") && !output.contains("tether up"), "{output}");
    // The running worker takes it up by itself.
    wait_for("the model to be served", || row(&home, "ours")["state"] != "unserved");
    assert!(ask(&home, "ours").contains("Tokyo"));
    let alias = refused(&home, &["model", "alias", "ours", "tether-tiny"]);
    assert!(alias.contains("a model's own name"), "{alias}");
    home.well(&["model", "alias", "claude-sonnet-4", "tether-tiny:pirate"]);
    assert!(refused(&home, &["model", "alias", "other", "claude-sonnet-4"]).contains("tether-tiny:pirate"));
    assert!(home.well(&["list"]).contains("claude-sonnet-4 (:pirate)"));
    let output = home.well(&["model", "rm", "ours@2.1", "--force"]);
    assert!(output.contains("its file is deleted"), "{output}");
    // And lets it go.
    wait_for("the model to be unloaded", || up.children().len() == 1);
    assert_eq!(up.end(), Some(0));
}

#[test]
fn what_cannot_be_added_leaves_nothing_behind() {
    let home = Home::apart();
    write_model(&home, "mine.gguf", b"1");
    write_model(&home, "mine2.gguf", b"2");
    fs::write(home.path().join("picture.gguf"), b"\x89PNG").expect("written");
    write_model(&home, "part-00001-of-00002.gguf", b"");
    home.well(&["model", "add", "mine.gguf"]);
    for (arguments, word) in [
        (&["mine2.gguf", "--name", "mine"][..], "add this one as version 1.1"),
        (&["mine2.gguf", "--name", "mine", "--version", "1.0"], "choose another name"),
        (&["mine2.gguf", "--name", "My Model"], "my-model is"),
        (&["mine2.gguf", "--version", "1"], "MAJOR.MINOR"),
        (&["mine2.gguf", "--name", "tether-tiny"], "comes with the program"),
        (&["mine.gguf", "mine2.gguf", "--name", "both"], "for one model"),
        (&["picture.gguf"], "GGUF"),
        (&["away.gguf"], "there is no file"),
        (&["org/Repo-GGUF:Q8_0"], "hf:org/Repo-GGUF"),
        (&["part-00001-of-00002.gguf"], "part-00002-of-00002.gguf is missing"),
    ] {
        let output = refused(&home, &[&["model", "add"], arguments].concat());
        assert!(output.contains(word), "{word}: {output}");
        assert_eq!(stored(&home), 1, "{output}");
    }
    home.well(&["model", "add", "mine2.gguf", "--name", "mine", "--version", "1.1"]);
    assert!(refused(&home, &["model", "rm", "mine"]).contains("the versions 1.0, 1.1"));
    home.well(&["model", "rm", "mine@1.0"]);
    assert!(refused(&home, &["model", "rm", "tether-tiny"]).contains("comes with the program"));
    assert_eq!(stored(&home), 1);
}

#[test]
fn who_stops_the_copy_of_a_model_keeps_nothing_of_it() {
    let home = Home::apart();
    // So long that it takes a moment, and a file that takes no room itself.
    let mut file = fs::File::create(home.path().join("long.gguf")).expect("made");
    file.write_all(tiny_model::BYTES).expect("written");
    file.set_len(1 << 30).expect("longer");
    let mut command = home.command(&["model", "add", "long.gguf"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the program runs");
    wait_for("the copy to begin", || stored(&home) > 0);
    signal(child.id(), Signal::INT);
    let status = child.wait().expect("it ends");
    assert_eq!((status.code(), stored(&home)), (Some(2), 0));
}

/// Returns the file of a model in the store, of which there is one.
fn artifact(home: &Home) -> std::path::PathBuf {
    let folders = fs::read_dir(home.data().join("artifacts/sha256")).expect("a folder");
    let files = folders.flat_map(|folder| fs::read_dir(folder.expect("listed").path()).expect("a folder"));
    files.map(|file| file.expect("listed").path()).next().expect("a file")
}

#[test]
fn models_of_other_programs_are_taken_without_a_copy() {
    use std::os::unix::fs::MetadataExt as _;

    let bytes = [tiny_model::BYTES, b"cached"].concat();
    let digest = protocol::Digest::of(&bytes).to_string();
    let home = Home::apart();
    let write = |path: &str, bytes: &[u8]| {
        let path = home.path().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        fs::write(&path, bytes).expect("written");
        path
    };
    let layer = format!(r#"{{"mediaType":"application/vnd.ollama.image.model","digest":"sha256:{digest}"}}"#);
    let manifest = format!(r#"{{"layers":[{{"mediaType":"x","digest":"sha256:00"}},{layer}]}}"#);
    write(".ollama/models/manifests/registry.ollama.ai/library/tiny-two/latest", manifest.as_bytes());
    write(
        ".ollama/models/manifests/registry.ollama.ai/library/gone/latest",
        manifest.replace(&digest, &"0".repeat(64)).as_bytes(),
    );
    let blob = write(&format!(".ollama/models/blobs/sha256-{digest}"), &bytes);
    write(".lmstudio/models/acme/Studio-GGUF/Studio-Q8_0.gguf", &[tiny_model::BYTES, b"studio"].concat());
    write(".lmstudio/models/acme/Studio-GGUF/mmproj-F16.gguf", b"x");
    let hub = ".cache/huggingface/hub/models--acme--Hub-GGUF";
    write(&format!("{hub}/refs/main"), b"rev1\n");
    let kept = write(&format!("{hub}/blobs/abc"), &[tiny_model::BYTES, b"hub"].concat());
    fs::create_dir_all(home.path().join(format!("{hub}/snapshots/rev1"))).expect("made");
    std::os::unix::fs::symlink("../../blobs/abc", home.path().join(format!("{hub}/snapshots/rev1/Hub-Q4_0.gguf")))
        .expect("linked");

    for (cache, name) in [
        ("ollama", "tiny-two:latest"),
        ("lmstudio", "acme/Studio-GGUF/Studio-Q8_0.gguf"),
        ("huggingface", "acme/Hub-GGUF/Hub-Q4_0.gguf"),
    ] {
        let listed = home.json(&["model", "add", "--from", cache, "--json"]);
        let names: Vec<&str> =
            listed.as_array().expect("a list").iter().map(|model| model["name"].as_str().expect("it")).collect();
        assert_eq!(names, [name], "{cache}");
    }
    assert!(
        home.well(&["model", "add", "--from", "ollama"]).contains("tether model add --from ollama tiny-two:latest")
    );
    assert!(refused(&home, &["model", "add", "--from", "ollama", "tiny-tow"]).contains("did you mean tiny-two?"));
    assert_eq!(home.run(&["model", "add", "--from", "empty-folder"]).status.code(), Some(1));

    let output = home.well(&["model", "add", "--from", "ollama", "tiny-two"]);
    assert!(output.contains("tiny-two") && output.contains("takes no further room"), "{output}");
    let inode = |path: &Path| fs::metadata(path).expect("it is there").ino();
    assert_eq!(inode(&artifact(&home)), inode(&blob));
    home.well(&["model", "rm", "tiny-two"]);
    assert!(blob.exists(), "it is Ollama's");
    home.well(&["model", "add", "--from", "hf", "Hub-Q4_0.gguf"]);
    assert_eq!(inode(&artifact(&home)), inode(&kept));
    home.well(&["model", "rm", "hub"]);
    // Bytes that are not those of the name are refused.
    fs::write(&blob, [tiny_model::BYTES, b"other"].concat()).expect("written");
    let output = refused(&home, &["model", "add", "--from", "ollama", "tiny-two"]);
    assert!(output.contains("should have"), "{output}");
    assert_eq!(stored(&home), 0);
}
