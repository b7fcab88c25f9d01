//! virtio over memory-mapped registers: finding devices, starting them, and learning what they did.
//!
//! Source: VIRTIO 1.2, 3.1 (initialization), 4.2 (MMIO).
#![allow(unsafe_code)]

use core::sync::atomic::Ordering::Relaxed;

use beacon_core::devices::{Notify, Window};
use beacon_core::json::Line;
use beacon_core::memory::FreeRam;
use beacon_core::queue::{Layout, Queue, Slot};
use beacon_core::time::TscScale;

use crate::phys::{self, read32, read8, write32, Memory};
use crate::{console, ioapic, ring0};

const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0A0;
const GENERATION: u64 = 0x0FC;
const CONFIG: u64 = 0x100;

const MAGIC_VALUE: u32 = 0x7472_6976;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// The device gave up.
pub const NEEDS_RESET: u32 = 64;
const CONFIG_CHANGED: u32 = 2;

/// Indirect descriptors.
pub const F_INDIRECT: u64 = 1 << 28;
/// Event indices.
pub const F_EVENT_INDEX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

/// Network card.
pub const NET: u32 = 1;
/// Block device.
pub const BLOCK: u32 = 2;
/// Entropy source.
pub const RNG: u32 = 4;
/// Memory balloon.
pub const BALLOON: u32 = 5;

/// The configuration is looked at this often where no interrupt says that it changed.
const CONFIG_POLL_US: u64 = 100_000;
/// An interrupt that does not come for this long is lost.
const LOST_US: u64 = 1_000_000;
/// And for so many turns: after a pause of the VM it gets its chance.
const LOST_TURNS: u64 = 1000;
/// A turn counts for at most this much.
const TURN_MAX_US: u64 = 10_000;

/// A device's registers.
#[derive(Clone, Copy)]
pub struct Device {
    window: Window,
    /// What it is.
    pub id: u32,
    /// Which of beacon's interrupt counters it uses.
    line: usize,
}

impl Device {
    /// The device in a window, unless that is empty or legacy.
    pub fn probe(window: Window, line: usize) -> Option<Self> {
        let device = Self { window, id: read32(window.base + DEVICE_ID), line };
        let modern = device.read(MAGIC) == MAGIC_VALUE && device.read(VERSION) == 2;
        (modern && device.id != 0).then_some(device)
    }

    /// Address of the registers.
    pub fn base(&self) -> u64 {
        self.window.base
    }

    fn read(&self, register: u64) -> u32 {
        read32(self.window.base + register)
    }

    fn write(&self, register: u64, value: u32) {
        write32(self.window.base + register, value);
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.read(STATUS)
    }

    /// Stops the device.
    pub fn reset(&self) {
        self.write(STATUS, 0);
        // It may take a while, but a device that never gets there is no reason to hang.
        for _ in 0..1000 {
            if self.status() == 0 {
                return;
            }
        }
    }

    /// Resets the device and agrees on features; gives those that both sides have.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, &'static str> {
        self.reset();
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let offered = [0, 1].map(|half| {
            self.write(DEVICE_FEATURES_SELECT, half);
            self.read(DEVICE_FEATURES)
        });
        let offered = u64::from(offered[0]) | u64::from(offered[1]) << 32;
        if offered & F_VERSION_1 == 0 {
            return Err("the device is not a virtio 1 device");
        }
        let features = offered & (wanted | F_VERSION_1 | F_EVENT_INDEX);
        for (half, value) in [(0, features), (1, features >> 32)] {
            self.write(DRIVER_FEATURES_SELECT, half);
            self.write(DRIVER_FEATURES, value as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            return Err("the device does not take its own features");
        }
        Ok(features)
    }

