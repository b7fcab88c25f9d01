//! The queue against a device that is written down here once more.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use super::*;

struct Fake(RefCell<Vec<u8>>);

impl Fake {
    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        self.0.borrow()[address as usize..][..N].try_into().unwrap()
    }
    fn put(&self, address: u64, bytes: &[u8]) {
        self.0.borrow_mut()[address as usize..][..bytes.len()].copy_from_slice(bytes);
    }
}

impl Ram for Fake {
    fn get16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address))
    }
    fn put16(&self, address: u64, value: u16) {
        self.put(address, &value.to_le_bytes());
    }
    fn get32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.get(address))
    }
    fn put32(&self, address: u64, value: u32) {
        self.put(address, &value.to_le_bytes());
    }
    fn put64(&self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }
}

const BASE: u64 = 0x1000;

fn queue(size: u16, event_index: bool, indirect: bool) -> (Fake, Queue) {
    let layout = Layout::new(BASE, size);
    let ram = Fake(RefCell::new(vec![0; (BASE + layout.bytes) as usize]));
    let slots = vec![Slot::default(); usize::from(size)].leak();
    (ram, Queue::new(layout, slots, event_index, indirect))
}

/// The chain that the `index`-th available entry names, as a device reads it.
fn chain(ram: &Fake, layout: &Layout, index: u16) -> (u16, Vec<Segment>) {
    let head = ram.get16(layout.available + 4 + 2 * u64::from(index % layout.size));
    let (mut table, mut at) = (layout.descriptors, head);
    let mut found = Vec::new();
    loop {
        let entry = table + 16 * u64::from(at);
        let address = u64::from_le_bytes(ram.get(entry));
        let (length, flags) = (ram.get32(entry + 8), ram.get16(entry + 12));
        if flags & INDIRECT != 0 {
            (table, at) = (address, 0);
            continue;
        }
        found.push(Segment { address, length, writable: flags & WRITE != 0 });
        if flags & NEXT == 0 {
            return (head, found);
        }
        at = ram.get16(entry + 14);
    }
}

fn give_back(ram: &Fake, layout: &Layout, head: u32, length: u32) {
    let index = ram.get16(layout.used + 2);
    let entry = layout.used + 4 + 8 * u64::from(index % layout.size);
    ram.put32(entry, head);
    ram.put32(entry + 4, length);
    ram.put16(layout.used + 2, index.wrapping_add(1));
}

const REQUEST: [Segment; 3] =
    [Segment::read(0xA000, 16), Segment::write(0xB000, 4096), Segment::write(0xC000, 1)];

#[test]
fn the_parts_are_aligned_and_do_not_overlap() {
    for size in [1, 2, 64, 256] {
        let layout = Layout::new(BASE, size);
        let entries = u64::from(size);
        assert!(layout.descriptors + 16 * entries <= layout.available);
        assert!(layout.available + 6 + 2 * entries <= layout.used);
        assert!(layout.used + 6 + 8 * entries <= layout.indirect);
        assert!(layout.indirect + 64 * entries <= BASE + layout.bytes);
        assert_eq!((layout.available % 2, layout.used % 4, layout.indirect % 16), (0, 0, 0));
    }
}

#[test]
fn requests_go_round_many_times_in_any_order() {
    for indirect in [false, true] {
        let (ram, mut queue) = queue(8, true, indirect);
        let layout = *queue.layout();
        let room = if indirect { 8 } else { 2 };
        let mut index = 0_u16;
        for round in 0..50_000_u32 {
            for token in 0..room {
                assert!(queue.add(&ram, &REQUEST, token));
            }
            let full = if indirect { 8 } else { 6 };
            assert_eq!(queue.in_flight(), full);
            assert!(!queue.add(&ram, &REQUEST, 9), "full");
            let _ = queue.publish(&ram);
            assert_eq!(ram.get16(layout.available + 2), index.wrapping_add(room));
            let mut heads: Vec<_> = (0..room)
                .map(|entry| {
                    let (head, segments) = chain(&ram, &layout, index.wrapping_add(entry));
                    assert_eq!(segments, REQUEST);
                    (entry, head)
                })
                .collect();
            if round % 2 == 1 {
                heads.reverse();
            }
            for (token, head) in heads {
                assert_eq!(queue.take(&ram), Ok(None));
                give_back(&ram, &layout, head.into(), round);
                assert_eq!(queue.take(&ram), Ok(Some(Done { token, length: round })));
            }
            assert_eq!(queue.in_flight(), 0);
            index = index.wrapping_add(room);
        }
    }
}

#[test]
fn the_device_is_notified_when_it_asks_for_it() {
    let (ram, mut queue) = queue(4, true, false);
    let avail_event = queue.layout().used + 4 + 8 * 4;
    let one = [Segment::read(0, 1)];
    assert!(!queue.publish(&ram), "nothing to tell");
    assert!(queue.add(&ram, &one, 0) && queue.publish(&ram), "it waits for entry 0");
    assert!(queue.add(&ram, &one, 1) && !queue.publish(&ram), "still at entry 0");
    ram.put16(avail_event, 3);
    assert!(queue.add(&ram, &one, 2) && !queue.publish(&ram), "it waits for entry 3");
    assert!(queue.add(&ram, &one, 3) && queue.publish(&ram));

    let (ram, mut queue) = self::queue(4, false, false);
    assert!(queue.add(&ram, &one, 0) && queue.publish(&ram));
    ram.put16(queue.layout().used, QUIET);
    assert!(queue.add(&ram, &one, 1) && !queue.publish(&ram));
}

#[test]
fn interrupts_are_asked_for_and_not() {
    let (ram, queue) = queue(4, true, false);
    let used_event = queue.layout().available + 4 + 2 * 4;
    queue.disarm(&ram);
    assert_eq!(ram.get16(used_event), 0x8000);
    queue.arm(&ram);
    assert_eq!(ram.get16(used_event), 0);
    let (ram, queue) = self::queue(4, false, false);
    queue.disarm(&ram);
    assert_eq!(ram.get16(queue.layout().available), QUIET);
    queue.arm(&ram);
    assert_eq!(ram.get16(queue.layout().available), 0);
}

#[test]
fn a_device_that_gives_back_what_it_has_not_is_not_believed() {
    let (ram, mut queue) = queue(4, false, false);
    let layout = *queue.layout();
    assert!(queue.add(&ram, &REQUEST, 5));
    for id in [1, 3, 4, u32::MAX] {
        give_back(&ram, &layout, id, 0);
        assert_eq!(queue.take(&ram), Err(Broken { id }), "not the head of a request");
    }
    give_back(&ram, &layout, 0, 0);
    assert!(queue.take(&ram).unwrap().is_some());
    give_back(&ram, &layout, 0, 0);
    assert_eq!(queue.take(&ram), Err(Broken { id: 0 }), "twice");
    queue.forget();
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn an_index_passes_an_event_once() {
    assert!(passes(5, 6, 5));
    assert!(!passes(5, 5, 4));
    assert!(!passes(5, 7, 6));
    assert!(passes(0xFFFF, 0, 0xFFFE));
}
