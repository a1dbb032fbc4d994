//! The compute devices of this machine, and the names that schedulers and users know them by.

mod installed_gpus;
mod unused_gpus;

use std::sync::OnceLock;
use std::thread;

use serde::{Deserialize, Serialize};

pub use installed_gpus::{DeviceNode, InstalledGpu, InstalledGpus, Vendor};
pub use unused_gpus::{UnusedGpu, WhyUnused, unused_gpus};

/// Returns how many threads to use when `wanted` are asked for. 0 means a default, which leaves one core of three or
/// more to the network and to other programs. More threads than cores only wait for each other, and the process may
/// not be able to start them.
///
/// With two cores the default uses both: measured with and without other load, two threads that go to sleep early are
/// faster than one.
pub fn threads(wanted: u32, cores: u32) -> u32 {
    let cores = cores.max(1);
    match wanted {
        0 if cores > 2 => cores - 1,
        0 => cores,
        wanted => wanted.min(cores),
    }
}

/// Returns how many cores this process may use, by its affinity mask and its control group at the first call. An engine
/// process cannot read its control group later.
pub fn cores() -> u32 {
    static CORES: OnceLock<u32> = OnceLock::new();
    let count = || thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX));
    *CORES.get_or_init(count)
}

/// Returns the memory that this process and its children can use without swapping, in bytes, within the limits of
/// their control groups. Returns `None` if the system does not report it.
pub fn free_memory_bytes() -> Option<u64> {
    crate::process::host_memory::available_bytes()
}

/// The devices and GPU backends that a runtime can use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// The compute devices, as reported by the backends of this build.
    pub devices: Vec<Device>,
    /// The GPU backends that this build should have.
    pub backends: Vec<Backend>,
}

impl Hardware {
    /// Returns the GPUs that layers are offloaded to, chosen as llama.cpp does: those with memory of their own, or
    /// else the integrated GPUs of one backend.
    pub fn gpus(&self) -> Vec<&Device> {
        gpus(&self.devices)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Its short name, such as `cuda`, `vulkan` or `metal`.
    pub name: String,
    pub state: BackendState,
}

impl Backend {
    /// Returns the file name of the backend's library, if it is a separate library.
    pub fn library(&self) -> String {
        format!("libggml-{}.so", self.name)
    }
}

/// Whether a GPU backend can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BackendState {
    /// The backend is loaded, with or without devices.
    Loaded {
        /// The complaint that it logged when it started.
        complaint: Option<String>,
    },
    /// Its library is not installed next to the program.
    Missing,
    NotLoadable {
        /// The dynamic linker's error.
        reason: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its short name, such as `CPU` or `CUDA0`.
    pub name: String,
    /// A description, such as the processor's model.
    pub description: String,
    pub kind: DeviceKind,
    /// Free memory in bytes; 0 if unknown.
    pub free_bytes: u64,
    /// Total memory in bytes; 0 if unknown.
    pub total_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// The CPU, or a library that computes on it.
    Cpu,
    /// A GPU with memory of its own.
    Gpu,
    /// An integrated GPU, which shares the machine's memory.
    IntegratedGpu,
}

impl Device {
    pub fn is_gpu(&self) -> bool {
        self.kind != DeviceKind::Cpu
    }

