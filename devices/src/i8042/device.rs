//! The live keyboard controller.

use std::sync::Arc;

use super::I8042Metrics;
use crate::{BusDevice, PowerRequests};

/// Number of port addresses: data at offset 0, command and status at offset 4, the ports between
/// them are not of this device and read as 0xFF.
pub const SIZE: u64 = 5;

const DATA: u64 = 0;
const STATUS_COMMAND: u64 = 4;

/// Command: pulse output line 0, which is wired to the reset line.
const COMMAND_RESET: u8 = 0xFE;

/// Output buffer full, input buffer empty, for ever.
///
/// Linux probes by emptying the output buffer: it gives up after 16 bytes and says "No controller
/// found" (`i8042_flush`), while a status of 0 would have it wait half a second for the answer to
/// a self-test. Before a reset it waits until the input buffer is empty (`kb_wait`), which a
/// status of 0xFF would delay.
const STATUS: u8 = 1 << 0;

/// The reset line of a keyboard controller.
pub struct I8042 {
    power: Arc<dyn PowerRequests>,
    metrics: Arc<I8042Metrics>,
}

impl I8042 {
    /// A controller that passes resets on to `power`.
    pub fn new(power: Arc<dyn PowerRequests>) -> Self {
        Self { power, metrics: Arc::default() }
    }

    /// The counters, readable without the device.
    pub fn metrics(&self) -> Arc<I8042Metrics> {
        Arc::clone(&self.metrics)
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (STATUS_COMMAND, [byte]) => *byte = STATUS,
            (DATA, [byte]) => *byte = 0,
            (_, data) => data.fill(0xFF),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == STATUS_COMMAND && data == [COMMAND_RESET] {
            self.metrics.resets.increment();
            self.power.reset();
        } else {
            self.metrics.ignored_writes.increment();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::super::test_utils::controller;
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let (mut controller, power) = controller();
        for (offset, data) in
            [(4, &[0xFF][..]), (4, &[0xAA]), (0, &[0xFE]), (4, &[0xFE, 0xFE]), (4, &[]), (1, &[0])]
        {
            controller.write(offset, data);
        }
        assert_eq!(power.take(), (0, 0));
        assert_eq!(controller.metrics().ignored_writes.get(), 6);
        controller.write(4, &[0xFE]);
        assert_eq!(power.take(), (1, 0));
        assert_eq!(controller.metrics().resets.get(), 1);
    }

    #[test]
    fn linux_finds_no_controller_and_waits_for_none() {
        let (mut controller, _) = controller();
        let mut status = [0];
        // i8042_flush: the output buffer is never empty.
        for _ in 0..17 {
            controller.read(4, &mut status);
            assert_eq!(status[0] & 1, 1);
            controller.read(0, &mut [0]);
        }
        // kb_wait: the input buffer is never full.
        assert_eq!(status[0] & 2, 0);
    }

    #[test]
    fn other_ports_and_sizes_read_as_nothing() {
        let (mut controller, _) = controller();
        for (offset, size) in [(1, 1), (2, 1), (3, 1), (0, 2), (4, 4), (4, 0)] {
            let mut data = vec![0; size];
            controller.read(offset, &mut data);
            assert_eq!(data, vec![0xFF; size]);
        }
    }

    proptest! {
        #[test]
        fn a_hostile_guest_breaks_nothing(
            offset in any::<u64>(),
            mut data in proptest::collection::vec(any::<u8>(), 0..9),
        ) {
            let (mut controller, power) = controller();
            controller.write(offset, &data);
            let reset = offset == 4 && data == [0xFE];
            prop_assert_eq!(power.take(), (u64::from(reset), 0));
            controller.read(offset, &mut data);
        }
    }
}
