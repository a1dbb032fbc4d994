//! Compiles what puts our kernels into ggml, with the headers of the llama.cpp that is linked.

#![expect(clippy::disallowed_methods, reason = "what cargo tells a build script is in its environment")]

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    println!("cargo::rustc-check-cfg=cfg(matrices)");
    println!("cargo::rerun-if-changed=native");
    let target = |name: &str| env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if env::var_os("CARGO_FEATURE_LLAMA").is_none() || target("ARCH") != "x86_64" || target("OS") != "linux" {
        return;
    }
    let source = llama_source().expect("the build of llama-cpp-sys-2 says where its sources are");
    let ggml = source.join("ggml");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).warnings(false).file("native/matrices.cpp").file("native/watch.cpp");
    build.include(ggml.join("include")).include(ggml.join("src")).include(ggml.join("src/ggml-cpu"));
    build.include(source.join("include")).include(source.join("src"));
    if env::var_os("CARGO_FEATURE_PORTABLE").is_some() {
        build.define("TETHER_SHARED_GGML", None);
    }
    build.compile("tether_matrices");
    println!("cargo::rustc-cfg=matrices");
}

/// Returns the folder of llama.cpp's sources, which CMake noted where it built them.
fn llama_source() -> Option<PathBuf> {
    let installed = PathBuf::from(env::var_os("DEP_LLAMA_GGML_CMAKE_DIR")?);
    let notes = fs::read_to_string(installed.parent()?.parent()?.join("build/CMakeCache.txt")).ok()?;
    let folder = notes.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="))?;
    Some(Path::new(folder).to_owned())
}
