//! A connection as a peer has it that says anything.

use std::io::{self, IoSlice, Read};
use std::sync::Arc;

use migration::stream::StreamKind;
use migration::transport::Transport;

use super::frames::{preamble, record};

/// The sending half.
pub struct Wire {
    pub transport: Arc<dyn Transport>,
    sequence: u64,
}

impl Wire {
    /// Sends the preamble.
    pub fn begin(transport: Arc<dyn Transport>, kind: StreamKind) -> Self {
        let wire = Self { transport, sequence: 0 };
        wire.raw(&preamble(kind));
        wire
    }

    /// Sends bytes, as far as they go.
    pub fn raw(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.transport.write_vectored(&[IoSlice::new(bytes)]) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(_) => return,
            }
        }
    }

    /// Sends a record that is right but for its payload.
    pub fn send(&mut self, number: u16, flags: u16, payload: &[u8]) {
        self.raw(&record(number, flags, self.sequence, payload));
        self.sequence += 1;
    }
}

/// The receiving half.
pub struct Incoming(pub Arc<dyn Transport>);

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}
