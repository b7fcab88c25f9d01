//! `mode=exits`: what a trip to the VMM costs.

use beacon_core::json::Line;
use beacon_core::stats::percentile;
use beacon_core::time::TscScale;

use crate::console::{self, LINE_STATUS};
use crate::cpu::{inb, tsc};
use crate::phys::read32;

/// Reads `mmio` and a port once for each of `samples`, and puts the event into the console's queue.
pub fn measure(mmio: u64, samples: &mut [u64], scale: TscScale) {
    let mut line = Line::event("exits");
    line.number("samples", samples.len() as u64);
    line.hex("mmio", mmio);
    run(&mut line, ["mmio_min_ns", "mmio_median_ns", "mmio_p99_ns"], samples, scale, || {
        read32(mmio);
    });
    line.hex("port", u64::from(LINE_STATUS));
    run(&mut line, ["pio_min_ns", "pio_median_ns", "pio_p99_ns"], samples, scale, || {
        inb(LINE_STATUS);
    });
    console::send(&mut line);
}

fn run(line: &mut Line, keys: [&str; 3], samples: &mut [u64], scale: TscScale, access: impl Fn()) {
    for sample in samples.iter_mut() {
        let start = tsc();
        access();
        *sample = scale.nanoseconds(tsc() - start);
    }
    samples.sort_unstable();
    for (key, percent) in keys.into_iter().zip([0, 50, 99]) {
        line.number(key, percentile(samples, percent));
    }
}
