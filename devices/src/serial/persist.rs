//! The frozen state of the serial port.

use std::io::Write;

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;

use super::device::{EdgeWanted, Uart};
use super::{Serial, FIFO_SIZE};
use crate::{Persist, PersistError};

/// State of a serial port, version 1: the registers by their names in the 16550 data sheet, and
/// the receive FIFO. There is no transmit FIFO: what the guest sent has left the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// DLL.
    pub divisor_latch_low: u8,
    /// DLM.
    pub divisor_latch_high: u8,
    /// IER.
    pub interrupt_enable: u8,
    /// Pending interrupts: bit 0 none, bit 1 transmitter empty, bit 2 received data.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// Received bytes that the guest has not read, oldest first; at most [`FIFO_SIZE`].
    pub receive_fifo: Vec<u8>,
}

impl<W: Write + Send> Persist for Serial<W> {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
    type State = SerialState;
    type Error = PersistError;

    fn save(&self) -> Result<SerialState, PersistError> {
        let state = self.uart.state();
        Ok(SerialState {
            divisor_latch_low: state.baud_divisor_low,
            divisor_latch_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            receive_fifo: state.in_buffer,
        })
    }

    fn restore(&mut self, state: &SerialState) -> Result<(), PersistError> {
        let held = state.receive_fifo.len();
        let invalid = |reason| PersistError::Invalid { kind: Self::KIND, reason };
        if held > FIFO_SIZE {
            let reason = format!("{held} bytes in a receive FIFO of {FIFO_SIZE}");
            return Err(invalid(reason));
        }
        let state = vm_superio::SerialState {
            baud_divisor_low: state.divisor_latch_low,
            baud_divisor_high: state.divisor_latch_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.receive_fifo.clone(),
        };
        let uart = Uart::from_state(&state, EdgeWanted::default(), NoEvents, Vec::new())
            .map_err(|error| invalid(error.to_string()))?;
        self.replace_uart(uart);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::*;
    use super::*;
    use crate::{BusDevice, Payload};

    /// A port with both interrupts enabled and pending, and three bytes not read.
    fn busy_port() -> Port {
        let mut port = port();
        port.serial.write(IER, &[3]);
        port.serial.write(7, &[0x5A]);
        port.serial.receive(b"abc");
        port.line.take();
        port
    }

    #[test]
    fn the_state_survives() {
        let saved = busy_port().serial.save_payload(0).unwrap();
        let mut port = port();
        port.serial.restore_payload(&saved).unwrap();
        assert_eq!(port.serial.save_payload(0).unwrap(), saved);
        assert_eq!(port.line.take(), 0, "restoring raises nothing");
        port.serial.write(7, &[0x5A]);
        assert_eq!(port.line.take(), 0, "nor does the next access");
        port.serial.raise_pending();
        assert_eq!(port.line.take(), 1);
        assert_eq!((port.read(7), port.read(IER)), (0x5A, 3));
        assert_eq!([port.read(DATA), port.read(DATA), port.read(DATA)], *b"abc");
        port.serial.write(DATA, b"!");
        assert_eq!(port.serial.output_mut().as_slice(), b"!");
    }

    #[test]
    fn an_idle_or_masked_port_raises_nothing() {
        port().serial.raise_pending();
        let mut masked = busy_port();
        masked.serial.write(IER, &[0]);
        masked.serial.raise_pending();
        assert_eq!(masked.line.take(), 0);
    }

    #[test]
    fn version_1_still_decodes() {
        let golden = [0x0C, 0, 3, 6, 3, 0x61, 8, 0xB0, 0x5A, 3, b'a', b'b', b'c'];
        assert_eq!(busy_port().serial.save_payload(0).unwrap().data, golden);
        let payload =
            Payload { kind: "serial".into(), instance: 0, version: 1, data: golden.to_vec() };
        let mut port = port();
        port.serial.restore_payload(&payload).unwrap();
        assert_eq!(port.serial.save().unwrap(), busy_port().serial.save().unwrap());
    }

    #[test]
    fn an_overfull_fifo_is_refused() {
        let mut state = busy_port().serial.save().unwrap();
        state.receive_fifo = vec![0; FIFO_SIZE + 1];
        let error = port().serial.restore(&state).unwrap_err();
        assert!(error.to_string().contains("65 bytes in a receive FIFO of 64"), "{error}");
    }
}
