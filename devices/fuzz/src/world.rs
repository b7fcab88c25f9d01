//! The machine around a device, and its guest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Instant;

use arbitrary::{Result, Unstructured};
use devices::virtio::{Handle, MmioTransport, QueueNotifier, VirtioControl, VirtioDevice};
use devices::{BusDevice, InterruptLine, Payload, Persist};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::subjects::{Memory, Subject};

const PAGE: usize = 4096;
/// Two regions that touch, and one beyond a hole.
const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x8000), (0x1_8000, 0x8000)];
/// End of guest memory.
const END: u64 = 0x2_0000;
/// Where chains of the well-behaved kind have their data, each buffer in a page of its own: else
/// the mark of one hides that another has none.
const DATA: u64 = 0x5000;
/// Where indirect tables are.
const TABLE: u64 = 0x1_C000;
/// Steps of one run.
const STEPS: usize = 64;
/// A device that is asked to look again so often has no end.
const ROUNDS: usize = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const NEEDS_RESET: u32 = 64;
const DRIVER_OK: u32 = 4;
const EVENT_IDX: u64 = 1 << 29;

/// Registers (virtio 1.2, section 4.2.2).
mod reg {
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const PLACES: [u64; 3] = [0x080, 0x090, 0x0A0];
    pub const ALL: [u64; 16] = [
        0x014, 0x020, 0x024, 0x030, 0x038, 0x044, 0x050, 0x064, 0x070, 0x080, 0x084, 0x090, 0x0A0,
        0x0AC, 0x100, 0x104,
    ];
}

#[derive(Default)]
struct Line(AtomicU64);

