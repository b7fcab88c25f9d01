//! Preamble and record header: their bytes, and every check that needs no context.

use crc32c::{crc32c, crc32c_append};

use crate::stream::error::Problem;
use crate::stream::pages::{MAX_PAGES_BYTES, MAX_REQUEST_BYTES, MAX_RUNS_BYTES};

/// Version of the protocol: preamble, headers, and the meaning and order of records.
pub const PROTOCOL_VERSION: u16 = 1;

/// First bytes of every stream.
const MAGIC: &[u8; 7] = b"MINIVMM";

pub(crate) const PREAMBLE_BYTES: usize = 16;
pub(crate) const HEADER_BYTES: usize = 32;

/// Payloads are padded to a multiple of this, so that page data is aligned, bytes.
const ALIGNMENT: u64 = 8;

/// Readers that do not know the type skip the record.
pub(crate) const FLAG_OPTIONAL: u16 = 1 << 0;
/// The payload checksum field holds the CRC-32C of the payload.
pub(crate) const FLAG_PAYLOAD_CHECKSUM: u16 = 1 << 1;

/// Longest payload of an optional record of unknown type, bytes.
pub(crate) const MAX_UNKNOWN_BYTES: u64 = 16 << 20;

/// What a stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamKind {
    /// A VM saved to a file.
    Snapshot = b'S',
    /// Memory in a file that a VM left behind when it moved: no VM.
    Remains = b'L',
    /// A migration's main connection.
    Migration = b'M',
    /// A migration's connection for pages.
    Pages = b'P',
    /// A question for a verdict.
    Query = b'Q',
    /// A migration's connection for requests of single pages, in post-copy.
    Requests = b'R',
    /// A main connection that goes on with a post-copy migration.
    Continue = b'C',
}

