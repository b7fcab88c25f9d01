//! userfaultfd on guest memory: who touches a page that is missing waits until it is put there
//! (userfaultfd(2), ioctl_userfaultfd(2)).
//!
//! Guest memory is private and anonymous, and registered for missing pages: what has no memory behind it
//! is missing. The mechanism is used for nothing else, so that a page is either there or waited for.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

use userfaultfd::{Error, Event, EventBuffer, FeatureFlags, Uffd};

use crate::address::{Gfn, PageRange, PAGE_BYTES, PAGE_SIZE};
use crate::vm::{GuestMemory, VmError};

/// Faults that are read with one system call.
const EVENTS: usize = 64;

/// A page that somebody waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) gfn: Gfn,
    /// Thread that waits.
    pub(crate) thread: i32,
}

/// Whether a page could be put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    Done,
    /// One was there before.
    Already,
}

/// A region of guest memory as it is mapped here.
#[derive(Debug, Clone, Copy)]
struct Mapped {
    range: PageRange,
    address: usize,
}

/// The userfaultfd of one VM's memory.
///
/// It is closed when it is dropped, but only after [`Userfault::finish`] or [`Userfault::abandon`]. Closed while pages are
/// missing it would let whoever waits for one go on with zeros; so it rather stays open until the process ends.
#[derive(Debug)]
pub(crate) struct Userfault {
    uffd: ManuallyDrop<Uffd>,
    regions: Vec<Mapped>,
    may_close: AtomicBool,
}

impl Drop for Userfault {
    fn drop(&mut self) {
        if self.may_close.load(Ordering::Acquire) || self.regions.is_empty() {
            // SAFETY: nobody uses it after this.
            unsafe { ManuallyDrop::drop(&mut self.uffd) };
        }
    }
}

impl Userfault {
    /// Opens it: by /dev/userfaultfd, or else by the system call. KVM's own accesses must be served too, which the
    /// kernel allows to those only who may open the device or have CAP_SYS_PTRACE, unless
    /// `vm.unprivileged_userfaultfd` is 1.
    ///
    /// # Errors
    /// What is not allowed, and what to do.
    pub(crate) fn open() -> Result<Self, String> {
        let uffd = by_device().or_else(|device| {
            by_system_call().map_err(|call| {
                format!(
                    "post-copy needs userfaultfd: /dev/userfaultfd: {device}, userfaultfd(2): {call}; give this user \
                     access to /dev/userfaultfd, or CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1"
                )
            })
        })?;
        let uffd = ManuallyDrop::new(uffd);
        Ok(Self { uffd, regions: Vec::new(), may_close: AtomicBool::new(false) })
    }

    /// From now on all pages of `memory` that have no memory behind them are missing.
    ///
    /// # Errors
    /// [`VmError::Os`].
    pub(crate) fn register<M: GuestMemory + ?Sized>(&mut self, memory: &M) -> Result<(), VmError> {
        for range in memory.layout().regions() {
            let slice = memory.slice(range)?;
            let address = slice.ptr_guard_mut().as_ptr();
            self.uffd
                .register(address.cast(), slice.len())
                .map_err(|error| failed(format!("registering {range} with userfaultfd"), &error))?;
            self.regions.push(Mapped { range, address: address as usize });
        }
        Ok(())
    }

    /// Puts pages in, all at once for each page, and wakes who waits for them. `data` has the length of `range`.
    /// Stops at the first page that is there.
    ///
    /// # Errors
    /// [`VmError`].
    pub(crate) fn put(&self, range: PageRange, data: &[u8]) -> Result<Put, VmError> {
        if data.len() as u64 != range.bytes() {
            return Err(VmError::Other(format!("{} bytes for {range}", data.len())));
        }
        self.fill(range, |address, at, len| {
            // SAFETY: `data` has `at + len` bytes or more. The kernel writes only to a range that was registered,
            // hence to guest memory, which nobody has a Rust reference into, and only where nothing is.
            unsafe { self.uffd.copy(data[at..].as_ptr().cast(), address, len, true) }
        })
    }

