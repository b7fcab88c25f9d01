//! The hardware-free half of `beacon`: everything that can be tested on the host.
//!
//! The guest itself (`src/guest`) adds the instructions that need a machine: entry code,
//! port I/O, timers, and the loop that each vCPU runs.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod config;
pub mod devices;
pub mod disk;
pub mod json;
pub mod latency;
pub mod memory;
pub mod pacer;
pub mod pages;
pub mod permutation;
pub mod queue;
pub mod replies;
pub mod stats;
pub mod time;
pub mod walk;

/// Scrambles 64 bits (the finaliser of SplitMix64, Steele, Lea and Flood, OOPSLA 2014).
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
