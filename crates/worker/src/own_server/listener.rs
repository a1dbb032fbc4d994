//! Finds out who listens on a port of this machine, from `/proc`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Returns whether some socket listens on the port, and every socket that does is open in the process or one of its
/// descendants.
pub(super) fn is_of(proc: &Path, process: u32, port: u16) -> bool {
    let tables = ["tcp", "tcp6"].map(|table| fs::read_to_string(proc.join("net").join(table)).unwrap_or_default());
    let listening: BTreeSet<u64> = tables.iter().flat_map(|table| listening(table, port)).collect();
    let family = family(process, &parents(proc));
    let open: BTreeSet<u64> = family.iter().flat_map(|process| sockets(proc, *process)).collect();
    !listening.is_empty() && listening.is_subset(&open)
}

/// Returns the inodes of the sockets that listen on a port, from the kernel's table.
fn listening(table: &str, port: u16) -> impl Iterator<Item = u64> {
    const LISTEN: &str = "0A";
    table.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, of_socket) = fields.get(1)?.rsplit_once(':')?;
        let is_wanted = fields.get(3) == Some(&LISTEN) && u16::from_str_radix(of_socket, 16) == Ok(port);
        is_wanted.then_some(fields.get(9)?.parse().ok()?)
    })
}

/// Returns all processes, each with its parent.
fn parents(proc: &Path) -> Vec<(u32, u32)> {
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    let parent = |entry: fs::DirEntry| {
        let process = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The program's name, in brackets, may contain spaces and brackets.
        let (_, after_name) = stat.rsplit_once(") ")?;
        Some((process, after_name.split(' ').nth(1)?.parse().ok()?))
    };
    entries.flatten().filter_map(parent).collect()
}

/// Returns a process and its descendants.
fn family(process: u32, parents: &[(u32, u32)]) -> BTreeSet<u32> {
    let mut family = BTreeSet::from([process]);
    loop {
        let is_new = |(child, parent): &&(u32, u32)| family.contains(parent) && !family.contains(child);
        let children: Vec<u32> = parents.iter().filter(is_new).map(|(child, _)| *child).collect();
        if children.is_empty() {
            return family;
        }
        family.extend(children);
    }
}

/// Returns the inodes of the sockets that a process has open.
fn sockets(proc: &Path, process: u32) -> impl Iterator<Item = u64> {
    let descriptors = fs::read_dir(proc.join(process.to_string()).join("fd"));
    descriptors.into_iter().flatten().flatten().filter_map(|descriptor| {
        let target = fs::read_link(descriptor.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn only_those_that_listen_on_the_port_are_found() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0\n   \
            1: 0100007F:1F90 0100007F:A000 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0\n   \
            2: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0\n";
        assert_eq!(listening(table, 0x1f90).collect::<Vec<_>>(), [4_711]);
        let table = "   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A \
            00000000:00000000 00:00000000 00000000  1000        0 99 1 0\n torn";
        assert_eq!(listening(table, 0x1f90).collect::<Vec<_>>(), [99]);
    }

    #[test]
    fn a_family_reaches_down_and_not_up() {
        let parents = [(2, 1), (5, 2), (7, 5), (8, 1), (9, 7)];
        assert_eq!(family(5, &parents), BTreeSet::from([5, 7, 9]));
        assert_eq!(family(6, &parents), BTreeSet::from([6]));
    }

    #[test]
    fn a_port_is_of_the_process_that_listens_on_it_and_of_those_above_it() {
        let proc = Path::new("/proc");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        assert!(is_of(proc, std::process::id(), port));
        assert!(is_of(proc, std::os::unix::process::parent_id(), port));
        let mut other = std::process::Command::new("sleep").arg("600").spawn().expect("it starts");
        assert!(!is_of(proc, other.id(), port));
        other.kill().and_then(|()| other.wait()).expect("it ends");
        drop(listener);
        assert!(!is_of(proc, std::process::id(), port), "nobody listens");
    }
}
