//! The live serial port.

use std::cell::Cell;
use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;

use tracing::warn;
use vm_superio::serial::NoEvents;
use vm_superio::Trigger;

use super::SerialMetrics;
use crate::{BusDevice, InterruptLine};

/// Number of port addresses.
pub const SIZE: u64 = 8;

/// Bytes that the receive FIFO holds (as in `vm-superio`, which does not publish it).
pub const FIFO_SIZE: usize = 64;

/// Interrupt enable register; its two low bits are those of the identification register below.
const IER_RECEIVED_DATA: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
/// Interrupt identification register, as kept by `vm-superio`: one bit per pending interrupt.
const IIR_TRANSMIT_EMPTY: u8 = 1 << 1;
const IIR_RECEIVED_DATA: u8 = 1 << 2;
/// Modem control register: output is looped back, the outside is disconnected.
const MCR_LOOP: u8 = 1 << 4;

/// The interrupt output of the register model: it notes an edge, which the device then passes on.
///
/// So the model stays free of effects, and restoring one raises no interrupt by itself.
#[derive(Debug, Default)]
pub(super) struct EdgeWanted(Cell<bool>);

impl Trigger for EdgeWanted {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// The register model. Its output is a buffer that the device empties after each access.
pub(super) type Uart = vm_superio::Serial<EdgeWanted, NoEvents, Vec<u8>>;

/// A 16550A UART with output to `W`.
pub struct Serial<W: Write + Send> {
    pub(super) uart: Uart,
    line: Arc<dyn InterruptLine>,
    output: W,
    input_wanted: Option<Box<dyn Fn() + Send>>,
    /// Somebody was refused bytes and waits for `input_wanted`.
    input_waits: bool,
    metrics: Arc<SerialMetrics>,
}

impl<W: Write + Send> Serial<W> {
    /// A serial port after power-on.
    pub fn new(line: Arc<dyn InterruptLine>, output: W) -> Self {
        Self {
            uart: Uart::new(EdgeWanted::default(), Vec::new()),
            line,
            output,
            input_wanted: None,
            input_waits: false,
            metrics: Arc::default(),
        }
    }

    /// Has `callback` called when bytes that [`Serial::receive`] refused would be taken now.
    ///
    /// It is called by a vCPU with the device locked: it wakes the thread that has the bytes, it
    /// does not call `receive` itself.
    pub fn on_input_wanted(&mut self, callback: impl Fn() + Send + 'static) {
        self.input_wanted = Some(Box::new(callback));
    }

    /// Puts bytes into the receive FIFO. Gives the number of bytes that fitted.
    ///
    /// After a result below `bytes.len()` the callback of [`Serial::on_input_wanted`] is called as
    /// soon as the guest has emptied the FIFO.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        // The model reports a full FIFO, its only error, as such; in loop mode it takes nothing.
        let taken = self.uart.enqueue_raw_bytes(bytes).unwrap_or(0);
        self.input_waits = taken < bytes.len();
        self.metrics.bytes_in.add(taken as u64);
        self.pass_edge_on();
        taken
    }

    /// Back to the state after power-on. Output and waiting input stay connected.
    pub fn reset(&mut self) {
        self.replace_uart(Uart::new(EdgeWanted::default(), Vec::new()));
        self.offer_input();
    }

    /// Repeats the edge of an interrupt that is pending and enabled; see the crate's description.
    pub fn raise_pending(&self) {
        let state = self.uart.state();
        let received_data = state.interrupt_enable & IER_RECEIVED_DATA != 0
            && state.interrupt_identification & IIR_RECEIVED_DATA != 0;
        let transmit_empty = state.interrupt_enable & IER_TRANSMIT_EMPTY != 0
            && state.interrupt_identification & IIR_TRANSMIT_EMPTY != 0;
        if received_data || transmit_empty {
            self.pulse();
        }
    }

    /// The counters, readable without the device.
    pub fn metrics(&self) -> Arc<SerialMetrics> {
        Arc::clone(&self.metrics)
    }

