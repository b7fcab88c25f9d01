//! The live block device.

use std::io;
use std::sync::Arc;

use tracing::warn;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::GuestMemory;

use super::request::{
    Header, Range, Status, FLAG_UNMAP, HEADER, RANGE, TYPE_DISCARD, TYPE_FLUSH, TYPE_GET_ID,
    TYPE_IN, TYPE_OUT, TYPE_WRITE_ZEROES,
};
use super::{BlockBackend, BlockMetrics};
use crate::virtio::ids::device_id;
use crate::virtio::{Buffers, Chain, Context, DeviceError, Progress, VirtioDevice};

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 256;
/// The unit of addresses on a disk, bytes, whatever its block size.
pub const SECTOR: u64 = 512;
/// Bytes of a disk's id as the guest reads it.
pub const ID_BYTES: usize = 20;

/// Most buffers of one request: those of the queue, without header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Largest buffer, bytes. With the above it bounds what one request may move, and so how long
/// quiescing waits for it.
const MAX_SEGMENT: u32 = 256 << 10;
/// Most bytes of one request.
const MAX_REQUEST: u64 = MAX_SEGMENTS as u64 * MAX_SEGMENT as u64;
/// Most ranges of one discard.
const MAX_DISCARD_RANGES: u32 = 16;
/// Most ranges of one write-zeroes.
const MAX_ZERO_RANGES: u32 = 1;
/// Most sectors of one range of a discard: 2 GiB.
const MAX_DISCARD: u32 = 4 << 20;
/// Most sectors of one range of write-zeroes: 64 MiB, since they may have to be written.
const MAX_ZERO: u32 = 128 << 10;
/// Where discards should begin, sectors: a page of the host's cache.
const DISCARD_ALIGNMENT: u32 = 8;

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// When what the guest wrote is on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// When the guest flushes, as with the cache of a disk; with each write for a driver that
    /// cannot flush.
    #[default]
    Writeback,
    /// With each write.
    Writethrough,
    /// Whenever the host likes: flushes do nothing. For disks that may be lost.
    Unsafe,
}

/// A disk for the guest, on `B`.
#[derive(Debug)]
pub struct Block<B: BlockBackend> {
    pub(super) backend: B,
    pub(super) id: [u8; ID_BYTES],
    cache: Cache,
    /// Each write is followed by a flush.
    write_through: bool,
    metrics: Arc<BlockMetrics>,
}

impl<B: BlockBackend> Block<B> {
    /// A disk on `backend`, with an id that the guest may ask for: the first [`ID_BYTES`] bytes
    /// of it.
    pub fn new(backend: B, id: &str, cache: Cache) -> Self {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let write_through = cache == Cache::Writethrough;
        Self { backend, id: bytes, cache, write_through, metrics: Arc::default() }
    }

