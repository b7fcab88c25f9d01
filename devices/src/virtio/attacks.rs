//! What every queue of every device has to survive: run by the tests of each device.

#![allow(clippy::unwrap_used)]

use super::mmio::register as reg;
use super::test_utils::*;
use super::VirtioDevice;
use crate::{BusDevice, Persist, PersistError};

/// Where attacks have their own tables.
const TABLE: u64 = MEMORY_SIZE - 0x8000;

/// An attack on a queue.
type Attack<D> = fn(&mut Driver<D>, usize);

/// Chains that no device can take.
fn deadly<D: VirtioDevice>() -> Vec<(&'static str, Attack<D>)> {
    vec![
        ("a descriptor that is its own successor", |driver, queue| {
            driver.descriptor(rings(queue)[0], 5, (DATA, 4, NEXT), 5);
            driver.publish(queue, 5);
        }),
        ("a loop of writable descriptors", |driver, queue| {
            driver.descriptor(rings(queue)[0], 5, (DATA, 64, NEXT | WRITE), 6);
            driver.descriptor(rings(queue)[0], 6, (DATA, 64, NEXT | WRITE), 5);
            driver.publish(queue, 5);
        }),
        ("a loop in an indirect table", |driver, queue| {
            driver.descriptor(TABLE, 0, (DATA, 64, NEXT | WRITE), 1);
            driver.descriptor(TABLE, 1, (DATA, 64, NEXT | WRITE), 0);
            driver.add(queue, &[(TABLE, 32, INDIRECT)]);
        }),
        ("a buffer to read beyond memory", |driver, queue| {
            driver.add(queue, &[(MEMORY_SIZE, 16, 0)]);
        }),
        ("a buffer to write across the end of memory", |driver, queue| {
            driver.add(queue, &[(MEMORY_SIZE - 8, 64, WRITE)]);
        }),
        ("a buffer around the end of the address space", |driver, queue| {
            driver.add(queue, &[(u64::MAX - 7, 64, WRITE)]);
        }),
        ("a good buffer, then one that is not in memory", |driver, queue| {
            driver.add(queue, &[(DATA, 64, WRITE), (1 << 40, 64, WRITE)]);
        }),
        ("4 GiB in one buffer", |driver, queue| {
            driver.add(queue, &[(0, u32::MAX, WRITE)]);
        }),
        ("more than 4 GiB in all", |driver, queue| {
            for n in 0..9000 {
                let last = n == 8999;
                let buffer = (SEAM, SEAM as u32, WRITE | if last { 0 } else { NEXT });
                driver.descriptor(0x2_0000, n, buffer, n + 1);
            }
            driver.add(queue, &[(0x2_0000, 9000 * 16, INDIRECT)]);
        }),
        ("a buffer to read after one to write", |driver, queue| {
            driver.add(queue, &[(DATA, 64, WRITE), (DATA, 64, 0)]);
        }),
        ("a head beyond the table", |driver, queue| driver.publish(queue, u16::MAX)),
        ("a successor beyond the table", |driver, queue| {
            driver.descriptor(rings(queue)[0], 5, (DATA, 64, NEXT | WRITE), 0x8000);
            driver.publish(queue, 5);
        }),
        ("an indirect table of half a descriptor", |driver, queue| {
            driver.add(queue, &[(TABLE, 8, INDIRECT)]);
        }),
        ("an empty indirect table", |driver, queue| {
            driver.add(queue, &[(TABLE, 0, INDIRECT)]);
        }),
        ("an indirect table outside of memory", |driver, queue| {
            driver.add(queue, &[(MEMORY_SIZE, 16, INDIRECT)]);
        }),
        ("a table in a table", |driver, queue| {
            driver.descriptor(TABLE, 0, (TABLE + 0x100, 16, INDIRECT), 0);
            driver.descriptor(TABLE + 0x100, 0, (DATA, 64, WRITE), 0);
            driver.add(queue, &[(TABLE, 16, INDIRECT)]);
        }),
        ("an available index that jumps", |driver, queue| {
            driver.put(rings(queue)[1] + 2, &0x8000_u16.to_le_bytes());
        }),
    ]
}