    /// The output.
    pub fn output_mut(&mut self) -> &mut W {
        &mut self.output
    }

    pub(super) fn replace_uart(&mut self, uart: Uart) {
        self.uart = uart;
        // Making a model may want an edge, which is for `raise_pending` to give.
        self.uart.interrupt_evt().0.set(false);
    }

    fn pass_edge_on(&self) {
        if self.uart.interrupt_evt().0.take() {
            self.pulse();
        }
    }

    fn pulse(&self) {
        if let Err(error) = self.line.pulse() {
            if self.metrics.interrupt_errors.get() == 0 {
                warn!(%error, "the serial port cannot raise its interrupt");
            }
            self.metrics.interrupt_errors.increment();
        }
    }

    /// Sends on what the guest wrote, without ever failing towards the guest.
    fn pass_output_on(&mut self) {
        if self.uart.writer().is_empty() {
            return;
        }
        let result = self.output.write_all(self.uart.writer()).and_then(|()| self.output.flush());
        match result {
            Ok(()) => self.metrics.bytes_out.add(self.uart.writer().len() as u64),
            Err(error) => {
                if self.metrics.output_errors.get() == 0 {
                    warn!(%error, "output of the serial port is lost");
                }
                self.metrics.output_errors.increment();
            }
        }
        self.uart.writer_mut().clear();
    }

    /// Calls for input when somebody waits for it and there is room.
    fn offer_input(&mut self) {
        if !self.input_waits {
            return;
        }
        let looped = self.uart.state().modem_control & MCR_LOOP != 0;
        if !looped && self.uart.fifo_capacity() == FIFO_SIZE {
            self.input_waits = false;
            if let Some(input_wanted) = &self.input_wanted {
                input_wanted();
            }
        }
    }
}

impl<W: Write + Send> BusDevice for Serial<W> {
    /// One byte; a longer read gives 0xFF and changes nothing.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (register(offset), data) {
            (Some(register), [byte]) => {
                *byte = self.uart.read(register);
                self.offer_input();
            }
            (_, data) => {
                data.fill(0xFF);
                self.metrics.odd_accesses.increment();
            }
        }
    }

    /// One byte; a longer write changes nothing.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Some(register), &[byte]) = (register(offset), data) else {
            self.metrics.odd_accesses.increment();
            return;
        };
        // Writing to a vector and noting an edge cannot fail: there is no error to look at.
        let _ = self.uart.write(register, byte);
        self.pass_output_on();
        self.pass_edge_on();
        self.offer_input();
    }
}

