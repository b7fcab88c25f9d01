//! The virtio devices that are there and asked for. Only vCPU 0 uses them.

use beacon_core::devices::{DeviceOptions, DiskMode};
use beacon_core::json::Line;
use beacon_core::memory::FreeRam;
use beacon_core::time::TscScale;

use crate::attack::Attack;
use crate::balloon::Balloon;
use crate::block::Block;
use crate::net::Net;
use crate::rng::Rng;
use crate::virtio::{self, Device};
use crate::{console, phys, report, ring0};

/// One of each kind at most.
pub struct Devices {
    block: Option<&'static mut Block>,
    net: Option<&'static mut Net>,
    rng: Option<&'static mut Rng>,
    balloon: Option<&'static mut Balloon>,
    attack: Option<&'static mut Attack>,
    problems: [Option<Problem>; MAX_PROBLEMS],
    last: Option<u64>,
}

const MAX_PROBLEMS: usize = 5;

/// A device that was asked for and does not work.
#[derive(Clone, Copy)]
struct Problem {
    device: &'static str,
    text: &'static str,
}

impl Devices {
    /// Finds and starts the devices. `boot` is a number that no other boot has.
    pub fn new(options: &DeviceOptions, scale: TscScale, ram: &mut FreeRam, boot: u32) -> Self {
        let mut devices = Self {
            block: None,
            net: None,
            rng: None,
            balloon: None,
            attack: None,
            problems: [None; MAX_PROBLEMS],
            last: None,
        };
        let found = options
            .windows()
            .iter()
            .take(ring0::DEVICE_LINES)
            .enumerate()
            .filter_map(|(line, &window)| Device::probe(window, line));
        for device in found {
            match device.id {
                virtio::BLOCK if options.disk.mode != DiskMode::Off && devices.block.is_none() => {
                    let block = Block::new(device, options, scale, ram, boot);
                    devices.block = devices.keep("disk", ram, block);
                }
                virtio::BLOCK if options.attack.is_some() && devices.attack.is_none() => {
                    let attack = Attack::new(device, options, scale, ram);
                    devices.attack = devices.keep("attack", ram, attack);
                }
                virtio::NET if options.net.ip.is_some() && devices.net.is_none() => {
                    let net = Net::new(device, options, scale, ram);
                    devices.net = devices.keep("net", ram, net);
                }
                virtio::RNG if options.rng && devices.rng.is_none() => {
                    let rng = Rng::new(device, options, scale, ram);
                    devices.rng = devices.keep("rng", ram, rng);
                }
                virtio::BALLOON if options.balloon && devices.balloon.is_none() => {
                    let balloon = Balloon::new(device, options, scale, ram);
                    devices.balloon = devices.keep("balloon", ram, balloon);
                }
                _ => (),
            }
        }
        for (device, wanted, there) in [
            ("disk", options.disk.mode != DiskMode::Off, devices.block.is_some()),
            ("net", options.net.ip.is_some(), devices.net.is_some()),
            ("rng", options.rng, devices.rng.is_some()),
            ("balloon", options.balloon, devices.balloon.is_some()),
            ("attack", options.attack.is_some(), devices.attack.is_some()),
        ] {
            let known = devices.problems.iter().flatten().any(|problem| problem.device == device);
            if wanted && !there && !known {
                devices.complain(device, "no such device");
            }
        }
        devices
    }

    fn keep<T>(
        &mut self,
        device: &'static str,
        ram: &mut FreeRam,
        driver: Result<T, &'static str>,
    ) -> Option<&'static mut T> {
        let kept = driver.and_then(|driver| phys::keep(ram, driver).ok_or("no memory"));
        kept.inspect_err(|text| self.complain(device, text)).ok()
    }

    fn complain(&mut self, device: &'static str, text: &'static str) {
        if let Some(place) = self.problems.iter_mut().find(|place| place.is_none()) {
            *place = Some(Problem { device, text });
        }
    }

    /// Says what was found.
    pub fn announce(&self) {
        if let Some(net) = &self.net {
            net.announce();
        }
        if let Some(rng) = &self.rng {
            rng.announce();
        }
        if let Some(balloon) = &self.balloon {
            balloon.announce();
        }
        if let Some(attack) = &self.attack {
            attack.announce();
        }
        for problem in self.problems.iter().flatten() {
            let mut line = Line::event("error");
            line.text("text", problem.text);
            line.text("device", problem.device);
            console::send(&mut line);
        }
    }

    /// Lets the loads begin: what comes from now on is measured.
    pub fn begin(&mut self) {
        if let Some(block) = &mut self.block {
            block.begin();
        }
    }

    /// Begins a new window.
    pub fn mark(&mut self) {
        if let Some(block) = &mut self.block {
            block.mark();
        }
        if let Some(net) = &mut self.net {
            net.mark();
        }
    }

    /// The console command `disk`.
    pub fn disk_command(&mut self, text: &[u8]) {
        match &mut self.block {
            Some(block) => block.command(text),
            None => report::error("there is no disk", text),
        }
    }

    /// The console command `spoil`; false if there is no such block.
    pub fn spoil(&mut self, block: u64) -> bool {
        self.block.as_mut().is_some_and(|disk| disk.spoil(block))
    }

    /// The console command `deafen`.
    pub fn deafen(&self) {
        if let Some(block) = &self.block {
            block.deafen();
        }
    }

    /// One turn's share of all devices. True if the vCPU has more to do than to wait.
    pub fn turn(&mut self, now: u64) -> bool {
        let elapsed = now.saturating_sub(self.last.replace(now).unwrap_or(now));
        if let Some(net) = &mut self.net {
            net.turn(now, elapsed);
        }
        if let Some(rng) = &mut self.rng {
            rng.turn(now, elapsed);
        }
        if let Some(balloon) = &mut self.balloon {
            balloon.turn(now, elapsed);
        }
        if let Some(attack) = &mut self.attack {
            attack.turn(elapsed);
        }
        self.block.as_mut().is_some_and(|block| block.turn(now, elapsed))
    }

    /// The fields of the `report` event.
    pub fn report(&self, line: &mut Line) {
        if let Some(block) = &self.block {
            block.report(line);
        }
        if let Some(net) = &self.net {
            net.report(line);
        }
        if let Some(rng) = &self.rng {
            rng.report(line);
        }
        if let Some(balloon) = &self.balloon {
            balloon.report(line);
        }
        if let Some(attack) = &self.attack {
            attack.report(line);
        }
    }
}