    /// Returns the name of its backend, such as `cuda`, `vulkan` or `metal`.
    pub fn interface(&self) -> String {
        match self.name.trim_end_matches(|letter: char| letter.is_ascii_digit()).to_lowercase().as_str() {
            "mtl" => "metal".to_owned(),
            other => other.to_owned(),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} ({})", self.description, self.name)
    }
}

/// Returns the GPUs that layers are offloaded to.
pub(crate) fn gpus(devices: &[Device]) -> Vec<&Device> {
    let of_kind = |kind| devices.iter().filter(move |device| device.kind == kind);
    let with_memory: Vec<_> = of_kind(DeviceKind::Gpu).collect();
    if !with_memory.is_empty() {
        return with_memory;
    }
    let integrated = || of_kind(DeviceKind::IntegratedGpu);
    let interface = integrated().next().map(Device::interface);
    integrated().filter(|device| Some(device.interface()) == interface).collect()
}

/// Returns the free memory of all GPUs that layers are offloaded to, in bytes.
pub fn free_gpu_bytes(devices: &[Device]) -> u64 {
    gpus(devices).iter().fold(0, |sum, device| sum.saturating_add(device.free_bytes))
}

/// Words that name the vendor of a processor or its mounting, not its model.
const NOISE: [&str; 24] = [
    "nvidia",
    "geforce",
    "tesla",
    "quadro",
    "amd",
    "instinct",
    "intel",
    "apple",
    "corporation",
    "graphics",
    "gpu",
    "generation",
    "series",
    "pcie",
    "sxm",
    "sxm2",
    "sxm3",
    "sxm4",
    "sxm5",
    "nvl",
    "hbm2",
    "hbm2e",
    "hbm3",
    "hbm3e",
];

/// Returns the class of a GPU from its description: `NVIDIA H100 80GB HBM3` is an `h100`.
///
/// Memory size and mounting are dropped, because equal chips do equal work. The memory size is reported separately.
pub fn gpu_class(description: &str) -> String {
    let lower = description.to_lowercase();
    let mut plain = String::with_capacity(lower.len());
    let mut depth = 0_usize;
    for letter in lower.chars() {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ if depth == 0 => plain.push(letter),
            _ => {}
        }
    }
    let words: Vec<&str> = plain.split(|letter: char| !letter.is_ascii_alphanumeric()).collect();
    let is_size = |word: &str| {
        let number = word.strip_suffix("gb").or_else(|| word.strip_suffix("gib"));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let telling = |word: &&str| !word.is_empty() && !NOISE.contains(word) && !is_size(word);
    let class: Vec<&str> = words.iter().copied().filter(telling).collect();
    if class.is_empty() { "gpu".to_owned() } else { class.join("-") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn graphics_processors_are_known_by_their_model() {
        for (description, class) in [
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H100 PCIe", "h100"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA GH200 480GB", "gh200"),
            ("NVIDIA L40S", "l40s"),
            ("Tesla T4", "t4"),
            ("Tesla V100-SXM2-16GB", "v100"),
            ("NVIDIA GeForce RTX 4090", "rtx-4090"),
            ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"),
            ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-laptop"),
            ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
            ("NVIDIA GeForce GTX 1080 Ti", "gtx-1080-ti"),
            ("Apple M2 Max", "m2-max"),
            ("Apple M1", "m1"),
            ("AMD Instinct MI300X", "mi300x"),
            ("AMD Radeon RX 7900 XTX (RADV NAVI31)", "radeon-rx-7900-xtx"),
            ("AMD Radeon Graphics (RADV RENOIR)", "radeon"),
            ("Intel(R) Arc(TM) A770 Graphics (DG2)", "arc-a770"),
            ("Intel(R) Iris(R) Xe Graphics", "iris-xe"),
            ("Intel(R) UHD Graphics 770", "uhd-770"),
            ("llvmpipe (LLVM 15.0.7, 256 bits)", "llvmpipe"),
            ("", "gpu"),
            ("((((", "gpu"),
        ] {
            assert_eq!(gpu_class(description), class, "{description}");
        }
    }

    #[test]
    fn threads_leave_a_core_to_others_and_are_never_more_than_there_are_cores() {
        assert_eq!([0, 1, 2, 3, 4, 64].map(|cores| threads(0, cores)), [1, 1, 2, 2, 3, 63]);
        assert_eq!([1, 4, 5, 512, u32::MAX].map(|wanted| threads(wanted, 4)), [1, 4, 4, 4, 4]);
        assert!(threads(u32::MAX, cores()) >= 1);
    }

    #[test]
    fn the_interface_is_the_name_without_its_number() {
        for (name, interface) in [("CUDA0", "cuda"), ("Vulkan12", "vulkan"), ("MTL0", "metal"), ("ROCm1", "rocm")] {
            assert_eq!(device(name, DeviceKind::Gpu, 0).interface(), interface);
        }
    }

    #[test]
    fn only_graphics_processors_have_memory_of_their_own() {
        let devices = [
            device("CPU", DeviceKind::Cpu, 9),
            device("CUDA0", DeviceKind::Gpu, 3),
            device("CUDA1", DeviceKind::Gpu, 4),
        ];
        assert_eq!(free_gpu_bytes(&devices), 7);
        assert_eq!(free_gpu_bytes(&[]), 0);
        // llama.cpp ignores integrated GPUs if there are others, and those of a second backend.
        let integrated = |name, free_bytes| device(name, DeviceKind::IntegratedGpu, free_bytes);
        assert_eq!(free_gpu_bytes(&[devices.as_slice(), &[integrated("Vulkan0", 5)]].concat()), 7);
        assert_eq!(free_gpu_bytes(&[integrated("Vulkan0", 5), integrated("Vulkan1", 6), integrated("MTL0", 1)]), 11);
    }

    fn device(name: &str, kind: DeviceKind, free_bytes: u64) -> Device {
        Device { name: name.into(), description: String::new(), kind, free_bytes, total_bytes: free_bytes }
    }
}
