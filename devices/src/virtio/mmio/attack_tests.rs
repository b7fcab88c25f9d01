//! A driver that breaks the rules: only its own device suffers, and it may begin again.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::register as reg;
use crate::virtio::ids::{features, interrupt_status};
use crate::virtio::test_utils::*;
use crate::BusDevice;

const GOOD: [(u64, u32, u16); 2] = [(DATA, 4, 0), (DATA + 0x1000, 8, WRITE)];

/// `attack` breaks the device: it is counted once, the guest is told, nothing is given back, and
/// after a reset a good request is served.
fn breaks(name: &str, attack: impl FnOnce(&mut Driver<Probe>)) {
    let mut driver = Driver::live(Probe::default(), 0);
    driver.request(0, &GOOD);
    driver.set(reg::INTERRUPT_ACK, 3);
    driver.line.take();

    attack(&mut driver);
    driver.run(0);
    assert!(driver.needs_reset(), "{name}");
    assert_eq!(driver.handle.metrics().needs_resets.get(), 1, "{name}");
    assert_eq!(driver.get(reg::INTERRUPT_STATUS), interrupt_status::CONFIG_CHANGE, "{name}");
    assert_eq!(driver.line.take(), 1, "{name}");
    assert!(driver.used(0).is_empty(), "{name}");

    // Until the reset it does nothing, good requests included, and tells nobody twice.
    driver.set(reg::STATUS, 15);
    driver.add(1, &GOOD);
    driver.run(1);
    assert!(driver.used(1).is_empty() && driver.needs_reset(), "{name}");
    assert_eq!(driver.line.take(), 0, "{name}");

    driver.negotiate(0);
    driver.set_up_queues();
    driver.set(reg::STATUS, 15);
    assert_eq!(driver.get(reg::STATUS), 15, "{name}");
    driver.put(DATA, b"good");
    assert_eq!(driver.request(0, &GOOD), 4, "{name}");
    assert_eq!(driver.peek(DATA + 0x1000, 4), b"good", "{name}");
}

/// A chain that breaks the device.
fn bad_chain(name: &str, buffers: &[(u64, u32, u16)]) {
    breaks(name, |driver| {
        driver.add(0, buffers);
    });
}

#[test]
fn loops() {
    let table = rings(0)[0];
    breaks("a descriptor that is its own successor", |driver| {
        driver.descriptor(table, 5, (DATA, 4, NEXT), 5);
        driver.publish(0, 5);
    });
    breaks("two that follow each other", |driver| {
        driver.descriptor(table, 5, (DATA, 0, NEXT), 6);
        driver.descriptor(table, 6, (DATA, 0, NEXT), 5);
        driver.publish(0, 5);
    });
    breaks("a loop in an indirect table", |driver| {
        driver.descriptor(DATA, 0, (DATA, 1, NEXT), 1);
        driver.descriptor(DATA, 1, (DATA, 1, NEXT), 0);
        driver.add(0, &[(DATA, 32, INDIRECT)]);
    });
}

#[test]
fn addresses_and_lengths() {
    bad_chain("beyond the end of memory", &[(MEMORY_SIZE, 1, 0)]);
    bad_chain("across the end of memory", &[(MEMORY_SIZE - 1, 2, WRITE)]);
    bad_chain("at the end of the address space", &[(u64::MAX, 1, 0)]);
    bad_chain("around the end of the address space", &[(u64::MAX - 3, 8, 0)]);
    bad_chain("all of the address space", &[(0, u32::MAX, WRITE)]);
    bad_chain("good, then bad", &[(DATA, 4, 0), (MEMORY_SIZE, 4, WRITE)]);
    let half = 0x8_0000;
    let many: Vec<_> = (0..15).map(|_| (0, half, 0)).chain([(0, u32::MAX, 0)]).collect();
    bad_chain("more than 4 GiB in all", &many);
}

#[test]
fn wrong_direction() {
    bad_chain("a buffer to read after one to write", &[(DATA, 8, WRITE), (DATA, 4, 0)]);
}

#[test]
fn descriptors_that_are_not_there() {
    breaks("a head beyond the table", |driver| driver.publish(0, 16));
    breaks("the last head there could be", |driver| driver.publish(0, u16::MAX));
    breaks("a successor beyond the table", |driver| {
        driver.descriptor(rings(0)[0], 5, (DATA, 4, NEXT), 16);
        driver.publish(0, 5);
    });
}

