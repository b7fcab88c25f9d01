//! Requests, right and wrong.

#![allow(clippy::unwrap_used)]

use std::io;

use proptest::prelude::*;

use super::device::F_FLUSH;
use super::request::{TYPE_DISCARD, TYPE_FLUSH, TYPE_GET_ID, TYPE_IN, TYPE_OUT, TYPE_WRITE_ZEROES};
use super::test_utils::*;
use super::*;
use crate::virtio::attacks;
use crate::virtio::test_utils::*;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn driver() -> Driver<Block<RamDisk>> {
    Driver::live(block(RamDisk::new(256)), 0)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn the_guest_learns_what_disk_it_is() {
    let mut driver = driver();
    assert_eq!(u64::from_le_bytes(driver.config(0)), 256);
    assert_eq!(u32::from_le_bytes(driver.config(12)), 254, "buffers of a request");
    assert_eq!(u32::from_le_bytes(driver.config(20)), 512);
    assert_eq!(driver.config::<1>(56), [1]);
    let features = driver.offered() & 0x00FF_FFFF;
    assert_eq!(features, 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14);
    let read_only = RamDisk { read_only: true, ..RamDisk::new(1) };
    let mut driver = Driver::idle(block(read_only));
    assert_eq!(driver.offered() & 0x00FF_FFFF, 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6);
}

#[test]
fn reads_and_writes_reach_the_disk() {
    let mut driver = driver();
    driver.forget_dirty();
    let scattered = [(BUFFER, 1000, WRITE), (SEAM - 12, 24, WRITE)];
    assert_eq!(driver.block_request(TYPE_IN, 7, &scattered), (OK, 1025));
    assert_eq!(driver.peek(BUFFER, 1000), [vec![7; 512], vec![8; 488]].concat());
    assert_eq!(driver.peek(SEAM - 12, 25), [vec![8; 24], vec![0]].concat());
    assert!(driver.is_dirty(BUFFER) && driver.is_dirty(SEAM - 1) && driver.is_dirty(SEAM));

    driver.put(BUFFER, &[0xAB; 1024]);
    driver.forget_dirty();
    let scattered = [(BUFFER, 500, 0), (BUFFER + 500, 524, 0)];
    assert_eq!(driver.block_request(TYPE_OUT, 254, &scattered), (OK, 1));
    assert!(!driver.is_dirty(BUFFER), "nothing was written there");
    driver.handle.with_device(|block| {
        assert_eq!(block.backend.bytes[254 * 512..], [0xAB; 1024]);
        assert_eq!(block.backend.bytes[254 * 512 - 1], 253);
        let metrics = block.metrics();
        assert_eq!((metrics.reads.get(), metrics.bytes_read.get()), (1, 1024));
        assert_eq!((metrics.writes.get(), metrics.bytes_written.get()), (1, 1024));
    });
    assert_eq!(driver.calls(), ["read 3584+1024", "write 130048+1024"]);
}

#[test]
fn a_file_is_a_disk() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut disk = DiskFile::open(file.path(), false).unwrap();
    disk.take_owner().unwrap();
    let mut driver = Driver::live(Block::new(disk, "", Cache::Writeback), 0);
    driver.put(BUFFER, &[0xCD; 1024]);
    assert_eq!(driver.block_request(TYPE_OUT, 3, &[(BUFFER, 1024, 0)]), (OK, 1));
    assert_eq!(driver.block_request(TYPE_FLUSH, 0, &[]), (OK, 1));
    assert_eq!(std::fs::read(file.path()).unwrap()[1536..2560], [0xCD; 1024]);
    driver.forget_dirty();
    assert_eq!(driver.block_request(TYPE_IN, 2, &[(SEAM - 512, 1024, WRITE)]), (OK, 1025));
    assert_eq!(driver.peek(SEAM - 1, 2), [0, 0xCD]);
    assert!(driver.is_dirty(SEAM - 512) && driver.is_dirty(SEAM + 511));
    // Somebody cut the file short behind our back.
    file.as_file().set_len(512).unwrap();
    assert_eq!(driver.block_request(TYPE_IN, 2, &[(BUFFER, 512, WRITE)]), (IO_ERROR, 0));
    assert!(!driver.needs_reset());
}

