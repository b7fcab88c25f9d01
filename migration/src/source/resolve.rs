//! Asking for a verdict.

use std::io;
use std::time::Duration;

use crate::handover::{SourceEvent, Verdict};
use crate::identity::{MigrationId, Token};
use crate::journal::Side;
use crate::source::engine::Engine;
use crate::stream::session::{Query, VerdictWire};
use crate::stream::{Problem, RecordReader, RecordWriter, StreamError, StreamKind};
use crate::transport::{Connector, Stream};

/// First and longest wait between two questions for a verdict.
pub(super) const ASK_FIRST: Duration = Duration::from_millis(50);
const ASK_LONGEST: Duration = Duration::from_secs(5);

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No connection.
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    /// The answer did not come or is none.
    #[error("{0} does not answer: {1}")]
    Answer(String, StreamError),
}

/// Asks the host behind `connector` what became of a migration at its `side`. With `reclaim`, a
/// destination that has not decided decides `not here`.
///
/// # Errors
/// [`AskError`]; nothing is known then.
pub fn ask_verdict(
    connector: &dyn Connector,
    id: MigrationId,
    token: &Token,
    side: Side,
    reclaim: bool,
    timeout: Duration,
) -> Result<Verdict, AskError> {
    let transport = connector
        .connect(timeout)
        .and_then(|transport| {
            transport.set_timeouts(Some(timeout), Some(timeout))?;
            Ok(transport)
        })
        .map_err(|error| AskError::Connect(connector.address(), error))?;
    let ask = || -> Result<Verdict, StreamError> {
        let mut out = RecordWriter::new(Stream(transport.clone()), StreamKind::Query)?;
        let token = token.bytes();
        out.send(&Query { id: id.0, side: side as u16, reclaim, token })?;
        let mut records = RecordReader::new(Stream(transport.clone()), StreamKind::Query)?;
        let record = records.next_record()?;
        let answer: VerdictWire = record.decode("VERDICT")?;
        Verdict::from_number(answer.verdict).ok_or_else(|| {
            let what = format!("verdict {}", answer.verdict);
            record.error(Problem::Malformed { record_type: record.record_type, what })
        })
    };
    let verdict = ask().map_err(|error| AskError::Answer(connector.address(), error));
    transport.shutdown();
    verdict
}

impl Engine<'_, '_, '_> {
    /// Asks the destination's host once, then waits a little; or an operator decides.
    pub(super) fn await_verdict(&mut self) -> SourceEvent {
        self.let_frames_go();
        match self.ask() {
            Some(Ok(verdict @ (Verdict::RunningHere | Verdict::NotHere))) => {
                return SourceEvent::Verdict(verdict);
            }
            Some(Ok(verdict)) => {
                self.tell(Some(format!("the destination's host says {verdict:?}")));
            }
            Some(Err(error)) => self.tell(Some(error.to_string())),
            None => {}
        }
        self.wait_ignoring(self.ask_wait);
        self.ask_wait = (self.ask_wait * 2).min(ASK_LONGEST);
        let decided = self.resolved.or_else(|| self.entry.as_mut().and_then(|e| e.resolved()));
        // Who stopped waiting has it all the same.
        self.detached &= decided.is_none();
        decided.map_or(SourceEvent::NoVerdict, SourceEvent::Resolved)
    }

    /// Asks the destination's host, with reclaim. `None`: there was no token yet.
    pub(super) fn ask(&self) -> Option<Result<Verdict, AskError>> {
        let token = self.token.as_ref()?;
        let (id, timeout) = (self.around.control.id(), self.around.options.timing.connect);
        Some(ask_verdict(self.around.connector, id, token, Side::Destination, true, timeout))
    }
}