#[test]
fn indirect_tables() {
    bad_chain("an empty table", &[(DATA, 0, INDIRECT)]);
    bad_chain("a table of a descriptor and a half", &[(DATA, 24, INDIRECT)]);
    bad_chain("a table outside of memory", &[(MEMORY_SIZE, 16, INDIRECT)]);
    bad_chain("a table that leaves memory", &[(u64::MAX - 15, 32, INDIRECT)]);
    bad_chain("a table of 4 GiB", &[(DATA, 0xFFFF_FFF0, INDIRECT)]);
    breaks("a table in a table", |driver| {
        driver.descriptor(DATA, 0, (DATA + 0x100, 16, INDIRECT), 0);
        driver.descriptor(DATA + 0x100, 0, (DATA, 4, 0), 0);
        driver.add(0, &[(DATA, 16, INDIRECT)]);
    });
    breaks("a table in a table, after a good descriptor", |driver| {
        driver.descriptor(DATA, 0, (DATA, 4, NEXT), 1);
        driver.descriptor(DATA, 1, (DATA + 0x100, 16, INDIRECT), 0);
        driver.descriptor(DATA + 0x100, 0, (DATA, 4, 0), 0);
        driver.add(0, &[(DATA, 32, INDIRECT)]);
    });
    breaks("a successor beyond an indirect table", |driver| {
        driver.descriptor(DATA, 0, (DATA, 4, NEXT), 1);
        driver.add(0, &[(DATA, 16, INDIRECT)]);
    });
    breaks("more descriptors than a queue can have", |driver| {
        for n in 0..2000 {
            driver.descriptor(DATA, n, (0, 1, if n == 1999 { 0 } else { NEXT }), n + 1);
        }
        driver.add(0, &[(DATA, 2000 * 16, INDIRECT)]);
    });
}

#[test]
fn index_jumps() {
    for jump in [17_u16, 0x7FFF, 0x8000, 0xFFFF] {
        breaks("an available index that runs ahead", |driver| {
            // One chain was served; `jump` more are claimed.
            driver.put(rings(0)[1] + 2, &1_u16.wrapping_add(jump).to_le_bytes());
        });
    }
}

/// Sets queue 0 up in a bad way: it does not become ready.
fn bad_rings(name: &str, size: u32, rings: [u64; 3]) {
    let mut driver = Driver::idle(Probe::default());
    driver.negotiate(0);
    driver.place(size, rings);
    driver.set(reg::QUEUE_READY, 1);
    assert_eq!(driver.get(reg::QUEUE_READY), 0, "{name}");
    assert!(driver.needs_reset(), "{name}");
    assert_eq!(driver.handle.metrics().needs_resets.get(), 1, "{name}");
    assert_eq!(driver.line.take(), 0, "{name}: no driver to be told yet");
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set(reg::STATUS, 15);
    assert_eq!(driver.request(0, &GOOD), 4, "{name}");
}

#[test]
fn rings_where_they_cannot_be() {
    for size in [0, 3, 17, 32, 0x10000, 0x10010, u32::MAX] {
        bad_rings("size", size, rings(0));
    }
    let good = rings(0);
    for (part, align) in [(0, 16), (1, 2), (2, 4)] {
        for address in
            [good[part] + align / 2, MEMORY_SIZE, MEMORY_SIZE - align, u64::MAX - (align - 1)]
        {
            let mut bad = good;
            bad[part] = address;
            bad_rings("placement", 16, bad);
        }
        for other in (0..3).filter(|other| *other != part) {
            let mut bad = good;
            bad[part] = bad[other];
            bad_rings("overlap", 16, bad);
        }
    }
    bad_rings("overlap by the last bytes", 16, [0x1000, 0x10F0, 0x2000]);
}

#[test]
fn too_early_or_not_there() {
    let mut driver = Driver::idle(Probe::default());
    driver.set(reg::QUEUE_NOTIFY, 0);
    driver.run(0);
    driver.negotiate(0);
    driver.set_up_queues();
    driver.add(0, &GOOD);
    driver.set(reg::QUEUE_NOTIFY, 0);
    driver.run(0);
    assert!(driver.used(0).is_empty(), "not before DRIVER_OK");
    assert_eq!(driver.handle.metrics().early_notifications.get(), 4);
    assert_eq!(driver.kicks.take(0), 0);

    driver.set(reg::STATUS, 15);
    assert_eq!(driver.kicks.take(0), 1, "but then");
    for queue in [2, 3, 0x1_0000, u32::MAX] {
        driver.set(reg::QUEUE_NOTIFY, queue);
        driver.run(queue as usize);
    }
    assert_eq!(driver.handle.metrics().early_notifications.get(), 12);
    assert!(!driver.needs_reset());
}

#[test]
fn steps_out_of_order() {
    let mut driver = Driver::idle(Probe::default());
    for value in [2, 4, 8, 12, 5, 9, 13, 0x10, 0x21, u32::MAX] {
        driver.set(reg::STATUS, value);
        assert_eq!(driver.get(reg::STATUS), 0, "{value:#x}");
    }
    // Queues before features, features before a driver.
    driver.set(reg::DRIVER_FEATURES, 1);
    driver.place(16, rings(0));
    driver.set(reg::QUEUE_READY, 1);
    assert_eq!(driver.get(reg::QUEUE_READY), 0);
    driver.negotiate(0);
    // Bits do not go away one by one.
    driver.set(reg::STATUS, 3);
    assert_eq!(driver.get(reg::STATUS), 11);
    // A ready queue stays where it is.
    driver.set_up_queues();
    driver.set(reg::STATUS, 15);
    driver.set(reg::QUEUE_SEL, 0);
    driver.place(8, [0, 0, 0]);
    driver.set(reg::QUEUE_READY, 1);
    assert_eq!(driver.request(0, &GOOD), 4);
    // A driver that gave up is not served.
    driver.set(reg::STATUS, 0x8F);
    driver.add(0, &GOOD);
    driver.run(0);
    assert!(driver.used(0).is_empty());
    assert!(!driver.needs_reset());
}

