//! Damaged and hostile snapshots are refused, and the message says where and what to do.

use super::*;
use crate::address::PAGE_BYTES;
use crate::stream::{
    encode_layout, encode_runs, encode_section, BlobChunk, PageTotals, Problem, RecordType,
    RecordWriter, StreamError, StreamKind,
};

fn problem(bytes: &[u8]) -> StreamError {
    match restore(bytes) {
        Err(SnapshotError::Restore { error, .. }) => error,
        other => panic!("not refused as a bad stream: {other:?}"),
    }
}

#[test]
fn every_flipped_byte_is_noticed() {
    let bytes = save(&small_vm());
    restore(&bytes).unwrap();
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(restore(&damaged).is_err(), "byte {at} of {}", bytes.len());
    }
}

#[test]
fn every_truncation_is_noticed() {
    let bytes = save(&small_vm());
    for length in 0..bytes.len() {
        let error = problem(&bytes[..length]);
        assert!(matches!(error.problem, Problem::Truncated), "{length}: {error}");
        assert!(error.to_string().contains("use another copy"));
    }
}

#[test]
fn data_after_the_end_is_refused() {
    let mut bytes = save(&small_vm());
    bytes.push(0);
    assert!(matches!(problem(&bytes).problem, Problem::Trailing));
}

#[test]
fn a_record_of_another_snapshot_does_not_fit_in() {
    let vm = small_vm();
    let older = save(&vm);
    vm.guest_write(Gfn(5), b"newer").unwrap();
    let newer = save(&vm);
    assert_eq!(older.len(), newer.len());
    // Both have the same records in the same places; only PAGES differ, header and payload.
    let first = older.iter().zip(&newer).position(|(a, b)| a != b).unwrap();
    let (pages, end) = (first - first % 8, older.len() - 200);
    let mut mixed = older.clone();
    mixed[pages - 32..end].copy_from_slice(&newer[pages - 32..end]);
    let error = problem(&mixed);
    assert!(matches!(error.problem, Problem::Totals { what: "digest", .. }), "{error}");
}

/// Writes records as given, well-formed as records, up to END.
struct Forger(RecordWriter<Vec<u8>>);

impl Forger {
    fn with_layout(payload: &[u8]) -> Self {
        let mut forger = Self::without_layout();
        forger.0.write(RecordType::Layout, &[payload]).unwrap();
        forger
    }

    fn without_layout() -> Self {
        let mut writer = RecordWriter::new(Vec::new(), StreamKind::Snapshot).unwrap();
        writer.write(RecordType::Machine, &[&machine().encode().unwrap()]).unwrap();
        writer.write(RecordType::Config, &[&config().encode().unwrap()]).unwrap();
        Self(writer)
    }

    fn new() -> Self {
        Self::with_layout(&encode_layout(&layout(&REGIONS)).unwrap())
    }

    fn record(mut self, record_type: RecordType, payload: &[u8]) -> Self {
        self.0.write(record_type, &[payload]).unwrap();
        self
    }

    fn pages(self, runs: &[(u64, u64)]) -> Self {
        let pages: u64 = runs.iter().map(|run| run.1).sum();
        let payload = [table(runs), vec![7; pages as usize * PAGE_BYTES]].concat();
        self.record(RecordType::Pages, &payload)
    }

    fn absent(self, runs: &[(u64, u64)]) -> Self {
        self.record(RecordType::Absent, &table(runs))
    }

    fn end(self, data: u64, zero: u64, absent: u64) -> Vec<u8> {
        self.0.finish_into_bytes(PageTotals { data, zero, absent })
    }
}

fn table(runs: &[(u64, u64)]) -> Vec<u8> {
    let runs: Vec<_> = runs.iter().map(|(start, pages)| range(*start, *pages)).collect();
    let mut table = Vec::new();
    encode_runs(&runs, &mut table);
    table
}

const TOP: u64 = 1 << 20;

#[test]
fn the_forger_can_write_a_good_snapshot() {
    let bytes = Forger::new().pages(&[(0, 2), (6, 1)]).absent(&[(2, 4), (7, 2), (TOP, 4)]);
    restore(&bytes.end(3, 0, 10)).unwrap();
}

#[test]
fn pages_named_twice_are_refused() {
    for forged in [
        Forger::new().pages(&[(0, 2)]).pages(&[(0, 2)]),
        Forger::new().pages(&[(0, 3), (2, 1)]),
        Forger::new().pages(&[(0, 3)]).absent(&[(2, 4), (6, 3), (TOP, 4)]),
    ] {
        let error = problem(&forged.end(0, 0, 0));
        assert!(matches!(error.problem, Problem::DuplicatePages(_)), "{error}");
    }
}

#[test]
fn pages_outside_the_layout_are_refused() {
    for run in [(9, 1), (5, 2), (TOP + 3, 2), (TOP - 1, 1), (1 << 39, 1)] {
        let error = problem(&Forger::new().pages(&[run]).end(1, 0, 0));
        assert!(matches!(error.problem, Problem::Range(_)), "{run:?}: {error}");
        assert_eq!(error.record, 3, "the message names the record");
    }
}

