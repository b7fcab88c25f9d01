//! Reading records.

use std::io::{self, Read};

use crc32c::{crc32c, crc32c_append};

use crate::stream::control::End;
use crate::stream::error::{Problem, StreamError};
use crate::stream::format::{
    check_preamble, preamble_kind, Digest, RecordHeader, RecordType, StreamKind, HEADER_BYTES,
    PREAMBLE_BYTES,
};

/// Memory for a payload is provided in steps of this as the payload arrives, so that a length
/// alone costs nothing, bytes.
const READ_STEP: usize = 2 << 20;

/// Reads a stream and checks all that can be checked without knowing the VM.
#[derive(Debug)]
pub struct RecordReader<R> {
    pub(super) inner: R,
    kind: StreamKind,
    /// Whether PAGES may come without a checksum of their payload.
    live_pages: bool,
    /// Number of the next record.
    sequence: u64,
    /// Bytes of complete records, and the preamble.
    bytes: u64,
    /// Over all complete records.
    digest: Digest,
    pub(super) payload: Vec<u8>,
}

/// One record: its type, its checked payload, and where it is, for messages.
#[derive(Debug)]
pub struct Record<'a> {
    /// Type of the record.
    pub record_type: RecordType,
    /// The payload without padding.
    pub payload: &'a [u8],
    sequence: u64,
    offset: u64,
}

impl Record<'_> {
    /// An error that names this record.
    pub fn error(&self, problem: impl Into<Problem>) -> StreamError {
        StreamError { record: self.sequence, offset: self.offset, problem: problem.into() }
    }
}

impl<R: Read> RecordReader<R> {
    /// Reads and checks the preamble.
    ///
    /// # Errors
    /// [`StreamError`] of record 0.
    pub fn new(mut inner: R, kind: StreamKind) -> Result<Self, StreamError> {
        let preamble = read_preamble(&mut inner)?;
        Self::begin(inner, kind, &preamble)
    }

    /// As [`RecordReader::new`], for a stream that may be of any of these kinds.
    ///
    /// # Errors
    /// [`StreamError`] of record 0.
    pub(crate) fn of_kinds(mut inner: R, kinds: &[StreamKind]) -> Result<Self, StreamError> {
        let preamble = read_preamble(&mut inner)?;
        let found = preamble_kind(&preamble).filter(|kind| kinds.contains(kind));
        Self::begin(inner, found.unwrap_or(kinds[0]), &preamble)
    }

    /// What the stream is for.
    pub(crate) fn kind(&self) -> StreamKind {
        self.kind
    }

    fn begin(
        inner: R,
        kind: StreamKind,
        preamble: &[u8; PREAMBLE_BYTES],
    ) -> Result<Self, StreamError> {
        check_preamble(preamble, kind).map_err(|problem| StreamError {
            record: 0,
            offset: 0,
            problem,
        })?;
        Ok(Self {
            inner,
            kind,
            live_pages: kind == StreamKind::Pages,
            sequence: 0,
            bytes: PREAMBLE_BYTES as u64,
            digest: Digest::new(preamble),
            payload: Vec::new(),
        })
    }

    /// From now on pages are those of a guest that stands: they must have a checksum too.
    pub(crate) fn expect_checksums(&mut self) {
        self.live_pages = false;
    }

