//! Vectored reads and writes between a file descriptor and guest memory, without a copy.
//!
//! Guest memory is volatile: the guest may write to it during the call. The kernel copies bytes
//! and does not care; this process never makes a reference to them.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most buffers that one call takes (IOV_MAX, limits.h; UIO_MAXIOV in the kernel).
const MAX_BUFFERS: usize = 1024;

/// Writes `head`, then all of `slices`, to a blocking descriptor. Goes on after partial writes
/// and interruptions.
///
/// # Errors
/// What writev(2) says; [`io::ErrorKind::WriteZero`] when nothing can be written any more. An
/// unknown part is then written.
pub fn write_all(fd: BorrowedFd<'_>, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
    let mut buffers = buffers(Some(head), slices);
    transfer(&mut buffers, io::ErrorKind::WriteZero, |buffers, count| {
        // SAFETY: `buffers` points to `count` iovecs. The first may describe `head`, which is
        // borrowed for the whole call and only read; the others describe memory that the
        // VolatileSlices promise to be mapped for as long as they live, which is longer than the
        // call, and that anyone may write to at any time without breaking a rule of Rust, since
        // nobody holds references to it. `transfer` only ever shortens a buffer from its start.
        unsafe { libc::writev(fd.as_raw_fd(), buffers, count) }
    })
}

/// Fills all of `slices` from a blocking descriptor. Goes on after partial reads and
/// interruptions.
///
/// # Errors
/// What readv(2) says; [`io::ErrorKind::UnexpectedEof`] when the data ends too early. An unknown
/// part of the slices is then overwritten.
pub fn read_exact(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let mut buffers = buffers(None, slices);
    transfer(&mut buffers, io::ErrorKind::UnexpectedEof, |buffers, count| {
        // SAFETY: `buffers` points to `count` iovecs, all of which describe memory that the
        // VolatileSlices promise to be mapped and writable for as long as they live, which is
        // longer than the call; nobody holds references to it. `transfer` only ever shortens a
        // buffer from its start.
        unsafe { libc::readv(fd.as_raw_fd(), buffers, count) }
    })
}

/// The buffers as the kernel wants them, without empty ones: a transfer of 0 bytes then always
/// means the end.
fn buffers(head: Option<libc::iovec>, slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    head.into_iter()
        .chain(slices.iter().map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        }))
        .filter(|buffer| buffer.iov_len > 0)
        .collect()
}

/// Calls `call` with what is left until nothing is.
fn transfer(
    mut buffers: &mut [libc::iovec],
    at_end: io::ErrorKind,
    call: impl Fn(*const libc::iovec, libc::c_int) -> libc::ssize_t,
) -> io::Result<()> {
    while !buffers.is_empty() {
        let count = buffers.len().min(MAX_BUFFERS);
        let mut done = match usize::try_from(call(buffers.as_ptr(), count as libc::c_int)) {
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
