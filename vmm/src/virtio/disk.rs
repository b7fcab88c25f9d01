//! Opening a disk, and telling who has it where it cannot be had.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::virtio::block::{DiskError, DiskFile, LockError};

use super::{DiskOwnership, VirtioError};
use crate::api::Client;
use crate::config::DiskConfig;
use crate::control::VmInfo;
use crate::runtime_dir::RuntimeDir;

/// How long a VM of this host may take to say what disks it has.
const ASK: Duration = Duration::from_millis(500);

/// Opens and locks the disk of `config`; `earlier` are those of this VM that are locked already.
pub(super) fn open(
    config: &DiskConfig,
    earlier: &[DiskConfig],
    ownership: DiskOwnership,
) -> Result<DiskFile, VirtioError> {
    let mut disk = DiskFile::open(&config.path, config.readonly)?;
    let locked = match ownership {
        DiskOwnership::Owner => disk.take_owner(),
        DiskOwnership::Incoming => disk.take_incoming(),
    };
    match locked {
        Ok(()) => Ok(disk),
        Err(error) => Err(explain(config, earlier, error)),
    }
}

/// Names the disk of this VM, or the VM of this host, that has the file, where it is one.
fn explain(config: &DiskConfig, earlier: &[DiskConfig], error: DiskError) -> VirtioError {
    let DiskError::Lock { error: LockError::Held(_), .. } = &error else { return error.into() };
    let path = config.path.clone();
    let wanted = identity(&path);
    // By whatever name: a link is the same file.
    if let Some(first) = earlier.iter().find(|disk| identity(&disk.path) == wanted) {
        let (first, second) = (first.id.clone(), config.id.clone());
        return VirtioError::DiskTwice { first, second, path };
    }
    match holder(&path) {
        Some(info) => VirtioError::DiskInUse { path, vm: info.name, pid: info.pid },
        None => error.into(),
    }
}

/// The kernel does not tell who holds a lock, so all VMs of this host and user are asked. Paths
/// may differ: what counts is the file.
fn holder(path: &Path) -> Option<VmInfo> {
    let wanted = identity(path)?;
    let dir = RuntimeDir::open().ok()?;
    dir.list().ok()?.into_iter().find_map(|found| {
        let info = Client::new(&found.socket).ok()?.with_quick_timeout(ASK).info().ok()?;
        let disks: Vec<PathBuf> = info.config.disks.iter().map(|d| d.path.clone()).collect();
        let other = info.pid != std::process::id();
        (other && disks.iter().any(|disk| identity(disk) == Some(wanted))).then_some(info)
    })
}

/// Device and inode of a file; for a block device, which may have several nodes, its number.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(match metadata.rdev() {
        0 => (metadata.dev(), metadata.ino()),
        device => (0, device),
    })
}
