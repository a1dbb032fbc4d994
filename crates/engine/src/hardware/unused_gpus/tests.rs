use super::*;
use crate::hardware::DeviceKind;

fn device(name: &str, description: &str) -> Device {
    Device {
        name: name.into(),
        description: description.into(),
        kind: if name == "CPU" { DeviceKind::Cpu } else { DeviceKind::Gpu },
        free_bytes: 0,
        total_bytes: 0,
    }
}

fn backend(name: &str, state: BackendState) -> Backend {
    Backend { name: name.into(), state }
}

fn loaded(name: &str, complaint: Option<&str>) -> Backend {
    backend(name, BackendState::Loaded { complaint: complaint.map(str::to_owned) })
}

fn not_loadable(name: &str, reason: &str) -> Backend {
    backend(name, BackendState::NotLoadable { reason: reason.into() })
}

fn hardware(gpus: &[(&str, &str)], backends: &[Backend]) -> Hardware {
    let gpus = gpus.iter().map(|(name, description)| device(name, description));
    let devices = std::iter::once(device("CPU", "Intel Xeon")).chain(gpus).collect();
    Hardware { devices, backends: backends.to_vec() }
}

fn gpu(vendor: Vendor, address: &str) -> InstalledGpu {
    InstalledGpu { vendor, address: address.into(), model: None }
}

/// A machine with one GPU and a working driver.
fn machine(vendor: Vendor) -> InstalledGpus {
    InstalledGpus {
        gpus: vec![gpu(vendor, "0000:01:00.0")],
        nvidia_driver: (vendor == Vendor::Nvidia).then(|| "580.82.07".into()),
        nvidia_node: DeviceNode::Usable,
        render_node: DeviceNode::Usable,
    }
}

fn whys(hardware: &Hardware, installed: &InstalledGpus) -> Vec<WhyUnused> {
    unused_gpus(hardware, installed).into_iter().map(|unused| unused.why).collect()
}

const OLD: &str = "failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version";

#[test]
fn a_gpu_without_a_backend_that_serves_it_is_told_with_the_one_that_would() {
    use Vendor::{Amd, Apple, Intel, Nvidia};
    let (cuda, vulkan, metal) = (loaded("cuda", None), loaded("vulkan", None), loaded("metal", None));
    for vendor in [Nvidia, Amd, Intel, Apple] {
        for backends in [vec![], vec![cuda.clone()], vec![vulkan.clone()], vec![metal.clone()]] {
            let serves = match backends.first().map(|backend| backend.name.as_str()) {
                Some("cuda") => vendor == Nvidia,
                Some("vulkan") => vendor != Apple,
                Some("metal") => vendor == Apple,
                _ => false,
            };
            let found = whys(&hardware(&[], &backends), &machine(vendor));
            let expected = match backends.first() {
                Some(Backend { name, .. }) if serves => {
                    WhyUnused::NotOffered { interface: name.clone(), complaint: None }
                }
                _ => WhyUnused::NoBackend(vendor),
            };
            assert_eq!(found, [expected], "{vendor:?} {backends:?}");
        }
    }
}

/// An NVIDIA GPU in every combination of backend, kernel driver and device file.
#[test]
fn an_nvidia_gpu_is_unused_for_the_first_thing_that_is_missing() {
    use DeviceNode::{Forbidden, Missing, Usable};
    let no_driver_library = "libcuda.so.1: cannot open shared object file: No such file or directory";
    let no_cublas = "libcublas.so.13: cannot open shared object file: No such file or directory";
    let version = || "550.54.14".to_owned();
    let not_offered = |complaint: Option<&str>| WhyUnused::NotOffered {
        interface: "cuda".into(),
        complaint: complaint.map(str::to_owned),
    };
    let library = || "libggml-cuda.so".to_owned();
    let without_library = WhyUnused::NoDriverLibrary { version: version(), library: "libcuda.so.1".into() };
    let not_loadable_cublas = WhyUnused::NotLoadable { library: library(), reason: no_cublas.into() };
    for (backend, has_driver, node, expected) in [
        (backend("cuda", BackendState::Missing), true, Usable, WhyUnused::LibraryMissing { library: library() }),
        (backend("cuda", BackendState::Missing), false, Missing, WhyUnused::LibraryMissing { library: library() }),
        (not_loadable("cuda", no_driver_library), false, Missing, WhyUnused::NoDriver),
        (not_loadable("cuda", no_driver_library), true, Missing, without_library.clone()),
        (not_loadable("cuda", no_driver_library), true, Usable, without_library),
        (not_loadable("cuda", no_cublas), true, Usable, not_loadable_cublas.clone()),
        (not_loadable("cuda", no_cublas), false, Missing, not_loadable_cublas),
        (loaded("cuda", Some(OLD)), false, Missing, WhyUnused::NoDriver),
        (loaded("cuda", None), false, Usable, WhyUnused::NoDriver),
        (loaded("cuda", Some(OLD)), true, Missing, WhyUnused::NoNode("/dev/nvidia0")),
        (loaded("cuda", Some(OLD)), true, Forbidden, WhyUnused::NodeForbidden("/dev/nvidia0")),
        (loaded("cuda", Some(OLD)), true, Usable, WhyUnused::DriverTooOld { version: version() }),
        (loaded("cuda", Some("out of memory")), true, Usable, not_offered(Some("out of memory"))),
        (loaded("cuda", None), true, Usable, not_offered(None)),
    ] {
        let nvidia_driver = has_driver.then(version);
        let installed = InstalledGpus { nvidia_driver, nvidia_node: node, ..machine(Vendor::Nvidia) };
        let found = whys(&hardware(&[], std::slice::from_ref(&backend)), &installed);
        assert_eq!(found, [expected], "{backend:?}, driver {has_driver}, {node:?}");
    }
}

