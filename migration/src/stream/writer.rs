//! Writing records.

use std::io::{self, IoSlice, Write};

use crc32c::crc32c_append;

use crate::stream::control::End;
use crate::stream::error::{Problem, StreamError};
use crate::stream::format::{
    encode_preamble, padding, Digest, RecordHeader, RecordType, StreamKind, FLAG_PAYLOAD_CHECKSUM,
    PREAMBLE_BYTES,
};

/// Pages in a stream, by what is said about them; they go into END.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PageTotals {
    pub(crate) data: u64,
    pub(crate) zero: u64,
    pub(crate) absent: u64,
}

/// Writes a stream: numbers the records, checksums them, and keeps the digest for END.
///
/// Each record goes out in one vectored write, without a copy; `W` needs no buffer of its own.
#[derive(Debug)]
pub struct RecordWriter<W> {
    pub(super) inner: W,
    sequence: u64,
    bytes: u64,
    digest: Digest,
}

impl<W: Write> RecordWriter<W> {
    /// Writes the preamble.
    ///
    /// # Errors
    /// [`Problem::Write`].
    pub fn new(mut inner: W, kind: StreamKind) -> Result<Self, StreamError> {
        let preamble = encode_preamble(kind);
        inner.write_all(&preamble).map_err(|error| StreamError {
            record: 0,
            offset: 0,
            problem: Problem::Write(error),
        })?;
        let bytes = PREAMBLE_BYTES as u64;
        Ok(Self { inner, sequence: 0, bytes, digest: Digest::new(&preamble) })
    }

    /// The same stream over something that wraps `W`.
    pub(crate) fn map<V>(self, wrap: impl FnOnce(W) -> V) -> RecordWriter<V> {
        let Self { inner, sequence, bytes, digest } = self;
        RecordWriter { inner: wrap(inner), sequence, bytes, digest }
    }

    /// Bytes written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes a record whose payload is the concatenation of `parts`, with a checksum.
    ///
    /// # Errors
    /// [`Problem::TooLong`] before anything is written, [`Problem::Write`].
    pub fn write(&mut self, record_type: RecordType, parts: &[&[u8]]) -> Result<(), StreamError> {
        let checksum = parts.iter().fold(0, |crc, part| crc32c_append(crc, part));
        let length = parts.iter().map(|part| part.len() as u64).sum();
        let header = self.header(record_type, FLAG_PAYLOAD_CHECKSUM, checksum, length)?.encode();
        let mut slices = Vec::with_capacity(parts.len() + 2);
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        slices.push(IoSlice::new(&[0; 8][..padding(length)]));
        write_all_vectored(&mut self.inner, &mut slices).map_err(|e| self.write_error(e))?;
        self.written(&header, length);
        Ok(())
    }

    /// Sends what `W` has buffered.
    ///
    /// # Errors
    /// [`Problem::Write`].
    pub(crate) fn flush(&mut self) -> Result<(), StreamError> {
        self.inner.flush().map_err(|error| self.write_error(error))
    }

    /// Writes END and returns the length of the whole stream, bytes. Whether they are on the disk
    /// or with the peer is for the caller to see to.
    ///
    /// # Errors
    /// [`Problem::Write`].
    pub(crate) fn finish(&mut self, pages: PageTotals) -> Result<u64, StreamError> {
        let end = End {
            records: self.sequence,
            bytes: self.bytes,
            digest: self.digest.value(),
            data_pages: pages.data,
            zero_pages: pages.zero,
            absent_pages: pages.absent,
        };
        let payload = end.encode().map_err(|problem| self.error(problem))?;
        self.write(RecordType::End, &[&payload])?;
        self.inner.flush().map_err(|error| self.write_error(error))?;
        Ok(self.bytes)
    }

    /// The header of the next record, if its length is allowed.
    pub(super) fn header(
        &self,
        record_type: RecordType,
        flags: u16,
        payload_checksum: u32,
        length: u64,
    ) -> Result<RecordHeader, StreamError> {
        let limit = record_type.max_bytes();
        let record_type = record_type as u16;
        if length > limit {
            return Err(self.error(Problem::TooLong { record_type, length, limit }));
        }
        Ok(RecordHeader { record_type, flags, payload_checksum, length, sequence: self.sequence })
    }

    /// Accounts for a record that was written.
    pub(super) fn written(&mut self, header: &[u8; super::format::HEADER_BYTES], length: u64) {
        self.digest.add(header);
        self.sequence += 1;
        self.bytes += header.len() as u64 + length + padding(length) as u64;
    }

    pub(crate) fn error(&self, problem: Problem) -> StreamError {
        StreamError { record: self.sequence, offset: self.bytes, problem }
    }

    pub(super) fn write_error(&self, error: io::Error) -> StreamError {
        self.error(Problem::Write(error))
    }
}

#[cfg(test)]
impl RecordWriter<Vec<u8>> {
    /// Writes END and gives the whole stream.
    pub(crate) fn finish_into_bytes(mut self, pages: PageTotals) -> Vec<u8> {
        self.finish(pages).expect("memory does not fail");
        self.inner
    }
}

/// `Write::write_all_vectored` of the standard library is unstable.
fn write_all_vectored(out: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Drops leading empty slices, so that writing 0 bytes means that nothing can be written.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match out.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
