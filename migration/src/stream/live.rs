//! PAGES of a running guest: from guest memory to the socket and from the socket to guest memory,
//! without a copy and without a checksum.

use std::io::{Read, Write};

use vm_memory::VolatileSlice;

use crate::address::{PageRange, PAGE_SIZE};
use crate::layout::MemoryLayout;
use crate::stream::error::{Problem, StreamError};
use crate::stream::format::{RecordHeader, RecordType};
use crate::stream::pages::{decode_count, decode_table, encode_runs, RUN_BYTES, TABLE_HEAD_BYTES};
use crate::stream::reader::{read_exact, read_problem, RecordReader};
use crate::stream::writer::RecordWriter;
use crate::vm::{DestinationMemory, GuestMemory};
use crate::volatile_io::{ReadGuest, WriteGuest};

impl<W: Write + WriteGuest> RecordWriter<W> {
    /// Writes a PAGES record straight from guest memory; `W` must not buffer. The runs have at
    /// most [`MAX_PAGES_PER_RECORD`](super::MAX_PAGES_PER_RECORD) pages together.
    ///
    /// # Errors
    /// [`Problem::TooLong`] and [`Problem::Vm`] before anything is written, [`Problem::Write`].
    pub fn write_live_pages<M: GuestMemory + ?Sized>(
        &mut self,
        memory: &M,
        runs: &[PageRange],
    ) -> Result<(), StreamError> {
        let mut table = Vec::new();
        encode_runs(runs, &mut table);
        let data: u64 = runs.iter().map(|run| run.bytes()).sum();
        let length = table.len() as u64 + data;
        let header = self.header(RecordType::Pages, 0, 0, length)?.encode();
        let slices = runs
            .iter()
            .map(|run| memory.slice(*run))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| self.error(Problem::Vm(error)))?;
        let head = [&header[..], &table].concat();
        self.inner.write_guest(&head, &slices).map_err(|error| self.write_error(error))?;
        self.written(&header, length);
        Ok(())
    }
}

impl<R: Read + ReadGuest> RecordReader<R> {
    /// Reads the payload of a PAGES record without checksum straight into guest memory and returns
    /// the runs; `R` must not buffer. With a checksum, use [`RecordReader::read_record`].
    ///
    /// # Errors
    /// [`StreamError`]; what was read so far is in memory.
    pub fn read_live_pages(
        &mut self,
        header: &RecordHeader,
        memory: &dyn DestinationMemory,
    ) -> Result<Vec<PageRange>, StreamError> {
        let runs = self.read_live_runs(header, memory.layout())?;
        let mut slices = Vec::with_capacity(runs.len());
        for run in &runs {
            slices.push(memory.slice(*run).map_err(|error| self.error(error))?);
        }
        self.read_live_data(&slices)?;
        self.finish_live(header);
        Ok(runs)
    }

    /// Fills guest memory from the data of the record whose runs were read last.
    pub(crate) fn read_live_data(
        &mut self,
        slices: &[VolatileSlice<'_>],
    ) -> Result<(), StreamError> {
        self.inner.read_guest(slices).map_err(|error| self.error(read_problem(error)))
    }
}

impl<R: Read> RecordReader<R> {
    /// Reads and checks the table of a PAGES record without checksum. The data of its runs must be
    /// read next, in order, and then [`RecordReader::finish_live`] be called.
    pub(crate) fn read_live_runs(
        &mut self,
        header: &RecordHeader,
        layout: &MemoryLayout,
    ) -> Result<Vec<PageRange>, StreamError> {
        let malformed = |what: &str| Problem::Malformed {
            record_type: RecordType::Pages,
            what: what.to_owned(),
        };
        if header.record_type != RecordType::Pages as u16 || header.has_checksum() {
            return Err(self.error(malformed("not pages of a running guest")));
        }
        let mut head = [0; TABLE_HEAD_BYTES];
        if header.length < head.len() as u64 {
            return Err(self.error(malformed("too short for its table of runs")));
        }
        read_exact(&mut self.inner, &mut head).map_err(|problem| self.error(problem))?;
        let count =
            decode_count(RecordType::Pages, &head).map_err(|problem| self.error(problem))?;
        let mut table = vec![0; count * RUN_BYTES];
        if header.length < (head.len() + table.len()) as u64 {
            return Err(self.error(malformed("too short for its table of runs")));
        }
        read_exact(&mut self.inner, &mut table).map_err(|problem| self.error(problem))?;
        let runs = decode_table(&table, layout).map_err(|problem| self.error(problem))?;
        let pages: u64 = runs.iter().map(|run| run.pages()).sum();
        let data = header.length - (head.len() + table.len()) as u64;
        if data % PAGE_SIZE != 0 || data / PAGE_SIZE != pages {
            let what = format!("{data} bytes of data for {pages} pages");
            return Err(self.error(malformed(&what)));
        }
        Ok(runs)
    }

    /// Accounts for a PAGES record whose data was read. Whole pages need no padding.
    pub(crate) fn finish_live(&mut self, header: &RecordHeader) {
        self.complete(header);
    }
}
