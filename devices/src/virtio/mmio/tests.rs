//! A driver that keeps the rules.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vm_memory::GuestMemory;

use super::register as reg;
use super::*;
use crate::virtio::ids::{features, interrupt_status, status};
use crate::virtio::test_utils::*;
use crate::virtio::{Context, DeviceError, Progress, VirtioDevice};
use crate::{BusDevice, Persist, PersistError};

fn live() -> Driver<Probe> {
    Driver::live(Probe::default(), 0)
}

/// A request of the probe: 4 bytes to read, 8 to write.
const REQUEST: [(u64, u32, u16); 2] = [(DATA, 4, 0), (DATA + 0x1000, 8, WRITE)];

#[test]
fn the_device_tells_what_it_is() {
    let mut driver = Driver::idle(Probe::default());
    assert_eq!(driver.get(reg::MAGIC).to_le_bytes(), *b"virt");
    assert_eq!((driver.get(reg::VERSION), driver.get(reg::DEVICE_ID)), (2, Probe::DEVICE_ID));
    assert_eq!(driver.get(reg::STATUS), 0);
    assert_eq!(driver.offered(), features::COMMON | PROBE_FEATURE);
    driver.set(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(reg::DEVICE_FEATURES), 0);
    assert_eq!(driver.get(reg::QUEUE_NUM_MAX), 16);
    driver.set(reg::QUEUE_SEL, 2);
    assert_eq!(driver.get(reg::QUEUE_NUM_MAX), 0);
    assert_eq!(driver.get(reg::SHM_LEN_LOW), u32::MAX, "no shared memory");
    assert_eq!(driver.transport.handle().metrics().bad_accesses.get(), 0);
}

#[test]
fn a_request_is_served() {
    let mut driver = live();
    driver.put(DATA, b"abcd");
    driver.set(reg::QUEUE_NOTIFY, 0);
    assert_eq!((driver.kicks.take(0), driver.kicks.take(1)), (1, 0));
    assert_eq!(driver.request(0, &REQUEST), 4);
    assert_eq!(driver.peek(DATA + 0x1000, 5), b"abcd\0");
    assert_eq!(driver.line.take(), 1);
    assert_eq!(driver.get(reg::INTERRUPT_STATUS), interrupt_status::USED_BUFFER);
    driver.set(reg::INTERRUPT_ACK, interrupt_status::USED_BUFFER);
    assert_eq!(driver.get(reg::INTERRUPT_STATUS), 0);
    assert_eq!(driver.handle.metrics().notifications.get(), 1);
    assert_eq!(driver.handle.metrics().bad_accesses.get(), 0);
}

#[test]
fn an_indirect_table_is_followed() {
    let mut driver = live();
    driver.put(DATA, b"abcd");
    let table = DATA + 0x8008;
    driver.descriptor(table, 0, (DATA, 2, NEXT), 2);
    driver.descriptor(table, 2, (DATA + 2, 2, NEXT), 1);
    driver.descriptor(table, 1, (DATA + 0x1000, 8, WRITE), 0);
    assert_eq!(driver.request(0, &[(table, 48, INDIRECT)]), 4);
    assert_eq!(driver.peek(DATA + 0x1000, 4), b"abcd");
    // Ordinary descriptors may come before it.
    assert_eq!(driver.request(0, &[(DATA, 1, 0), (table, 48, INDIRECT)]), 5);
    assert_eq!(driver.peek(DATA + 0x1000, 5), b"aabcd");
}

#[test]
fn rings_wrap() {
    let mut driver = live();
    for round in 0..70_000_u32 {
        driver.memory.write_obj_at(DATA, round);
        assert_eq!(driver.request(0, &REQUEST), 4);
        assert_eq!(driver.peek(DATA + 0x1000, 4), round.to_le_bytes());
    }
    assert!(!driver.needs_reset());
}

