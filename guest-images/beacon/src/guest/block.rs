//! The disk: its driver, and the load on it.
//!
//! Source: VIRTIO 1.2, 5.2.
#![allow(unsafe_code)]

use beacon_core::devices::{DeviceOptions, DiskMode, DiskOptions, MAX_BLOCK, MAX_DEPTH};
use beacon_core::disk::{self, Abilities, Content, Job, Load, Wrong, SECTOR};
use beacon_core::json::Line;
use beacon_core::latency::Latencies;
use beacon_core::memory::FreeRam;
use beacon_core::pacer::Pacer;
use beacon_core::pages::Words;
use beacon_core::queue::{Queue, Ram, Segment};
use beacon_core::time::TscScale;

use crate::cpu::tsc;
use crate::phys::{self, Memory};
use crate::virtio::{Device, Signal, F_INDIRECT, NEEDS_RESET};
use crate::{console, report};

const F_READ_ONLY: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// What the status byte is until the device has written it.
const NO_STATUS: u8 = 0xFF;

/// Entries of the queue: three descriptors for each request even without indirect ones.
const QUEUE: u16 = 128;
/// The request that asks for the disk's name has a place of its own.
const ID_SLOT: usize = MAX_DEPTH;
const ID_LENGTH: u32 = 20;
/// Bytes of a request's header (16), status (1) and range (16), and of the name.
const REQUEST: u64 = 96;
const STATUS_AT: u64 = 16;
const RANGE_AT: u64 = 32;
const ID_AT: u64 = 64;

/// Bytes that are stamped or checked in a turn.
const TURN_BYTES: u64 = 32 << 10;
/// Requests of a turn of a bench.
const BENCH_REQUESTS: u64 = 64;
/// Length of a turn of a bench.
const BENCH_TURN_US: u64 = 200;
/// Time between two flushes.
const FLUSH_US: u64 = 1_000_000;
/// Requests that are not answered for this long, in turns of at most 10 ms, are stuck.
const STUCK_US: u64 = 5_000_000;

/// Counters since boot.
#[derive(Default)]
struct Counters {
    reads: u64,
    writes: u64,
    bytes: u64,
    flushes: u64,
    discards: u64,
    zeroes: u64,
    /// Sectors read and found right.
    verified: u64,
    errors: u64,
    stuck: u64,
    broken: u64,
    notifies: u64,
    /// Longest time that a request took, since the last `mark`.
    longest: u64,
}

/// A bench that runs.
struct Bench {
    start: u64,
    end: u64,
    errors: u64,
    irqs: u64,
    notifies: u64,
}

/// The disk.
pub struct Block {
    device: Device,
    queue: Queue,
    signal: Signal,
    scale: TscScale,
    requests: u64,
    data: u64,
    sectors: u64,
    features: u64,
    id: Option<[u8; ID_LENGTH as usize]>,
    load: Load,
    pacer: Pacer,
    latencies: Latencies,
    started: [u64; MAX_DEPTH],
    /// The load may begin.
    running: bool,
    announced: bool,
    /// Options that are waiting for the requests in flight.
    change: Option<DiskOptions>,
    bench: Option<Bench>,
    next_flush: u64,
    silent: u64,
    count: Counters,
}

