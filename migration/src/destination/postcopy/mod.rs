//! Memory that follows its guest, at the destination.
//!
//! ```text
//!   the session (receive's thread): waits for the last page; for a new connection when one is lost
//!      |-- mig-faults     reads page faults, asks for pages. Touches no guest memory, waits for no page
//!      |-- mig-load       loads the state, which may wait for pages
//!      |-- mig-demand     puts in what was asked for
//!      `-- mig-bring-N    puts in what the source pushes
//! ```

pub(super) mod arrivals;
pub(super) mod drain;
pub(super) mod faults;
pub(super) mod receivers;

use std::time::Duration;

use serde::Serialize;

use crate::histogram::Histogram;

/// What a destination did after the guest ran.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DrainReport {
    /// Whether all memory came.
    pub complete: bool,
    /// Pages that are still missing.
    pub missing_pages: u64,
    /// Page faults that went over the network.
    pub requests: u64,
    /// Pages that came because they were asked for.
    pub demand_pages: u64,
    /// Pages that came with those, before anybody touched them.
    pub prepaged_pages: u64,
    /// Pages that the source pushed.
    pub pushed_pages: u64,
    /// Of all these, pages of zeros.
    pub zero_pages: u64,
    /// Pages that never had been touched at the source, made here.
    pub local_pages: u64,
    /// Pages that came twice.
    pub duplicate_pages: u64,
    /// From the request of a page until it was there, nanoseconds.
    pub latency: Histogram,
    /// How long each thread waited for pages, microseconds.
    pub blocked_us: Vec<(String, u64)>,
    /// From the guest's start until the last page.
    #[serde(rename = "drain_us", with = "crate::report::micros")]
    pub drain: Duration,
    /// Connections that were lost meanwhile.
    pub interruptions: u64,
}