#[test]
fn a_file_that_the_host_lets_nobody_write_is_an_error_for_the_guest_only() {
    use rustix::fs::{fcntl_add_seals, memfd_create, MemfdFlags, SealFlags};
    use std::os::fd::AsRawFd;

    let file = memfd_create("disk", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut disk = DiskFile::open(path.as_ref(), false).unwrap();
    disk.take_owner().unwrap();
    let mut driver = Driver::live(Block::new(disk, "", Cache::Writeback), 0);
    for kind in [TYPE_OUT, TYPE_DISCARD, TYPE_WRITE_ZEROES] {
        driver.put(BUFFER, &range(0, 1, 0));
        let len = if kind == TYPE_OUT { 512 } else { 16 };
        assert_eq!(driver.block_request(kind, 0, &[(BUFFER, len, 0)]), (IO_ERROR, 1), "{kind}");
    }
    assert_eq!(driver.block_request(TYPE_IN, 0, &[(BUFFER, 512, WRITE)]), (OK, 513));
    assert!(!driver.needs_reset());
}

#[test]
fn the_id_is_told() {
    let mut driver = driver();
    driver.put(BUFFER, &[UNTOUCHED; 32]);
    assert_eq!(driver.block_request(TYPE_GET_ID, 0, &[(BUFFER, 20, WRITE)]), (OK, 21));
    assert_eq!(driver.peek(BUFFER, 21), [&b"disk-0"[..], &[0; 14], &[UNTOUCHED]].concat());
    // A buffer of another length gets what fits.
    assert_eq!(driver.block_request(TYPE_GET_ID, 0, &[(BUFFER, 4, WRITE)]), (OK, 5));
    assert_eq!(driver.block_request(TYPE_GET_ID, 0, &[(BUFFER, 32, WRITE)]), (OK, 20));
}

#[test]
fn writes_are_stable_when_they_must_be() {
    let write = |driver: &mut Driver<_>| {
        assert_eq!(driver.block_request(TYPE_OUT, 0, &[(BUFFER, 512, 0)]).0, OK);
        assert_eq!(driver.block_request(TYPE_FLUSH, 0, &[]).0, OK);
        driver.calls()
    };
    let disk = |cache| Block::new(RamDisk::new(8), "", cache);
    assert_eq!(write(&mut Driver::live(disk(Cache::Writeback), 0)), ["write 0+512", "flush"]);
    let through = ["write 0+512", "flush", "flush"];
    assert_eq!(write(&mut Driver::live(disk(Cache::Writethrough), 0)), through);
    assert_eq!(Driver::idle(disk(Cache::Writethrough)).offered() & F_FLUSH, 0);
    // A driver that cannot flush.
    assert_eq!(write(&mut Driver::live(disk(Cache::Writeback), F_FLUSH)), through);
    assert_eq!(write(&mut Driver::live(disk(Cache::Unsafe), 0)), ["write 0+512"]);
    // And after a move.
    let here = Driver::live(disk(Cache::Writeback), F_FLUSH);
    assert_eq!(write(&mut here.moved(disk(Cache::Writeback))), through);
}

#[test]
fn ranges_are_cleared() {
    let mut driver = driver();
    driver.put(BUFFER, &[range(8, 16, 0), range(0, 0, 0), range(255, 1, 0)].concat());
    assert_eq!(driver.block_request(TYPE_DISCARD, 0, &[(BUFFER, 48, 0)]), (OK, 1));
    assert_eq!(driver.calls(), ["discard 4096+8192", "discard 130560+512"]);
    for flags in [0, 1] {
        driver.put(BUFFER, &range(1, 2, flags));
        assert_eq!(driver.block_request(TYPE_WRITE_ZEROES, 0, &[(BUFFER, 16, 0)]), (OK, 1));
    }
    assert_eq!(driver.calls(), ["zero 512+1024 false", "zero 512+1024 true"]);
}

#[test]
fn bad_ranges_clear_nothing() {
    let mut driver = driver();
    let mut check = |kind, bytes: Vec<u8>, status| {
        driver.put(BUFFER, &bytes);
        let answer = driver.block_request(kind, 0, &[(BUFFER, bytes.len() as u32, 0)]);
        assert_eq!(answer, (status, 1), "{bytes:?}");
        assert!(driver.calls().is_empty());
    };
    let good = range(0, 1, 0);
    check(TYPE_DISCARD, [good.clone(), range(255, 2, 0)].concat(), IO_ERROR);
    check(TYPE_DISCARD, range(u64::MAX, 1, 0), IO_ERROR);
    check(TYPE_DISCARD, range(u64::MAX / 512 + 1, 1, 0), IO_ERROR);
    check(TYPE_DISCARD, range(0, u32::MAX, 0), IO_ERROR);
    check(TYPE_DISCARD, [good.clone(), vec![0]].concat(), IO_ERROR);
    check(TYPE_DISCARD, good[..15].to_vec(), IO_ERROR);
    check(TYPE_DISCARD, vec![], IO_ERROR);
    check(TYPE_DISCARD, good.repeat(17), IO_ERROR);
    check(TYPE_DISCARD, range(0, 1, 1), UNSUPPORTED);
    check(TYPE_WRITE_ZEROES, range(0, 1, 2), UNSUPPORTED);
    check(TYPE_WRITE_ZEROES, good.repeat(2), IO_ERROR);
}

#[test]
fn bad_requests_are_answered() {
    let mut driver = driver();
    for (kind, sector, len, status) in [
        (TYPE_IN, 256, 512, IO_ERROR),
        (TYPE_IN, 255, 1024, IO_ERROR),
        (TYPE_IN, u64::MAX, 512, IO_ERROR),
        (TYPE_IN, u64::MAX / 512 + 1, 512, IO_ERROR),
        (TYPE_IN, 0, 511, IO_ERROR),
        (TYPE_IN, 0, 513, IO_ERROR),
        (2, 0, 512, UNSUPPORTED),
        (14, 0, 512, UNSUPPORTED),
        (u32::MAX, 0, 512, UNSUPPORTED),
    ] {
        let answer = driver.block_request(kind, sector, &[(BUFFER, len, WRITE)]);
        assert_eq!(answer, (status, 0), "{kind} {sector} {len}");
    }
    assert_eq!(driver.block_request(TYPE_OUT, 256, &[(BUFFER, 512, 0)]), (IO_ERROR, 1));
    assert!(driver.calls().is_empty(), "the disk saw none of them");
    assert!(!driver.needs_reset());
    driver.handle.with_device(|block| {
        assert_eq!((block.metrics().errors.get(), block.metrics().unsupported.get()), (7, 3));
    });
}

#[test]
fn too_much_data_is_refused_although_it_fits_the_disk() {
    // 255 times the same 512 KiB: the buffers of a request may overlap, a disk may be large.
    let mut driver = Driver::live(block(RamDisk::new(300_000)), 0);
    driver.header(TYPE_IN, 0);
    let mut table = vec![(HEADER_AT, 16, 0)];
    table.extend([(SEAM, 0x8_0000, WRITE); 130]);
    table.push((STATUS_AT, 1, WRITE));
    assert_eq!(driver.request(0, &table), 0);
    assert_eq!(driver.peek(STATUS_AT, 1), [IO_ERROR]);
    assert!(driver.calls().is_empty());
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = RamDisk { read_only: true, ..RamDisk::new(8) };
    let mut driver = Driver::live(block(disk), 0);
    driver.put(BUFFER, &range(0, 1, 0));
    assert_eq!(driver.block_request(TYPE_OUT, 0, &[(BUFFER, 512, 0)]).0, IO_ERROR);
    assert_eq!(driver.block_request(TYPE_DISCARD, 0, &[(BUFFER, 16, 0)]).0, IO_ERROR);
    assert_eq!(driver.block_request(TYPE_WRITE_ZEROES, 0, &[(BUFFER, 16, 0)]).0, IO_ERROR);
    assert!(driver.calls().is_empty());
    assert_eq!(driver.block_request(TYPE_IN, 0, &[(BUFFER, 512, WRITE)]), (OK, 513));
}

#[test]
fn a_full_or_broken_disk_is_an_error_for_the_guest_only() {
    let mut driver = driver();
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        driver.handle.with_device(|block| block.backend.broken = Some(kind));
        driver.put(BUFFER, &range(0, 1, 0));
        assert_eq!(driver.block_request(TYPE_OUT, 0, &[(BUFFER, 512, 0)]), (IO_ERROR, 1));
        assert_eq!(driver.block_request(TYPE_IN, 0, &[(BUFFER, 512, WRITE)]), (IO_ERROR, 0));
        assert_eq!(driver.block_request(TYPE_FLUSH, 0, &[]), (IO_ERROR, 1));
        assert_eq!(driver.block_request(TYPE_DISCARD, 0, &[(BUFFER, 16, 0)]), (IO_ERROR, 1));
    }
    driver.handle.with_device(|block| block.backend.broken = None);
    assert_eq!(driver.block_request(TYPE_OUT, 0, &[(BUFFER, 512, 0)]), (OK, 1));
    assert!(!driver.needs_reset());
}