impl Block {
    /// Starts the device.
    pub fn new(
        device: Device,
        options: &DeviceOptions,
        scale: TscScale,
        ram: &mut FreeRam,
        boot: u32,
    ) -> Result<Self, &'static str> {
        const NO_MEMORY: &str = "no memory for the disk's buffers";
        let wanted = F_INDIRECT | F_READ_ONLY | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
        let features = device.negotiate(wanted)?;
        let queue = device.queue(ram, 0, QUEUE, features)?;
        let sectors = device.config64(0);
        let requests = phys::bytes(ram, (MAX_DEPTH + 1) * REQUEST as usize).ok_or(NO_MEMORY)?;
        let data = phys::bytes(ram, MAX_DEPTH * MAX_BLOCK as usize).ok_or(NO_MEMORY)?;
        let blocks = (options.disk.mib << 20).min(sectors.saturating_mul(SECTOR)) / SECTOR;
        // SAFETY: zero is a valid number.
        let table = unsafe { phys::allocate(ram, blocks as usize) }.ok_or(NO_MEMORY)?;
        device.go();
        let able = Abilities {
            write: features & F_READ_ONLY == 0,
            discard: features & F_DISCARD != 0,
            zero: features & F_WRITE_ZEROES != 0,
        };
        let mut block = Self {
            device,
            queue,
            signal: Signal::new(device, "disk", options.notify, scale),
            scale,
            requests: requests.as_mut_ptr() as u64,
            data: data.as_mut_ptr() as u64,
            sectors,
            features,
            id: None,
            load: Load::new(options.disk, able, sectors, boot, table),
            pacer: Pacer::new(options.disk.rate, scale.ticks_of_micros(1_000_000)),
            latencies: Latencies::EMPTY,
            started: [0; MAX_DEPTH],
            running: false,
            announced: false,
            change: None,
            bench: None,
            next_flush: 0,
            silent: 0,
            count: Counters::default(),
        };
        block.ask_for_id();
        Ok(block)
    }

    /// Lets the load begin.
    pub fn begin(&mut self) {
        self.running = true;
        self.announce();
        self.change = Some(*self.load.options());
    }

    /// Begins a new window.
    pub fn mark(&mut self) {
        self.count.longest = 0;
    }

    /// The console command `disk`: other options, once nothing is in flight any more.
    pub fn command(&mut self, text: &[u8]) {
        match self.load.options().with(text) {
            Some(options) => self.change = Some(options),
            None => report::error("disk needs options of the disk", text),
        }
    }

    /// Has the disk's interrupts get lost, for tests of what notices.
    pub fn deafen(&self) {
        self.signal.deafen();
    }

    /// The console command `spoil`: expects a later write than there was, as if that were lost.
    pub fn spoil(&mut self, block: u64) -> bool {
        self.load.spoil(block)
    }

    /// One turn's share. True if the vCPU has more to do than to wait.
    pub fn turn(&mut self, now: u64, elapsed: u64) -> bool {
        if !self.running {
            return false;
        }
        if self.bench.is_some() {
            self.bench_turn(now, elapsed);
            return true;
        }
        self.pacer.pass(elapsed);
        let Self { signal, queue, .. } = self;
        if signal.look(now, elapsed, || queue.has_used(&Memory)) {
            self.collect((TURN_BYTES / self.load.options().block).max(1));
        }
        self.watch(elapsed);
        if let Some(options) = self.change {
            if self.load.in_flight() == 0 {
                self.change = None;
                self.start(options, now);
            }
            return false;
        }
        if self.load.options().mode == DiskMode::Verify {
            self.submit(now, (TURN_BYTES / self.load.options().block).max(1));
        }
        false
    }

    fn start(&mut self, options: DiskOptions, now: u64) {
        self.load.change(options, self.sectors);
        self.announced = false;
        self.pacer = Pacer::new(options.rate, self.scale.ticks_of_micros(1_000_000));
        if options.mode == DiskMode::Bench && self.load.blocks() != 0 {
            self.latencies.clear();
            self.pacer = Pacer::new(None, 1);
            self.bench = Some(Bench {
                start: now,
                end: now + self.scale.ticks_of_micros(options.bench_ms * 1000),
                errors: self.count.errors,
                irqs: self.signal.irqs,
                notifies: self.count.notifies,
            });
        }
    }

    fn bench_turn(&mut self, now: u64, mut elapsed: u64) {
        let deadline = now + self.scale.ticks_of_micros(BENCH_TURN_US);
        let mut time = now;
        while time < deadline {
            let Self { signal, queue, .. } = self;
            if signal.look(time, elapsed, || queue.has_used(&Memory)) {
                self.collect(BENCH_REQUESTS);
            }
            let end = self.bench.as_ref().map_or(0, |bench| bench.end);
            if time < end {
                self.submit(time, BENCH_REQUESTS);
            } else if self.load.in_flight() == 0 {
                self.end_bench(time);
                return;
            }
            let now = tsc();
            elapsed = now.saturating_sub(time);
            self.watch(elapsed);
            time = now;
        }
    }

    /// Takes up to `most` requests that are done.
    fn collect(&mut self, most: u64) {
        for _ in 0..most {
            match self.queue.take(&Memory) {
                Ok(Some(done)) => self.complete(usize::from(done.token)),
                Ok(None) => {
                    self.signal.emptied(&[&self.queue]);
                    return;
                }
                Err(broken) => {
                    self.count.broken += 1;
                    let mut line = Line::event("virtio-broken");
                    line.text("device", "disk");
                    line.number("id", u64::from(broken.id));
                    console::offer(&mut line);
                }
            }
        }
    }

    fn complete(&mut self, slot: usize) {
        self.silent = 0;
        let status = phys::read8(self.request(slot) + STATUS_AT);
        if slot == ID_SLOT {
            self.keep_id(status);
            return;
        }
        let took = self.scale.nanoseconds(tsc().saturating_sub(self.started[slot]));
        self.count.longest = self.count.longest.max(took);
        let bench = self.bench.is_some();
        if bench {
            self.latencies.add(took);
        }
        let Some(job) = self.load.finish(slot, status == 0) else { return };
        if status != 0 {
            self.report_status(job, status);
            return;
        }
        let block = self.load.options().block;
        match job {
            Job::Read { block: number } => {
                self.count.reads += 1;
                self.count.bytes += block;
                if !bench {
                    self.check(slot, number);
                }
            }
            Job::Write { .. } => {
                self.count.writes += 1;
                self.count.bytes += block;
            }
            Job::Discard { .. } => self.count.discards += 1,
            Job::Zero { .. } => self.count.zeroes += 1,
            Job::Flush => self.count.flushes += 1,
        }
    }

    fn check(&mut self, slot: usize, block: u64) {
        let tag = match self.load.content(block) {
            Content::Unknown => return,
            Content::Zeros => None,
            Content::Stamped(tag) => Some(tag),
        };
        let first = block * self.load.sectors();
        let bytes = self.load.options().block;
        match disk::check(&Memory, self.buffer(slot), bytes, first, tag) {
            Ok(()) => self.count.verified += self.load.sectors(),
            Err(wrong) => {
                self.report_wrong(wrong);
                self.load.distrust(block);
            }
        }
    }

    /// Submits up to `most` requests that are due, and notifies once.
    fn submit(&mut self, now: u64, most: u64) {
        for _ in 0..most {
            let Some(slot) = self.load.free_slot() else { break };
            let flush = self.features & F_FLUSH != 0 && now >= self.next_flush;
            if self.bench.is_none() && flush && self.load.is_populated() {
                self.next_flush = now + self.scale.ticks_of_micros(FLUSH_US);
                self.issue(slot, Job::Flush);
                continue;
            }
            // The first pass is as fast as it can be: the load is what comes after.
            let populating = self.bench.is_none() && !self.load.is_populated();
            if !self.pacer.due() && !populating {
                break;
            }
            if !populating && !self.announced {
                self.announced = true;
                report::plain("disk-ready", now);
            }
            let Some(job) = self.load.pick() else { break };
            if !populating {
                self.pacer.spend();
            }
            self.issue(slot, job);
        }
        if self.queue.publish(&Memory) {
            self.count.notifies += 1;
            self.device.notify(0);
        }
    }

    fn issue(&mut self, slot: usize, job: Job) {
        let (request, buffer) = (self.request(slot), self.buffer(slot));
        let bytes = self.load.options().block;
        let sector = job.block().map_or(0, |block| block * self.load.sectors());
        let verify = self.bench.is_none();
        let (kind, data) = match job {
            Job::Read { .. } => {
                if verify {
                    disk::blot(&Memory, buffer, bytes);
                }
                (IN, Some(Segment::write(buffer, bytes as u32)))
            }
            Job::Write { generation, .. } => {
                if verify {
                    disk::stamp(&Memory, buffer, bytes, sector, self.load.tag(generation));
                }
                (OUT, Some(Segment::read(buffer, bytes as u32)))
            }
            Job::Discard { .. } => (DISCARD, Some(self.range(request, sector))),
            Job::Zero { .. } => (WRITE_ZEROES, Some(self.range(request, sector))),
            Job::Flush => (FLUSH, None),
        };
        // Where a range is sent, it says the sector.
        let sector = if matches!(kind, IN | OUT) { sector } else { 0 };
        if self.send(slot, kind, sector, data) {
            self.load.start(slot, job);
            self.started[slot] = tsc();
        }
    }

    fn range(&self, request: u64, sector: u64) -> Segment {
        Memory.store(request + RANGE_AT, sector);
        // Sectors, and flags: none.
        Memory.store(request + RANGE_AT + 8, self.load.sectors());
        Segment::read(request + RANGE_AT, 16)
    }

    fn send(&mut self, slot: usize, kind: u32, sector: u64, data: Option<Segment>) -> bool {
        let request = self.request(slot);
        Memory.store(request, u64::from(kind));
        Memory.store(request + 8, sector);
        phys::write8(request + STATUS_AT, NO_STATUS);
        let (header, status) = (Segment::read(request, 16), Segment::write(request + STATUS_AT, 1));
        match data {
            Some(data) => self.queue.add(&Memory, &[header, data, status], slot as u16),
            None => self.queue.add(&Memory, &[header, status], slot as u16),
        }
    }

    fn request(&self, slot: usize) -> u64 {
        self.requests + slot as u64 * REQUEST
    }

    fn buffer(&self, slot: usize) -> u64 {
        self.data + slot as u64 * MAX_BLOCK
    }

    /// Asks for the disk's name, and waits a little: there is no load yet.
    fn ask_for_id(&mut self) {
        let name = Segment::write(self.request(ID_SLOT) + ID_AT, ID_LENGTH);
        if self.send(ID_SLOT, GET_ID, 0, Some(name)) && self.queue.publish(&Memory) {
            self.device.notify(0);
        }
        let deadline = tsc() + self.scale.ticks_of_micros(20_000);
        while !self.queue.has_used(&Memory) && tsc() < deadline {}
        self.collect(1);
    }

    fn keep_id(&mut self, status: u8) {
        if status == 0 {
            let at = self.request(ID_SLOT) + ID_AT;
            self.id = Some(core::array::from_fn(|index| phys::read8(at + index as u64)));
        }
    }

    /// Looks whether requests are stuck.
    fn watch(&mut self, elapsed: u64) {
        if self.load.in_flight() == 0 {
            self.silent = 0;
            return;
        }
        self.silent += elapsed.min(self.scale.ticks_of_micros(10_000));
        if self.silent > self.scale.ticks_of_micros(STUCK_US) {
            self.silent = 0;
            self.count.stuck += 1;
            let status = self.device.status();
            let mut line = Line::event("disk-stuck");
            line.number("in_flight", self.load.in_flight() as u64);
            line.number("status", u64::from(status));
            line.flag("needs_reset", status & NEEDS_RESET != 0);
            line.number("used", u64::from(Memory.get16(self.queue.layout().used + 2)));
            line.number("available", u64::from(Memory.get16(self.queue.layout().available + 2)));
            console::offer(&mut line);
        }
    }
}

