//! Replays the corpus, so that what a fuzzer found once stays mended without a fuzzer.

use std::fs;
use std::path::Path;

use tether_fuzz::TARGETS;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| fs::read(entry.expect("an entry").path()).expect("a file")).collect()
}

#[test]
fn no_input_of_the_corpus_makes_a_reader_panic() {
    for (name, target) in TARGETS {
        let inputs = corpus(name);
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for input in inputs {
            target(&input);
        }
    }
}

#[test]
fn no_input_cut_short_or_bent_makes_a_reader_panic() {
    for (name, target) in TARGETS {
        for input in corpus(name) {
            let step = input.len() / 64 + 1;
            for at in (0..input.len()).step_by(step) {
                target(&input[..at]);
                let mut bent = input.clone();
                bent[at] ^= 1 << (at % 8);
                target(&bent);
            }
        }
    }
}

#[test]
fn every_target_has_a_program_of_its_name() {
    let manifest = include_str!("../Cargo.toml");
    for (name, _) in TARGETS {
        let program = format!("fuzz_targets/{name}.rs");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&program);
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{program}: {error}"));
        assert!(text.contains(&format!("tether_fuzz::{name}(bytes)")), "{program} drives another target");
        assert!(manifest.contains(&program), "{program} is no program of Cargo.toml");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
}