/// Chains that a device may take, or not: they meet its own rings, or each other.
fn odd<D: VirtioDevice>() -> Vec<(&'static str, Attack<D>)> {
    vec![
        ("its descriptors as a buffer", |driver, queue| {
            driver.add(queue, &[(rings(queue)[0], 0x1000, WRITE)]);
        }),
        ("its available ring as a buffer", |driver, queue| {
            driver.add(queue, &[(rings(queue)[1], 0x100, WRITE)]);
        }),
        ("its used ring as a buffer", |driver, queue| {
            driver.add(queue, &[(rings(queue)[2], 0x1000, WRITE)]);
        }),
        ("its used ring as something to read", |driver, queue| {
            driver.add(queue, &[(rings(queue)[2], 0x40, 0), (DATA, 0x40, WRITE)]);
        }),
        ("its indirect table as a buffer", |driver, queue| {
            driver.descriptor(TABLE, 0, (TABLE, 64, WRITE), 0);
            driver.add(queue, &[(TABLE, 16, INDIRECT)]);
        }),
        ("the same place to read and to write", |driver, queue| {
            driver.add(queue, &[(DATA, 64, 0), (DATA, 64, WRITE), (DATA + 8, 64, WRITE)]);
        }),
        ("the same chain over and over", |driver, queue| {
            let head = driver.add(queue, &[(DATA, 64, WRITE)]);
            (0..15).for_each(|_| driver.publish(queue, head));
        }),
        ("nothing at all", |driver, queue| {
            driver.add(queue, &[(DATA, 0, 0)]);
        }),
    ]
}

/// Attacks queue `queue` of what `make` makes. `look` has the device look at the queue; `good`
/// checks that it serves a good request.
///
/// What no device can take breaks it: that is counted once, told to the driver, and nothing is
/// given back. After everything else it may be broken. In any case a reset ends it.
pub(crate) fn survived<D>(
    make: impl Fn() -> D,
    queue: usize,
    look: impl Fn(&mut Driver<D>),
    good: impl Fn(&mut Driver<D>),
) where
    D: VirtioDevice + Persist<Error = PersistError>,
{
    let recovers = |mut driver: Driver<D>| {
        driver.negotiate(0);
        driver.set_up_queues();
        driver.set(reg::STATUS, 15);
        assert_eq!(driver.get(reg::STATUS), 15);
        good(&mut driver);
    };
    for (name, attack) in deadly() {
        println!("{} queue {queue}: {name}", D::NAME);
        let mut driver = Driver::live(make(), 0);
        driver.line.take();
        attack(&mut driver, queue);
        look(&mut driver);
        assert!(driver.needs_reset(), "{name}");
        assert_eq!(driver.handle.metrics().needs_resets.get(), 1, "{name}");
        assert_eq!(driver.get(reg::INTERRUPT_STATUS) & 2, 2, "{name}");
        assert_ne!(driver.line.take(), 0, "{name}");
        assert!(driver.used(queue).is_empty(), "{name}");
        look(&mut driver);
        assert_eq!(driver.handle.metrics().needs_resets.get(), 1, "{name}");
        recovers(driver);
    }
    for (name, attack) in odd() {
        println!("{} queue {queue}: {name}", D::NAME);
        let mut driver = Driver::live(make(), 0);
        attack(&mut driver, queue);
        look(&mut driver);
        let broken = driver.needs_reset();
        assert_eq!(driver.handle.metrics().needs_resets.get(), u64::from(broken), "{name}");
        recovers(driver);
    }

    // Too early: ignored, counted.
    let mut driver = Driver::idle(make());
    driver.set(reg::QUEUE_NOTIFY, queue as u32);
    look(&mut driver);
    assert_ne!(driver.handle.metrics().early_notifications.get(), 0);
    assert_eq!(driver.get(reg::STATUS), 0);
    recovers(driver);

    // Writes to the configuration at sizes and places where nothing can be written.
    let mut driver = Driver::live(make(), 0);
    let before = driver.config::<64>(0);
    for size in [0, 1, 2, 3, 5, 7, 8, 64] {
        for offset in [0, 1, 3, 59, 60, 0xE00] {
            driver.transport.write(0x100 + offset, &vec![0xA5; size]);
        }
    }
    assert_eq!(driver.config::<64>(0), before);
    assert_eq!(driver.handle.metrics().bad_accesses.get(), 48);
    assert!(!driver.needs_reset());
    good(&mut driver);
}
