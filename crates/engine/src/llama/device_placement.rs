//! Decides how many layers of a model to offload to GPUs.

use crate::gguf::Header;
use crate::hardware::{self, Device};
use crate::memory_plan;
use crate::model_runtime::{DevicePlacement, LoadOptions};

/// Decides where to place a model.
pub(super) fn plan(header: &Header, options: &LoadOptions, devices: &[Device]) -> DevicePlacement {
    let gpus = hardware::gpus(devices);
    let vram_free_bytes = (!gpus.is_empty()).then(|| hardware::free_gpu_bytes(devices));
    let layers = memory_plan::layers(header);
    let gpu_layers = match options.gpu_layers {
        Some(wanted) if vram_free_bytes.is_some() => wanted.min(layers),
        Some(_) => 0,
        None => vram_free_bytes.map_or(0, |free| {
            let fit_bytes = options.vram_fit_bytes.unwrap_or(free).min(free);
            memory_plan::layers_that_fit(header, options, fit_bytes)
        }),
    };
    let planned = memory_plan::plan(header, &LoadOptions { gpu_layers: Some(gpu_layers), ..options.clone() });
    let is_host = |device: &&Device| !device.is_gpu();
    let devices = match gpu_layers {
        // Libraries that compute on the CPU are listed as devices of their own.
        0 => devices.iter().filter(is_host).take(1).collect(),
        _ => gpus,
    };
    DevicePlacement {
        layers,
        gpu_layers,
        devices: devices.into_iter().map(ToString::to_string).collect(),
        vram_free_bytes,
        vram_bytes: planned.map(|plan| plan.vram_bytes).unwrap_or_default(),
        context_trained: header.context_length().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::DeviceKind;
    use crate::memory_plan::tests::plain;

    fn device(name: &str, kind: DeviceKind, mib: u64) -> Device {
        let bytes = mib << 20;
        Device { name: name.into(), description: "It".into(), kind, free_bytes: bytes, total_bytes: bytes }
    }

    fn placed(gpu_layers: Option<u32>, devices: &[Device]) -> (u32, u32, Vec<String>) {
        let options = LoadOptions { gpu_layers, ..LoadOptions::default() };
        let DevicePlacement { layers, gpu_layers, devices, .. } = plan(&plain(), &options, devices);
        (layers, gpu_layers, devices)
    }

    #[test]
    fn layers_go_to_a_gpu_as_far_as_it_is_there_is_wanted_and_holds_them() {
        let host = device("CPU", DeviceKind::Cpu, 0);
        let large = [host.clone(), device("CUDA0", DeviceKind::Gpu, 80_000), device("CUDA1", DeviceKind::Gpu, 80_000)];
        let small = [host.clone(), device("CUDA0", DeviceKind::Gpu, 10)];
        let (cpu, gpus) = (vec!["It (CPU)".to_owned()], vec!["It (CUDA0)".to_owned(), "It (CUDA1)".to_owned()]);
        let all = placed(None, &large).0;
        assert_eq!(placed(None, &[host]), (all, 0, cpu.clone()));
        assert_eq!(placed(Some(3), &large[..1]), (all, 0, cpu.clone()));
        assert_eq!(placed(None, &large), (all, all, gpus.clone()));
        assert_eq!(placed(Some(u32::MAX), &large), (all, all, gpus.clone()));
        assert_eq!(placed(Some(3), &large), (all, 3, gpus));
        assert_eq!(placed(Some(0), &large), (all, 0, cpu.clone()));
        assert_eq!(placed(None, &small), (all, 0, cpu));
        // Free memory may already be granted to other models.
        let options = LoadOptions { gpu_layers: None, vram_fit_bytes: Some(0), ..LoadOptions::default() };
        assert_eq!(plan(&plain(), &options, &large).gpu_layers, 0);
    }
}
