//! The thread that answers requests for pages, on the connection that they come by.

use std::sync::atomic::Ordering;
use std::sync::mpsc;

use crate::address::PageRange;
use crate::handover::Cause;
use crate::source::postcopy::frozen::Frozen;
use crate::source::postcopy::outflow::Outflow;
use crate::source::postcopy::Joint;
use crate::source::sender::Shared;
use crate::source::Input;
use crate::stream::{decode_runs, Problem, RecordType, StreamError};
use crate::vm::SourceVm;

/// Sends the `first` pages, then answers until the connection ends.
pub(in crate::source) fn serve(
    mut link: Joint,
    vm: &dyn SourceVm,
    first: &[PageRange],
    outflow: &Outflow,
    shared: &Shared,
    inbox: &mpsc::Sender<Input>,
) {
    link.transport.hurry();
    let mut frozen = Frozen::default();
    let mut work = || -> Result<(), StreamError> {
        if !first.is_empty() {
            counted(&mut link, shared, |link| frozen.send(&mut link.writer, vm, first))?;
        }
        loop {
            answer(&mut link, vm, outflow, shared, &mut frozen)?;
        }
    };
    let Err(error) = work() else { return };
    let cause = match error.problem {
        Problem::Read(_) | Problem::Write(_) | Problem::Truncated => Cause::Lost,
        Problem::Vm(_) => Cause::Failed,
        _ => Cause::Protocol,
    };
    // Fails when the engine has ended.
    let _ = inbox.send(Input::Lost(cause, format!("the connection for requests: {error}")));
}

fn answer(
    link: &mut Joint,
    vm: &dyn SourceVm,
    outflow: &Outflow,
    shared: &Shared,
    frozen: &mut Frozen,
) -> Result<(), StreamError> {
    let record = link.records.next_record()?;
    if record.record_type != RecordType::Request {
        let found = record.record_type;
        return Err(record.error(Problem::Unexpected { found, expected: "REQUEST" }));
    }
    let runs = decode_runs(RecordType::Request, record.payload, vm.layout())
        .map_err(|problem| record.error(problem))?;
    let unit = vm.unit_pages();
    for page in runs.iter().flat_map(|run| run.chunks(unit)) {
        let Some(answer) = outflow.answer(page.start()) else {
            return Err(link.writer.error(Problem::Truncated));
        };
        let sent = counted(link, shared, |link| send(link, vm, &answer, frozen));
        outflow.answered();
        sent?;
    }
    Ok(())
}

/// Counts the bytes that are sent.
fn counted(
    link: &mut Joint,
    shared: &Shared,
    send: impl FnOnce(&mut Joint) -> Result<(), StreamError>,
) -> Result<(), StreamError> {
    let before = link.writer.bytes();
    send(link)?;
    shared.bytes.fetch_add(link.writer.bytes() - before, Ordering::Relaxed);
    Ok(())
}

/// The page that somebody waits for goes first, by itself.
fn send(
    link: &mut Joint,
    vm: &dyn SourceVm,
    answer: &[PageRange],
    frozen: &mut Frozen,
) -> Result<(), StreamError> {
    let Some((page, others)) = answer.split_first() else { return Ok(()) };
    frozen.send(&mut link.writer, vm, &[*page])?;
    if others.is_empty() {
        return Ok(());
    }
    frozen.send(&mut link.writer, vm, others)
}
