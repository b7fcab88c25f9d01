//! End-to-end tests: the `minivmm` program in real processes, on real sockets, with real KVM.
//!
//! This library is what the tests in `tests/` share:
//!
//! ```text
//!   Suite     which tests there are, and which of them this machine can run
//!   Host      a runtime directory of its own and a place for files; runs commands to their end
//!   Vm        a `minivmm run` or `restore` that goes on, with beacon's events as they come
//!   Migrating a `minivmm migrate` that is under way; proxy, the network that it goes through
//!   ways      the ways in which memory follows a guest; pairwise, a choice of cases
//!   Traffic   a guest with every device at work, and the host's side of its network
//!   Snapshot  a saved VM, opened with the library; Records, the same file as bytes to be damaged
//! ```
//!
//! Nothing here sleeps: everything waits for output, an event or the end of a process, up to
//! [`PATIENCE`], and then fails with what was seen until then. A test that cannot run here (no
//! /dev/kvm, not root) is reported as ignored, never as passed.
//!
//! The program is `$MINIVMM_BIN`, else the `minivmm` beside the test's own executable, which
//! `cargo build -p vmm` brings up to date (`cargo test -p tests` alone does not).
// The whole crate is tests.
#![allow(clippy::unwrap_used)]

mod beacon;
pub mod bench;
pub mod capture;
pub mod conversation;
pub mod fire;
mod guest;
mod host;
pub mod lab;
mod migrating;
mod needs;
pub mod network;
pub mod numbered;
pub mod open_vswitch;
mod pairs;
pub mod ping;
pub mod place;
mod process;
pub mod proxy;
mod snapshot;
mod suite;
pub mod topology;
mod traffic;
mod vm;
pub mod ways;
mod witness;

use std::time::Duration;

pub use beacon::{goes_on, number, Console};
pub use guest::Guest;
pub use host::{binary, Host};
pub use migrating::Migrating;
pub use needs::{
    huge_pages, kvm, loop_devices, namespaces, network_namespaces, root, userfaultfd, HugePages,
    LoopDevice,
};
pub use pairs::{pairwise, Fields};
pub use process::{finish, tied, wait, Collected, Finished};
pub use snapshot::{Records, Snapshot};
pub use suite::{Need, Suite};
pub use traffic::Traffic;
pub use vm::Vm;

/// How long anything may take. Generous, since the machine may be slow and shared; nothing takes
/// so long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);
