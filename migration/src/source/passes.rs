//! Passes of all senders over memory, and waiting for what happens meanwhile.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::handover::{Cause, SourcePhase};
use crate::source::engine::{unexpected, Engine, Failure, Waited};
use crate::source::peer::Message;
use crate::source::sender::{Pass, PassStats, SendError, Work};
use crate::source::Input;

/// How often progress is told while pages are sent.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// How long an explanation may come after a connection broke.
const EXPLANATION: Duration = Duration::from_millis(500);

impl Engine<'_, '_, '_> {
    /// Hands a pass to all senders and waits until all have done it.
    pub(super) fn pass(&mut self, pass: &Pass) -> Result<PassStats, Failure> {
        self.begin_pass(pass)?;
        self.finish_pass()
    }

    pub(super) fn begin_pass(&mut self, pass: &Pass) -> Result<(), Failure> {
        self.round_pages = pass.pages.count();
        self.shared.pages_done.store(0, Ordering::Relaxed);
        for sender in &self.senders {
            // A sender that ended has told why.
            let _ = sender.passes.send(Work::Pass(pass.clone()));
        }
        Ok(())
    }

    pub(super) fn finish_pass(&mut self) -> Result<PassStats, Failure> {
        let mut total = PassStats::default();
        let mut left = self.senders.len();
        while left > 0 {
            match self.wait(Instant::now() + PROGRESS_INTERVAL)? {
                Waited::PassDone(index, Ok(stats)) => {
                    left -= 1;
                    total.data_pages += stats.data_pages;
                    total.zero_pages += stats.zero_pages;
                    total.bytes += stats.bytes;
                    total.waited = total.waited.max(stats.waited);
                    self.count(index, &stats);
                    match (&mut total.left, stats.left) {
                        (Some(left), Some(more)) => left.union(&more),
                        (left @ None, more) => *left = more,
                        (Some(_), None) => {}
                    }
                }
                Waited::PassDone(index, Err(error)) => {
                    return Err(self.explained(pass_failed(index, error)));
                }
                // The destination may be done before this side has noticed that all was sent.
                Waited::Peer(loaded @ Message::Loaded { .. })
                    if self.phase == SourcePhase::Stopping =>
                {
                    self.early = Some(loaded);
                }
                Waited::Peer(message) => return Err(unexpected(&message)),
                Waited::Nothing => {
                    self.check_time()?;
                    self.cut_when_due();
                    self.tell(None);
                }
            }
        }
        self.data_pages += total.data_pages;
        self.zero_pages += total.zero_pages;
        Ok(total)
    }

    /// What a connection carried.
    pub(super) fn count(&mut self, index: u16, stats: &PassStats) {
        if let Some(bytes) = self.connection_bytes.get_mut(usize::from(index)) {
            *bytes += stats.bytes;
        }
    }

    fn check_time(&self) -> Result<(), Failure> {
        let options = self.around.options;
        match options.limits.time {
            Some(limit) if self.started.elapsed() > limit => {
                let reason = format!("it is not done after the limit of {limit:?}");
                Err(Failure::new(Cause::Deadline, reason))
            }
            _ => Ok(()),
        }
    }

    /// The destination's own reason for what looks like a lost connection, if it comes soon.
    pub(super) fn explained(&mut self, failure: Failure) -> Failure {
        if failure.cause != Cause::Lost {
            return failure;
        }
        let deadline = Instant::now() + EXPLANATION;
        loop {
            match self.wait(deadline) {
                Err(better) if better.cause != Cause::Lost => return better,
                Err(_) | Ok(Waited::Nothing) => return failure,
                Ok(Waited::Peer(_) | Waited::PassDone(..)) => {}
            }
        }
    }

    pub(super) fn wait_for_message(
        &mut self,
        limit: Duration,
        what: &str,
    ) -> Result<Message, Failure> {
        if let Some(message) = self.early.take() {
            return Ok(message);
        }
        let deadline = Instant::now() + limit;
        loop {
            match self.wait(deadline)? {
                Waited::Peer(message) => return Ok(message),
                // While it commits, memory is pushed already.
                Waited::PassDone(index, Ok(stats)) if self.pushing > 0 => {
                    self.push_done(index, &stats);
                }
                Waited::PassDone(index, Err(error)) if self.pushing > 0 => {
                    return Err(pass_failed(index, error));
                }
                Waited::PassDone(..) => {}
                Waited::Nothing => {
                    let reason = format!("the destination did not {what} within {limit:?}");
                    return Err(Failure::new(Cause::Deadline, reason));
                }
            }
        }
    }

    /// Waits for something to happen, until `deadline`. What ends the migration is an error.
    pub(super) fn wait(&mut self, deadline: Instant) -> Result<Waited, Failure> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(input) = self.inbox.recv_timeout(left) else { return Ok(Waited::Nothing) };
            match input {
                Input::Peer(Message::Abort(text)) => {
                    let reason = format!("the destination gave up: {text}");
                    return Err(Failure::new(Cause::PeerAborted, reason));
                }
                Input::Peer(Message::Refuse(reasons)) => {
                    return Err(Failure { cause: Cause::Refused, reasons });
                }
                Input::Peer(message) => return Ok(Waited::Peer(message)),
                Input::Lost(cause, text) => return Err(Failure::new(cause, text)),
                Input::PassDone { index, result } => return Ok(Waited::PassDone(index, result)),
                Input::GiveUp(cause) if self.phase.can_cancel() => {
                    let reason = match cause {
                        Cause::GuestEnded => "the guest ended",
                        _ => "cancelled at the source",
                    };
                    return Err(Failure::new(cause, reason));
                }
                Input::GiveUp(_) => {}
                Input::Recover(to) => self.recover_to = Some(to),
                Input::Resolved(owner) => self.resolved = Some(owner),
                // Before that there is an end to wait for, and the guest may run here. What is waited for in one phase is over
                // in the next.
                Input::Detach(phase) if phase == self.phase => {
                    self.detached |= phase.is_final() || phase == SourcePhase::Unresolved;
                }
                Input::Detach(_) => {}
            }
        }
    }

    /// Waits when nothing that happens can end it.
    pub(super) fn wait_ignoring(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.detached && self.resolved.is_none() {
            if let Ok(Waited::Nothing) = self.wait(deadline) {
                return;
            }
        }
    }
}

/// Why nothing more goes out on a page connection.
pub(super) fn pass_failed(index: u16, error: SendError) -> Failure {
    match error {
        SendError::Stopped => Failure::new(Cause::Cancelled, "stopped"),
        SendError::Stream(error) => {
            let mut failure = Failure::from(error);
            for reason in &mut failure.reasons {
                *reason = format!("page connection {index}: {reason}");
            }
            failure
        }
    }
}
