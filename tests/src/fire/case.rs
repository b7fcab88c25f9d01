//! What can be combined, and what may come of it.

use std::fmt;

use migration::stream::RecordType;

use crate::pairs::Fields;
use crate::proxy::{On, Spot, Way};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// The source's process dies; what it had sent arrives.
    KillSource,
    /// The source's host dies, and what was on its way is lost.
    LoseSource,
    /// The destination's process dies; what it had sent arrives. It is started again.
    KillDestination,
    /// The destination's host dies for good, and what was on its way is lost.
    LoseDestination,
    /// The control connection is reset.
    CutControl,
    /// One page connection is reset.
    CutPages,
    /// All connections carry nothing any more, for longer than a peer may be silent.
    Stall,
    /// A byte of the header of a record is wrong.
    FlipHeader,
    /// A byte of a device's or vCPU's state is wrong.
    FlipState,
    /// The destination's journal cannot be written.
    DiskFull,
    /// The destination gets no more memory.
    NoMemory,
    /// Somebody else takes the VM's disk when the source has given it up.
    DiskTaken,
}

/// When it goes wrong: the record that stands still at the proxy meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// OFFER has been sent and has not arrived.
    Offering,
    /// The same of the last page connection's JOIN.
    Preparing,
    /// Of the end of the first round.
    Copying,
    /// Of COMPLETE: the guest is paused.
    Stopping,
    /// Of LOADED.
    Loaded,
    /// Of COMMIT.
    CommitSent,
    /// COMMIT has arrived.
    CommitArrived,
    /// RESUMED has been sent and has not arrived.
    Resumed,
    /// The same of DONE.
    Done,
}

/// How memory is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// While the guest runs.
    Precopy,
    /// While it stands.
    Cold,
    /// After it.
    Postcopy,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Precopy, Self::Cold, Self::Postcopy];

    /// As `minivmm migrate --mode` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Cold => "cold",
            Self::Postcopy => "postcopy",
        }
    }
}

/// Who runs the guest in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runs {
    /// The source, as before.
    Source,
    /// The destination.
    Destination,
    /// Nobody: its only copy died.
    Nobody,
    /// Nobody until an operator says so: the destination has it all, and does not know.
    Unresolved,
}

/// One combination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Case {
    /// What goes wrong.
    pub fault: Fault,
    /// When.
    pub phase: Phase,
    /// Page connections.
    pub connections: u16,
    /// How memory is migrated.
    pub mode: Mode,
}

const FAULTS: [Fault; 12] = [
    Fault::KillSource,
    Fault::LoseSource,
    Fault::KillDestination,
    Fault::LoseDestination,
    Fault::CutControl,
    Fault::CutPages,
    Fault::Stall,
    Fault::FlipHeader,
    Fault::FlipState,
    Fault::DiskFull,
    Fault::NoMemory,
    Fault::DiskTaken,
];

const PHASES: [Phase; 9] = [
    Phase::Offering,
    Phase::Preparing,
    Phase::Copying,
    Phase::Stopping,
    Phase::Loaded,
    Phase::CommitSent,
    Phase::CommitArrived,
    Phase::Resumed,
    Phase::Done,
];

impl Fields for Case {
    fn fields(&self) -> Vec<String> {
        let Self { fault, phase, connections, mode } = self;
        vec![
            format!("{fault:?}"),
            format!("{phase:?}"),
            connections.to_string(),
            mode.name().to_owned(),
        ]
    }
}

