//! Describes where models run: on which device, how many layers it holds, and why a GPU is not used.

use std::path::Path;

use engine::hardware::{Device, Hardware, InstalledGpus, unused_gpus};
use engine::memory_plan::CONTEXT_DEFAULT;
use engine::{DevicePlacement, LoadedModel};
use protocol::health;
use tracing::{info, warn};

use crate::config::ServedModel;

/// Logs the devices that run models, and each GPU that is not used.
pub(crate) fn log_devices(hardware: &Hardware) {
    let Some(line) = devices_line(hardware) else { return };
    info!("{line}");
    for unused in unused_gpus(hardware, &InstalledGpus::find(Path::new("/"))) {
        warn!("{unused}");
    }
}

/// Returns a line about the devices that run models; `None` if no engine reports any.
fn devices_line(hardware: &Hardware) -> Option<String> {
    let gpus = hardware.gpus();
    if gpus.is_empty() {
        let processor = hardware.devices.first()?;
        return Some(format!("models are computed by the processor: {processor}"));
    }
    let of_gpu = |gpu: &&Device| format!("{gpu}, {} of {} MiB free", gpu.free_bytes >> 20, gpu.total_bytes >> 20);
    Some(format!("models are computed by {}", gpus.iter().map(of_gpu).collect::<Vec<_>>().join("; ")))
}

/// Returns a line about where a loaded model's layers are, and why not on a GPU if there is one; `None` if unknown.
pub(crate) fn layers_line(placement: &DevicePlacement, gpu_layers_wanted: Option<u32>) -> Option<String> {
    let DevicePlacement { layers, gpu_layers, devices, vram_free_bytes, .. } = placement;
    if *layers == 0 {
        return None;
    }
    let devices = devices.join(", ");
    let free = vram_free_bytes.map(|bytes| bytes >> 20);
    Some(match (*gpu_layers, gpu_layers_wanted, free) {
        (0, _, None) => format!("all {layers} layers are computed by the processor: {devices}"),
        (0, Some(0), Some(_)) => {
            format!("all {layers} layers are computed by the processor ({devices}), and no GPU: gpu_layers is 0")
        }
        (0, _, Some(free)) => format!(
            "all {layers} layers are computed by the processor ({devices}), and no GPU: not one fits into the {free} MiB that \
             are free there"
        ),
        (on_gpu, ..) if on_gpu == *layers => format!("all {layers} layers are on {devices}"),
        (on_gpu, Some(_), _) => {
            format!(
                "{on_gpu} of {layers} layers are on {devices}, as gpu_layers says; the processor computes the others"
            )
        }
        (on_gpu, None, free) => format!(
            "{on_gpu} of {layers} layers are on {devices}; the others do not fit into the {} MiB that were free there, and \
             the processor computes them",
            free.unwrap_or_default()
        ),
    })
}

/// Returns a line about how many tokens the context of a loaded model holds, and why not more.
pub(crate) fn context_line(loaded: &LoadedModel, model: &ServedModel) -> String {
    let LoadedModel { context_length, kv_tokens, slots, placement, .. } = loaded;
    let wanted = context_wanted(loaded, model);
    let trained = placement.context_trained;
    let why = match () {
        () if *context_length < wanted => {
            format!("; {wanted} tokens do not fit into the memory that is free, so the context was made shorter")
        }
        () if *context_length < trained && model.context_length == 0 => {
            format!("; the model was made for {trained}, and context_length gives it more")
        }
        () => String::new(),
    };
    format!("a job holds up to {context_length} tokens, and the {slots} slots share {kv_tokens}{why}")
}

/// Returns the context length that a model would have with enough memory.
fn context_wanted(loaded: &LoadedModel, model: &ServedModel) -> u32 {
    match (loaded.placement.context_trained, model.context_length) {
        (0, _) => loaded.context_length,
        (trained, 0) => trained.min(CONTEXT_DEFAULT),
        (trained, set) => trained.min(set),
    }
}

/// Returns a loaded model's placement as health reports have it.
pub(crate) fn device_placement(loaded: &LoadedModel, model: &ServedModel) -> Option<health::DevicePlacement> {
    let DevicePlacement { layers, gpu_layers, devices, .. } = &loaded.placement;
    if *layers == 0 {
        return None;
    }
    let mut device = devices.join(", ");
    device.truncate(device.floor_char_boundary(health::DEVICE_BYTES_MAX));
    Some(health::DevicePlacement {
        device,
        layers: *layers,
        gpu_layers: *gpu_layers,
        context_length: loaded.context_length,
        context_wanted: context_wanted(loaded, model).max(loaded.context_length),
    })
}

#[cfg(test)]
mod tests {
    use engine::hardware::DeviceKind;
    use engine::{Abilities, ModelId};
    use protocol::Digest;
    use protocol::model::ModelKey;

    use super::*;

    fn device(name: &str, description: &str, kind: DeviceKind) -> Device {
        let (free_bytes, total_bytes) = (70 << 30, 80 << 30);
        Device { name: name.into(), description: description.into(), kind, free_bytes, total_bytes }
    }

