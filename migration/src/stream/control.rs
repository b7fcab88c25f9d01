//! Payloads of the control records: `bincode` 2 with one fixed configuration, and BLOB.
//!
//! The encoded structures are frozen: a new field is a new protocol version. They borrow from the
//! payload when they are decoded, so that no length in it can make this program allocate more
//! than the payload itself.

use serde::{Deserialize, Serialize, Serializer};

use crate::address::{ClaimedRange, Gfn, PageRange};
use crate::layout::{MemoryLayout, MAX_REGIONS};
use crate::stream::error::Problem;
use crate::stream::format::{u16_at, u32_at, u64_at, RecordType};
use crate::vm::Section;

/// Little-endian, variable-length integers; no payload is longer than the longest record.
const BINCODE: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<{ 32 << 20 }>,
> = bincode::config::standard().with_limit::<{ 32 << 20 }>();

/// Most blob data in one BLOB record, bytes.
pub const MAX_BLOB_CHUNK: usize = 1 << 20;
/// Longest blob, bytes.
pub const MAX_BLOB_BYTES: u64 = 1 << 30;
/// Fields before the data of a BLOB record, bytes.
const BLOB_HEAD_BYTES: usize = 24;

/// Who wrote the stream, and what the VMM needs to decide whether it can run this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Version of the program that wrote the stream, for messages.
    pub program_version: String,
    /// Version of the encoding of `identity`.
    pub identity_version: u16,
    /// The machine's identity (CPU, platform, devices), opaque to this crate.
    pub identity: Vec<u8>,
}

/// The VM's configuration, opaque to this crate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Version of the encoding of `data`.
    pub version: u16,
    /// The encoded configuration.
    pub data: Vec<u8>,
}

/// Totals at the end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Records before this one.
    pub records: u64,
    /// Bytes before this record, the preamble included.
    pub bytes: u64,
    /// CRC-32C over the preamble and the headers of all records before this one, each without
    /// its own checksum.
    pub digest: u32,
    /// Pages in PAGES records.
    pub data_pages: u64,
    /// Pages in ZERO records.
    pub zero_pages: u64,
    /// Pages in ABSENT records.
    pub absent_pages: u64,
}

#[derive(Serialize, Deserialize)]
struct MachineWire<'a> {
    program_version: &'a str,
    identity_version: u16,
    #[serde(borrow, serialize_with = "as_bytes")]
    identity: &'a [u8],
}

#[derive(Serialize, Deserialize)]
struct ConfigWire<'a> {
    version: u16,
    #[serde(borrow, serialize_with = "as_bytes")]
    data: &'a [u8],
}

#[derive(Serialize, Deserialize)]
struct LayoutWire {
    /// First page frame and number of pages of each region.
    regions: Vec<(u64, u64)>,
}

#[derive(Serialize, Deserialize)]
struct SectionWire<'a> {
    kind: &'a str,
    instance: u32,
    version: u16,
    #[serde(borrow, serialize_with = "as_bytes")]
    data: &'a [u8],
}

