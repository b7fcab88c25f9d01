#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use crc32c::crc32c;

use super::format::{encode_preamble, FLAG_OPTIONAL, FLAG_PAYLOAD_CHECKSUM};
use super::*;
use crate::address::{Gfn, PageRange};
use crate::layout::MemoryLayout;
use crate::simulated::SimulatedVm;
use crate::vm::GuestMemory;

const UNKNOWN: u16 = 0x7777;

fn header(record_type: u16, flags: u16, payload: &[u8], sequence: u64) -> RecordHeader {
    let checksum = if flags & FLAG_PAYLOAD_CHECKSUM != 0 { crc32c(payload) } else { 0 };
    RecordHeader {
        record_type,
        flags,
        payload_checksum: checksum,
        length: payload.len() as u64,
        sequence,
    }
}

fn record(record_type: u16, flags: u16, payload: &[u8], sequence: u64) -> Vec<u8> {
    let header = header(record_type, flags, payload, sequence);
    [&header.encode()[..], payload, &[0; 8][..header.padding()]].concat()
}

fn stream(records: &[Vec<u8>]) -> Vec<u8> {
    [&encode_preamble(StreamKind::Snapshot)[..], &records.concat()].concat()
}

/// The problem with the first record of a known type.
fn first_problem(bytes: &[u8]) -> Problem {
    match RecordReader::new(bytes, StreamKind::Snapshot) {
        Ok(mut reader) => reader.next_record().unwrap_err().problem,
        Err(error) => error.problem,
    }
}

#[test]
fn unknown_optional_records_are_skipped_and_unknown_others_refused() {
    let config = record(RecordType::Config as u16, FLAG_PAYLOAD_CHECKSUM, b"config", 2);
    let bytes = stream(&[
        record(UNKNOWN, FLAG_OPTIONAL, &[1; 10_001], 0),
        record(UNKNOWN + 1, FLAG_OPTIONAL | FLAG_PAYLOAD_CHECKSUM, &[2; 7], 1),
        config,
    ]);
    let mut reader = RecordReader::new(&bytes[..], StreamKind::Snapshot).unwrap();
    let found = reader.next_record().unwrap();
    assert_eq!((found.record_type, found.payload), (RecordType::Config, &b"config"[..]));

    let mandatory = stream(&[record(UNKNOWN, FLAG_PAYLOAD_CHECKSUM, b"x", 0)]);
    let problem = first_problem(&mandatory);
    assert!(matches!(problem, Problem::UnknownType(UNKNOWN)));
    assert!(problem.to_string().contains("0x7777"), "{problem}");

    let mut damaged = record(UNKNOWN, FLAG_OPTIONAL | FLAG_PAYLOAD_CHECKSUM, &[2; 7], 0);
    damaged[33] ^= 1;
    assert!(matches!(first_problem(&stream(&[damaged])), Problem::PayloadChecksum));
}

#[test]
fn a_hostile_length_is_refused_before_memory_is_provided() {
    for (record_type, flags, limit) in [
        (RecordType::State as u16, FLAG_PAYLOAD_CHECKSUM, RecordType::State.max_bytes()),
        (RecordType::Pages as u16, FLAG_PAYLOAD_CHECKSUM, RecordType::Pages.max_bytes()),
        (UNKNOWN, FLAG_OPTIONAL, 16 << 20),
    ] {
        for length in [limit + 1, 1 << 40, u64::MAX] {
            let mut header = header(record_type, flags, &[], 0);
            header.length = length;
            let problem = first_problem(&stream(&[header.encode().to_vec()]));
            assert!(matches!(problem, Problem::TooLong { .. }), "{length}: {problem}");
        }
    }
    // A length within the limit costs memory only as the payload arrives.
    let mut header = header(RecordType::State as u16, FLAG_PAYLOAD_CHECKSUM, &[], 0);
    header.length = RecordType::State.max_bytes();
    let bytes = stream(&[header.encode().to_vec(), vec![0; 1000]]);
    let mut reader = RecordReader::new(&bytes[..], StreamKind::Snapshot).unwrap();
    assert!(matches!(reader.next_record().unwrap_err().problem, Problem::Truncated));
    assert!(reader.payload.capacity() <= 4 << 20, "{}", reader.payload.capacity());
}

#[test]
fn headers_with_anything_odd_are_refused() {
    let config = RecordType::Config as u16;
    let one = |flags, sequence| stream(&[record(config, flags, b"x", sequence)]);
    assert!(matches!(
        first_problem(&one(FLAG_PAYLOAD_CHECKSUM, 1)),
        Problem::Sequence { expected: 0, found: 1 }
    ));
    assert!(matches!(first_problem(&one(1 << 2, 0)), Problem::Reserved(_)));
    assert!(matches!(first_problem(&one(0, 0)), Problem::ChecksumMissing(RecordType::Config)));
    let mut padded = record(config, FLAG_PAYLOAD_CHECKSUM, b"x", 0);
    *padded.last_mut().unwrap() = 1;
    assert!(matches!(first_problem(&stream(&[padded])), Problem::Reserved("the padding")));
}