#[test]
fn an_interrupt_comes_when_the_driver_wants_it() {
    // With EVENT_IDX: when the used index passes the mark.
    let mut driver = live();
    driver.request(0, &REQUEST);
    assert_eq!(driver.line.take(), 1, "the first always");
    driver.request(0, &REQUEST);
    assert_eq!(driver.line.take(), 0, "the mark is still behind");
    driver.want_interrupt_after(0, 3);
    driver.request(0, &REQUEST);
    assert_eq!(driver.line.take(), 0, "not there yet");
    driver.request(0, &REQUEST);
    assert_eq!(driver.line.take(), 1);
    driver.want_interrupt_after(0, 5);
    for _ in 0..3 {
        driver.add(0, &REQUEST);
    }
    driver.run(0);
    assert_eq!(driver.line.take(), 1, "passed within a batch");

    // Without: unless the flag in the ring forbids it.
    let mut driver = Driver::live(Probe::default(), features::RING_EVENT_IDX);
    driver.request(0, &REQUEST);
    driver.request(0, &REQUEST);
    assert_eq!(driver.line.take(), 2);
    driver.put(rings(0)[1], &[1, 0]);
    driver.request(0, &REQUEST);
    assert_eq!(driver.line.take(), 0);
}

#[test]
fn the_driver_need_not_notify_while_the_device_looks_by_itself() {
    // With EVENT_IDX the mark says from where on notifications are wanted.
    let mut driver = live();
    driver.request(0, &REQUEST);
    let mark = rings(0)[2] + 4 + 8 * 16;
    assert_eq!(driver.peek(mark, 2), [1, 0]);

    let mut driver = Driver::live(Probe::default(), features::RING_EVENT_IDX);
    driver.request(0, &REQUEST);
    assert_eq!(driver.peek(rings(0)[2], 2), [0, 0], "wanted again after the batch");
}

#[test]
fn features_are_settled_once() {
    let mut driver = Driver::idle(Probe::default());
    driver.negotiate(0);
    assert_eq!(driver.get(reg::STATUS), 11);
    driver.set(reg::DRIVER_FEATURES, 0);
    assert_eq!(driver.handle.metrics().bad_accesses.get(), 1);
    driver.set_up_queues();
    driver.set(reg::STATUS, 15);
    let wanted = features::COMMON | PROBE_FEATURE;
    assert_eq!(driver.handle.with_device(|probe| probe.active), Some(wanted));
}

