//! What the destination says on the main connection, read and checked for its order.

use std::io::BufReader;
use std::sync::mpsc;
use std::sync::Arc;
use std::time::Duration;

use crate::destination::DrainReport;
use crate::handover::Cause;
use crate::histogram::Histogram;
use crate::identity::{MigrationId, Token};
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::source::Input;
use crate::stream::session::{
    printable, Abort, Accept, Alive, Drained, Echo, Hello, Loaded, Ready, Recovered, Refuse,
    Resumed, FEATURE_FRAMES, MAX_CONNECTIONS, MAX_REASONS,
};
use crate::stream::{decode_runs, Problem, RecordReader, RecordType, StreamError, StreamKind};
use crate::transport::{Stream, Transport};

/// A record of the destination.
#[derive(Debug)]
pub(super) enum Message {
    Accept {
        token: Token,
        connections: u16,
        /// It takes frames that come late.
        frames: bool,
    },
    Refuse(Vec<String>),
    Ready {
        load: Duration,
    },
    Loaded {
        load: Duration,
    },
    Resumed {
        own: Duration,
        resume: Duration,
        cpu: Duration,
    },
    /// What was retracted is void there.
    Echo(u32),
    /// It goes on, and lacks these pages.
    Recovered {
        missing: PageSet,
        connections: u16,
    },
    /// All pages are there.
    Drained {
        report: Box<DrainReport>,
        cpu: Duration,
    },
    Abort(String),
}

/// Reads until the connection ends, and tells the engine. Anything out of order is a breach.
pub(super) fn read_main(
    id: MigrationId,
    offered: u16,
    may_switch: bool,
    transport: Arc<dyn Transport>,
    inbox: &mpsc::Sender<Input>,
) {
    if let Err(error) = read(id, offered, may_switch, transport, inbox) {
        tell_lost(&error, inbox);
    }
}

fn tell_lost(error: &StreamError, inbox: &mpsc::Sender<Input>) {
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
    may_switch: bool,
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
    let frames = hello.features & FEATURE_FRAMES != 0;
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
                (Message::Accept { token, connections, frames }, RecordType::Ready)
            }
            (RecordType::Ready, RecordType::Ready) => {
                let ready: Ready = record.decode("READY")?;
                (Message::Ready { load: Duration::from_micros(ready.load_us) }, RecordType::Loaded)
            }
            (RecordType::Echo, RecordType::Loaded) if may_switch => {
                let echo: Echo = record.decode("ECHO")?;
                (Message::Echo(echo.number), RecordType::Loaded)
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
                let next = if may_switch { RecordType::Drained } else { RecordType::End };
                (message, next)
            }
            (RecordType::Drained, RecordType::Drained) => {
                (drained(&record.decode("DRAINED")?), RecordType::End)
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

fn drained(drained: &Drained<'_>) -> Message {
    let blocked = drained.blocked.iter();
    let report = DrainReport {
        complete: true,
        requests: drained.requests,
        demand_pages: drained.demand_pages,
        prepaged_pages: drained.prepaged_pages,
        pushed_pages: drained.pushed_pages,
        zero_pages: drained.zero_pages,
        local_pages: drained.local_pages,
        duplicate_pages: drained.duplicate_pages,
        latency: Histogram::from_buckets(&drained.latency),
        blocked_us: blocked.map(|(name, us)| (printable(name), *us)).collect(),
        drain: Duration::from_micros(drained.drain_us),
        ..DrainReport::default()
    };
    Message::Drained { report: Box::new(report), cpu: Duration::from_micros(drained.cpu_us) }
}

/// As [`read_main`], on a connection that goes on with post-copy: `layout` is that of the VM.
pub(super) fn read_continued(
    id: MigrationId,
    most_connections: u16,
    layout: &Arc<MemoryLayout>,
    transport: Arc<dyn Transport>,
    inbox: &mpsc::Sender<Input>,
) {
    if let Err(error) = continued(id, most_connections, layout, transport, inbox) {
        tell_lost(&error, inbox);
    }
}

fn continued(
    id: MigrationId,
    most_connections: u16,
    layout: &Arc<MemoryLayout>,
    transport: Arc<dyn Transport>,
    inbox: &mpsc::Sender<Input>,
) -> Result<(), StreamError> {
    let reader = BufReader::new(Stream(transport));
    let mut records = RecordReader::new(reader, StreamKind::Continue)?;
    let record = records.next_record()?;
    let hello: Hello<'_> = record.decode("HELLO")?;
    if hello.id != id.0 {
        let what = "another migration id".to_owned();
        return Err(record.error(Problem::Malformed { record_type: RecordType::Hello, what }));
    }
    let record = records.next_record()?;
    if record.record_type == RecordType::Refuse {
        let refuse: Refuse<'_> = record.decode("REFUSE")?;
        let reasons = refuse.reasons.iter().take(MAX_REASONS);
        let reasons = reasons.map(|reason| printable(reason)).collect();
        let _ = inbox.send(Input::Peer(Message::Refuse(reasons)));
        return Ok(());
    }
    let recovered: Recovered = record.decode("RECOVERED or REFUSE")?;
    if recovered.connections == 0 || recovered.connections > most_connections {
        let what = format!("{} connections", recovered.connections);
        return Err(record.error(Problem::Malformed { record_type: RecordType::Recovered, what }));
    }
    let mut missing = PageSet::empty(layout);
    while missing.count() < recovered.pages {
        let record = records.next_record()?;
        if record.record_type != RecordType::Missing {
            let found = record.record_type;
            return Err(record.error(Problem::Unexpected { found, expected: "MISSING" }));
        }
        let runs = decode_runs(RecordType::Missing, record.payload, layout)
            .map_err(|problem| record.error(problem))?;
        for run in runs {
            if missing.insert(run).map_err(|error| record.error(error))? != run.pages() {
                return Err(record.error(Problem::DuplicatePages(run)));
            }
        }
    }
    let (claimed, counted) = (recovered.pages, missing.count());
    if claimed != counted {
        return Err(records.error(Problem::Totals { what: "missing pages", claimed, counted }));
    }
    let message = Message::Recovered { missing, connections: recovered.connections };
    if inbox.send(Input::Peer(message)).is_err() {
        return Ok(());
    }
    loop {
        let record = records.next_record()?;
        let message = match record.record_type {
            RecordType::Alive => {
                let Alive {} = record.decode("ALIVE")?;
                continue;
            }
            RecordType::Abort => {
                let abort: Abort<'_> = record.decode("ABORT")?;
                Message::Abort(printable(abort.text))
            }
            _ => drained(&record.decode("ALIVE, ABORT or DRAINED")?),
        };
        let _ = inbox.send(Input::Peer(message));
        return Ok(());
    }
}