#[test]
fn missing_pages_and_wrong_totals_are_refused() {
    let some = || Forger::new().pages(&[(0, 2)]).absent(&[(2, 4), (6, 3)]);
    let error = problem(&some().end(2, 0, 11));
    assert!(matches!(error.problem, Problem::MissingPages { pages: 4, .. }), "{error}");
    let all = || some().absent(&[(TOP, 4)]);
    restore(&all().end(2, 0, 11)).unwrap();
    let error = problem(&all().end(1, 1, 11));
    assert!(matches!(error.problem, Problem::Totals { what: "data pages", .. }), "{error}");
}

#[test]
fn records_out_of_order_are_refused() {
    let state =
        encode_section(&Section { kind: "a".into(), instance: 0, version: 1, data: Vec::new() })
            .unwrap();
    let complete = || Forger::new().absent(&[(0, 6), (6, 3), (TOP, 4)]);
    for forged in [
        Forger::without_layout().pages(&[(0, 1)]),
        Forger::without_layout().record(RecordType::State, &state),
        Forger::new().record(RecordType::Config, &config().encode().unwrap()),
        complete().record(RecordType::State, &state).absent(&[(0, 1)]),
    ] {
        let error = problem(&forged.end(0, 0, 13));
        assert!(matches!(error.problem, Problem::Unexpected { .. }), "{error}");
    }
    let error = problem(
        &complete()
            .record(RecordType::State, &state)
            .record(RecordType::State, &state)
            .end(0, 0, 13),
    );
    assert!(error.to_string().contains("a second state of a 0"), "{error}");
}

#[test]
fn malformed_payloads_are_refused() {
    let mut crowded = table(&[(0, 1)]);
    crowded[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut none = table(&[(0, 1)]);
    none[0..4].copy_from_slice(&0u32.to_le_bytes());
    let mut two = table(&[(0, 1)]);
    two[0..4].copy_from_slice(&2u32.to_le_bytes());
    let mut zero_pages = table(&[(0, 1)]);
    zero_pages[16..20].copy_from_slice(&0u32.to_le_bytes());
    let mut reserved = table(&[(0, 1)]);
    reserved[20] = 1;
    let short = [table(&[(0, 2)]), vec![1; PAGE_BYTES]].concat();
    let payloads = [crowded, none, two, zero_pages, reserved, Vec::new(), vec![0; 7], short];
    for payload in payloads {
        for record_type in [RecordType::Pages, RecordType::Zero, RecordType::Absent] {
            problem(&Forger::new().record(record_type, &payload).end(0, 0, 13));
        }
    }
    for record_type in [RecordType::Layout, RecordType::Blob] {
        for payload in [&[][..], &[0xff; 7], &[0xff; 64]] {
            problem(&Forger::without_layout().record(record_type, payload).end(0, 0, 0));
        }
    }
}

#[test]
fn reserved_fields_of_runs_must_be_zero() {
    for at in [4, 20, 23] {
        let mut payload = table(&[(0, 6), (6, 3), (TOP, 4)]);
        restore(&Forger::new().record(RecordType::Absent, &payload).end(0, 0, 13)).unwrap();
        payload[at] = 1;
        let error = problem(&Forger::new().record(RecordType::Absent, &payload).end(0, 0, 13));
        assert!(matches!(error.problem, Problem::Reserved(_)), "{at}: {error}");
    }
}

#[test]
fn a_layout_that_cannot_be_is_refused() {
    // Varint encoding: 253 announces a number of eight bytes.
    let huge = [&[1u8, 0, 253][..], &u64::MAX.to_le_bytes()].concat();
    let unordered = [2, 8, 4, 0, 4];
    let many = [&[253u8][..], &u64::MAX.to_le_bytes()].concat();
    for payload in [&huge[..], &unordered, &many, &[0]] {
        problem(&Forger::with_layout(payload).end(0, 0, 0));
    }
}

#[test]
fn blobs_out_of_step_are_refused() {
    let chunk = |kind, total, offset, data: &[u8]| {
        let chunk = BlobChunk { kind, total, offset, data };
        [&chunk.head()[..], data].concat()
    };
    use BlobKind::{Initrd, Kernel};
    let sequences = [
        vec![chunk(Kernel, 4, 2, b"cd")],
        vec![chunk(Kernel, 4, 0, b"ab"), chunk(Kernel, 5, 2, b"cde")],
        vec![chunk(Kernel, 4, 0, b"ab"), chunk(Initrd, 4, 0, b"abcd")],
        vec![chunk(Kernel, 4, 0, b"ab"), chunk(Kernel, 4, 2, b"")],
        vec![chunk(Kernel, 2, 0, b"ab"), chunk(Kernel, 2, 0, b"ab")],
        vec![chunk(Kernel, 1, 0, b"ab")],
        vec![chunk(Kernel, u64::MAX, u64::MAX, b"ab")],
        vec![chunk(Kernel, (1 << 30) + 1, 0, b"ab")],
    ];
    for chunks in sequences {
        let mut forger = Forger::without_layout();
        for payload in &chunks {
            forger = forger.record(RecordType::Blob, payload);
        }
        let error = problem(&forger.end(0, 0, 0));
        assert!(matches!(error.problem, Problem::Malformed { .. }), "{chunks:?}: {error}");
    }
    let early = Forger::without_layout()
        .record(RecordType::Blob, &chunk(Kernel, 4, 0, b"ab"))
        .record(RecordType::Layout, &encode_layout(&layout(&REGIONS)).unwrap());
    assert!(matches!(problem(&early.end(0, 0, 0)).problem, Problem::Unexpected { .. }));
}
