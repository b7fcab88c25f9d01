//! What a block device needs of a disk.

use std::io;

use vm_memory::bitmap::BitmapSlice;

use crate::virtio::Buffers;

/// A disk. The device checks all ranges: they lie inside of [`BlockBackend::size`].
///
/// Offsets and lengths are bytes, multiples of 512.
pub trait BlockBackend: Send + 'static {
    /// Size, bytes.
    fn size(&self) -> u64;

    /// Whether nothing can be written.
    fn is_read_only(&self) -> bool;

    /// Fills `to` from `offset`; what was written is marked in the device bitmap afterwards.
    ///
    /// # Errors
    ///
    /// When not all could be read.
    fn read<B: BitmapSlice>(&mut self, offset: u64, to: &Buffers<'_, B>) -> io::Result<()>;

    /// Writes `from` at `offset`.
    ///
    /// # Errors
    ///
    /// When not all could be written.
    fn write<B: BitmapSlice>(&mut self, offset: u64, from: &Buffers<'_, B>) -> io::Result<()>;

    /// What was written before is on stable storage afterwards.
    ///
    /// # Errors
    ///
    /// When that is not certain.
    fn flush(&mut self) -> io::Result<()>;

    /// The range need not be kept any more. A backend that cannot forget does nothing.
    ///
    /// # Errors
    ///
    /// When forgetting failed.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeros afterwards; with `unmap` its storage may be given back.
    ///
    /// # Errors
    ///
    /// When that failed.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}
