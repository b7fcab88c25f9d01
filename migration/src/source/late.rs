//! Frames that reach this host after its guest has left: sent after it, until none come any more.
//!
//! Nothing depends on them: a frame that is lost here is lost as on any network.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::link::MainLink;
use crate::report::micros;
use crate::source::engine::Engine;
use crate::stream::session::{FrameWire, Frames};
use crate::threads;
use crate::vm::{LateFrame, LateFrames, MAX_LATE_FRAME};

/// The longest time that frames are forwarded.
pub const LONGEST: Duration = Duration::from_secs(5);

/// After so long a time in which the guest is announced elsewhere, no switch sends its frames here any more: Open vSwitch
/// may take half a second (`max-revalidator`, ovs-vswitchd.conf.db(5)). The last announcement is still to come then.
const LEARNED: Duration = Duration::from_secs(1);

/// Whether and how long frames are forwarded to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LateOptions {
    /// Whether they are at all.
    pub forward: bool,
    /// It ends when none came for so long.
    pub quiet: Duration,
    /// It ends then at the latest, at most [`LONGEST`] after the guest runs there.
    pub limit: Duration,
}

impl Default for LateOptions {
    fn default() -> Self {
        Self { forward: true, quiet: Duration::from_millis(200), limit: LONGEST }
    }
}

/// What was forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct LateReport {
    /// Frames that were sent.
    pub frames: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// From the guest's start there until the last one was sent.
    #[serde(rename = "last_us", with = "micros")]
    pub last: Duration,
    /// Whether they still came at the limit.
    pub at_limit: bool,
    /// Whether the connection was lost before that.
    pub interrupted: bool,
}

/// The thread that forwards beside post-copy, and where it reports.
pub(super) struct LateThread<'scope> {
    thread: ScopedJoinHandle<'scope, ()>,
    report: Arc<Mutex<LateReport>>,
}

impl Engine<'_, '_, '_> {
    /// Whether frames are forwarded to this destination.
    fn forwards(&self) -> bool {
        self.around.options.late.forward && self.takes_frames
    }

    /// From now on frames for the guest may have to be forwarded: they are to come here even when it is announced
    /// elsewhere. On one host they come by themselves to where it is.
    pub(super) fn hold_frames(&self) {
        let local = self.link.as_ref().is_none_or(|link| link.is_local());
        if let (Some(frames), true, false) = (self.around.vm.late_frames(), self.forwards(), local)
        {
            frames.hold(true);
        }
    }

    /// No more of them are forwarded.
    pub(super) fn let_frames_go(&self) {
        if let Some(frames) = self.around.vm.late_frames() {
            frames.hold(false);
        }
    }

    /// The guest runs at the destination: what came here for it meanwhile, and still comes, follows. With
    /// post-copy beside the pages, otherwise before this returns.
    pub(super) fn forward_late(&mut self) {
        let options = self.around.options.late;
        let Some(frames) = self.around.vm.late_frames() else { return };
        let (Some(link), Some(committed)) = (self.link.clone(), self.committed) else { return };
        if !self.forwards() {
            return;
        }
        if self.postcopy.is_none() {
            self.late = Some(forward(&link, frames, committed, &options));
            return;
        }
        let report = Arc::new(Mutex::new(LateReport::default()));
        let written = Arc::clone(&report);
        let job = move || {
            let done = forward(&link, frames, committed, &options);
            *written.lock().unwrap_or_else(PoisonError::into_inner) = done;
        };
        match threads::spawn(self.around.scope, "mig-frames", job) {
            Ok(thread) => self.late_thread = Some(LateThread { thread, report }),
            Err(error) => tracing::warn!(%error, "no thread to forward frames"),
        }
    }

    /// Waits until all is forwarded.
    pub(super) fn finish_late(&mut self) {
        let Some(LateThread { thread, report }) = self.late_thread.take() else { return };
        if thread.join().is_err() {
            tracing::error!("the thread that forwards frames panicked");
        }
        self.late = Some(*report.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn forward(
    link: &MainLink,
    frames: &dyn LateFrames,
    committed: Instant,
    options: &LateOptions,
) -> LateReport {
    let report = forward_until_quiet(link, frames, committed, options);
    frames.hold(false);
    report
}

fn forward_until_quiet(
    link: &MainLink,
    frames: &dyn LateFrames,
    committed: Instant,
    options: &LateOptions,
) -> LateReport {
    let start = Instant::now();
    let limit = start + options.limit.min(LONGEST);
    let mut report = LateReport::default();
    loop {
        let now = Instant::now();
        if now >= limit {
            report.at_limit = true;
            return report;
        }
        if now >= start + LEARNED {
            frames.hold(false);
        }
        let mut taken = frames.take(committed, limit.min(now + options.quiet));
        taken.retain(|frame| frame.bytes.len() <= MAX_LATE_FRAME);
        if taken.is_empty() {
            if Instant::now() < limit {
                return report;
            }
            continue;
        }
        if let Err(error) = send(link, &taken) {
            tracing::info!(%error, "frames are not forwarded any more");
            report.interrupted = true;
            return report;
        }
        report.frames += taken.len() as u64;
        report.bytes += taken.iter().map(|frame| frame.bytes.len() as u64).sum::<u64>();
        report.last = start.elapsed();
    }
}

/// Sends frames, as many in a record as it may have.
fn send(link: &MainLink, frames: &[LateFrame]) -> Result<(), crate::stream::StreamError> {
    link.write(|out| {
        let mut rest = frames;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take(Frames::MOST).take_while(|frame| {
                bytes += frame.bytes.len();
                bytes <= Frames::MOST_BYTES
            });
            let (now, later) = rest.split_at(fits.count());
            let wires = now.iter().map(|f| FrameWire { card: f.card, bytes: &f.bytes });
            out.send(&Frames { frames: wires.collect() })?;
            rest = later;
        }
        Ok(())
    })
}