#[test]
fn preambles_of_others_are_refused_for_the_right_reason() {
    let with = |at: usize, byte: u8| {
        let mut bytes = encode_preamble(StreamKind::Snapshot);
        bytes[at] = byte;
        let checksum = crc32c(&bytes[0..12]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        first_problem(&bytes)
    };
    assert!(matches!(with(0, b'X'), Problem::NotAStream));
    assert!(matches!(with(7, b'M'), Problem::WrongKind { found: b'M', expected: b'S' }));
    assert!(matches!(with(8, 2), Problem::Version(2)));
    assert!(with(8, 2).to_string().contains("version 2"));
    assert!(matches!(with(10, 1), Problem::Reserved(_)));
    assert!(matches!(first_problem(b"#!/bin/sh\nexit 0\n"), Problem::NotAStream));
    assert!(matches!(first_problem(b"short"), Problem::Truncated));
}

#[test]
fn a_payload_beyond_its_limit_is_not_written() {
    let mut writer = RecordWriter::new(Vec::new(), StreamKind::Snapshot).unwrap();
    let error = writer.write(RecordType::End, &[&[0; 257]]).unwrap_err();
    assert!(matches!(error.problem, Problem::TooLong { limit: 256, .. }));
    assert_eq!(writer.bytes(), 16, "nothing but the preamble");
}

fn vm() -> SimulatedVm {
    let regions = [(0, 4096), (1 << 20, 64)];
    let ranges = regions.map(|(start, pages)| PageRange::new(Gfn(start), pages).unwrap());
    SimulatedVm::new(MemoryLayout::new(ranges).unwrap()).unwrap()
}

/// Every other page, so that each is a buffer of its own.
fn scattered() -> Vec<PageRange> {
    (0..256).map(|i| PageRange::new(Gfn(i * 2), 1).unwrap()).collect()
}

#[test]
fn live_pages_go_from_memory_to_memory() {
    let (source, destination) = (vm(), vm());
    for run in scattered() {
        source.guest_write(run.start(), &[run.start().0 as u8 | 1; 4096]).unwrap();
    }
    let (near, far) = UnixStream::pair().unwrap();
    let long = PageRange::new(Gfn(1 << 20), 64).unwrap();
    source.guest_write(Gfn((1 << 20) + 63), b"last").unwrap();
    let received = thread::scope(|scope| {
        // The socket moves into the thread, so that a failure there ends the stream.
        let source = &source;
        scope.spawn(move || {
            let mut writer = RecordWriter::new(near, StreamKind::Pages).unwrap();
            writer.write_live_pages(source, &scattered()).unwrap();
            writer.write_live_pages(source, &[long]).unwrap();
            writer.write(RecordType::Config, &[b"after"]).unwrap();
        });
        let mut reader = RecordReader::new(&far, StreamKind::Pages).unwrap();
        let mut received = Vec::new();
        for _ in 0..2 {
            let (record_type, header) = reader.next_header().unwrap();
            assert_eq!(record_type, RecordType::Pages);
            received.extend(reader.read_live_pages(&header, &destination).unwrap());
        }
        assert_eq!(reader.next_record().unwrap().payload, b"after");
        received
    });
    assert_eq!(received, [scattered(), vec![long]].concat());
    for run in &received {
        for gfn in run.start().0..run.end().0 {
            let (mine, theirs) =
                (source.read_page(Gfn(gfn)).unwrap(), destination.read_page(Gfn(gfn)).unwrap());
            assert!(mine == theirs, "page frame {gfn:#x}");
        }
    }
    let populated = destination.populated().unwrap();
    assert!(received.iter().all(|run| populated.contains(*run)), "announced before written");
}

#[test]
fn hostile_live_pages_are_refused() {
    let table = |count: u32, gfn: u64, pages: u64| {
        [&count.to_le_bytes()[..], &[0; 4], &gfn.to_le_bytes(), &pages.to_le_bytes()].concat()
    };
    for (payload, pages) in [
        (table(1, 4096, 1), 1),
        (table(1, 0, 0), 0),
        (table(1, 0, 2), 1),
        (table(1, 0, 257), 0),
        (table(257, 0, 1), 1),
        (table(2, 0, 1), 0),
        (table(0, 0, 1), 1),
        (vec![0; 7], 0),
    ] {
        let payload = [payload, vec![1; pages * 4096]].concat();
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&encode_preamble(StreamKind::Pages)).unwrap();
        near.write_all(&record(RecordType::Pages as u16, 0, &payload, 0)).unwrap();
        drop(near);
        let destination = vm();
        let mut reader = RecordReader::new(&far, StreamKind::Pages).unwrap();
        let (_, header) = reader.next_header().unwrap();
        reader.read_live_pages(&header, &destination).unwrap_err();
        assert!(destination.populated().unwrap().is_empty(), "nothing was touched");
    }
}

#[test]
fn volatile_io_goes_on_after_partial_transfers_and_tells_the_end() {
    let (source, destination) = (vm(), vm());
    // More buffers than one call takes, and more bytes than a socket holds.
    let runs: Vec<_> = (0..2048).map(|i| PageRange::new(Gfn(i * 2), 1).unwrap()).collect();
    for run in &runs {
        source.guest_write(run.start(), &run.start().0.to_le_bytes()).unwrap();
    }
    let slices =
        |vm| -> Vec<_> { runs.iter().map(|run| GuestMemory::slice(vm, *run).unwrap()).collect() };
    let (near, mut far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let result = crate::volatile_io::write_all(near.as_fd(), b"head", &slices(&source));
            // Before the result is looked at: a reader that waits for ever would hide a failure.
            near.shutdown(std::net::Shutdown::Write).unwrap();
            result.unwrap();
        });
        let mut head = [0; 4];
        far.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"head");
        crate::volatile_io::read_exact(far.as_fd(), &slices(&destination)).unwrap();
        let error = crate::volatile_io::read_exact(far.as_fd(), &slices(&destination)[..1]);
        assert_eq!(error.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    });
    for run in &runs {
        let (mine, theirs) = (source.read_page(run.start()), destination.read_page(run.start()));
        assert!(mine.unwrap() == theirs.unwrap(), "{run}");
    }
    drop(far);
    let error = crate::volatile_io::write_all(near.as_fd(), b"x", &[]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}