    /// Makes missing pages read as zeros, and wakes who waits for them. Stops at the first page that is there.
    ///
    /// # Errors
    /// [`VmError`].
    pub(crate) fn put_zeros(&self, range: PageRange) -> Result<Put, VmError> {
        self.fill(range, |address, _, len| {
            // SAFETY: as in `put`.
            unsafe { self.uffd.zeropage(address, len, true) }
        })
    }

    /// Wakes who waits for pages that are there.
    ///
    /// # Errors
    /// [`VmError`].
    pub(crate) fn wake(&self, range: PageRange) -> Result<(), VmError> {
        let address = self.address(range)?;
        self.uffd
            .wake(address as *mut _, range.bytes() as usize)
            .map_err(|error| failed(format!("waking who waits for {range}"), &error))
    }

    fn fill(
        &self,
        range: PageRange,
        call: impl Fn(*mut libc::c_void, usize, usize) -> Result<usize, Error>,
    ) -> Result<Put, VmError> {
        let start = self.address(range)?;
        let bytes = range.bytes() as usize;
        let mut done = 0;
        while done < bytes {
            match call((start + done) as *mut _, done, bytes - done) {
                Ok(some) => done += some,
                // Memory is being mapped elsewhere in this process; the rest is for another call.
                Err(Error::PartiallyCopied(some)) => {
                    done += if some > bytes - done { 0 } else { some }
                }
                Err(Error::CopyFailed(errno) | Error::ZeropageFailed(errno)) => {
                    match errno as i32 {
                        libc::EEXIST => return Ok(Put::Already),
                        libc::EAGAIN => {}
                        code => {
                            let error = io::Error::from_raw_os_error(code);
                            return Err(VmError::Os { what: format!("putting {range} in"), error });
                        }
                    }
                }
                Err(error) => return Err(failed(format!("putting {range} in"), &error)),
            }
        }
        Ok(Put::Done)
    }

    fn address(&self, range: PageRange) -> Result<usize, VmError> {
        let region = self.regions.iter().find(|region| region.range.contains(range));
        let region = region.ok_or(crate::address::RangeError::Outside(range))?;
        let page = range.start().0 - region.range.start().0;
        Ok(region.address + page as usize * PAGE_BYTES)
    }

    /// The faults that there are now; none is no error. To wait for one, poll for input.
    ///
    /// # Errors
    /// [`VmError`].
    pub(crate) fn faults(&self, faults: &mut Vec<Fault>) -> Result<(), VmError> {
        let mut buffer = EventBuffer::new(EVENTS);
        let read = |error: &Error| failed("reading page faults".to_owned(), error);
        for event in self.uffd.read_events(&mut buffer).map_err(|error| read(&error))? {
            match event.map_err(|error| read(&error))? {
                Event::Pagefault { addr, thread_id, .. } => {
                    let address = addr as usize;
                    let region = self.regions.iter().find(|region| {
                        address >= region.address
                            && ((address - region.address) as u64) < region.range.bytes()
                    });
                    let Some(region) = region else { continue };
                    let page = (address - region.address) as u64 / PAGE_SIZE;
                    let gfn = Gfn(region.range.start().0 + page);
                    faults.push(Fault { gfn, thread: thread_id.as_raw() });
                }
                other => tracing::debug!(?other, "an event that was not asked for"),
            }
        }
        Ok(())
    }

    /// All pages are there: nobody has to wait any more.
    ///
    /// # Errors
    /// [`VmError`]; it stays open then.
    pub(crate) fn finish(&self) -> Result<(), VmError> {
        for region in &self.regions {
            self.uffd
                .unregister(region.address as *mut _, region.range.bytes() as usize)
                .map_err(|error| failed(format!("unregistering {}", region.range), &error))?;
        }
        self.abandon();
        Ok(())
    }

