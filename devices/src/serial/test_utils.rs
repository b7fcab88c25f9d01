//! A serial port on a counting line, and the register names.

use std::io::{self, Write};
use std::sync::Arc;

use super::Serial;
use crate::test_utils::CountingLine;
use crate::BusDevice;

pub(super) const DATA: u64 = 0;
pub(super) const IER: u64 = 1;
pub(super) const IIR: u64 = 2;
pub(super) const MCR: u64 = 4;
pub(super) const LSR: u64 = 5;

pub(super) struct Port {
    pub(super) serial: Serial<Vec<u8>>,
    pub(super) line: Arc<CountingLine>,
}

impl Port {
    pub(super) fn read(&mut self, offset: u64) -> u8 {
        let mut data = [0];
        self.serial.read(offset, &mut data);
        data[0]
    }
}

pub(super) fn port() -> Port {
    let line = Arc::new(CountingLine::default());
    Port { serial: Serial::new(line.clone(), Vec::new()), line }
}

/// An output whose other end is gone.
pub(super) struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
