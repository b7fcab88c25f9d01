//! The memory balloon: gives pages of a pool of its own to the host and takes them back.
//!
//! Each page of the pool that is not in the balloon is stamped like a page of the working set, and
//! checked before it goes in: what came back must be memory that can be used.
//!
//! Source: VIRTIO 1.2, 5.5.
#![allow(unsafe_code)]

use beacon_core::devices::DeviceOptions;
use beacon_core::json::Line;
use beacon_core::memory::FreeRam;
use beacon_core::pages::{self, PAGE_SIZE};
use beacon_core::queue::{Queue, Segment};
use beacon_core::time::TscScale;

use crate::console;
use crate::phys::{self, Memory};
use crate::virtio::{Device, Signal};

const F_MUST_TELL_HOST: u64 = 1 << 0;
const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const NUM_PAGES: u64 = 0;
const ACTUAL: u64 = 4;
const QUEUE: u16 = 8;

/// Pages of a request.
const BATCH: u64 = 32;
/// How often the wish of the host is looked at even though nothing says that it changed.
const LOOK_US: u64 = 1_000_000;

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Idle,
    /// A request for so many pages is on its way.
    Inflating(u64),
    Deflating(u64),
    /// Pages came back and are stamped, one in a turn, from this one to the end.
    Stamping(u64, u64),
}

/// The balloon.
pub struct Balloon {
    device: Device,
    /// Inflate and deflate.
    queues: [Queue; 2],
    signal: Signal,
    /// The page numbers of a request.
    list: &'static mut [u32],
    pool: u64,
    generations: &'static mut [u32],
    stage: Stage,
    /// Pages that the host wants.
    wanted: u64,
    /// Pages in the balloon: the first of the pool.
    actual: u64,
    /// The last wish was met, and the console knows.
    settled: bool,
    look: u64,
    next_look: u64,
    inflated: u64,
    deflated: u64,
    errors: u64,
}

