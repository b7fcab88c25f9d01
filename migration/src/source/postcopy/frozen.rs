//! Pages of a guest that stands for good: with a checksum, and each only once.

use std::io::Write;

use crate::address::{Gfn, PageRange, PAGE_BYTES};
use crate::stream::{
    encode_runs, Problem, RecordType, RecordWriter, StreamError, MAX_PAGES_PER_RECORD,
};
use crate::vm::{SourceVm, VmError};
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
    /// Sends these pages, those of zeros as such.
    pub(in crate::source) fn send<W: Write>(
        &mut self,
        out: &mut RecordWriter<W>,
        vm: &dyn SourceVm,
        runs: &[PageRange],
    ) -> Result<(), StreamError> {
        for run in runs {
            let slice = vm.slice(*run).map_err(|error| out.error(Problem::Vm(error)))?;
            for at in 0..run.pages() {
                let gfn = Gfn(run.start().0 + at);
                let offset = at as usize * PAGE_BYTES;
                // Pieces end with their run, which is within one region.
                let first = at == 0;
                if is_zero_page(&slice, offset) {
                    push(&mut self.zeros, gfn, first);
                    continue;
                }
                push(&mut self.runs, gfn, first);
                let start = self.data.len();
                self.data.resize(start + PAGE_BYTES, 0);
                slice
                    .subslice(offset, PAGE_BYTES)
                    .map_err(|error| out.error(Problem::Vm(VmError::Other(error.to_string()))))?
                    .copy_to(&mut self.data[start..]);
                self.pages += 1;
                if self.pages == MAX_PAGES_PER_RECORD {
                    self.flush(out)?;
                }
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

fn push(runs: &mut Vec<PageRange>, gfn: Gfn, begins: bool) {
    match runs.last_mut() {
        Some(last) if last.end() == gfn && !begins => {
            *last = PageRange::trusted(last.start(), last.pages() + 1);
        }
        _ => runs.push(PageRange::trusted(gfn, 1)),
    }
}
