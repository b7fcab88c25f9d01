//! Who may use a disk: two one-byte locks on it.
//!
//! ```text
//! byte 2^62      owner       the machine that runs on the disk
//! byte 2^62 + 1  incoming    the machine that is about to: a destination of a migration, or
//!                            anybody who starts, for the moment in which it takes `owner`
//! ```
//!
//! Who wants `owner` holds `incoming` first. So a source that gives up `owner` after the hand-over
//! leaves it to the destination that waits in `incoming`: nobody slips in between.
//!
//! The locks are open-file-description locks (fcntl(2), `F_OFD_SETLK`): they belong to the open
//! file, end with it, and are not lost when some other part of the process closes the same file.
//! The bytes lie beyond the end of any disk, so that no lock meets data. The kernel does not tell
//! who holds such a lock (it reports process -1); that is for the caller to find out.

#![allow(unsafe_code)]

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Whether several machines may hold the lock at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// One machine: the disk is written.
    Exclusive,
    /// Several machines that only read.
    Shared,
}

/// One of the two locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockRange {
    /// A machine runs on the disk.
    Owner,
    /// A machine is about to.
    Incoming,
}

impl LockRange {
    fn byte(self) -> libc::off_t {
        match self {
            Self::Owner => 1 << 62,
            Self::Incoming => (1 << 62) + 1,
        }
    }
}

impl fmt::Display for LockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "in use by another VM",
            Self::Incoming => "taken by a VM that is being started or moved here",
        })
    }
}

/// Why a disk was not locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else holds it.
    #[error("it is {0}, or locked by another program: stop that one, or use the disk readonly in all of them")]
    Held(LockRange),
    /// The file system does not lock.
    #[error("it cannot be locked: {0}; use a local file system, or NFS 4")]
    Failed(io::Error),
}

/// The locks that this process holds on a disk. They are given up when the file is closed.
#[derive(Debug)]
pub struct DiskLock {
    file: Arc<File>,
    mode: LockMode,
    owner: bool,
    incoming: bool,
}

impl DiskLock {
    /// No lock yet.
    #[must_use]
    pub fn new(file: Arc<File>, mode: LockMode) -> Self {
        Self { file, mode, owner: false, incoming: false }
    }

    /// Whether the disk may be used.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.owner
    }

    /// Announces this machine as the next one: what the destination of a migration does first.
    ///
    /// # Errors
    ///
    /// When somebody else is the next one already.
    pub fn take_incoming(&mut self) -> Result<(), LockError> {
        if !self.incoming {
            self.set(LockRange::Incoming, true)?;
            self.incoming = true;
        }
        Ok(())
    }

    /// Makes this machine the one that runs on the disk.
    ///
    /// # Errors
    ///
    /// When another one is. An announcement of before stays, one made for this is taken back.
    pub fn take_owner(&mut self) -> Result<(), LockError> {
        if self.owner {
            return Ok(());
        }
        let announced = self.incoming;
        self.take_incoming()?;
        let result = self.set(LockRange::Owner, true);
        self.owner = result.is_ok();
        if self.owner || !announced {
            self.release_incoming()?;
        }
        result
    }

    /// Takes the announcement back.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to unlock, which it has no reason to.
    pub fn release_incoming(&mut self) -> Result<(), LockError> {
        if self.incoming {
            self.set(LockRange::Incoming, false)?;
            self.incoming = false;
        }
        Ok(())
    }

    /// Gives the disk up; for a source, only after the machine was handed over.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to unlock, which it has no reason to.
    pub fn release_owner(&mut self) -> Result<(), LockError> {
        if self.owner {
            self.set(LockRange::Owner, false)?;
            self.owner = false;
        }
        Ok(())
    }

    fn set(&self, range: LockRange, lock: bool) -> Result<(), LockError> {
        let kind = match (lock, self.mode) {
            (false, _) => libc::F_UNLCK,
            (true, LockMode::Exclusive) => libc::F_WRLCK,
            (true, LockMode::Shared) => libc::F_RDLCK,
        };
        // SAFETY: a C structure of integers, for which zeros are values.
        let mut request: libc::flock = unsafe { std::mem::zeroed() };
        // Small constants, and pid 0 as OFD locks want it.
        request.l_type = kind as libc::c_short;
        request.l_whence = libc::SEEK_SET as libc::c_short;
        request.l_start = range.byte();
        request.l_len = 1;
        // SAFETY: the descriptor is open for as long as `self.file` lives, and the kernel only
        // reads the structure, which outlives the call.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &request) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Err(LockError::Held(range)),
            _ => Err(LockError::Failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Locks on one file, each as of another process: by an open file of its own.
    fn lock(path: &std::path::Path, mode: LockMode) -> DiskLock {
        let file = File::options().read(true).write(true).open(path).unwrap();
        DiskLock::new(Arc::new(file), mode)
    }

    fn held(result: Result<(), LockError>) -> LockRange {
        match result {
            Err(LockError::Held(range)) => range,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_machine_at_a_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut first = lock(file.path(), LockMode::Exclusive);
        let mut second = lock(file.path(), LockMode::Exclusive);
        first.take_owner().unwrap();
        assert_eq!(held(second.take_owner()), LockRange::Owner);
        assert!(first.is_owner() && !second.is_owner());
        // Its attempt left nothing behind.
        lock(file.path(), LockMode::Exclusive).take_incoming().unwrap();
        drop(first);
        second.take_owner().unwrap();
    }

    #[test]
    fn nobody_slips_in_during_a_hand_over() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut source = lock(file.path(), LockMode::Exclusive);
        let mut destination = lock(file.path(), LockMode::Exclusive);
        let mut intruder = lock(file.path(), LockMode::Exclusive);
        source.take_owner().unwrap();
        destination.take_incoming().unwrap();
        assert_eq!(held(destination.take_owner()), LockRange::Owner);
        assert_eq!(held(intruder.take_incoming()), LockRange::Incoming);

        source.release_owner().unwrap();
        assert_eq!(held(intruder.take_owner()), LockRange::Incoming);
        destination.take_owner().unwrap();
        assert_eq!(held(intruder.take_owner()), LockRange::Owner);
    }

    #[test]
    fn readers_share_and_a_writer_does_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut readers = [(); 2].map(|()| lock(file.path(), LockMode::Shared));
        for reader in &mut readers {
            reader.take_owner().unwrap();
        }
        let mut writer = lock(file.path(), LockMode::Exclusive);
        assert_eq!(held(writer.take_owner()), LockRange::Owner);
        let [first, second] = readers;
        drop(first);
        assert_eq!(held(writer.take_owner()), LockRange::Owner);
        drop(second);
        writer.take_owner().unwrap();
    }
}
