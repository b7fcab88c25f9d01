//! The other side: a guest's driver, in a little memory, that keeps the rules or breaks them.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc};

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::ids::{features, status};
use super::mmio::register as reg;
use super::{Context, DeviceError, Progress};
use super::{Handle, MmioTransport, QueueNotifier, VirtioControl, VirtioDevice};
use crate::test_utils::CountingLine;
use crate::{BusDevice, Persist, PersistError};

pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// Two regions that touch, so that a buffer may lie across.
pub(crate) const MEMORY_SIZE: u64 = 0x10_0000;
/// Where tests put their data.
pub(crate) const DATA: u64 = 0x4_0000;
/// End of the first region.
pub(crate) const SEAM: u64 = 0x8_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) fn memory() -> Memory {
    Memory::from_ranges(&[
        (GuestAddress(0), SEAM as usize),
        (GuestAddress(SEAM), (MEMORY_SIZE - SEAM) as usize),
    ])
    .unwrap()
}

/// Counts notifications by queue.
#[derive(Default)]
pub(crate) struct Kicks([AtomicU64; 4]);

impl Kicks {
    pub(crate) fn take(&self, index: usize) -> u64 {
        self.0[index].swap(0, Ordering::SeqCst)
    }
}

impl QueueNotifier for Kicks {
    fn notify(&self, index: usize) {
        self.0[index].fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Debug, Clone, Copy)]
struct DriverQueue {
    size: u16,
    available: u16,
    next_descriptor: u16,
    seen_used: u16,
}

/// A driver with its device.
pub(crate) struct Driver<D: VirtioDevice> {
    pub(crate) transport: MmioTransport<D, Memory>,
    pub(crate) handle: Handle<D, Memory>,
    pub(crate) memory: Memory,
    pub(crate) line: Arc<CountingLine>,
    pub(crate) kicks: Arc<Kicks>,
    queues: Vec<DriverQueue>,
}

/// Writes that read well in tests.
pub(crate) trait WriteObject {
    fn write_obj_at(&self, gpa: u64, value: u32);
}

impl WriteObject for Memory {
    fn write_obj_at(&self, gpa: u64, value: u32) {
        self.write_obj(value, GuestAddress(gpa)).unwrap();
    }
}

/// The one feature of the probe.
pub(crate) const PROBE_FEATURE: u64 = 1 << 5;

/// A device that copies what it reads to where it writes.
pub(crate) struct Probe {
    pub(crate) config: [u8; 8],
    /// Features, while it is live.
    pub(crate) active: Option<u64>,
    /// Tells that a request began, and waits before it ends; once.
    pub(crate) block_on: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

impl Default for Probe {
    fn default() -> Self {
        Self { config: [1, 2, 3, 4, 5, 6, 7, 8], active: None, block_on: None }
    }
}

impl VirtioDevice for Probe {
    const DEVICE_ID: u32 = 42;
    const NAME: &'static str = "probe";

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }

    fn features(&self) -> u64 {
        PROBE_FEATURE
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) -> bool {
        match (offset, data) {
            (0, &[byte]) => {
                self.config[0] = byte;
                true
            }
            _ => false,
        }
    }

    fn activate(&mut self, features: u64) {
        self.active = Some(features);
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn process_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        let block_on = self.block_on.take();
        context.serve(index, |chain| {
            if let Some((entered, release)) = &block_on {
                entered.send(()).unwrap();
                release.recv().unwrap();
            }
            let mut bytes = vec![0; chain.readable.len().min(0x10000)];
            let read = chain.readable.copy_to(0, &mut bytes);
            Ok(chain.writable.copy_from(0, &bytes[..read]) as u32)
        })
    }
}

/// Its state is of no interest.
impl Persist for Probe {
    const KIND: &'static str = "probe";
    const VERSION: u16 = 1;
    type State = ();
    type Error = PersistError;

    fn save(&self) -> Result<(), PersistError> {
        Ok(())
    }

    fn restore(&mut self, (): &()) -> Result<(), PersistError> {
        Ok(())
    }
}

/// Ring addresses of queue `index`: descriptors, available, used.
pub(crate) fn rings(index: usize) -> [u64; 3] {
    let base = 0x1000 + index as u64 * 0x4000;
    [base, base + 0x1000, base + 0x2000]
}

impl<D: VirtioDevice> Driver<D> {
    /// A device that no driver has seen.
    pub(crate) fn idle(device: D) -> Self {
        Self::over(memory(), device)
    }

    /// The same over memory that is there already.
    pub(crate) fn over(memory: Memory, device: D) -> Self {
        let line = Arc::new(CountingLine::default());
        let kicks = Arc::new(Kicks::default());
        let transport = MmioTransport::new(device, memory.clone(), line.clone(), kicks.clone());
        let handle = transport.handle();
        Self { transport, handle, memory, line, kicks, queues: Vec::new() }
    }

    /// A device whose driver is set up, with all features that are offered but `without`.
    pub(crate) fn live(device: D, without: u64) -> Self {
        let mut driver = Self::idle(device);
        driver.negotiate(without);
        driver.set_up_queues();
        driver.set(reg::STATUS, 15);
        assert_eq!(driver.get(reg::STATUS), 15);
        driver.kicks.0.iter().for_each(|kicks| kicks.store(0, Ordering::SeqCst));
        driver
    }

