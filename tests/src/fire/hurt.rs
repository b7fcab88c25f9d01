//! What is done to a process's surroundings: its disk is full, its memory at an end, its lock taken.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::param::page_size;
use rustix::process::{prlimit, Pid, Resource, Rlimit};
use rustix::thread::{unshare_unsafe, UnshareFlags};

/// Runs `work` on a thread whose mounts, and those of its child processes, are nobody else's.
///
/// # Panics
/// There is no such namespace; as `work` does.
pub fn in_private_mounts<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let inside = || {
        // SAFETY: only unsharing the table of descriptors is dangerous, and it stays shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        run("mount", &["--make-rprivate", "/"]);
        work()
    };
    std::thread::scope(|scope| match scope.spawn(inside).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

/// A file system so small that it can be filled. To be made in private mounts.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Over the directory `path`, which is made.
    #[track_caller]
    pub fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let text = path.to_str().unwrap();
        // A link takes an inode there (shmem_link() in the kernel's mm/shmem.c).
        run("mount", &["-t", "tmpfs", "-o", "size=4m,nr_inodes=1024,mode=700", "tmpfs", text]);
        Self(path.to_owned())
    }

    /// Neither a byte nor a name fits in any more.
    pub fn fill(&self) {
        fs::create_dir(self.0.join("fill")).unwrap();
        let mut file = File::create(self.0.join("fill/bytes")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        let mut number = 0;
        while File::create(self.0.join(format!("fill/{number}"))).is_ok() {
            number += 1;
        }
    }

    /// There is room again.
    pub fn free(&self) {
        // It may be free already.
        let _ = fs::remove_dir_all(self.0.join("fill"));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that is being killed may still use it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The process gets no memory beyond what it has.
#[track_caller]
pub fn starve(pid: u32) {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
    limit_memory(pid, Some(pages * page_size() as u64));
}

/// The process gets memory again.
#[track_caller]
pub fn feed(pid: u32) {
    limit_memory(pid, None);
}

#[track_caller]
fn limit_memory(pid: u32, bytes: Option<u64>) {
    let pid = Pid::from_raw(pid.try_into().unwrap());
    prlimit(pid, Resource::As, Rlimit { current: bytes, maximum: None }).unwrap();
}

/// Has the lock that the machine has that runs on a disk, as a program can that does not keep to the order
/// of the locks (`devices::virtio::block::lock`).
#[derive(Debug)]
pub struct Thief(#[allow(dead_code)] File);

impl Thief {
    /// The byte that stands for the machine that runs on the disk.
    const OWNER: libc::off_t = 1 << 62;

    /// Takes the lock of the disk `path`, which nobody has.
    #[track_caller]
    pub fn take(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        // SAFETY: a C structure of integers, for which zeros are values.
        let mut request: libc::flock = unsafe { std::mem::zeroed() };
        request.l_type = libc::F_WRLCK as libc::c_short;
        request.l_whence = libc::SEEK_SET as libc::c_short;
        request.l_start = Self::OWNER;
        request.l_len = 1;
        // SAFETY: the descriptor is open, and the kernel only reads the structure.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &request) };
        assert_eq!(result, 0, "the lock is not free: {}", io::Error::last_os_error());
        Self(file)
    }
}
