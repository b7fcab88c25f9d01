//! One page connection: finds its share of a round's pages, and sends them.
//!
//! For each chunk of pages, in this order: *clear* the dirty log, look the pages up, test them for zero,
//! send them. What the guest writes after the clear is dirty again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::Arc;
use std::time::Duration;

use crate::address::{Gfn, PageRange, PAGE_BYTES, PAGE_SIZE};
use crate::page_set::PageSet;
use crate::source::pacer::Pacer;
use crate::source::postcopy::frozen::Frozen;
use crate::source::postcopy::outflow::{Outflow, BATCH_PAGES};
use crate::source::Input;
use crate::stream::session::{Echo, Round, Sync};
use crate::stream::{
    encode_runs, Problem, RecordReader, RecordType, RecordWriter, StreamError, PAGES_PER_BATCH,
};
use crate::transport::Stream;
use crate::vm::{SourceVm, VmError};
use crate::volatile_io::is_zero_page;

/// Pages that are cleared together and always take the same connection: 2 MiB.
const CHUNK_PAGES: u64 = 512;
/// Runs of zero pages that are sent together.
const MAX_ZERO_RUNS: usize = 4096;

/// What the senders and the engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) pacer: Pacer,
    /// The pass is given up.
    pub(crate) stop: AtomicBool,
    /// The live pass is cut short: the rest follows the guest.
    pub(crate) cut: AtomicBool,
    /// Pages of the current pass that are done.
    pub(crate) pages_done: AtomicU64,
    /// Bytes on all page connections.
    pub(crate) bytes: AtomicU64,
}

impl Shared {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            pacer: Pacer::new(bytes_per_second),
            stop: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            pages_done: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }
}

/// What all senders do next, each its share.
#[derive(Debug, Clone)]
pub(crate) struct Pass {
    pub(crate) number: u32,
    pub(crate) pages: Arc<PageSet>,
    /// Whether the guest runs: pages are cleared first.
    pub(crate) live: bool,
    /// Whether SYNC ends it.
    pub(crate) last: bool,
}

/// What one sender did in a pass.
#[derive(Debug, Default)]
pub(crate) struct PassStats {
    pub(crate) data_pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) bytes: u64,
    /// Time that it waited for the bandwidth cap.
    pub(crate) waited: Duration,
    /// Pages that it did not come to, because the pass was cut short.
    pub(crate) left: Option<PageSet>,
}

/// What a sender is to do next.
#[derive(Debug)]
pub(crate) enum Work {
    Pass(Pass),
    /// Push what is missing.
    Push(Arc<Outflow>),
}

/// Why a sender gave up.
#[derive(Debug)]
pub(crate) enum SendError {
    /// It was told to.
    Stopped,
    /// The connection, or the VM.
    Stream(StreamError),
}

impl From<StreamError> for SendError {
    fn from(error: StreamError) -> Self {
        SendError::Stream(error)
    }
}

/// Which of `connections` a chunk takes: a multiplicative hash (Knuth, volume 3, section 6.4), so that no
/// stride of the guest puts all on one.
fn connection_of(chunk: u64, connections: u16) -> u16 {
    let hash = chunk.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (hash % u64::from(connections.max(1))) as u16
}

pub(crate) struct Sender<'a> {
    pub(crate) vm: &'a dyn SourceVm,
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: u16,
    pub(crate) connections: u16,
    writer: RecordWriter<Stream>,
    answers: RecordReader<Stream>,
    runs: Vec<PageRange>,
    run_pages: u64,
    zero_runs: Vec<PageRange>,
    table: Vec<u8>,
    stats: PassStats,
    /// Pages in all passes.
    total_pages: u64,
}

impl<'a> Sender<'a> {
    pub(crate) fn new(
        vm: &'a dyn SourceVm,
        shared: Arc<Shared>,
        index: u16,
        connections: u16,
        writer: RecordWriter<Stream>,
        answers: RecordReader<Stream>,
    ) -> Self {
        Self {
            vm,
            shared,
            index,
            connections,
            writer,
            answers,
            runs: Vec::new(),
            run_pages: 0,
            zero_runs: Vec::new(),
            table: Vec::new(),
            stats: PassStats::default(),
            total_pages: 0,
        }
    }

    /// Does passes until there are no more.
    pub(crate) fn run(mut self, work: &mpsc::Receiver<Work>, inbox: &mpsc::Sender<Input>) {
        while let Ok(work) = work.recv() {
            let result = match work {
                Work::Pass(pass) => self.pass(&pass),
                Work::Push(outflow) => self.push(&outflow),
            };
            let failed = result.is_err();
            if inbox.send(Input::PassDone { index: self.index, result }).is_err() || failed {
                return;
            }
        }
    }

    fn pass(&mut self, pass: &Pass) -> Result<PassStats, SendError> {
        self.stats = PassStats::default();
        let before = self.writer.bytes();
        self.writer.send(&Round { number: pass.number })?;
        let layout = pass.pages.layout();
        let mut words = Vec::new();
        let chunks = layout.regions().flat_map(|region| region.chunks(CHUNK_PAGES));
        for (ordinal, chunk) in chunks.enumerate() {
            if connection_of(ordinal as u64, self.connections) != self.index {
                continue;
            }
            let count = pass.pages.bitmap(chunk, &mut words).map_err(|e| self.vm_error(e))?;
            if count == 0 {
                continue;
            }
            if self.shared.stop.load(Ordering::Relaxed) {
                return Err(SendError::Stopped);
            }
            if pass.live && self.shared.cut.load(Ordering::Relaxed) {
                let left = self.stats.left.get_or_insert_with(|| PageSet::empty(layout));
                left.insert_bitmap(chunk.start(), &words)
                    .map_err(|error| self.vm_error(VmError::from(error)))?;
                continue;
            }
            if pass.live {
                self.vm.clear_pages(chunk, &words).map_err(|e| self.vm_error(e))?;
            }
            self.send_chunk(chunk, &words)?;
            self.shared.pages_done.fetch_add(count, Ordering::Relaxed);
        }
        self.flush_pages()?;
        self.flush_zeros()?;
        self.total_pages += self.stats.data_pages + self.stats.zero_pages;
        if pass.live {
            self.await_echo(pass.number)?;
        }
        if pass.last {
            self.writer.send(&Sync { pages: self.total_pages })?;
        }
        self.stats.bytes = self.writer.bytes() - before;
        Ok(std::mem::take(&mut self.stats))
    }

