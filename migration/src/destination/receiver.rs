//! One page connection: brings pages to their place.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{mpsc, Arc};

use crate::address::PageRange;
use crate::destination::Input;
use crate::handover::Cause;
use crate::page_set::PageSet;
use crate::stream::session::{Echo, Round, Sync};
use crate::stream::{
    decode_runs, Problem, RecordHeader, RecordReader, RecordType, RecordWriter, StreamError,
};
use crate::transport::Stream;
use crate::vm::DestinationVm;

/// What came on a connection.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ReceiverStats {
    pub(super) data_pages: u64,
    pub(super) zero_pages: u64,
}

/// Pages that all receivers have brought in, for progress.
pub(super) type PageCount = Arc<AtomicU64>;

pub(super) struct Receiver {
    pub(super) index: u16,
    pub(super) vm: Arc<dyn DestinationVm>,
    pub(super) records: RecordReader<Stream>,
    pub(super) out: RecordWriter<Stream>,
    pub(super) pages: PageCount,
}

impl Receiver {
    /// Receives until SYNC, and tells the session.
    pub(super) fn run(mut self, inbox: &mpsc::Sender<Input>) {
        let index = self.index;
        let input = match self.receive() {
            Ok(stats) => Input::Synced { stats, records: self.records },
            Err(error) => {
                let cause = match error.problem {
                    Problem::Read(_) | Problem::Write(_) | Problem::Truncated => Cause::Lost,
                    Problem::Vm(_) => Cause::Failed,
                    _ => Cause::Protocol,
                };
                let text = format!("page connection {index}: {error}");
                Input::Lost { generation: 0, cause, text }
            }
        };
        // Fails when the session has ended.
        let _ = inbox.send(input);
    }

    fn receive(&mut self) -> Result<ReceiverStats, StreamError> {
        let layout = Arc::clone(self.vm.layout());
        // Pages of this connection that hold, or held, anything. Others read as zeros.
        let mut filled = PageSet::empty(&layout);
        let mut stats = ReceiverStats::default();
        let mut round = 0;
        loop {
            let (record_type, header) = self.records.next_header()?;
            match record_type {
                RecordType::Pages if round > 0 => {
                    let runs = self.pages(&header, &mut filled)?;
                    let pages: u64 = runs.iter().map(|run| run.pages()).sum();
                    stats.data_pages += pages;
                    self.pages.fetch_add(pages, Ordering::Relaxed);
                }
                RecordType::Zero if round > 0 => {
                    let record = self.records.read_record(record_type, &header)?;
                    let runs = decode_runs(record_type, record.payload, &layout)
                        .map_err(|problem| record.error(problem))?;
                    for run in &runs {
                        zero(self.vm.as_ref(), *run, &mut filled)
                            .map_err(|problem| self.records.error(problem))?;
                        stats.zero_pages += run.pages();
                    }
                }
                RecordType::Round => {
                    let record = self.records.read_record(record_type, &header)?;
                    let begun: Round = record.decode("ROUND")?;
                    if begun.number != round {
                        let what = format!("round {}, expected {round}", begun.number);
                        return Err(record.error(Problem::Malformed { record_type, what }));
                    }
                    round += 1;
                }
                RecordType::Echo if round > 0 => {
                    let record = self.records.read_record(record_type, &header)?;
                    let echo: Echo = record.decode("ECHO")?;
                    self.out.send(&echo)?;
                }
                RecordType::Sync if round > 0 => {
                    let record = self.records.read_record(record_type, &header)?;
                    let sync: Sync = record.decode("SYNC")?;
                    let counted = stats.data_pages + stats.zero_pages;
                    if sync.pages != counted {
                        let (what, claimed) = ("pages", sync.pages);
                        return Err(record.error(Problem::Totals { what, claimed, counted }));
                    }
                    return Ok(stats);
                }
                found => {
                    let expected = "ROUND, then PAGES, ZERO, ECHO, ROUND or SYNC";
                    return Err(self.records.error(Problem::Unexpected { found, expected }));
                }
            }
        }
    }

    /// Brings the data of a PAGES record to its place. Guest memory is not checksummed, so that it need
    /// not be copied; a checksummed record would be a source that does what it need not, and is refused.
    fn pages(
        &mut self,
        header: &RecordHeader,
        filled: &mut PageSet,
    ) -> Result<Vec<PageRange>, StreamError> {
        let runs = self.records.read_live_pages(header, self.vm.as_ref())?;
        for run in &runs {
            filled.insert(*run).map_err(|error| self.records.error(error))?;
        }
        Ok(runs)
    }
}

/// Makes a run read as zeros. What was never written does already, and is not touched.
fn zero(vm: &dyn DestinationVm, run: PageRange, filled: &mut PageSet) -> Result<(), Problem> {
    if !filled.intersects(run) {
        return Ok(());
    }
    if filled.contains(run) {
        vm.zero(run)?;
    } else {
        for page in run.chunks(1).filter(|page| filled.contains(*page)) {
            vm.zero(page)?;
        }
    }
    filled.remove(run)?;
    Ok(())
}
