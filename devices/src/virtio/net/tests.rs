//! Frames both ways, and what becomes of those that do not fit.

#![allow(clippy::unwrap_used)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::device::{F_GUEST_ANNOUNCE, F_MRG_RXBUF};
use super::test_utils::*;
use super::*;
use crate::virtio::attacks;
use crate::virtio::test_utils::*;

fn driver() -> Driver<Net<Wire>> {
    Driver::live(net(Wire::default()), 0)
}

#[test]
fn the_guest_learns_what_card_it_is() {
    let mut driver = driver();
    let config = [&MAC[..], &[1, 0], &[1, 0], &1500_u16.to_le_bytes()].concat();
    assert_eq!(driver.config::<12>(0), config[..]);
    let with_offloads = driver.offered();
    let plain = Wire { plain: true, ..Wire::default() };
    let without = Driver::idle(net(plain)).offered();
    assert_eq!(with_offloads & !without, 0b11_1011_1000_0011);
    assert_eq!(MacAddress(MAC).to_string(), "52:54:00:12:34:56");
}

#[test]
fn the_backend_learns_what_the_guest_takes() {
    let offloads = |without| {
        let driver = Driver::live(net(Wire::default()), without);
        driver.handle.with_device(|net| net.backend_mut().offloads.unwrap())
    };
    let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
    assert_eq!(offloads(0), all);
    assert_eq!(offloads(1 << 8), Offloads { tso6: false, ..all });
    assert_eq!(offloads(1 << 1), Offloads::default(), "nothing without checksums");
}

#[test]
fn frames_go_out() {
    let mut driver = driver();
    driver.put(DATA, &[1; HEADER]);
    driver.put(DATA + 0x1000, &[2; 60]);
    assert_eq!(driver.request(TRANSMIT, &[(DATA, 12, 0), (DATA + 0x1000, 60, 0)]), 0);
    driver.handle.with_device(|net| {
        assert_eq!(net.backend_mut().sent, [[vec![1; 12], vec![2; 60]].concat()]);
        assert_eq!((net.metrics().tx_frames.get(), net.metrics().tx_bytes.get()), (1, 60));
        net.backend_mut().broken = true;
    });
    assert_eq!(driver.request(TRANSMIT, &[(DATA, 72, 0)]), 0);
    driver.handle.with_device(|net| {
        net.backend_mut().broken = false;
        assert!(net.set_link(false));
    });
    assert_eq!(driver.request(TRANSMIT, &[(DATA, 72, 0)]), 0);
    assert_eq!(driver.handle.with_device(|net| net.metrics().tx_dropped.get()), 2);
    assert!(!driver.needs_reset());
}

#[test]
fn a_buffer_in_more_pieces_than_one_call_takes_breaks_the_card() {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let backend = FdBackend::new(OwnedFd::from(near), Some(|_: &OwnedFd, _| Ok(())));
    let config = NetConfig { mac: MacAddress(MAC), mtu: None };
    let mut driver = Driver::live(Net::new(backend, config), 0);
    let give = |driver: &mut Driver<Net<FdBackend<_>>>, pieces: u16| {
        let table = DATA + 0x2000;
        for n in 0..pieces {
            let flags = if n + 1 == pieces { WRITE } else { WRITE | NEXT };
            driver.descriptor(table, n, (DATA + 8 * u64::from(n), 8, flags), n + 1);
        }
        far.send(&[1; 72]).unwrap();
        driver.add(RECEIVE, &[(table, 16 * u32::from(pieces), INDIRECT)]);
        driver.run(RECEIVE);
    };
    give(&mut driver, 1023);
    assert_eq!(driver.used(RECEIVE).len(), 1);
    // The frame cannot be read with it, and would be tried again for ever.
    give(&mut driver, 1024);
    assert!(driver.needs_reset());
}

