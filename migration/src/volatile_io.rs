//! Vectored reads and writes between a file descriptor and guest memory, without a copy.
//!
//! Guest memory is volatile: the guest may write to it during the call. The kernel copies bytes
//! and does not care; this process never makes a reference to them.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

use crate::address::PAGE_BYTES;

/// Most buffers that one call takes (IOV_MAX, limits.h; UIO_MAXIOV in the kernel).
const MAX_BUFFERS: usize = 1024;

/// Somewhere that guest memory can be written to without a copy.
pub trait WriteGuest {
    /// Writes `head`, then all of `slices`.
    ///
    /// # Errors
    /// As [`write_all`].
    fn write_guest(&mut self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()>;
}

/// Somewhere that guest memory can be read from without a copy.
pub trait ReadGuest {
    /// Fills all of `slices`.
    ///
    /// # Errors
    /// As [`read_exact`].
    fn read_guest(&mut self, slices: &[VolatileSlice<'_>]) -> io::Result<()>;
}

impl<T: AsFd> WriteGuest for T {
    fn write_guest(&mut self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        write_all(self.as_fd(), head, slices)
    }
}

impl<T: AsFd> ReadGuest for T {
    fn read_guest(&mut self, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        read_exact(self.as_fd(), slices)
    }
}

/// Whether the page at byte `offset` of `slice` holds only zeros. The guest may write to it
/// meanwhile; the dirty log then has it again.
///
/// # Panics
/// When the page is not within the slice.
pub fn is_zero_page(slice: &VolatileSlice<'_>, offset: usize) -> bool {
    assert!(offset <= slice.len() && slice.len() - offset >= PAGE_BYTES, "page beyond the slice");
    let guard = slice.ptr_guard();
    // SAFETY: just checked to be within the slice, hence within one mapping.
    let page = unsafe { guard.as_ptr().add(offset) };
    if page.align_offset(16) == 0 {
        // SAFETY: a page of mapped memory, aligned for the widest access that is made.
        unsafe { is_zero_aligned(page) }
    } else {
        // SAFETY: a page of mapped memory; single bytes need no alignment.
        (0..PAGE_BYTES).all(|at| unsafe { page.add(at).read_volatile() } == 0)
    }
}

/// # Safety
/// `page` points to [`PAGE_BYTES`] bytes of mapped memory and is aligned to 16 bytes. Anyone may write
/// to them at any time.
unsafe fn is_zero_aligned(page: *const u8) -> bool {
    // Nearly every page that is not zero has something in one of these words.
    for at in [0, PAGE_BYTES - 8, PAGE_BYTES / 2, PAGE_BYTES / 4] {
        // SAFETY: within the page, aligned; volatile, since others may write to it.
        if unsafe { page.add(at).cast::<u64>().read_volatile() } != 0 {
            return false;
        }
    }
    // SAFETY: as this function's own contract.
    unsafe { is_zero_wide(page) }
}

/// Looks at 128 bytes at a time. Assembly, because it reads memory that others write to, which no
/// Rust reference and no ordinary load may do, and volatile loads are not made wide.
///
/// # Safety
/// As [`is_zero_aligned`].
#[cfg(target_arch = "x86_64")]
unsafe fn is_zero_wide(page: *const u8) -> bool {
    let mask: u32;
    // SAFETY: reads from `page` up to `end`, exclusive, in steps of 128 that end exactly there,
    // with accesses of 16 bytes aligned to 16. Writes nothing but the named registers.
    // SSE2 is part of x86-64.
    unsafe {
        std::arch::asm!(
            "pxor {zero}, {zero}",
            "2:",
            "movdqa {a}, [{at}]",
            "movdqa {b}, [{at} + 16]",
            "por {a}, [{at} + 32]",
            "por {b}, [{at} + 48]",
            "por {a}, [{at} + 64]",
            "por {b}, [{at} + 80]",
            "por {a}, [{at} + 96]",
            "por {b}, [{at} + 112]",
            "por {a}, {b}",
            "pcmpeqb {a}, {zero}",
            "pmovmskb {mask:e}, {a}",
            "cmp {mask:e}, 0xffff",
            "jne 3f",
            "add {at}, 128",
            "cmp {at}, {end}",
            "jne 2b",
            "3:",
            at = inout(reg) page => _,
            end = in(reg) page.add(PAGE_BYTES),
            mask = out(reg) mask,
            a = out(xmm_reg) _,
            b = out(xmm_reg) _,
            zero = out(xmm_reg) _,
            options(nostack, readonly),
        );
    }
    mask == 0xffff
}

/// # Safety
/// As [`is_zero_aligned`].
#[cfg(not(target_arch = "x86_64"))]
unsafe fn is_zero_wide(page: *const u8) -> bool {
    let words = page.cast::<u64>();
    // SAFETY: within the page, aligned; volatile, since others may write to it.
    (0..PAGE_BYTES / 8).all(|at| unsafe { words.add(at).read_volatile() } == 0)
}

/// Gives the pages of `slice`, whole pages of private anonymous memory, back to the kernel
/// (MADV_DONTNEED, madvise(2)): they read as zeros afterwards.
///
/// # Errors
/// What madvise(2) says: `EINVAL` where it is not whole pages.
pub fn discard(slice: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the VolatileSlice promises that this memory is mapped for as long as it lives, and
    // anyone may change its contents at any time.
    match unsafe { libc::madvise(guard.as_ptr().cast(), slice.len(), libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_single_bit_anywhere_makes_a_page_not_zero() {
        let mut memory = vec![0u8; 3 * PAGE_BYTES + 64];
        for misaligned in [0, 1, 8] {
            let start = memory.as_ptr().align_offset(PAGE_BYTES) % PAGE_BYTES + misaligned;
            // What is around the page must not matter.
            memory.fill(0xff);
            memory[start..start + PAGE_BYTES].fill(0);
            for at in 0..=PAGE_BYTES {
                if at < PAGE_BYTES {
                    memory[start + at] = 1 << (at % 8);
                }
                let slice = VolatileSlice::from(&mut memory[..]);
                assert_eq!(is_zero_page(&slice, start), at == PAGE_BYTES, "byte {at}");
                memory[start..start + PAGE_BYTES].fill(0);
            }
        }
    }

    #[test]
    #[should_panic(expected = "page beyond the slice")]
    fn a_page_beyond_the_slice_is_not_read() {
        let mut memory = vec![0u8; PAGE_BYTES];
        let _ = is_zero_page(&VolatileSlice::from(&mut memory[..]), 1);
    }
}
