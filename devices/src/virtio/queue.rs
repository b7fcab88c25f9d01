//! A split virtqueue (virtio 1.2, section 2.7) as a device uses it.
//!
//! The rings themselves are [`virtio_queue::Queue`]. Here are the checks that it leaves to its
//! user (a chain that is cut short is an error, not an end), interrupt suppression in both forms,
//! and the state that it does not keep.

use std::sync::atomic::{fence, Ordering};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use super::Buffers;

/// Most descriptors of one chain. More than any driver's queue size allows it (section 2.7.5.1),
/// and what one vectored system call takes.
pub const MAX_CHAIN: usize = 1024;

/// Flag in the available ring: no interrupts, please (section 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Bytes before the entries of both rings.
const RING_HEADER: u64 = 4;

/// What the guest did wrong with a queue. Its device needs a reset then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is none that a queue may have.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// Size that the guest chose.
        size: u32,
        /// Largest size of this queue.
        max: u16,
    },
    /// A part of the queue is not where it may be.
    #[error("the {part} at {address:#x} is not aligned to {align}, or not in memory")]
    Placement {
        /// Which part.
        part: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// Alignment it needs, bytes.
        align: u64,
    },
    /// Two parts of the queue share memory.
    #[error("the {first} and the {second} overlap")]
    Overlap {
        /// One part.
        first: &'static str,
        /// The other.
        second: &'static str,
    },
    /// The queue is not set up.
    #[error("the queue is not ready")]
    NotReady,
    /// The rings cannot be used: an index runs ahead by more than the queue has.
    #[error("the rings are broken: {0}")]
    Rings(String),
    /// A chain of descriptors has no end, or a bad one.
    #[error("the chain at descriptor {head} is broken: {reason}")]
    Chain {
        /// First descriptor.
        head: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A buffer is not in guest memory.
    #[error(
        "the chain at descriptor {head} has a buffer outside of memory: {address:#x}+{len:#x}"
    )]
    OutOfRange {
        /// First descriptor of the chain.
        head: u16,
        /// Guest-physical start.
        address: u64,
        /// Length, bytes.
        len: u32,
    },
}

/// The buffers of one request.
pub struct Chain<'m, M: GuestMemory> {
    head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m, BS<'m, M::Bitmap>>,
    /// Where the device writes for the driver.
    pub writable: Buffers<'m, BS<'m, M::Bitmap>>,
}

impl<M: GuestMemory> Chain<'_, M> {
    /// Its first descriptor, by which it is given back.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }
}

