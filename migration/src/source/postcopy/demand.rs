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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::address::Gfn;
    use crate::layout::MemoryLayout;
    use crate::page_set::PageSet;
    use crate::prepaging::{Plan, Prepaging};
    use crate::simulated::{LocalNetwork, SimulatedVm};
    use crate::stream::{decode_pages, encode_runs, RecordReader, RecordWriter, StreamKind};
    use crate::transport::{Connector, Listener, Stream};

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(Gfn(start), pages).unwrap()
    }

    /// What a source of 16 pages answers to records that name runs, and why it ends.
    fn served(records: &[(RecordType, PageRange)]) -> (Vec<PageRange>, Cause, String) {
        let layout = MemoryLayout::new([range(0, 16)]).unwrap();
        let vm = SimulatedVm::new(layout.clone()).unwrap();
        (0..16).for_each(|gfn| vm.guest_write(Gfn(gfn), &[7]).unwrap());
        let plan = Plan::new(PageSet::full(&Arc::new(layout.clone())), 1, Prepaging::Off);
        let network = LocalNetwork::new();
        let near = network.connect(Duration::ZERO).unwrap();
        let far = network.accept(Duration::from_secs(10)).unwrap().unwrap();
        // A record that is taken is not followed by another.
        near.set_timeouts(Some(Duration::from_secs(10)), None).unwrap();
        let kind = StreamKind::Requests;
        let mut out = RecordWriter::new(Stream(Arc::clone(&far)), kind).unwrap();
        let writer = RecordWriter::new(Stream(Arc::clone(&near)), kind).unwrap();
        let reader = RecordReader::new(Stream(Arc::clone(&near)), kind).unwrap();
        let mut answers = RecordReader::new(Stream(Arc::clone(&far)), kind).unwrap();
        let mut table = Vec::new();
        for (record_type, run) in records {
            encode_runs(&[*run], &mut table);
            out.write(*record_type, &[&table]).unwrap();
        }
        let (sender, inbox) = mpsc::channel();
        let link = Joint { records: reader, writer, transport: Arc::clone(&near) };
        serve(link, &vm, &[], &Outflow::new(plan, false), &Shared::new(None), &sender);
        near.shutdown();
        let mut sent = Vec::new();
        while let Ok(record) = answers.next_record() {
            sent.extend(decode_pages(record.payload, &layout).unwrap().0);
        }
        match inbox.try_recv().unwrap() {
            Input::Lost(cause, text) => (sent, cause, text),
            _ => panic!("it has not ended"),
        }
    }

    #[test]
    fn each_page_is_sent_once_and_what_is_no_request_for_memory_is_a_breach() {
        let request = |start, pages| (RecordType::Request, range(start, pages));
        let outside = request(15, 2);
        let (sent, cause, text) = served(&[request(3, 2), request(4, 2), outside]);
        assert_eq!(sent, [range(3, 1), range(4, 1), range(5, 1)]);
        assert!(cause == Cause::Protocol && text.contains("region"), "{cause:?}: {text}");
        let (sent, cause, text) = served(&[(RecordType::Zero, range(3, 1)), outside]);
        assert_eq!(sent, []);
        assert!(cause == Cause::Protocol && text.contains("REQUEST"), "{cause:?}: {text}");
    }
}
