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
    let output = simulate(&["40", "0"]);
    assert!(output.status.success(), "{}", text(&output));
}

/// Nearly every seed repeats; the crate's README says which may not.
#[test]
fn a_seed_repeats_exactly() {
    for seed in ["3", "11", "12"] {
        let [one, other] = [(); 2].map(|()| text(&simulate(&["--seed", seed])));
        assert!(one.lines().count() > 50, "{one}");
        assert_eq!(one, other);
    }
}
