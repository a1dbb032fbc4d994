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
use std::io::{self, Seek as _};
use std::os::fd::{AsRawFd, IntoRawFd as _};
use std::ptr::NonNull;
use std::sync::OnceLock;

use llama_cpp_sys_2 as sys;

use crate::hardware::{Backend, Device, DeviceKind, Hardware};

pub(super) use batch::Batch;
pub(super) use context::{Context, ContextOptions, DecodeError, Pooling};
pub(super) use model::{Adapter, Model, ModelOptions, Window};
pub(super) use vocabulary::{Token, Vocabulary};

/// Initialises llama.cpp, once per process; every handle's constructor calls it. Returns whether llama.cpp multiplies
/// with our kernels where it can.
pub(crate) fn start() -> bool {
    started().has_matrices
}

/// What llama.cpp offered when it was initialised.
struct Started {
    has_matrices: bool,
    backends: Vec<Backend>,
}

fn started() -> &'static Started {
    static STARTED: OnceLock<Started> = OnceLock::new();
    STARTED.get_or_init(|| {
        log::take_over();
        let backends = backends::start();
        // SAFETY: this is called once, and before any other function of llama.cpp except the loading of its backends.
        unsafe { sys::llama_backend_init() };
        #[cfg(matrices)]
        let has_matrices = matrices::register();
        #[cfg(not(matrices))]
        let has_matrices = false;
        Started { has_matrices, backends }
    })
}

/// Returns the instruction sets that the CPU kernels use, by llama.cpp's names, and whether our own kernels run.
pub(crate) fn instruction_sets() -> &'static str {
    static SETS: OnceLock<String> = OnceLock::new();
    SETS.get_or_init(|| {
        let ours = start().then_some("our kernels");
        // SAFETY: the string stays valid until the next call, which never comes.
        let info = unsafe { text(sys::llama_print_system_info()) };
        let used = info.split(['|', ':']).filter_map(|feature| feature.trim().strip_suffix(" = 1"));
        let used: Vec<&str> = used.collect();
        decisive(&used).into_iter().chain(ours).collect::<Vec<_>>().join(", ")
    })
}

/// Drops features that say little about speed: those that every processor of a kind has, and those that a stronger
/// feature includes.
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

/// Returns the devices and backends of this build.
pub(crate) fn hardware() -> Hardware {
    Hardware { devices: devices(), backends: started().backends.clone() }
}

/// Returns the usable devices. A GPU with two backends is listed once, with the one that llama.cpp uses.
pub(crate) fn devices() -> Vec<Device> {
    start();
    let mut known = BTreeSet::new();
    // SAFETY: the registry is filled by then, and an index below the count is valid.
    (0..unsafe { sys::ggml_backend_dev_count() })
        .map(|index| unsafe { sys::ggml_backend_dev_get(index) })
        // SAFETY: the devices come from the registry.
        .filter(|found| unsafe { address(*found) }.is_none_or(|address| known.insert(address)))
        .map(|found| unsafe { device(found) })
        .collect()
}

/// Returns the bus address of a device, if it is known.
///
/// # Safety
/// The device must come from the registry.
unsafe fn address(device: sys::ggml_backend_dev_t) -> Option<String> {
    // SAFETY: the call fills the fields, and their strings live as long as the process.
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
/// The pointer must be null or a zero-terminated string.
unsafe fn text(pointer: *const std::ffi::c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller guarantees it.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// C's view of an open file, from its beginning. The file's position moves with it.
struct Stream(NonNull<libc::FILE>);

impl Stream {
    fn over(file: &File) -> io::Result<Self> {
        let mut file = file.try_clone()?;
        file.rewind()?;
        // SAFETY: the descriptor is open, and the mode is a zero-terminated string.
        let stream = unsafe { libc::fdopen(file.as_raw_fd(), c"rb".as_ptr()) };
        let stream = NonNull::new(stream).ok_or_else(io::Error::last_os_error)?;
        // The stream closes the descriptor.
        let _ = file.into_raw_fd();
        Ok(Self(stream))
    }

    /// llama.cpp's bindings do not know what a C stream consists of.
    fn as_ptr(&self) -> *mut std::ffi::c_void {
        self.0.as_ptr().cast()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: `over` opened it, and nothing uses it any more.
        unsafe { libc::fclose(self.0.as_ptr()) };
    }
}

/// Returns a path to an open descriptor, so that the file that is read is the one that was verified.
fn path_of(file: &File) -> std::ffi::CString {
    const FOLDER: &str = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };
    std::ffi::CString::new(format!("{FOLDER}/{}", file.as_raw_fd())).expect("digits have no zero byte")
}

/// Returns the first error that llama.cpp logged on this thread, or `otherwise` if it logged no error.
fn complaint(otherwise: &str) -> String {
    log::take_errors().into_iter().next().unwrap_or_else(|| otherwise.into())
}
