//! A file that appears under its name only when it is complete.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::snapshot::SnapshotError;

/// A temporary file beside its final place; removed when dropped without [`AtomicFile::commit`].
#[derive(Debug)]
pub(super) struct AtomicFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
}

impl AtomicFile {
    /// Creates `NAME.tmp.PID.N` in the directory of `target`, readable by the owner only: guest
    /// memory holds secrets.
    pub(super) fn create(target: &Path) -> Result<Self, SnapshotError> {
        // Tells saves of one process to the same name apart.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // A rename would replace a device or a socket as readily as a file.
        match fs::symlink_metadata(target) {
            Ok(metadata) if !metadata.is_file() => {
                return Err(SnapshotError::NotAFile(target.to_owned()));
            }
            _ => {}
        }
        let Some(name) = target.file_name() else {
            return Err(SnapshotError::NotAFile(target.to_owned()));
        };
        let mut name = name.to_owned();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        name.push(format!(".tmp.{}.{number}", std::process::id()));
        let temporary = target.with_file_name(name);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|error| failed("create", &temporary, error))?;
        Ok(Self { file, temporary, target: target.to_owned() })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Brings the contents to the disk, gives the file its name, and brings that to the disk.
    pub(super) fn commit(self) -> Result<(), SnapshotError> {
        self.file
            .sync_all()
            .map_err(|error| failed("bring to the disk", &self.temporary, error))?;
        fs::rename(&self.temporary, &self.target)
            .map_err(|error| failed("rename the complete snapshot to", &self.target, error))?;
        let directory = match self.target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| failed("bring to the disk the directory", directory, error))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // After a rename there is nothing of this name. A failure leaves litter, but is no reason
        // to hide the error that led here.
        let _ = fs::remove_file(&self.temporary);
    }
}

pub(super) fn failed(what: &'static str, path: &Path, error: io::Error) -> SnapshotError {
    SnapshotError::File { what, path: path.to_owned(), error }
}
