//! The network card: frames in and out of smoltcp.
//!
//! Source: VIRTIO 1.2, 5.1.

use beacon_core::memory::FreeRam;
use beacon_core::queue::{Queue, Segment};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

use crate::phys::{self, Memory};
use crate::virtio::Device;

const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_STATUS: u64 = 1 << 16;
/// A control queue.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// The device may ask for an announcement.
pub const F_GUEST_ANNOUNCE: u64 = 1 << 21;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

/// `struct virtio_net_hdr`, with `num_buffers`, as always in virtio 1.
const HEADER: usize = 12;
/// Ethernet's.
const ETHERNET: usize = 14;
const MTU: usize = 1500;
const MTU_MAX: usize = 9000;
/// Room for a segment of the largest size that the device may pass on as one.
const LARGE: usize = 65_550;
/// Entries of each queue.
const QUEUE: u16 = 256;
/// Of the receive queue when all buffers are large.
const LARGE_QUEUE: u16 = 128;

/// A queue, and a buffer for each of its entries.
struct Ring {
    queue: Queue,
    memory: &'static mut [u8],
    size: usize,
}

impl Ring {
    fn new(
        device: &Device,
        ram: &mut FreeRam,
        index: u32,
        entries: u16,
        frame: usize,
        features: u64,
    ) -> Result<Self, &'static str> {
        let queue = device.queue(ram, index, entries, features)?;
        let size = (HEADER + frame).next_multiple_of(64);
        let memory = phys::bytes(ram, size * usize::from(queue.layout().size))
            .ok_or("no memory for the network's buffers")?;
        Ok(Self { queue, memory, size })
    }

    fn buffer(&mut self, index: u16) -> &mut [u8] {
        &mut self.memory[usize::from(index) * self.size..][..self.size]
    }

    fn address(&self, index: u16) -> u64 {
        self.memory.as_ptr() as u64 + u64::from(index) * self.size as u64
    }

    /// Offers a buffer to be filled.
    fn refill(&mut self, index: u16) {
        let segment = Segment::write(self.address(index), self.size as u32);
        self.queue.add(&Memory, &[segment], index);
    }
}

/// Counters since boot.
#[derive(Default)]
pub struct Counters {
    /// Frames received.
    pub received: u64,
    /// And their bytes, without the device's header.
    pub received_bytes: u64,
    /// Frames sent.
    pub sent: u64,
    /// And their bytes.
    pub sent_bytes: u64,
    /// The device gave back what it had not been given.
    pub broken: u64,
    /// Times that the device was notified.
    pub notifies: u64,
}

/// The card's receive and transmit queues.
pub struct Card {
    device: Device,
    receive: Ring,
    transmit: Ring,
    /// Buffers of `transmit` that are free.
    free: [u16; QUEUE as usize],
    free_count: usize,
    mtu: usize,
    offload: bool,
    /// What both sides can do.
    pub features: u64,
    /// The card's address.
    pub mac: [u8; 6],
    /// Counters.
    pub count: Counters,
}

