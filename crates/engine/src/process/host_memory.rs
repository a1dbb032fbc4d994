//! How much memory the machine has left.

use std::fs;
use std::path::Path;

/// Returns the memory that can be had without swapping, of the machine and of this control group; `None` where the
/// system does not tell.
pub(super) fn available_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| of_machine(&text));
    machine.into_iter().chain(of_control_group(Path::new("/sys/fs/cgroup"))).min()
}

fn of_machine(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1_024)
}

/// Returns what a control group has left, mounted as it is within a container; pages of files can be had again.
fn of_control_group(folder: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let max: u64 = read("memory.max")?.trim().parse().ok()?;
    let current: u64 = read("memory.current")?.trim().parse().ok()?;
    let files = read("memory.stat")
        .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse().ok()))
        .unwrap_or(0_u64);
    Some(max.saturating_sub(current.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_what_the_machine_has_left() {
        let meminfo = "MemTotal:       24576000 kB\nMemFree:          500000 kB\nMemAvailable:   15000000 kB\n";
        assert_eq!(of_machine(meminfo), Some(15_000_000 * 1_024));
        assert_eq!(of_machine("MemTotal: 1 kB\n"), None);
        assert_eq!(of_machine("MemAvailable: much\n"), None);
    }

    #[test]
    fn a_control_group_has_left_what_it_does_not_use() {
        let folder = tempfile::tempdir().expect("temporary folders work");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("it is written");
        assert_eq!(of_control_group(folder.path()), None);
        write("memory.max", "1000\n");
        write("memory.current", "700\n");
        write("memory.stat", "anon 500\ninactive_file 200\n");
        assert_eq!(of_control_group(folder.path()), Some(500));
        write("memory.max", "max\n");
        assert_eq!(of_control_group(folder.path()), None);
    }
}
