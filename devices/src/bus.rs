//! Address spaces: from a guest's port or MMIO access to the device that answers it.
//!
//! A [`Bus`] is filled while the machine is built and never changes while vCPUs run, so that a
//! look-up takes no lock but the one of the device it finds.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

/// A device as the guest reaches it.
///
/// Offsets are relative to the start of the device's range, and an access never goes beyond its
/// end. Everything else comes from the guest as it pleases: any length, any offset, any value.
pub trait BusDevice {
    /// A read of `data.len()` bytes at `offset`. All of `data` is set.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// A write of `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device on a bus.
pub type SharedDevice = Arc<Mutex<dyn BusDevice + Send>>;

/// A part of an address space that belongs to one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusRange {
    /// The device, for messages.
    pub name: &'static str,
    /// First address.
    pub base: u64,
    /// Number of addresses.
    pub size: u64,
}

impl fmt::Display for BusRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}, {:#x} bytes", self.name, self.base, self.size)
    }
}

/// Why a device was not put on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The address is taken.
    #[error("{new} overlaps {existing}: give one of them another address")]
    Overlap {
        /// The range to be added.
        new: BusRange,
        /// The range that is there already.
        existing: BusRange,
    },
    /// The range has no address, or goes beyond the end of the address space.
    #[error("{range} is not a range of addresses: it is empty or ends beyond 2^64")]
    BadRange {
        /// The range to be added.
        range: BusRange,
    },
}

/// An address space: ports or memory-mapped registers.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, never overlapping.
    devices: Vec<(BusRange, SharedDevice)>,
}

impl Bus {
    /// An address space without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `range`.
    ///
    /// # Errors
    ///
    /// When another device has one of these addresses, or the range is none.
    pub fn insert(&mut self, range: BusRange, device: SharedDevice) -> Result<(), BusError> {
        let last = match (range.size.checked_sub(1)).and_then(|n| range.base.checked_add(n)) {
            Some(last) => last,
            None => return Err(BusError::BadRange { range }),
        };
        let index = self.devices.partition_point(|(other, _)| other.base <= last);
        // Of all ranges that start at or below our last address, the highest reaches furthest.
        if let Some((existing, _)) = index.checked_sub(1).map(|below| &self.devices[below]) {
            if existing.base + (existing.size - 1) >= range.base {
                return Err(BusError::Overlap { new: range, existing: *existing });
            }
        }
        self.devices.insert(index, (range, device));
        Ok(())
    }

    /// Passes a read on to the device at `address`.
    ///
    /// Gives false, and leaves `data` alone, when no device has all the addresses of the access;
    /// what the guest reads then is the caller's decision.
    #[must_use]
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Passes a write on to the device at `address`.
    ///
    /// Gives false when no device has all the addresses of the access.
    #[must_use]
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The ranges in use, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = &BusRange> {
        self.devices.iter().map(|(range, _)| range)
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &SharedDevice)> {
        let above = self.devices.partition_point(|(range, _)| range.base <= address);
        let (range, device) = &self.devices[above.checked_sub(1)?];
        let offset = address - range.base;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= range.size && offset < range.size).then_some((offset, device))
    }
}

/// A device that panicked is still a device: its registers are plain values.
fn lock<'a>(device: &'a SharedDevice) -> std::sync::MutexGuard<'a, dyn BusDevice + Send + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    /// Answers with its number and remembers the last write.
    struct Probe {
        number: u8,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.number + u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    fn probe(number: u8) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { number, written: Vec::new() }))
    }

    fn range(base: u64, size: u64) -> BusRange {
        BusRange { name: "probe", base, size }
    }

    #[test]
    fn an_access_reaches_its_device() {
        let (low, high) = (probe(0x10), probe(0x80));
        let mut bus = Bus::new();
        bus.insert(range(0x3F8, 8), high.clone()).unwrap();
        bus.insert(range(0x60, 5), low.clone()).unwrap();

        let mut data = [0; 2];
        assert!(bus.read(0x3FA, &mut data));
        assert_eq!(data, [0x82; 2]);
        assert!(bus.write(0x64, &[0xFE]));
        assert_eq!(low.lock().unwrap().written, [(4, vec![0xFE])]);
        assert!(high.lock().unwrap().written.is_empty());
        assert_eq!(bus.ranges().map(|range| range.base).collect::<Vec<_>>(), [0x60, 0x3F8]);
    }

    #[test]
    fn an_access_that_leaves_a_range_is_nobodys() {
        let device = probe(0);
        let mut bus = Bus::new();
        bus.insert(range(0x100, 4), device.clone()).unwrap();
        bus.insert(range(u64::MAX - 3, 4), device.clone()).unwrap();

        for address in [0, 0xFF, 0x104, u64::MAX - 4] {
            assert!(!bus.read(address, &mut [0]), "{address:#x}");
        }
        for (address, length) in [(0x101, 4), (0x103, 2), (0xFE, 4), (u64::MAX, 2), (0x104, 0)] {
            assert!(!bus.write(address, &vec![0; length]), "{address:#x} {length}");
        }
        assert!(device.lock().unwrap().written.is_empty());
        assert!(bus.write(0x103, &[0]));
        assert!(bus.write(u64::MAX - 3, &[0; 4]));
    }

    #[test]
    fn an_overlap_is_refused_and_both_are_named() {
        let mut bus = Bus::new();
        bus.insert(BusRange { name: "serial", base: 0x3F8, size: 8 }, probe(0)).unwrap();
        for (base, size) in [(0x3F8, 8), (0x3F0, 9), (0x3FF, 1), (0x3F9, 2), (0, u64::MAX)] {
            let new = BusRange { name: "other", base, size };
            let error = bus.insert(new, probe(1)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("serial at 0x3f8") && text.contains("other at"), "{text}");
        }
        bus.insert(range(0x3F0, 8), probe(1)).unwrap();
        bus.insert(range(0x400, 1), probe(2)).unwrap();
    }

    #[test]
    fn a_range_of_nothing_is_refused() {
        let mut bus = Bus::new();
        for (base, size) in [(0, 0), (u64::MAX, 2)] {
            assert!(matches!(
                bus.insert(range(base, size), probe(0)),
                Err(BusError::BadRange { .. })
            ));
        }
        bus.insert(range(1, u64::MAX), probe(0)).unwrap();
    }

    proptest! {
        #[test]
        fn the_look_up_agrees_with_a_plain_search(
            ranges in proptest::collection::vec((0u64..64, 1u64..8), 1..12),
            address in 0u64..80,
            length in 0usize..9,
        ) {
            let mut bus = Bus::new();
            let mut accepted: Vec<(u64, u64)> = Vec::new();
            for (base, size) in ranges {
                let free = accepted.iter().all(|&(b, s)| base + size <= b || b + s <= base);
                prop_assert_eq!(bus.insert(range(base, size), probe(0)).is_ok(), free);
                if free {
                    accepted.push((base, size));
                }
            }
            let end = address + length as u64;
            let found =
                accepted.iter().any(|&(b, s)| b <= address && address < b + s && end <= b + s);
            prop_assert_eq!(bus.write(address, &vec![0; length]), found);
        }
    }
}