    pub(crate) fn negotiate(&mut self, without: u64) {
        self.set(reg::STATUS, 0);
        self.set(reg::STATUS, status::ACKNOWLEDGE);
        self.set(reg::STATUS, 3);
        let wanted = self.offered() & !without;
        for half in 0..2 {
            self.set(reg::DRIVER_FEATURES_SEL, half);
            self.set(reg::DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
        }
        self.set(reg::STATUS, 11);
    }

    pub(crate) fn offered(&mut self) -> u64 {
        let mut offered = 0;
        for half in 0..2 {
            self.set(reg::DEVICE_FEATURES_SEL, half);
            offered |= u64::from(self.get(reg::DEVICE_FEATURES)) << (32 * half);
        }
        assert_ne!(offered & features::VERSION_1, 0);
        offered
    }

    pub(crate) fn set_up_queues(&mut self) {
        self.queues.clear();
        for index in 0..4 {
            self.set(reg::QUEUE_SEL, index);
            let size = self.get(reg::QUEUE_NUM_MAX);
            if size == 0 {
                break;
            }
            self.memory.write_slice(&[0; 0x4000], GuestAddress(rings(index as usize)[0])).unwrap();
            self.place(size, rings(index as usize));
            self.set(reg::QUEUE_READY, 1);
            self.queues.push(DriverQueue {
                size: size as u16,
                available: 0,
                next_descriptor: 0,
                seen_used: 0,
            });
        }
    }

    /// Writes the registers of the selected queue.
    pub(crate) fn place(&mut self, size: u32, rings: [u64; 3]) {
        self.set(reg::QUEUE_NUM, size);
        for (register, address) in
            [reg::QUEUE_DESC_LOW, reg::QUEUE_DRIVER_LOW, reg::QUEUE_DEVICE_LOW].iter().zip(rings)
        {
            self.set(*register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
    }

    pub(crate) fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub(crate) fn get(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn config<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0xAA; N];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.get(reg::STATUS) & status::DEVICE_NEEDS_RESET != 0
    }

    /// Writes one descriptor.
    pub(crate) fn descriptor(
        &mut self,
        table: u64,
        index: u16,
        (address, len, flags): (u64, u32, u16),
        next: u16,
    ) {
        let at = |offset| GuestAddress(table + u64::from(index) * 16 + offset);
        self.memory.write_obj(address, at(0)).unwrap();
        self.memory.write_obj(len, at(8)).unwrap();
        self.memory.write_obj(flags, at(12)).unwrap();
        self.memory.write_obj(next, at(14)).unwrap();
    }

    /// Makes a chain available to the device.
    pub(crate) fn publish(&mut self, queue: usize, head: u16) {
        let [_, available, _] = rings(queue);
        let state = &mut self.queues[queue];
        let entry = 4 + u64::from(state.available % state.size) * 2;
        self.memory.write_obj(head, GuestAddress(available + entry)).unwrap();
        state.available = state.available.wrapping_add(1);
        self.memory.write_obj(state.available, GuestAddress(available + 2)).unwrap();
    }

    /// Adds a chain of buffers (address, length, flags). Gives its head.
    pub(crate) fn add(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let table = rings(queue)[0];
        let size = self.queues[queue].size;
        let first = self.queues[queue].next_descriptor;
        for (n, (address, len, flags)) in buffers.iter().enumerate() {
            let index = (first + n as u16) % size;
            let last = n + 1 == buffers.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.descriptor(table, index, (*address, *len, flags), (index + 1) % size);
        }
        self.queues[queue].next_descriptor = (first + buffers.len() as u16) % size;
        self.publish(queue, first);
        first
    }

    /// With EVENT_IDX: the driver wants an interrupt when the used index passes `mark`.
    pub(crate) fn want_interrupt_after(&mut self, queue: usize, mark: u16) {
        let at = rings(queue)[1] + 4 + 2 * u64::from(self.queues[queue].size);
        self.memory.write_obj(mark, GuestAddress(at)).unwrap();
    }

    /// What the device gave back since the last call: head and length.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let used = rings(queue)[2];
        let state = &mut self.queues[queue];
        let now: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let mut all = Vec::new();
        while state.seen_used != now {
            let at = used + 4 + u64::from(state.seen_used % state.size) * 8;
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
            all.push((head as u16, len));
            state.seen_used = state.seen_used.wrapping_add(1);
        }
        all
    }

    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn peek(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// Forgets which pages were written.
    pub(crate) fn forget_dirty(&self) {
        for region in self.memory.iter() {
            let _ = region.get_mmap().bitmap().get_and_reset();
        }
    }

    /// Whether the page of `gpa` was written since.
    pub(crate) fn is_dirty(&self, gpa: u64) -> bool {
        let region = self.memory.find_region(GuestAddress(gpa)).unwrap();
        region.get_mmap().bitmap().dirty_at((gpa - region.start_addr().0) as usize)
    }
}

impl<D: VirtioDevice + Persist<Error = PersistError>> Driver<D> {
    pub(crate) fn run(&mut self, queue: usize) {
        self.handle.process_queue(queue);
    }

    /// Adds a chain and has it served. Gives the number of bytes written.
    pub(crate) fn request(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u32 {
        let head = self.add(queue, buffers);
        self.run(queue);
        let used = self.used(queue);
        assert_eq!(used.len(), 1, "one chain, given back once");
        assert_eq!(used[0].0, head);
        used[0].1
    }

    /// The same machine in another process: saved, and restored around `device`.
    pub(crate) fn moved(&self, device: D) -> Self {
        let mut there = Self::over(self.memory.clone(), device);
        let transport = self.transport.save_payload(3).unwrap();
        let own = self.handle.save_device(3).unwrap();
        there.transport.restore_payload(&transport).unwrap();
        there.handle.restore_device(&own).unwrap();
        assert_eq!(there.transport.save_payload(3).unwrap(), transport);
        assert_eq!(there.handle.save_device(3).unwrap(), own);
        there.queues = self.queues.clone();
        there
    }
}
