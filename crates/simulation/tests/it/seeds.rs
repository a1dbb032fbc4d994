//! Whole networks, each from its seed.

use std::process::{Command, Output};

fn simulate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_simulate")).args(arguments).output().expect("the program runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn many_networks_lose_double_and_break_nothing() {
    let output = simulate(&["70", "0"]);
    assert!(output.status.success(), "{}", text(&output));
}

/// In some of them workers start while others work, which once made a seed differ from run to run.
#[test]
fn a_seed_repeats_exactly() {
    for seed in ["3", "11", "12", "2000003"] {
        let [one, other] = [(); 2].map(|()| text(&simulate(&["--seed", seed])));
        assert!(one.lines().count() > 50, "{one}");
        assert_eq!(one, other);
    }
}
