//! The machine's capabilities, as schedulers and operators name them.

use engine::hardware::{Device, gpu_class};

/// The labels under which a worker is scheduled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// The class of its accelerator; `cpu` without one.
    pub gpu_class: String,
    /// Memory of its accelerators, in GiB.
    pub vram_gb: u32,
    /// Its accelerators and the CPU features that matter to inference, such as `avx512-vnni`.
    pub accelerators: Vec<String>,
}

impl Capabilities {
    /// Returns the labels of a machine with these devices. Detects the CPU's features itself.
    pub fn of(devices: &[Device]) -> Self {
        let gpus = || devices.iter().filter(|device| device.is_gpu());
        // Of several GPUs, the one with the most memory determines which large models fit.
        let largest = gpus().max_by_key(|device| device.total_bytes);
        let gpu_bytes = gpus().fold(0_u64, |sum, device| sum.saturating_add(device.total_bytes));
        let mut accelerators: Vec<String> = gpus().map(Device::interface).collect();
        accelerators.sort();
        accelerators.dedup();
        accelerators.extend(cpu_features().into_iter().filter(|(_, there)| *there).map(|(name, _)| name.to_owned()));
        Self {
            gpu_class: largest.map_or_else(|| "cpu".to_owned(), |device| gpu_class(&device.description)),
            // Drivers reserve some memory, so the nearest whole number is the advertised size.
            vram_gb: (gpu_bytes as f64 / f64::from(1 << 30)).round() as u32,
            accelerators,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    vec![
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx-vnni", is_x86_feature_detected!("avxvnni")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512-vnni", is_x86_feature_detected!("avx512vnni")),
        ("avx512-bf16", is_x86_feature_detected!("avx512bf16")),
    ]
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<(&'static str, bool)> {
    use std::arch::is_aarch64_feature_detected;

    vec![
        ("neon", is_aarch64_feature_detected!("neon")),
        ("dotprod", is_aarch64_feature_detected!("dotprod")),
        ("i8mm", is_aarch64_feature_detected!("i8mm")),
        ("sve", is_aarch64_feature_detected!("sve")),
    ]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(name: &str, description: &str, gib: u64) -> Device {
        let total_bytes = gib << 30;
        Device {
            name: name.into(),
            description: description.into(),
            kind: engine::hardware::DeviceKind::Gpu,
            free_bytes: total_bytes,
            total_bytes,
        }
    }

    #[test]
    fn a_machine_without_an_accelerator_is_of_class_cpu() {
        let found = Capabilities::of(&[]);
        assert_eq!((found.gpu_class.as_str(), found.vram_gb), ("cpu", 0));
        // Labels have the form of the region's slug: schedulers and people compare them verbatim.
        let slug = |label: &String| label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        assert!(found.accelerators.iter().all(slug), "{:?}", found.accelerators);
    }

    #[test]
    fn the_largest_of_several_accelerators_names_the_class_and_all_count_as_memory() {
        let two = [gpu("CUDA0", "NVIDIA GeForce RTX 4090", 24), gpu("CUDA1", "NVIDIA H100 80GB HBM3", 80)];
        let found = Capabilities::of(&two);
        assert_eq!((found.gpu_class.as_str(), found.vram_gb), ("h100", 104));
        assert_eq!(found.accelerators[0], "cuda");
        assert!(!found.accelerators[1..].contains(&"cuda".to_owned()));
    }
}
