//! Files that a process locks for as long as it lives, and that hold its process id.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{flock, FlockOperation};
use rustix::io::Errno;

use super::error::io_error;
use super::RuntimeDirError;

/// A file that holds the process id of this process, and is locked as long as it runs.
#[derive(Debug)]
pub struct Pidfile {
    path: PathBuf,
    _file: File,
}

impl Pidfile {
    /// Writes the process id to `path`. The file is removed when the result is dropped.
    ///
    /// # Errors
    /// The file cannot be written, or belongs to a process that still runs.
    pub fn create(path: &Path) -> Result<Self, RuntimeDirError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(path)
            .map_err(io_error("create the pidfile", path))?;
        if !try_lock(&file, path)? {
            let pid = pid_text(read_pid(&mut file));
            return Err(RuntimeDirError::PidfileTaken { path: path.to_owned(), pid });
        }
        write_pid(&mut file).map_err(io_error("write the pidfile", path))?;
        Ok(Self { path: path.to_owned(), _file: file })
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

pub(super) fn open_lock(path: &Path) -> Result<File, RuntimeDirError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(io_error("open", path))
}

/// True if this process has the lock now, false if another has it.
pub(super) fn try_lock(file: &File, path: &Path) -> Result<bool, RuntimeDirError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(io_error("lock", path)(e.into())),
    }
}

pub(super) fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

pub(super) fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

pub(super) fn pid_text(pid: Option<u32>) -> String {
    pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    #[test]
    fn a_pidfile_names_its_process_and_goes_with_it() {
        let temp = TempDir::new().unwrap();
        let path = temp.as_path().join("pid");
        fs::write(&path, "999999 of a dead process, longer than what replaces it\n").unwrap();
        let pidfile = Pidfile::create(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert!(matches!(Pidfile::create(&path), Err(RuntimeDirError::PidfileTaken { .. })));
        drop(pidfile);
        assert!(!path.exists());
    }
}
