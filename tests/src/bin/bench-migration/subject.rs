//! Who is measured, and under which load.

use std::fmt;
use std::time::Duration;

use ::tests::bench::{Guest, Result, Setup, Tools, Vmm};
use serde::Serialize;

use crate::qemu_faults::FaultTrace;
use crate::sample::Quantity;
use crate::{minivmm, qemu};

/// What a run measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The guest without migration: what gaps the machine makes by itself.
    Baseline,
    /// As many bytes over TCP, from memory to memory, by nothing but reads and writes: the limit.
    RawCopy,
    /// minivmm, pre-copy.
    Minivmm {
        /// Connections for pages.
        connections: u8,
    },
    /// QEMU, pre-copy.
    Qemu {
        /// Channels of multifd; `None` without multifd.
        multifd: Option<u8>,
    },
    /// minivmm, post-copy at once, on one connection.
    MinivmmPostcopy {
        /// Its pre-paging, as `--prepaging` has it.
        prepaging: &'static str,
    },
    /// QEMU, post-copy as soon as it lets itself be told to.
    QemuPostcopy {
        /// Whether pages that were asked for have a channel of their own.
        preempt: bool,
    },
}

impl Subject {
    /// All, in the order of tables: first those of pre-copy.
    pub const ALL: [Self; 11] = [
        Self::Baseline,
        Self::RawCopy,
        Self::Minivmm { connections: 1 },
        Self::Minivmm { connections: 4 },
        Self::Qemu { multifd: None },
        Self::Qemu { multifd: Some(4) },
        Self::MinivmmPostcopy { prepaging: "bubble" },
        Self::MinivmmPostcopy { prepaging: "linear" },
        Self::MinivmmPostcopy { prepaging: "off" },
        Self::QemuPostcopy { preempt: false },
        Self::QemuPostcopy { preempt: true },
    ];
    /// Those of [`Subject::ALL`] that are measured where nothing else is said.
    pub const PRECOPY: usize = 6;

    /// What `--subjects` calls it.
    pub fn key(self) -> String {
        match self {
            Self::Baseline => "baseline".into(),
            Self::RawCopy => "raw-copy".into(),
            Self::Minivmm { connections } => format!("minivmm-{connections}"),
            Self::Qemu { multifd: Some(_) } => "qemu-multifd".into(),
            Self::Qemu { multifd: None } => "qemu-precopy".into(),
            Self::MinivmmPostcopy { prepaging } => format!("minivmm-postcopy-{prepaging}"),
            Self::QemuPostcopy { preempt: false } => "qemu-postcopy".into(),
            Self::QemuPostcopy { preempt: true } => "qemu-postcopy-preempt".into(),
        }
    }

    /// Those that a word of `--subjects` means: one, or a VMM with its defaults.
    pub fn named(word: &str) -> Vec<Self> {
        let mut named = Self::ALL.to_vec();
        named.retain(|subject| match word {
            "minivmm" => subject.is_minivmm() && !subject.is_postcopy(),
            "qemu" => subject.is_qemu() && !subject.is_postcopy(),
            "postcopy" => subject.is_postcopy(),
            _ => subject.key() == word,
        });
        named
    }

    /// Whether it is this project's.
    pub fn is_minivmm(self) -> bool {
        matches!(self, Self::Minivmm { .. } | Self::MinivmmPostcopy { .. })
    }

    /// Whether it is QEMU's.
    pub fn is_qemu(self) -> bool {
        matches!(self, Self::Qemu { .. } | Self::QemuPostcopy { .. })
    }

