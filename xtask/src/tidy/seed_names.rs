//! Each component of the architecture exists in the code under its name, as a type or as a module.

use super::SourceFile;

/// A component of the architecture.
struct Component {
    /// The type, or the module in snake case.
    name: &'static str,
    module: &'static str,
    /// The feature it comes with, if it is not built yet.
    due_with: Option<&'static str>,
}

const fn built(name: &'static str, module: &'static str) -> Component {
    Component { name, module, due_with: None }
}

const fn due(name: &'static str, module: &'static str, with: &'static str) -> Component {
    Component { name, module, due_with: Some(with) }
}

const COMPONENTS: &[Component] = &[
    built("Gateway", "gateway"),
    built("HttpBridge", "http_bridge"),
    built("RpcGateway", "rpc_gateway"),
    built("Orchestrator", "orchestrator"),
    built("DiscoverySub", "discovery_sub"),
    built("Scheduler", "scheduler"),
    built("PolicyEngine", "policy_engine"),
    built("CircuitBreaker", "circuit_breaker"),
    built("RetryManager", "retry_manager"),
    built("ReservationManager", "reservation_manager"),
    built("BaseWorker", "base_worker"),
    built("ModelLoader", "model_loader"),
    built("ExecutionEngine", "execution_engine"),
    built("HealthReporter", "health_reporter"),
    built("QuotaGuard", "quota_guard"),
    built("ModelRuntime", "model_runtime"),
    built("Registry", "registry"),
    built("JobStore", "job_store"),
    built("RegistryStore", "registry_store"),
    built("ArtifactStore", "artifact_store"),
    due("Dlq", "dlq", "idempotency, continued streams and dead letters"),
    due("Billing", "billing", "usage export to a billing provider"),
    due("Replication", "replication", "replicas of artifacts"),
];

pub(crate) fn check(files: &[SourceFile]) -> Vec<String> {
    let missing = COMPONENTS.iter().filter(|component| component.due_with.is_none() && !is_in(component, files));
    missing
        .map(|component| format!("no type {} and no module {} below crates/", component.name, component.module))
        .collect()
}

/// Lists the components that are not built yet.
pub(crate) fn report(files: &[SourceFile]) -> Vec<String> {
    let due = COMPONENTS.iter().filter_map(|component| Some((component, component.due_with?)));
    due.map(|(component, with)| {
        let state = if is_in(component, files) { "is there and no longer due" } else { "is due" };
        format!("{} {state} with: {with}", component.name)
    })
    .collect()
}

fn is_in(component: &Component, files: &[SourceFile]) -> bool {
    let sources = files
        .iter()
        .filter(|file| file.path.starts_with("crates/") && file.path.contains("/src/") && file.has_extension("rs"));
    let module = format!("/{}.rs", component.module);
    sources.into_iter().any(|file| file.path.ends_with(&module) || declares(&file.text, component.name))
}

/// Returns whether a text declares a type of this name.
fn declares(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let mut words = line.split_whitespace().skip_while(|word| word.starts_with("pub"));
        let is_type = matches!(words.next(), Some("struct" | "enum" | "trait" | "type"));
        let part_of_name = |letter: char| letter.is_alphanumeric() || letter == '_';
        let rest = words.next().and_then(|word| word.strip_prefix(name));
        is_type && rest.is_some_and(|rest| !rest.starts_with(part_of_name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> SourceFile {
        SourceFile { path: path.into(), text: text.into() }
    }

    #[test]
    fn a_component_is_found_as_a_type_or_as_a_module() {
        let component = built("RetryManager", "retry_manager");
        assert!(is_in(&component, &[file("crates/orchestrator/src/retry_manager.rs", "")]));
        assert!(is_in(&component, &[file("crates/x/src/y.rs", "pub(crate) struct RetryManager<T> {")]));
        assert!(!is_in(&component, &[file("crates/x/src/y.rs", "// struct RetryManager\nlet RetryManager = 1;")]));
        assert!(!is_in(&component, &[file("docs/retry_manager.rs", "struct RetryManagers;")]));
    }

    #[test]
    fn a_missing_component_is_found_and_one_that_is_due_is_not() {
        let findings = check(&[]).join("\n");
        assert!(findings.contains("HealthReporter"), "{findings}");
        assert!(!findings.contains("Billing"), "{findings}");
        assert!(report(&[]).join("\n").contains("Billing is due"), "a name that is due is reported");
    }
}
