//! The destination's phases.

use serde::Serialize;

use super::{Cause, Owner};

/// How far the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DestinationPhase {
    /// The offer is looked at.
    Negotiating,
    /// The VM is made.
    Preparing,
    /// Memory comes in.
    Receiving,
    /// Everything is here; the state is loaded.
    Loading,
    /// All is ready; the source may commit.
    Loaded,
    /// COMMIT came, or an operator said so; the journal decides.
    Deciding,
    /// The VM is owned here; the disks are being taken.
    Owning,
    /// The guest is being resumed.
    Resuming,
    /// The guest runs here.
    Running,
    /// An operator, or the source, gave it up after LOADED; the journal decides.
    Withdrawing,
    /// The connection was lost when the source may or may not have committed.
    Unresolved,
    /// Nothing of the VM is left here.
    Discarded,
}

/// What happens to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// All checks of the offer passed.
    Acceptable,
    /// The VM is made and all page connections have joined.
    Prepared,
    /// SYNC on every page connection, and COMPLETE.
    AllReceived,
    /// The state is in, and the disks could be had.
    StateLoaded,
    /// COMMIT came.
    Commit,
    /// The journal's decision is `running here`.
    DecidedHere,
    /// The journal's decision is `not here`: somebody else made it.
    DecidedNotHere,
    /// The journal could not be written.
    NotDecided,
    /// The disks are owned.
    Owned,
    /// The disks cannot be had yet.
    NotOwned,
    /// The guest runs.
    GuestResumed,
    /// The guest could not be resumed.
    NotResumed,
    /// It cannot or shall not go on.
    Failed(Cause),
    /// The source's journal says `handed over`.
    SourceHandedOver,
    /// The operator decides.
    Resolved(Owner),
}

/// What the destination does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Send ACCEPT, journal `incoming`; then make the VM.
    Accept,
    /// Send REFUSE with all reasons.
    SendRefuse,
    /// Send READY; then receive.
    SendReady,
    /// Load the state.
    LoadState,
    /// Send LOADED.
    SendLoaded,
    /// Decide `running here` in the journal; the outcome is an event.
    DecideHere,
    /// Decide `not here` in the journal; the outcome is an event.
    DecideNotHere,
    /// Take the disks.
    TakeOwnership,
    /// Tell that the disks cannot be had, and wait a little.
    TellStuck,
    /// Resume the guest, if COMMIT said so.
    ResumeGuest,
    /// Send RESUMED.
    SendResumed,
    /// Journal `unresolved`.
    JournalUnresolved,
    /// Tell the source, if it can be reached.
    SendAbort,
    /// Drop all of the VM.
    Discard,
}

