//! A device, its queues, and the state of its negotiation.

use vm_memory::GuestMemory;

use super::MmioMetrics;
use crate::virtio::ids::{features, status};
use crate::virtio::{VirtQueue, VirtioDevice, VirtioInterrupt};

/// Bits of the status register that the driver sets.
const DRIVER_BITS: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

/// Whether a driver can have set these bits: no others, and no step before the one that it needs.
pub(super) fn may_be_status(driver_bits: u32) -> bool {
    let in_order = [
        (status::DRIVER, status::ACKNOWLEDGE),
        (status::FEATURES_OK, status::DRIVER),
        (status::DRIVER_OK, status::FEATURES_OK),
    ]
    .iter()
    .all(|(step, before)| driver_bits & step == 0 || driver_bits & before != 0);
    driver_bits & !DRIVER_BITS == 0 && in_order
}

/// What is behind the lock of a device.
pub(super) struct Core<D> {
    pub(super) device: D,
    pub(super) queues: Vec<VirtQueue>,
    pub(super) status: u32,
    pub(super) driver_features: u64,
    pub(super) config_generation: u32,
}

/// What a write to the status register came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StatusWrite {
    Accepted,
    /// The device has become live.
    Live,
    Reset,
    /// No such step is possible now.
    Refused,
}

impl<D: VirtioDevice> Core<D> {
    pub(super) fn new(device: D) -> Self {
        let queues = device.queue_sizes().iter().map(|size| VirtQueue::new(*size)).collect();
        Self { device, queues, status: 0, driver_features: 0, config_generation: 0 }
    }

    pub(super) fn offered_features(&self) -> u64 {
        self.device.features() | features::COMMON
    }

    pub(super) fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    /// Whether the device may look at its queues.
    pub(super) fn is_live(&self) -> bool {
        self.has(status::DRIVER_OK)
            && self.status & (status::DEVICE_NEEDS_RESET | status::FAILED) == 0
    }

    /// Whether the driver may set up queues.
    pub(super) fn may_set_up(&self) -> bool {
        self.has(status::FEATURES_OK)
            && self.status & (status::DEVICE_NEEDS_RESET | status::FAILED) == 0
    }

    /// Whether the driver may choose features.
    pub(super) fn may_negotiate(&self) -> bool {
        self.has(status::DRIVER) && self.status & (status::FEATURES_OK | status::FAILED) == 0
    }

    /// Section 3.1.1. The order of the steps is enforced; a step may not be taken back but by a
    /// reset.
    pub(super) fn write_status(&mut self, value: u32) -> StatusWrite {
        if value == 0 {
            self.reset();
            return StatusWrite::Reset;
        }
        // The driver writes back what it read, the device's own bit included.
        let new = value & !status::DEVICE_NEEDS_RESET;
        let old = self.status & DRIVER_BITS;
        if !may_be_status(new) || old & !new != 0 {
            return StatusWrite::Refused;
        }
        let added = new & !old;
        if added & status::FEATURES_OK != 0 && !self.features_are_acceptable() {
            // The driver reads the register back and sees that the bit is not set.
            self.status |= added & (status::ACKNOWLEDGE | status::DRIVER);
            return StatusWrite::Refused;
        }
        self.status |= added;
        if added & status::DRIVER_OK != 0 {
            self.device.activate(self.driver_features);
            return StatusWrite::Live;
        }
        StatusWrite::Accepted
    }

    fn features_are_acceptable(&self) -> bool {
        let unknown = self.driver_features & !self.offered_features();
        unknown == 0 && self.driver_features & features::VERSION_1 != 0
    }

    /// Back to the state after power-on. The configuration and its generation belong to the
    /// host's side and stay.
    pub(super) fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(VirtQueue::reset);
        self.status = 0;
        self.driver_features = 0;
    }

    /// Takes queue `index` into use; the guest's mistake is the error.
    pub(super) fn enable_queue<M: GuestMemory>(
        &mut self,
        index: usize,
        memory: &M,
    ) -> Result<(), crate::virtio::QueueError> {
        let event_idx = self.driver_features & features::RING_EVENT_IDX != 0;
        self.queues[index].enable(memory, event_idx)
    }

    /// The guest broke the device: it stops until the driver resets it (section 2.1.2).
    pub(super) fn fail(
        &mut self,
        error: &dyn std::error::Error,
        interrupt: &VirtioInterrupt,
        metrics: &MmioMetrics,
    ) {
        // A guest may do this all day: the log gets the first, the counter all.
        if metrics.needs_resets.get() == 0 {
            tracing::warn!(device = D::NAME, %error, "the guest broke a virtio device; it needs a reset");
        }
        metrics.needs_resets.increment();
        self.status |= status::DEVICE_NEEDS_RESET;
        if self.has(status::DRIVER_OK) {
            interrupt.config_change();
        }
    }
}
