//! Loads ggml's backends, and reports which GPU interfaces are available and why one is missing.

#![allow(unsafe_code)]

use llama_cpp_sys_2 as sys;

use super::{log, text};
use crate::hardware::{Backend, BackendState};

/// The backends that this build was made for, by feature.
const BUILT_FOR: [(&str, bool); 3] =
    [("cuda", cfg!(feature = "cuda")), ("vulkan", cfg!(feature = "vulkan")), ("metal", cfg!(feature = "metal"))];
/// Backends that may be installed next to the program even if this build was not made for them.
const INTERFACES: [&str; 5] = ["cuda", "vulkan", "metal", "hip", "sycl"];

/// Loads the backends and returns those for GPUs.
pub(super) fn start() -> Vec<Backend> {
    let _ = log::take_errors();
    #[cfg(feature = "portable")]
    load();
    // The first access to the registry starts the backends that are linked in.
    let loaded = loaded();
    let complaints = log::take_errors();
    let mut found = Vec::new();
    for name in loaded.iter().filter(|name| INTERFACES.contains(&name.as_str())) {
        // A backend logs under the names of its own functions: `ggml_cuda_init: …`.
        let complaint = complaints.iter().find(|line| line.contains(&format!("ggml_{name}")));
        let complaint = complaint.map(|line| line.split_once(": ").map_or(line.as_str(), |(_, what)| what).to_owned());
        found.push(Backend { name: name.clone(), state: BackendState::Loaded { complaint } });
    }
    for name in INTERFACES.into_iter().filter(|name| !loaded.iter().any(|loaded| loaded == name)) {
        let is_built = BUILT_FOR.iter().any(|(built, is_built)| built == &name && *is_built);
        if let Some(state) = absent(name, is_built) {
            found.push(Backend { name: name.to_owned(), state });
        }
    }
    found
}

/// Returns the names of the backends in the registry, in lower case.
fn loaded() -> Vec<String> {
    // SAFETY: an index below the count is valid, and names live as long as the process.
    let name = |index| unsafe { text(sys::ggml_backend_reg_name(sys::ggml_backend_reg_get(index))) };
    let count = unsafe { sys::ggml_backend_reg_count() };
    let interface = |name: String| match name.to_lowercase() {
        short if short == "mtl" => "metal".to_owned(),
        name => name,
    };
    (0..count).map(name).map(interface).collect()
}

/// Returns why a backend is not in the registry, if it should or could be there.
#[cfg(feature = "portable")]
fn absent(name: &str, is_built: bool) -> Option<BackendState> {
    use std::ffi::CString;

    let library = folder()?.join(format!("libggml-{name}.so"));
    if !library.exists() {
        return is_built.then_some(BackendState::Missing);
    }
    let path = CString::new(library.into_os_string().into_encoded_bytes()).ok()?;
    let _ = log::take_errors();
    // Loading failed before. This attempt captures the error.
    // SAFETY: the path is a zero-terminated string that lives for the call.
    log::quietly(|| unsafe { sys::ggml_backend_load(path.as_ptr()) });
    let message = log::take_errors().into_iter().next().unwrap_or_default();
    let reason = message.split_once(".so: ").map_or(message.as_str(), |(_, reason)| reason);
    Some(BackendState::NotLoadable { reason: reason.to_owned() })
}

#[cfg(not(feature = "portable"))]
fn absent(_: &str, _: bool) -> Option<BackendState> {
    None
}

/// Loads the best CPU variant, and all other backends installed next to the program.
#[cfg(feature = "portable")]
fn load() {
    use std::ffi::CString;

    let folder = folder().and_then(|folder| CString::new(folder.into_os_string().into_encoded_bytes()).ok());
    match folder {
        // SAFETY: the path is a zero-terminated string that lives for the call.
        Some(folder) => unsafe { sys::ggml_backend_load_all_from_path(folder.as_ptr()) },
        // SAFETY: it takes no arguments.
        None => unsafe { sys::ggml_backend_load_all() },
    }
}

#[cfg(feature = "portable")]
fn folder() -> Option<std::path::PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}