#[test]
fn features_that_are_not_offered_are_refused() {
    for (without, more) in [(features::VERSION_1, 0), (0, 1 << 40), (0, 1)] {
        let mut driver = Driver::idle(Probe::default());
        driver.set(reg::STATUS, 3);
        let wanted = (features::COMMON & !without) | more;
        for half in 0..2 {
            driver.set(reg::DRIVER_FEATURES_SEL, half);
            driver.set(reg::DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
        }
        driver.set(reg::STATUS, 11);
        assert_eq!(driver.get(reg::STATUS), 3, "{wanted:#x}");
        // The driver may choose again.
        driver.negotiate(0);
        assert_eq!(driver.get(reg::STATUS), 11);
    }
}

#[test]
fn a_reset_forgets_the_driver() {
    let mut driver = live();
    driver.request(0, &REQUEST);
    driver.set(reg::QUEUE_SEL, 1);
    driver.set(reg::STATUS, 0);
    for (register, value) in [
        (reg::STATUS, 0),
        (reg::INTERRUPT_STATUS, 0),
        (reg::QUEUE_READY, 0),
        (reg::QUEUE_NUM_MAX, 16),
    ] {
        assert_eq!(driver.get(register), value, "{register:#x}");
    }
    assert_eq!(driver.handle.with_device(|probe| probe.active), None);
    driver.negotiate(0);
    driver.set_up_queues();
    driver.set(reg::STATUS, 15);
    assert_eq!(driver.request(0, &REQUEST), 4, "indices begin at 0 again");
}

#[test]
fn a_queue_can_be_taken_out_of_use() {
    let mut driver = live();
    driver.set(reg::QUEUE_SEL, 1);
    assert_eq!(driver.get(reg::QUEUE_READY), 1);
    driver.set(reg::QUEUE_READY, 0);
    assert_eq!(driver.get(reg::QUEUE_READY), 0);
    driver.add(1, &REQUEST);
    driver.run(1);
    assert!(driver.used(1).is_empty());
    assert_eq!(driver.request(0, &REQUEST), 4);
}

#[test]
fn the_configuration_is_read_at_any_size() {
    let mut driver = Driver::idle(Probe::default());
    assert_eq!(driver.config::<8>(0), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(driver.config::<2>(3), [4, 5]);
    assert_eq!(driver.config::<4>(6), [7, 8, 0, 0], "nothing behind its end");
    assert_eq!(driver.config::<1>(0xEFF), [0]);
    // Only its byte 0 can be written.
    driver.transport.write(0x100, &[9]);
    driver.transport.write(0x101, &[9]);
    assert_eq!(driver.config::<2>(0), [9, 2]);
    assert_eq!(driver.handle.metrics().bad_accesses.get(), 1);
}

#[test]
fn a_changed_configuration_is_a_new_generation() {
    let mut driver = Driver::idle(Probe::default());
    let change = |value| {
        move |probe: &mut Probe| {
            probe.config[1] = value;
            true
        }
    };
    driver.handle.change_config(change(7));
    assert_eq!((driver.get(reg::CONFIG_GENERATION), driver.line.take()), (1, 0));
    let mut driver = live();
    driver.handle.change_config(change(7));
    assert_eq!((driver.get(reg::CONFIG_GENERATION), driver.line.take()), (1, 1));
    assert_eq!(driver.get(reg::INTERRUPT_STATUS), interrupt_status::CONFIG_CHANGE);
    driver.handle.change_config(|_| false);
    assert_eq!((driver.get(reg::CONFIG_GENERATION), driver.line.take()), (1, 0));
}

#[test]
fn a_quiesced_device_does_nothing_until_it_is_resumed() {
    let mut driver = live();
    driver.handle.quiesce(Instant::now()).unwrap();
    driver.add(0, &REQUEST);
    driver.run(0);
    assert!(driver.used(0).is_empty());
    driver.handle.resume();
    assert_eq!((driver.kicks.take(0), driver.kicks.take(1)), (1, 1), "whoever waits is served");
    driver.run(0);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn a_stuck_request_is_reported_and_the_device_goes_on() {
    let mut driver = live();
    let (entered, wait_entered) = mpsc::channel();
    let (release, wait_release) = mpsc::channel();
    driver.handle.with_device(|probe| probe.block_on = Some((entered, wait_release)));
    driver.add(0, &REQUEST);
    driver.add(0, &REQUEST);
    let handle = driver.handle.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| handle.process_queue(0));
        wait_entered.recv().unwrap();
        let error = driver.handle.quiesce(Instant::now()).unwrap_err();
        assert!(error.to_string().contains("probe still had a request under way"), "{error}");
        assert_eq!(driver.kicks.take(0), 1);

        // Asked again, it finishes that request and begins no other.
        let (done, wait_done) = mpsc::channel();
        let closer = driver.handle.clone();
        scope.spawn(move || {
            done.send(closer.quiesce(Instant::now() + Duration::from_secs(60))).unwrap();
        });
        while !driver.handle.is_closing() {
            std::thread::yield_now();
        }
        release.send(()).unwrap();
        wait_done.recv().unwrap().unwrap();
    });
    assert_eq!(driver.used(0).len(), 1);
    driver.handle.resume();
    driver.run(0);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn a_stuck_request_holds_up_neither_who_resumes_nor_who_asks() {
    let mut driver = live();
    let (entered, wait_entered) = mpsc::channel();
    let (release, wait_release) = mpsc::channel();
    driver.handle.with_device(|probe| probe.block_on = Some((entered, wait_release)));
    driver.add(0, &REQUEST);
    let worker = driver.handle.clone();
    let worker = std::thread::spawn(move || worker.process_queue(0));
    wait_entered.recv().unwrap();

    let (done, wait_done) = mpsc::channel();
    let machine = driver.handle.clone();
    std::thread::spawn(move || {
        // As the machine does it when one of its devices does not come to rest.
        machine.begin_quiesce();
        let stuck = machine.quiesce(Instant::now()).is_err();
        machine.resume();
        done.send((stuck, machine.migration_blocker())).unwrap();
    });
    let answer = wait_done.recv_timeout(Duration::from_secs(30));
    release.send(()).unwrap();
    worker.join().unwrap();
    assert_eq!(answer, Ok((true, None)));
    assert_ne!(driver.kicks.take(0), 0, "what was not looked at meanwhile is");
    assert_eq!(driver.used(0).len(), 1);
}

/// Whatever it does, it has not done enough.
struct Endless;

impl VirtioDevice for Endless {
    const DEVICE_ID: u32 = 43;
    const NAME: &'static str = "endless";

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        0
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn process_queue<M: GuestMemory>(
        &mut self,
        _: usize,
        _: &mut Context<'_, M>,
    ) -> Result<Progress, DeviceError> {
        Ok(Progress::More)
    }
}

impl Persist for Endless {
    const KIND: &'static str = "endless";
    const VERSION: u16 = 1;
    type State = ();
    type Error = PersistError;

    fn save(&self) -> Result<(), PersistError> {
        Ok(())
    }
    fn restore(&mut self, (): &()) -> Result<(), PersistError> {
        Ok(())
    }
}

#[test]
fn a_driver_that_never_stops_asking_does_not_keep_the_others_waiting() {
    let mut driver = Driver::live(Endless, 0);
    driver.run(0);
    assert_eq!(driver.kicks.take(0), 1, "the rest has its turn after the others'");
    driver.handle.quiesce(Instant::now()).unwrap();
    driver.run(0);
    assert_eq!(driver.kicks.take(0), 0);
}

#[test]
fn a_moved_device_goes_on_where_it_was() {
    let mut here = live();
    here.put(DATA, b"abcd");
    for _ in 0..21 {
        here.request(0, &REQUEST);
    }
    here.handle.change_config(|_| true);
    here.set(reg::DEVICE_FEATURES_SEL, 1);
    here.set(reg::QUEUE_SEL, 1);
    let head = here.add(0, &REQUEST);
    here.line.take();

    let mut there = here.moved(Probe::default());
    assert_eq!(there.line.take(), 0, "restoring raises nothing");
    assert_eq!((there.get(reg::STATUS), there.get(reg::CONFIG_GENERATION)), (15, 1));
    assert_eq!((there.get(reg::INTERRUPT_STATUS), there.get(reg::QUEUE_READY)), (3, 1));
    assert_eq!(there.get(reg::DEVICE_FEATURES), 1, "VERSION_1");
    let wanted = features::COMMON | PROBE_FEATURE;
    assert_eq!(there.handle.with_device(|probe| probe.active), Some(wanted));
    there.handle.resume();
    assert_eq!(there.kicks.take(0), 1);
    there.handle.raise_pending();
    assert_eq!(there.line.take(), 1);
    there.run(0);
    assert_eq!(there.used(0), [(head, 4)]);
    assert_eq!(there.line.take(), 0, "the mark of EVENT_IDX was moved, too");
}

#[test]
fn after_a_restore_the_driver_is_notified_even_if_nothing_was_pending() {
    let mut here = live();
    here.set(reg::INTERRUPT_ACK, 3);
    let mut there = here.moved(Probe::default());
    there.handle.raise_pending();
    assert_eq!((there.line.take(), there.get(reg::INTERRUPT_STATUS)), (1, 1));
    // But not a driver that is not there.
    let there = Driver::idle(Probe::default()).moved(Probe::default());
    there.handle.raise_pending();
    assert_eq!(there.line.take(), 0);
}

#[test]
fn a_broken_device_is_still_broken_elsewhere_and_the_driver_hears_of_it() {
    let mut here = live();
    here.add(0, &[(MEMORY_SIZE, 1, 0)]);
    here.run(0);
    let mut there = here.moved(Probe::default());
    assert!(there.needs_reset());
    there.handle.raise_pending();
    assert_eq!((there.line.take(), there.get(reg::INTERRUPT_STATUS)), (1, 2));
    there.handle.resume();
    there.run(0);
    assert!(there.used(0).is_empty());
}

#[test]
fn a_long_batch_tells_the_driver_on_the_way_and_no_more_than_once_for_each_piece() {
    let mut driver = Driver::live(Probe::default(), features::RING_EVENT_IDX);
    // Twice what is told in one go, in four requests.
    for _ in 0..4 {
        driver.add(0, &[(DATA, 4, 0), (SEAM, 64 << 10, WRITE)]);
    }
    driver.run(0);
    assert_eq!((driver.used(0).len(), driver.line.take()), (4, 2));
}

#[test]
fn resets_while_the_worker_is_at_work() {
    let mut driver = live();
    let handle = driver.handle.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                handle.process_queue(0);
            }
        });
        for round in 0..200_u32 {
            driver.negotiate(0);
            driver.set_up_queues();
            driver.set(reg::STATUS, 15);
            driver.memory.write_obj_at(DATA, round);
            let head = driver.add(0, &REQUEST);
            let used = loop {
                let used = driver.used(0);
                if !used.is_empty() {
                    break used;
                }
                std::thread::yield_now();
            };
            assert_eq!(used, [(head, 4)]);
            assert_eq!(driver.peek(DATA + 0x1000, 4), round.to_le_bytes());
            // One more that the reset may meet under way.
            driver.add(0, &REQUEST);
        }
        done.store(true, Ordering::SeqCst);
    });
    assert!(!driver.needs_reset());
}

