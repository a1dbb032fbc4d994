//! Named points at which a process kills itself when a drill asks for it.
//!
//! The feature `failpoints` compiles them in. Without it, [`failpoint!`] expands to nothing, so a release has neither
//! the points nor their names.

/// Kills this process, as SIGKILL does, if the drill has armed the point of this name.
#[cfg(feature = "failpoints")]
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {
        $crate::reached($name)
    };
}

/// Does nothing: this program was built without failpoints.
#[cfg(not(feature = "failpoints"))]
#[macro_export]
macro_rules! failpoint {
    ($name:literal) => {};
}

#[cfg(feature = "failpoints")]
pub use armed::{FILE, reached};

#[cfg(feature = "failpoints")]
mod armed {
    use std::ffi::OsString;
    use std::sync::LazyLock;
    use std::{env, fs};

    use rustix::process::{Signal, getpid, kill_process};

    /// The environment variable that names a file. The file holds the name of the armed point.
    pub const FILE: &str = "FAILPOINT_FILE_OF_TETHER";

    static ARMED: LazyLock<Option<OsString>> = LazyLock::new(|| env::var_os(FILE));

    /// Kills this process if the point of this name is armed. Otherwise returns at once.
    pub fn reached(name: &str) {
        let Some(file) = ARMED.as_ref() else { return };
        let is_armed = fs::read_to_string(file).is_ok_and(|armed| armed.trim() == name);
        // Of several processes that come to it, the one that removes the file is killed.
        if is_armed && fs::remove_file(file).is_ok() {
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}
