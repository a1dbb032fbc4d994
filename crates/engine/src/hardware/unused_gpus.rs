//! Explains why each installed but unused GPU is not used: a pure function of the detected facts.

use std::fmt;

use super::installed_gpus::{DeviceNode, InstalledGpu, InstalledGpus, Vendor};
use super::{Backend, BackendState, Device, Hardware};

/// An installed GPU that is not used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnusedGpu {
    /// The name to show to people.
    pub gpu: String,
    pub why: WhyUnused,
}

/// Why a GPU is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyUnused {
    /// The program was built without a backend for it.
    #[error("this build has no {} backend; {}", backend_name(*.0), how_to_build(*.0))]
    NoBackend(Vendor),
    /// The backend's library is not installed next to the program.
    #[error("{library} is missing next to the program; keep the files of a release together")]
    LibraryMissing {
        /// File name of the backend's library.
        library: String,
    },
    #[error("{library} cannot be loaded: {reason}")]
    NotLoadable {
        /// File name of the backend's library.
        library: String,
        /// The dynamic linker's error.
        reason: String,
    },
    /// No kernel driver is loaded.
    #[error("NVIDIA's driver is not installed or not loaded; install it (version 580 or newer for CUDA 13)")]
    NoDriver,
    /// The kernel driver is loaded, but this process cannot find the driver's library.
    #[error(
        "the driver {version} is loaded, but its library {library} is not found; in a container, start it with --gpus all, \
         else install the library of the same version"
    )]
    NoDriverLibrary {
        /// The driver's version, as reported by the kernel.
        version: String,
        /// File name of the driver's library.
        library: String,
    },
    /// The driver is older than the CUDA that this build uses.
    #[error(
        "the driver {version} is too old for the CUDA of this build; install a newer one (580 or newer for CUDA 13)"
    )]
    DriverTooOld {
        /// The driver's version, as reported by the kernel.
        version: String,
    },
    /// The device file does not exist.
    #[error("there is no {0}; in a container, start it with access to the GPU (docker run --gpus all, or --device)")]
    NoNode(&'static str),
    /// This user may not access the device file.
    #[error("this user may not use {0}; add it to the group that may (often video or render)")]
    NodeForbidden(&'static str),
    /// The driver offers fewer GPUs than are installed.
    #[error("the driver offers {offered} of {installed} GPUs to this program; see CUDA_VISIBLE_DEVICES")]
    Hidden {
        /// The number of usable GPUs.
        offered: usize,
        /// The number of installed GPUs.
        installed: usize,
    },
    /// The driver offers no GPU, for a reason of its own.
    #[error("its driver offers no {interface} device{}", reason(.complaint.as_deref()))]
    NotOffered {
        /// The backend, such as CUDA.
        interface: String,
        complaint: Option<String>,
    },
}

fn backend_name(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Nvidia => "CUDA",
        Vendor::Amd | Vendor::Intel => "Vulkan",
        Vendor::Apple => "Metal",
    }
}

fn how_to_build(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Nvidia => "`make dist FEATURES=portable,cuda` makes one that has it",
        Vendor::Amd | Vendor::Intel => "`make dist FEATURES=portable,vulkan` makes one that has it",
        Vendor::Apple => "build it with `--features metal`",
    }
}

fn reason(complaint: Option<&str>) -> String {
    complaint.map(|complaint| format!(": {complaint}")).unwrap_or_default()
}

impl fmt::Display for UnusedGpu {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} is here and computes nothing: {}", self.gpu, self.why)
    }
}

/// Returns the unused GPUs. GPUs with the same reason are grouped into one entry. A processor's integrated GPU is
/// left out if another GPU is used: it would help little.
pub fn unused_gpus(hardware: &Hardware, installed: &InstalledGpus) -> Vec<UnusedGpu> {
    let used = |vendor| hardware.devices.iter().filter(|device| vendor_of(device) == Some(vendor)).count();
    let any_is_used = hardware.devices.iter().any(Device::is_gpu);
    let mut unused = Vec::new();
    for vendor in [Vendor::Nvidia, Vendor::Amd, Vendor::Intel, Vendor::Apple] {
        let gpus: Vec<_> = installed.gpus.iter().filter(|gpu| gpu.vendor == vendor).collect();
        let gpus = if any_is_used { gpus.into_iter().filter(|gpu| !is_of_processor(gpu)).collect() } else { gpus };
        let why = match (used(vendor), gpus.len()) {
            (_, 0) => continue,
            (0, _) => why(vendor, hardware, installed),
            (offered, there) if vendor == Vendor::Nvidia && offered < there => {
                WhyUnused::Hidden { offered, installed: there }
            }
            _ => continue,
        };
        unused.push(UnusedGpu { gpu: names(vendor, &gpus), why });
    }
    unused
}