    /// Pushes what the destination lacks until nothing is left, with the guest running there.
    fn push(&mut self, outflow: &Outflow) -> Result<PassStats, SendError> {
        self.stats = PassStats::default();
        let before = self.writer.bytes();
        let mut frozen = Frozen::default();
        let batch = BATCH_PAGES.max(self.vm.unit_pages());
        loop {
            // Before they are given out: a guest that waits for one of them would wait for the cap.
            self.wait(batch * PAGE_SIZE)?;
            let Some(runs) = outflow.next() else { break };
            let pages: u64 = runs.iter().map(|run| run.pages()).sum();
            let before = self.writer.bytes();
            frozen.send(&mut self.writer, self.vm, &runs)?;
            self.sent(before);
            outflow.pushed(pages);
        }
        self.stats.bytes = self.writer.bytes() - before;
        Ok(std::mem::take(&mut self.stats))
    }

    /// Waits until all that was sent is in the destination's memory. Megabytes of it may be in the
    /// sockets' buffers, and must not be waited for in the pause.
    fn await_echo(&mut self, number: u32) -> Result<(), SendError> {
        self.writer.send(&Echo { number })?;
        let record = self.answers.next_record()?;
        let echo: Echo = record.decode("ECHO")?;
        if echo.number != number {
            let what = format!("round {}, expected {number}", echo.number);
            let record_type = record.record_type;
            return Err(record.error(Problem::Malformed { record_type, what }).into());
        }
        Ok(())
    }

    /// Sends the pages of `chunk` whose bits are set in `words`.
    fn send_chunk(&mut self, chunk: PageRange, words: &[u64]) -> Result<(), SendError> {
        let vm = self.vm;
        let slice = vm.slice(chunk).map_err(|error| self.vm_error(error))?;
        for (at, word) in words.iter().enumerate() {
            let mut bits = *word;
            while bits != 0 {
                let page = at as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let gfn = Gfn(chunk.start().0 + page);
                if is_zero_page(&slice, page as usize * PAGE_BYTES) {
                    self.stats.zero_pages += 1;
                    // Runs end with the chunk, so that none crosses a region.
                    push(&mut self.zero_runs, gfn, chunk);
                    if self.zero_runs.len() == MAX_ZERO_RUNS {
                        self.flush_zeros()?;
                    }
                } else {
                    self.stats.data_pages += 1;
                    self.run_pages += 1;
                    push(&mut self.runs, gfn, chunk);
                    if self.run_pages == PAGES_PER_BATCH {
                        self.flush_pages()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn flush_pages(&mut self) -> Result<(), SendError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        self.wait(self.run_pages * PAGE_SIZE)?;
        let before = self.writer.bytes();
        self.writer.write_live_pages(self.vm, &self.runs)?;
        self.sent(before);
        self.runs.clear();
        self.run_pages = 0;
        Ok(())
    }

    fn flush_zeros(&mut self) -> Result<(), SendError> {
        if self.zero_runs.is_empty() {
            return Ok(());
        }
        encode_runs(&self.zero_runs, &mut self.table);
        self.wait(self.table.len() as u64)?;
        let before = self.writer.bytes();
        self.writer.write(RecordType::Zero, &[&self.table])?;
        self.sent(before);
        self.zero_runs.clear();
        Ok(())
    }

    fn wait(&mut self, bytes: u64) -> Result<(), SendError> {
        self.stats.waited += self.shared.pacer.take(bytes);
        match self.shared.stop.load(Ordering::Relaxed) {
            true => Err(SendError::Stopped),
            false => Ok(()),
        }
    }

    fn sent(&self, before: u64) {
        self.shared.bytes.fetch_add(self.writer.bytes() - before, Ordering::Relaxed);
    }

    fn vm_error(&self, error: impl Into<VmError>) -> SendError {
        SendError::Stream(self.writer.error(Problem::Vm(error.into())))
    }
}

/// Adds a page to the last run if it goes on there and is of the same chunk.
fn push(runs: &mut Vec<PageRange>, gfn: Gfn, chunk: PageRange) {
    match runs.last_mut() {
        Some(last) if last.end() == gfn && gfn != chunk.start() => {
            *last = PageRange::trusted(last.start(), last.pages() + 1);
        }
        _ => runs.push(PageRange::trusted(gfn, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_spread_over_the_connections_whatever_the_stride() {
        for connections in [1, 2, 3, 4, 16] {
            for stride in [1, 2, 3, 4, 8, 64] {
                let mut counts = vec![0; usize::from(connections)];
                for chunk in 0..1000 {
                    counts[usize::from(connection_of(chunk * stride, connections))] += 1;
                }
                let even = 1000 / usize::from(connections);
                let fair = |count: &usize| *count > even / 3 && *count < even * 3;
                assert!(counts.iter().all(fair), "{connections} {stride}: {counts:?}");
            }
        }
    }
}
