//! The stream of records that carries a VM, in a file or over a connection.
//!
//! `docs/PROTOCOL.md` specifies it for other implementers; in short, all integers little-endian:
//!
//! ```text
//!   | preamble | record | record | ... | END |
//!
//!   preamble (16 bytes)
//!    0        7      8         10         12        16
//!    | MINIVMM | kind | version | reserved | crc32c |
//!
//!   record
//!    0      2       4              8        16         24         28       32
//!    | type | flags | payload crc | length | sequence | reserved | hdr crc | payload | padding |
//!                                     |                                     `- length -' to 8
//!                                     `- bytes of payload, without padding
//!
//!   payload of PAGES, ZERO, ABSENT
//!    0       4          8
//!    | count | reserved | count runs of (gfn u64, pages u32, reserved u32) | PAGES: 4 KiB pages |
//! ```
//!
//! Nothing that is read is believed: the header's checksum and the size limit of its type come
//! before any memory is provided, and a range of pages is a [`ClaimedRange`](crate::ClaimedRange)
//! until it was found in the layout. Reserved fields and padding are zero, and checked to be.
//!
//! All records have a payload checksum except PAGES of a running guest, whose bytes may change
//! between the checksum and the wire; they go from guest memory to the socket and back without a
//! copy (`live`).

mod control;
mod error;
mod format;
mod live;
pub(crate) mod pages;
mod reader;
pub(crate) mod session;
mod writer;

pub(crate) use control::{decode_layout, decode_section, encode_layout, encode_section};
pub use control::{BlobChunk, BlobKind, Config, End, Machine, MAX_BLOB_BYTES, MAX_BLOB_CHUNK};
pub use error::{Problem, StreamError};
pub use format::{RecordHeader, RecordType, StreamKind, PROTOCOL_VERSION};
pub(crate) use pages::PAGES_PER_BATCH;
pub use pages::{decode_pages, decode_runs, encode_runs, MAX_PAGES_PER_RECORD, MAX_RUNS};
pub use reader::{Record, RecordReader};
pub(crate) use writer::PageTotals;
pub use writer::RecordWriter;

#[cfg(test)]
mod tests;
