//! Counters that can be read while the device is busy.

use std::sync::atomic::{AtomicU64, Ordering};

/// An event counter. Readers need no lock of the device.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one event.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Counts `events` events.
    pub fn add(&self, events: u64) {
        // No other memory access is ordered by a count.
        self.0.fetch_add(events, Ordering::Relaxed);
    }

    /// Sets it, for what is no count of events but a size.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Events so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