    fn placement(gpu_layers: u32, free_mib: Option<u64>) -> DevicePlacement {
        let device = if gpu_layers == 0 { "Intel Xeon (CPU)" } else { "NVIDIA H200 (CUDA0)" };
        DevicePlacement {
            layers: 31,
            gpu_layers,
            devices: vec![device.into()],
            vram_free_bytes: free_mib.map(|mib| mib << 20),
            context_trained: 32_768,
            ..DevicePlacement::default()
        }
    }

    fn loaded(context_length: u32, placement: DevicePlacement) -> LoadedModel {
        let abilities = Abilities::default();
        LoadedModel {
            id: ModelId(1),
            context_length,
            kv_tokens: 8_192,
            slots: 4,
            pid: None,
            abilities,
            placement,
            sandbox: None,
            server: None,
        }
    }

    fn model(context_length: u32) -> ServedModel {
        let key = ModelKey { model_id: "mine".parse().expect("a name"), version: "1.0".parse().expect("a version") };
        ServedModel { context_length, ..ServedModel::new(key, Digest::of(b"model")) }
    }

    #[test]
    fn the_first_line_names_the_gpus_or_else_the_processor() {
        let processor = device("CPU", "Intel Xeon", DeviceKind::Cpu);
        let with = |devices: &[Device]| devices_line(&Hardware { devices: devices.into(), backends: vec![] });
        assert_eq!(with(&[]), None);
        let line = with(std::slice::from_ref(&processor));
        assert_eq!(line.as_deref(), Some("models are computed by the processor: Intel Xeon (CPU)"));
        let line = with(&[processor, device("CUDA0", "NVIDIA H200", DeviceKind::Gpu)]);
        assert_eq!(line.as_deref(), Some("models are computed by NVIDIA H200 (CUDA0), 71680 of 81920 MiB free"));
    }

    #[test]
    fn where_layers_lie_and_why_is_told_of_every_load() {
        for (gpu_layers, free_mib, gpu_layers_wanted, expected) in [
            (0, None, None, "all 31 layers are computed by the processor: Intel Xeon (CPU)"),
            (0, None, Some(0), "all 31 layers are computed by the processor: Intel Xeon (CPU)"),
            (0, None, Some(9), "all 31 layers are computed by the processor: Intel Xeon (CPU)"),
            (
                0,
                Some(900),
                Some(0),
                "all 31 layers are computed by the processor (Intel Xeon (CPU)), and no GPU: gpu_layers is 0",
            ),
            (
                0,
                Some(100),
                None,
                "all 31 layers are computed by the processor (Intel Xeon (CPU)), and no GPU: not one fits into the 100 MiB \
                 that are free there",
            ),
            (31, Some(900), None, "all 31 layers are on NVIDIA H200 (CUDA0)"),
            (31, Some(900), Some(99), "all 31 layers are on NVIDIA H200 (CUDA0)"),
            (
                9,
                Some(900),
                Some(9),
                "9 of 31 layers are on NVIDIA H200 (CUDA0), as gpu_layers says; the processor computes the others",
            ),
            (
                9,
                Some(900),
                None,
                "9 of 31 layers are on NVIDIA H200 (CUDA0); the others do not fit into the 900 MiB that were free there, and \
                 the processor computes them",
            ),
        ] {
            assert_eq!(layers_line(&placement(gpu_layers, free_mib), gpu_layers_wanted).as_deref(), Some(expected));
        }
        assert_eq!(layers_line(&DevicePlacement::default(), None), None);
    }

    #[test]
    fn a_context_is_told_with_the_reason_why_it_is_no_longer() {
        for (set, context_length, rest) in [
            (0, 8_192, "; the model was made for 32768, and context_length gives it more"),
            (0, 2_048, "; 8192 tokens do not fit into the memory that is free, so the context was made shorter"),
            (4_096, 4_096, ""),
            (65_536, 32_768, ""),
        ] {
            let loaded = loaded(context_length, placement(0, None));
            let line = format!("a job holds up to {context_length} tokens, and the 4 slots share 8192{rest}");
            assert_eq!(context_line(&loaded, &model(set)), line);
        }
        // A runtime that does not know the context length that a model was trained with.
        let unknown = loaded(512, DevicePlacement { context_trained: 0, ..placement(0, None) });
        assert_eq!(context_line(&unknown, &model(0)), "a job holds up to 512 tokens, and the 4 slots share 8192");
    }

    #[test]
    fn a_report_tells_what_computes_a_model_in_few_bytes() {
        let reported = device_placement(&loaded(2_048, placement(31, Some(900))), &model(0)).expect("it is known");
        assert_eq!(
            reported.to_string(),
            "31 of 31 layers on NVIDIA H200 (CUDA0), 2048 tokens of context (8192 do not fit into memory)"
        );
        let reported = device_placement(&loaded(8_192, placement(0, None)), &model(0)).expect("it is known");
        assert_eq!(reported.to_string(), "computed by Intel Xeon (CPU), 8192 tokens of context");
        let many = DevicePlacement { devices: vec!["ä".repeat(500)], ..placement(31, None) };
        let reported = device_placement(&loaded(8_192, many), &model(0)).expect("it is known");
        assert_eq!(reported.device.len(), health::DEVICE_BYTES_MAX);
        assert_eq!(device_placement(&loaded(8_192, DevicePlacement::default()), &model(0)), None);
    }
}