/// What the console hears of it.
impl Block {
    /// The device, as it was found.
    pub fn announce(&self) {
        let options = self.load.options();
        let mut line = Line::event("disk");
        line.hex("base", self.device.base());
        line.number("sectors", self.sectors);
        line.hex("features", self.features);
        if let Some(id) = &self.id {
            let end = id.iter().position(|&byte| byte == 0).unwrap_or(id.len());
            line.bytes("id", &id[..end]);
        }
        line.number("queue", u64::from(self.queue.layout().size));
        line.text("mode", options.mode.name());
        line.number("bs", options.block);
        line.number("depth", options.depth as u64);
        line.number("blocks", self.load.blocks());
        console::send(&mut line);
    }

    fn end_bench(&mut self, now: u64) {
        let Some(bench) = self.bench.take() else { return };
        // Later than asked for by the requests in flight at the end.
        let micros = (self.scale.nanoseconds(now - bench.start) / 1000).max(1);
        let (ops, options) = (self.latencies.count(), *self.load.options());
        let mut line = Line::event("disk-bench");
        line.text("op", options.op.name());
        line.text("order", options.order.name());
        line.number("bs", options.block);
        line.number("depth", options.depth as u64);
        line.micros("ms", micros);
        line.number("ops", ops);
        line.number("iops", ops * 1_000_000 / micros);
        // Thousandths, which the line writes as decimals.
        let rate = u128::from(ops * options.block) * 1_000_000_000 / u128::from(micros);
        line.micros("mib_per_s", (rate >> 20) as u64);
        line.micros("min_us", self.latencies.min());
        line.micros("median_us", self.latencies.percentile(50));
        line.micros("p99_us", self.latencies.percentile(99));
        line.micros("max_us", self.latencies.max());
        line.number("errors", self.count.errors - bench.errors);
        line.number("irqs", self.signal.irqs - bench.irqs);
        line.number("notifies", self.count.notifies - bench.notifies);
        console::send(&mut line);
        self.load.change(DiskOptions { mode: DiskMode::Off, ..options }, self.sectors);
    }

