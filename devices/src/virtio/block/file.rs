//! A disk in a file, or on a block device, of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{fallocate, FallocateFlags};
use rustix::io::Errno;
use vm_memory::bitmap::BitmapSlice;

use super::{BlockBackend, DiskLock, LockError, LockMode, SECTOR};
use crate::virtio::{volatile_io, Buffers};

/// Zeros for file systems that cannot zero a range by themselves.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open disk {path}: {error}{hint}")]
    Open {
        /// Which.
        path: PathBuf,
        /// What the host said.
        error: io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// It is no disk.
    #[error("{path} is not a disk: give a regular file or a block device")]
    NotADisk {
        /// Which.
        path: PathBuf,
    },
    /// Its size is none that a disk has.
    #[error("disk {path} has {size} bytes, which is not a multiple of 512, or nothing: resize it (truncate -s)")]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size, bytes.
        size: u64,
    },
    /// Somebody else uses it.
    #[error("disk {path}: {error}")]
    Lock {
        /// Which.
        path: PathBuf,
        /// Why.
        error: LockError,
    },
}

/// A raw disk image, or a block device.
///
/// It is opened without being read. Until this process is the disk's owner every access fails.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    file: Arc<File>,
    lock: DiskLock,
    size: u64,
    read_only: bool,
    device: bool,
}

impl DiskFile {
    /// Opens a disk, without a lock and without reading it.
    ///
    /// # Errors
    ///
    /// When it is not there, may not be opened so, or is no disk.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let failed = |error: io::Error| DiskError::Open {
            path: path.to_owned(),
            hint: match error.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                    if !read_only =>
                {
                    " (to write); change its permissions, or use it with `readonly`"
                }
                io::ErrorKind::NotFound => "; create it (truncate -s SIZE), or correct the path",
                _ => "",
            },
            error,
        };
        // Asked before opening, which for a FIFO could wait and for a device do something.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path: path.to_owned() });
        }
        let mut file =
            OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed)?;
        // Of a block device only seeking tells the size.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 || size % SECTOR != 0 {
            return Err(DiskError::Size { path: path.to_owned(), size });
        }
        let file = Arc::new(file);
        let mode = if read_only { LockMode::Shared } else { LockMode::Exclusive };
        let lock = DiskLock::new(Arc::clone(&file), mode);
        let device = kind.is_block_device();
        Ok(Self { path: path.to_owned(), file, lock, size, read_only, device })
    }

    /// Makes this process the disk's owner.
    ///
    /// # Errors
    ///
    /// When another one is, or is about to be.
    pub fn take_owner(&mut self) -> Result<(), DiskError> {
        let had = self.lock.is_owner();
        self.lock.take_owner().map_err(|error| self.lock_error(error))?;
        if self.device && !had {
            // What was read before may be older than what its owner on another host has written: unlike network file
            // systems, a block device does not see to that. It is advice, and whether it was taken is not told.
            let _ = rustix::fs::fadvise(&*self.file, 0, None, rustix::fs::Advice::DontNeed);
        }
        Ok(())
    }

    /// Announces this process as the next owner: for the destination of a migration.
    ///
    /// # Errors
    ///
    /// When another one is about to be.
    pub fn take_incoming(&mut self) -> Result<(), DiskError> {
        self.lock.take_incoming().map_err(|error| self.lock_error(error))
    }

    /// Gives the disk up, after which every access fails; for a source, at the hand-over. Who may share the disk and not this
    /// host's cache of it relies on its having been flushed.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to unlock.
    pub fn release_owner(&mut self) -> Result<(), DiskError> {
        self.lock.release_owner().map_err(|error| self.lock_error(error))
    }

    /// The file, for who flushes it beside the device.
    #[must_use]
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    fn lock_error(&self, error: LockError) -> DiskError {
        DiskError::Lock { path: self.path.clone(), error }
    }

    fn check_owner(&self) -> io::Result<()> {
        if self.lock.is_owner() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "the disk is not locked by this VM"))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        fallocate(&*self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    fn write_zeroes_by_hand(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let piece = len.min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..piece as usize], offset)?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

/// Whether the file system says that it cannot do this at all.
fn is_unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV)
}

impl BlockBackend for DiskFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read<B: BitmapSlice>(&mut self, offset: u64, to: &Buffers<'_, B>) -> io::Result<()> {
        self.check_owner()?;
        volatile_io::read_exact_at(self.file.as_fd(), offset, to.slices())
    }

    fn write<B: BitmapSlice>(&mut self, offset: u64, from: &Buffers<'_, B>) -> io::Result<()> {
        self.check_owner()?;
        volatile_io::write_all_at(self.file.as_fd(), offset, from.slices())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.check_owner()?;
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.check_owner()?;
        match self.punch(offset, len) {
            Err(error) if !is_unsupported(error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_owner()?;
        let result = if unmap {
            self.punch(offset, len)
        } else {
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            fallocate(&*self.file, flags, offset, len)
        };
        match result {
            Err(error) if is_unsupported(error) => self.write_zeroes_by_hand(offset, len),
            result => Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn refused(path: &Path, read_only: bool) -> String {
        DiskFile::open(path, read_only).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_disk_is_refused_and_it_is_said_why() {
        let folder = tempfile::tempdir().unwrap();
        assert!(refused(&folder.path().join("none"), false).contains("create it"));
        assert!(refused(folder.path(), false).contains("is not a disk"));
        assert!(refused(Path::new("/dev/null"), false).contains("is not a disk"));
        for size in [0, 511, 513, 1 << 20 | 1] {
            let path = folder.path().join("odd");
            File::create(&path).unwrap().set_len(size).unwrap();
            let text = refused(&path, true);
            assert!(text.contains(&format!("has {size} bytes")), "{text}");
        }
    }

    #[test]
    fn a_disk_that_another_has_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let mut first = DiskFile::open(file.path(), false).unwrap();
        first.take_owner().unwrap();
        let mut second = DiskFile::open(file.path(), false).unwrap();
        let text = second.take_owner().unwrap_err().to_string();
        assert!(text.contains("in use by another VM"), "{text}");
        assert!(text.contains(file.path().to_str().unwrap()), "{text}");
        second.take_incoming().unwrap();
        first.release_owner().unwrap();
        second.take_owner().unwrap();
        assert!(first.flush().is_err() && second.flush().is_ok());
    }

    #[test]
    fn nothing_is_touched_before_the_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let mut disk = DiskFile::open(file.path(), false).unwrap();
        let none = Buffers::<()>::new();
        for result in [
            disk.read(0, &none),
            disk.write(0, &none),
            disk.flush(),
            disk.discard(0, 512),
            disk.write_zeroes(0, 512, false),
        ] {
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    }

    #[test]
    fn ranges_are_cleared_and_no_more() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 256 << 10]).unwrap();
        let mut disk = DiskFile::open(file.path(), false).unwrap();
        disk.take_owner().unwrap();
        disk.discard(0, 4096).unwrap();
        disk.write_zeroes(8192, 4096, false).unwrap();
        disk.write_zeroes(16384, 512, true).unwrap();
        disk.write_zeroes_by_hand(32768, (128 << 10) + 512).unwrap();
        disk.flush().unwrap();
        let mut want = vec![7; 256 << 10];
        for (offset, len) in [(0, 4096), (8192, 4096), (16384, 512), (32768, (128 << 10) + 512)] {
            want[offset..offset + len].fill(0);
        }
        assert!(std::fs::read(file.path()).unwrap() == want);
    }
}
