//! Finds oneDNN and builds the shim to it; without oneDNN the program is built all the same, with slower convolutions.
//!
//! Looked for under `$SIDEWAYS_ONEDNN` (a prefix with `include` and `lib`; `off`: not at all), `$DNNLROOT`, `$ONEDNN_ROOT`
//! and `$DNNL_DIR`, then where the system keeps its headers.

use std::env;
use std::path::{Path, PathBuf};

const SHIM: &str = "src/backend/cpu/onednn/shim.cpp";
const VARIABLES: [&str; 4] = ["SIDEWAYS_ONEDNN", "DNNLROOT", "ONEDNN_ROOT", "DNNL_DIR"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(onednn)");
    println!("cargo::rerun-if-changed={SHIM}");
    VARIABLES.iter().for_each(|name| println!("cargo::rerun-if-env-changed={name}"));
    let chosen = env::var("SIDEWAYS_ONEDNN").ok().filter(|value| !value.is_empty());
    if chosen.as_deref() == Some("off") {
        return;
    }
    let named = VARIABLES.iter().filter_map(env::var_os).map(PathBuf::from);
    let system = ["/usr/local", "/usr"].map(PathBuf::from);
    let Some(prefix) = named.chain(system).find(|prefix| header(prefix).is_file()) else {
        let where_else = chosen.map_or(String::new(), |prefix| format!(" (not under SIDEWAYS_ONEDNN={prefix} either)"));
        println!("cargo::warning=oneDNN was not found{where_else}: convolutions will be slower; see docs/install.md");
        return;
    };
    println!("cargo::rerun-if-changed={}", header(&prefix).display());
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").file(SHIM).include(prefix.join("include")).warnings(false);
    // OpenMP is oneDNN's usual way to use threads; the flag is harmless with others.
    build.flag_if_supported("-fopenmp");
    if let Err(error) = build.try_compile("sideways_onednn") {
        println!("cargo::warning=oneDNN was found in {} but the shim does not build: {error}", prefix.display());
        return;
    }
    if prefix != Path::new("/usr") {
        for lib in ["lib", "lib64"].map(|name| prefix.join(name)).iter().filter(|lib| lib.is_dir()) {
            println!("cargo::rustc-link-search=native={}", lib.display());
            println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
        }
    }
    println!("cargo::rustc-link-lib=dylib=dnnl");
    println!("cargo::rustc-link-lib=dylib=gomp");
    println!("cargo::rustc-cfg=onednn");
}

fn header(prefix: &Path) -> PathBuf {
    let new = prefix.join("include/oneapi/dnnl/dnnl.hpp");
    if new.is_file() { new } else { prefix.join("include/dnnl.hpp") }
}