    #[cold]
    fn report_status(&mut self, job: Job, status: u8) {
        self.count.errors += 1;
        let mut line = Line::event("disk-error");
        line.text("kind", "status");
        line.text(
            "op",
            match job {
                Job::Read { .. } => "read",
                Job::Write { .. } => "write",
                Job::Discard { .. } => "discard",
                Job::Zero { .. } => "write-zeroes",
                Job::Flush => "flush",
            },
        );
        line.optional("sector", job.block().map(|block| block * self.load.sectors()));
        line.number("status", u64::from(status));
        console::offer(&mut line);
    }

    #[cold]
    fn report_wrong(&mut self, wrong: Wrong) {
        self.count.errors += 1;
        let mut line = Line::event("disk-error");
        line.text("kind", wrong.kind.name());
        line.text("op", "read");
        line.number("sector", wrong.sector);
        line.number("expected_generation", u64::from(wrong.expected));
        line.number("found_generation", u64::from(wrong.found));
        line.number("found_sector", wrong.found_sector);
        console::offer(&mut line);
    }

    /// The fields of the `report` event.
    pub fn report(&self, line: &mut Line) {
        let count = &self.count;
        line.number("disk_reads", count.reads);
        line.number("disk_writes", count.writes);
        line.number("disk_bytes", count.bytes);
        line.number("disk_flushes", count.flushes);
        line.number("disk_discards", count.discards);
        line.number("disk_zeroes", count.zeroes);
        line.number("disk_verified", count.verified);
        line.number("disk_errors", count.errors);
        line.number("disk_stuck", count.stuck);
        line.number("disk_broken", count.broken);
        line.number("disk_in_flight", self.load.in_flight() as u64);
        line.micros("disk_longest_us", count.longest);
        line.number("disk_notifies", count.notifies);
        line.number("disk_irqs", self.signal.irqs);
        line.number("disk_irqs_lost", self.signal.lost);
    }
}
