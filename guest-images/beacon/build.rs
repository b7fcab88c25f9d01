//! How the two images are linked: freestanding, each with its own linker script.
//!
//! `../build.rs` adds the flags that concern code generation.

use std::env;
use std::path::PathBuf;

fn main() -> Result<(), env::VarError> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    println!("cargo:rerun-if-changed=build.rs");
    for (binary, script) in [("beacon", "beacon.ld"), ("qemu-rom", "rom.ld")] {
        println!("cargo:rerun-if-changed={script}");
        for argument in
            ["-nostartfiles", "-nostdlib", "-Wl,--build-id=none", "-Wl,-z,max-page-size=4096"]
        {
            println!("cargo:rustc-link-arg-bin={binary}={argument}");
        }
        println!("cargo:rustc-link-arg-bin={binary}=-Wl,-T,{}", package.join(script).display());
    }
    Ok(())
}
