//! The lab: real Linux guests on a real KVM, on any machine.
//!
//! ```text
//!   this machine
//!     QEMU, pure emulation with SVM        [`Lab`]
//!       Linux image + kvm-amd
//!         the test program, run again      prints its results as JSON lines
//!           minivmm
//!             Linux image                  [`Linux`]
//! ```
//!
//! The outer machine is made of a list of modules, files and a script; what the script writes to
//! /dev/ttyS1 are the results. The test program is the same inside and outside: inside it finds a
//! processor with SVM and runs its tests ([`virtualization`]), outside it starts the lab and reports
//! what came out of it ([`run_suite`]).

mod cpio;
mod linux;
mod machine;
mod suite;
mod world;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

pub use linux::Linux;
pub use machine::{Lab, LabRun};
pub use suite::{run_suite, LabSuite};

use crate::suite::Need;
use crate::{finish, Host};

/// Files of the Linux image.
const IMAGE: [&str; 3] = ["vmlinuz", "vmlinux", "initramfs.cpio"];

/// Where the Linux image is: `$MINIVMM_LINUX_IMAGE`, or where `make guest-images` puts it.
#[must_use]
pub fn image_dir() -> PathBuf {
    let built = || target_dir().join("guest-images/linux");
    std::env::var_os("MINIVMM_LINUX_IMAGE").map_or_else(built, PathBuf::from)
}

/// Where what is built and logged goes, as the Makefile has it.
fn target_dir() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).join("target")
}

/// Where the machine `name` leaves its logs.
#[must_use]
pub fn lab_dir(name: &str) -> PathBuf {
    target_dir().join("lab").join(name)
}

/// A file of the Linux image: `vmlinuz`, `vmlinux` or `initramfs.cpio`.
#[must_use]
pub fn image(name: &str) -> PathBuf {
    image_dir().join(name)
}

/// The processor has hardware virtualization, and with it KVM runs any guest.
pub fn virtualization() -> Need {
    let info = std::fs::read_to_string("/proc/cpuinfo").map_err(|e| e.to_string())?;
    let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx") {
        crate::kvm()
    } else {
        Err("the processor has neither SVM nor VMX".into())
    }
}

/// The Linux image has been built.
pub fn linux_image() -> Need {
    match IMAGE.map(image).iter().find(|path| !path.is_file()) {
        Some(path) => Err(format!("no {}: run make guest-images", path.display())),
        None => Ok(()),
    }
}

/// What the lab itself needs, beside the image.
pub fn available() -> Need {
    world::programs(&[machine::QEMU, "setpriv", "ldd"])
}

/// Where a program of this machine is.
///
/// # Errors
/// There is none.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Where those of administrators are, which users may not have in their path.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(more).map(|dir| dir.join(name));
    found.into_iter().find(|path| path.is_file()).ok_or_else(|| format!("there is no {name}"))
}

/// Makes a file of the host with an ext4 file system of 64 MiB; gives its path. Needs `mkfs.ext4`.
#[track_caller]
pub fn ext4(host: &Host, name: &str) -> String {
    let path = host.write(name, b"");
    File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
    let mut mkfs = Command::new(program("mkfs.ext4").unwrap());
    mkfs.args(["-q", "-F", &path]);
    finish(mkfs, b"").ok();
    path
}
