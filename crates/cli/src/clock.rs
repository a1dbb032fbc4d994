//! The clock of a node.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::{Clock, UnixMillis};
use rpc::SystemClock;
use tracing::warn;

/// Returns the system's clock, or one that is wrong by as many milliseconds as a file says.
pub fn of(skew: Option<&Path>) -> Arc<dyn Clock> {
    match skew {
        Some(file) => {
            warn!(file = %file.display(), "the clock of this node is set by a file; this is for `tether drill` only");
            Arc::new(SkewedClock { file: file.to_owned() })
        }
        None => Arc::new(SystemClock),
    }
}

/// A clock that `tether drill` sets while its node runs. It reads the file each time; without one it is right.
struct SkewedClock {
    file: PathBuf,
}

impl Clock for SkewedClock {
    fn now(&self) -> UnixMillis {
        let skew = fs::read_to_string(&self.file).ok().and_then(|text| text.trim().parse().ok());
        UnixMillis(SystemClock.now().0.saturating_add_signed(skew.unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn only_a_node_that_ends_with_its_parent_takes_a_clock_file() {
        for role in ["registry", "orchestrator", "gateway", "worker"] {
            let parse =
                |more: &[&str]| Cli::try_parse_from([&["tether", role, "--clock-file", "clock"], more].concat());
            assert!(parse(&[]).is_err(), "{role}");
            assert!(parse(&["--with-parent"]).is_ok(), "{role}");
        }
    }

    #[test]
    fn a_clock_is_wrong_by_what_its_file_says() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("clock");
        let clock = of(Some(&file));
        let ahead = || clock.now().0 as i64 - SystemClock.now().0 as i64;
        let is_near = |skew: i64| (ahead() - skew).abs() < 60_000;
        assert!(is_near(0));
        for (text, skew) in [("-900000", -900_000), ("900000\n", 900_000), ("x", 0)] {
            fs::write(&file, text).expect("written");
            assert!(is_near(skew), "{text}");
        }
    }
}
