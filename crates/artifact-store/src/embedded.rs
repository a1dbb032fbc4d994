//! Turns bytes embedded in the program into an open file, for readers that need a descriptor.

use std::fs::File;
use std::io::{self, Write as _};

use crate::local_folder::LocalFolder;

/// Returns an unnamed file that holds `bytes` and cannot be changed.
#[cfg(target_os = "linux")]
pub(crate) fn file(bytes: &[u8], folder: &LocalFolder) -> io::Result<File> {
    use std::os::fd::AsRawFd as _;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    let Ok(descriptor) = memfd_create("tether-artifact", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING) else {
        // Some sandboxes forbid memfds.
        return unnamed(bytes, folder);
    };
    let mut file = File::from(descriptor);
    file.write_all(bytes)?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    // Kernels before 6.7 allow a shared mapping of a sealed file only if it was opened read-only.
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or(file))
}

/// Returns an unnamed file that holds `bytes`.
#[cfg(not(target_os = "linux"))]
pub(crate) fn file(bytes: &[u8], folder: &LocalFolder) -> io::Result<File> {
    unnamed(bytes, folder)
}

fn unnamed(bytes: &[u8], folder: &LocalFolder) -> io::Result<File> {
    let mut file = folder.unnamed()?;
    file.write_all(bytes)?;
    Ok(file)
}
