//! Each crate has a floor and uses only crates on lower floors.

use anyhow::{Context as _, Result};
use serde_json::Value;

/// The floor of each crate's folder, as in `ARCHITECTURE.md`.
const FLOORS: &[(&str, u64)] = &[
    ("hyperswarm", 0),
    ("inference", 0),
    ("failpoints", 0),
    ("kernels", 0),
    ("engine", 0),
    ("protocol", 1),
    ("metadata-store", 2),
    ("artifact-store", 2),
    ("observability", 2),
    ("rpc", 3),
    ("gateway", 4),
    ("orchestrator", 4),
    ("registry", 4),
    ("worker", 4),
    ("cli", 5),
    ("simulation", 6),
];

/// Crates that only some others may use: each with the crates that may use it.
const GROUND: &[(&str, &[&str])] = &[
    ("inference", &["engine", "protocol"]),
    ("kernels", &["engine"]),
    ("engine", &["worker", "cli", "simulation"]),
    ("hyperswarm", &["rpc", "cli", "simulation"]),
];

/// A crate below `crates/`.
#[derive(Debug, Clone)]
pub(crate) struct Crate {
    folder: String,
    package: String,
    floor: Option<u64>,
    /// The repository's packages it depends on, except dev-dependencies.
    uses: Vec<String>,
    binaries: Vec<String>,
}

/// Reads the crates from the output of `cargo metadata`.
pub(crate) fn crates_of(metadata: &Value) -> Result<Vec<Crate>> {
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    Ok(packages.iter().filter_map(crate_of).collect())
}

fn crate_of(package: &Value) -> Option<Crate> {
    let manifest = package["manifest_path"].as_str()?.replace('\\', "/");
    let (folders, folder) = manifest.strip_suffix("/Cargo.toml")?.rsplit_once('/')?;
    if !folders.ends_with("/crates") {
        return None;
    }
    let texts = |list: &Value, key: &str, keep: &dyn Fn(&Value) -> bool| -> Vec<String> {
        let items = list.as_array().into_iter().flatten().filter(|item| keep(item));
        items.filter_map(|item| item[key].as_str().map(str::to_owned)).collect()
    };
    Some(Crate {
        folder: folder.to_owned(),
        package: package["name"].as_str()?.to_owned(),
        floor: package["metadata"]["tether"]["floor"].as_u64(),
        uses: texts(&package["dependencies"], "name", &|item| item["path"].is_string() && item["kind"] != "dev"),
        binaries: texts(&package["targets"], "name", &|target| {
            target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "bin"))
        }),
    })
}

pub(crate) fn check(crates: &[Crate]) -> Vec<String> {
    let mut findings = vec![];
    for item in crates {
        findings.extend(check_name(item));
        let known = FLOORS.iter().find(|(folder, _)| *folder == item.folder).map(|(_, floor)| *floor);
        match (item.floor, known) {
            (_, None) => findings.push(format!("crates/{} stands on no floor of ARCHITECTURE.md", item.folder)),
            (None, Some(floor)) => findings
                .push(format!("crates/{}/Cargo.toml lacks [package.metadata.tether] floor = {floor}", item.folder)),
            (Some(found), Some(floor)) if found != floor => {
                findings.push(format!("crates/{} stands on floor {floor}, not {found}", item.folder));
            }
            _ => findings.extend(check_uses(item, crates)),
        }
    }
    findings
}

fn check_name(item: &Crate) -> Vec<String> {
    let mut findings = vec![];
    let is_program = item.folder == "cli";
    let expected = if is_program { "tether".to_owned() } else { format!("tether-{}", item.folder) };
    if item.package != expected {
        findings.push(format!("crates/{} is the package {expected}, not {}", item.folder, item.package));
    }
    if is_program && !item.binaries.iter().any(|name| name == "tether") {
        findings.push("crates/cli makes no binary named tether".to_owned());
    }
    findings
}

