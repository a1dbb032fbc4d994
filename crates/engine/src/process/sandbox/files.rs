//! Landlock: the process opens no path, except for what drivers of GPUs need.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, RestrictSelfAttr as _, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};

use super::Needs;

/// What this program knows of Landlock. Older kernels enforce what they know.
const KNOWN: ABI = ABI::V10;

/// The first version of Landlock that guards the length of files.
pub(super) const GUARDS_LENGTH: i32 = 3;

/// What Landlock covers, once it is in force.
pub(super) struct Closed {
    pub(super) abi: i32,
    /// Whether it covers threads that ran before.
    pub(super) all_threads: bool,
}

pub(super) fn close(needs: &Needs<'_>) -> Result<Closed, String> {
    let status = restrict(needs).map_err(|error| format!("Landlock fails: {error}"))?;
    match status.landlock {
        LandlockStatus::NotImplemented => Err("this kernel has no Landlock (Linux 5.13 and newer can have it)".into()),
        LandlockStatus::NotEnabled => Err("this kernel has Landlock, but it is not in the boot parameter lsm=".into()),
        LandlockStatus::Available { effective_abi, .. } if status.ruleset != RulesetStatus::NotEnforced => {
            Ok(Closed { abi: effective_abi as i32, all_threads: status.all_threads })
        }
        LandlockStatus::Available { .. } => Err("Landlock enforces nothing here".into()),
    }
}

fn restrict(needs: &Needs<'_>) -> Result<landlock::RestrictionStatus, RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .add_rules(needs.files.iter().map(|file| Ok::<_, RulesetError>(PathBeneath::new(file, AccessFs::ReadFile))))?
        .all_threads(true)?;
    if !needs.drivers {
        return ruleset.restrict_self();
    }
    ruleset
        .add_rules(path_beneath_rules(device_files(Path::new("/dev")), driven()))?
        .add_rules(path_beneath_rules(library_folders(), AccessFs::ReadFile | AccessFs::ReadDir))?
        // Drivers read the process's own maps and name its threads. Links in it lead to files that stay closed.
        .add_rules(path_beneath_rules(["/proc/self"], AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile))?
        .restrict_self()
}

/// What drivers do with devices.
fn driven() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::ReadDir | AccessFs::IoctlDev
}

/// Returns the devices of GPUs, by the names that their drivers give them.
fn device_files(folder: &Path) -> Vec<PathBuf> {
    let is_gpu = |name: &str| name.starts_with("nvidia") || ["accel", "dri", "dxg", "kfd"].contains(&name);
    children(folder, is_gpu)
}

/// Returns folders and files that drivers read libraries and the machine's hardware from. None holds anything secret.
fn library_folders() -> Vec<PathBuf> {
    const PATHS: [&str; 16] = [
        "/dev/null",
        "/dev/zero",
        "/etc/OpenCL",
        "/etc/ld.so.cache",
        "/etc/vulkan",
        "/lib",
        "/lib64",
        "/proc/cpuinfo",
        "/proc/devices",
        "/proc/driver/nvidia",
        "/proc/meminfo",
        "/sys",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/share/vulkan",
    ];
    let toolkit = |name: &str| name.starts_with("cuda") || name.starts_with("rocm");
    let toolkits = ["/opt", "/usr/local"].iter().flat_map(|folder| children(Path::new(folder), toolkit));
    let beside_program = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join("lib")));
    PATHS.iter().map(PathBuf::from).chain(toolkits).chain(beside_program).collect()
}

fn children(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let wanted = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(&is_wanted));
    wanted.map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_get_the_devices_of_gpus_and_no_others() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["nvidia0", "nvidiactl", "dri", "kfd", "mem", "sda", "kmsg"] {
            std::fs::write(folder.path().join(name), "").expect("written");
        }
        let mut found: Vec<_> = device_files(folder.path());
        found.sort();
        assert_eq!(found, ["dri", "kfd", "nvidia0", "nvidiactl"].map(|name| folder.path().join(name)));
    }
}
