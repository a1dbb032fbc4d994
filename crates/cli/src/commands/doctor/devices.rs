//! Checks of `tether doctor` for devices: which run models, why a GPU is not used, and where layers are.

use std::path::Path;

use engine::hardware::{Device, Hardware, InstalledGpus, unused_gpus};
use protocol::control::Fleet;

use super::{Check, check};
use crate::commands::process_runtime;
use crate::output;
use crate::settings::Settings;

/// Reports the devices of this machine that run models, and why each other GPU is not used.
pub(super) async fn checks(settings: &Settings) -> Vec<Check> {
    let Ok(runtime) = process_runtime() else { return vec![] };
    let kept_off = settings.worker.models.iter().filter(|model| model.gpu_layers == Some(0));
    let kept_off: Vec<_> = kept_off.map(|model| model.key().to_string()).collect();
    gpu_checks(&runtime.hardware().await, &InstalledGpus::find(Path::new("/")), &kept_off)
}

fn gpu_checks(hardware: &Hardware, installed: &InstalledGpus, kept_off: &[String]) -> Vec<Check> {
    let gpus = hardware.gpus();
    let free = |gpu: &&Device| format!("{gpu}, {} of {} MiB free", gpu.free_bytes >> 20, gpu.total_bytes >> 20);
    let mut lines = vec![match (&gpus[..], hardware.devices.first()) {
        ([], None) => return vec![],
        ([], Some(_)) if installed.gpus.is_empty() => well("no GPU is here; the processor computes".to_owned()),
        ([], Some(_)) => well("the processor computes".to_owned()),
        (gpus, _) => well(gpus.iter().map(free).collect::<Vec<_>>().join("; ")),
    }];
    lines.extend(unused_gpus(hardware, installed).iter().map(|unused| doubtful(unused.to_string())));
    if !gpus.is_empty() && !kept_off.is_empty() {
        let models = kept_off.join(", ");
        lines.push(doubtful(format!("gpu_layers = 0 in the settings keeps {models} on the processor")));
    }
    lines
}

/// Reports for each model in memory on which devices it runs, and how long its context is.
pub(super) fn device_placements(fleet: &Fleet) -> Vec<Check> {
    let of_worker = |worker: &protocol::control::FleetWorker| {
        let id = worker.report.worker_id.short();
        let loaded = worker.report.model_cache.iter();
        let placed = loaded.filter_map(move |model| {
            let placement = model.placement.as_ref()?;
            let line = format!("{} on {id}: {placement}", model.key);
            Some(Check { doubtful: placement.context_length < placement.context_wanted, ..named("layers", line) })
        });
        placed.collect::<Vec<_>>()
    };
    fleet.workers.iter().flat_map(of_worker).collect()
}

fn well(line: String) -> Check {
    named("GPU", line)
}

fn doubtful(line: String) -> Check {
    Check { doubtful: true, ..well(line) }
}

/// Returns a check on one line: device names come from drivers and from other machines.
fn named(name: &'static str, line: String) -> Check {
    check(name, Ok(output::one_line(&line)))
}

#[cfg(test)]
mod tests {
    use engine::hardware::{Backend, BackendState, DeviceKind, DeviceNode, InstalledGpu, Vendor};
    use protocol::control::FleetWorker;

    use super::*;

    fn device(name: &str, description: &str, kind: DeviceKind) -> Device {
        let (free_bytes, total_bytes) = (70 << 30, 80 << 30);
        Device { name: name.into(), description: description.into(), kind, free_bytes, total_bytes }
    }

    fn lines(checks: &[Check]) -> Vec<(bool, &str)> {
        checks.iter().map(|check| (check.doubtful, check.detail.as_str())).collect()
    }

    #[test]
    fn a_gpu_that_computes_one_that_does_not_and_none_are_each_a_line() {
        let processor = device("CPU", "Intel Xeon", DeviceKind::Cpu);
        let only_processor = Hardware { devices: vec![processor.clone()], backends: vec![] };
        let none = InstalledGpus::default();
        assert_eq!(
            lines(&gpu_checks(&only_processor, &none, &[])),
            [(false, "no GPU is here; the processor computes")]
        );
        assert_eq!(lines(&gpu_checks(&Hardware::default(), &none, &[])), []);

        let gpu = InstalledGpu { vendor: Vendor::Nvidia, address: "0000:01:00.0".into(), model: None };
        let one = InstalledGpus { gpus: vec![gpu], nvidia_node: DeviceNode::Usable, ..InstalledGpus::default() };
        let checks = gpu_checks(&only_processor, &one, &["mine@1.0".to_owned()]);
        assert_eq!(lines(&checks)[0], (false, "the processor computes"));
        let (is_doubtful, line) = lines(&checks)[1];
        assert!(is_doubtful && line.contains("this build has no CUDA backend"), "{line}");
        assert!(checks.iter().all(|check| check.well) && checks.len() == 2);

        let backends = vec![Backend { name: "cuda".into(), state: BackendState::Loaded { complaint: None } }];
        let devices = vec![processor, device("CUDA0", "NVIDIA\u{1b}[2J H200", DeviceKind::Gpu)];
        let checks = gpu_checks(&Hardware { devices, backends }, &one, &["mine@1.0".to_owned()]);
        let expected = [
            (false, "NVIDIA\\u{1b}[2J H200 (CUDA0), 71680 of 81920 MiB free"),
            (true, "gpu_layers = 0 in the settings keeps mine@1.0 on the processor"),
        ];
        assert_eq!(lines(&checks), expected);
    }

    #[test]
    fn a_model_in_memory_is_told_with_its_layers_and_its_context() {
        let text = r#"{"v":1,"workerId":"KEY","pubKey":"KEY","region":"local","gpuClass":"cpu","vramGB":0,"accelerators":[],
            "capacity":{"slots":1,"running":0,"waiting":0,"queueMax":1},"supported":[],"latencyHops":0,"epoch":1,"seq":1,
            "issuedAt":0,"notAfter":1,"modelCache":[
                {"modelId":"old","version":"1.0","digest":"KEY","state":"ready"},
                {"modelId":"mine","version":"1.0","digest":"KEY","state":"ready","placement":
                    {"device":"NVIDIA H200 (CUDA0)","layers":31,"gpuLayers":9,"contextLength":2048,"contextWanted":8192}}]}"#;
        let report = serde_json::from_str(&text.replace("KEY", &"ab".repeat(32))).expect("a report");
        let fleet = Fleet { workers: vec![FleetWorker { report, age_ms: 0, reserved: 0, shortened: false }] };
        let line = "mine@1.0 on abababab: 9 of 31 layers on NVIDIA H200 (CUDA0), 2048 tokens of context (8192 do not fit \
                    into memory)";
        assert_eq!(lines(&device_placements(&fleet)), [(true, line)]);
    }
}
