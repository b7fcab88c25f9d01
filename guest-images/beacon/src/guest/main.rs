//! `beacon`: a freestanding guest that measures its own pauses and checks its own memory.
//!
//! Ring 0 is a thin layer of assembly (`ring0.s`); everything else runs in ring 3, because on a KVM
//! without hardware virtualization only ring 3 runs at native speed. `README.md` has the options,
//! the events and how to start it.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

mod apic;
mod attack;
mod balloon;
mod block;
mod clock;
mod console;
mod cpu;
mod devices;
mod exception;
mod exits;
mod fpu;
mod ioapic;
mod mem;
mod net;
mod operator;
mod phys;
mod power;
mod report;
mod ring0;
mod rng;
mod smp;
mod virtio;
mod worker;
mod world;

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use beacon_core::acpi::Acpi;
use beacon_core::boot::{BootInfo, Protocol};
use beacon_core::config::{Config, Mode, WorkingSet, MAX_CPUS};
use beacon_core::memory::Placement;
use beacon_core::mix;
use beacon_core::pages::PAGE_SIZE;

use crate::devices::Devices;
use crate::exception::fatal;
use crate::operator::Operator;
use crate::phys::Memory;
use crate::worker::Worker;
use crate::world::{Control, Shared, World};

/// Where vCPU 0 comes out of `ring0.s`, in ring 3: the protocol, the address of what the loader
/// left, and the TSC at entry.
#[no_mangle]
extern "C" fn beacon_main(protocol: u32, info: u64, tsc_entry: u64) -> ! {
    ring0::fill_tss(0);
    ring0::fill_idt();
    console::init();
    let protocol = if protocol == 0 { Protocol::Pvh } else { Protocol::Linux };
    let info = match BootInfo::read(&Memory, protocol, info) {
        Ok(info) => info,
        Err(text) => fatal(text),
    };
    let acpi = Acpi::read(&Memory, info.rsdp);
    apic::mask_pics();
    apic::init();
    let (world, devices, ids, areas) = build_world(&info, &acpi, tsc_entry);
    apic::start_timer(world.scale);

    report::boot(world, &info, protocol);
    devices.announce();
    if let Err(id) = smp::start(world, ids.others(), areas) {
        let mut line = beacon_core::json::Line::event("error");
        line.text("text", "a processor does not start");
        line.number("apic_id", u64::from(id));
        console::send(&mut line);
        fatal("start the VM with the processors that the ACPI tables list, or say cpus=N");
    }
    // The others populate their pages meanwhile.
    console::flush();
    run(world, devices, acpi)
}

/// APIC ids, this processor's first.
struct Ids {
    ids: [u32; MAX_CPUS as usize],
    count: usize,
}

impl Ids {
    /// The processors of ACPI, or `count` processors: those of ACPI first, then the numbers
    /// that follow.
    fn new(acpi: &Acpi, own: u32, count: Option<u32>) -> Self {
        let mut ids = Self { ids: [own; MAX_CPUS as usize], count: 1 };
        let count = count.map_or(acpi.cpus().len().max(1), |count| count as usize);
        let guesses = 0..MAX_CPUS;
        for id in acpi.cpus().iter().copied().chain(guesses) {
            if ids.count < count && !ids.ids[..ids.count].contains(&id) {
                ids.ids[ids.count] = id;
                ids.count += 1;
            }
        }
        ids
    }

    fn others(&self) -> &[u32] {
        &self.ids[1..self.count]
    }
}

/// Lays out RAM and fills in what the vCPUs share. Also gives the devices, the processors, and the
/// memory of the others' areas.
fn build_world(
    info: &BootInfo,
    acpi: &Acpi,
    tsc_entry: u64,
) -> (&'static World, &'static mut Devices, Ids, u64) {
    const TOO_LITTLE: &str = "too little RAM: beacon needs about 4 MiB and 128 KiB per vCPU";
    let config = Config::parse(info.command_line());
    let ids = Ids::new(acpi, apic::id(), config.cpus);
    let Some(mut ram) = phys::free_ram(info) else { fatal(TOO_LITTLE) };
    let Some(areas) = smp::reserve_areas(&mut ram, ids.count as u32 - 1) else { fatal(TOO_LITTLE) };
    // SAFETY: all of `Shared` is atomics and padding, for which zero is valid.
    let shared = unsafe { phys::allocate::<Shared>(&mut ram, ids.count) };
    let Some(shared) = shared else { fatal(TOO_LITTLE) };
    let shared: &'static [Shared] = shared;
    let kvmclock = shared[0].clock.register();
    let scale = clock::tsc_scale(shared[0].clock.read());
    let devices = Devices::new(&config.devices, scale, &mut ram, mix(tsc_entry) as u32);
    let Some(devices) = phys::keep(&mut ram, devices) else { fatal(TOO_LITTLE) };
    // SAFETY: it is written before it is read, below.
    let world = unsafe { phys::allocate::<core::mem::MaybeUninit<World>>(&mut ram, 1) };
    let Some([world]) = world else { fatal(TOO_LITTLE) };

    let wanted = match config.working_set {
        WorkingSet::Mib(mib) => (mib << 20) / PAGE_SIZE,
        WorkingSet::Max => u64::MAX,
    };
    // One table entry per page, taken before the pages: what does not fit makes the set smaller.
    let pages = wanted.min(ram.pages() * PAGE_SIZE / (PAGE_SIZE + size_of::<AtomicU32>() as u64));
    // SAFETY: zero is a valid atomic.
    let Some(generations) = (unsafe { phys::allocate::<AtomicU32>(&mut ram, pages as usize) })
    else {
        fatal(TOO_LITTLE)
    };

    let world = world.write(World {
        config,
        scale,
        tsc_entry,
        registers: fpu::available(config.registers),
        kvmclock,
        placement: Placement::new(ram, pages, config.order),
        generations,
        shared,
        latest_tsc: 0.into(),
        control: Control::new(config.dirty),
    });
    (world, devices, ids, areas)
}

/// vCPU 0's work loop.
fn run(world: &'static World, devices: &'static mut Devices, acpi: Acpi) -> ! {
    let mut operator = Operator::new(world, devices, acpi, cpu::tsc());
    if world.config.mode == Mode::Exits {
        operator.measure_exits();
    }
    world.shared[0].alive.store(true, Relaxed);
    let mut worker = Worker::new(world, 0);
    loop {
        let now = worker.work();
        if !operator.turn(&mut worker, now) {
            worker.rest(now);
        }
    }
}
