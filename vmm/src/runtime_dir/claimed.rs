//! Names that this process owns.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::error::io_error;
use super::{listen, RuntimeDir, RuntimeDirError, SUFFIXES};
use crate::console::ConsolePaths;

/// A name that this process owns.
#[derive(Debug)]
pub struct ClaimedName {
    dir: RuntimeDir,
    name: String,
    /// What its files are called: the name, with [`INCOMING`] until the VM is handed over.
    entry: String,
    /// Closing it gives up the name.
    lock: File,
}

impl ClaimedName {
    /// The name whose files are called `entry` in `dir`, of which this process has the lock.
    pub(super) fn new(dir: RuntimeDir, name: String, entry: String, lock: File) -> Self {
        Self { dir, name, entry, lock }
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the control socket.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.dir.file(&self.entry, ".sock")
    }

    /// Takes the name itself, after a hand-over: the control socket and the console are found
    /// under it from now on. Without effect where this process has it.
    ///
    /// # Errors
    /// [`RuntimeDirError::NameTaken`] while the process that the VM comes from, or another, has the
    /// name; nothing has changed then.
    pub fn take_over(&mut self) -> Result<(), RuntimeDirError> {
        if self.entry == self.name {
            return Ok(());
        }
        let _guard = self.dir.guard()?;
        let lock = self.dir.lock_entry(&self.name)?;
        for suffix in SUFFIXES {
            let (from, to) =
                (self.dir.file(&self.entry, suffix), self.dir.file(&self.name, suffix));
            match fs::rename(&from, &to) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("rename", &from)(e));
                }
                _ => {}
            }
        }
        let _ = fs::remove_file(self.dir.file(&self.entry, ".lock"));
        self.entry.clone_from(&self.name);
        self.lock = lock;
        Ok(())
    }

    /// Where the console may put its socket or link.
    #[must_use]
    pub fn console_paths(&self) -> ConsolePaths {
        ConsolePaths {
            socket: self.dir.file(&self.entry, ".console"),
            pty_link: self.dir.file(&self.entry, ".pty"),
        }
    }

    /// Opens the control socket, for this user only.
    ///
    /// # Errors
    /// As [`listen`].
    pub fn listen(&self) -> Result<UnixListener, RuntimeDirError> {
        listen(&self.socket_path())
    }
}

impl Drop for ClaimedName {
    fn drop(&mut self) {
        // With the guard nobody can claim the name between the removal and the unlocking.
        match self.dir.guard() {
            Ok(_guard) => {
                self.dir.remove_leftovers(&self.entry);
                let _ = fs::remove_file(self.dir.file(&self.entry, ".lock"));
            }
            Err(e) => tracing::warn!(error = %e, "leaving the name's files behind"),
        }
    }
}