impl StreamKind {
    /// The kind of this byte, if it is known.
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Snapshot,
            Self::Remains,
            Self::Migration,
            Self::Pages,
            Self::Query,
            Self::Requests,
            Self::Continue,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// The 16 bytes that open a stream.
pub(crate) fn encode_preamble(kind: StreamKind) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[0..7].copy_from_slice(MAGIC);
    bytes[7] = kind as u8;
    bytes[8..10].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    let checksum = crc32c(&bytes[0..12]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The kind of a preamble, for a reader that takes several; [`check_preamble`] judges the rest.
pub(crate) fn preamble_kind(bytes: &[u8; PREAMBLE_BYTES]) -> Option<StreamKind> {
    StreamKind::from_byte(bytes[7])
}

/// Checks a preamble. The version is judged before the rest, since another version may have
/// changed the rest.
pub(crate) fn check_preamble(
    bytes: &[u8; PREAMBLE_BYTES],
    expected: StreamKind,
) -> Result<(), Problem> {
    if &bytes[0..7] != MAGIC {
        return Err(Problem::NotAStream);
    }
    if u32_at(bytes, 12) != crc32c(&bytes[0..12]) {
        return Err(Problem::HeaderChecksum);
    }
    let version = u16_at(bytes, 8);
    if version != PROTOCOL_VERSION {
        return Err(Problem::Version(version));
    }
    if bytes[7] != expected as u8 {
        return Err(Problem::WrongKind { found: bytes[7], expected: expected as u8 });
    }
    if u16_at(bytes, 10) != 0 {
        return Err(Problem::Reserved("the preamble"));
    }
    Ok(())
}

/// Types of records. Numbers are never used again for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RecordType {
    /// Which machine this is and which program wrote it.
    Machine = 0x0001,
    /// The VM's configuration.
    Config = 0x0002,
    /// A piece of the kernel or the initrd.
    Blob = 0x0003,
    /// Which page frames there are.
    Layout = 0x0004,
    /// The first record of each direction of a main connection.
    Hello = 0x0005,
    /// What the source wants to migrate, and how.
    Offer = 0x0006,
    /// The destination can take it.
    Accept = 0x0007,
    /// The destination cannot take it, with all reasons.
    Refuse = 0x0008,
    /// The destination has made the VM.
    Ready = 0x0009,
    /// The first record of a page connection.
    Join = 0x000a,
    /// The answer to it.
    Joined = 0x000b,
    /// Asks to go on with a post-copy migration.
    Recover = 0x000c,
    /// The answer to it.
    Recovered = 0x000d,
    /// Pages with contents.
    Pages = 0x0010,
    /// Pages that hold only zeros.
    Zero = 0x0011,
    /// Pages that were never touched.
    Absent = 0x0012,
    /// Pages that round 0 will look at.
    Announce = 0x0013,
    /// A round begins.
    Round = 0x0014,
    /// No page follows on this connection.
    Sync = 0x0015,
    /// Everything before it has arrived; the receiver sends it back.
    Echo = 0x0017,
    /// Hashes of memory.
    Hash = 0x0016,
    /// Pages that a guest waits for.
    Request = 0x0018,
    /// Pages that the destination is to have only later.
    Missing = 0x0019,
    /// The state of one part of the machine.
    State = 0x0020,
    /// No state follows.
    Complete = 0x0021,
    /// The rest of memory comes by post-copy.
    Switch = 0x0022,
    /// Everything is loaded; the source may commit.
    Loaded = 0x0030,
    /// The commit point.
    Commit = 0x0031,
    /// The destination owns the VM and runs it.
    Resumed = 0x0032,
    /// The source knows.
    Done = 0x0033,
    /// The sender has given up.
    Abort = 0x0034,
    /// The sender is there.
    Alive = 0x0035,
    /// What became of a migration?
    Query = 0x0036,
    /// The answer to it.
    Verdict = 0x0037,
    /// All pages are there.
    Drained = 0x0038,
    /// Frames that reached the guest's old host.
    Frames = 0x0039,
    /// Totals; nothing follows.
    End = 0x00ff,
}

impl RecordType {
    const ALL: [RecordType; 37] = [
        RecordType::Machine,
        RecordType::Config,
        RecordType::Blob,
        RecordType::Layout,
        RecordType::Hello,
        RecordType::Offer,
        RecordType::Accept,
        RecordType::Refuse,
        RecordType::Ready,
        RecordType::Join,
        RecordType::Joined,
        RecordType::Recover,
        RecordType::Recovered,
        RecordType::Pages,
        RecordType::Zero,
        RecordType::Absent,
        RecordType::Announce,
        RecordType::Round,
        RecordType::Sync,
        RecordType::Echo,
        RecordType::Hash,
        RecordType::Request,
        RecordType::Missing,
        RecordType::State,
        RecordType::Complete,
        RecordType::Switch,
        RecordType::Loaded,
        RecordType::Commit,
        RecordType::Resumed,
        RecordType::Done,
        RecordType::Abort,
        RecordType::Alive,
        RecordType::Query,
        RecordType::Verdict,
        RecordType::Drained,
        RecordType::Frames,
        RecordType::End,
    ];

    /// The type of this number, if it is known.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|record_type| *record_type as u16 == number)
    }

    /// Longest payload, bytes.
    pub fn max_bytes(self) -> u64 {
        match self {
            RecordType::Machine | RecordType::Config => 1 << 20,
            RecordType::Blob => (1 << 20) + 24,
            RecordType::Layout => 4 << 10,
            RecordType::Pages => MAX_PAGES_BYTES,
            RecordType::Zero | RecordType::Absent | RecordType::Announce | RecordType::Missing => {
                MAX_RUNS_BYTES
            }
            RecordType::Request => MAX_REQUEST_BYTES,
            RecordType::Drained => 16 << 10,
            RecordType::Frames => (256 << 10) + (16 << 10),
            RecordType::State => (16 << 20) + (4 << 10),
            RecordType::Hello => 1 << 10,
            RecordType::Offer => (1 << 20) + (4 << 10),
            RecordType::Refuse => 64 << 10,
            RecordType::Hash => 4 << 20,
            RecordType::Abort => 4 << 10,
            RecordType::End
            | RecordType::Accept
            | RecordType::Ready
            | RecordType::Join
            | RecordType::Joined
            | RecordType::Recover
            | RecordType::Recovered
            | RecordType::Round
            | RecordType::Sync
            | RecordType::Echo
            | RecordType::Complete
            | RecordType::Switch
            | RecordType::Loaded
            | RecordType::Commit
            | RecordType::Resumed
            | RecordType::Done
            | RecordType::Alive
            | RecordType::Query
            | RecordType::Verdict => 256,
        }
    }
}

