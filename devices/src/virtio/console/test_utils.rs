//! A console whose output is kept, or refused.

use std::io::{self, Write};

use super::Console;
use crate::virtio::test_utils::Driver;

pub(super) fn driver() -> Driver<Console<Vec<u8>>> {
    Driver::live(Console::new(Vec::new()), 0)
}

/// Input from outside.
pub(super) fn receive<W: Write + Send>(driver: &Driver<Console<W>>, bytes: &[u8]) -> Option<usize> {
    driver.handle.with_queues(|console, context| console.receive(context, bytes))
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
