//! Test doubles for the traits through which a device sees the machine.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{InterruptLine, PowerRequests};

/// An interrupt line that counts its edges, and can be made to fail.
#[derive(Debug, Default)]
pub struct CountingLine {
    pulses: AtomicU64,
    broken: AtomicBool,
}

impl CountingLine {
    /// Edges since the last call.
    pub fn take(&self) -> u64 {
        self.pulses.swap(0, Ordering::SeqCst)
    }

    /// From now on, no edge gets through.
    pub fn break_it(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }
}

impl InterruptLine for CountingLine {
    fn pulse(&self) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the line is broken"));
        }
        self.pulses.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Counts the requests of a guest.
#[derive(Debug, Default)]
pub struct CountingPower {
    resets: AtomicU64,
    power_offs: AtomicU64,
}

impl CountingPower {
    /// Resets and power-offs since the last call.
    pub fn take(&self) -> (u64, u64) {
        (self.resets.swap(0, Ordering::SeqCst), self.power_offs.swap(0, Ordering::SeqCst))
    }
}

impl PowerRequests for CountingPower {
    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn power_off(&self) {
        self.power_offs.fetch_add(1, Ordering::SeqCst);
    }
}
