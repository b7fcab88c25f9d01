//! Vectored reads and writes between a file descriptor and guest memory, without a copy.
//!
//! Guest memory is volatile: the guest may write to it during the call. The kernel copies bytes
//! and does not care; this process never makes a reference to them. What was read into guest
//! memory is marked in the device bitmap after the call.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::VolatileSlice;

/// Most buffers that one call takes (UIO_MAXIOV in the kernel).
pub const MAX_BUFFERS: usize = 1024;

/// Fills all of `slices` from `offset` of a file.
///
/// # Errors
///
/// What preadv(2) says; [`io::ErrorKind::UnexpectedEof`] when the file ends before. Some of the
/// slices are overwritten then.
pub fn read_exact_at<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    offset: u64,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<()> {
    let result = transfer_all(slices, offset, io::ErrorKind::UnexpectedEof, |buffers, at| {
        // SAFETY: `buffers` are iovecs of memory that the VolatileSlices promise to be mapped and
        // writable for as long as they live, which is longer than the call; nobody holds
        // references to it. `transfer_all` only ever shortens a buffer from its start.
        unsafe { libc::preadv(fd.as_raw_fd(), buffers.as_ptr(), count(buffers), at) }
    });
    // After the write, whatever came of it: a call that failed half-way wrote half.
    for slice in slices {
        slice.bitmap().mark_dirty(0, slice.len());
    }
    result
}

/// Writes all of `slices` at `offset` of a file.
///
/// # Errors
///
/// What pwritev(2) says; [`io::ErrorKind::WriteZero`] when nothing can be written any more. Some
/// of it is written then.
pub fn write_all_at<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    offset: u64,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<()> {
    transfer_all(slices, offset, io::ErrorKind::WriteZero, |buffers, at| {
        // SAFETY: `buffers` are iovecs of memory that the VolatileSlices promise to be mapped for
        // as long as they live, which is longer than the call; the kernel only reads it.
        // `transfer_all` only ever shortens a buffer from its start.
        unsafe { libc::pwritev(fd.as_raw_fd(), buffers.as_ptr(), count(buffers), at) }
    })
}

/// Reads once: first into `slices`, then into `overflow`. Gives the number of bytes.
///
/// # Errors
///
/// What readv(2) says; `InvalidInput` for more slices than one call takes.
pub fn read_once<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_, B>],
    overflow: &mut [u8],
) -> io::Result<usize> {
    let mut buffers = iovecs(slices);
    if !overflow.is_empty() {
        buffers
            .push(libc::iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() });
    }
    // SAFETY: `buffers` are iovecs of memory that the VolatileSlices promise to be mapped and
    // writable for as long as they live, and of `overflow`, which is exclusively borrowed; both
    // outlive the call.
    let result = once(&buffers, |buffers| unsafe {
        libc::readv(fd.as_raw_fd(), buffers.as_ptr(), count(buffers))
    });
    let mut left = match &result {
        Ok(done) => *done,
        // Nothing was there: the usual end, and nothing was written.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        // Who knows how far it came.
        Err(_) => usize::MAX,
    };
    for slice in slices {
        let part = left.min(slice.len());
        slice.bitmap().mark_dirty(0, part);
        left -= part;
    }
    result
}

/// Writes `slices` by one call, as a datagram wants it. Gives the number of bytes.
///
/// # Errors
///
/// What writev(2) says; `InvalidInput` for more slices than one call takes.
pub fn write_once<B: BitmapSlice>(
    fd: BorrowedFd<'_>,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    // SAFETY: the buffers are iovecs of memory that the VolatileSlices promise to be mapped for
    // as long as they live, which is longer than the call; the kernel only reads it.
    once(&iovecs(slices), |buffers| unsafe {
        libc::writev(fd.as_raw_fd(), buffers.as_ptr(), count(buffers))
    })
}

/// The buffers as the kernel wants them, without empty ones: a transfer of 0 bytes then always
/// means the end.
fn iovecs<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .filter(|slice| !slice.is_empty())
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

fn count(buffers: &[libc::iovec]) -> libc::c_int {
    buffers.len().min(MAX_BUFFERS) as libc::c_int
}

