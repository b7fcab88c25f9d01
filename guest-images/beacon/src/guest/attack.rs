//! A driver of a block device that breaks the rules at random, to see that the VMM lives.
//!
//! What the device may write is kept apart, so that only a VMM that is broken can hurt beacon: a
//! descriptor that the device may write to lies in the data area, or where there is no RAM. The
//! device reads descriptors from the table area only, which no descriptor lets it write to.
//!
//! ```text
//! table area   descriptors, available ring, indirect tables
//! data area    used ring, request, buffers
//! ```

use beacon_core::devices::DeviceOptions;
use beacon_core::json::Line;
use beacon_core::memory::FreeRam;
use beacon_core::mix;
use beacon_core::pacer::Pacer;
use beacon_core::pages::Words;
use beacon_core::queue::Ram;
use beacon_core::time::TscScale;

use crate::console;
use crate::phys::{self, Memory};
use crate::virtio::{Device, NEEDS_RESET};

/// Bytes of each area.
const AREA: usize = 64 << 10;
const AVAILABLE: u64 = 0x4000;
const INDIRECT: u64 = 0x8000;
const USED: u64 = 0;
const REQUEST: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const BUFFER: u64 = 0x9000;
const BUFFER_BYTES: u32 = 4096;
const QUEUE: u16 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// Misdeeds per second.
const RATE: u64 = 1000;
/// After so many misdeeds the device is reset and asked for something good.
const ROUND: u64 = 32;
/// A good request must be answered within so many turns of at least 20 µs.
const PATIENCE: u64 = 100_000;

#[derive(PartialEq)]
enum Stage {
    Attacking,
    /// A good request is on its way, since so many turns.
    Waiting(u64),
}

/// The attacker.
pub struct Attack {
    device: Device,
    pacer: Pacer,
    random: u64,
    table: u64,
    data: u64,
    available: u16,
    stage: Stage,
    misdeeds: u64,
    resets: u64,
    needed: u64,
    good: u64,
    silent: u64,
    refused: u64,
}

