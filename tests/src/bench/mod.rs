//! What the benchmarks share: beacon in minivmm or in QEMU as processes of their own, figures and
//! their tables, and what the machine did meanwhile.
//!
//! Unlike the tests around it, all of this gives errors instead of panicking: a peer that fails is
//! a finding, not the end of a run of half an hour.

mod figures;
mod host;
mod process;
mod qmp;

use std::error::Error;

pub use figures::{json, markdown, median, Better, Figure, Row, Target};
pub use host::{cpu_model, first_line, load_average, loopback_bytes, CpuMeter, CpuUsed};
pub use process::{sync, Guest, Line, Setup, Tools, Vmm, Wiring, GUEST_ERROR, LIMIT};
pub use qmp::{time_of, wall_ms, Qmp};

/// What a benchmark gives, or why it could not.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;
