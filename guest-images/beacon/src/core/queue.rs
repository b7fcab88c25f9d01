//! A split virtqueue, the driver's side.
//!
//! ```text
//! descriptors  16 bytes each: address 8, length 4, flags 2, next 2
//! available    flags 2, index 2, ring 2 each, used_event 2      written by the driver
//! used         flags 2, index 2, ring 8 each, avail_event 2     written by the device
//! ```
//!
//! What the driver needs to know of its own requests it keeps outside of the ring, so that a
//! device that writes where it must not is noticed and not believed.
//!
//! Source: VIRTIO 1.2, 2.7.

use core::sync::atomic::{fence, Ordering::SeqCst};

/// Largest queue that is used.
pub const MAX_SIZE: u16 = 256;
/// Most descriptors of a request.
pub const MAX_SEGMENTS: usize = 4;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// In the used ring: notifications are not needed. In the available ring: interrupts are not.
const QUIET: u16 = 1;
const DESCRIPTOR: u64 = 16;

/// Guest memory that a device shares: each access happens once and where it stands.
pub trait Ram {
    /// Reads 16 bits.
    fn get16(&self, address: u64) -> u16;
    /// Writes 16 bits.
    fn put16(&self, address: u64, value: u16);
    /// Reads 32 bits.
    fn get32(&self, address: u64) -> u32;
    /// Writes 32 bits.
    fn put32(&self, address: u64, value: u32);
    /// Writes 64 bits.
    fn put64(&self, address: u64, value: u64);
}

/// A piece of memory of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Segment {
    /// Memory that the device reads.
    #[must_use]
    pub const fn read(address: u64, length: u32) -> Self {
        Self { address, length, writable: false }
    }

    /// Memory that the device writes.
    #[must_use]
    pub const fn write(address: u64, length: u32) -> Self {
        Self { address, length, writable: true }
    }
}

/// What the driver knows of a descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// Next free descriptor, or next of the chain.
    next: u16,
    /// Descriptors of the chain that begins here; 0 when none does.
    chain: u16,
    token: u16,
}

/// A request that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// What the driver called it.
    pub token: u16,
    /// Bytes that the device says it wrote.
    pub length: u32,
}

/// The device put something into the used ring that was not in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The descriptor number that it gave back.
    pub id: u32,
}

/// Where the three parts of a queue and its indirect tables lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries: a power of two, at most [`MAX_SIZE`].
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// [`MAX_SEGMENTS`] descriptors for each entry.
    indirect: u64,
    /// Bytes of all.
    pub bytes: u64,
}

impl Layout {
    /// Lays a queue out from `base`, which is page-aligned.
    #[must_use]
    pub const fn new(base: u64, size: u16) -> Self {
        let entries = size as u64;
        let available = base + entries * DESCRIPTOR;
        let used = (available + 6 + 2 * entries).next_multiple_of(64);
        let indirect = (used + 6 + 8 * entries).next_multiple_of(64);
        let end = indirect + entries * DESCRIPTOR * MAX_SEGMENTS as u64;
        Self { size, descriptors: base, available, used, indirect, bytes: end - base }
    }
}

/// The driver's side of a queue.
pub struct Queue {
    layout: Layout,
    slots: &'static mut [Slot],
    free: u16,
    free_count: u16,
    /// Next index in the available ring, and the one up to which the device was told.
    available: u16,
    told: u16,
    /// Next index in the used ring.
    used: u16,
    event_index: bool,
    indirect: bool,
}

impl Queue {
    /// A queue over zeroed memory; `slots` has an entry for each of the queue's.
    #[must_use]
    pub fn new(
        layout: Layout,
        slots: &'static mut [Slot],
        event_index: bool,
        indirect: bool,
    ) -> Self {
        let mut queue = Self {
            layout,
            slots,
            free: 0,
            free_count: 0,
            available: 0,
            told: 0,
            used: 0,
            event_index,
            indirect,
        };
        queue.forget();
        queue
    }

    /// Forgets all requests, for a device that was reset. The rings' memory is the caller's to
    /// clear.
    pub fn forget(&mut self) {
        let size = self.layout.size;
        for (index, slot) in (0..size).zip(self.slots.iter_mut()) {
            *slot = Slot { next: (index + 1) % size, chain: 0, token: 0 };
        }
        (self.free, self.free_count) = (0, size);
        (self.available, self.told, self.used) = (0, 0, 0);
    }

