//! What commands print and how they end, without a network.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use crate::program::Home;

#[test]
fn no_arguments_is_help_and_starts_nothing() {
    let home = Home::new();
    let output = home.run(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: tether"));
    assert_eq!(fs::read_dir(home.path()).expect("a folder").count(), 0);
    assert_eq!(home.run(&["--help"]).status.code(), Some(0));
    assert_eq!(home.run(&["--version"]).status.code(), Some(0));
}

#[test]
fn what_is_mistyped_is_told_with_exit_code_2() {
    let home = Home::new();
    for arguments in [&["upp"][..], &["up", "--workers", "many"], &["run"], &["token", "create", "--tenant", "A B"]] {
        let output = home.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn an_invite_is_read_from_stdin_so_that_no_list_of_processes_shows_it() {
    for (stdin, status, word) in [("nonsense\n", 2, "this is not an invite"), ("", 2, "stdin has no invite")] {
        let home = Home::new();
        let mut command = home.command(&["join", "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("started");
        child.stdin.take().expect("piped").write_all(stdin.as_bytes()).expect("written");
        let output = child.wait_with_output().expect("ended");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(errors.contains(word), "{errors}");
        assert_eq!(output.status.code(), Some(status), "{errors}");
    }
}

#[test]
fn the_doctor_finds_secrets_that_others_can_read() {
    let home = Home::new();
    fs::create_dir_all(home.data()).expect("made");
    let allow = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
    allow(&home.data(), 0o700);
    let root = home.data().join("root.key");
    fs::write(&root, "00").expect("written");
    allow(&root, 0o644);
    let said = |home: &Home| String::from_utf8_lossy(&home.run(&["doctor"]).stdout).into_owned();
    assert!(said(&home).contains("root.key can be read by others"), "{}", said(&home));
    allow(&root, 0o600);
    allow(&home.data(), 0o755);
    assert!(said(&home).contains("others can read the folder"), "{}", said(&home));
}

#[test]
fn bad_settings_are_told_by_name_and_touch_nothing() {
    let home = Home::new();
    let path = home.path().join("tether.toml");
    for (text, word) in [("wrokers = 1", "wrokers"), ("[gateway]\nbind = 7", "bind"), ("region = \"ÖST\"", "region")] {
        fs::write(&path, text).expect("written");
        for command in ["up", "doctor", "nodes"] {
            let output = home.run(&[command, "--config", path.to_str().expect("text")]);
            assert_eq!(output.status.code(), Some(2), "{command} {text}");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(errors.contains(word), "{errors}");
        }
    }
    assert!(!home.data().exists());
}

#[test]
fn the_example_settings_can_be_used_as_they_are() {
    let home = Home::new();
    let path = home.path().join("tether.toml");
    fs::write(&path, home.well(&["config", "example"])).expect("written");
    let used = home.well(&["config", "check", "--config", path.to_str().expect("text")]);
    assert!(used.contains("bind = \"127.0.0.1:7070\""), "{used}");
}

#[test]
fn shells_and_man_are_told_every_command() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(home.well(&["completions", shell]).contains("doctor"), "{shell}");
    }
    home.well(&["man", "pages"]);
    let page = fs::read_to_string(home.path().join("pages/tether-up.1")).expect("a page for each command");
    assert!(page.contains("GGUF"), "{page}");
    assert!(!home.data().exists());
}

#[test]
fn words_that_people_bring_from_elsewhere_are_commands() {
    let home = Home::new();
    for (word, meant) in [("serve", "up"), ("ps", "nodes"), ("ls", "list")] {
        assert_eq!(home.well(&[word, "--help"]), home.well(&[meant, "--help"]), "{word}");
    }
}

#[test]
fn a_variable_that_is_no_setting_is_named_and_does_no_harm() {
    let home = Home::new();
    let output =
        home.command(&["config", "check"]).env("TETHER_GATEWAY_BIND", "127.0.0.1:1").output().expect("it runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(errors.contains("TETHER_GATEWAY_BIND") && errors.contains("TETHER_GATEWAY__BIND"), "{errors}");
}

#[test]
fn a_key_is_made_listed_and_revoked_without_a_network() {
    let home = Home::new();
    let key = home.well(&["token", "create", "--tenant", "acme", "--name", "laptop"]).trim().to_owned();
    assert!(key.starts_with("tth_live_"), "{key}");
    let key_id = &key[9..17];
    let listed = home.well(&["token", "list"]);
    assert!(listed.contains(key_id) && listed.contains("acme") && listed.contains("good"), "{listed}");
    assert!(!listed.contains(&key[18..]), "the secret is told once");
    home.well(&["token", "revoke", key_id]);
    assert!(home.well(&["token", "list"]).contains("revoked"));
    assert_eq!(home.run(&["token", "revoke", "nobody00"]).status.code(), Some(1));
    assert_eq!(home.run(&["token", "revoke", "../../x"]).status.code(), Some(1));
}

#[test]
fn where_no_network_runs_the_next_step_is_told() {
    let home = Home::new();
    // A port that is surely free of gateways: it is taken by us.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = format!("http://{}", taken.local_addr().expect("bound"));
    drop(taken);
    let output = home.run(&["nodes", "--url", &address]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("tether up"));
}

#[cfg(feature = "llama")]
#[test]
fn an_adapter_is_asked_by_its_name_behind_the_models() {
    let home = Home::new();
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let mut command = home.command(&["run", "tether-tiny:pirate", "What is 3 + 4?", "--temperature", "0"]);
    let output = command.env("TETHER_GATEWAY__BIND", free.to_string()).output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("Arr!"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

#[cfg(feature = "llama")]
#[test]
fn a_question_is_answered_even_where_no_network_runs() {
    let home = Home::new();
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
    let mut command = home.command(&["run", "tether-tiny", "What is 3 + 4?", "--temperature", "0"]);
    let output = command.env("TETHER_GATEWAY__BIND", free.to_string()).output().expect("the program runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("3 + 4 = 7"), "{text}");
}
