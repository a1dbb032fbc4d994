//! Detects the machine's GPUs without any driver library, from the files that the kernel exposes.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use rustix::fs::Access;

/// The maximum number of directory entries that are read, and of GPUs that are reported.
const ENTRIES_MAX: usize = 4_096;
const GPUS_MAX: usize = 64;
/// The maximum number of bytes read from a kernel file.
const FILE_BYTES_MAX: u64 = 4_096;
/// PCI's class of display controllers: VGA, 3D and others.
const DISPLAY_CLASS: &str = "0x03";

/// The vendor of a GPU. Display adapters of server boards and virtual machines are by other vendors and cannot
/// compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vendor {
    Nvidia,
    Amd,
    Intel,
    Apple,
}

impl Vendor {
    /// Returns the vendor's usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nvidia => "NVIDIA",
            Self::Amd => "AMD",
            Self::Intel => "Intel",
            Self::Apple => "Apple",
        }
    }

    fn of_pci(number: &str) -> Option<Self> {
        match number {
            "0x10de" => Some(Self::Nvidia),
            "0x1002" => Some(Self::Amd),
            "0x8086" => Some(Self::Intel),
            _ => None,
        }
    }
}

/// A GPU that is installed in the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledGpu {
    /// The vendor, from its PCI id.
    pub vendor: Vendor,
    /// Its PCI address, such as `0000:01:00.0`; empty if it has none.
    pub address: String,
    /// The model, if the driver reports it.
    pub model: Option<String>,
}

/// Whether this user may access a device file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceNode {
    #[default]
    Missing,
    /// The file exists, but this user may not read and write it.
    Forbidden,
    Usable,
}

/// The installed GPUs and the files that their drivers provide.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InstalledGpus {
    /// The GPUs, by address.
    pub gpus: Vec<InstalledGpu>,
    /// The version of NVIDIA's kernel driver, if it is loaded.
    pub nvidia_driver: Option<String>,
    /// `/dev/nvidia0` and the like.
    pub nvidia_node: DeviceNode,
    /// `/dev/dri/renderD128` and the like, which Vulkan uses.
    pub render_node: DeviceNode,
}

impl InstalledGpus {
    /// Inspects the file system below a root, which is `/` except in tests. Unreadable files count as missing.
    pub fn find(root: &Path) -> Self {
        let mut gpus = pci_gpus(root);
        let nvidia_node = device_node(&root.join("dev"), "nvidia");
        let has = |vendor| gpus.iter().any(|gpu: &InstalledGpu| gpu.vendor == vendor);
        // For boards without PCI, and containers that hide it.
        let without_pci = |vendor| InstalledGpu { vendor, address: String::new(), model: None };
        let mut others = vec![];
        if nvidia_node != DeviceNode::Missing && !has(Vendor::Nvidia) {
            others.push(without_pci(Vendor::Nvidia));
        }
        if root.join("dev/kfd").exists() && !has(Vendor::Amd) {
            others.push(without_pci(Vendor::Amd));
        }
        if cfg!(target_os = "macos") {
            others.push(without_pci(Vendor::Apple));
        }
        gpus.append(&mut others);
        Self {
            gpus,
            nvidia_driver: read(&root.join("proc/driver/nvidia/version")).as_deref().and_then(driver_version),
            nvidia_node,
            render_node: device_node(&root.join("dev/dri"), "renderD"),
        }
    }
}

fn pci_gpus(root: &Path) -> Vec<InstalledGpu> {
    let mut found: Vec<_> = names(&root.join("sys/bus/pci/devices"))
        .into_iter()
        .filter_map(|address| {
            let device = root.join("sys/bus/pci/devices").join(&address);
            read(&device.join("class"))?.starts_with(DISPLAY_CLASS).then_some(())?;
            let vendor = Vendor::of_pci(read(&device.join("vendor"))?.trim())?;
            let information = read(&root.join("proc/driver/nvidia/gpus").join(&address).join("information"));
            Some(InstalledGpu { vendor, address, model: information.as_deref().and_then(model) })
        })
        .collect();
    found.sort_by(|one, other| one.address.cmp(&other.address));
    found.truncate(GPUS_MAX);
    found
}