/// What follows from `event` in `phase`. An event that means nothing there changes nothing.
pub(crate) fn step(
    phase: DestinationPhase,
    event: DestinationEvent,
) -> (DestinationPhase, Vec<DestinationAction>) {
    use DestinationAction as Do;
    use DestinationEvent as On;
    use DestinationPhase as In;
    match (phase, event) {
        (In::Negotiating, On::Acceptable) => (In::Preparing, vec![Do::Accept]),
        (In::Preparing, On::Prepared) => (In::Receiving, vec![Do::SendReady]),
        (In::Receiving, On::AllReceived) => (In::Loading, vec![Do::LoadState]),
        (In::Loading, On::StateLoaded) => (In::Loaded, vec![Do::SendLoaded]),

        // Nobody can have committed: to drop it is safe, and the source owns the VM.
        (In::Negotiating | In::Preparing, On::Failed(Cause::Refused)) => {
            (In::Discarded, vec![Do::SendRefuse, Do::Discard])
        }
        (
            In::Negotiating | In::Preparing | In::Receiving | In::Loading,
            On::Failed(Cause::PeerAborted | Cause::Lost),
        ) => (In::Discarded, vec![Do::Discard]),
        (In::Negotiating | In::Preparing | In::Receiving | In::Loading, On::Failed(_)) => {
            (In::Discarded, vec![Do::SendAbort, Do::Discard])
        }

        (In::Loaded | In::Unresolved, On::Commit | On::SourceHandedOver) => {
            (In::Deciding, vec![Do::DecideHere])
        }
        // Whatever the source did meanwhile, it will find this decision.
        (In::Loaded, On::Failed(Cause::PeerAborted))
        | (In::Loaded | In::Unresolved, On::Failed(Cause::Cancelled))
        | (In::Unresolved, On::Resolved(Owner::There)) => {
            (In::Withdrawing, vec![Do::DecideNotHere])
        }
        // The source may be dead, and this the last copy: keep it.
        (In::Loaded, On::Failed(_)) => (In::Unresolved, vec![Do::JournalUnresolved]),

        (In::Unresolved, On::Resolved(Owner::Here)) => (In::Deciding, vec![Do::DecideHere]),
        (In::Loaded | In::Unresolved | In::Deciding | In::Withdrawing, On::DecidedNotHere) => {
            (In::Discarded, vec![Do::SendAbort, Do::Discard])
        }
        (In::Unresolved | In::Deciding | In::Withdrawing, On::DecidedHere) => {
            (In::Owning, vec![Do::TakeOwnership])
        }
        (In::Deciding | In::Withdrawing, On::NotDecided) => {
            (In::Unresolved, vec![Do::JournalUnresolved])
        }

        (In::Owning, On::Owned) => (In::Resuming, vec![Do::ResumeGuest]),
        (In::Owning, On::NotOwned) => (In::Owning, vec![Do::TellStuck, Do::TakeOwnership]),
        (In::Resuming, On::GuestResumed) => (In::Running, vec![Do::SendResumed]),
        (In::Resuming, On::NotResumed) => (In::Resuming, vec![Do::TellStuck, Do::ResumeGuest]),

        (_, _) => (phase, vec![]),
    }
}

impl DestinationPhase {
    /// Whether nothing more happens.
    pub fn is_final(self) -> bool {
        matches!(self, DestinationPhase::Running | DestinationPhase::Discarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_loaded_every_failure_discards_without_a_decision() {
        for phase in [
            DestinationPhase::Negotiating,
            DestinationPhase::Preparing,
            DestinationPhase::Receiving,
            DestinationPhase::Loading,
        ] {
            for cause in [Cause::Cancelled, Cause::Lost, Cause::Protocol, Cause::PeerAborted] {
                let (next, actions) = step(phase, DestinationEvent::Failed(cause));
                assert_eq!(next, DestinationPhase::Discarded);
                assert_eq!(actions.last(), Some(&DestinationAction::Discard));
                let tells = actions.contains(&DestinationAction::SendAbort);
                assert_eq!(tells, !matches!(cause, Cause::Lost | Cause::PeerAborted));
            }
        }
    }

    #[test]
    fn a_loss_after_loaded_keeps_the_vm() {
        let (next, actions) = step(DestinationPhase::Loaded, DestinationEvent::Failed(Cause::Lost));
        assert_eq!(next, DestinationPhase::Unresolved);
        assert_eq!(actions, [DestinationAction::JournalUnresolved]);
    }

    #[test]
    fn nothing_runs_before_the_journal_decided() {
        let (next, actions) = step(DestinationPhase::Loaded, DestinationEvent::Commit);
        assert_eq!(
            (next, actions),
            (DestinationPhase::Deciding, vec![DestinationAction::DecideHere])
        );
        let (next, _) = step(DestinationPhase::Deciding, DestinationEvent::DecidedNotHere);
        assert_eq!(next, DestinationPhase::Discarded);
        for phase in [DestinationPhase::Receiving, DestinationPhase::Loading] {
            assert_eq!(step(phase, DestinationEvent::Commit), (phase, vec![]), "too early");
        }
    }
}
