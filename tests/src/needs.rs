//! What tests need of the machine beyond a processor.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::suite::Need;

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

/// A /dev/kvm that this user may open.
pub fn kvm() -> Need {
    let device = File::options().read(true).write(true).open("/dev/kvm");
    device.map(|_| ()).map_err(|error| format!("no /dev/kvm: {error}"))
}

/// userfaultfd for accesses of the kernel too, as post-copy needs it.
pub fn userfaultfd() -> Need {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd").is_ok();
    let anybody = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if device || root().is_ok() || anybody.is_ok_and(|setting| setting.trim() == "1") {
        Ok(())
    } else {
        Err("needs userfaultfd: /dev/userfaultfd, or vm.unprivileged_userfaultfd=1".into())
    }
}

/// The powers of root.
pub fn root() -> Need {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err("needs root".into())
    }
}

/// Mount namespaces, to hide a device or fill up a disk without touching the machine's own.
pub fn namespaces() -> Need {
    let mut unshare = Command::new("unshare");
    let status = unshare.args(["-m", "--", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).output();
    match status {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err("needs mount namespaces".into()),
    }
}

/// Network namespaces with taps in them, away from the machine's own network.
pub fn network_namespaces() -> Need {
    let mut unshare = Command::new("unshare");
    let status = unshare.args(["-n", "--", "ip", "tuntap", "add", "dev", "t", "mode", "tap"]);
    match status.output() {
        Ok(output) if output.status.success() => Ok(()),
        _ => Err("needs network namespaces, taps and the program ip".into()),
    }
}

/// Huge pages can be reserved.
pub fn huge_pages() -> Need {
    HugePages::reserve(1).map(drop)
}

/// Huge pages of 2 MiB, reserved for a test and given back when dropped.
#[derive(Debug)]
pub struct HugePages {
    before: String,
}

impl HugePages {
    /// Reserves `pages` more than there are.
    ///
    /// # Errors
    /// Not allowed, or not enough free memory in one piece.
    pub fn reserve(pages: u64) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<u64>().unwrap();
        let read = || fs::read_to_string(HUGE_PAGES).map_err(|e| format!("no huge pages: {e}"));
        let before = read()?;
        let wanted = number(&before) + pages;
        fs::write(HUGE_PAGES, wanted.to_string()).map_err(|e| format!("no huge pages: {e}"))?;
        // From here on the drop restores what was.
        let reserved = Self { before };
        if number(&read()?) < wanted {
            return Err(format!("no memory for {pages} huge pages"));
        }
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE_PAGES, &self.before);
    }
}

/// Block devices that are files.
pub fn loop_devices() -> Need {
    let image = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    image.as_file().set_len(1 << 20).map_err(|error| error.to_string())?;
    LoopDevice::attach(image.path()).map(drop).map_err(|why| format!("needs loop devices: {why}"))
}

/// A block device that is a file, which has what was written to the device once that is flushed. Gone when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// # Panics
    /// There are none: see [`loop_devices`].
    #[must_use]
    pub fn of(image: &Path) -> Self {
        Self::attach(image).unwrap()
    }

    fn attach(image: &Path) -> Result<Self, String> {
        let mut losetup = Command::new("losetup");
        let output = losetup.args(["--find", "--show"]).arg(image).output();
        let output = output.map_err(|error| format!("losetup: {error}"))?;
        match output.status.success() {
            true => Ok(Self(String::from_utf8_lossy(&output.stdout).trim().into())),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    /// Its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Detached when its last user has closed it.
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).output();
    }
}