impl InterruptLine for Line {
    fn pulse(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Which queues are to be looked at, as bits.
#[derive(Default)]
struct Kicks(AtomicU64);

impl QueueNotifier for Kicks {
    fn notify(&self, index: usize) {
        self.0.fetch_or(1 << index, Ordering::Relaxed);
    }
}

/// A device in a machine.
pub(crate) struct World<S: Subject> {
    pub(crate) memory: Memory,
    pub(crate) transport: MmioTransport<S::Device, Memory>,
    pub(crate) handle: Handle<S::Device, Memory>,
    subject: S,
    line: Arc<Line>,
    kicks: Arc<Kicks>,
    available: [u16; 4],
    next_descriptor: [u16; 4],
    queues: usize,
}

/// What the device did is looked at by comparing memory.
struct Before(Vec<u8>);

pub(crate) fn memory() -> Memory {
    let ranges = REGIONS.map(|(gpa, len)| (GuestAddress(gpa), len));
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

impl<S: Subject> World<S> {
    pub(crate) fn new(memory: Memory) -> Self {
        let (device, subject) = S::make(&memory);
        let (line, kicks) = (Arc::<Line>::default(), Arc::<Kicks>::default());
        let transport =
            MmioTransport::new(device, memory.clone(), line.clone() as _, kicks.clone() as _);
        let handle = transport.handle();
        let (available, next_descriptor) = ([0; 4], [0; 4]);
        Self {
            memory,
            transport,
            handle,
            subject,
            line,
            kicks,
            available,
            next_descriptor,
            queues: 1,
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

    fn contents(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(REGIONS.iter().map(|(_, len)| len).sum());
        for (gpa, len) in REGIONS {
            let start = all.len();
            all.resize(start + len, 0);
            self.memory.read_slice(&mut all[start..], GuestAddress(gpa)).unwrap();
        }
        all
    }

    fn before(&self) -> Before {
        for region in self.memory.iter() {
            let _ = region.get_mmap().bitmap().get_and_reset();
        }
        Before(self.contents())
    }

    /// Every page that is different is marked.
    fn check_marks(&self, before: &Before) {
        let now = self.contents();
        let mut at = 0;
        for (gpa, len) in REGIONS {
            let region = self.memory.find_region(GuestAddress(gpa)).unwrap();
            for page in (0..len).step_by(PAGE) {
                let range = at + page..at + page + PAGE;
                let same = before.0[range.clone()] == now[range];
                assert!(
                    same || region.bitmap().dirty_at(page),
                    "{:#x} unmarked",
                    gpa + page as u64
                );
            }
            at += len;
        }
    }

    /// Something that may have the device write to memory or break.
    fn watched(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let before = self.before();
        let broken = self.get(reg::STATUS) & NEEDS_RESET;
        let count = self.handle.metrics().needs_resets.get();
        let edges = self.line.0.load(Ordering::Relaxed);
        let result = work(self);
        self.check_marks(&before);
        let status = self.get(reg::STATUS);
        let counted = self.handle.metrics().needs_resets.get() - count;
        let breaks = broken == 0 && status & NEEDS_RESET != 0;
        assert_eq!(counted, u64::from(breaks));
        if breaks && status & DRIVER_OK != 0 {
            assert_ne!(self.get(reg::INTERRUPT_STATUS) & 2, 0);
            assert!(self.line.0.load(Ordering::Relaxed) > edges);
        }
        result
    }

    /// The worker looks at the queues it was told of, until it is told of no more.
    fn work(&mut self) {
        for _ in 0..ROUNDS {
            let kicked = self.kicks.0.swap(0, Ordering::Relaxed);
            if kicked == 0 {
                return;
            }
            for index in (0..64).filter(|index| kicked >> index & 1 != 0) {
                self.handle.process_queue(index);
            }
        }
        // Requests can write to the rings, so that one gives the next: no end, but no loop within.
        self.kicks.0.store(0, Ordering::Relaxed);
    }

    fn negotiate(&mut self, without: u64) {
        self.set(reg::STATUS, 0);
        self.set(reg::STATUS, 1);
        self.set(reg::STATUS, 3);
        for half in 0..2 {
            self.set(reg::DEVICE_FEATURES_SEL, half);
            self.set(reg::DRIVER_FEATURES_SEL, half);
            let offered = self.get(reg::DEVICE_FEATURES);
            self.set(reg::DRIVER_FEATURES, offered & !(without >> (32 * half)) as u32);
        }
        self.set(reg::STATUS, 11);
    }

    fn rings(index: usize) -> [u64; 3] {
        let base = index as u64 * 0x1000 + 0x1000;
        [base, base + 0x400, base + 0x800]
    }

    fn place(&mut self, index: usize, size: u32, rings: [u64; 3]) {
        self.set(reg::QUEUE_SEL, index as u32);
        self.set(reg::QUEUE_NUM, size);
        for (register, address) in reg::PLACES.into_iter().zip(rings) {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(reg::QUEUE_READY, 1);
    }

    fn set_up_queues(&mut self) {
        for index in 0..4 {
            self.set(reg::QUEUE_SEL, index as u32);
            let size = self.get(reg::QUEUE_NUM_MAX).min(64);
            if size == 0 {
                break;
            }
            self.queues = index + 1;
            let rings = Self::rings(index);
            self.memory.write_slice(&[0; 0x1000], GuestAddress(rings[0])).unwrap();
            self.place(index, size, rings);
            (self.available[index], self.next_descriptor[index]) = (0, 0);
        }
    }

    fn live(&mut self, without: u64) {
        self.negotiate(without);
        self.set_up_queues();
        self.set(reg::STATUS, 15);
    }

    /// A guest may write where it likes; where there is no memory it does not.
    fn put(&self, gpa: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(gpa));
    }

    fn descriptor(&self, table: u64, index: u16, (gpa, len, flags): (u64, u32, u16), next: u16) {
        let bytes =
            [&gpa.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.put(table.wrapping_add(u64::from(index) * 16), &bytes.concat());
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let available = Self::rings(queue)[1];
        let at = self.available[queue];
        self.put(available + 4 + 2 * u64::from(at % 64), &head.to_le_bytes());
        self.available[queue] = at.wrapping_add(1);
        self.put(available + 2, &self.available[queue].to_le_bytes());
    }

    /// One of the queues that the device has.
    fn queue(&self, input: &mut Unstructured<'_>) -> Result<usize> {
        input.int_in_range(0..=self.queues - 1)
    }

    /// Buffers of whatever size and place; those to read come first.
    fn buffers(&self, input: &mut Unstructured<'_>) -> Result<Vec<(u64, u32, u16)>> {
        let mut buffers = Vec::new();
        for flags in [0, WRITE] {
            for _ in 0..input.int_in_range(0..=3)? {
                let len = match input.int_in_range(0..=5)? {
                    0 => input.int_in_range(0..=40)?,
                    1 => 16,
                    2 => 1,
                    3 => input.int_in_range(0..=0x8000)?,
                    _ => 512 * input.int_in_range(0..=4)?,
                };
                let gpa = if input.ratio(7, 8)? {
                    DATA + buffers.len() as u64 * 0x1000
                } else {
                    address(input)?
                };
                if flags == 0 {
                    if input.arbitrary()? {
                        self.put(gpa, input.bytes(8)?);
                    } else {
                        // A list of pages.
                        for n in 0..4 {
                            let page = input.int_in_range(0..=0x22u32)?;
                            self.put(gpa.wrapping_add(4 * n), &page.to_le_bytes());
                        }
                    }
                }
                buffers.push((gpa, len, flags));
            }
        }
        Ok(buffers)
    }

    /// Buffers of a request of a disk.
    fn disk_request(&self, input: &mut Unstructured<'_>) -> Result<Vec<(u64, u32, u16)>> {
        let kind: u32 = input.int_in_range(0..=14)?;
        let sector: u64 = input.int_in_range(0..=70)?;
        self.put(DATA, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        let mut buffers = vec![(DATA, 16, 0)];
        let flags = if kind == 0 || kind == 8 { WRITE } else { 0 };
        for n in 0..input.int_in_range(0..=3)? {
            let gpa = if input.ratio(3, 4)? { DATA + 0x1000 * (n + 1) } else { address(input)? };
            // A range of a discard is a buffer to read as well.
            let sector: u64 = input.int_in_range(0..=70)?;
            let sectors: u32 = input.int_in_range(0..=70)?;
            let len = match kind {
                11 | 13 => {
                    self.put(
                        gpa,
                        &[sector.to_le_bytes(), u64::from(sectors).to_le_bytes()].concat(),
                    );
                    16
                }
                _ => 512 * input.int_in_range(0..=4)?,
            };
            buffers.push((gpa, len, flags));
        }
        buffers.push((DATA + 0x7F0, 1, WRITE));
        Ok(buffers)
    }

    /// A chain without mistakes in its descriptors.
    fn chain(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let queue = self.queue(input)?;
        let buffers =
            if input.ratio(1, 3)? { self.disk_request(input)? } else { self.buffers(input)? };
        let last = buffers.len().wrapping_sub(1);
        if last == usize::MAX {
            return Ok(());
        }
        let head = self.next_descriptor[queue];
        if input.ratio(1, 3)? {
            for (n, buffer) in buffers.iter().enumerate() {
                let flags = buffer.2 | if n == last { 0 } else { NEXT };
                self.descriptor(TABLE, n as u16, (buffer.0, buffer.1, flags), n as u16 + 1);
            }
            let table = (TABLE, 16 * buffers.len() as u32, INDIRECT);
            self.descriptor(Self::rings(queue)[0], head, table, 0);
            self.next_descriptor[queue] = (head + 1) % 64;
        } else {
            for (n, buffer) in buffers.iter().enumerate() {
                let index = (head + n as u16) % 64;
                let flags = buffer.2 | if n == last { 0 } else { NEXT };
                let next = (index + 1) % 64;
                self.descriptor(Self::rings(queue)[0], index, (buffer.0, buffer.1, flags), next);
            }
            self.next_descriptor[queue] = (head + buffers.len() as u16) % 64;
        }
        self.publish(queue, head);
        Ok(())
    }

    fn saved(&self) -> [Payload; 2] {
        [self.transport.save_payload(0).unwrap(), self.handle.save_device(0).unwrap()]
    }

    /// The machine goes on in another process.
    fn move_away(&mut self) {
        self.handle.quiesce(Instant::now()).unwrap();
        let saved = self.saved();
        let mut there = Self::new(self.memory.clone());
        there.handle.quiesce(Instant::now()).unwrap();
        there.transport.restore_payload(&saved[0]).unwrap();
        there.handle.restore_device(&saved[1]).unwrap();
        assert_eq!(there.saved(), saved);
        assert_eq!(there.line.0.load(Ordering::Relaxed), 0, "restoring raises nothing");
        there.handle.raise_pending();
        let status = there.get(reg::STATUS);
        if status & DRIVER_OK != 0 && status & (NEEDS_RESET | 128) == 0 {
            assert_eq!(there.line.0.load(Ordering::Relaxed), 1, "one forced notification");
        }
        there.handle.resume();
        there.available = self.available;
        there.next_descriptor = self.next_descriptor;
        there.queues = self.queues;
        *self = there;
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=19)? {
            0..=5 => self.chain(input)?,
            6..=8 => {
                let queue: u32 = input.int_in_range(0..=3)?;
                self.watched(|world| {
                    world.set(reg::QUEUE_NOTIFY, queue);
                    world.kicks.notify(queue as usize);
                    world.work();
                    Ok(())
                })?;
            }
            9 | 10 => self.watched(|world| {
                let result = world.subject.event(&world.handle, input);
                world.work();
                result
            })?,
            11 => {
                let register = *input.choose(&reg::ALL)?;
                let value = match input.int_in_range(0..=2)? {
                    0 => input.int_in_range(0..=16)?,
                    1 => input.int_in_range(0..=0x40)? * 0x1000,
                    _ => input.arbitrary()?,
                };
                self.watched(|world| {
                    world.set(register, value);
                    world.work();
                    Ok(())
                })?;
            }
            12 => {
                let offset = input.int_in_range(0..=0xFFF)?;
                let mut data = input.bytes(8)?[..input.int_in_range(0..=8)?].to_vec();
                if input.arbitrary()? {
                    self.transport.write(offset, &data);
                } else {
                    self.transport.read(offset, &mut data);
                }
            }
            13 => {
                let queue = self.queue(input)?;
                let table = if input.arbitrary()? { TABLE } else { Self::rings(queue)[0] };
                let (index, flags) = (input.int_in_range(0..=70)?, input.int_in_range(0..=7)?);
                let gpa = if input.ratio(1, 4)? { TABLE } else { address(input)? };
                let len = match input.int_in_range(0..=2)? {
                    0 => input.int_in_range(0..=64)?,
                    1 => 16 * input.int_in_range(0..=64)?,
                    _ => input.arbitrary()?,
                };
                self.descriptor(table, index, (gpa, len, flags), input.int_in_range(0..=70)?);
                self.publish(queue, index);
            }
            14 => {
                let queue = self.queue(input)?;
                let jump: u16 = if input.arbitrary()? {
                    input.arbitrary()?
                } else {
                    input.int_in_range(0..=65)?
                };
                self.available[queue] = self.available[queue].wrapping_add(jump);
                self.put(Self::rings(queue)[1] + 2, &self.available[queue].to_le_bytes());
            }
            15 => {
                let gpa = address(input)?;
                let bytes = input.bytes(8)?;
                self.put(gpa, bytes);
            }
            16 => {
                let before = self.before();
                self.move_away();
                self.work();
                self.check_marks(&before);
            }
            17 => {
                let without = if input.arbitrary()? {
                    EVENT_IDX
                } else {
                    input.arbitrary::<u64>()? & 0xFFFF_FFFF
                };
                self.live(without);
            }
            18 => {
                self.negotiate(0);
                let queue = self.queue(input)?;
                let size = if input.arbitrary()? {
                    1 << input.int_in_range(0..=9)?
                } else {
                    input.arbitrary()?
                };
                let rings = [address(input)?, address(input)?, address(input)?];
                self.watched(|world| {
                    world.place(queue, size, rings);
                    Ok(())
                })?;
                self.set(reg::STATUS, 15);
            }
            _ => {
                self.handle.quiesce(Instant::now()).unwrap();
                let before = self.before();
                self.kicks.0.store(7, Ordering::Relaxed);
                self.work();
                assert!(before.0 == self.contents(), "it works although it is quiesced");
                self.handle.resume();
            }
        }
        self.set(reg::INTERRUPT_ACK, 1);
        Ok(())
    }
}

impl<S: Subject> World<S> {
    /// A state worth saving.
    pub(crate) fn prepare(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        if input.ratio(3, 4)? {
            self.live(0);
        }
        self.run_on(input)
    }

    /// A few steps.
    pub(crate) fn run_on(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..input.int_in_range(0..=6)? {
            self.step(input)?;
        }
        Ok(())
    }
}

/// Places that are likely to matter.
fn address(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match input.int_in_range(0..=5)? {
        0 => 0x8000 - u64::from(input.arbitrary::<u8>()?),
        1 => END - u64::from(input.arbitrary::<u8>()?),
        2 => 0x1_0000 - u64::from(input.arbitrary::<u8>()?),
        3 => input.arbitrary()?,
        4 => 16 * input.int_in_range(0..=END / 16)?,
        _ => input.int_in_range(0..=END)?,
    })
}

/// One run of a guest.
pub(crate) fn drive<S: Subject>(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let mut world = World::<S>::new(memory());
    world.live(0);
    for _ in 0..STEPS {
        if input.is_empty() || world.step(&mut input).is_err() {
            break;
        }
    }
    world.must_recover();
}

impl<S: Subject> World<S> {
    /// Whatever was done: after a reset the device can be set up again.
    pub(crate) fn must_recover(&mut self) {
        self.watched(|world| {
            world.live(0);
            world.work();
            Ok(())
        })
        .unwrap();
        assert_eq!(self.get(reg::STATUS), 15, "{} does not come back", S::Device::NAME);
        for index in 0..4 {
            self.set(reg::QUEUE_SEL, index);
            let exists = self.get(reg::QUEUE_NUM_MAX) != 0;
            assert_eq!(self.get(reg::QUEUE_READY), u32::from(exists));
        }
    }
}