    /// Lays out a queue of at most `size` entries and tells the device.
    pub fn queue(
        &self,
        ram: &mut FreeRam,
        index: u32,
        size: u16,
        features: u64,
    ) -> Result<Queue, &'static str> {
        self.write(QUEUE_SELECT, index);
        let size = self.read(QUEUE_SIZE_MAX).min(u32::from(size)) as u16;
        if size == 0 {
            return Err("the device lacks a queue");
        }
        let size = 1 << size.ilog2();
        let bytes = Layout::new(0, size).bytes;
        // SAFETY: zero is valid for both.
        let memory = unsafe {
            (
                phys::allocate::<u8>(ram, bytes as usize),
                phys::allocate::<Slot>(ram, usize::from(size)),
            )
        };
        let (Some(memory), Some(slots)) = memory else { return Err("no memory for a queue") };
        let layout = Layout::new(memory.as_mut_ptr() as u64, size);
        self.register(index, &layout);
        let (event, indirect) = (features & F_EVENT_INDEX != 0, features & F_INDIRECT != 0);
        Ok(Queue::new(layout, slots, event, indirect))
    }

    /// Tells the device of a queue.
    fn register(&self, index: u32, layout: &Layout) {
        self.set_queue(index, layout.size, [layout.descriptors, layout.available, layout.used]);
    }

    /// The same for descriptors, available and used ring anywhere.
    pub fn set_queue(&self, index: u32, size: u16, parts: [u64; 3]) {
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, u32::from(size));
        let registers = [QUEUE_DESCRIPTORS, QUEUE_DRIVER, QUEUE_DEVICE];
        for (register, address) in registers.into_iter().zip(parts) {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    /// Ends the set-up.
    pub fn go(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Tells the device that a queue has something new.
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// A byte of the configuration.
    pub fn config8(&self, offset: u64) -> u8 {
        read8(self.window.base + CONFIG + offset)
    }

    /// 32 bits of the configuration.
    pub fn config32(&self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    /// 64 bits of the configuration, from one generation of it.
    pub fn config64(&self, offset: u64) -> u64 {
        loop {
            let before = self.read(GENERATION);
            let value =
                u64::from(self.config32(offset)) | u64::from(self.config32(offset + 4)) << 32;
            if self.read(GENERATION) == before {
                return value;
            }
        }
    }

    /// Writes 32 bits of the configuration.
    pub fn set_config32(&self, offset: u64, value: u32) {
        self.write(CONFIG + offset, value);
    }

    /// Reads and acknowledges what the interrupt was about.
    fn acknowledge(&self) -> u32 {
        let status = self.read(INTERRUPT_STATUS);
        if status != 0 {
            self.write(INTERRUPT_ACK, status);
        }
        status
    }
}

/// How a driver learns that its device did something.
pub struct Signal {
    device: Device,
    name: &'static str,
    mode: Notify,
    /// There may be used buffers.
    draining: bool,
    config_changed: bool,
    next_poll: u64,
    poll: u64,
    /// Interrupts seen so far.
    pub irqs: u64,
    /// Used buffers that no interrupt told of.
    pub lost: u64,
    silent: u64,
    silent_turns: u64,
    lost_after: u64,
    turn_max: u64,
}

impl Signal {
    /// For a device whose interrupt goes to this vCPU from now on, if it is wanted.
    pub fn new(device: Device, name: &'static str, mode: Notify, scale: TscScale) -> Self {
        if mode == Notify::Irq {
            ioapic::route(device.window.irq, ring0::device_vector(device.line));
        }
        Self {
            device,
            name,
            mode,
            draining: true,
            config_changed: false,
            next_poll: 0,
            poll: scale.ticks_of_micros(CONFIG_POLL_US),
            irqs: 0,
            lost: 0,
            silent: 0,
            silent_turns: 0,
            lost_after: scale.ticks_of_micros(LOST_US),
            turn_max: scale.ticks_of_micros(TURN_MAX_US),
        }
    }

    /// Whether to look at the rings in this turn. `pending`: whether they have something.
    pub fn look(&mut self, now: u64, elapsed: u64, pending: impl FnOnce() -> bool) -> bool {
        if self.mode == Notify::Poll {
            if now >= self.next_poll {
                self.next_poll = now + self.poll;
                self.config_changed |= self.device.acknowledge() & CONFIG_CHANGED != 0;
            }
            return true;
        }
        let irqs = ring0::device_irqs(self.device.line).load(Relaxed);
        if irqs != self.irqs {
            self.irqs = irqs;
            // In this order: what happens from here on makes a new interrupt, and what happened
            // before is in the rings.
            self.config_changed |= self.device.acknowledge() & CONFIG_CHANGED != 0;
            self.draining = true;
        } else if !self.draining && pending() {
            self.silent += elapsed.min(self.turn_max);
            self.silent_turns += 1;
            if self.silent > self.lost_after && self.silent_turns > LOST_TURNS {
                self.lost += 1;
                self.draining = true;
                let mut line = Line::event("irq-lost");
                line.text("device", self.name);
                line.number("irqs", self.irqs);
                line.number("lost", self.lost);
                console::offer(&mut line);
                // What the device waits for, if it does.
                self.config_changed |= self.device.acknowledge() & CONFIG_CHANGED != 0;
            }
        } else {
            (self.silent, self.silent_turns) = (0, 0);
        }
        self.draining
    }

    /// The rings were emptied: asks for interrupts again, or goes without.
    pub fn emptied(&mut self, queues: &[&Queue]) {
        if self.mode == Notify::Poll {
            queues.iter().for_each(|queue| queue.disarm(&Memory));
            return;
        }
        queues.iter().for_each(|queue| queue.arm(&Memory));
        self.draining = queues.iter().any(|queue| queue.has_used(&Memory));
        (self.silent, self.silent_turns) = (0, 0);
    }

    /// Has the device's interrupts get lost, for tests of what notices.
    pub fn deafen(&self) {
        ioapic::mask(self.device.window.irq);
    }

    /// Whether the configuration changed since the last call.
    pub fn take_config_change(&mut self) -> bool {
        core::mem::take(&mut self.config_changed)
    }
}