fn once(
    buffers: &[libc::iovec],
    call: impl Fn(&[libc::iovec]) -> libc::ssize_t,
) -> io::Result<usize> {
    if buffers.len() > MAX_BUFFERS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match usize::try_from(call(buffers)) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Calls `call` with what is left until nothing is.
fn transfer_all<B: BitmapSlice>(
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
    at_end: io::ErrorKind,
    call: impl Fn(&[libc::iovec], libc::off_t) -> libc::ssize_t,
) -> io::Result<()> {
    let mut all = iovecs(slices);
    let mut buffers = all.as_mut_slice();
    let mut at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    while !buffers.is_empty() {
        let mut done = match usize::try_from(call(buffers, at)) {
            Ok(0) => return Err(at_end.into()),
            Ok(done) => done,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        // A call moves at most 2 GiB, so this is no truncation; past the end of the address
        // space of files the kernel refused.
        at = at.saturating_add(done as libc::off_t);
        while let Some(first) = buffers.first_mut() {
            if done < first.iov_len {
                first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
                first.iov_len -= done;
                break;
            }
            done -= first.iov_len;
            buffers = &mut buffers[1..];
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::fd::AsFd;

    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

    use super::*;

    type Memory = GuestMemoryMmap<AtomicBitmap>;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    macro_rules! slices {
        ($memory:expr, $ranges:expr) => {
            $ranges
                .iter()
                .flat_map(|&(gpa, len)| {
                    $memory.get_slices(GuestAddress(gpa), len, Permissions::ReadWrite).unwrap()
                })
                .collect::<Result<Vec<_>, _>>()
                .unwrap()
        };
    }

    fn dirty_pages(memory: &Memory) -> Vec<u64> {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let bitmap = GuestMemoryRegion::bitmap(region);
        (0..16).filter(|page| bitmap.dirty_at(*page as usize * 0x1000)).collect()
    }

    #[test]
    fn scattered_data_goes_out_and_comes_back_and_is_marked() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3000).map(|n| (n % 251) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0x100)).unwrap();
        let from = slices!(memory, [(0x100, 1000), (0x100 + 1000, 0), (0x100 + 1000, 2000)]);
        write_all_at(file.as_fd(), 512, &from).unwrap();

        let fresh = super::tests::memory();
        let to = slices!(fresh, [(0x1F00, 2000), (0x8000, 1000)]);
        read_exact_at(file.as_fd(), 512, &to).unwrap();
        let mut back = vec![0; 3000];
        fresh.read_slice(&mut back[..2000], GuestAddress(0x1F00)).unwrap();
        fresh.read_slice(&mut back[2000..], GuestAddress(0x8000)).unwrap();
        assert_eq!(back, bytes);
        assert_eq!(dirty_pages(&fresh), [1, 2, 8]);
    }

    #[test]
    fn the_end_of_the_file_is_an_error_and_what_came_is_marked() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let to = slices!(memory, [(0x2000, 101)]);
        let error = read_exact_at(file.as_fd(), 0, &to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(dirty_pages(&memory), [2]);
        assert!(read_exact_at(file.as_fd(), u64::MAX, &to).is_err());
    }

    #[test]
    fn more_buffers_than_one_call_takes() {
        let memory = memory();
        let file = tempfile::tempfile().unwrap();
        memory.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
        let many: Vec<(u64, usize)> = (0..0x1000).map(|n| (n * 4, 4)).collect();
        let slices = slices!(memory, many);
        write_all_at(file.as_fd(), 0, &slices).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 0x4000);
        let error = write_once(file.as_fd(), &slices).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn one_read_fills_the_slices_then_the_overflow_and_marks_what_came() {
        let memory = memory();
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        far.send(&[9; 0x1800]).unwrap();
        let to = slices!(memory, [(0x1000, 0x1000), (0x2000, 0x400), (0x9000, 0)]);
        let mut overflow = vec![0; 0x1000];
        assert_eq!(read_once(near.as_fd(), &to, &mut overflow).unwrap(), 0x1800);
        assert_eq!(overflow[..0x400], [9; 0x400]);
        assert_eq!(overflow[0x400], 0);
        assert_eq!(dirty_pages(&memory), [1, 2]);

        far.send(&[9; 10]).unwrap();
        let to = slices!(memory, [(0x5000, 0x1000), (0x7000, 0x400)]);
        assert_eq!(read_once(near.as_fd(), &to, &mut overflow).unwrap(), 10);
        assert_eq!(dirty_pages(&memory), [1, 2, 5]);
        assert_eq!(write_once(near.as_fd(), &to).unwrap(), 0x1400);
        let mut frame = vec![0; 0x2000];
        assert_eq!(far.recv(&mut frame).unwrap(), 0x1400);
    }

    #[test]
    fn a_read_that_fails_is_marked_unless_there_was_nothing_to_read() {
        let memory = memory();
        let (near, _far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let to = slices!(memory, [(0x1000, 0x1000), (0x3000, 0x10)]);
        let error = read_once(near.as_fd(), &to, &mut []).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(dirty_pages(&memory).is_empty());
        // Nobody says how far a failed call came.
        let file = tempfile::NamedTempFile::new().unwrap();
        let only_written = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
        assert!(read_once(only_written.as_fd(), &to, &mut []).is_err());
        assert_eq!(dirty_pages(&memory), [1, 3]);
    }
}