/// The fixed part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// Number of the type; see [`RecordType`].
    pub record_type: u16,
    /// Flag bits.
    pub flags: u16,
    /// CRC-32C of the payload without padding, or 0 when there is none.
    pub payload_checksum: u32,
    /// Length of the payload without padding, bytes.
    pub length: u64,
    /// Position of the record in the stream, counted from 0.
    pub sequence: u64,
}

impl RecordHeader {
    /// Whether the payload has a checksum.
    pub fn has_checksum(&self) -> bool {
        self.flags & FLAG_PAYLOAD_CHECKSUM != 0
    }

    /// Whether a reader that does not know the type may skip the record.
    pub fn is_optional(&self) -> bool {
        self.flags & FLAG_OPTIONAL != 0
    }

    /// Zero bytes after the payload.
    pub(crate) fn padding(&self) -> usize {
        padding(self.length)
    }

    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..2].copy_from_slice(&self.record_type.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.payload_checksum.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.length.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        let checksum = crc32c(&bytes[0..28]);
        bytes[28..32].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Decodes a header and checks all of it, the limit of its length included.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES], sequence: u64) -> Result<Self, Problem> {
        if u32_at(bytes, 28) != crc32c(&bytes[0..28]) {
            return Err(Problem::HeaderChecksum);
        }
        let header = Self {
            record_type: u16_at(bytes, 0),
            flags: u16_at(bytes, 2),
            payload_checksum: u32_at(bytes, 4),
            length: u64_at(bytes, 8),
            sequence: u64_at(bytes, 16),
        };
        if header.flags & !(FLAG_OPTIONAL | FLAG_PAYLOAD_CHECKSUM) != 0 || u32_at(bytes, 24) != 0 {
            return Err(Problem::Reserved("the record header"));
        }
        if !header.has_checksum() && header.payload_checksum != 0 {
            return Err(Problem::Reserved("the unused payload checksum"));
        }
        if header.sequence != sequence {
            return Err(Problem::Sequence { expected: sequence, found: header.sequence });
        }
        let limit = match RecordType::from_number(header.record_type) {
            Some(known) => known.max_bytes(),
            None if header.is_optional() => MAX_UNKNOWN_BYTES,
            None => return Err(Problem::UnknownType(header.record_type)),
        };
        if header.length > limit {
            return Err(Problem::TooLong {
                record_type: header.record_type,
                length: header.length,
                limit,
            });
        }
        Ok(header)
    }
}

/// Zero bytes that follow a payload of this length.
pub(crate) fn padding(length: u64) -> usize {
    ((ALIGNMENT - length % ALIGNMENT) % ALIGNMENT) as usize
}

/// Binds the records of a stream together: a CRC-32C over the preamble and all record headers,
/// each of which holds the checksum of its payload. A record from another stream does not fit in,
/// even with the right sequence number.
///
/// The headers' own checksums are left out: a CRC over data followed by the CRC of that data is a
/// constant, whatever the data is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Digest(u32);

impl Digest {
    pub(crate) fn new(preamble: &[u8; PREAMBLE_BYTES]) -> Self {
        Self(crc32c(&preamble[..PREAMBLE_BYTES - 4]))
    }

    pub(crate) fn add(&mut self, header: &[u8; HEADER_BYTES]) {
        self.0 = crc32c_append(self.0, &header[..HEADER_BYTES - 4]);
    }

    pub(crate) fn value(self) -> u32 {
        self.0
    }
}

/// The little-endian number at a fixed offset that the caller knows to be inside.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// As [`u16_at`].
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

/// As [`u16_at`].
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
