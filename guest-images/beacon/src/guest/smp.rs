//! Starting the other processors with INIT and SIPI.
//!
//! Source: Intel SDM volume 3, 9.4.4.
#![allow(unsafe_code)]

use core::sync::atomic::Ordering::{Acquire, Release};

use beacon_core::memory::FreeRam;

use crate::cpu::{tsc, wait_until};
use crate::ring0::{self, AREA_SIZE};
use crate::worker::Worker;
use crate::world::World;
use crate::{apic, exception, phys};

/// Where the real-mode code is copied to; the page number is also the SIPI vector.
const AP_TRAMPOLINE: u64 = 0x8000;
/// How long a processor may take from SIPI to ring 3, per try.
const START_TIMEOUT_US: u64 = 100_000;
const TRIES: u32 = 10;

/// What a new processor is handed.
struct Start {
    world: &'static World,
    cpu: u32,
}

/// Reserves the areas (stacks and ring-0 tables) of all processors but the first. They are taken
/// together and before the working set is laid out.
pub fn reserve_areas(ram: &mut FreeRam, others: u32) -> Option<u64> {
    if others == 0 {
        return Some(0);
    }
    ram.take(AREA_SIZE * u64::from(others), AREA_SIZE)
}

/// Starts the processors with the given APIC ids, one after the other, as vCPUs 1, 2, ...
///
/// # Errors
/// The APIC id of the first that does not come.
pub fn start(world: &'static World, ids: &[u32], areas: u64) -> Result<(), u32> {
    phys::copy_to(AP_TRAMPOLINE, ring0::trampoline());
    for (cpu, &id) in (1..).zip(ids) {
        let area = areas + AREA_SIZE * u64::from(cpu - 1);
        // RAM may hold anything after a reset; the area begins with the TSS and its bitmap.
        // SAFETY: `reserve_areas` took this memory for nothing but this.
        unsafe { core::ptr::write_bytes(area as *mut u8, 0, AREA_SIZE as usize / 2) };
        let start = Start { world, cpu };
        ring0::set_ap(cpu, area, &raw const start as u64);
        if !start_one(world, id, cpu) {
            return Err(id);
        }
    }
    world.control.begin.store(true, Release);
    Ok(())
}

fn start_one(world: &World, id: u32, cpu: u32) -> bool {
    let alive = || world.shared[cpu as usize].alive.load(Acquire);
    apic::send_init(id);
    // The 10 ms that the manual asks for after INIT are for hardware; no hypervisor needs them.
    wait_until(tsc() + world.scale.ticks_of_micros(200));
    for _ in 0..TRIES {
        apic::send_startup(id, (AP_TRAMPOLINE >> 12) as u8);
        let deadline = tsc() + world.scale.ticks_of_micros(START_TIMEOUT_US);
        while tsc() < deadline {
            if alive() {
                return true;
            }
            exception::speak_if_dying();
        }
    }
    false
}

/// Where a new processor comes out of `ring0.s`, in ring 3.
#[no_mangle]
extern "C" fn beacon_ap(start: &Start) -> ! {
    let (world, cpu) = (start.world, start.cpu);
    ring0::fill_tss(cpu);
    apic::init();
    world.shared[cpu as usize].clock.register();
    apic::start_timer(world.scale);
    // After this `start` may be gone.
    world.shared[cpu as usize].alive.store(true, Release);
    // Those that are there do not slow down the start of those that are not.
    while !world.control.begin.load(Acquire) {
        ring0::wait_for_interrupt();
    }
    let mut worker = Worker::new(world, u64::from(cpu));
    loop {
        worker.turn();
    }
}