    /// Whether memory follows the guest.
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::MinivmmPostcopy { .. } | Self::QemuPostcopy { .. })
    }

    /// The VMM that runs its guest, if that is `without` for those that need none.
    fn vmm(self, without: Vmm) -> Vmm {
        match self {
            Self::Baseline | Self::RawCopy => without,
            Self::Minivmm { .. } | Self::MinivmmPostcopy { .. } => Vmm::Minivmm,
            Self::Qemu { .. } | Self::QemuPostcopy { .. } => Vmm::QemuRom,
        }
    }

    /// Boots the guest and waits until it is at work. `name` tells it from others of this time.
    pub fn boot(self, tools: &Tools, without: Vmm, name: &str, setup: &Setup) -> Result<Guest> {
        let mut guest = match self.vmm(without) {
            Vmm::Minivmm => tools.boot(Vmm::Minivmm, name, setup)?,
            Vmm::QemuRom | Vmm::QemuFirmware | Vmm::QemuUring => {
                qemu::boot(tools, self, name, setup)?
            }
        };
        guest.event("ready")?;
        Ok(guest)
    }

    /// A process that waits for the guest.
    pub fn receive(self, tools: &Tools, name: &str, setup: &Setup) -> Result<Incoming> {
        match self {
            Self::Minivmm { .. } | Self::MinivmmPostcopy { .. } => minivmm::receive(tools),
            Self::Qemu { .. } | Self::QemuPostcopy { .. } => {
                qemu::receive(tools, self, name, setup)
            }
            Self::Baseline | Self::RawCopy => Err("its guest stays where it is".into()),
        }
    }

    /// Migrates the guest and waits until its source has let go of it.
    pub fn migrate(self, tools: &Tools, source: &mut Guest, name: &str, to: &str) -> Result<Moved> {
        match self {
            Self::Minivmm { connections } => {
                let connections = connections.to_string();
                minivmm::migrate(tools, name, to, &["precopy", "--connections", &connections])
            }
            Self::MinivmmPostcopy { prepaging } => {
                minivmm::migrate(tools, name, to, &["postcopy", "--prepaging", prepaging])
            }
            Self::Qemu { .. } | Self::QemuPostcopy { .. } => {
                qemu::migrate(source, to, self.is_postcopy())
            }
            Self::Baseline | Self::RawCopy => Err("its guest stays where it is".into()),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Baseline => write!(f, "no migration"),
            Self::RawCopy => write!(f, "raw TCP copy"),
            Self::Minivmm { connections: 1 } => write!(f, "minivmm, 1 connection"),
            Self::Minivmm { connections } => write!(f, "minivmm, {connections} connections"),
            Self::Qemu { multifd: None } => write!(f, "QEMU pre-copy"),
            Self::Qemu { multifd: Some(channels) } => write!(f, "QEMU multifd {channels}"),
            Self::MinivmmPostcopy { prepaging } => write!(f, "minivmm post-copy, {prepaging}"),
            Self::QemuPostcopy { preempt: false } => write!(f, "QEMU post-copy"),
            Self::QemuPostcopy { preempt: true } => write!(f, "QEMU post-copy, preempt"),
        }
    }
}

impl Serialize for Subject {
    fn serialize<S: serde::Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.serialize_str(&self.key())
    }
}

/// A process that waits for a guest.
#[derive(Debug)]
pub struct Incoming {
    /// The process; it has the guest afterwards.
    pub guest: Guest,
    /// Where it listens, `ADDRESS:PORT`.
    pub address: String,
    /// With QEMU's post-copy, where it writes how long pages were waited for.
    pub faults: Option<FaultTrace>,
}

impl Incoming {
    /// Waits until the guest has come: until it says itself that it stood. Gives that event.
    pub fn arrived(&mut self, subject: Subject) -> Result<serde_json::Value> {
        let switch = self.guest.event("switch")?.event;
        if subject.is_qemu() {
            qemu::has_arrived(&mut self.guest)?;
        }
        Ok(switch)
    }
}

/// A migration that is over.
#[derive(Debug, Clone)]
pub struct Moved {
    /// From right before the order until it is known outside that the source has let go. minivmm:
    /// from making the process `minivmm migrate` until it has ended. QEMU: from sending `migrate` to
    /// its monitor until its event `completed` is read.
    pub outside: Duration,
    /// What the VMM says.
    pub told: Told,
}

/// What a VMM tells of its migration, in the same units for all.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// How long it took.
    pub total_ms: Option<f64>,
    /// How long the guest stood, as far as the VMM knows.
    pub downtime_ms: Option<f64>,
    /// Bytes sent.
    pub bytes: Option<f64>,
    /// Times that memory was gone through, the last one in the pause included.
    pub rounds: Option<f64>,
    /// Bytes per second of the first pass.
    pub first_pass: Option<f64>,
    /// Parts of the pause, and what waits for pages there were.
    pub figures: Vec<(Quantity, f64)>,
    /// Everything, as it was told.
    pub all: serde_json::Value,
}

