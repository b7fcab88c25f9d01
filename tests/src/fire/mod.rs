//! Migrations under fire: every fault in every phase, and what must come of it.
//!
//! ```text
//!   Case        a fault, a phase, connections, a mode; what may come of it
//!   Scene       a VM, a destination, and a proxy between them
//!   run         one case, from a new VM to its next, successful migration
//!   run_with    one case with a VM that lives on
//! ```
//!
//! Whatever happens: the guest never runs twice (the [witness](crate::witness) says so), and runs
//! once with all of its memory, unless its only copy died or nobody can know who owns it.

mod case;
mod hurt;
mod run;
mod scene;

pub use case::{Case, Fault, Mode, Phase, Runs};
pub use hurt::{in_private_mounts, Thief};
pub use run::{run, run_with};
pub use scene::{moves, moves_with, runs, until, Place, Scene, BUSY};