#[test]
fn accesses_of_odd_sizes_and_places() {
    let mut driver = Driver::live(Probe::default(), 0);
    let before = driver.handle.metrics().bad_accesses.get();
    let mut count = 0;
    for size in [0_usize, 1, 2, 3, 5, 8] {
        for offset in [reg::STATUS, reg::MAGIC, reg::INTERRUPT_STATUS, 0xFE] {
            let mut data = vec![0xAA; size];
            driver.transport.read(offset, &mut data);
            assert_eq!(data, vec![0; size]);
            driver.transport.write(offset, &vec![0; size]);
            count += 2;
        }
    }
    for offset in [0x071, 0x0FE, 0x0F8, 0x018] {
        driver.set(offset, 0);
        assert_eq!(driver.get(offset), 0);
        count += 2;
    }
    for (offset, data) in [(0, &[1, 2][..]), (7, &[1; 8]), (8, &[0]), (0xEFC, &[0; 4]), (1, &[])] {
        driver.transport.write(0x100 + offset, data);
        count += 1;
    }
    assert_eq!(driver.handle.metrics().bad_accesses.get() - before, count);
    assert_eq!(driver.config::<8>(0), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(driver.get(reg::STATUS), 15);
    assert_eq!(driver.request(0, &GOOD), 4);
}

#[test]
fn other_devices_do_not_notice() {
    let mut good = Driver::live(Probe::default(), 0);
    let mut bad = Driver::over(good.memory.clone(), Probe::default());
    bad.negotiate(0);
    // In the same memory, but rings of its own would do: the bad one never gets that far.
    bad.place(16, [u64::MAX - 15; 3]);
    bad.set(reg::QUEUE_READY, 1);
    assert!(bad.needs_reset() && !good.needs_reset());
    assert_eq!(good.request(0, &GOOD), 4);
}

/// Addresses that are likely to matter.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![0..MEMORY_SIZE + 0x1000, Just(SEAM - 8), Just(u64::MAX - 7), any::<u64>()]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..64, (0u32..16).prop_map(|n| n * 16), any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn random_descriptors_break_at_most_their_device(
        table in proptest::collection::vec((address(), length(), 0u16..8, 0u16..18), 16),
        indirect in proptest::collection::vec((address(), length(), 0u16..8, 0u16..18), 16),
        heads in proptest::collection::vec(0u16..17, 0..20),
        jump in prop_oneof![9 => Just(0_u16), 1 => any::<u16>()],
        event_idx in any::<bool>(),
    ) {
        let without = if event_idx { 0 } else { features::RING_EVENT_IDX };
        let mut driver = Driver::live(Probe::default(), without);
        for (n, (descriptor, other)) in table.into_iter().zip(indirect).enumerate() {
            let (address, len, flags, next) = descriptor;
            // Half of all indirect tables are the one that is there.
            let own = flags & INDIRECT != 0 && next % 2 == 0;
            let (address, len) = if own { (DATA, len % 17 * 16) } else { (address, len) };
            driver.descriptor(rings(0)[0], n as u16, (address, len, flags), next);
            let (address, len, flags, next) = other;
            driver.descriptor(DATA, n as u16, (address, len, flags), next);
        }
        for head in &heads {
            driver.publish(0, *head);
        }
        if jump != 0 {
            driver.put(rings(0)[1] + 2, &jump.to_le_bytes());
        }
        driver.run(0);
        let broken = driver.needs_reset();
        prop_assert_eq!(driver.handle.metrics().needs_resets.get(), u64::from(broken));
        // A request may have written over the rings, which are memory as any other; what comes
        // after is a reset and a request that works.
        driver.negotiate(0);
        driver.set_up_queues();
        driver.set(reg::STATUS, 15);
        prop_assert_eq!(driver.request(0, &GOOD), 4);
    }

    #[test]
    fn random_accesses_break_nothing(
        accesses in proptest::collection::vec(
            (
                any::<bool>(),
                prop_oneof![
                    (0u64..0x44).prop_map(|n| n * 4),
                    0u64..super::SIZE,
                    Just(reg::STATUS),
                    Just(reg::QUEUE_READY),
                ],
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..9),
                    (0u32..16).prop_map(|n| n.to_le_bytes().to_vec()),
                ],
            ),
            0..100,
        ),
        live in any::<bool>(),
    ) {
        let mut driver = Driver::live(Probe::default(), 0);
        if !live {
            driver.set(reg::STATUS, 0);
        }
        for (is_write, offset, mut data) in accesses {
            if is_write {
                driver.transport.write(offset, &data);
            } else {
                driver.transport.read(offset, &mut data);
            }
            driver.run(0);
            driver.run(1);
        }
        driver.negotiate(0);
        driver.set_up_queues();
        driver.set(reg::STATUS, 15);
        prop_assert_eq!(driver.request(0, &GOOD), 4);
    }
}