impl Card {
    /// Negotiates and sets both queues up; the device does not run yet.
    pub fn new(device: Device, offload: bool, ram: &mut FreeRam) -> Result<Self, &'static str> {
        let mut wanted = F_MTU | F_MAC | F_STATUS | F_CTRL_VQ | F_GUEST_ANNOUNCE;
        if offload {
            wanted |= F_GUEST_CSUM | F_GUEST_TSO4;
        }
        let features = device.negotiate(wanted)?;
        let mtu = if features & F_MTU == 0 {
            MTU
        } else {
            ((device.config32(8) >> 16) as usize).clamp(68, MTU_MAX)
        };
        let large = features & F_GUEST_TSO4 != 0;
        let (entries, frame) = if large { (LARGE_QUEUE, LARGE) } else { (QUEUE, ETHERNET + mtu) };
        let receive = Ring::new(&device, ram, RECEIVE, entries, frame, features)?;
        let transmit = Ring::new(&device, ram, TRANSMIT, QUEUE, ETHERNET + mtu, features)?;
        let mac = if features & F_MAC == 0 {
            [2, 0, 0, 0, 0, 1]
        } else {
            core::array::from_fn(|index| device.config8(index as u64))
        };
        let free_count = usize::from(transmit.queue.layout().size);
        Ok(Self {
            device,
            receive,
            transmit,
            free: core::array::from_fn(|index| index as u16),
            free_count,
            mtu,
            offload: features & F_GUEST_CSUM != 0,
            features,
            mac,
            count: Counters::default(),
        })
    }

    /// Offers all receive buffers; the device must run.
    pub fn fill(&mut self) {
        for index in 0..self.receive.queue.layout().size {
            self.receive.refill(index);
        }
        self.publish();
    }

    /// Both queues.
    pub fn queues(&self) -> [&Queue; 2] {
        [&self.receive.queue, &self.transmit.queue]
    }

    /// Whether either queue has something to take.
    pub fn has_used(&self) -> bool {
        self.queues().iter().any(|queue| queue.has_used(&Memory))
    }

    /// The largest IP packet.
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// Takes the buffers back that were sent.
    pub fn reclaim(&mut self) {
        loop {
            match self.transmit.queue.take(&Memory) {
                Ok(Some(done)) => {
                    self.free[self.free_count] = done.token;
                    self.free_count += 1;
                }
                Ok(None) => return,
                Err(_) => self.count.broken += 1,
            }
        }
    }

    /// Lets the device see what was added, and notifies it if it wants to be.
    pub fn publish(&mut self) {
        for (index, ring) in [(RECEIVE, &mut self.receive), (TRANSMIT, &mut self.transmit)] {
            if ring.queue.publish(&Memory) {
                self.count.notifies += 1;
                self.device.notify(index);
            }
        }
    }

    fn room(&mut self) -> Option<Room<'_>> {
        (self.free_count != 0).then_some(Room {
            transmit: &mut self.transmit,
            free: &mut self.free,
            free_count: &mut self.free_count,
            count: &mut self.count,
        })
    }

    /// Sends a frame as it stands; false if there is no room.
    pub fn send_raw(&mut self, frame: &[u8]) -> bool {
        let Some(room) = self.room() else { return false };
        phy::TxToken::consume(room, frame.len(), |buffer| buffer.copy_from_slice(frame));
        true
    }
}

/// A frame that came in. It is copied out of the ring's memory by smoltcp while it is consumed.
pub struct Received<'a> {
    ring: &'a mut Ring,
    index: u16,
    length: usize,
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(&self.ring.buffer(self.index)[HEADER..self.length]);
        self.ring.refill(self.index);
        result
    }
}

/// Room for a frame to be sent.
pub struct Room<'a> {
    transmit: &'a mut Ring,
    free: &'a mut [u16],
    free_count: &'a mut usize,
    count: &'a mut Counters,
}

impl phy::TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        *self.free_count -= 1;
        let index = self.free[*self.free_count];
        let buffer = self.transmit.buffer(index);
        buffer[..HEADER].fill(0);
        let result = f(&mut buffer[HEADER..HEADER + length]);
        let segment = Segment::read(self.transmit.address(index), (HEADER + length) as u32);
        self.transmit.queue.add(&Memory, &[segment], index);
        self.count.sent += 1;
        self.count.sent_bytes += length as u64;
        result
    }
}

impl phy::Device for Card {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Room<'_>)> {
        if self.free_count == 0 {
            return None;
        }
        let done = loop {
            match self.receive.queue.take(&Memory) {
                Ok(done) => break done?,
                Err(_) => self.count.broken += 1,
            }
        };
        let length = (done.length as usize).clamp(HEADER, self.receive.size);
        self.count.received += 1;
        self.count.received_bytes += (length - HEADER) as u64;
        let room = Room {
            transmit: &mut self.transmit,
            free: &mut self.free,
            free_count: &mut self.free_count,
            count: &mut self.count,
        };
        Some((Received { ring: &mut self.receive, index: done.token, length }, room))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        self.room()
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET + self.mtu;
        if self.offload {
            // What comes from the device was checked, or needs no check.
            capabilities.checksum.tcp = Checksum::Tx;
            capabilities.checksum.udp = Checksum::Tx;
        }
        capabilities
    }
}