#[test]
fn no_request_is_forgotten_between_the_last_look_and_the_wish_to_be_notified() {
    for without in [0, features::RING_EVENT_IDX] {
        let mut driver = Driver::live(Probe::default(), without);
        let worker = driver.handle.clone();
        let (notify, notified) = mpsc::channel();
        let worker = std::thread::spawn(move || {
            while notified.recv().is_ok() {
                worker.process_queue(0);
            }
        });
        let [_, _, used] = rings(0);
        for round in 0..20_000_u16 {
            driver.add(0, &REQUEST);
            // As a driver does it: only where the device wants it (section 2.7.10).
            fence(Ordering::SeqCst);
            let word = |at| u16::from_le_bytes(driver.peek(at, 2).try_into().unwrap());
            let wanted = match without {
                0 => word(used + 4 + 8 * 16) == round,
                _ => word(used) == 0,
            };
            if wanted {
                notify.send(()).unwrap();
            }
            let deadline = Instant::now() + Duration::from_secs(30);
            while driver.used(0).is_empty() {
                assert!(Instant::now() < deadline, "request {round} is forgotten");
                std::hint::spin_loop();
            }
        }
        drop(notify);
        worker.join().unwrap();
    }
}

#[test]
fn version_1_still_decodes() {
    let mut driver = live();
    driver.request(0, &REQUEST);
    driver.set(reg::STATUS, 15);
    let golden = [
        42, 1, 1, 1, 15, // device, selectors, status
        253, 32, 0, 0, 48, 1, 0, 0, 0, // features
        1, 0, 2, // interrupt status, generation, two queues
        16, 251, 0, 16, 251, 0, 32, 251, 0, 48, 1, 1, 1, 1, 1, // one of them used
        16, 251, 0, 80, 251, 0, 96, 251, 0, 112, 1, 0, 0, 0,
    ];
    driver.set(reg::QUEUE_SEL, 1);
    assert_eq!(driver.transport.save_payload(0).unwrap().data, golden);
    let payload = crate::Payload {
        kind: "virtio-mmio".into(),
        instance: 0,
        version: 1,
        data: golden.to_vec(),
    };
    let mut there = Driver::idle(Probe::default());
    there.transport.restore_payload(&payload).unwrap();
    assert_eq!(there.transport.save().unwrap(), driver.transport.save().unwrap());
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let mut driver = live();
    driver.request(0, &REQUEST);
    let good = driver.transport.save().unwrap();
    let refused = |change: &dyn Fn(&mut MmioState), words: &str| {
        let mut state = good.clone();
        change(&mut state);
        let mut there = Driver::idle(Probe::default());
        let error = there.transport.restore(&state).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(there.get(reg::STATUS), 0, "nothing of it was used");
    };
    refused(&|s| s.device_id = 1, "number 1");
    refused(&|s| s.queues.truncate(1), "1 queues were saved, 2 are here");
    refused(&|s| s.driver_features |= 1 << 9, "0x200 are not offered");
    refused(&|s| s.driver_features &= !features::VERSION_1, "not offered");
    refused(&|s| s.status &= !status::FEATURES_OK, "no driver sets status 0x7");
    refused(&|s| s.status &= !status::ACKNOWLEDGE, "no driver sets status 0xe");
    refused(&|s| s.status |= 1 << 31, "no driver sets status 0x8000000f");
    refused(&|s| s.status = 3, "a queue is ready before features are settled");
    refused(&|s| s.status = 0, "a queue is ready before features are settled");
    refused(&|s| s.interrupt_status = 4, "unknown bits");
    refused(&|s| s.queues[0].size = 3, "queue 0: queue size 3");
    refused(&|s| s.queues[0].size = 32, "queue 0: queue size 32");
    refused(&|s| s.queues[1].used = MEMORY_SIZE - 4, "queue 1: the used ring at");
    refused(
        &|s| s.queues[0].indices.as_mut().unwrap().next_available = 40,
        "39 chains under way in 16",
    );
}
