//! Arguments of the commands that move VMs.

use std::time::Duration;

use clap::{Args, ValueEnum};
use migration::prepaging::Prepaging;
use migration::source::OnStall;

use super::args::{parse_vm, Output, ProcessArgs};
use crate::config::{parse_name, parse_size, ConfigError, ReceiveSettings, Replacement};
use crate::control::{MigrateRequest, MigrationMode, RecoverRequest};

#[derive(Debug, Args)]
#[command(after_help = "\
Listens until a VM has come, then is that VM's process, as `minivmm run` would be, and ends with it:
every VM that is to come needs a `minivmm receive` of its own. When a migration fails, it says so and
waits for the next one, unless --once is given. While it has a VM, it goes on answering what became of
migrations to this host. A signal ends it; where a source may have handed its VM over and still has to ask,
it answers that first, for at most 90 s or until the next signal.

The VM brings its configuration, kernel and initrd along; disks, taps, bridges and networks must be here under the same
names, or be named with --disk and --net. On the host that the VM comes from, it is called
NAME@incoming until it was handed over. With --paused, the VM is this host's when it has come, and its
guest goes on at `minivmm resume`.

Examples:
  minivmm receive --listen 10.0.0.2:4444
  minivmm receive --listen 0.0.0.0:4444 --disk root=/mnt/web.img --net eth0=tap7 --console socket")]
pub(super) struct ReceiveArgs {
    /// Address to listen at; with port 0 the kernel chooses one, which is printed
    #[arg(long, value_name = "ADDR:PORT")]
    listen: String,
    /// Another name for the VM [default: its own]
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// Another file or block device for a disk: ID=PATH; may be repeated
    #[arg(long = "disk", value_name = "ID=PATH")]
    disks: Vec<Replacement>,
    /// Another tap, bridge or network for a network card: ID=TAP, ID=bridge=BRIDGE, ID=network=NAME; may be repeated
    #[arg(long = "net", value_name = "ID=WHERE")]
    nets: Vec<Replacement>,
    /// End, with exit code 1, when the first migration fails, rather than wait for another
    #[arg(long)]
    once: bool,
    /// Give root's powers up for those of this user, once it listens and has /dev/kvm open
    ///
    /// Disks and taps must then be usable for that user, and the directories for sockets and the
    /// journal are that user's own, unless the environment names others. Cards on bridges and declared
    /// networks need CAP_NET_ADMIN, which is given up too: such VMs are refused.
    #[arg(long, value_name = "NAME|UID[:GROUP]")]
    user: Option<String>,
    #[command(flatten)]
    process: ProcessArgs,
}

impl ReceiveArgs {
    pub(super) fn settings(self) -> Result<ReceiveSettings, ConfigError> {
        let (console, process) = self.process.settings()?;
        let Self { listen, name, disks, nets, once, user, .. } = self;
        Ok(ReceiveSettings { listen, name, disks, nets, console, once, user, process })
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Copies memory while the guest runs, round by round, until the rest is small enough for the wanted
downtime; then the guest is paused, the rest and its state are sent, and it goes on at the
destination. Until then every failure leaves it running here.

With post-copy the guest goes on at the destination first, and its memory follows: at once (--mode postcopy), after
some rounds (--mode hybrid), when it does not converge (--on-stall postcopy), or when told to
(`minivmm migrate-start-postcopy`, with one of the last two). If connections are lost then, the guest runs on with the
memory that it has, and this end tries again and again (see --recover). The destination needs userfaultfd.

Exit codes: 0 the VM runs at the destination; 1 it runs here as before; 7 it is not known who owns it
(see `minivmm resolve --help`); 8 it runs at the destination, and a part of its memory never followed.

Examples:
  minivmm migrate web --to 10.0.0.2:4444
  minivmm migrate web --to host2:4444 --downtime 5ms --connections 4 --bandwidth 500M
  minivmm migrate web --to host2:4444 --mode cold --verify --json
  minivmm migrate web --to host2:4444 --mode hybrid --switch-after 10s
  minivmm migrate web --recover --to 10.0.1.2:4444")]
pub(super) struct MigrateArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// Where `minivmm receive` listens
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "recover")]
    to: Option<String>,
    /// How: memory is copied while the guest runs, or when it was paused, or follows the guest, or some of it is copied and
    /// the rest follows
    #[arg(long, value_enum, default_value_t)]
    mode: MigrationMode,
    /// Let a post-copy migration that lost its connections try again now, with --to at another address
    #[arg(long, conflicts_with_all = ["mode", "rounds", "switch_after", "push", "prepaging", "on_stall", "forward_packets"])]
    pub(super) recover: bool,
    /// Hybrid: rounds before the guest moves [default: 1, without --switch-after]
    #[arg(long, value_name = "N")]
    rounds: Option<u32>,
    /// Hybrid: after this time the guest moves, in the middle of a round too
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    switch_after: Option<Duration>,
    /// Post-copy: send pages that the guest did not ask for; without it, a migration lasts until the guest has
    /// touched all of its memory, or `migrate-set --push on` [default: on]
    #[arg(long, value_enum)]
    push: Option<Switch>,
    /// Post-copy: in which order pages go, and what goes with one that was asked for [default: bubble]
    #[arg(long, value_enum)]
    prepaging: Option<PrepagingChoice>,
    /// Send packets after the guest that still come to this host, until none have come for 0.2 s, or for 5 s [default: on]
    #[arg(long, value_enum)]
    forward_packets: Option<Switch>,
    /// How long the guest may stand still: 20ms, 1s [default: 20ms]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    downtime: Option<Duration>,
    /// Give up after this time: 10s, 5m [default: never]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    timeout: Option<Duration>,
    /// Take the other end for dead after so long a silence, 100ms to 60s [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    dead_after: Option<Duration>,
    /// What to do when it does not converge: stop the guest for as long as it takes, cancel, slow down
    /// the vCPUs that write until it does, or let memory follow the guest [default: stop]
    #[arg(long, value_enum)]
    on_stall: Option<StallAction>,
    /// Connections for memory, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: Option<u16>,
    /// Bytes per second while the guest runs: 100M, 1G [default: no limit]
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    bandwidth: Option<u64>,
    /// Hash memory at both ends while the guest stands, and compare
    #[arg(long)]
    verify: bool,
    /// Most rounds while the guest runs [default: as the VM is configured, else 30]
    #[arg(long, value_name = "N")]
    max_rounds: Option<u32>,
    /// Most bytes, as a multiple of the memory in use [default: as the VM is configured, else 3]
    #[arg(long, value_name = "FACTOR")]
    max_bytes: Option<f64>,
    /// So few dirty pages are few enough [default: as the VM is configured, else 16]
    #[arg(long, value_name = "PAGES")]
    dirty_pages: Option<u64>,
    /// Return at once; `minivmm migration NAME` tells how far it is
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