/// What the driver wrote into the queue registers; nothing of it is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClaimedRings {
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl ClaimedRings {
    /// The three parts: name, address, length, alignment (section 2.7).
    fn parts(&self) -> [(&'static str, u64, u64, u64); 3] {
        let size = u64::from(self.size);
        [
            ("descriptor table", self.descriptors, 16 * size, 16),
            ("available ring", self.available, RING_HEADER + 2 * size + 2, 2),
            ("used ring", self.used, RING_HEADER + 8 * size + 2, 4),
        ]
    }
}

/// A queue that a device serves.
#[derive(Debug)]
pub struct VirtQueue {
    max_size: u16,
    pub(super) claimed: ClaimedRings,
    /// The checked rings, while the queue is ready.
    rings: Option<virtio_queue::Queue>,
    /// The used index at the last decision about an interrupt, for EVENT_IDX; unknown at first.
    signalled_used: Option<u16>,
}

impl VirtQueue {
    /// A queue that is not set up, of at most `max_size` entries: a power of two.
    #[must_use]
    pub fn new(max_size: u16) -> Self {
        debug_assert!(max_size.is_power_of_two());
        let claimed =
            ClaimedRings { size: u32::from(max_size), descriptors: 0, available: 0, used: 0 };
        Self { max_size, claimed, rings: None, signalled_used: None }
    }

    /// Largest number of entries.
    #[must_use]
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// Whether the driver has set it up.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.rings.is_some()
    }

    /// Back to the state after power-on.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// Takes the queue out of use; its registers stay.
    pub(super) fn disable(&mut self) {
        self.rings = None;
        self.signalled_used = None;
    }

    /// Checks what the driver wrote into the registers, and takes the queue into use.
    pub(super) fn enable<M: GuestMemory>(
        &mut self,
        memory: &M,
        event_idx: bool,
    ) -> Result<(), QueueError> {
        self.rings = Some(self.checked_rings(memory, event_idx)?);
        self.signalled_used = None;
        Ok(())
    }

    fn checked_rings<M: GuestMemory>(
        &self,
        memory: &M,
        event_idx: bool,
    ) -> Result<virtio_queue::Queue, QueueError> {
        let bad_size = QueueError::Size { size: self.claimed.size, max: self.max_size };
        let size = match u16::try_from(self.claimed.size) {
            Ok(size) if size.is_power_of_two() && size <= self.max_size => size,
            _ => return Err(bad_size),
        };
        let parts = self.claimed.parts();
        for (part, address, len, align) in parts {
            let bad = QueueError::Placement { part, address, align };
            // At most 512 KiB: no truncation.
            let in_memory =
                memory.check_range(GuestAddress(address), len as usize, Permissions::ReadWrite);
            if address % align != 0 || !in_memory {
                return Err(bad);
            }
        }
        for (n, (first, a, a_len, _)) in parts.into_iter().enumerate() {
            for (second, b, b_len, _) in parts.into_iter().skip(n + 1) {
                // In memory, hence without overflow.
                if a < b + b_len && b < a + a_len {
                    return Err(QueueError::Overlap { first, second });
                }
            }
        }
        let broken = |error: virtio_queue::Error| QueueError::Rings(error.to_string());
        let mut rings = virtio_queue::Queue::new(self.max_size).map_err(broken)?;
        rings.try_set_size(size).map_err(broken)?;
        rings.try_set_desc_table_address(GuestAddress(self.claimed.descriptors)).map_err(broken)?;
        rings.try_set_avail_ring_address(GuestAddress(self.claimed.available)).map_err(broken)?;
        rings.try_set_used_ring_address(GuestAddress(self.claimed.used)).map_err(broken)?;
        rings.set_event_idx(event_idx);
        rings.set_ready(true);
        Ok(rings)
    }

    fn rings(&mut self) -> Result<&mut virtio_queue::Queue, QueueError> {
        self.rings.as_mut().ok_or(QueueError::NotReady)
    }

    /// The next chain of the driver, if there is one.
    ///
    /// # Errors
    ///
    /// When the driver broke the rules of the rings, or a buffer is not in memory.
    pub fn pop<'m, M: GuestMemory>(
        &mut self,
        memory: &'m M,
    ) -> Result<Option<Chain<'m, M>>, QueueError> {
        let rings = self.rings()?;
        let next = rings.iter(memory).map_err(ring_error)?.next();
        let Some(descriptors) = next else { return Ok(None) };

        let head = descriptors.head_index();
        let broken = |reason| QueueError::Chain { head, reason };
        let mut chain = Chain { head, readable: Buffers::new(), writable: Buffers::new() };
        let mut count = 0;
        let mut goes_on = true;
        for descriptor in descriptors {
            goes_on = descriptor.has_next();
            count += 1;
            if count > MAX_CHAIN {
                return Err(broken("more descriptors than a queue can have"));
            }
            let buffers = if descriptor.is_write_only() {
                &mut chain.writable
            } else if chain.writable.is_empty() {
                &mut chain.readable
            } else {
                return Err(broken("a buffer to read after one to write"));
            };
            if descriptor.len() == 0 {
                continue;
            }
            let out = || QueueError::OutOfRange {
                head,
                address: descriptor.addr().raw_value(),
                len: descriptor.len(),
            };
            let access =
                if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
            let len = descriptor.len() as usize;
            // Asked first, since a range may begin inside of memory and leave it.
            if !memory.check_range(descriptor.addr(), len, access) {
                return Err(out());
            }
            let slices = memory.get_slices(descriptor.addr(), len, access).map_err(|_| out())?;
            for slice in slices {
                buffers.push(slice.map_err(|_| out())?);
            }
        }
        // The iterator ends without a word at a loop, at a descriptor that is not there, at a
        // table in a table, and where all lengths exceed 4 GiB. A proper end has no NEXT flag.
        if goes_on {
            return Err(broken("a loop, a descriptor that is not there, or more than 4 GiB"));
        }
        Ok(Some(chain))
    }

    /// Entries, while the queue is ready.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.rings.as_ref().map_or(0, QueueT::size)
    }

    /// Takes back the last `chains` calls of [`VirtQueue::pop`]: they will come again.
    pub fn undo_pop(&mut self, chains: u16) -> Result<(), QueueError> {
        let rings = self.rings()?;
        rings.set_next_avail(rings.next_avail().wrapping_sub(chains));
        Ok(())
    }

    /// Gives a chain back to the driver, with the number of bytes written at its beginning.
    pub fn push<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.push_all(memory, &[(head, written)])
    }

    /// Gives several chains back, which the driver sees all at once: those of one frame.
    pub fn push_all<M: GuestMemory>(
        &mut self,
        memory: &M,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let rings = self.rings()?;
        let used = rings.used_ring();
        let mut next = rings.next_used();
        for (head, written) in chains {
            let slot = used + RING_HEADER + 8 * u64::from(next % rings.size());
            // Head, then length, each of 32 bits.
            let element = u64::from(*head) | u64::from(*written) << 32;
            memory.write_obj(element.to_le(), GuestAddress(slot)).map_err(memory_error)?;
            next = next.wrapping_add(1);
        }
        rings.set_next_used(next);
        // After the entries, for a driver on another CPU.
        memory.store(next.to_le(), GuestAddress(used + 2), Ordering::Release).map_err(memory_error)
    }

    /// Asks the driver to notify of new chains. True when there is one already.
    pub fn enable_notification<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        self.rings()?.enable_notification(memory).map_err(ring_error)
    }

    /// Tells the driver that it need not notify: the device looks by itself.
    pub fn disable_notification<M: GuestMemory>(&mut self, memory: &M) -> Result<(), QueueError> {
        self.rings()?.disable_notification(memory).map_err(ring_error)
    }

    /// Whether the driver wants to hear of what was pushed since the last call.
    ///
    /// Section 2.7.7.2. With EVENT_IDX the answer is yes when the driver's mark lies between the
    /// used index at the last call and now, and always at the first call.
    pub fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, QueueError> {
        let before = self.signalled_used;
        let rings = self.rings()?;
        let now = rings.next_used();
        let available = rings.avail_ring();
        let mark = RING_HEADER + 2 * u64::from(rings.size());
        let event_idx = rings.event_idx_enabled();
        // What was pushed is visible before the driver's wish is read; else both sides could miss
        // each other.
        fence(Ordering::SeqCst);
        let load = |offset| {
            memory
                .load::<u16>(GuestAddress(available + offset), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(memory_error)
        };
        if !event_idx {
            return Ok(load(0)? & AVAIL_F_NO_INTERRUPT == 0);
        }
        let mark = load(mark)?;
        self.signalled_used = Some(now);
        Ok(before
            .is_none_or(|before| now.wrapping_sub(mark).wrapping_sub(1) < now.wrapping_sub(before)))
    }

    /// Indices of a queue in use: next available, next used, and used at the last decision about
    /// an interrupt.
    pub(super) fn indices(&self) -> Option<(u16, u16, Option<u16>)> {
        let rings = self.rings.as_ref()?;
        Some((rings.next_avail(), rings.next_used(), self.signalled_used))
    }

    /// Sets what [`VirtQueue::indices`] gave.
    pub(super) fn set_indices(
        &mut self,
        (next_avail, next_used, signalled_used): (u16, u16, Option<u16>),
    ) {
        if let Some(rings) = &mut self.rings {
            rings.set_next_avail(next_avail);
            rings.set_next_used(next_used);
            self.signalled_used = signalled_used;
        }
    }
}

fn ring_error(error: virtio_queue::Error) -> QueueError {
    QueueError::Rings(error.to_string())
}

fn memory_error(error: GuestMemoryError) -> QueueError {
    QueueError::Rings(error.to_string())
}
