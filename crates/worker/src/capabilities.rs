//! What the machine can do, as schedulers and people name it (W8).

/// The labels under which a worker is scheduled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// The class of its accelerator; `cpu` for none.
    pub gpu_class: String,
    /// Memory of its accelerators, in GiB.
    pub vram_gb: u32,
    /// Its accelerators and the CPU features that matter to inference, such as `avx512-vnni`.
    pub accelerators: Vec<String>,
}

impl Capabilities {
    /// Asks the machine. Only its CPU is looked at.
    pub fn detect() -> Self {
        let accelerators = cpu_features().into_iter().filter(|(_, there)| *there).map(|(name, _)| name.to_owned());
        Self { gpu_class: "cpu".to_owned(), vram_gb: 0, accelerators: accelerators.collect() }
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

    #[test]
    fn a_machine_without_an_accelerator_is_of_class_cpu() {
        let found = Capabilities::detect();
        assert_eq!((found.gpu_class.as_str(), found.vram_gb), ("cpu", 0));
        // Labels read like the region's slug: schedulers and people compare them as they are.
        let slug = |label: &String| label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        assert!(found.accelerators.iter().all(slug), "{:?}", found.accelerators);
    }
}
