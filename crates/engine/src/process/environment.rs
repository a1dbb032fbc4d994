//! Chooses what an engine process or a server inherits of the worker's environment.
//!
//! The worker's environment can hold keys, such as `TETHER_API_KEY` or those of a cloud. Both parse files of strangers,
//! so they get only what drivers, allocators and thread pools read, and a server also what finds its program and its
//! language.

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

/// Further variables that a server inherits.
const NAMES_OF_SERVERS: [&str; 6] = ["LANG", "LANGUAGE", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV"];

/// Beginnings of further variables that a server inherits: of languages, Python and llama-server.
const PREFIXES_OF_SERVERS: [&str; 3] = ["LC_", "LLAMA_", "PYTHON"];

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

/// Returns the variables of an environment that a server inherits.
pub(super) fn inherited_by_server(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (OsString, OsString)> {
    variables.into_iter().filter(|(name, _)| name.to_str().is_some_and(is_inherited_by_server))
}

fn is_inherited(name: &str) -> bool {
    is_one_of(name, &NAMES, &PREFIXES) && !PLACES.contains(&name)
}

fn is_inherited_by_server(name: &str) -> bool {
    is_inherited(name) || is_one_of(name, &NAMES_OF_SERVERS, &PREFIXES_OF_SERVERS)
}

/// Returns whether a variable is known, and by its name no secret.
fn is_one_of(name: &str, names: &[&str], prefixes: &[&str]) -> bool {
    let is_known = names.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix));
    is_known && !SECRETS.iter().any(|word| name.contains(word))
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
        for name in ["PATH", "LC_ALL", "LLAMA_ARG_THREADS", "CUDA_VISIBLE_DEVICES"] {
            assert!(is_inherited_by_server(name), "{name}");
        }
        for name in ["LLAMA_API_KEY", "HF_TOKEN", "TETHER_WORKER__SLOTS", "DATABASE_URL", "SSH_AUTH_SOCK"] {
            assert!(!is_inherited_by_server(name), "{name}");
        }
        assert!(!is_inherited("CUDA_DOWNLOAD_TOKEN") && !is_inherited("MY_LD_PRELOAD"));
    }
}
