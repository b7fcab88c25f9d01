//! An entropy source that counts upwards.

use std::io;

use super::{EntropySource, Rng};

#[derive(Debug, Default)]
pub(super) struct Count {
    next: u8,
    /// Bytes until the source is dry.
    pub(super) dry_after: Option<usize>,
}

impl EntropySource for Count {
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        if let Some(left) = &mut self.dry_after {
            *left = left.checked_sub(bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        }
        for byte in bytes {
            *byte = self.next;
            self.next = self.next.wrapping_add(1);
        }
        Ok(())
    }
}

pub(super) fn rng() -> Rng<Count> {
    Rng::new(Count::default())
}