    /// It may be closed although pages are missing: nobody will run who could touch them.
    pub(crate) fn abandon(&self) {
        self.may_close.store(true, Ordering::Release);
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

static DEVICE: OnceLock<File> = OnceLock::new();

/// Opens /dev/userfaultfd, for a process that will not be allowed to later. Without effect where it cannot be opened.
pub fn keep_device() {
    if let Ok(device) = open_device() {
        // Kept before is as good.
        let _ = DEVICE.set(device);
    }
}

fn open_device() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/userfaultfd")
}

// The crate's builder takes the system call only where there is no device at all, not where it may not be opened, and has no
// way to use one that is open.

fn by_device() -> io::Result<Uffd> {
    /// USERFAULTFD_IOC_NEW: _IO(0xAA, 0x00), linux/userfaultfd.h.
    const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
    let opened;
    let device = match DEVICE.get() {
        Some(device) => device,
        None => {
            opened = open_device()?;
            &opened
        }
    };
    // SAFETY: takes flags and gives a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) };
    agree(fd)
}

fn by_system_call() -> io::Result<Uffd> {
    // SAFETY: takes flags and gives a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    agree(i32::try_from(fd).map_err(io::Error::other)?)
}

const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// Agrees with the kernel on the version and on what is told of a fault.
fn agree(fd: libc::c_int) -> io::Result<Uffd> {
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    /// UFFDIO_API: _IOWR(0xAA, 0x3F, struct uffdio_api), linux/userfaultfd.h.
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    const UFFD_API: u64 = 0xaa;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut api = Api { api: UFFD_API, features: FeatureFlags::THREAD_ID.bits(), ioctls: 0 };
    // SAFETY: the kernel reads and writes a structure of exactly this form.
    if unsafe { libc::ioctl(fd, UFFDIO_API, &raw mut api) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: an open userfaultfd, given away by `file`.
    Ok(unsafe { Uffd::from_raw_fd(file.into_raw_fd()) })
}

/// The crate's errors leave out what the kernel said.
fn explain(error: &Error) -> String {
    match error {
        Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => errno.desc().to_owned(),
        Error::SystemError(errno) => errno.desc().to_owned(),
        other => other.to_string(),
    }
}

fn failed(what: String, error: &Error) -> VmError {
    VmError::Other(format!("{what}: {}", explain(error)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::thread;

    use rustix::event::{poll, PollFd, PollFlags};

    use super::*;
    use crate::layout::MemoryLayout;
    use crate::simulated::SimulatedVm;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(Gfn(start), pages).unwrap()
    }

    fn open() -> Option<Userfault> {
        match Userfault::open() {
            Ok(userfault) => Some(userfault),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    #[test]
    fn who_touches_a_missing_page_waits_until_it_is_put_in() {
        let Some(mut userfault) = open() else { return };
        let layout = MemoryLayout::new([range(0, 64), range(256, 8)]).unwrap();
        let vm = SimulatedVm::new(layout).unwrap();
        vm.guest_write(Gfn(3), b"here").unwrap();
        userfault.register(&vm).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| vm.read_page(Gfn(257)).unwrap());
            assert_eq!(&vm.read_page(Gfn(3)).unwrap()[..4], b"here", "what is there is no fault");
            let mut faults = Vec::new();
            while faults.is_empty() {
                poll(&mut [PollFd::new(&userfault, PollFlags::IN)], None).unwrap();
                userfault.faults(&mut faults).unwrap();
            }
            assert_eq!((faults.len(), faults[0].gfn), (1, Gfn(257)));
            assert_ne!(faults[0].thread, 0);
            assert!(!reader.is_finished());
            assert_eq!(userfault.put(range(257, 2), &[9; 2 * PAGE_BYTES]).unwrap(), Put::Done);
            assert_eq!(reader.join().unwrap(), [9; PAGE_BYTES]);
        });
        assert_eq!(vm.read_page(Gfn(258)).unwrap(), [9; PAGE_BYTES]);
        assert_eq!(userfault.put(range(3, 1), &[1; PAGE_BYTES]).unwrap(), Put::Already);
        assert_eq!(userfault.put_zeros(range(5, 3)).unwrap(), Put::Done);
        assert_eq!(vm.read_page(Gfn(6)).unwrap(), [0; PAGE_BYTES]);
        assert!(userfault.put(range(63, 2), &[1; 2 * PAGE_BYTES]).is_err(), "beyond its region");
        userfault.finish().unwrap();
        assert_eq!(vm.read_page(Gfn(9)).unwrap(), [0; PAGE_BYTES], "nobody waits any more");
    }
}
