//! What the transport counts.

use crate::metrics::Counter;

/// Counters of one device's transport.
#[derive(Debug, Default)]
pub struct MmioMetrics {
    /// Notifications of queues that the device looked at.
    pub notifications: Counter,
    /// Notifications of queues that are not there or not ready, or before the driver is: ignored.
    pub early_notifications: Counter,
    /// Accesses to registers that are not there, or not writable, or not now, or not with that
    /// value or size: ignored.
    pub bad_accesses: Counter,
    /// Times that the guest broke the device, so that it needed a reset.
    pub needs_resets: Counter,
    /// Resets by the driver.
    pub resets: Counter,
}
