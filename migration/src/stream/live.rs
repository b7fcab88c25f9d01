//! PAGES of a running guest: from guest memory to the socket and from the socket to guest memory,
//! without a copy and without a checksum.

use std::io::{Read, Write};
use std::os::fd::AsFd;

use crate::address::{PageRange, PAGE_BYTES};
use crate::stream::error::{Problem, StreamError};
use crate::stream::format::{RecordHeader, RecordType};
use crate::stream::pages::{decode_count, decode_table, encode_runs, RUN_BYTES, TABLE_HEAD_BYTES};
use crate::stream::reader::{read_exact, read_problem, RecordReader};
use crate::stream::writer::RecordWriter;
use crate::vm::{DestinationMemory, GuestMemory};
use crate::volatile_io;

impl<W: Write + AsFd> RecordWriter<W> {
    /// Writes a PAGES record straight from guest memory; `W` must not buffer. The runs have at
    /// most [`MAX_PAGES_PER_RECORD`](super::MAX_PAGES_PER_RECORD) pages together.
    ///
    /// # Errors
    /// [`Problem::TooLong`] and [`Problem::Vm`] before anything is written, [`Problem::Write`].
    pub fn write_live_pages(
        &mut self,
        memory: &dyn GuestMemory,
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
        volatile_io::write_all(self.inner.as_fd(), &head, &slices)
            .map_err(|error| self.write_error(error))?;
        self.written(&header, length);
        Ok(())
    }
}

impl<R: Read + AsFd> RecordReader<R> {
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
        let malformed = |what| Problem::Malformed { record_type: RecordType::Pages, what };
        if header.record_type != RecordType::Pages as u16 || header.has_checksum() {
            let what = "not pages of a running guest".to_owned();
            return Err(self.error(malformed(what)));
        }
        let mut head = [0; TABLE_HEAD_BYTES];
        if header.length < head.len() as u64 {
            let what = "too short for its table of runs".to_owned();
            return Err(self.error(malformed(what)));
        }
        read_exact(&mut self.inner, &mut head).map_err(|problem| self.error(problem))?;
        let count =
            decode_count(RecordType::Pages, &head).map_err(|problem| self.error(problem))?;
        let mut table = vec![0; count * RUN_BYTES];
        if header.length < (head.len() + table.len()) as u64 {
            let what = "too short for its table of runs".to_owned();
            return Err(self.error(malformed(what)));
        }
        read_exact(&mut self.inner, &mut table).map_err(|problem| self.error(problem))?;
        let runs = decode_table(&table, memory.layout()).map_err(|problem| self.error(problem))?;
        let pages: usize = runs.iter().map(|run| run.pages() as usize).sum();
        if header.length != (head.len() + table.len() + pages * PAGE_BYTES) as u64 {
            let what = format!("{} bytes for {pages} pages", header.length);
            return Err(self.error(malformed(what)));
        }
        let mut slices = Vec::with_capacity(runs.len());
        for run in &runs {
            memory.populate_ahead(*run).map_err(|error| self.error(error))?;
            slices.push(memory.slice(*run).map_err(|error| self.error(error))?);
        }
        volatile_io::read_exact(self.inner.as_fd(), &slices)
            .map_err(|error| self.error(read_problem(error)))?;
        self.complete(header);
        Ok(runs)
    }
}
