//! What the kernel tells a process about itself.
//!
//! The files are opened once: an engine process opens no file after its sandbox is closed, and calls [`open`] before.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

static STATM: OnceLock<Option<File>> = OnceLock::new();
static MAPS: OnceLock<Option<File>> = OnceLock::new();

/// Opens all files and looks up what is only looked up once.
pub(crate) fn open() {
    file(&STATM, "statm");
    file(&MAPS, "maps");
    page_bytes();
}

/// Returns the sizes of this process in pages, as in `/proc/self/statm`.
pub(crate) fn sizes() -> Option<String> {
    read(file(&STATM, "statm")?).ok()
}

/// Returns the mappings of this process, as in `/proc/self/maps`.
#[cfg_attr(not(matrices), allow(dead_code, reason = "only our kernels and a test ask"))]
pub(crate) fn mappings() -> Option<String> {
    read(file(&MAPS, "maps")?).ok()
}

pub(crate) fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

fn file(opened: &'static OnceLock<Option<File>>, name: &str) -> Option<&'static File> {
    opened.get_or_init(|| File::open(format!("/proc/self/{name}")).ok()).as_ref()
}

/// Reads a file from its beginning, wherever others are in it.
fn read(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut piece = [0; 4_096];
    loop {
        match file.read_at(&mut piece, bytes.len() as u64)? {
            0 => return String::from_utf8(bytes).map_err(io::Error::other),
            length => bytes.extend_from_slice(&piece[..length]),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_opened_earlier_tells_the_present() {
        open();
        let stack = 0_u8;
        assert!(mappings().expect("the kernel tells").contains("[stack]"));
        let resident = || sizes().and_then(|sizes| sizes.split(' ').nth(1)?.parse::<u64>().ok()).expect("a number");
        let before = resident();
        let taken = vec![stack + 1; 64 << 20];
        assert!(resident() > before + (32 << 20) / page_bytes(), "{}", taken.len());
    }
}
