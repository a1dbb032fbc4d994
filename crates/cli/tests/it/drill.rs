//! `tether drill`, as far as it fits into a test: some cells of each victim, once.

#![cfg(all(feature = "llama", target_os = "linux"))]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::program::{Home, children, lives, signal, wait_for};

/// A drill with a folder for its temporary files.
fn drill(home: &Home, more: &[&str]) -> Command {
    let mut command = home.command(&[&["drill", "--seed", "1", "--kills", "1", "--networks", "1"], more].concat());
    command.env("TMPDIR", home.path()).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

fn is_empty(home: &Home) -> bool {
    std::fs::read_dir(home.path()).expect("a folder").count() == 0
}

/// Runs cells that must do well, and returns their reports.
fn well(cells: &[&str]) -> Vec<Value> {
    let home = Home::new();
    let chosen: Vec<&str> = cells.iter().flat_map(|cell| ["--campaign", *cell]).collect();
    let output = drill(&home, &[&chosen[..], &["--json"]].concat()).output().expect("it runs");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{shown}{}", String::from_utf8_lossy(&output.stderr));
    assert!(is_empty(&home), "nothing is left");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    report["cells"].as_array().cloned().expect("cells")
}

#[test]
fn a_gateway_that_is_killed_loses_doubles_and_breaks_nothing() {
    let cells =
        ["kill/gateway/body-sent", "kill/gateway/mid-answer", "kill/gateway/attached", "kill/gateway/last-token"];
    assert_eq!(well(&cells).len(), cells.len());
}

#[test]
fn an_orchestrator_that_is_killed_loses_doubles_and_breaks_nothing() {
    let cells = ["kill/orchestrator/reserved", "kill/orchestrator/mid-answer", "kill/orchestrator/last-chunk"];
    assert_eq!(well(&cells).len(), cells.len());
}

#[test]
fn workers_and_engines_that_are_killed_cost_no_request() {
    let cells = [
        "kill/worker/dispatched",
        "kill/worker/mid-tool-call",
        "kill/worker/mid-choices",
        "kill/engine/first-token",
        "kill/engine/mid-reasoning",
    ];
    let reports = well(&cells);
    assert_eq!(reports.len(), cells.len());
    for report in reports {
        assert_eq!(report["requests"], report["whole"], "{report}");
    }
}

#[test]
fn a_registry_that_is_killed_and_a_worker_that_stands_still_cost_no_request() {
    for report in well(&["kill/registry/mid-answer", "freeze/worker/5s"]) {
        assert_eq!(report["requests"], report["whole"], "{report}");
    }
}

#[test]
fn a_drill_that_is_stopped_leaves_no_process_and_no_folder() {
    let home = Home::new();
    let mut command = drill(&home, &["--campaign", "kill/registry"]);
    let mut running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let mut nodes = vec![];
    wait_for("the network to run", || {
        nodes = children(running.id());
        nodes.len() == 5
    });
    let began = Instant::now();
    signal(running.id(), Signal::INT);
    wait_for("the drill to end", || running.try_wait().expect("a child").is_some());
    assert!(began.elapsed() < Duration::from_secs(30));
    assert_eq!(running.wait().expect("ended").code(), Some(2));
    assert!(nodes.iter().all(|node| !lives(*node)) && is_empty(&home));
}

#[test]
fn the_cells_of_a_drill_are_listed_and_a_mistyped_one_is_refused() {
    let home = Home::new();
    let listed = home.well(&["drill", "--list", "--campaign", "kill/engine"]);
    assert!(listed.lines().count() > 14 && listed.contains("kill/engine/mid-answer"), "{listed}");
    let refused = home.run(&["drill", "--campaign", "kil"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--list"));
}

#[cfg(not(feature = "failpoints"))]
#[test]
fn a_program_built_without_failpoints_has_none() {
    let home = Home::new();
    assert!(!home.well(&["drill", "--list"]).contains("point/"));
    let found = Command::new("grep").args(["-qa", "FAILPOINT_FILE_OF_TETHER", env!("CARGO_BIN_EXE_tether")]).status();
    assert_eq!(found.expect("grep runs").code(), Some(1), "the program looks for an armed point");
}

#[cfg(feature = "failpoints")]
#[test]
fn a_process_that_is_killed_at_an_exact_point_loses_doubles_and_breaks_nothing() {
    let reports = well(&["point"]);
    assert!(reports.len() >= 14, "{}", reports.len());
}

#[test]
fn a_drill_names_the_cells_that_its_machine_does_not_allow() {
    let home = Home::new();
    let program = drill(&home, &["--campaign", "cut", "--campaign", "disk-full"]);
    // A namespace of users in which nobody may make a network.
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "sh", "-c"]);
    command.args(["echo 0 > /proc/sys/user/max_net_namespaces && exec \"$0\" \"$@\""]);
    command.arg(program.get_program()).args(program.get_args());
    for (name, value) in program.get_envs() {
        command.env(name, value.expect("nothing is removed"));
    }
    let output = command.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(2), "nothing was run: {said}{}", String::from_utf8_lossy(&output.stderr));
    for part in ["skipped 10 cells", "cut/worker/1s", "disk-full/gateway", "does not allow unprivileged namespaces"] {
        assert!(said.contains(part), "no {part} in {said}");
    }
    assert!(is_empty(&home));
}
