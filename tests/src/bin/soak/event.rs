//! What the parts say to the whole: a line of JSON each.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Something that happened, and was as it must be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A migration met a fault.
    Fault {
        /// The case.
        case: String,
        /// What went wrong.
        fault: String,
        /// Who runs the guest then.
        came: String,
    },
    /// A VM moved.
    Move {
        /// From 1 on.
        number: u32,
        /// As `minivmm migrate --mode` has it.
        mode: String,
        /// Page connections.
        connections: u16,
        /// On these.
        bytes: u64,
        /// The pause as the source knows it, µs.
        pause_us: u64,
        /// As the guest saw it, µs.
        guest_pause_us: f64,
        /// Pages that the guest has verified and found right since it was booted.
        verified: u64,
    },
}

impl Event {
    /// Says it.
    pub fn say(&self) {
        println!("{}", serde_json::to_string(self).unwrap());
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault { case, came, .. } => write!(f, "{case}: {came}"),
            Self::Move { number, mode, connections, bytes, pause_us, .. } => write!(
                f,
                "move {number}: {mode}, connections {connections}, {:.1} MiB, pause {:.1} ms",
                *bytes as f64 / f64::from(1 << 20),
                *pause_us as f64 / 1e3
            ),
        }
    }
}
