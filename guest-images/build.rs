//! Builds `beacon`, the freestanding guest, and the boot ROM that starts it in QEMU without firmware.
//!
//! Both need flags that no other crate of the workspace can bear, so they are a package of their own,
//! built by a second cargo in its own target directory.

use std::env;
use std::error::Error;
use std::path::PathBuf;
use std::process::Command;

/// The only target whose `core` every toolchain here has; nothing of Linux is used.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("beacon");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target_dir = out.join("beacon-target");
    for input in ["Cargo.toml", "Cargo.lock", "build.rs", "beacon.ld", "rom.ld", "src"] {
        println!("cargo:rerun-if-changed={}", package.join(input).display());
    }

    // Loaded where it is linked: no relocation, no dynamic linker, no unwinding. The paths of the
    // machine that built it have no place in the image.
    let remap = format!("--remap-path-prefix={}=beacon", package.display());
    let remap_crates = format!("--remap-path-prefix={}=cargo", cargo_home()?.display());
    let flags = [
        "-Crelocation-model=static",
        "-Ctarget-feature=+crt-static",
        "-Cforce-unwind-tables=no",
        remap.as_str(),
        remap_crates.as_str(),
    ];
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .current_dir(&package)
        .args(["build", "--release", "--locked", "--bins", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    for name in env::vars_os().filter_map(|(name, _)| name.into_string().ok()) {
        if is_for_the_outer_build(&name) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().map_err(|error| format!("starting cargo for beacon: {error}"))?;
    if !status.success() {
        return Err(format!("building {}: cargo: {status}", package.display()).into());
    }
    for binary in ["beacon", "qemu-rom"] {
        let built = target_dir.join(TARGET).join("release").join(binary);
        std::fs::copy(&built, out.join(binary).with_extension("elf"))
            .map_err(|error| format!("copying {}: {error}", built.display()))?;
    }
    Ok(())
}

/// Where cargo keeps the sources of dependencies.
fn cargo_home() -> Result<PathBuf, Box<dyn Error>> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(PathBuf::from(home));
    }
    let home = env::var_os("HOME").ok_or("neither CARGO_HOME nor HOME is set")?;
    Ok(PathBuf::from(home).join(".cargo"))
}

/// Variables of the outer cargo or its user that would change how the guest is built: flags,
/// profiles, wrappers such as clippy's, and the jobserver, whose file descriptors are not inherited.
fn is_for_the_outer_build(name: &str) -> bool {
    const PREFIXES: [&str; 4] = ["CARGO_PROFILE_", "CARGO_BUILD_", "CARGO_TARGET_", "CLIPPY_"];
    const NAMES: [&str; 5] =
        ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_MAKEFLAGS", "MAKEFLAGS"];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}
