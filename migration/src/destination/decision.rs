//! Whether the VM runs here: asked of the journal, written there, and done.

use std::time::Instant;

use crate::destination::failure::Failure;
use crate::destination::session::{Session, JOURNAL_INTERVAL};
use crate::destination::Input;
use crate::handover::{Cause, DestinationEvent, Owner};
use crate::journal::DestinationEntry;

impl Session<'_, '_, '_> {
    /// Looks into the journal once, then waits a little.
    pub(super) fn await_decision(&mut self) -> DestinationEvent {
        match self.decision() {
            Some(Owner::Here) => return DestinationEvent::DecidedHere,
            Some(Owner::There) => return DestinationEvent::DecidedNotHere,
            None => {}
        }
        if self.entry.as_ref().is_some_and(DestinationEntry::source_handed_over) {
            return DestinationEvent::SourceHandedOver;
        }
        match self.next(Instant::now() + JOURNAL_INTERVAL) {
            Some(Input::Cancel) => {
                self.note(Failure::new(Cause::Cancelled, "cancelled at the destination"))
            }
            Some(Input::Resolved(owner)) => DestinationEvent::Resolved(owner),
            _ => DestinationEvent::Failed(Cause::Lost),
        }
    }

    pub(super) fn decision(&mut self) -> Option<Owner> {
        self.entry.as_mut().and_then(DestinationEntry::decision)
    }

    pub(super) fn decide(&mut self, owner: Owner) -> DestinationEvent {
        let decided = match &mut self.entry {
            Some(entry) => entry.decide(owner),
            None => Ok(Owner::There),
        };
        match decided {
            Ok(Owner::Here) => DestinationEvent::DecidedHere,
            Ok(Owner::There) => {
                if owner == Owner::Here {
                    self.reasons = vec!["it was decided before that it does not run here".into()];
                }
                DestinationEvent::DecidedNotHere
            }
            Err(error) => {
                tracing::error!(%error, "the decision cannot be written");
                self.reasons = vec![error.to_string()];
                DestinationEvent::NotDecided
            }
        }
    }

    pub(super) fn take_ownership(&mut self) -> DestinationEvent {
        match self.vm().and_then(|vm| Ok(vm.take_ownership()?)) {
            Ok(()) => {
                self.own = self.committed.elapsed();
                DestinationEvent::Owned
            }
            Err(failure) => {
                self.reasons = failure.reasons;
                DestinationEvent::NotOwned
            }
        }
    }

    pub(super) fn resume_guest(&mut self) -> DestinationEvent {
        let started = Instant::now();
        match self.vm().and_then(|vm| Ok(vm.start(self.run_guest)?)) {
            Ok(()) => {
                self.resume = started.elapsed();
                DestinationEvent::GuestResumed
            }
            Err(failure) => {
                self.reasons = failure.reasons;
                DestinationEvent::NotResumed
            }
        }
    }
}
