//! Memory that follows its guest, at the source.
//!
//! The guest stands here for good, so that memory is as it was at the pause. What the destination lacks is in one
//! [`Plan`](crate::prepaging::Plan), which gives each page out once: to whoever pushes, or to the thread that answers requests.
//!
//! ```text
//!   the engine (migrate_to's thread): waits for DRAINED; connects again when a connection is lost
//!      |-- mig-demand     reads a request, and answers it
//!      `-- mig-send-N     push, as long as no request is being answered
//! ```

pub(super) mod demand;
pub(super) mod drain;
pub(super) mod faults;
pub(super) mod frozen;
pub(super) mod outflow;

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::destination::DrainReport;
use crate::prepaging::Prepaging;
use crate::stream::{RecordReader, RecordWriter};
use crate::transport::{Stream, Transport};

pub use faults::FaultReport;

/// How memory follows its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostcopyOptions {
    /// Live rounds before the guest moves; `None`: as many as there are until [`PostcopyOptions::after`], or until it does not
    /// converge.
    pub rounds: Option<u32>,
    /// How long pages are sent before the guest moves, at most.
    pub after: Option<Duration>,
    /// Whether pages are sent that nobody asked for.
    pub push: bool,
    /// In which order, and what goes with a page that was asked for.
    pub prepaging: Prepaging,
}

impl Default for PostcopyOptions {
    fn default() -> Self {
        Self { rounds: Some(1), after: None, push: true, prepaging: Prepaging::default() }
    }
}

/// What a source did after the guest ran at the destination.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PostcopyReport {
    /// Pages that the destination lacked when the guest moved.
    pub missing_pages: u64,
    /// Of these, pages that went with the state: to load it, and the guest's first instructions, need them.
    pub first_pages: u64,
    /// Whether pages were pushed.
    pub push: bool,
    /// Which pre-paging.
    pub prepaging: Prepaging,
    /// Giving back the memory of what had been sent and was written again, while the guest ran here.
    #[serde(rename = "retract_us", with = "crate::report::micros")]
    pub retract: Duration,
    /// Connections that were lost meanwhile.
    pub interruptions: u64,
    /// Why the destination does not have all of its memory, if so.
    pub incomplete: Option<String>,
    /// What the destination's figures tell of faults, once all memory is there.
    pub faults: Option<FaultReport>,
    /// The destination's figures.
    pub destination: Option<DrainReport>,
}

/// A connection that has joined.
pub(super) struct Joint {
    pub(super) records: RecordReader<Stream>,
    pub(super) writer: RecordWriter<Stream>,
    pub(super) transport: Arc<dyn Transport>,
}