impl Case {
    /// All that can be.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for fault in FAULTS {
            for phase in PHASES {
                for connections in [1, 4] {
                    for mode in Mode::ALL {
                        let case = Self { fault, phase, connections, mode };
                        if case.can_be() {
                            all.push(case);
                        }
                    }
                }
            }
        }
        all
    }

    fn can_be(&self) -> bool {
        // Only then are there rounds while the guest runs.
        let copies = self.mode == Mode::Precopy || self.phase != Phase::Copying;
        // Half a VM is on each host then: the death of either is of tests/tests/postcopy.rs.
        let halves = self.mode == Mode::Postcopy
            && match self.fault {
                Fault::KillSource | Fault::LoseSource => self.phase >= Phase::Stopping,
                Fault::KillDestination | Fault::LoseDestination => {
                    self.phase >= Phase::CommitArrived
                }
                _ => false,
            };
        copies
            && !halves
            && match self.fault {
                Fault::CutPages => self.phase > Phase::Offering,
                Fault::FlipHeader => self.phase != Phase::CommitArrived,
                Fault::FlipState => self.phase == Phase::Stopping,
                Fault::NoMemory => self.phase <= Phase::Stopping,
                Fault::DiskTaken => self.phase == Phase::CommitSent,
                _ => true,
            }
    }

    /// The record that stands still.
    #[must_use]
    pub fn spot(&self) -> Spot {
        let last = On::Page(self.connections - 1);
        match self.phase {
            Phase::Offering => Spot::new(On::Main, Way::Forth, RecordType::Offer),
            Phase::Preparing => Spot::new(last, Way::Forth, RecordType::Join),
            Phase::Copying => Spot::new(last, Way::Forth, RecordType::Echo).round(0),
            // What is on the page connections may overtake COMPLETE.
            Phase::Stopping if self.fault == Fault::CutPages => {
                Spot::new(last, Way::Forth, RecordType::Sync)
            }
            Phase::Stopping if self.fault == Fault::FlipState => {
                Spot::new(On::Main, Way::Forth, RecordType::State)
            }
            Phase::Stopping => Spot::new(On::Main, Way::Forth, RecordType::Complete),
            Phase::Loaded => Spot::new(On::Main, Way::Back, RecordType::Loaded),
            Phase::CommitSent => Spot::new(On::Main, Way::Forth, RecordType::Commit),
            Phase::CommitArrived => Spot::new(On::Main, Way::Forth, RecordType::Commit).after(),
            Phase::Resumed => Spot::new(On::Main, Way::Back, RecordType::Resumed),
            Phase::Done => Spot::new(On::Main, Way::Forth, RecordType::Done),
        }
    }

    /// Whether somebody has the VM in any case.
    #[must_use]
    pub fn spares_the_vm(&self) -> bool {
        !self.outcomes().contains(&Runs::Nobody)
    }

    /// What may come of it.
    #[must_use]
    pub fn outcomes(&self) -> &'static [Runs] {
        use Runs::{Destination, Nobody, Source, Unresolved};
        let phase = self.phase;
        match self.fault {
            // All that the destination needs may be on its way.
            Fault::KillSource if phase == Phase::Stopping => &[Nobody, Unresolved],
            // It ended with the process that owned it.
            Fault::KillSource | Fault::LoseSource if phase < Phase::Loaded => &[Nobody],
            Fault::KillSource | Fault::LoseSource if phase == Phase::Loaded => &[Unresolved],
            Fault::LoseSource if phase == Phase::CommitSent => &[Unresolved],
            Fault::KillSource | Fault::LoseSource => &[Destination],

            Fault::KillDestination | Fault::LoseDestination if phase < Phase::CommitArrived => {
                &[Source]
            }
            // It may have decided, or may not.
            Fault::KillDestination if phase == Phase::CommitArrived => &[Source, Nobody],
            Fault::KillDestination | Fault::LoseDestination => &[Nobody],

            // It is lost before the source commits, or made again after that.
            Fault::CutPages if self.mode == Mode::Postcopy && phase >= Phase::Loaded => {
                &[Source, Destination]
            }
            // After SYNC there is nothing more to come.
            Fault::CutPages if phase >= Phase::Loaded => &[Destination],
            // What it does not need any more it cannot lack.
            Fault::NoMemory if phase >= Phase::Copying => &[Source, Destination],
            // It may have been decided before; and COMMIT may lie unread while its connection is lost.
            Fault::DiskFull | Fault::CutControl | Fault::Stall if phase == Phase::CommitArrived => {
                &[Source, Destination]
            }
            Fault::DiskTaken => &[Destination],
            _ if phase < Phase::CommitArrived => &[Source],
            _ => &[Destination],
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, phase, connections, mode } = self;
        write!(f, "{fault:?}_at_{phase:?}_{connections}_{}", mode.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_and_every_phase_occur() {
        let all = Case::all();
        assert!(FAULTS.iter().all(|fault| all.iter().any(|case| case.fault == *fault)));
        assert!(PHASES.iter().all(|phase| all.iter().any(|case| case.phase == *phase)));
    }
}
