//! Bringing pages in, by each of the connections.

use std::io::Read;
use std::sync::mpsc;

use crate::destination::postcopy::arrivals::{Arrivals, Way};
use crate::destination::Input;
use crate::handover::Cause;
use crate::stream::{decode_pages, decode_runs, Problem, RecordReader, RecordType, StreamError};

/// Puts in what comes until the connection ends.
pub(in crate::destination) fn bring_all<R: Read>(
    mut records: RecordReader<R>,
    arrivals: &Arrivals,
    way: Way,
    generation: u32,
    inbox: &mpsc::Sender<Input>,
) {
    records.expect_checksums();
    let error = loop {
        match bring(&mut records, arrivals, way) {
            Ok(false) => {}
            Ok(true) => drop(inbox.send(Input::AllHere)),
            Err(error) => break error,
        }
    };
    let cause = match error.problem {
        Problem::Read(_) | Problem::Truncated => Cause::Lost,
        Problem::Vm(_) => Cause::Failed,
        _ => Cause::Protocol,
    };
    let name = match way {
        Way::Demand => "the connection for requests",
        Way::Push => "a page connection",
    };
    // Fails when the session has ended.
    let _ = inbox.send(Input::Lost { generation, cause, text: format!("{name}: {error}") });
}

/// One record; whether no page is missing any more.
fn bring<R: Read>(
    records: &mut RecordReader<R>,
    arrivals: &Arrivals,
    way: Way,
) -> Result<bool, StreamError> {
    let layout = arrivals.layout();
    let record = records.next_record()?;
    let mut all = false;
    match record.record_type {
        RecordType::Pages => {
            let (runs, mut data) =
                decode_pages(record.payload, layout).map_err(|problem| record.error(problem))?;
            for run in runs {
                let (mine, rest) = data.split_at(run.bytes() as usize);
                data = rest;
                all |= arrivals.bring(run, Some(mine), way).map_err(|p| record.error(p))?;
            }
        }
        RecordType::Zero => {
            let runs = decode_runs(record.record_type, record.payload, layout)
                .map_err(|problem| record.error(problem))?;
            for run in runs {
                all |= arrivals.bring(run, None, way).map_err(|p| record.error(p))?;
            }
        }
        found => {
            let expected = "PAGES or ZERO";
            return Err(record.error(Problem::Unexpected { found, expected }));
        }
    }
    Ok(all)
}