/// RAM where nothing else is said.
pub const RAM_MIB: u64 = 1024;

/// Memory and load of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Cell {
    /// RAM.
    pub memory_mib: u64,
    /// Memory that the guest has written, and goes on writing.
    pub ws_mib: u64,
    /// Pages that it writes per second.
    pub dirty: u64,
    /// Whether pages that are written one after the other lie so in RAM; otherwise they are scattered.
    pub sequential: bool,
}

impl Cell {
    /// The guest. Registers are checked as far as QEMU keeps them (see beacon's README).
    pub fn setup(self) -> Setup {
        let Self { memory_mib, ws_mib, dirty, sequential } = self;
        let order = if sequential { "linear" } else { "scattered" };
        let cmdline = format!("ws={ws_mib} dirty={dirty} order={order} report=0 fpu=sse");
        Setup { memory_mib, cpus: 1, cmdline, ..Setup::default() }
    }

    /// Bytes of the working set.
    pub fn bytes(self) -> u64 {
        self.ws_mib << 20
    }

    /// `MIB/RATE` or `MIB/RATE/sequential` with 1 GiB of RAM; the rate may end with `k`.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{text} is no cell: MIB/PAGES_PER_SECOND, such as 256/10k");
        let (text, sequential) = match text.strip_suffix("/sequential") {
            Some(text) => (text, true),
            None => (text, false),
        };
        let (ws, rate) = text.split_once('/').ok_or_else(wrong)?;
        let (rate, unit) = rate.strip_suffix('k').map_or((rate, 1), |rate| (rate, 1000));
        let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
        let (ws_mib, dirty) = (number(ws)?, number(rate)?.checked_mul(unit).ok_or_else(wrong)?);
        // What beacon leaves of 1 GiB.
        if !(1..=900).contains(&ws_mib) {
            return Err(format!("{text}: the working set is 1 to 900 MiB"));
        }
        Ok(Self { memory_mib: RAM_MIB, ws_mib, dirty, sequential })
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) =
            if self.dirty >= 1000 { (self.dirty / 1000, " k") } else { (self.dirty, "") };
        if self.memory_mib != RAM_MIB {
            write!(f, "{} GiB of RAM, ", self.memory_mib >> 10)?;
        }
        let order = if self.sequential { ", sequential" } else { "" };
        write!(f, "{} MiB, {number}{unit} pages/s{order}", self.ws_mib)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn cells_are_read_and_shown() {
        let cell = Cell::parse("256/10k").unwrap();
        let (memory_mib, ws_mib, dirty) = (1024, 256, 10_000);
        assert_eq!(cell, Cell { memory_mib, ws_mib, dirty, sequential: false });
        assert_eq!(cell.to_string(), "256 MiB, 10 k pages/s");
        assert_eq!(Cell::parse("16/0").unwrap().to_string(), "16 MiB, 0 pages/s");
        let cell = Cell::parse("256/10k/sequential").unwrap();
        assert_eq!(cell.to_string(), "256 MiB, 10 k pages/s, sequential");
        let large = Cell { memory_mib: 16 << 10, ws_mib: 64, dirty: 0, sequential: false };
        assert_eq!(large.to_string(), "16 GiB of RAM, 64 MiB, 0 pages/s");
        for wrong in ["", "16", "16/x", "0/0", "1000/0", "1/99999999999999999999k"] {
            assert!(Cell::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn words_mean_one_or_all_of_a_vmm() {
        assert_eq!(Subject::named("minivmm").len(), 2);
        assert_eq!(Subject::named("qemu").len(), 2);
        assert_eq!(Subject::named("postcopy").len(), 5);
        assert!(Subject::ALL[..Subject::PRECOPY].iter().all(|subject| !subject.is_postcopy()));
        let precopy = Subject::Qemu { multifd: None };
        assert_eq!(Subject::named("qemu-precopy"), [precopy]);
        assert_eq!(Subject::named("baseline"), [Subject::Baseline]);
        assert_eq!(Subject::named("xen"), []);
        for subject in Subject::ALL {
            assert_eq!(Subject::named(&subject.key()), [subject]);
        }
    }
}