    /// The next record of a known type, complete and checked. Unknown optional records are
    /// skipped.
    ///
    /// # Errors
    /// [`StreamError`]; the stream is of no further use.
    pub fn next_record(&mut self) -> Result<Record<'_>, StreamError> {
        let (record_type, header) = self.next_header()?;
        self.read_record(record_type, &header)
    }

    /// The header of the next record of a known type; its payload must be read next. For callers
    /// that bring payloads to their place themselves.
    ///
    /// # Errors
    /// As [`RecordReader::next_record`].
    pub fn next_header(&mut self) -> Result<(RecordType, RecordHeader), StreamError> {
        loop {
            let mut bytes = [0; HEADER_BYTES];
            read_exact(&mut self.inner, &mut bytes).map_err(|problem| self.error(problem))?;
            let header = RecordHeader::decode(&bytes, self.sequence)
                .map_err(|problem| self.error(problem))?;
            let Some(record_type) = RecordType::from_number(header.record_type) else {
                self.skip(&header)?;
                continue;
            };
            let may_lack_checksum = self.live_pages && record_type == RecordType::Pages;
            if !header.has_checksum() && !may_lack_checksum {
                return Err(self.error(Problem::ChecksumMissing(record_type)));
            }
            return Ok((record_type, header));
        }
    }

    /// Reads the payload that belongs to a header of [`RecordReader::next_header`].
    ///
    /// # Errors
    /// As [`RecordReader::next_record`].
    pub fn read_record(
        &mut self,
        record_type: RecordType,
        header: &RecordHeader,
    ) -> Result<Record<'_>, StreamError> {
        let length = header.length as usize;
        let mut filled = 0;
        while filled < length {
            let end = length.min(filled + READ_STEP);
            if self.payload.len() < end {
                self.payload.resize(end, 0);
            }
            if let Err(problem) = read_exact(&mut self.inner, &mut self.payload[filled..end]) {
                return Err(self.error(problem));
            }
            filled = end;
        }
        if header.has_checksum() && crc32c(&self.payload[..length]) != header.payload_checksum {
            return Err(self.error(Problem::PayloadChecksum));
        }
        self.read_padding(header)?;
        let (sequence, offset) = (self.sequence, self.bytes);
        self.complete(header);
        Ok(Record { record_type, payload: &self.payload[..length], sequence, offset })
    }

    /// Checks the totals of an END record against what was read, and that nothing follows. The
    /// page counts are for the caller to check.
    ///
    /// # Errors
    /// [`Problem::Totals`], [`Problem::Malformed`], [`Problem::Trailing`].
    pub fn read_end(&mut self, header: &RecordHeader) -> Result<End, StreamError> {
        let counted = [
            ("records", self.sequence),
            ("bytes", self.bytes),
            ("digest", u64::from(self.digest.value())),
        ];
        let record = self.read_record(RecordType::End, header)?;
        let end = End::decode(record.payload).map_err(|problem| record.error(problem))?;
        let claimed = [end.records, end.bytes, u64::from(end.digest)];
        for ((what, counted), claimed) in counted.into_iter().zip(claimed) {
            if claimed != counted {
                return Err(record.error(Problem::Totals { what, claimed, counted }));
            }
        }
        match read_exact(&mut self.inner, &mut [0; 1]) {
            Err(Problem::Truncated) => Ok(end),
            Ok(()) => Err(self.error(Problem::Trailing)),
            Err(problem) => Err(self.error(problem)),
        }
    }

    /// Skips the payload of an optional record of unknown type.
    fn skip(&mut self, header: &RecordHeader) -> Result<(), StreamError> {
        let mut checksum = 0;
        let mut left = header.length as usize;
        let mut buffer = [0; 4096];
        while left > 0 {
            let step = left.min(buffer.len());
            read_exact(&mut self.inner, &mut buffer[..step]).map_err(|p| self.error(p))?;
            checksum = crc32c_append(checksum, &buffer[..step]);
            left -= step;
        }
        if header.has_checksum() && checksum != header.payload_checksum {
            return Err(self.error(Problem::PayloadChecksum));
        }
        self.read_padding(header)?;
        self.complete(header);
        Ok(())
    }

    pub(super) fn read_padding(&mut self, header: &RecordHeader) -> Result<(), StreamError> {
        let mut padding = [0; 8];
        let padding = &mut padding[..header.padding()];
        read_exact(&mut self.inner, padding).map_err(|problem| self.error(problem))?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(self.error(Problem::Reserved("the padding")));
        }
        Ok(())
    }

    /// Accounts for a record that was read whole.
    pub(super) fn complete(&mut self, header: &RecordHeader) {
        // Decoding checked every field, so encoding gives the bytes that were read.
        self.digest.add(&header.encode());
        self.sequence += 1;
        self.bytes += HEADER_BYTES as u64 + header.length + header.padding() as u64;
    }

    /// An error that names the record being read.
    pub(crate) fn error(&self, problem: impl Into<Problem>) -> StreamError {
        StreamError { record: self.sequence, offset: self.bytes, problem: problem.into() }
    }
}

fn read_preamble(inner: &mut impl Read) -> Result<[u8; PREAMBLE_BYTES], StreamError> {
    let mut preamble = [0; PREAMBLE_BYTES];
    read_exact(inner, &mut preamble).map_err(|problem| StreamError {
        record: 0,
        offset: 0,
        problem,
    })?;
    Ok(preamble)
}

pub(super) fn read_exact(inner: &mut impl Read, buffer: &mut [u8]) -> Result<(), Problem> {
    inner.read_exact(buffer).map_err(read_problem)
}

pub(super) fn read_problem(error: io::Error) -> Problem {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Problem::Truncated,
        _ => Problem::Read(error),
    }
}