#[test]
fn frames_come_in_and_are_marked() {
    let mut driver = driver();
    let head = driver.add(RECEIVE, &[(DATA, 12, WRITE), (SEAM - 4, 2000, WRITE)]);
    driver.forget_dirty();
    driver.arrives(&[9; 100]);
    assert_eq!(driver.used(RECEIVE), [(head, 112)]);
    assert_eq!(driver.peek(DATA, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "one buffer");
    assert_eq!(driver.peek(SEAM - 4, 101), [vec![9; 100], vec![0]].concat());
    assert!(driver.is_dirty(DATA) && driver.is_dirty(SEAM - 1) && driver.is_dirty(SEAM));
    assert_eq!(driver.line.take(), 1);
}

#[test]
fn a_long_frame_takes_several_buffers_at_once() {
    let mut driver = driver();
    let heads: Vec<u16> =
        (0..4).map(|n| driver.add(RECEIVE, &[(DATA + n * 0x1000, 0x100, WRITE)])).collect();
    let frame: Vec<u8> = (0..700).map(|n| n as u8).collect();
    driver.arrives(&frame);
    assert_eq!(driver.used(RECEIVE), [(heads[0], 256), (heads[1], 256), (heads[2], 200)]);
    assert_eq!(driver.peek(DATA + 10, 2), [3, 0]);
    let got = [
        driver.peek(DATA + 12, 244),
        driver.peek(DATA + 0x1000, 256),
        driver.peek(DATA + 0x2000, 200),
    ];
    assert_eq!(got.concat(), frame);
    // The fourth is still there.
    driver.arrives(&[1; 8]);
    assert_eq!(driver.used(RECEIVE), [(heads[3], 20)]);
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_its_buffers_stay() {
    for without in [0, F_MRG_RXBUF] {
        let mut driver = Driver::live(net(Wire::default()), without);
        let first = driver.add(RECEIVE, &[(DATA, 0x100, WRITE)]);
        let second = driver.add(RECEIVE, &[(DATA + 0x1000, 0x100, WRITE)]);
        driver.arrives(&[1; 600]);
        assert!(driver.used(RECEIVE).is_empty());
        driver.arrives(&[2; 50]);
        driver.arrives(&[3; 50]);
        assert_eq!(driver.used(RECEIVE), [(first, 62), (second, 62)]);
        assert_eq!(driver.handle.with_device(|net| net.metrics().rx_dropped.get()), 1);
    }
}

#[test]
fn frames_wait_for_buffers() {
    let mut driver = driver();
    assert!(driver.handle.with_device(|net| net.wants_frames()));
    driver.arrives(&[1; 50]);
    assert_eq!(driver.waiting(), 1, "not read, since there is no place for it");
    assert!(!driver.handle.with_device(|net| net.wants_frames()));
    let head = driver.add(RECEIVE, &[(DATA, 2000, WRITE)]);
    driver.run(RECEIVE);
    assert_eq!(driver.used(RECEIVE), [(head, 62)]);
    assert_eq!(driver.waiting(), 0);
    let head = driver.add(RECEIVE, &[(DATA, 2000, WRITE)]);
    driver.run(RECEIVE);
    assert!(driver.handle.with_device(|net| net.wants_frames()));
    assert!(driver.used(RECEIVE).is_empty(), "a buffer without a frame is kept");
    driver.arrives(&[1; 50]);
    assert_eq!(driver.used(RECEIVE), [(head, 62)]);
}

#[test]
fn a_broken_backend_and_a_runt_harm_nobody() {
    let mut driver = driver();
    let head = driver.add(RECEIVE, &[(DATA, 2000, WRITE)]);
    driver.handle.with_device(|net| net.backend_mut().broken = true);
    driver.look();
    driver.handle.with_device(|net| {
        assert_eq!(net.metrics().backend_errors.get(), 1);
        net.backend_mut().broken = false;
        net.backend_mut().arriving.push_back(vec![0; HEADER - 1]);
    });
    driver.look();
    assert_eq!(driver.handle.with_device(|net| net.metrics().rx_dropped.get()), 1);
    driver.arrives(&[1; 50]);
    assert_eq!(driver.used(RECEIVE), [(head, 62)]);
    assert!(!driver.needs_reset());
}

#[test]
fn an_unplugged_cable_carries_nothing() {
    let mut driver = driver();
    driver.line.take();
    driver.add(RECEIVE, &[(DATA, 2000, WRITE)]);
    driver.handle.change_config(|net| net.set_link(false));
    assert_eq!((driver.line.take(), driver.config::<1>(6)), (1, [0]));
    driver.arrives(&[1; 50]);
    assert!(driver.used(RECEIVE).is_empty());
    driver.handle.change_config(|net| net.set_link(false));
    assert_eq!(driver.line.take(), 0);
}

#[test]
fn the_guest_announces_itself_when_it_is_asked_to() {
    let mut driver = driver();
    driver.line.take();
    driver.handle.change_config(|net| net.announce());
    assert_eq!((driver.line.take(), driver.config::<1>(6)), (1, [3]));
    driver.put(DATA, &[3, 0]);
    assert_eq!(driver.request(CONTROL, &[(DATA, 2, 0), (DATA + 2, 1, WRITE)]), 1);
    assert_eq!((driver.peek(DATA + 2, 1), driver.config::<1>(6)), (vec![0], [1]));
    assert_eq!(driver.handle.with_device(|net| net.metrics().announcements.get()), 1);

    let mut unable = Driver::live(net(Wire::default()), F_GUEST_ANNOUNCE);
    assert!(!unable.handle.with_device(|net| net.announce()));
    assert_eq!(unable.config::<1>(6), [1]);
}

#[test]
fn unknown_commands_are_refused_and_broken_ones_break_the_device() {
    let mut driver = driver();
    for command in [[0, 0], [3, 1], [4, 0], [255, 255]] {
        driver.put(DATA, &command);
        driver.put(DATA + 2, &[0xEE]);
        assert_eq!(driver.request(CONTROL, &[(DATA, 2, 0), (DATA + 2, 1, WRITE)]), 1);
        assert_eq!(driver.peek(DATA + 2, 1), [1], "{command:?}");
    }
    for chain in [&[(DATA, 1, 0), (DATA + 2, 1, WRITE)][..], &[(DATA, 2, 0)]] {
        let mut driver = super::tests::driver();
        driver.add(CONTROL, chain);
        driver.run(CONTROL);
        assert!(driver.needs_reset(), "{chain:?}");
    }
}

#[test]
fn bad_buffers_break_the_device() {
    for chain in [&[(DATA, 11, WRITE)][..], &[(DATA, 8, 0), (DATA, 2000, WRITE)], &[(DATA, 99, 0)]]
    {
        let mut driver = driver();
        driver.add(RECEIVE, chain);
        driver.arrives(&[1; 50]);
        assert!(driver.needs_reset(), "{chain:?}");
    }
    for chain in [&[(DATA, 11, 0)][..], &[(0, 65_563, 0)], &[(DATA, 72, 0), (DATA, 1, WRITE)]] {
        let mut driver = driver();
        driver.add(TRANSMIT, chain);
        driver.run(TRANSMIT);
        assert!(driver.needs_reset(), "{chain:?}");
    }
}

#[test]
fn a_descriptor_is_a_backend() {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let backend = FdBackend::new(OwnedFd::from(near), Some(|_: &OwnedFd, _| Ok(())));
    let config = NetConfig { mac: MacAddress(MAC), mtu: None };
    let mut driver = Driver::live(Net::new(backend, config), 0);
    driver.put(DATA, &[5; 72]);
    assert_eq!(driver.request(TRANSMIT, &[(DATA, 20, 0), (DATA + 20, 52, 0)]), 0);
    let mut frame = [0; 100];
    assert_eq!(far.recv(&mut frame).unwrap(), 72);

    let heads = [0, 1].map(|n| driver.add(RECEIVE, &[(DATA + n * 0x1000, 256, WRITE)]));
    far.send(&[6; 300]).unwrap();
    driver.handle.with_queues(|net, context| net.receive(context)).unwrap();
    assert_eq!(driver.used(RECEIVE), [(heads[0], 256), (heads[1], 44)]);
    assert_eq!(driver.peek(DATA + 0x1000, 45), [vec![6; 44], vec![0]].concat());
    drop(far);
    assert_eq!(driver.request(TRANSMIT, &[(DATA, 72, 0)]), 0);
    assert_eq!(driver.handle.with_device(|net| net.metrics().tx_dropped.get()), 1);
}

#[test]
fn attacks_on_its_queues_break_only_the_card() {
    let make = || net(Wire::default());
    attacks::survived(
        make,
        RECEIVE,
        |driver| {
            driver.handle.with_device(|net| net.backend_mut().arriving = [vec![1; 72]].into());
            driver.run(RECEIVE);
        },
        |driver| {
            driver.handle.with_device(|net| net.backend_mut().arriving.clear());
            let head = driver.add(RECEIVE, &[(DATA, 256, WRITE)]);
            driver.arrives(&[5; 60]);
            assert_eq!(driver.used(RECEIVE), [(head, 72)]);
        },
    );
    attacks::survived(
        make,
        TRANSMIT,
        |driver| driver.run(TRANSMIT),
        |driver| assert_eq!(driver.request(TRANSMIT, &[(DATA, 72, 0)]), 0),
    );
    attacks::survived(
        make,
        2,
        |driver| driver.run(2),
        |driver| {
            driver.put(DATA, &[3, 0]);
            assert_eq!(driver.request(2, &[(DATA, 2, 0), (DATA + 8, 1, WRITE)]), 1);
        },
    );
}

proptest! {
    #[test]
    fn whatever_arrives_is_given_whole_or_not_at_all(
        buffers in proptest::collection::vec(12u32..600, 0..30),
        frames in proptest::collection::vec(0usize..1500, 0..30),
    ) {
        let mut driver = driver();
        for (n, len) in buffers.iter().enumerate() {
            driver.add(RECEIVE, &[(DATA + n as u64 * 0x400, *len, WRITE)]);
        }
        for (n, len) in frames.iter().enumerate() {
            driver.arrives(&vec![n as u8; *len]);
        }
        let used = driver.used(RECEIVE);
        prop_assert!(used.len() <= buffers.len());
        let mut rest = used.as_slice();
        while let Some((head, _)) = rest.first() {
            let at = DATA + u64::from(*head) * 0x400;
            let count = usize::from(u16::from_le_bytes(driver.peek(at + 10, 2).try_into().unwrap()));
            prop_assert!(count >= 1 && count <= rest.len());
            let total: u32 = rest[..count].iter().map(|(_, len)| len).sum();
            prop_assert!(frames.contains(&(total as usize - HEADER)));
            rest = &rest[count..];
        }
        prop_assert!(!driver.needs_reset());
    }
}