    /// Where it lies.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Entries in flight, descriptors counted.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.layout.size - self.free_count
    }

    /// Offers a request to the device, which is not told yet; false if there is no room.
    pub fn add(&mut self, ram: &impl Ram, segments: &[Segment], token: u16) -> bool {
        if segments.is_empty() || segments.len() > MAX_SEGMENTS {
            return false;
        }
        let indirect = self.indirect && segments.len() > 1;
        let needed = if indirect { 1 } else { segments.len() as u16 };
        if needed > self.free_count {
            return false;
        }
        let head = self.free;
        if indirect {
            let table = self.layout.indirect + u64::from(head) * DESCRIPTOR * MAX_SEGMENTS as u64;
            for (index, segment) in (0..).zip(segments) {
                let last = usize::from(index) + 1 == segments.len();
                write_descriptor(
                    ram,
                    table + u64::from(index) * DESCRIPTOR,
                    segment,
                    index + 1,
                    last,
                );
            }
            let at = self.layout.descriptors + u64::from(head) * DESCRIPTOR;
            ram.put64(at, table);
            ram.put32(at + 8, (segments.len() as u64 * DESCRIPTOR) as u32);
            ram.put16(at + 12, INDIRECT);
            ram.put16(at + 14, 0);
            self.free = self.slots[usize::from(head)].next;
        } else {
            for (index, segment) in segments.iter().enumerate() {
                let place = self.free;
                self.free = self.slots[usize::from(place)].next;
                let at = self.layout.descriptors + u64::from(place) * DESCRIPTOR;
                write_descriptor(ram, at, segment, self.free, index + 1 == segments.len());
            }
        }
        self.free_count -= needed;
        let slot = &mut self.slots[usize::from(head)];
        (slot.chain, slot.token) = (needed, token);
        let place = u64::from(self.available % self.layout.size);
        ram.put16(self.layout.available + 4 + 2 * place, head);
        self.available = self.available.wrapping_add(1);
        true
    }

    /// Lets the device see what was added; true if it has to be notified.
    #[must_use]
    pub fn publish(&mut self, ram: &impl Ram) -> bool {
        if self.told == self.available {
            return false;
        }
        let old = core::mem::replace(&mut self.told, self.available);
        // The entries before the index; the index before what the device says it needs.
        fence(SeqCst);
        ram.put16(self.layout.available + 2, self.available);
        fence(SeqCst);
        if self.event_index {
            let event = ram.get16(self.layout.used + 4 + 8 * u64::from(self.layout.size));
            passes(event, self.available, old)
        } else {
            ram.get16(self.layout.used) & QUIET == 0
        }
    }

    /// Whether the device has used something that was not taken yet.
    #[must_use]
    pub fn has_used(&self, ram: &impl Ram) -> bool {
        ram.get16(self.layout.used + 2) != self.used
    }

    /// Takes a request that is done.
    ///
    /// # Errors
    /// The device used what it was not given.
    pub fn take(&mut self, ram: &impl Ram) -> Result<Option<Done>, Broken> {
        if !self.has_used(ram) {
            return Ok(None);
        }
        // The entry after the index.
        fence(SeqCst);
        let entry = self.layout.used + 4 + 8 * u64::from(self.used % self.layout.size);
        let (id, length) = (ram.get32(entry), ram.get32(entry + 4));
        self.used = self.used.wrapping_add(1);
        let head = usize::try_from(id).unwrap_or(usize::MAX);
        let Some(slot) = self.slots.get_mut(head).filter(|slot| slot.chain != 0) else {
            return Err(Broken { id });
        };
        let (chain, token) = (core::mem::take(&mut slot.chain), slot.token);
        let mut last = head;
        for _ in 1..chain {
            last = usize::from(self.slots[last].next);
        }
        self.slots[last].next = self.free;
        self.free = head as u16;
        self.free_count += chain;
        Ok(Some(Done { token, length }))
    }

    /// Asks for an interrupt with the next request that is done. What was done just before may come
    /// without one: look again after this.
    pub fn arm(&self, ram: &impl Ram) {
        if self.event_index {
            ram.put16(self.used_event(), self.used);
        } else {
            ram.put16(self.layout.available, 0);
        }
        fence(SeqCst);
    }

    /// Asks for no interrupts.
    pub fn disarm(&self, ram: &impl Ram) {
        if self.event_index {
            // As far away as can be; to be done again within 2^15 requests.
            ram.put16(self.used_event(), self.used.wrapping_add(0x8000));
        } else {
            ram.put16(self.layout.available, QUIET);
        }
    }

    fn used_event(&self) -> u64 {
        self.layout.available + 4 + 2 * u64::from(self.layout.size)
    }
}

/// Whether an index that went from `old` to `new` has passed `event` (VIRTIO 1.2, 2.7.7.1).
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn write_descriptor(ram: &impl Ram, at: u64, segment: &Segment, next: u16, last: bool) {
    ram.put64(at, segment.address);
    ram.put32(at + 8, segment.length);
    ram.put16(at + 12, if segment.writable { WRITE } else { 0 } | if last { 0 } else { NEXT });
    ram.put16(at + 14, if last { 0 } else { next });
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