fn why(vendor: Vendor, hardware: &Hardware, installed: &InstalledGpus) -> WhyUnused {
    let interfaces: &[&str] = match vendor {
        Vendor::Nvidia => &["cuda", "vulkan"],
        Vendor::Amd | Vendor::Intel => &["vulkan"],
        Vendor::Apple => &["metal"],
    };
    let known = |interface: &&str| hardware.backends.iter().find(|backend| backend.name == **interface);
    let Some(backend) = interfaces.iter().find_map(known) else { return WhyUnused::NoBackend(vendor) };
    let library = || backend.library();
    match &backend.state {
        BackendState::Missing => WhyUnused::LibraryMissing { library: library() },
        BackendState::NotLoadable { reason } if needs_driver(reason) => match &installed.nvidia_driver {
            Some(version) => {
                WhyUnused::NoDriverLibrary { version: version.clone(), library: DRIVER_LIBRARY.to_owned() }
            }
            None => WhyUnused::NoDriver,
        },
        BackendState::NotLoadable { reason } => WhyUnused::NotLoadable { library: library(), reason: reason.clone() },
        BackendState::Loaded { complaint } => not_offered(vendor, backend, complaint.as_deref(), installed),
    }
}

/// The library through which programs use NVIDIA's driver.
const DRIVER_LIBRARY: &str = "libcuda.so.1";

fn needs_driver(reason: &str) -> bool {
    reason.starts_with(DRIVER_LIBRARY)
}

fn not_offered(vendor: Vendor, backend: &Backend, complaint: Option<&str>, installed: &InstalledGpus) -> WhyUnused {
    let (node, path) = match vendor {
        Vendor::Nvidia => (installed.nvidia_node, "/dev/nvidia0"),
        _ => (installed.render_node, "/dev/dri/renderD128"),
    };
    let has_driver = vendor != Vendor::Nvidia || installed.nvidia_driver.is_some();
    match (node, &installed.nvidia_driver) {
        _ if vendor == Vendor::Apple => {}
        _ if !has_driver => return WhyUnused::NoDriver,
        (DeviceNode::Missing, _) => return WhyUnused::NoNode(path),
        (DeviceNode::Forbidden, _) => return WhyUnused::NodeForbidden(path),
        (DeviceNode::Usable, Some(version))
            if complaint.is_some_and(|text| text.contains("driver version is insuff")) =>
        {
            return WhyUnused::DriverTooOld { version: version.clone() };
        }
        _ => {}
    }
    WhyUnused::NotOffered { interface: backend.name.clone(), complaint: complaint.map(str::to_owned) }
}

/// Returns the vendor of a usable device, as far as its name shows it.
fn vendor_of(device: &Device) -> Option<Vendor> {
    if !device.is_gpu() {
        return None;
    }
    match device.interface().as_str() {
        "cuda" => return Some(Vendor::Nvidia),
        "metal" => return Some(Vendor::Apple),
        "rocm" => return Some(Vendor::Amd),
        _ => {}
    }
    let description = device.description.to_lowercase();
    let words = [
        (Vendor::Nvidia, ["nvidia", "geforce"]),
        (Vendor::Amd, ["amd", "radeon"]),
        (Vendor::Intel, ["intel", "intel"]),
        (Vendor::Apple, ["apple", "apple"]),
    ];
    let made_by = words.iter().find(|(_, words)| words.iter().any(|word| description.contains(word)));
    made_by.map(|(vendor, _)| *vendor)
}

/// Intel's processors have their integrated GPU at this address.
fn is_of_processor(gpu: &InstalledGpu) -> bool {
    gpu.vendor == Vendor::Intel && gpu.address.ends_with("00:02.0")
}

fn names(vendor: Vendor, gpus: &[&InstalledGpu]) -> String {
    let model = gpus.iter().find_map(|gpu| gpu.model.clone());
    let name = model.unwrap_or_else(|| format!("{} GPU", vendor.name()));
    let addresses: Vec<_> = gpus.iter().map(|gpu| gpu.address.as_str()).filter(|it| !it.is_empty()).collect();
    let at = if addresses.is_empty() { String::new() } else { format!(" at {}", addresses.join(", ")) };
    match gpus.len() {
        1 => format!("{name}{at}"),
        count => format!("{count} times {name}{at}"),
    }
}

#[cfg(test)]
mod tests;
