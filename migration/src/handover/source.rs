//! The source's phases.

use serde::Serialize;

use super::{Cause, Owner, Verdict};

/// How far the source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourcePhase {
    /// The offer is made; nothing has changed.
    Offering,
    /// The destination makes the VM.
    Preparing,
    /// Memory is copied while the guest runs.
    Copying,
    /// The guest is paused; the rest and the state are on their way.
    Stopping,
    /// COMMIT may have left. This end does not own the VM any more.
    Committing,
    /// COMMIT may have left, and no answer came.
    Unresolved,
    /// The destination owns the VM.
    HandedOver,
    /// The VM is here as before.
    RolledBack,
}

/// What happens to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// ACCEPT came.
    Accepted,
    /// READY came.
    Ready,
    /// The rest is small enough, or a limit says so.
    Converged,
    /// LOADED came.
    Loaded,
    /// What comes before COMMIT failed; not a byte of it was written.
    NotCommitted,
    /// RESUMED came.
    Resumed,
    /// It cannot or shall not go on.
    Failed(Cause),
    /// The destination's host was asked.
    Verdict(Verdict),
    /// No answer to the question.
    NoVerdict,
    /// The operator decides.
    Resolved(Owner),
}

/// What the source does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Track writes; then copy.
    StartTracking,
    /// Pause the guest; then send the rest, SYNC, the state.
    StopGuest,
    /// Journal `handed over`.
    JournalHandedOver,
    /// Give up the disks.
    ReleaseOwnership,
    /// Send COMMIT.
    SendCommit,
    /// Send DONE.
    SendDone,
    /// Journal `unresolved`.
    JournalUnresolved,
    /// Ask the destination's host for its verdict, with reclaim.
    Ask,
    /// Journal `handed over`, now that it is known.
    JournalConfirmed,
    /// Tell the peer, if it can be reached.
    SendAbort,
    /// Take the disks back.
    ReclaimOwnership,
    /// Stop tracking writes.
    StopTracking,
    /// Journal `running here`.
    JournalHere,
    /// Let the guest go on, unless an operator paused it.
    ResumeGuest,
    /// Tell the destination's host that it may drop the VM: ABORT may not have arrived.
    Withdraw,
}

/// Whether the guest can go on.
fn lives(cause: Cause) -> bool {
    cause != Cause::GuestEnded
}

/// The one place that rolls back. `from` says how far it had gone.
fn roll_back(from: SourcePhase, cause: Cause) -> (SourcePhase, Vec<SourceAction>) {
    use SourceAction::{
        JournalHere, ReclaimOwnership, ResumeGuest, SendAbort, StopTracking, Withdraw,
    };
    let mut actions = Vec::new();
    let gave_up_disks = matches!(from, SourcePhase::Committing | SourcePhase::Unresolved);
    if from != SourcePhase::Unresolved {
        actions.push(SendAbort);
    }
    // Before the guest runs: tracking off costs it nothing then, and the journal must not say
    // `handed over` while it runs.
    if gave_up_disks || matches!(from, SourcePhase::Copying | SourcePhase::Stopping) {
        actions.push(StopTracking);
    }
    actions.push(JournalHere);
    if gave_up_disks {
        actions.push(ReclaimOwnership);
    }
    let paused = gave_up_disks || from == SourcePhase::Stopping;
    if paused && lives(cause) {
        actions.push(ResumeGuest);
    }
    if from == SourcePhase::Stopping {
        // The destination may have everything, and would keep it.
        actions.push(Withdraw);
    }
    (SourcePhase::RolledBack, actions)
}