/// Returns the best state of the device files whose name is `word` and a number.
fn device_node(folder: &Path, word: &str) -> DeviceNode {
    let is_numbered = |name: &&String| {
        name.strip_prefix(word).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let names = names(folder);
    let mut nodes = names.iter().filter(is_numbered).map(|name| folder.join(name)).peekable();
    if nodes.peek().is_none() {
        return DeviceNode::Missing;
    }
    // Opening it would wake the device up.
    let may_use = |node| rustix::fs::access(&node, Access::READ_OK | Access::WRITE_OK).is_ok();
    if nodes.any(may_use) { DeviceNode::Usable } else { DeviceNode::Forbidden }
}

/// Returns the version from the text of NVIDIA's kernel driver, such as `580.82.07`.
fn driver_version(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        word.contains('.') && word.split('.').all(|part| !part.is_empty() && part.bytes().all(|it| it.is_ascii_digit()))
    };
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

fn model(information: &str) -> Option<String> {
    let model = information.lines().find_map(|line| line.strip_prefix("Model:"))?.trim();
    (!model.is_empty() && !model.chars().any(char::is_control)).then(|| model.to_owned())
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.take(ENTRIES_MAX).flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn read(path: &Path) -> Option<String> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file system with the given files and their contents.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("it can be made");
            fs::write(path, text).expect("it can be written");
        }
        root
    }

    fn found(files: &[(&str, &str)]) -> InstalledGpus {
        let mut found = InstalledGpus::find(tree(files).path());
        // A Mac always reports one more.
        found.gpus.retain(|gpu| gpu.vendor != Vendor::Apple);
        found
    }

    const NVIDIA: &[(&str, &str)] = &[
        ("sys/bus/pci/devices/0000:41:00.0/class", "0x030200\n"),
        ("sys/bus/pci/devices/0000:41:00.0/vendor", "0x10de\n"),
    ];

    #[test]
    fn a_gpu_is_found_by_its_class_and_vendor_whatever_driver_it_has() {
        for (vendor, class, expected) in [
            ("0x10de", "0x030000", Some(Vendor::Nvidia)),
            ("0x10de", "0x030200", Some(Vendor::Nvidia)),
            ("0x1002", "0x038000", Some(Vendor::Amd)),
            ("0x8086", "0x030000", Some(Vendor::Intel)),
            // The audio device of a graphics card, and a network card.
            ("0x10de", "0x040300", None),
            ("0x8086", "0x020000", None),
            // Displays of a server board (ASPEED, Matrox), of QEMU (QXL, virtio, Bochs), VMware and Hyper-V.
            ("0x1a03", "0x030000", None),
            ("0x102b", "0x030000", None),
            ("0x1b36", "0x030000", None),
            ("0x1af4", "0x038000", None),
            ("0x1234", "0x030000", None),
            ("0x15ad", "0x030000", None),
            ("0x1414", "0x030000", None),
            ("", "0x030000", None),
        ] {
            let device = "sys/bus/pci/devices/0000:01:00.0";
            let files =
                [(format!("{device}/class"), format!("{class}\n")), (format!("{device}/vendor"), vendor.into())];
            let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
            let vendors: Vec<_> = found(&files).gpus.iter().map(|gpu| gpu.vendor).collect();
            assert_eq!(vendors, Vec::from_iter(expected), "{vendor} {class}");
        }
        assert_eq!(found(&[]), InstalledGpus::default());
    }

    #[test]
    fn what_nvidias_driver_tells_of_itself_and_of_a_gpu_is_read() {
        let version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (dvs@x)\nGCC version: 13.2.0\n";
        let found = found(
            &[
                NVIDIA,
                &[
                    ("proc/driver/nvidia/version", version),
                    ("proc/driver/nvidia/gpus/0000:41:00.0/information", "Model: \t\t NVIDIA H200\nIRQ: 0\n"),
                    ("dev/nvidiactl", ""),
                    ("dev/nvidia0", ""),
                ],
            ]
            .concat(),
        );
        assert_eq!(found.nvidia_driver.as_deref(), Some("580.82.07"));
        let gpu =
            InstalledGpu { vendor: Vendor::Nvidia, address: "0000:41:00.0".into(), model: Some("NVIDIA H200".into()) };
        assert_eq!(found.gpus, [gpu]);
        assert_eq!((found.nvidia_node, found.render_node), (DeviceNode::Usable, DeviceNode::Missing));
    }

    #[test]
    fn a_gpu_that_pci_does_not_show_is_found_by_its_device_file() {
        let vendors = |files: &[(&str, &str)]| found(files).gpus.iter().map(|gpu| gpu.vendor).collect::<Vec<_>>();
        assert_eq!(vendors(&[("dev/nvidia1", "")]), [Vendor::Nvidia]);
        assert_eq!(vendors(&[("dev/kfd", "")]), [Vendor::Amd]);
        assert_eq!(vendors(&[("dev/nvidiactl", ""), ("dev/nvidia-uvm", ""), ("dev/dri/card0", "")]), []);
        assert_eq!(vendors(&[NVIDIA, &[("dev/nvidia0", "")]].concat()), [Vendor::Nvidia]);
    }

    #[test]
    fn files_that_hold_something_else_are_no_reason_to_fail() {
        let nonsense = "\u{1b}[2J".repeat(10_000);
        let found = found(
            &[
                NVIDIA,
                &[
                    ("proc/driver/nvidia/version", nonsense.as_str()),
                    ("proc/driver/nvidia/gpus/0000:41:00.0/information", "Model: a\u{1b}[2Jb\n"),
                    ("sys/bus/pci/devices/0000:02:00.0/class", "0x030000"),
                ],
            ]
            .concat(),
        );
        assert_eq!((found.gpus.len(), found.nvidia_driver), (1, None));
        assert_eq!(found.gpus[0].model, None);
    }
}