#[test]
fn the_layout_of_buffers_is_the_drivers_choice() {
    // Header in two pieces, with the data; status with the data (section 2.7.4: no assumptions).
    let mut driver = driver();
    driver.header(TYPE_IN, 5);
    let chain = [(HEADER_AT, 3, 0), (HEADER_AT + 3, 13, 0), (BUFFER, 513, WRITE)];
    assert_eq!(driver.request(0, &chain), 513);
    assert_eq!(driver.peek(BUFFER, 513), [vec![5; 512], vec![OK]].concat());

    driver.header(TYPE_OUT, 6);
    driver.put(HEADER_AT + 16, &[0x77; 512]);
    assert_eq!(driver.request(0, &[(HEADER_AT, 528, 0), (STATUS_AT, 1, WRITE)]), 1);
    driver.handle.with_device(|block| assert_eq!(block.backend.bytes[6 * 512], 0x77));
}

#[test]
fn requests_without_header_or_status_break_the_device() {
    for chain in [
        &[(HEADER_AT, 15, 0), (STATUS_AT, 1, WRITE)][..],
        &[(STATUS_AT, 1, WRITE)],
        &[(HEADER_AT, 16, 0)],
        &[(HEADER_AT, 16, 0), (STATUS_AT, 0, WRITE)],
    ] {
        let mut driver = driver();
        driver.header(TYPE_FLUSH, 0);
        driver.add(0, chain);
        driver.run(0);
        assert!(driver.needs_reset(), "{chain:?}");
        assert!(driver.used(0).is_empty());
    }
}