/// What follows from `event` in `phase`. An event that means nothing there changes nothing.
pub(crate) fn step(phase: SourcePhase, event: SourceEvent) -> (SourcePhase, Vec<SourceAction>) {
    use SourceAction as Do;
    use SourceEvent as On;
    use SourcePhase as In;
    match (phase, event) {
        (In::Offering, On::Accepted) => (In::Preparing, vec![]),
        (In::Preparing, On::Ready) => (In::Copying, vec![Do::StartTracking]),
        (In::Copying, On::Converged) => (In::Stopping, vec![Do::StopGuest]),
        (In::Stopping, On::Loaded) => (
            In::Committing,
            // The journal is the last thing before COMMIT that can fail: who reads `handed over`
            // there may rely on it.
            vec![Do::ReleaseOwnership, Do::JournalHandedOver, Do::SendCommit],
        ),
        (In::Offering | In::Preparing | In::Copying | In::Stopping, On::Failed(cause)) => {
            roll_back(phase, cause)
        }

        (In::Committing, On::NotCommitted) => roll_back(phase, Cause::Failed),
        (In::Committing, On::Resumed) => (In::HandedOver, vec![Do::SendDone]),
        (
            In::Committing,
            On::Failed(
                Cause::Lost
                | Cause::PeerAborted
                | Cause::Failed
                | Cause::Protocol
                | Cause::Deadline,
            ),
        ) => (In::Unresolved, vec![Do::JournalUnresolved, Do::Ask]),

        (In::Unresolved, On::Resumed | On::Verdict(Verdict::RunningHere)) => {
            (In::HandedOver, vec![Do::JournalConfirmed])
        }
        (In::Unresolved, On::Verdict(Verdict::NotHere)) => roll_back(phase, Cause::Lost),
        (In::Unresolved, On::Verdict(_) | On::NoVerdict) => (phase, vec![Do::Ask]),
        (In::Unresolved, On::Resolved(Owner::Here)) => roll_back(phase, Cause::Lost),
        (In::Unresolved, On::Resolved(Owner::There)) => {
            (In::HandedOver, vec![Do::JournalConfirmed])
        }

        (_, _) => (phase, vec![]),
    }
}

impl SourcePhase {
    /// Whether nothing more happens.
    pub fn is_final(self) -> bool {
        matches!(self, SourcePhase::HandedOver | SourcePhase::RolledBack)
    }

    /// Whether a cancel still has an effect.
    pub fn can_cancel(self) -> bool {
        matches!(
            self,
            SourcePhase::Offering
                | SourcePhase::Preparing
                | SourcePhase::Copying
                | SourcePhase::Stopping
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE_COMMIT: [SourcePhase; 4] = [
        SourcePhase::Offering,
        SourcePhase::Preparing,
        SourcePhase::Copying,
        SourcePhase::Stopping,
    ];

    #[test]
    fn before_commit_every_failure_rolls_back_and_only_a_dead_guest_stays_down() {
        for phase in BEFORE_COMMIT {
            for cause in [Cause::Cancelled, Cause::Lost, Cause::Failed, Cause::GuestEnded] {
                let (next, actions) = step(phase, SourceEvent::Failed(cause));
                assert_eq!(next, SourcePhase::RolledBack);
                let resumes = actions.contains(&SourceAction::ResumeGuest);
                let paused = phase == SourcePhase::Stopping;
                assert_eq!(resumes, paused && cause != Cause::GuestEnded, "{phase:?} {cause:?}");
                let tracked = matches!(phase, SourcePhase::Copying | SourcePhase::Stopping);
                assert_eq!(actions.contains(&SourceAction::StopTracking), tracked);
            }
        }
    }

    #[test]
    fn after_commit_a_cancel_is_too_late_and_a_loss_freezes() {
        let committing = SourcePhase::Committing;
        for cause in [Cause::Cancelled, Cause::GuestEnded, Cause::NotConverging] {
            assert_eq!(step(committing, SourceEvent::Failed(cause)), (committing, vec![]));
        }
        for cause in [Cause::Lost, Cause::PeerAborted, Cause::Failed, Cause::Deadline] {
            let (next, actions) = step(committing, SourceEvent::Failed(cause));
            assert_eq!(next, SourcePhase::Unresolved);
            assert!(!actions.contains(&SourceAction::ResumeGuest));
        }
    }

    #[test]
    fn handed_over_comes_before_the_first_byte_of_commit() {
        let (_, actions) = step(SourcePhase::Stopping, SourceEvent::Loaded);
        let at = |action| actions.iter().position(|a| *a == action);
        assert!(at(SourceAction::JournalHandedOver) < at(SourceAction::SendCommit));
        assert!(at(SourceAction::ReleaseOwnership) < at(SourceAction::SendCommit));
    }

    #[test]
    fn final_phases_stay() {
        for phase in [SourcePhase::HandedOver, SourcePhase::RolledBack] {
            for event in [
                SourceEvent::Loaded,
                SourceEvent::Resumed,
                SourceEvent::Resolved(Owner::Here),
                SourceEvent::Verdict(Verdict::NotHere),
                SourceEvent::Failed(Cause::Lost),
            ] {
                assert_eq!(step(phase, event), (phase, vec![]));
            }
        }
    }
}
