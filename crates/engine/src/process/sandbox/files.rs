//! Landlock: the process opens no path, except for what drivers of GPUs need, and a server's program.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, LandlockStatus, NetPort, PathBeneath, RestrictSelfAttr as _,
    RestrictionStatus, Ruleset, RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus,
    Scope, path_beneath_rules,
};

use super::{Needs, ServerNeeds};

/// What this program knows of Landlock. Older kernels enforce what they know.
const KNOWN: ABI = ABI::V10;

/// The first version of Landlock that guards the length of files.
pub(super) const GUARDS_LENGTH: i32 = 3;
/// The first version of Landlock that guards signals to others.
pub(super) const GUARDS_SIGNALS: i32 = 6;

/// What Landlock covers, once it is in force.
pub(super) struct Closed {
    pub(super) abi: i32,
    /// Whether it covers threads that ran before.
    pub(super) all_threads: bool,
}

pub(super) fn close(needs: &Needs<'_>) -> Result<Closed, String> {
    closed(restrict(needs))
}

fn closed(restricted: Result<RestrictionStatus, RulesetError>) -> Result<Closed, String> {
    let status = restricted.map_err(said)?;
    match status.landlock {
        LandlockStatus::NotImplemented => Err("this kernel has no Landlock (Linux 5.13 and newer can have it)".into()),
        LandlockStatus::NotEnabled => Err("this kernel has Landlock, but it is not in the boot parameter lsm=".into()),
        LandlockStatus::Available { effective_abi, .. } if status.ruleset != RulesetStatus::NotEnforced => {
            Ok(Closed { abi: effective_abi as i32, all_threads: status.all_threads })
        }
        LandlockStatus::Available { .. } => Err("Landlock enforces nothing here".into()),
    }
}

fn said(error: RulesetError) -> String {
    format!("Landlock fails: {error}")
}

/// Returns a ruleset that refuses everything.
fn nothing() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()
}

fn restrict(needs: &Needs<'_>) -> Result<RestrictionStatus, RulesetError> {
    let ruleset = nothing()?
        .add_rules(needs.files.iter().map(|file| Ok::<_, RulesetError>(PathBeneath::new(file, AccessFs::ReadFile))))?
        .all_threads(true)?;
    if !needs.drivers {
        return ruleset.restrict_self();
    }
    with_drivers(ruleset)?
        // Drivers read the process's own maps and name its threads. Links in it lead to files that stay closed.
        .add_rules(path_beneath_rules(["/proc/self"], AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile))?
        .restrict_self()
}

/// Adds what drivers of GPUs use.
fn with_drivers(ruleset: RulesetCreated) -> Result<RulesetCreated, RulesetError> {
    ruleset
        .add_rules(path_beneath_rules(device_files(Path::new("/dev")), driven()))?
        .add_rules(path_beneath_rules(library_folders(), AccessFs::ReadFile | AccessFs::ReadDir))
}

/// The ruleset of a process that is yet to be started.
#[derive(Debug)]
pub(super) struct ServerRules(RulesetCreated);

impl ServerRules {
    pub(super) fn new(needs: &ServerNeeds<'_>) -> Result<Self, String> {
        server_rules(needs).map(Self).map_err(said)
    }

    /// Closes off this thread.
    pub(super) fn close(&self) -> Result<Closed, String> {
        let rules = self.0.try_clone().map_err(|error| format!("Landlock fails: {error}"))?;
        closed(rules.restrict_self())
    }

    /// Returns the rules as the kernel has them, for [`own_rules::enter`].
    pub(super) fn into_descriptor(self) -> Option<OwnedFd> {
        self.0.into()
    }
}

fn server_rules(needs: &ServerNeeds<'_>) -> Result<RulesetCreated, RulesetError> {
    let run = AccessFs::Execute | AccessFs::ReadFile | AccessFs::ReadDir;
    let folder = needs.program.and_then(Path::parent).filter(|folder| is_flat(folder));
    let model = Some(PathBeneath::new(needs.model, AccessFs::ReadFile)).filter(|_| !is_in_memory(needs.model));
    with_drivers(nothing()?.add_rules(model.map(Ok::<_, RulesetError>))?)?
        .add_rules(path_beneath_rules(needs.program.iter().flat_map(|program| files_of(program)), run))?
        // Some look for their libraries in it. The rule holds for folders in it as well, so there may be none.
        .add_rules(path_beneath_rules(folder, AccessFs::ReadDir))?
        .add_rules(path_beneath_rules(PROGRAMS, run))?
        .add_rules(path_beneath_rules(FACTS, AccessFs::ReadFile))?
        // Where output goes that nobody reads.
        .add_rules(path_beneath_rules(["/dev/null"], AccessFs::ReadFile | AccessFs::WriteFile))?
        .add_rules(path_beneath_rules(needs.paths, used()))?
        .add_rule(NetPort::new(needs.port, AccessNet::BindTcp))
}

/// Returns whether a file has no place in any file system. Landlock takes no rule for it, and lets it be opened again.
fn is_in_memory(file: &File) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    link.is_ok_and(|path| path.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
}

/// What a server does with files that its operator lets it use. It makes no devices, through which root would reach
/// every file.
fn used() -> BitFlags<AccessFs> {
    AccessFs::Execute
        | AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::MakeSym
        | AccessFs::RemoveFile
        | AccessFs::RemoveDir
        | AccessFs::Refer
}

/// Programs and libraries of the system.
const PROGRAMS: [&str; 10] = [
    "/bin",
    "/lib",
    "/lib64",
    "/nix/store",
    "/sbin",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/bin",
    "/usr/local/lib",
];

