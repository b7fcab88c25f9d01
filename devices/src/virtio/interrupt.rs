//! The interrupt of one virtio device, and its status register.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use tracing::warn;

use super::ids::interrupt_status::{CONFIG_CHANGE, USED_BUFFER};
use crate::metrics::Counter;
use crate::InterruptLine;

/// The interrupt status register and the line behind it.
///
/// It needs no lock of the device: the guest reads and acknowledges in its interrupt handler,
/// while the device may be busy with the next request.
pub struct VirtioInterrupt {
    status: AtomicU32,
    line: Arc<dyn InterruptLine>,
    /// Edges given.
    pub raised: Counter,
    /// Edges that did not get through.
    pub errors: Counter,
}

impl VirtioInterrupt {
    /// An interrupt with nothing pending.
    pub fn new(line: Arc<dyn InterruptLine>) -> Self {
        Self {
            status: AtomicU32::new(0),
            line,
            raised: Counter::default(),
            errors: Counter::default(),
        }
    }

    /// Tells the guest that used buffers are there.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the guest that the configuration changed.
    pub fn config_change(&self) {
        self.raise(CONFIG_CHANGE);
    }

    /// The status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The guest has seen `bits`.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Sets the register, without an edge: reset and restore.
    pub(super) fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Repeats the edge where something is pending.
    pub(super) fn raise_pending(&self) {
        if self.status() != 0 {
            self.pulse();
        }
    }

    /// An edge for every event, also while the bit is still set: an edge too many costs the guest
    /// a look at its rings, one too few costs the device.
    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.pulse();
    }

    fn pulse(&self) {
        match self.line.pulse() {
            Ok(()) => self.raised.increment(),
            Err(error) => {
                if self.errors.get() == 0 {
                    warn!(%error, "a virtio device cannot raise its interrupt");
                }
                self.errors.increment();
            }
        }
    }
}