#[test]
fn other_gpus_need_a_vulkan_driver_and_its_device_file() {
    use DeviceNode::{Forbidden, Missing, Usable};
    for vendor in [Vendor::Amd, Vendor::Intel] {
        for (node, expected) in [
            (Missing, WhyUnused::NoNode("/dev/dri/renderD128")),
            (Forbidden, WhyUnused::NodeForbidden("/dev/dri/renderD128")),
            (Usable, WhyUnused::NotOffered { interface: "vulkan".into(), complaint: None }),
        ] {
            let installed = InstalledGpus { render_node: node, ..machine(vendor) };
            assert_eq!(whys(&hardware(&[], &[loaded("vulkan", None)]), &installed), [expected]);
        }
    }
}

#[test]
fn a_gpu_that_computes_is_not_complained_of() {
    let backends = [loaded("cuda", None), loaded("vulkan", None)];
    for (vendor, name, description) in [
        (Vendor::Nvidia, "CUDA0", "NVIDIA H200"),
        (Vendor::Nvidia, "Vulkan0", "NVIDIA GeForce RTX 4090"),
        (Vendor::Amd, "Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)"),
        (Vendor::Intel, "Vulkan0", "Intel(R) Arc(TM) A770 Graphics (DG2)"),
        (Vendor::Apple, "MTL0", "Apple M2 Max"),
    ] {
        assert_eq!(whys(&hardware(&[(name, description)], &backends), &machine(vendor)), [], "{description}");
    }
    assert_eq!(whys(&hardware(&[], &backends), &InstalledGpus::default()), []);
}

#[test]
fn of_several_gpus_those_that_compute_nothing_are_told() {
    let (cuda, vulkan) = (loaded("cuda", None), loaded("vulkan", None));
    let of_processor = gpu(Vendor::Intel, "0000:00:02.0");
    let both = InstalledGpus {
        gpus: vec![of_processor.clone(), gpu(Vendor::Nvidia, "0000:01:00.0")],
        ..machine(Vendor::Nvidia)
    };
    // A processor's integrated GPU is reported only if nothing better is used.
    assert_eq!(whys(&hardware(&[("CUDA0", "NVIDIA H200")], std::slice::from_ref(&cuda)), &both), []);
    let reasons = [WhyUnused::NoBackend(Vendor::Nvidia), WhyUnused::NoBackend(Vendor::Intel)];
    assert_eq!(whys(&hardware(&[], &[]), &both), reasons);
    // The integrated GPU is used, and the better one is not.
    let intel = hardware(&[("Vulkan0", "Intel(R) UHD Graphics 770")], &[loaded("cuda", Some(OLD)), vulkan]);
    assert_eq!(whys(&intel, &both), [WhyUnused::DriverTooOld { version: "580.82.07".into() }]);
    let two = InstalledGpus {
        gpus: vec![gpu(Vendor::Nvidia, "0000:01:00.0"), gpu(Vendor::Nvidia, "0000:02:00.0")],
        ..machine(Vendor::Nvidia)
    };
    let one_of_two = whys(&hardware(&[("CUDA0", "NVIDIA H200")], &[cuda]), &two);
    assert_eq!(one_of_two, [WhyUnused::Hidden { offered: 1, installed: 2 }]);
}

#[test]
fn what_is_told_is_one_plain_line() {
    let line = |installed: &InstalledGpus| unused_gpus(&hardware(&[], &[]), installed)[0].to_string();
    assert_eq!(
        line(&machine(Vendor::Nvidia)),
        "NVIDIA GPU at 0000:01:00.0 is here and computes nothing: this build has no CUDA backend; \
         `make dist FEATURES=portable,cuda` makes one that has it"
    );
    let named = |address: &str| InstalledGpu { model: Some("NVIDIA H200".into()), ..gpu(Vendor::Nvidia, address) };
    let two = InstalledGpus { gpus: vec![named("0000:01:00.0"), named("0000:02:00.0")], ..machine(Vendor::Nvidia) };
    assert!(line(&two).starts_with("2 times NVIDIA H200 at 0000:01:00.0, 0000:02:00.0 is here"), "{}", line(&two));
    let driver = WhyUnused::NotOffered { interface: "cuda".into(), complaint: Some("no memory".into()) };
    assert_eq!(driver.to_string(), "its driver offers no cuda device: no memory");
}
