//! The main connection's sending half, shared by whoever has something to say, and its keepalive.

use std::io::BufWriter;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::stream::session::{shortened, Abort, Alive, Payload};
use crate::stream::{RecordWriter, StreamError, StreamKind};
use crate::transport::{Stream, Transport};

/// Records up to this size go out together in one write, bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// So many times the silence of a dead peer a source waits for DRAINED after the last page that it sent: what is in the
/// buffers of a slow link takes its time.
pub(crate) const LAST_WORD: u32 = 12;

/// How often each end shows that it is there, and how long it waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// How often an end with nothing to say says so.
    pub alive: Duration,
    /// After how long silence the peer is dead.
    pub dead: Duration,
    /// For one connection to be made.
    pub connect: Duration,
    /// For the answer to the offer, and for a connection's first records.
    pub accept: Duration,
    /// For the destination to make the VM.
    pub ready: Duration,
    /// For vCPUs and devices to come to rest.
    pub pause: Duration,
    /// For the destination to load everything, with the guest paused.
    pub loaded: Duration,
    /// For the destination to resume the guest.
    pub resumed: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            alive: Duration::from_secs(1),
            dead: Duration::from_secs(5),
            connect: Duration::from_secs(5),
            accept: Duration::from_secs(10),
            ready: Duration::from_secs(60),
            pause: Duration::from_secs(5),
            loaded: Duration::from_secs(10),
            resumed: Duration::from_secs(10),
        }
    }
}

pub(crate) type MainWriter = RecordWriter<BufWriter<Stream>>;

/// The sending half of a main connection.
pub(crate) struct MainLink {
    writer: Mutex<MainWriter>,
    transport: Arc<dyn Transport>,
    closed: Mutex<bool>,
    closing: Condvar,
}

impl MainLink {
    /// Begins the stream. Nothing is sent before the first record.
    pub(crate) fn open(
        transport: Arc<dyn Transport>,
        kind: StreamKind,
    ) -> Result<Self, StreamError> {
        let out = BufWriter::with_capacity(BUFFER_BYTES, Stream(Arc::clone(&transport)));
        let writer = Mutex::new(RecordWriter::new(out, kind)?);
        Ok(Self { writer, transport, closed: Mutex::new(false), closing: Condvar::new() })
    }

    /// Whether the other end is known to be on this host.
    pub(crate) fn is_local(&self) -> bool {
        self.transport.is_local()
    }

    /// Sends one record now.
    pub(crate) fn send<T: Payload + Serialize>(&self, value: &T) -> Result<(), StreamError> {
        self.write(|writer| writer.send(value))
    }

    /// Lets `records` write several, and sends them together.
    pub(crate) fn write<E: From<StreamError>>(
        &self,
        records: impl FnOnce(&mut MainWriter) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut writer = self.writer();
        records(&mut writer)?;
        Ok(writer.flush()?)
    }

    /// Tells the peer why it ends, if the peer can be reached.
    pub(crate) fn abort(&self, reason: u16, text: &str) {
        let sent = self.send(&Abort { reason, text: shortened(text, 2000) });
        if let Err(error) = sent {
            tracing::debug!(%error, "the peer was not told that the migration ends");
        }
    }

    /// Shows every `interval` that this end is there, until the link is closed. If it cannot, the connection
    /// ends, and the reader of the other half notices.
    pub(crate) fn keep_alive(&self, interval: Duration) {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let waited = self.closing.wait_timeout(closed, interval);
            closed = waited.unwrap_or_else(PoisonError::into_inner).0;
            if *closed {
                return;
            }
            drop(closed);
            if let Err(error) = self.send(&Alive {}) {
                tracing::debug!(%error, "keepalive");
                self.transport.shutdown();
                return;
            }
            closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the connection and the keepalive.
    pub(crate) fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.closing.notify_all();
        self.transport.shutdown();
    }

    fn writer(&self) -> MutexGuard<'_, MainWriter> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
