//! Builds `beacon`, the freestanding guest, and the boot ROM that starts it in QEMU without firmware.
//!
//! Both are linked with flags that no other crate of the workspace can bear, so they are a package of
//! their own, built by a second cargo in its own target directory.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The only target whose `core` every toolchain here has; nothing of Linux is used.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("beacon");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for input in ["Cargo.toml", "Cargo.lock", "src", "beacon.ld", "rom.ld"] {
        println!("cargo:rerun-if-changed={}", package.join(input).display());
    }
    for (binary, script) in [("beacon", "beacon.ld"), ("qemu-rom", "rom.ld")] {
        let built = build(&package, &out, binary, &package.join(script))?;
        std::fs::copy(&built, out.join(binary).with_extension("elf"))
            .map_err(|error| format!("copying {}: {error}", built.display()))?;
    }
    Ok(())
}

/// Links `binary` with the linker script `script`; gives the path of the executable.
fn build(
    package: &Path,
    out: &Path,
    binary: &str,
    script: &Path,
) -> Result<PathBuf, Box<dyn Error>> {
    let target_dir = out.join("beacon-target").join(binary);
    let flags = [
        // Loaded where it is linked: no relocation, no dynamic linker, no start files, no unwinding.
        "-Crelocation-model=static",
        "-Ctarget-feature=+crt-static",
        "-Cforce-unwind-tables=no",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Clink-arg=-Wl,--build-id=none",
        "-Clink-arg=-Wl,-z,max-page-size=4096",
    ];
    let mut rustflags: Vec<String> = flags.map(String::from).into();
    rustflags.push(format!("-Clink-arg=-Wl,-T,{}", script.display()));
    // The paths of the machine that built it have no place in the image.
    rustflags.push(format!("--remap-path-prefix={}=beacon", package.display()));

    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .current_dir(package)
        .args(["build", "--release", "--locked", "--offline", "--target", TARGET, "--bin", binary])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags.join("\u{1f}"));
    // What the outer cargo or its user set is for the outer build: wrappers such as clippy's, flags,
    // profiles, and the jobserver, whose file descriptors a build script does not inherit.
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let outer = name.starts_with("CARGO_PROFILE_")
            || name.starts_with("CARGO_BUILD_")
            || name.starts_with("CARGO_TARGET_")
            || matches!(
                name,
                "RUSTFLAGS"
                    | "RUSTDOCFLAGS"
                    | "RUSTC_WRAPPER"
                    | "RUSTC_WORKSPACE_WRAPPER"
                    | "CARGO_MAKEFLAGS"
                    | "MAKEFLAGS"
                    | "CLIPPY_ARGS"
                    | "CLIPPY_CONF_DIR"
            );
        if outer {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().map_err(|error| format!("starting cargo for {binary}: {error}"))?;
    if !status.success() {
        return Err(format!("building {binary} in {}: cargo: {status}", package.display()).into());
    }
    Ok(target_dir.join(TARGET).join("release").join(binary))
}
