//! The format of requests (virtio 1.2, section 5.2.6), read from the guest's buffers.

/// Bytes of the header.
pub(super) const HEADER: usize = 16;
/// Bytes of a range of a discard.
pub(super) const RANGE: usize = 16;

pub(super) const TYPE_IN: u32 = 0;
pub(super) const TYPE_OUT: u32 = 1;
pub(super) const TYPE_FLUSH: u32 = 4;
pub(super) const TYPE_GET_ID: u32 = 8;
pub(super) const TYPE_DISCARD: u32 = 11;
pub(super) const TYPE_WRITE_ZEROES: u32 = 13;

/// In a range: its storage may be given back.
pub(super) const FLAG_UNMAP: u32 = 1;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// The header of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) kind: u32,
    pub(super) sector: u64,
}

impl Header {
    pub(super) fn parse(bytes: [u8; HEADER]) -> Self {
        Self { kind: u32_at(&bytes, 0), sector: u64_at(&bytes, 8) }
    }
}

/// A range of a discard or of write-zeroes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) sector: u64,
    pub(super) sectors: u32,
    pub(super) flags: u32,
}

impl Range {
    pub(super) fn parse(bytes: [u8; RANGE]) -> Self {
        Self { sector: u64_at(&bytes, 0), sectors: u32_at(&bytes, 8), flags: u32_at(&bytes, 12) }
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
