//! What can be wrong with a stream, and where.

use std::io;

use crate::address::{PageRange, RangeError};
use crate::layout::LayoutError;
use crate::stream::format::{RecordType, PROTOCOL_VERSION};
use crate::vm::VmError;

/// A problem with a stream, and the record that it was found in.
#[derive(Debug, thiserror::Error)]
#[error("record {record} at byte {offset}: {problem}")]
pub struct StreamError {
    /// Sequence number of the record; 0 also for the preamble.
    pub record: u64,
    /// Offset of the record's header from the start of the stream, bytes.
    pub offset: u64,
    /// What is wrong.
    pub problem: Problem,
}

/// What is wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Reading failed.
    #[error("cannot read: {0}")]
    Read(io::Error),
    /// Writing failed.
    #[error("cannot write: {0}")]
    Write(io::Error),
    /// The stream ends too early.
    #[error("the data ends here although more must follow: it is incomplete, use another copy")]
    Truncated,
    /// The first bytes are not those of any stream.
    #[error("this does not begin as minivmm data does: check that it is the right file or peer")]
    NotAStream,
    /// A stream, but for something else.
    #[error("the stream's kind is {found:#04x}, expected {expected:#04x}: it is for another use")]
    WrongKind {
        /// Kind byte of the preamble.
        found: u8,
        /// Kind byte that was expected.
        expected: u8,
    },
    /// Another version of the protocol.
    #[error(
        "protocol version {0}; this program reads version {PROTOCOL_VERSION}: \
         use the minivmm version that wrote it"
    )]
    Version(u16),
    /// The preamble or a header does not match its checksum.
    #[error("the header is damaged (checksum): use another copy")]
    HeaderChecksum,
    /// A payload does not match its checksum.
    #[error("the contents are damaged (checksum): use another copy")]
    PayloadChecksum,
    /// A payload that must have a checksum has none.
    #[error("record type {0:?} without the checksum that it must have")]
    ChecksumMissing(RecordType),
    /// Bits that must be zero are not.
    #[error("reserved bits are set in {0}: the data is malformed or of a newer minivmm")]
    Reserved(&'static str),
    /// A record of a type that this program does not know and may not skip.
    #[error("unknown record type {0:#06x} that may not be skipped: use a newer minivmm")]
    UnknownType(u16),
    /// Records are missing, doubled or from elsewhere.
    #[error("sequence number {found}, expected {expected}: records are missing or out of order")]
    Sequence {
        /// Number that was expected.
        expected: u64,
        /// Number that was found.
        found: u64,
    },
    /// A payload is longer than its type allows.
    #[error("{length} bytes in a record of type {record_type:#06x}; the limit is {limit}")]
    TooLong {
        /// Number of the record type.
        record_type: u16,
        /// Claimed or attempted length, bytes.
        length: u64,
        /// Limit, bytes.
        limit: u64,
    },
    /// The payload is not what its type says.
    #[error("malformed {record_type:?} record: {what}")]
    Malformed {
        /// Type of the record.
        record_type: RecordType,
        /// What is wrong with it.
        what: String,
    },
    /// A record that may not come here.
    #[error("a {found:?} record where {expected} must follow")]
    Unexpected {
        /// Type that was found.
        found: RecordType,
        /// What was expected.
        expected: &'static str,
    },
    /// Pages that the VM does not have.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Regions that make no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Pages that came before.
    #[error("{0} come a second time, in whole or in part")]
    DuplicatePages(PageRange),
    /// Pages that nothing was said about.
    #[error("{pages} pages are missing, the first are {first}")]
    MissingPages {
        /// Number of missing pages.
        pages: u64,
        /// The first run of them.
        first: PageRange,
    },
    /// The totals in END are not those of the stream.
    #[error("END says {what} {claimed}, but it was {counted}: use another copy")]
    Totals {
        /// Name of the field.
        what: &'static str,
        /// Value in END.
        claimed: u64,
        /// Value that was counted.
        counted: u64,
    },
    /// Something follows END.
    #[error("more data after END: the file was appended to, use another copy")]
    Trailing,
    /// The VM at this end refused.
    #[error("{0}")]
    Vm(#[from] VmError),
}