/// Files in which programs look up the machine, the time zone and names of hosts. None holds anything secret.
const FACTS: [&str; 12] = [
    "/dev/random",
    "/dev/urandom",
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/proc/stat",
    "/proc/sys",
    "/usr/share/locale",
    "/usr/share/zoneinfo",
];

/// Returns a program's file, the libraries beside it, and those of its installation, if that has a folder `bin`.
///
/// Other files beside it are not the program's: it may lie in somebody's home folder.
fn files_of(program: &Path) -> Vec<PathBuf> {
    let Some(folder) = program.parent() else { return Vec::new() };
    let beside = children(folder, is_library).into_iter().filter(|path| path.is_file());
    let installed = folder.parent().filter(|_| folder.ends_with("bin"));
    let installed = installed.into_iter().flat_map(|prefix| ["lib", "lib64"].map(|name| prefix.join(name)));
    [program.to_owned()].into_iter().chain(beside).chain(installed).collect()
}

/// Returns whether a name is that of a library, such as `libllama.so` and `libggml.so.0.9`.
fn is_library(name: &str) -> bool {
    let is_version = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    name.rsplit_once(".so").is_some_and(|(_, rest)| rest.is_empty() || rest.strip_prefix('.').is_some_and(is_version))
}

/// Returns whether there is no folder in a folder.
fn is_flat(folder: &Path) -> bool {
    let Ok(mut entries) = std::fs::read_dir(folder) else { return false };
    entries.all(|entry| entry.and_then(|entry| entry.file_type()).is_ok_and(|kind| !kind.is_dir()))
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
    const PATHS: [&str; 18] = [
        "/dev/null",
        "/dev/zero",
        "/etc/OpenCL",
        "/etc/ld.so.cache",
        "/etc/vulkan",
        "/lib",
        "/lib64",
        "/nix/store",
        "/proc/cpuinfo",
        "/proc/devices",
        "/proc/driver/nvidia",
        "/proc/meminfo",
        "/run/opengl-driver",
        "/sys",
        "/usr/lib",
        "/usr/lib64",
        "/usr/local/lib",
        "/usr/share/vulkan",
    ];
    // Google's machines have the driver in `/usr/local/nvidia`.
    let toolkit = |name: &str| ["cuda", "nvidia", "rocm"].iter().any(|kind| name.starts_with(kind));
    let toolkits = ["/opt", "/usr/local"].iter().flat_map(|folder| children(Path::new(folder), toolkit));
    let own = std::env::current_exe().map(|program| files_of(&program)).unwrap_or_default();
    let loaded = driver_folders(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default());
    PATHS.iter().map(PathBuf::from).chain(toolkits).chain(own).chain(loaded).collect()
}

/// Returns the folders of the drivers that a process has loaded, wherever its system keeps them. Drivers load further
/// libraries from there at the first computation.
fn driver_folders(maps: &str) -> BTreeSet<PathBuf> {
    const DRIVERS: [&str; 7] = ["libamdhip", "libcuda", "libhsa", "libnvidia", "libvulkan", "libze", "libOpenCL"];
    let is_driver = |file: &&Path| {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        DRIVERS.iter().any(|driver| name.starts_with(driver))
    };
    let files = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    files.filter(is_driver).filter_map(|file| Some(file.parent()?.to_owned())).collect()
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
    fn the_folders_of_loaded_drivers_are_found_wherever_they_lie() {
        let maps = "7f00-7f01 r-xp 00000000 08:01 42    /opt/some driver/lib/libcuda.so.1\n\
                    7f01-7f02 r--p 00001000 08:01 43    /opt/some driver/lib/libnvidia-ptxjitcompiler.so.1\n\
                    7f02-7f03 rw-p 00000000 00:00 0     [heap]\n\
                    7f03-7f04 r-xp 00000000 08:01 44    /srv/libsecret.so\n";
        assert_eq!(driver_folders(maps), BTreeSet::from(["/opt/some driver/lib".into()]));
    }

    #[test]
    fn a_program_has_its_libraries_and_nothing_else_that_lies_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let bin = folder.path().join("bin");
        std::fs::create_dir(&bin).expect("made");
        for name in ["llama-server", "libllama.so", "libggml.so.0", "notes", ".ssh", "secrets.sops.yaml"] {
            std::fs::write(bin.join(name), "").expect("written");
        }
        std::fs::create_dir(bin.join("folder.so")).expect("made");
        let mut found = files_of(&bin.join("llama-server"));
        found.sort();
        let expected = ["bin/libggml.so.0", "bin/libllama.so", "bin/llama-server", "lib", "lib64"];
        assert_eq!(found, expected.map(|name| folder.path().join(name)));
        assert_eq!(files_of(&folder.path().join("server")), [folder.path().join("server")]);
    }

    #[test]
    fn a_library_is_known_by_the_end_of_its_name() {
        for name in ["libllama.so", "libggml.so.0", "libstdc++.so.6.0.30", "libggml.so-2.so", "a.cpython-312.so"] {
            assert!(is_library(name), "{name}");
        }
        for name in ["x.sock", "a.sol", "secrets.sops.yaml", "libx.so.", "libx.so.old", "libx.so1", "so", "notes"] {
            assert!(!is_library(name), "{name}");
        }
    }

    #[test]
    fn a_folder_is_listed_only_if_no_folder_lies_in_it() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("llama-server"), "").expect("written");
        assert!(is_flat(folder.path()));
        std::fs::create_dir(folder.path().join("documents")).expect("made");
        assert!(!is_flat(folder.path()));
        assert!(!is_flat(&folder.path().join("none")));
    }

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
