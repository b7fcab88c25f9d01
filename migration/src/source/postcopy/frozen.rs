//! Pages of a guest that stands for good: with a checksum, and each only once.

use std::io::Write;

use crate::address::{PageRange, PAGE_BYTES};
use crate::stream::{encode_runs, Problem, RecordType, RecordWriter, StreamError, PAGES_PER_BATCH};
use crate::vm::SourceVm;
use crate::volatile_io::is_zero_page;

/// Sends pages; keeps its buffers.
#[derive(Default)]
pub(in crate::source) struct Frozen {
    runs: Vec<PageRange>,
    pages: u64,
    zeros: Vec<PageRange>,
    data: Vec<u8>,
    table: Vec<u8>,
}

impl Frozen {
    /// Sends these pages, which are whole units; a unit of zeros as such.
    pub(in crate::source) fn send<W: Write>(
        &mut self,
        out: &mut RecordWriter<W>,
        vm: &dyn SourceVm,
        runs: &[PageRange],
    ) -> Result<(), StreamError> {
        for run in runs {
            for unit in run.chunks(vm.unit_pages()) {
                // Pieces end with their run, which is within one region.
                let first = unit.start() == run.start();
                let slice = vm.slice(unit).map_err(|error| out.error(Problem::Vm(error)))?;
                if (0..slice.len()).step_by(PAGE_BYTES).all(|at| is_zero_page(&slice, at)) {
                    push(&mut self.zeros, unit, first);
                    continue;
                }
                // A unit may have more: it goes alone then.
                if self.pages > 0 && self.pages + unit.pages() > PAGES_PER_BATCH {
                    self.flush(out)?;
                }
                push(&mut self.runs, unit, first);
                self.pages += unit.pages();
                let start = self.data.len();
                self.data.resize(start + slice.len(), 0);
                slice.copy_to(&mut self.data[start..]);
            }
        }
        self.flush(out)?;
        if !self.zeros.is_empty() {
            encode_runs(&self.zeros, &mut self.table);
            self.zeros.clear();
            out.write(RecordType::Zero, &[&self.table])?;
        }
        Ok(())
    }

    fn flush<W: Write>(&mut self, out: &mut RecordWriter<W>) -> Result<(), StreamError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        encode_runs(&self.runs, &mut self.table);
        out.write(RecordType::Pages, &[&self.table, &self.data])?;
        self.runs.clear();
        self.data.clear();
        self.pages = 0;
        Ok(())
    }
}

fn push(runs: &mut Vec<PageRange>, unit: PageRange, begins: bool) {
    match runs.last_mut() {
        Some(last) if last.end() == unit.start() && !begins => {
            *last = PageRange::trusted(last.start(), last.pages() + unit.pages());
        }
        _ => runs.push(unit),
    }
}