fn register(offset: u64) -> Option<u8> {
    u8::try_from(offset).ok().filter(|offset| u64::from(*offset) < SIZE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::atomic::{AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::super::test_utils::*;
    use super::*;

    #[test]
    fn what_the_guest_sends_comes_out() {
        let mut port = port();
        for byte in b"beat\n" {
            port.serial.write(DATA, &[*byte]);
        }
        assert_eq!(port.serial.output_mut().as_slice(), b"beat\n");
        assert_eq!(port.serial.metrics().bytes_out.get(), 5);
        assert_eq!(port.line.take(), 0, "no interrupt is enabled");
        assert_eq!(port.read(LSR), 0x60, "transmitter empty, no data");
    }

    #[test]
    fn the_transmit_interrupt_comes_once_until_it_is_identified() {
        let mut port = port();
        port.serial.write(IER, &[IER_TRANSMIT_EMPTY]);
        assert_eq!(port.line.take(), 1);
        port.serial.write(DATA, b"a");
        assert_eq!(port.line.take(), 0, "still pending");
        assert_eq!(port.read(IIR) & 0xF, 0x2);
        assert_eq!(port.read(IIR) & 0xF, 0x1, "none");
        port.serial.write(DATA, b"b");
        assert_eq!(port.line.take(), 1);
    }

    #[test]
    fn input_arrives_with_an_interrupt() {
        let mut port = port();
        port.serial.write(IER, &[IER_RECEIVED_DATA]);
        assert_eq!(port.serial.receive(b"ab"), 2);
        assert_eq!(port.line.take(), 1);
        assert_eq!(port.read(LSR) & 1, 1);
        assert_eq!((port.read(DATA), port.read(DATA)), (b'a', b'b'));
        assert_eq!(port.read(LSR) & 1, 0);
    }

    #[test]
    fn a_full_fifo_takes_the_rest_when_the_guest_has_emptied_it() {
        let mut port = port();
        let calls = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&calls);
        port.serial.on_input_wanted(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });

        assert_eq!(port.serial.receive(&[7; 100]), FIFO_SIZE);
        assert_eq!(port.serial.receive(&[7; 36]), 0);
        for _ in 0..FIFO_SIZE - 1 {
            port.read(DATA);
        }
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        port.read(DATA);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        // A guest that goes on reading nothing wakes nobody.
        port.read(DATA);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert_eq!(port.serial.receive(&[7; 36]), 36);
        assert_eq!(port.serial.metrics().bytes_in.get(), 100);
    }

    #[test]
    fn input_refused_in_loop_mode_is_wanted_after_it() {
        let mut port = port();
        let calls = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&calls);
        port.serial.on_input_wanted(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        });
        port.serial.write(MCR, &[MCR_LOOP]);
        assert_eq!(port.serial.receive(b"x"), 0);
        port.read(LSR);
        assert_eq!(calls.load(Ordering::SeqCst), 0);
        port.serial.write(MCR, &[0]);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert_eq!(port.serial.receive(b"x"), 1);
    }

    #[test]
    fn a_broken_output_costs_bytes_only() {
        let line = Arc::new(crate::test_utils::CountingLine::default());
        let mut serial = Serial::new(line.clone(), Broken);
        serial.write(IER, &[IER_TRANSMIT_EMPTY]);
        serial.read(IIR, &mut [0]);
        line.take();
        serial.write(DATA, b"a");
        assert_eq!(line.take(), 1, "the guest can go on sending");
        assert_eq!(serial.metrics().output_errors.get(), 1);
        assert_eq!(serial.metrics().bytes_out.get(), 0);
    }

    #[test]
    fn a_broken_interrupt_is_counted() {
        let mut port = port();
        port.line.break_it();
        port.serial.write(IER, &[IER_TRANSMIT_EMPTY]);
        assert_eq!(port.serial.metrics().interrupt_errors.get(), 1);
    }

    #[test]
    fn accesses_of_other_sizes_change_nothing() {
        let mut port = port();
        port.serial.receive(b"a");
        for size in [0, 2, 3, 4, 8] {
            let mut data = vec![0; size];
            port.serial.read(DATA, &mut data);
            assert_eq!(data, vec![0xFF; size]);
            port.serial.write(DATA, &vec![b'!'; size]);
        }
        port.serial.write(SIZE, b"!");
        assert!(port.serial.output_mut().is_empty());
        assert_eq!(port.serial.metrics().odd_accesses.get(), 11);
        assert_eq!(port.read(DATA), b'a');
    }

    #[test]
    fn a_reset_forgets_everything_but_the_wires() {
        let mut port = port();
        port.serial.write(IER, &[IER_RECEIVED_DATA]);
        port.serial.receive(b"abc");
        port.line.take();
        port.serial.reset();
        assert_eq!((port.read(IER), port.read(LSR)), (0, 0x60));
        port.serial.write(DATA, b"z");
        assert_eq!(port.serial.output_mut().as_slice(), b"z");
        assert_eq!(port.line.take(), 0);
    }

    proptest! {
        #[test]
        fn a_hostile_guest_breaks_nothing(
            accesses in proptest::collection::vec(
                (any::<bool>(), 0u64..10, proptest::collection::vec(any::<u8>(), 0..5)),
                0..200,
            ),
        ) {
            let mut port = port();
            for (is_write, offset, mut data) in accesses {
                if is_write {
                    port.serial.write(offset, &data);
                } else {
                    port.serial.read(offset, &mut data);
                }
                port.serial.receive(&data);
                port.serial.raise_pending();
            }
        }
    }
}