impl Attack {
    /// Takes the device over.
    pub fn new(
        device: Device,
        options: &DeviceOptions,
        scale: TscScale,
        ram: &mut FreeRam,
    ) -> Result<Self, &'static str> {
        const NO_MEMORY: &str = "no memory for the attack";
        let table = phys::bytes(ram, AREA).ok_or(NO_MEMORY)?.as_mut_ptr() as u64;
        let data = phys::bytes(ram, AREA).ok_or(NO_MEMORY)?.as_mut_ptr() as u64;
        let mut attack = Self {
            device,
            pacer: Pacer::new(Some(RATE), scale.ticks_of_micros(1_000_000)),
            random: mix(options.attack.unwrap_or(0)),
            table,
            data,
            available: 0,
            stage: Stage::Attacking,
            misdeeds: 0,
            resets: 0,
            needed: 0,
            good: 0,
            silent: 0,
            refused: 0,
        };
        attack.restart();
        Ok(attack)
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random() % bound
    }

    /// Sets the device up as one should.
    fn restart(&mut self) {
        const BOTH: u64 = 1 << 28 | 1 << 29;
        self.resets += 1;
        let wanted = if self.random() & 1 == 0 { BOTH } else { 0 };
        if self.device.negotiate(wanted).is_err() {
            self.refused += 1;
        }
        for offset in (0..AREA as u64).step_by(8) {
            Memory.store(self.table + offset, 0);
        }
        Memory.store(self.data + USED, 0);
        self.available = 0;
        self.device.set_queue(0, QUEUE, [self.table, self.table + AVAILABLE, self.data + USED]);
        self.device.go();
    }

    fn descriptor(&self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        Memory.put64(at, address);
        Memory.put32(at + 8, length);
        Memory.put16(at + 12, flags);
        Memory.put16(at + 14, next);
    }

    fn entry(&self, index: u64) -> u64 {
        self.table + index * 16
    }

    /// A descriptor chain as it should be, from descriptor 0 on: read a sector.
    fn good_chain(&self, kind: u32, sector: u64) {
        Memory.store(self.data + REQUEST, u64::from(kind));
        Memory.store(self.data + REQUEST + 8, sector);
        phys::write8(self.data + STATUS, 0xFF);
        self.descriptor(self.entry(0), self.data + REQUEST, 16, NEXT, 1);
        self.descriptor(self.entry(1), self.data + BUFFER, BUFFER_BYTES, NEXT | WRITE, 2);
        self.descriptor(self.entry(2), self.data + STATUS, 1, WRITE, 0);
    }

    fn offer(&mut self, head: u16) {
        let place = u64::from(self.available % QUEUE);
        Memory.put16(self.table + AVAILABLE + 4 + 2 * place, head);
        self.available = self.available.wrapping_add(1);
        Memory.put16(self.table + AVAILABLE + 2, self.available);
    }

    /// One turn's share: at most one misdeed.
    pub fn turn(&mut self, elapsed: u64) {
        if let Stage::Waiting(turns) = self.stage {
            self.wait(turns);
            return;
        }
        self.pacer.pass(elapsed);
        if !self.pacer.due() {
            return;
        }
        self.pacer.spend();
        self.misdeeds += 1;
        if self.misdeeds % 8 == 0 && self.device.status() & NEEDS_RESET != 0 {
            self.needed += 1;
            self.restart();
        } else if self.misdeeds % ROUND == 0 {
            self.restart();
            self.good_chain(0, 0);
            self.offer(0);
            self.device.notify(0);
            self.stage = Stage::Waiting(0);
        } else {
            self.misdeed();
        }
    }

    fn wait(&mut self, turns: u64) {
        let done = Memory.get16(self.data + USED + 2) != 0;
        let good = done && phys::read8(self.data + STATUS) == 0;
        if good {
            self.good += 1;
        } else if done || turns == PATIENCE {
            self.silent += 1;
            let mut line = Line::event("attack-silent");
            line.number("misdeeds", self.misdeeds);
            line.flag("answered", done);
            line.number("status", u64::from(self.device.status()));
            console::offer(&mut line);
        }
        let over = good || done || turns == PATIENCE;
        self.stage = if over { Stage::Attacking } else { Stage::Waiting(turns + 1) };
    }

    /// An address where there is no RAM.
    fn nowhere(&mut self) -> u64 {
        let noise = self.below(1 << 20);
        match self.below(5) {
            0 => u64::MAX - noise,
            1 => (1 << 52) + noise,
            2 => (1 << 46) - noise,
            // Between the devices and the end of the first 4 GiB.
            3 => 0xFF00_0000 + noise,
            _ => (1 << 63) | noise,
        }
    }

    fn misdeed(&mut self) {
        let (sector, noise) = (self.random(), self.random() as u32);
        self.good_chain(noise % 16, 0);
        match self.below(16) {
            0 => self.descriptor(self.entry(1), self.data + BUFFER, 512, NEXT | WRITE, 0),
            1 => {
                let address = self.nowhere();
                self.descriptor(self.entry(self.misdeeds % 3), address, noise, NEXT | WRITE, 2);
            }
            2 => {
                // The device only reads this one, so it may be as long as it likes.
                self.good_chain(1, 0);
                self.descriptor(self.entry(1), self.data + BUFFER, u32::MAX, NEXT, 2);
            }
            3 => self.available = self.available.wrapping_add(noise as u16),
            4 => return self.offer_and_notify(noise as u16),
            5 => return self.device.notify(noise),
            6 => self.good_chain(noise, sector),
            7 => {
                // A table that is no whole number of descriptors, or empty, or names itself.
                let table = self.table + INDIRECT;
                let address = self.data + BUFFER;
                self.descriptor(table, address, 512, NEXT | WRITE, noise as u16);
                self.descriptor(table + 16, table, 32, INDIRECT_FLAG, 0);
                let length = [0, 1, 15, 17, 32, 0x1000][self.misdeeds as usize % 6];
                self.descriptor(
                    self.entry(0),
                    table,
                    length,
                    INDIRECT_FLAG | noise as u16 & NEXT,
                    1,
                );
            }
            8 => {
                let address = self.nowhere();
                self.descriptor(self.entry(0), address, noise, INDIRECT_FLAG, 0);
            }
            9 => self.descriptor(self.entry(2), self.data + STATUS, 0, WRITE, 0),
            10 => self.descriptor(self.entry(2), self.data + STATUS, 1, 0, 0),
            11 => return self.wild_register(noise),
            12 => return self.odd_configuration(noise),
            13 => return self.move_queue(noise),
            14 => {
                // Notify before the device is ready.
                self.device.reset();
                self.device.notify(0);
                self.offer(0);
                self.device.notify(0);
                return;
            }
            _ => {
                // Without a status, and without a header.
                self.descriptor(
                    self.entry(noise as u64 % 3),
                    self.data + REQUEST,
                    noise % 16,
                    0,
                    0,
                );
            }
        }
        self.offer_and_notify(0);
    }

    fn offer_and_notify(&mut self, head: u16) {
        self.offer(head);
        self.device.notify(0);
    }

    /// Any value in any register but those that say where queues lie.
    fn wild_register(&mut self, noise: u32) {
        const REGISTERS: [u64; 15] = [
            0x000, 0x004, 0x008, 0x00C, 0x010, 0x014, 0x020, 0x024, 0x030, 0x038, 0x044, 0x050,
            0x060, 0x064, 0x070,
        ];
        let register = REGISTERS[self.below(REGISTERS.len() as u64) as usize];
        phys::write32(self.device.base() + register, noise);
    }

    /// Accesses of every width and alignment to registers and configuration.
    fn odd_configuration(&mut self, noise: u32) {
        let at = self.device.base() + 0x100 + self.below(0x100);
        match self.below(4) {
            0 => phys::write8(at, noise as u8),
            1 => phys::write32(at & !3, noise),
            2 => phys::write16_anywhere(at, noise as u16),
            _ => {
                let _ = phys::read8(self.device.base() + self.below(0x100));
            }
        }
    }

    /// Moves the queue while it is in use, to where there is no RAM or between two places.
    fn move_queue(&mut self, noise: u32) {
        let mut parts = [self.table, self.table + AVAILABLE, self.data + USED];
        match noise % 4 {
            0 => parts[1] += u64::from(noise >> 8 & 0xFF),
            1 => parts[2] += u64::from(noise >> 8 & 0xFF),
            _ => parts[noise as usize / 4 % 3] = self.nowhere(),
        }
        // None that is larger than the queue and yet allowed: QEMU 10 takes it at once, reads the ring as far as that,
        // and aborts, for it has mapped only what the queue had.
        let size = [QUEUE, 0, 1, 3, u16::MAX, 2048][self.below(6) as usize];
        self.device.set_queue(0, size, parts);
        self.device.notify(0);
    }

    /// The device, as it was found.
    pub fn announce(&self) {
        let mut line = Line::event("attack");
        line.hex("base", self.device.base());
        console::send(&mut line);
    }

    /// The fields of the `report` event.
    pub fn report(&self, line: &mut Line) {
        line.number("attack_misdeeds", self.misdeeds);
        line.number("attack_resets", self.resets);
        line.number("attack_needs_reset", self.needed);
        line.number("attack_good", self.good);
        line.number("attack_silent", self.silent);
        line.number("attack_refused", self.refused);
    }
}
