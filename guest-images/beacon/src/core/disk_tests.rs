//! The disk load against a disk that is an array.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use super::*;
use crate::devices::DeviceOptions;

struct Buffer(RefCell<Vec<u8>>);

impl Words for Buffer {
    fn load(&self, address: u64) -> u64 {
        let at = address as usize;
        u64::from_le_bytes(self.0.borrow()[at..at + 8].try_into().unwrap())
    }
    fn store(&self, address: u64, value: u64) {
        self.0.borrow_mut()[address as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }
}

fn buffer() -> Buffer {
    Buffer(RefCell::new(vec![0; 4096]))
}

const TAG: Tag = Tag { boot: 77, generation: 5 };

#[test]
fn wrong_sectors_are_told_apart_and_named() {
    let memory = buffer();
    let wrong = |tag| check(&memory, 0, 4096, 80, tag).unwrap_err();
    assert_eq!(check(&memory, 0, 4096, 80, None), Ok(()));
    assert_eq!(wrong(Some(TAG)).kind, Kind::Zero);
    stamp(&memory, 0, 4096, 80, TAG);
    assert_eq!(check(&memory, 0, 4096, 80, Some(TAG)), Ok(()));
    assert_eq!(wrong(None).kind, Kind::Stale, "it should be zeros");
    assert_eq!(wrong(Some(Tag { generation: 6, ..TAG })).kind, Kind::Stale);
    assert_eq!(wrong(Some(Tag { generation: 4, ..TAG })).kind, Kind::Newer);
    assert_eq!(wrong(Some(Tag { boot: 78, ..TAG })).kind, Kind::OtherBoot);
    // One sector of another block, in the middle.
    stamp(&memory, 3 * SECTOR, SECTOR, 11, TAG);
    let found = wrong(Some(TAG));
    assert_eq!((found.sector, found.kind, found.found_sector), (83, Kind::OtherSector, 11));
    stamp(&memory, 0, 4096, 80, TAG);
    for offset in OFFSETS {
        let at = 7 * SECTOR + offset;
        memory.store(at, memory.load(at) ^ 1);
        assert_eq!((wrong(Some(TAG)).sector, wrong(Some(TAG)).kind), (87, Kind::Torn));
        memory.store(at, memory.load(at) ^ 1);
    }
    blot(&memory, 0, 4096);
    assert_eq!(wrong(Some(TAG)).kind, Kind::Torn);
}

fn load(options: &str, able: Abilities, blocks: u64) -> Load {
    let options =
        DeviceOptions::default().disk.with(format!("disk=verify {options}").as_bytes()).unwrap();
    Load::new(options, able, blocks * options.block / SECTOR, 77, vec![9; 4096].leak())
}

const ALL: Abilities = Abilities { write: true, discard: true, zero: true };

#[test]
fn every_read_finds_the_last_write_and_no_two_requests_meet() {
    let mut load = load("disk-depth=8 disk-discard=on", ALL, 100);
    let mut disk = vec![Content::Unknown; 100];
    let mut seen = [0; 4];
    for round in 0..100_000 {
        while let Some(slot) = load.free_slot() {
            let Some(job) = load.pick() else { break };
            let block = job.block().unwrap();
            assert!(!load.in_use(block), "{job:?}");
            load.start(slot, job);
        }
        let slot = round % 8;
        let Some(job) = load.job(slot) else { continue };
        let block = job.block().unwrap();
        let place = &mut disk[block as usize];
        match job {
            Job::Read { .. } => {
                seen[0] += 1;
                assert_ne!(load.content(block), Content::Unknown);
                assert_eq!(load.content(block), *place);
            }
            Job::Write { generation, .. } => {
                seen[1] += 1;
                *place = Content::Stamped(load.tag(generation));
            }
            Job::Discard { .. } => {
                seen[2] += 1;
                *place = Content::Unknown;
            }
            Job::Zero { .. } => {
                seen[3] += 1;
                *place = Content::Zeros;
            }
            Job::Flush => unreachable!(),
        }
        load.finish(slot, true);
    }
    assert!(load.is_populated());
    assert!(seen.iter().all(|&count| count > 100), "{seen:?}");
}

#[test]
fn a_write_that_fails_makes_the_block_unknown() {
    let mut load = load("disk-depth=1 disk-op=read", ALL, 1);
    for good in [false, true] {
        let job = load.pick().unwrap();
        assert!(matches!(job, Job::Write { block: 0, .. }), "{job:?}");
        load.start(0, job);
        assert_eq!(load.pick(), None, "in use");
        load.finish(0, good);
    }
    assert_eq!(load.pick(), Some(Job::Read { block: 0 }));
    assert!(load.spoil(0) && !load.spoil(1));
    load.distrust(0);
    // Generations go on growing, or an old block would be taken for the new one.
    assert_eq!(load.pick(), Some(Job::Write { block: 0, generation: 4 }));
    load.start(0, Job::Write { block: 0, generation: 9 });
    load.abandon();
    assert_eq!((load.in_flight(), load.content(0)), (0, Content::Unknown));
}

#[test]
fn a_read_only_disk_is_only_read() {
    let mut load = load("disk-op=write disk-discard=on", Abilities::default(), 10);
    for _ in 0..1000 {
        assert!(matches!(load.pick(), Some(Job::Read { .. })));
    }
}

#[test]
fn the_area_is_bounded_by_disk_options_and_table() {
    assert_eq!(load("disk-ws=1", ALL, 100_000).blocks(), 256);
    assert_eq!(load("disk-ws=64", ALL, 10).blocks(), 10);
    assert_eq!(load("disk-ws=64", ALL, 100_000).blocks(), 4096, "the table");
    let mut empty = load("", ALL, 0);
    assert_eq!(empty.pick(), None);
    let mut changed = load("", ALL, 100);
    changed.change(empty.options.with(b"disk-bs=8192").unwrap(), 800);
    assert_eq!((changed.blocks(), changed.content(0)), (50, Content::Unknown));
}
