//! What the destination says on the main connection, read and checked for its order.

use std::io::BufReader;
use std::sync::mpsc;
use std::sync::Arc;
use std::time::Duration;

use crate::handover::Cause;
use crate::identity::{MigrationId, Token};
use crate::source::Input;
use crate::stream::session::{
    printable, Abort, Accept, Alive, Hello, Loaded, Ready, Refuse, Resumed, MAX_CONNECTIONS,
    MAX_REASONS,
};
use crate::stream::{Problem, RecordReader, RecordType, StreamError, StreamKind};
use crate::transport::{Stream, Transport};

/// A record of the destination.
#[derive(Debug)]
pub(super) enum Message {
    Accept { token: Token, connections: u16 },
    Refuse(Vec<String>),
    Ready { load: Duration },
    Loaded { load: Duration },
    Resumed { own: Duration, resume: Duration, cpu: Duration },
    Abort(String),
}

/// Reads until the connection ends, and tells the engine. Anything out of order is a breach.
pub(super) fn read_main(
    id: MigrationId,
    offered: u16,
    transport: Arc<dyn Transport>,
    inbox: &mpsc::Sender<Input>,
) {
    let error = match read(id, offered, transport, inbox) {
        Ok(()) => return,
        Err(error) => error,
    };
    let lost = match error.problem {
        Problem::Read(_) | Problem::Truncated => Input::Lost(
            Cause::Lost,
            format!("the connection to the destination was lost: {}", error.problem),
        ),
        _ => Input::Lost(Cause::Protocol, format!("the destination broke the protocol: {error}")),
    };
    // Fails when the engine has ended.
    let _ = inbox.send(lost);
}

fn read(
    id: MigrationId,
    offered: u16,
    transport: Arc<dyn Transport>,
    inbox: &mpsc::Sender<Input>,
) -> Result<(), StreamError> {
    let reader = BufReader::new(Stream(transport));
    let mut records = RecordReader::new(reader, StreamKind::Migration)?;
    let record = records.next_record()?;
    let hello: Hello<'_> = record.decode("HELLO")?;
    if hello.id != id.0 {
        let what = "another migration id".to_owned();
        return Err(record.error(Problem::Malformed { record_type: RecordType::Hello, what }));
    }
    tracing::debug!(program = hello.program, "the destination answers");
    let mut expected = RecordType::Accept;
    loop {
        let record = records.next_record()?;
        let malformed = |what: &str| {
            let what = what.to_owned();
            record.error(Problem::Malformed { record_type: record.record_type, what })
        };
        let (message, next) = match (record.record_type, expected) {
            (RecordType::Alive, _) => {
                let Alive {} = record.decode("ALIVE")?;
                continue;
            }
            (RecordType::Abort, _) => {
                let abort: Abort<'_> = record.decode("ABORT")?;
                (Message::Abort(printable(abort.text)), RecordType::End)
            }
            (RecordType::Refuse, RecordType::Accept | RecordType::Ready) => {
                let refuse: Refuse<'_> = record.decode("REFUSE")?;
                if refuse.reasons.is_empty() || refuse.reasons.len() > MAX_REASONS {
                    return Err(malformed("no reason, or too many"));
                }
                let reasons = refuse.reasons.iter().map(|reason| printable(reason)).collect();
                (Message::Refuse(reasons), RecordType::End)
            }
            (RecordType::Accept, RecordType::Accept) => {
                let accept: Accept = record.decode("ACCEPT")?;
                let most = offered.min(MAX_CONNECTIONS);
                if accept.connections == 0 || accept.connections > most {
                    return Err(malformed("another number of connections than was offered"));
                }
                let token = Token::from_bytes(accept.token);
                let connections = accept.connections;
                (Message::Accept { token, connections }, RecordType::Ready)
            }
            (RecordType::Ready, RecordType::Ready) => {
                let ready: Ready = record.decode("READY")?;
                (Message::Ready { load: Duration::from_micros(ready.load_us) }, RecordType::Loaded)
            }
            (RecordType::Loaded, RecordType::Loaded) => {
                let loaded: Loaded = record.decode("LOADED")?;
                let load = Duration::from_micros(loaded.load_us);
                (Message::Loaded { load }, RecordType::Resumed)
            }
            (RecordType::Resumed, RecordType::Resumed) => {
                let resumed: Resumed = record.decode("RESUMED")?;
                let message = Message::Resumed {
                    own: Duration::from_micros(resumed.own_us),
                    resume: Duration::from_micros(resumed.resume_us),
                    cpu: Duration::from_micros(resumed.cpu_us),
                };
                (message, RecordType::End)
            }
            (found, _) => {
                let expected = "ACCEPT, READY, LOADED and RESUMED, in this order, once each";
                return Err(record.error(Problem::Unexpected { found, expected }));
            }
        };
        let ends = next == RecordType::End;
        if inbox.send(Input::Peer(message)).is_err() || ends {
            return Ok(());
        }
        expected = next;
    }
}
