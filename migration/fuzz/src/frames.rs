//! Records out of bytes, as they are or with headers that are right.

use migration::stream::{decode_pages, decode_runs, RecordReader, RecordType, StreamKind};
use migration::{Gfn, MemoryLayout, PageRange};

/// Numbers of all types that the protocol has, one that it has not, and one of experiments.
pub const TYPES: [u16; 32] = [
    0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x10, 0x11, 0x12, 0x13, 0x14,
    0x15, 0x16, 0x17, 0x20, 0x21, 0x30, 0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0xff, 0xaa,
    0x8001,
];
/// Flags of records.
pub const OPTIONAL: u16 = 1;
pub const CHECKSUM: u16 = 2;

/// What is read bit by bit from the input; zeros at its end.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, &[][..]), |(b, rest)| (*b, rest));
        self.0 = rest;
        first
    }

    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Up to 255 bytes, or all that is left.
    pub fn some(&mut self) -> &'a [u8] {
        match self.byte() {
            255 => self.take(usize::MAX),
            count => self.take(count.into()),
        }
    }
}

pub fn preamble(kind: StreamKind) -> Vec<u8> {
    let mut bytes = [b"MINIVMM", &[kind as u8][..], &[1, 0, 0, 0]].concat();
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// A record with header, checksums and padding.
pub fn record(record_type: u16, flags: u16, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(record_type.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    let checksum = if flags & CHECKSUM != 0 { crc32c::crc32c(payload) } else { 0 };
    bytes.extend(checksum.to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(sequence.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A stream: as it is, or, where the first byte is odd, of records with these payloads.
pub fn stream(bytes: &[u8], kind: StreamKind) -> Vec<u8> {
    let mut input = Bytes(bytes);
    let framed = input.byte() % 2 == 1;
    let mut stream = preamble(kind);
    if !framed {
        stream.extend(input.0);
        return stream;
    }
    for sequence in 0.. {
        if input.is_empty() {
            break;
        }
        let number = TYPES[usize::from(input.byte()) % TYPES.len()];
        let flags = if number == 0x8001 { OPTIONAL | CHECKSUM } else { CHECKSUM };
        stream.extend(record(number, flags, sequence, input.some()));
    }
    stream
}

fn layout() -> MemoryLayout {
    let regions = [(0, 16), (256, 4)];
    let range = |(gfn, pages)| PageRange::new(Gfn(gfn), pages).expect("a range");
    MemoryLayout::new(regions.map(range)).expect("a layout")
}

/// Reads a stream of any kind, and decodes what it can.
pub fn records(bytes: &[u8]) {
    let mut input = Bytes(bytes);
    let kinds = [StreamKind::Snapshot, StreamKind::Migration, StreamKind::Pages, StreamKind::Query];
    let kind = kinds[usize::from(input.byte()) % kinds.len()];
    let stream = stream(input.0, kind);
    let Ok(mut reader) = RecordReader::new(&stream[..], kind) else { return };
    let layout = layout();
    while let Ok(record) = reader.next_record() {
        let payload = record.payload;
        match record.record_type {
            RecordType::Pages => {
                if let Ok((runs, data)) = decode_pages(payload, &layout) {
                    let pages: u64 = runs.iter().map(|run| run.pages()).sum();
                    assert_eq!(data.len() as u64, pages * 4096);
                }
            }
            known @ (RecordType::Zero | RecordType::Absent | RecordType::Announce) => {
                for run in decode_runs(known, payload, &layout).unwrap_or_default() {
                    assert!(layout.regions().any(|region| {
                        run.start() >= region.start() && run.end() <= region.end()
                    }));
                }
            }
            _ => {}
        }
    }
}