impl Balloon {
    /// Starts the device.
    pub fn new(
        device: Device,
        options: &DeviceOptions,
        scale: TscScale,
        ram: &mut FreeRam,
    ) -> Result<Self, &'static str> {
        const NO_MEMORY: &str = "no memory for the balloon's pool";
        let features = device.negotiate(F_MUST_TELL_HOST)?;
        let queues = [
            device.queue(ram, INFLATE, QUEUE, features)?,
            device.queue(ram, DEFLATE, QUEUE, features)?,
        ];
        let pages = (options.balloon_mib << 20) / PAGE_SIZE;
        // SAFETY: zero is a valid number.
        let tables = unsafe {
            (phys::allocate(ram, BATCH as usize), phys::allocate::<u32>(ram, pages as usize))
        };
        let (Some(list), Some(generations)) = tables else { return Err(NO_MEMORY) };
        let pool = ram.take(pages * PAGE_SIZE, PAGE_SIZE).ok_or(NO_MEMORY)?;
        generations.fill(1);
        for page in 0..pages {
            pages::write(&Memory, pool + page * PAGE_SIZE, page, 1);
        }
        device.go();
        Ok(Self {
            device,
            queues,
            signal: Signal::new(device, "balloon", options.notify, scale),
            list,
            pool,
            generations,
            stage: Stage::Idle,
            wanted: 0,
            actual: 0,
            settled: true,
            look: scale.ticks_of_micros(LOOK_US),
            next_look: 0,
            inflated: 0,
            deflated: 0,
            errors: 0,
        })
    }

    fn address(&self, page: u64) -> u64 {
        self.pool + page * PAGE_SIZE
    }

    /// One turn's share.
    pub fn turn(&mut self, now: u64, elapsed: u64) {
        let Self { signal, queues, .. } = self;
        if signal.look(now, elapsed, || queues.iter().any(|queue| queue.has_used(&Memory))) {
            self.collect();
        }
        if self.signal.take_config_change() || now >= self.next_look {
            self.next_look = now + self.look;
            let wanted = u64::from(self.device.config32(NUM_PAGES));
            self.settled &= wanted == self.wanted;
            self.wanted = wanted;
        }
        let target = self.wanted.min(self.generations.len() as u64);
        match self.stage {
            Stage::Stamping(page, end) => self.stamp(page, end),
            Stage::Idle if target > self.actual => {
                let count = BATCH.min(target - self.actual);
                for page in self.actual..self.actual + count {
                    self.check(page);
                }
                if self.request(INFLATE, self.actual, count) {
                    self.stage = Stage::Inflating(count);
                }
            }
            Stage::Idle if target < self.actual => {
                let count = BATCH.min(self.actual - target);
                if self.request(DEFLATE, self.actual - count, count) {
                    self.stage = Stage::Deflating(count);
                }
            }
            Stage::Idle if !self.settled => {
                self.settled = true;
                let mut line = Line::event("balloon-done");
                line.number("wanted", self.wanted);
                line.number("actual", self.actual);
                console::offer(&mut line);
            }
            _ => (),
        }
    }

    fn collect(&mut self) {
        for queue in &mut self.queues {
            match queue.take(&Memory) {
                Ok(Some(_)) => {}
                Ok(None) => continue,
                Err(_) => {
                    self.errors += 1;
                    continue;
                }
            }
            match self.stage {
                Stage::Inflating(count) => {
                    self.actual += count;
                    self.inflated += count;
                    self.stage = Stage::Idle;
                }
                Stage::Deflating(count) => {
                    self.stage = Stage::Stamping(self.actual - count, self.actual);
                    self.actual -= count;
                    self.deflated += count;
                }
                Stage::Idle | Stage::Stamping(..) => (),
            }
            self.device.set_config32(ACTUAL, self.actual as u32);
        }
        if !self.queues.iter().any(|queue| queue.has_used(&Memory)) {
            self.signal.emptied(&[&self.queues[0], &self.queues[1]]);
        }
    }

    fn request(&mut self, queue: u32, first: u64, count: u64) -> bool {
        for (page, place) in (first..first + count).zip(self.list.iter_mut()) {
            *place = ((self.pool + page * PAGE_SIZE) >> 12) as u32;
        }
        let segment = Segment::read(self.list.as_ptr() as u64, 4 * count as u32);
        let ring = &mut self.queues[queue as usize];
        let added = ring.add(&Memory, &[segment], 0);
        if ring.publish(&Memory) {
            self.device.notify(queue);
        }
        added
    }

    fn check(&mut self, page: u64) {
        let generation = self.generations[page as usize];
        if let Err(wrong) = pages::check(&Memory, self.address(page), page, generation) {
            self.errors += 1;
            let mut line = Line::event("balloon-error");
            line.text("kind", wrong.kind.name());
            line.number("page", page);
            line.hex("gpa", self.address(page));
            line.number("offset", wrong.offset);
            line.hex("expected", wrong.expected);
            line.hex("found", wrong.found);
            console::offer(&mut line);
        }
    }

    fn stamp(&mut self, page: u64, end: u64) {
        let generation = self.generations[page as usize].wrapping_add(1);
        self.generations[page as usize] = generation;
        pages::write(&Memory, self.address(page), page, generation);
        self.check(page);
        self.stage = if page + 1 == end { Stage::Idle } else { Stage::Stamping(page + 1, end) };
    }

    /// The device, as it was found.
    pub fn announce(&self) {
        let mut line = Line::event("balloon");
        line.hex("base", self.device.base());
        line.number("pool_pages", self.generations.len() as u64);
        console::send(&mut line);
    }

    /// The fields of the `report` event.
    pub fn report(&self, line: &mut Line) {
        line.number("balloon_wanted", self.wanted);
        line.number("balloon_actual", self.actual);
        line.number("balloon_inflated", self.inflated);
        line.number("balloon_deflated", self.deflated);
        line.number("balloon_errors", self.errors);
        line.number("balloon_irqs", self.signal.irqs);
        line.number("balloon_irqs_lost", self.signal.lost);
    }
}