/// See [`OnStall`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StallAction {
    /// Pause the guest for as long as it takes
    Stop,
    /// Give up
    Cancel,
    /// Slow down the vCPUs that write
    Throttle,
    /// Let the rest of memory follow the guest
    Postcopy,
}

/// See [`Prepaging`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrepagingChoice {
    /// Ascending, whatever is asked for
    Off,
    /// On from the page that was asked for last
    Linear,
    /// Windows that grow around the pages that were asked for, and ahead of walks through memory
    Bubble,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

impl MigrateArgs {
    pub(super) fn recover_request(&self) -> RecoverRequest {
        RecoverRequest { to: self.to.clone() }
    }

    pub(super) fn request(&self) -> MigrateRequest {
        MigrateRequest {
            to: self.to.clone().unwrap_or_default(),
            mode: self.mode,
            downtime_us: self.downtime.map(micros),
            timeout_ms: self.timeout.map(|time| micros(time).div_ceil(1000)),
            dead_after_ms: self.dead_after.map(|time| micros(time).div_ceil(1000)),
            on_stall: self.on_stall.map(|action| match action {
                StallAction::Stop => OnStall::Stop,
                StallAction::Cancel => OnStall::Cancel,
                StallAction::Throttle => OnStall::Throttle,
                StallAction::Postcopy => OnStall::Postcopy,
            }),
            rounds: self.rounds,
            switch_after_ms: self.switch_after.map(|time| micros(time).div_ceil(1000)),
            push: self.push.map(|push| push == Switch::On),
            prepaging: self.prepaging.map(|prepaging| match prepaging {
                PrepagingChoice::Off => Prepaging::Off,
                PrepagingChoice::Linear => Prepaging::Linear,
                PrepagingChoice::Bubble => Prepaging::Bubble,
            }),
            forward_packets: self.forward_packets.map(|forward| forward == Switch::On),
            connections: self.connections,
            bandwidth: self.bandwidth,
            verify: self.verify,
            max_rounds: self.max_rounds,
            max_bytes_factor: self.max_bytes,
            dirty_pages: self.dirty_pages,
            detach: self.detach,
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Without a name: all migrations that this host's journal knows, with their verdicts.

Examples:
  minivmm migration web
  minivmm migration --json")]
pub(super) struct MigrationArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: Option<String>,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  minivmm migrate-set web --bandwidth 50M
  minivmm migrate-set web --bandwidth 0 --downtime 100ms   no limit any more, and a longer pause")]
pub(super) struct MigrateSetArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// Bytes per second while the guest runs; 0 is no limit
    #[arg(long, value_name = "RATE", value_parser = parse_size, required_unless_present_any = ["downtime", "push"])]
    pub(super) bandwidth: Option<u64>,
    /// Post-copy: whether pages are sent that the guest did not ask for
    #[arg(long, value_enum)]
    pub(super) push: Option<Switch>,
    /// How long the guest may stand still
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub(super) downtime: Option<Duration>,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
When the connection breaks at the moment of the hand-over, the source does not know whether the
destination runs the VM. It stays frozen and asks until it gets an answer. Only when the other host
is gone for good must somebody decide. Decide `here` only if you are certain that the VM does not run
and never will run at the other end: two running copies of one VM destroy its disks.

Examples:
  minivmm migration                         lists migrations and their ids
  minivmm resolve 3f9c --owner here         the VM goes on here
  minivmm resolve 3f9c --owner there        this copy is given up")]
pub(super) struct ResolveArgs {
    /// Migration id, or as much of its beginning as is unique
    pub(super) id: String,
    /// Who owns the VM, as seen from this host
    #[arg(long, value_enum)]
    pub(super) owner: OwnerChoice,
    #[command(flatten)]
    pub(super) output: Output,
}

/// Who owns a VM, as an operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OwnerChoice {
    /// This host
    Here,
    /// The other host
    There,
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Reads `20ms`, `1.5s`, `5m`, `500us`.
fn parse_time(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 4] = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0)];
    let wrong = || format!("{text:?} is no time: write 500us, 20ms, 1.5s or 5m");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(parse_time("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_time("500us"), Ok(Duration::from_micros(500)));
        assert_eq!(parse_time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
        for bad in ["20", "ms", "-1s", "1h", "", "1.2.3s", "99999999999999999999999999m"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }
}
