//! A host that notes what it is given.

use std::io;

use super::{Balloon, Discard};

#[derive(Debug, Default)]
pub(super) struct Given {
    ranges: Vec<(u64, u64)>,
    pub(super) broken: bool,
}

impl Given {
    /// Ranges since the last call: guest-physical start and length.
    pub(super) fn taken(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.ranges)
    }
}

impl Discard for Given {
    fn discard(&mut self, gpa: u64, len: u64) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.ranges.push((gpa, len));
        Ok(())
    }
}

pub(super) fn balloon() -> Balloon<Given> {
    Balloon::new(Given::default(), true)
}