#[test]
fn attacks_on_its_queue_break_only_the_disk() {
    attacks::survived(
        || block(RamDisk::new(256)),
        0,
        |driver| driver.run(0),
        |driver| {
            assert_eq!(driver.block_request(TYPE_IN, 7, &[(BUFFER, 512, WRITE)]), (OK, 513));
        },
    );
}

proptest! {
    #[test]
    fn random_requests_are_answered_or_break_the_device(
        requests in proptest::collection::vec(
            (
                prop_oneof![0u32..16, any::<u32>()],
                prop_oneof![0u64..300, any::<u64>()],
                proptest::collection::vec(
                    (
                        (0u64..32).prop_map(|n| BUFFER + n * 256),
                        prop_oneof![0u32..40, (0u32..8).prop_map(|n| n * 512)],
                        prop_oneof![Just(0), Just(WRITE)],
                    ),
                    0..5,
                ),
                any::<[u8; 16]>(),
            ),
            0..20,
        ),
    ) {
        let mut driver = driver();
        let mut answered = 0;
        for (kind, sector, data, range) in requests {
            driver.header(kind, sector);
            driver.put(BUFFER, &range);
            let mut chain = vec![(HEADER_AT, 16, 0)];
            chain.extend(data);
            chain.push((STATUS_AT, 1, WRITE));
            let room: u32 =
                chain.iter().filter(|buffer| buffer.2 == WRITE).map(|buffer| buffer.1).sum();
            driver.add(0, &chain);
            driver.run(0);
            for (_, written) in driver.used(0) {
                prop_assert!(written <= room);
                prop_assert!(driver.peek(STATUS_AT, 1)[0] <= UNSUPPORTED);
                answered += 1;
            }
        }
        let device = driver.handle.with_device(|block| block.metrics());
        let counted = device.reads.get() + device.writes.get() + device.flushes.get()
            + device.clears.get() + device.errors.get() + device.unsupported.get();
        prop_assert!(counted <= answered);
    }
}
