//! What a network card needs of whoever moves its frames.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use vm_memory::bitmap::BitmapSlice;

use crate::virtio::{volatile_io, Buffers};

/// What the guest lets the backend leave undone in frames for it. Without any, frames have
/// complete checksums and are no longer than the MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// Segmentation of TCP over IPv4.
    pub tso4: bool,
    /// Segmentation of TCP over IPv6.
    pub tso6: bool,
    /// Segmentation of TCP with explicit congestion notification.
    pub ecn: bool,
}

/// Moves frames, each behind a virtio header of 12 bytes. Nothing here waits.
pub trait NetBackend: Send + 'static {
    /// Whether it handles unfinished checksums and segmentation, both ways.
    fn has_offloads(&self) -> bool;

    /// Says what the guest accepts from now on.
    ///
    /// # Errors
    ///
    /// When the backend cannot do that after all.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Reads one frame with its header: into `to`, and what does not fit there into `overflow`.
    /// Gives the number of bytes. What was written to `to` is marked in the device bitmap
    /// afterwards.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is none.
    fn read_frame<B: BitmapSlice>(
        &mut self,
        to: &Buffers<'_, B>,
        overflow: &mut [u8],
    ) -> io::Result<usize>;

    /// Writes one frame with its header.
    ///
    /// # Errors
    ///
    /// When it was not taken; it is dropped then.
    fn write_frame<B: BitmapSlice>(&mut self, from: &Buffers<'_, B>) -> io::Result<()>;
}

/// A tap, or anything else whose reads and writes are frames with a header of 12 bytes.
///
/// The descriptor is non-blocking. A tap is set up with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` and a
/// `TUNSETVNETHDRSZ` of 12. How offloads are set is a matter of what it is, hence `set`.
pub struct FdBackend<F> {
    fd: OwnedFd,
    set: Option<F>,
}

impl<F> FdBackend<F>
where
    F: FnMut(&OwnedFd, Offloads) -> io::Result<()> + Send + 'static,
{
    /// A backend on `fd`; without `set` it has no offloads.
    pub fn new(fd: OwnedFd, set: Option<F>) -> Self {
        Self { fd, set }
    }

    /// The descriptor, for who waits for frames.
    #[must_use]
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }
}

impl<F> NetBackend for FdBackend<F>
where
    F: FnMut(&OwnedFd, Offloads) -> io::Result<()> + Send + 'static,
{
    fn has_offloads(&self) -> bool {
        self.set.is_some()
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        match &mut self.set {
            Some(set) => set(&self.fd, offloads),
            None => Ok(()),
        }
    }

    fn read_frame<B: BitmapSlice>(
        &mut self,
        to: &Buffers<'_, B>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        volatile_io::read_once(self.fd.as_fd(), to.slices(), overflow)
    }

    fn write_frame<B: BitmapSlice>(&mut self, from: &Buffers<'_, B>) -> io::Result<()> {
        let written = volatile_io::write_once(self.fd.as_fd(), from.slices())?;
        if written < from.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }
}
