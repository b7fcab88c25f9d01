//! Who owns the VM, and when that changes: the phases of both ends as data.
//!
//! Each end has one enum of phases and one pure function `step(phase, event)` that gives the next
//! phase and what is to be done. The runners ([`crate::source`], [`crate::destination`]) do what
//! it says, in its order, and nothing else decides over pausing, resuming, owning or giving up. The
//! checker in `model.rs` runs the same functions through every order of loss, duplication, delay,
//! crash and restart.
//!
//! The table of `docs/PROTOCOL.md`, sections 8.2 and 8.3, is this module in prose.
//!
//! ```text
//!   source:  Offering > Preparing > Copying > Stopping > Committing > HandedOver
//!                 `---------`----------`---------'           |  `--> Unresolved --> HandedOver
//!                          RolledBack                        `-----------------`--> RolledBack
//!
//!   destination:  Negotiating > Preparing > Receiving > Loading > Loaded > Deciding > Owning
//!                       `-----------`-----------`----------'        |  \      |     > Resuming
//!                              Discarded <--------------------- Unresolved <--'     > Running
//! ```

mod destination;
#[cfg(test)]
mod model;
mod source;

pub use destination::{DestinationAction, DestinationEvent, DestinationPhase};
pub use source::{SourceAction, SourceEvent, SourcePhase};

pub(crate) use destination::step as step_destination;
pub(crate) use source::step as step_source;

use serde::{Deserialize, Serialize};

/// Why an end cannot or will not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The destination cannot take the VM.
    Refused,
    /// Somebody asked to stop.
    Cancelled,
    /// A connection was lost, or the peer is dead or silent.
    Lost,
    /// The peer gave up and said so.
    PeerAborted,
    /// Something failed at this end.
    Failed,
    /// The peer broke the protocol.
    Protocol,
    /// A time limit passed.
    Deadline,
    /// It would not converge within its limits.
    NotConverging,
    /// The guest powered off, crashed, or was ended by an operator.
    GuestEnded,
}

/// What the other end's journal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing of that id, or the wrong token.
    Unknown,
    /// The migration is known and not decided.
    Undecided,
    /// The VM is owned there, or was when it ended.
    RunningHere,
    /// It will never run there by this migration.
    NotHere,
    /// Given away for good.
    HandedOver,
    /// That end does not know either.
    Unresolved,
}

impl Verdict {
    const ALL: [Verdict; 6] = [
        Verdict::Unknown,
        Verdict::Undecided,
        Verdict::RunningHere,
        Verdict::NotHere,
        Verdict::HandedOver,
        Verdict::Unresolved,
    ];

    /// Its number on the wire.
    pub(crate) fn number(self) -> u16 {
        self as u16 + 1
    }

    pub(crate) fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.number() == number)
    }
}

impl Cause {
    /// The reason that ABORT gives.
    pub(crate) fn abort_reason(self) -> u16 {
        match self {
            Cause::Cancelled | Cause::NotConverging => 1,
            Cause::Refused | Cause::Lost | Cause::PeerAborted | Cause::Failed => 2,
            Cause::Protocol => 3,
            Cause::GuestEnded => 4,
            Cause::Deadline => 5,
        }
    }
}

/// Which end owns the VM, as an operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// The end where the operator says so.
    Here,
    /// The other end.
    There,
}