    /// The disk behind the device.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// The counters, readable without the device.
    #[must_use]
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Size, sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.backend.size() / SECTOR
    }

    /// Byte offset of `len` bytes from `sector` on, where the disk has them all.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        (offset.checked_add(len)? <= self.sectors() * SECTOR).then_some(offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.cache == Cache::Unsafe {
            return Ok(());
        }
        self.backend.flush()
    }

    /// Serves one request. Gives the number of bytes written from the beginning of its buffers.
    fn request<M: GuestMemory>(
        &mut self,
        index: usize,
        chain: &Chain<'_, M>,
    ) -> Result<u32, DeviceError> {
        let broken = |reason: &str| DeviceError::Request { index, reason: reason.into() };
        let header = chain
            .readable
            .array(0)
            .map(Header::parse)
            .ok_or_else(|| broken("a request is shorter than its header"))?;
        // Without a byte for the status there is no way to answer.
        let data_len = (chain.writable.len())
            .checked_sub(1)
            .ok_or_else(|| broken("a request has no room for its status"))?;
        let to_guest = chain.writable.part(0, data_len);
        let from_guest = chain.readable.part(HEADER, usize::MAX);

        let result = self.execute(header, &from_guest, &to_guest);
        let (status, written) = match result {
            Ok(written) => (Status::Ok, written),
            Err(Failure::Unsupported) => {
                self.metrics.unsupported.increment();
                (Status::Unsupported, 0)
            }
            Err(Failure::Io(error)) => {
                if self.metrics.errors.get() == 0 {
                    warn!(%error, request = header.kind, sector = header.sector, "disk error");
                }
                self.metrics.errors.increment();
                (Status::IoError, 0)
            }
        };
        let _ = chain.writable.copy_from(data_len, &[status as u8]);
        // The status counts where nothing before it was left out. Chains are below 4 GiB.
        Ok(if written == data_len { data_len as u32 + 1 } else { written as u32 })
    }

    /// Gives the number of bytes written to `to_guest`.
    fn execute<S: BitmapSlice>(
        &mut self,
        header: Header,
        from_guest: &Buffers<'_, S>,
        to_guest: &Buffers<'_, S>,
    ) -> Result<usize, Failure> {
        match header.kind {
            TYPE_IN => {
                let offset = self.data_offset(header.sector, to_guest.len())?;
                self.backend.read(offset, to_guest)?;
                self.metrics.reads.increment();
                self.metrics.bytes_read.add(to_guest.len() as u64);
                Ok(to_guest.len())
            }
            TYPE_OUT => {
                self.check_writable()?;
                let offset = self.data_offset(header.sector, from_guest.len())?;
                self.backend.write(offset, from_guest)?;
                if self.write_through {
                    self.flush()?;
                }
                self.metrics.writes.increment();
                self.metrics.bytes_written.add(from_guest.len() as u64);
                Ok(0)
            }
            TYPE_FLUSH => {
                self.flush()?;
                self.metrics.flushes.increment();
                Ok(0)
            }
            TYPE_GET_ID => Ok(to_guest.copy_from(0, &self.id)),
            TYPE_DISCARD => self.clear(from_guest, Clear::Discard),
            TYPE_WRITE_ZEROES => self.clear(from_guest, Clear::WriteZeroes),
            _ => Err(Failure::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.backend.is_read_only() {
            return Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into());
        }
        Ok(())
    }

    fn data_offset(&self, sector: u64, len: usize) -> Result<u64, Failure> {
        let len = len as u64;
        if len % SECTOR != 0 || len > MAX_REQUEST {
            return Err(bad_request("length of data"));
        }
        self.offset(sector, len).ok_or_else(|| bad_request("sector beyond the end of the disk"))
    }

    /// All ranges are checked before the first is cleared.
    fn clear<S: BitmapSlice>(
        &mut self,
        from_guest: &Buffers<'_, S>,
        what: Clear,
    ) -> Result<usize, Failure> {
        self.check_writable()?;
        let (max_ranges, max_sectors, known_flags) = match what {
            Clear::Discard => (MAX_DISCARD_RANGES, MAX_DISCARD, 0),
            Clear::WriteZeroes => (MAX_ZERO_RANGES, MAX_ZERO, FLAG_UNMAP),
        };
        let count = from_guest.len() / RANGE;
        if count == 0 || count > max_ranges as usize || from_guest.len() % RANGE != 0 {
            return Err(bad_request("number of ranges"));
        }
        let mut ranges = Vec::with_capacity(count);
        for n in 0..count {
            let bytes =
                from_guest.array(n * RANGE).ok_or_else(|| bad_request("number of ranges"))?;
            let range = Range::parse(bytes);
            // Section 5.2.6.2: unknown flags, and unmap in a discard.
            if range.flags & !known_flags != 0 {
                return Err(Failure::Unsupported);
            }
            let len = u64::from(range.sectors) * SECTOR;
            let offset = self.offset(range.sector, len);
            let (Some(offset), true) = (offset, range.sectors <= max_sectors) else {
                return Err(bad_request("range"));
            };
            if len > 0 {
                ranges.push((offset, len, range.flags & FLAG_UNMAP != 0));
            }
        }
        for (offset, len, unmap) in ranges {
            match what {
                Clear::Discard => self.backend.discard(offset, len)?,
                Clear::WriteZeroes => self.backend.write_zeroes(offset, len, unmap)?,
            }
        }
        if self.write_through {
            self.flush()?;
        }
        self.metrics.clears.increment();
        Ok(0)
    }
}

#[derive(Debug, Clone, Copy)]
enum Clear {
    Discard,
    WriteZeroes,
}

/// Why a request was not done; the guest's driver is told.
enum Failure {
    Unsupported,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn bad_request(what: &str) -> Failure {
    Failure::Io(io::Error::new(io::ErrorKind::InvalidInput, format!("bad {what}")))
}

impl<B: BlockBackend> VirtioDevice for Block<B> {
    const DEVICE_ID: u32 = device_id::BLOCK;
    const NAME: &'static str = "virtio-block";

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let mut features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE;
        if self.backend.is_read_only() {
            return features | F_RO;
        }
        features |= F_DISCARD | F_WRITE_ZEROES;
        if self.cache != Cache::Writethrough {
            features |= F_FLUSH;
        }
        features
    }

    /// Section 5.2.4, up to the fields of write-zeroes.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        put(8, &MAX_SEGMENT.to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(36, &MAX_DISCARD.to_le_bytes());
        put(40, &MAX_DISCARD_RANGES.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        put(48, &MAX_ZERO.to_le_bytes());
        put(52, &MAX_ZERO_RANGES.to_le_bytes());
        // write_zeroes_may_unmap
        put(56, &[1]);
        config
    }

    fn activate(&mut self, features: u64) {
        // Section 5.2.6.2: a driver without FLUSH expects its writes to be stable.
        self.write_through = features & F_FLUSH == 0;
    }

    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        context.serve(index, |chain| self.request(index, chain))
    }
}
