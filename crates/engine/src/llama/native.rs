//! Safe bindings to llama.cpp's C interface: the one place in this crate where Rust calls C++.
//!
//! Handles own what they point to and keep alive what they depend on: a context and an adapter hold their model.
//! Cheap checks here prevent calls on which C++ would abort. Since not everything can be checked, models run in
//! processes of their own. See `docs/adr/0018-bindings-of-our-own.md`.

#![allow(unsafe_code)]

mod backends;
mod batch;
mod context;
mod log;
#[cfg(matrices)]
mod matrices;
mod model;
mod vocabulary;

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use llama_cpp_sys_2 as sys;

use crate::hardware::{Backend, Device, DeviceKind, Hardware};

pub(super) use batch::Batch;
pub(super) use context::{Context, ContextOptions, DecodeError, Pooling};
pub(super) use model::{Adapter, Model, ModelOptions, Window};
pub(super) use vocabulary::{Token, Vocabulary};

/// Starts llama.cpp, once for the life of the process; every handle's constructor calls it. Returns whether it
/// multiplies with our kernels where it can.
pub(crate) fn start() -> bool {
    started().has_matrices
}

/// What llama.cpp brought when it started.
struct Started {
    has_matrices: bool,
    backends: Vec<Backend>,
}

fn started() -> &'static Started {
    static STARTED: OnceLock<Started> = OnceLock::new();
    STARTED.get_or_init(|| {
        log::take_over();
        let backends = backends::start();
        // SAFETY: it is called once, before anything else of llama.cpp's but the loading of its backends.
        unsafe { sys::llama_backend_init() };
        #[cfg(matrices)]
        let has_matrices = matrices::register();
        #[cfg(not(matrices))]
        let has_matrices = false;
        Started { has_matrices, backends }
    })
}

/// Returns the instruction sets of the kernels that run on the CPU, as llama.cpp names them, and ours where they run.
pub(crate) fn instruction_sets() -> &'static str {
    static SETS: OnceLock<String> = OnceLock::new();
    SETS.get_or_init(|| {
        let ours = start().then_some("our kernels");
        // SAFETY: the text stays until the next call, which never comes.
        let told = unsafe { text(sys::llama_print_system_info()) };
        let used = told.split(['|', ':']).filter_map(|feature| feature.trim().strip_suffix(" = 1"));
        let used: Vec<&str> = used.collect();
        decisive(&used).into_iter().chain(ours).collect::<Vec<_>>().join(", ")
    })
}

/// Leaves out what says little of the speed: what every processor of a kind has, and what a stronger set includes.
fn decisive<'a>(used: &[&'a str]) -> Vec<&'a str> {
    let has = |name: &str| used.contains(&name);
    let weaker = |name: &str| match name {
        "AVX2" | "AVX_VNNI" => has("AVX512"),
        "AVX" => has("AVX2"),
        "AVX512" => has("AVX512_VNNI"),
        "NEON" => has("DOTPROD"),
        "AVX512_VNNI" | "AVX512_BF16" | "AMX_INT8" | "DOTPROD" | "MATMUL_INT8" | "SVE" | "SME" | "METAL" | "CUDA" => {
            false
        }
        _ => true,
    };
    used.iter().copied().filter(|name| !weaker(name)).collect()
}

/// Returns what this build can compute with.
pub(crate) fn hardware() -> Hardware {
    Hardware { devices: devices(), backends: started().backends.clone() }
}

/// Returns the devices that this build can use. A GPU that has two interfaces is told once, as llama.cpp uses it.
pub(crate) fn devices() -> Vec<Device> {
    start();
    let mut known = BTreeSet::new();
    // SAFETY: the registry is filled by then, and an index below the count is valid.
    (0..unsafe { sys::ggml_backend_dev_count() })
        .map(|index| unsafe { sys::ggml_backend_dev_get(index) })
        // SAFETY: they come from the registry.
        .filter(|found| unsafe { address(*found) }.is_none_or(|address| known.insert(address)))
        .map(|found| unsafe { device(found) })
        .collect()
}

/// Returns where a device is plugged in, where that is known.
///
/// # Safety
/// The device must come from the registry.
unsafe fn address(device: sys::ggml_backend_dev_t) -> Option<String> {
    // SAFETY: the fields are filled by the call, and its texts live as long as the process.
    unsafe {
        let mut properties = std::mem::zeroed();
        sys::ggml_backend_dev_get_props(device, &raw mut properties);
        (!properties.device_id.is_null()).then(|| text(properties.device_id))
    }
}

/// # Safety
/// The device must come from the registry.
unsafe fn device(device: sys::ggml_backend_dev_t) -> Device {
    let (mut free, mut total) = (0, 0);
    // SAFETY: names are strings that live as long as the process.
    unsafe {
        sys::ggml_backend_dev_memory(device, &raw mut free, &raw mut total);
        Device {
            name: text(sys::ggml_backend_dev_name(device)),
            description: text(sys::ggml_backend_dev_description(device)),
            kind: match sys::ggml_backend_dev_type(device) {
                sys::GGML_BACKEND_DEVICE_TYPE_GPU => DeviceKind::Gpu,
                sys::GGML_BACKEND_DEVICE_TYPE_IGPU => DeviceKind::IntegratedGpu,
                _ => DeviceKind::Cpu,
            },
            free_bytes: free as u64,
            total_bytes: total as u64,
        }
    }
}

/// # Safety
/// The pointer must be null or a string that ends with a zero.
unsafe fn text(pointer: *const std::ffi::c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller vouches for it.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// Returns a path that leads through an open descriptor, so that what was verified is what is read.
fn path_of(file: &File) -> std::ffi::CString {
    const FOLDER: &str = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };
    std::ffi::CString::new(format!("{FOLDER}/{}", file.as_raw_fd())).expect("digits have no zero byte")
}

/// Returns what llama.cpp complained of first on this thread, or else the given words.
fn complaint(otherwise: &str) -> String {
    log::take_errors().into_iter().next().unwrap_or_else(|| otherwise.into())
}
