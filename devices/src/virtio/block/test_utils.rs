//! A disk in memory that notes what is done to it, and requests as a driver makes them.

use std::io;

use vm_memory::bitmap::BitmapSlice;

use super::{Block, BlockBackend, Cache, SECTOR};
use crate::virtio::test_utils::*;
use crate::virtio::Buffers;

/// Byte that nobody writes by chance.
pub(super) const UNTOUCHED: u8 = 0xEE;

pub(super) const HEADER_AT: u64 = DATA;
pub(super) const STATUS_AT: u64 = DATA + 0x800;
/// Where data is read from and written to.
pub(super) const BUFFER: u64 = DATA + 0x1000;

pub(super) struct RamDisk {
    pub(super) bytes: Vec<u8>,
    pub(super) read_only: bool,
    /// What every access fails with.
    pub(super) broken: Option<io::ErrorKind>,
    /// Calls, in order.
    pub(super) calls: Vec<String>,
}

impl RamDisk {
    pub(super) fn new(sectors: usize) -> Self {
        let bytes = (0..sectors * SECTOR as usize).map(|n| (n / 512) as u8).collect();
        Self { bytes, read_only: false, broken: None, calls: Vec::new() }
    }

    fn note(&mut self, call: String) -> io::Result<()> {
        self.calls.push(call);
        self.broken.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

impl BlockBackend for RamDisk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read<B: BitmapSlice>(&mut self, offset: u64, to: &Buffers<'_, B>) -> io::Result<()> {
        self.note(format!("read {offset}+{}", to.len()))?;
        let at = offset as usize;
        assert_eq!(to.copy_from(0, &self.bytes[at..at + to.len()]), to.len());
        Ok(())
    }

    fn write<B: BitmapSlice>(&mut self, offset: u64, from: &Buffers<'_, B>) -> io::Result<()> {
        self.note(format!("write {offset}+{}", from.len()))?;
        let at = offset as usize;
        assert_eq!(from.copy_to(0, &mut self.bytes[at..at + from.len()]), from.len());
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.note("flush".into())
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        assert!(offset + len <= self.size());
        self.note(format!("discard {offset}+{len}"))
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        assert!(offset + len <= self.size());
        self.note(format!("zero {offset}+{len} {unmap}"))
    }
}

pub(super) fn block(disk: RamDisk) -> Block<RamDisk> {
    Block::new(disk, "disk-0", Cache::Writeback)
}

impl<B: BlockBackend> Driver<Block<B>> {
    pub(super) fn header(&self, kind: u32, sector: u64) {
        self.put(HEADER_AT, &[kind.to_le_bytes(), [0; 4]].concat());
        self.put(HEADER_AT + 8, &sector.to_le_bytes());
        self.put(STATUS_AT, &[UNTOUCHED]);
    }

    /// One request with `data` between header and status. Gives status and used length.
    pub(super) fn block_request(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[(u64, u32, u16)],
    ) -> (u8, u32) {
        self.header(kind, sector);
        let mut chain = vec![(HEADER_AT, 16, 0)];
        chain.extend(data);
        chain.push((STATUS_AT, 1, WRITE));
        let written = self.request(0, &chain);
        (self.peek(STATUS_AT, 1)[0], written)
    }
}

impl Driver<Block<RamDisk>> {
    pub(super) fn calls(&self) -> Vec<String> {
        self.handle.with_device(|block| std::mem::take(&mut block.backend_mut().calls))
    }
}
