//! What a migration did, for a person and for programs. Times are written as whole microseconds.

use std::time::Duration;

use serde::Serialize;

use crate::handover::{Cause, SourcePhase};
use crate::source::{LateReport, PostcopyReport};
use crate::vm::Mode;

/// Durations as microseconds; the fields' names say so.
pub(crate) mod micros {
    use std::time::Duration;

    use serde::Serializer;

    pub(crate) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(super::as_micros(*duration))
    }

    pub(crate) mod option {
        use super::{Duration, Serializer};

        pub(crate) fn serialize<S: Serializer>(
            duration: &Option<Duration>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match duration {
                Some(duration) => serializer.serialize_some(&crate::report::as_micros(*duration)),
                None => serializer.serialize_none(),
            }
        }
    }
}

/// Microseconds; more than half a million years become that.
pub(crate) fn as_micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Who owns the VM at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
pub enum Outcome {
    /// The destination owns it, and runs it unless an operator paused it.
    HandedOver,
    /// The source owns it, as before.
    RunningHere {
        /// Why it was not handed over.
        cause: Cause,
        /// Every reason, for a person.
        reasons: Vec<String>,
    },
    /// Nobody knows. The source is frozen; the journal has it.
    Unresolved {
        /// What led here, for a person.
        reasons: Vec<String>,
    },
}

/// One live round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoundReport {
    /// Counted from 0.
    pub number: u32,
    /// Pages that were sent with contents.
    pub data_pages: u64,
    /// Pages of zeros, sent as such.
    pub zero_pages: u64,
    /// Bytes on the page connections.
    pub bytes: u64,
    /// Pages that were written during the round.
    pub dirty_pages: u64,
    /// The same per second.
    pub dirty_pages_per_second: f64,
    /// How long it took, waiting for the bandwidth cap included.
    #[serde(rename = "duration_us", with = "micros")]
    pub duration: Duration,
    /// What the pause would be if it began now; an estimate.
    #[serde(rename = "predicted_pause_us", with = "micros")]
    pub predicted_pause: Duration,
    /// The share of time that each vCPU was allowed to run; empty where nothing was slowed down.
    pub vcpu_run: Vec<f64>,
    /// What each vCPU wrote, pages per second, roughly; empty where nobody counts.
    pub vcpu_dirty_pages_per_second: Vec<f64>,
}

/// The pause and its parts, one after the other, as the source sees them; the last three are the
/// destination's own figures, inside the parts before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PauseReport {
    /// From the order to stop until the destination said that the guest runs: too long by half a
    /// round trip.
    #[serde(rename = "total_us", with = "micros")]
    pub total: Duration,
    /// Stopping the vCPUs and draining the devices.
    #[serde(rename = "stop_us", with = "micros")]
    pub stop: Duration,
    /// Taking the state.
    #[serde(rename = "save_us", with = "micros")]
    pub save: Duration,
    /// Reading the dirty log a last time.
    #[serde(rename = "harvest_us", with = "micros")]
    pub harvest: Duration,
    /// Sending the last pages and the state.
    #[serde(rename = "send_us", with = "micros")]
    pub send: Duration,
    /// Waiting for the destination to have loaded everything.
    #[serde(rename = "load_us", with = "micros")]
    pub load: Duration,
    /// Giving up the disks, the journal, COMMIT.
    #[serde(rename = "commit_us", with = "micros")]
    pub commit: Duration,
    /// Waiting for the guest to run there.
    #[serde(rename = "resume_us", with = "micros")]
    pub resume: Duration,
    /// Pages sent in the pause, those of zeros included.
    pub pages: u64,
    /// Bytes sent in the pause on the page connections.
    pub bytes: u64,
    /// Destination: from the last of memory and state until loaded.
    #[serde(rename = "destination_load_us", with = "micros")]
    pub destination_load: Duration,
    /// Destination: from COMMIT until the disks were owned.
    #[serde(rename = "destination_own_us", with = "micros")]
    pub destination_own: Duration,
    /// Destination: resuming the guest.
    #[serde(rename = "destination_resume_us", with = "micros")]
    pub destination_resume: Duration,
}

/// What a source did, from its beginning to its end.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Migration id.
    pub id: String,
    /// Name of the VM.
    pub vm: String,
    /// Address of the destination.
    pub peer: String,
    /// How it was migrated.
    pub mode: Mode,
    /// Whether memory was compared.
    pub verify: bool,
    /// Who owns the VM now.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// From the first connection to the end, without waiting for late frames.
    #[serde(rename = "total_us", with = "micros")]
    pub total: Duration,
    /// Of that, until the destination had made the VM.
    #[serde(rename = "setup_us", with = "micros")]
    pub setup: Duration,
    /// The live rounds.
    pub rounds: Vec<RoundReport>,
    /// Why it did not converge by itself, if so.
    pub stall: Option<String>,
    /// The pause, if the guest was paused and the destination runs it.
    pub pause: Option<PauseReport>,
    /// Bytes on each page connection.
    pub connection_bytes: Vec<u64>,
    /// Pages sent with contents, in all.
    pub data_pages: u64,
    /// Pages of zeros, in all.
    pub zero_pages: u64,
    /// Pages that were never touched, and neither read nor sent.
    pub skipped_pages: u64,
    /// CPU time of the source's process meanwhile, its vCPUs included.
    #[serde(rename = "cpu_source_us", with = "micros")]
    pub cpu_source: Duration,
    /// CPU time of the destination's process from the offer to the resumed guest.
    #[serde(rename = "cpu_destination_us", with = "micros::option")]
    pub cpu_destination: Option<Duration>,
    /// How memory followed the guest, if it did.
    pub postcopy: Option<PostcopyReport>,
    /// Frames that reached the source after the pause and were sent on; `None` where that was not
    /// done.
    pub late_frames: Option<LateReport>,
}

/// How far a source is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Progress {
    /// Its phase.
    pub phase: SourcePhase,
    /// Current or last round; `None` before the first.
    pub round: Option<u32>,
    /// Pages that the round began with.
    pub round_pages: u64,
    /// Pages of the round that are not sent yet.
    pub pages_left: u64,
    /// Once the guest runs at the destination: pages that have not followed it yet.
    pub missing_pages: Option<u64>,
    /// Bytes sent on all page connections so far.
    pub bytes: u64,
    /// Bytes per second since the last report of progress.
    pub bytes_per_second: f64,
    /// Pages that the guest wrote per second in the last whole round.
    pub dirty_pages_per_second: f64,
    /// What the pause would be if it began now; an estimate.
    #[serde(rename = "predicted_pause_us", with = "micros::option")]
    pub predicted_pause: Option<Duration>,
    /// Since the beginning.
    #[serde(rename = "elapsed_us", with = "micros")]
    pub elapsed: Duration,
    /// What it waits for or why it does not go on, for a person.
    pub note: Option<String>,
}
