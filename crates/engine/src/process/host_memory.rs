//! The memory that this process can have.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Returns the memory that is available without swapping, limited by the machine and by every control group of this
/// process, such as that of a container or of a systemd unit. Returns `None` if the system does not report it.
pub(crate) fn available_bytes() -> Option<u64> {
    within(Path::new("/"))
}

fn within(root: &Path) -> Option<u64> {
    let machine = fs::read_to_string(root.join("proc/meminfo")).ok().and_then(|text| of_machine(&text));
    let membership = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let groups = groups(&membership).flat_map(|(version, group)| {
        let mount = root.join("sys/fs/cgroup").join(version.folder());
        levels(&mount, &group).filter_map(|folder| of_group(&folder, version)).collect::<Vec<_>>()
    });
    machine.into_iter().chain(groups).min()
}

fn of_machine(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1_024)
}

/// The two versions of control groups; a machine may use both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Version {
    /// Returns the mount point of the memory controller, below `/sys/fs/cgroup`.
    fn folder(self) -> &'static str {
        match self {
            Self::One => "memory",
            Self::Two => "",
        }
    }

    /// Returns the names of the limits, of the usage, and of the statistic for reclaimable file pages.
    fn names(self) -> (&'static [&'static str], &'static str, &'static str) {
        match self {
            Self::One => (&["memory.limit_in_bytes"], "memory.usage_in_bytes", "total_inactive_file"),
            // Above `memory.high` a group is not killed, but slowed to a crawl.
            Self::Two => (&["memory.max", "memory.high"], "memory.current", "inactive_file"),
        }
    }
}

/// Returns the groups that may limit memory, from the kernel's list of the process's groups.
fn groups(membership: &str) -> impl Iterator<Item = (Version, PathBuf)> + '_ {
    membership.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, group) = (parts.next()?, parts.next()?, parts.next()?);
        let version = match (number, controllers) {
            ("0", "") => Version::Two,
            _ if controllers.split(',').any(|controller| controller == "memory") => Version::One,
            _ => return None,
        };
        Some((version, PathBuf::from(group)))
    })
}

/// Returns the folders of a group and of its ancestors. In a container, the group's own path may not exist; its
/// limits are then those at the mount point itself.
fn levels(mount: &Path, group: &Path) -> impl Iterator<Item = PathBuf> {
    let names: Vec<_> = group
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            _ => None,
        })
        .collect();
    let mount = mount.to_owned();
    (0..=names.len()).rev().map(move |depth| mount.join(names[..depth].iter().collect::<PathBuf>()))
}

/// Returns the remaining memory of a group, or `None` if it has no limit. File pages count as available, since they
/// can be reclaimed.
fn of_group(folder: &Path, version: Version) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let (limits, used, files) = version.names();
    let limit = limits.iter().filter_map(|name| number(name)).min()?;
    let used = number(used)?;
    let files = read("memory.stat")
        .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix(files)?.trim().parse().ok()))
        .unwrap_or(0_u64);
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A root folder with the given files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("temporary folders work");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("it is in a folder")).expect("it is made");
            fs::write(path, text).expect("it is written");
        }
        root
    }

    fn available(files: &[(&str, &str)]) -> Option<u64> {
        within(root(files).path())
    }

    const MACHINE: (&str, &str) = ("proc/meminfo", "MemTotal: 24576000 kB\nMemAvailable:   15000000 kB\n");

    #[test]
    fn the_kernel_says_what_the_machine_has_left() {
        assert_eq!(available(&[MACHINE]), Some(15_000_000 * 1_024));
        assert_eq!(available(&[("proc/meminfo", "MemTotal: 1 kB\n")]), None);
        assert_eq!(available(&[("proc/meminfo", "MemAvailable: much\n")]), None);
        assert_eq!(available(&[]), None);
    }

    #[test]
    fn a_container_has_left_what_its_group_does_not_use() {
        let group = |max| {
            available(&[
                MACHINE,
                ("proc/self/cgroup", "0::/\n"),
                ("sys/fs/cgroup/memory.max", max),
                ("sys/fs/cgroup/memory.current", "700\n"),
                ("sys/fs/cgroup/memory.stat", "anon 500\ninactive_file 200\n"),
            ])
        };
        assert_eq!(group("1000\n"), Some(500));
        assert_eq!(group("max\n"), Some(15_000_000 * 1_024));
    }

    #[test]
    fn a_systemd_unit_has_left_the_least_of_its_group_and_of_those_around_it() {
        let unit = |unit_max, slice_max, slice_high| {
            available(&[
                MACHINE,
                ("proc/self/cgroup", "0::/system.slice/tether.service\n"),
                ("sys/fs/cgroup/system.slice/tether.service/memory.max", unit_max),
                ("sys/fs/cgroup/system.slice/tether.service/memory.current", "100\n"),
                ("sys/fs/cgroup/system.slice/memory.max", slice_max),
                ("sys/fs/cgroup/system.slice/memory.high", slice_high),
                ("sys/fs/cgroup/system.slice/memory.current", "400\n"),
            ])
        };
        assert_eq!(unit("1000", "max", "max"), Some(900));
        assert_eq!(unit("1000", "800", "max"), Some(400));
        assert_eq!(unit("1000", "800", "600"), Some(200));
        assert_eq!(unit("max", "max", "300"), Some(0), "more is used than may be");
    }

    #[test]
    fn the_first_version_of_control_groups_limits_as_well() {
        let membership = "5:cpu,cpuacct:/x\n4:memory:/user/limited\n0::/user.slice\n";
        let unlimited = "9223372036854771712\n";
        let limited = |path: &str| {
            let name = |file: &str| format!("sys/fs/cgroup/memory{path}/{file}");
            available(&[
                MACHINE,
                ("proc/self/cgroup", membership),
                ("sys/fs/cgroup/memory/user/memory.limit_in_bytes", unlimited),
                ("sys/fs/cgroup/memory/user/memory.usage_in_bytes", "5"),
                (&name("memory.limit_in_bytes"), &GIB.to_string()),
                (&name("memory.usage_in_bytes"), "1000"),
                (&name("memory.stat"), "inactive_file 1\ntotal_inactive_file 400\n"),
            ])
        };
        assert_eq!(limited("/user/limited"), Some(GIB - 600));
        // Inside a container the mount point is the group, whatever its path says.
        assert_eq!(limited(""), Some(GIB - 600));
        assert_eq!(limited("/elsewhere"), Some(15_000_000 * 1_024));
    }

    #[test]
    fn a_path_that_leads_upwards_stays_below_the_mount() {
        let levels: Vec<_> = levels(Path::new("/mount"), Path::new("/../../a")).collect();
        assert_eq!(levels, [Path::new("/mount/a"), Path::new("/mount")]);
    }
}
