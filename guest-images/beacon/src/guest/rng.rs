//! The entropy source: random bytes now and then.
//!
//! Source: VIRTIO 1.2, 5.4.

use beacon_core::devices::DeviceOptions;
use beacon_core::json::Line;
use beacon_core::memory::FreeRam;
use beacon_core::pacer::Pacer;
use beacon_core::queue::{Queue, Segment};
use beacon_core::time::TscScale;

use crate::console;
use crate::phys::{self, Memory};
use crate::virtio::{Device, Signal};

const QUEUE: u16 = 8;
/// Bytes of a request.
const REQUEST: usize = 64;
/// Requests per second.
const RATE: u64 = 10;
/// Answers shorter than this may be equal or zero by chance.
const TELLING: usize = 8;

/// The entropy source.
pub struct Rng {
    device: Device,
    queue: Queue,
    signal: Signal,
    buffer: &'static mut [u8],
    last: [u8; REQUEST],
    last_length: usize,
    pacer: Pacer,
    waiting: bool,
    requests: u64,
    bytes: u64,
    errors: u64,
}

impl Rng {
    /// Starts the device.
    pub fn new(
        device: Device,
        options: &DeviceOptions,
        scale: TscScale,
        ram: &mut FreeRam,
    ) -> Result<Self, &'static str> {
        let features = device.negotiate(0)?;
        let queue = device.queue(ram, 0, QUEUE, features)?;
        let buffer = phys::bytes(ram, REQUEST).ok_or("no memory for random bytes")?;
        device.go();
        Ok(Self {
            device,
            queue,
            signal: Signal::new(device, "rng", options.notify, scale),
            buffer,
            last: [0; REQUEST],
            last_length: 0,
            pacer: Pacer::new(Some(RATE), scale.ticks_of_micros(1_000_000)),
            waiting: false,
            requests: 0,
            bytes: 0,
            errors: 0,
        })
    }

    /// One turn's share.
    pub fn turn(&mut self, now: u64, elapsed: u64) {
        self.pacer.pass(elapsed);
        let Self { signal, queue, .. } = self;
        if signal.look(now, elapsed, || queue.has_used(&Memory)) {
            match self.queue.take(&Memory) {
                Ok(Some(done)) => self.check(done.length as usize),
                Ok(None) => self.signal.emptied(&[&self.queue]),
                Err(_) => self.errors += 1,
            }
        }
        if self.waiting || !self.pacer.due() {
            return;
        }
        self.pacer.spend();
        self.buffer.fill(0);
        let segment = Segment::write(self.buffer.as_mut_ptr() as u64, REQUEST as u32);
        self.waiting = self.queue.add(&Memory, &[segment], 0);
        if self.queue.publish(&Memory) {
            self.device.notify(0);
        }
    }

    /// Each answer must bring bytes, and other ones than the last.
    fn check(&mut self, length: usize) {
        self.waiting = false;
        self.requests += 1;
        let bytes = &self.buffer[..length.min(REQUEST)];
        let kind = if bytes.is_empty() || length > REQUEST {
            Some("length")
        } else if bytes.len() >= TELLING && bytes.iter().all(|&byte| byte == 0) {
            Some("zero")
        } else if bytes.len() >= TELLING && *bytes == self.last[..self.last_length] {
            Some("same")
        } else {
            None
        };
        self.bytes += bytes.len() as u64;
        self.last_length = bytes.len();
        self.last[..bytes.len()].copy_from_slice(bytes);
        if let Some(kind) = kind {
            self.errors += 1;
            let mut line = Line::event("rng-error");
            line.text("kind", kind);
            line.number("length", length as u64);
            console::offer(&mut line);
        }
    }

    /// The device, as it was found.
    pub fn announce(&self) {
        let mut line = Line::event("rng");
        line.hex("base", self.device.base());
        console::send(&mut line);
    }

    /// The fields of the `report` event.
    pub fn report(&self, line: &mut Line) {
        line.number("rng_requests", self.requests);
        line.number("rng_bytes", self.bytes);
        line.number("rng_errors", self.errors);
        line.number("rng_irqs", self.signal.irqs);
        line.number("rng_irqs_lost", self.signal.lost);
    }
}