/// One run of bytes instead of a sequence of numbers: the same on the wire, but faster.
pub(super) fn as_bytes<S: Serializer>(bytes: &&[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

impl Machine {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Problem> {
        let wire = MachineWire {
            program_version: &self.program_version,
            identity_version: self.identity_version,
            identity: &self.identity,
        };
        encode(RecordType::Machine, &wire)
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, Problem> {
        let wire: MachineWire<'_> = decode(RecordType::Machine, payload)?;
        Ok(Self {
            program_version: wire.program_version.to_owned(),
            identity_version: wire.identity_version,
            identity: wire.identity.to_vec(),
        })
    }
}

impl Config {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Problem> {
        let wire = ConfigWire { version: self.version, data: &self.data };
        encode(RecordType::Config, &wire)
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, Problem> {
        let wire: ConfigWire<'_> = decode(RecordType::Config, payload)?;
        Ok(Self { version: wire.version, data: wire.data.to_vec() })
    }
}

impl End {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Problem> {
        encode(RecordType::End, self)
    }

    pub(crate) fn decode(payload: &[u8]) -> Result<Self, Problem> {
        decode(RecordType::End, payload)
    }
}

pub(crate) fn encode_layout(layout: &MemoryLayout) -> Result<Vec<u8>, Problem> {
    let regions = layout.regions().map(|range| (range.start().0, range.pages())).collect();
    encode(RecordType::Layout, &LayoutWire { regions })
}

pub(crate) fn decode_layout(payload: &[u8]) -> Result<MemoryLayout, Problem> {
    let wire: LayoutWire = decode(RecordType::Layout, payload)?;
    let ranges: Vec<PageRange> = wire
        .regions
        .into_iter()
        .take(MAX_REGIONS + 1)
        .map(|(gfn, pages)| ClaimedRange { gfn, pages })
        .map(|claim| PageRange::new(Gfn(claim.gfn), claim.pages))
        .collect::<Result<_, _>>()?;
    Ok(MemoryLayout::new(ranges)?)
}

pub(crate) fn encode_section(section: &Section) -> Result<Vec<u8>, Problem> {
    let wire = SectionWire {
        kind: &section.kind,
        instance: section.instance,
        version: section.version,
        data: &section.data,
    };
    encode(RecordType::State, &wire)
}

pub(crate) fn decode_section(payload: &[u8]) -> Result<Section, Problem> {
    let wire: SectionWire<'_> = decode(RecordType::State, payload)?;
    Ok(Section {
        kind: wire.kind.to_owned(),
        instance: wire.instance,
        version: wire.version,
        data: wire.data.to_vec(),
    })
}

pub(super) fn encode<T: Serialize>(record_type: RecordType, value: &T) -> Result<Vec<u8>, Problem> {
    bincode::serde::encode_to_vec(value, BINCODE)
        .map_err(|error| Problem::Malformed { record_type, what: error.to_string() })
}

pub(super) fn decode<'a, T: Deserialize<'a>>(
    record_type: RecordType,
    payload: &'a [u8],
) -> Result<T, Problem> {
    let (value, used) = bincode::serde::borrow_decode_from_slice(payload, BINCODE)
        .map_err(|error| Problem::Malformed { record_type, what: error.to_string() })?;
    if used != payload.len() {
        let what = format!("{} bytes too many", payload.len() - used);
        return Err(Problem::Malformed { record_type, what });
    }
    Ok(value)
}

/// What a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum BlobKind {
    /// The guest's kernel image, for later reboots.
    Kernel = 1,
    /// Its initial RAM disk.
    Initrd = 2,
}

/// One BLOB record.
///
/// ```text
///   0      2          4          8              16       24
///   | kind | reserved | reserved | total length | offset | data: at most 1 MiB |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobChunk<'a> {
    /// Which blob.
    pub kind: BlobKind,
    /// Length of the whole blob, bytes.
    pub total: u64,
    /// Where `data` begins in it, bytes.
    pub offset: u64,
    /// A piece of it.
    pub data: &'a [u8],
}

impl<'a> BlobChunk<'a> {
    /// Fields before the data.
    pub(crate) fn head(&self) -> [u8; BLOB_HEAD_BYTES] {
        let mut bytes = [0; BLOB_HEAD_BYTES];
        bytes[0..2].copy_from_slice(&(self.kind as u16).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.total.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    pub(crate) fn decode(payload: &'a [u8]) -> Result<Self, Problem> {
        let malformed = |what| Problem::Malformed { record_type: RecordType::Blob, what };
        let Some((head, data)) = payload.split_at_checked(BLOB_HEAD_BYTES) else {
            return Err(malformed(format!("{} bytes are too few", payload.len())));
        };
        if u16_at(head, 2) != 0 || u32_at(head, 4) != 0 {
            return Err(Problem::Reserved("a BLOB record"));
        }
        let kind = match u16_at(head, 0) {
            1 => BlobKind::Kernel,
            2 => BlobKind::Initrd,
            other => return Err(malformed(format!("unknown kind {other}"))),
        };
        let (total, offset) = (u64_at(head, 8), u64_at(head, 16));
        let end = offset.checked_add(data.len() as u64);
        if total > MAX_BLOB_BYTES || end.is_none_or(|end| end > total) {
            return Err(malformed(format!(
                "{} bytes at offset {offset} of {total}, limit {MAX_BLOB_BYTES}",
                data.len()
            )));
        }
        Ok(Self { kind, total, offset, data })
    }
}