fn check_uses(item: &Crate, crates: &[Crate]) -> Vec<String> {
    let mut findings = vec![];
    for used in crates.iter().filter(|used| item.uses.contains(&used.package)) {
        let (from, to) = (&item.folder, &used.folder);
        if let Some((_, users)) = GROUND.iter().find(|(ground, _)| ground == to) {
            if !users.contains(&from.as_str()) {
                findings.push(format!("crates/{from} uses {to}, which is for {} alone", users.join(", ")));
            }
        } else if item.floor <= used.floor {
            let why = if item.floor == Some(4) && used.floor == Some(4) {
                "services share protocol and speak through rpc".to_owned()
            } else {
                format!("floor {} does not lie below floor {}", used.floor.unwrap_or(0), item.floor.unwrap_or(0))
            };
            findings.push(format!("crates/{from} uses {to}: {why}"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn item(folder: &str, floor: u64, uses: &[&str]) -> Crate {
        let package = if folder == "cli" { "tether".to_owned() } else { format!("tether-{folder}") };
        let uses = uses.iter().map(|&used| used.to_owned()).collect();
        Crate { folder: folder.into(), binaries: vec![package.clone()], package, floor: Some(floor), uses }
    }

    fn house() -> Vec<Crate> {
        vec![
            item("engine", 0, &[]),
            item("protocol", 1, &[]),
            item("rpc", 3, &["tether-protocol"]),
            item("gateway", 4, &["tether-rpc", "tether-protocol"]),
            item("worker", 4, &["tether-rpc", "tether-engine"]),
            item("cli", 5, &["tether-gateway", "tether-worker", "tether-engine"]),
        ]
    }

    #[test]
    fn a_house_whose_crates_use_lower_floors_is_in_order() {
        assert_eq!(check(&house()), Vec::<String>::new());
    }

    #[test]
    fn services_that_import_each_other_are_found() {
        let mut house = house();
        house[3].uses.push("tether-worker".into());
        assert_eq!(check(&house), ["crates/gateway uses worker: services share protocol and speak through rpc"]);
    }

    #[test]
    fn a_crate_that_uses_a_higher_floor_is_found() {
        let mut house = house();
        house[1].uses.push("tether-rpc".into());
        assert_eq!(check(&house), ["crates/protocol uses rpc: floor 3 does not lie below floor 1"]);
    }

    #[test]
    fn the_engine_is_for_the_worker_and_the_program_alone() {
        let mut house = house();
        house[3].uses.push("tether-engine".into());
        assert_eq!(check(&house), ["crates/gateway uses engine, which is for worker, cli, simulation alone"]);
    }

    #[test]
    fn floors_and_names_that_differ_from_the_map_are_found() {
        let mut house = house();
        house[0].floor = None;
        house[1].floor = Some(2);
        house[2].package = "rpc".into();
        house[5].binaries.clear();
        house.push(item("pantry", 4, &[]));
        let findings = check(&house).join("\n");
        for expected in [
            "crates/engine/Cargo.toml lacks",
            "crates/protocol stands on floor 1, not 2",
            "crates/rpc is the package tether-rpc, not rpc",
            "crates/cli makes no binary",
            "crates/pantry stands on no floor",
        ] {
            assert!(findings.contains(expected), "{expected} is missing in {findings}");
        }
    }

    #[test]
    fn what_only_tests_use_does_not_count() {
        let package = json!({
            "name": "tether-gateway", "manifest_path": "/x/crates/gateway/Cargo.toml",
            "metadata": { "tether": { "floor": 4 } }, "targets": [],
            "dependencies": [
                { "name": "tether-rpc", "path": "/x/crates/rpc", "kind": null },
                { "name": "tether-worker", "path": "/x/crates/worker", "kind": "dev" },
                { "name": "serde", "kind": null },
            ],
        });
        let found = crate_of(&package).expect("a crate");
        assert_eq!((found.floor, found.uses), (Some(4), vec!["tether-rpc".to_owned()]));
        let chore = json!({ "name": "xtask", "manifest_path": "/x/xtask/Cargo.toml" });
        assert!(crate_of(&chore).is_none());
    }
}
