//! Asking for a verdict.

use std::io;
use std::time::Duration;

use crate::handover::Verdict;
use crate::identity::{MigrationId, Token};
use crate::journal::Side;
use crate::stream::session::{Query, VerdictWire};
use crate::stream::{Problem, RecordReader, RecordWriter, StreamError, StreamKind};
use crate::transport::{Connector, Stream};

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
