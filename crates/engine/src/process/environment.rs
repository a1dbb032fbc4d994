//! Chooses what an engine process inherits of the worker's environment.
//!
//! The worker's environment can hold keys, such as `TETHER_API_KEY` or those of a cloud. An engine parses files of
//! strangers, so it gets only what drivers, allocators and thread pools read.

use std::ffi::OsString;

/// Variables that an engine inherits.
const NAMES: [&str; 7] = [
    "DRI_PRIME",
    "GLIBC_TUNABLES",
    // Drivers keep compiled kernels below it, if they may write there.
    "HOME",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_TF32_OVERRIDE",
    "NVIDIA_VISIBLE_DEVICES",
    "RUST_BACKTRACE",
];

/// Beginnings of further variables: of the dynamic linker, ggml, OpenMP, allocators and GPU drivers.
const PREFIXES: [&str; 20] = [
    "AMD_",
    "CUDA_",
    "GGML_",
    "GOMP_",
    "GPU_",
    "HIP_",
    "HSA_",
    "LD_",
    "MALLOC_",
    "MESA_",
    "MIMALLOC_",
    "OMP_",
    "ONEAPI_",
    "RADV_",
    "ROCR_",
    "SYCL_",
    "UR_",
    "VK_",
    "ZES_",
    "ZE_",
];

/// Variables that have OpenMP choose the cores of its threads. No engine may, because the sandbox cannot tell its
/// threads from those of other processes, and OpenMP ends a process whose threads it cannot place.
const PLACES: [&str; 3] = ["GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND"];

/// Words in the names of secrets, whatever they begin with.
const SECRETS: [&str; 5] = ["CREDENTIAL", "KEY", "PASSWORD", "SECRET", "TOKEN"];

/// Returns the variables of an environment that an engine inherits.
pub(super) fn inherited(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (OsString, OsString)> {
    variables.into_iter().filter(|(name, _)| name.to_str().is_some_and(is_inherited))
}

fn is_inherited(name: &str) -> bool {
    let is_known = NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    is_known && !PLACES.contains(&name) && !SECRETS.iter().any(|word| name.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drivers_read_is_inherited_and_secrets_are_not() {
        for name in ["LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HOME"] {
            assert!(is_inherited(name), "{name}");
        }
        for name in ["TETHER_API_KEY", "TETHER_GATEWAY__BIND", "AWS_SECRET_ACCESS_KEY", "NVIDIA_API_KEY", "PATH", ""] {
            assert!(!is_inherited(name), "{name}");
        }
        assert!(PLACES.iter().all(|name| !is_inherited(name)));
        assert!(!is_inherited("CUDA_DOWNLOAD_TOKEN") && !is_inherited("MY_LD_PRELOAD"));
    }
}
