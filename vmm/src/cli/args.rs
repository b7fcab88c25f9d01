//! Flags and arguments.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::migrate_args::{MigrateArgs, MigrateSetArgs, MigrationArgs, ReceiveArgs, ResolveArgs};
use super::network::NetworkArgs;
use crate::config::{
    parse_cmdline, parse_cpu, parse_cpus, parse_hugepages, parse_id, parse_name, parse_size,
    BalloonConfig, ConfigError, ConsoleConfig, DiskConfig, LogConfig, MigrationOptions, NetOptions,
    OnReboot, ProcessSettings, Replacement, RestoreSettings, RunOptions, SandboxMode,
};
use crate::runtime_dir::INCOMING;

/// The name of a VM that exists, or `NAME@incoming`.
pub(super) fn parse_vm(text: &str) -> Result<String, ConfigError> {
    parse_name(text.strip_suffix(INCOMING).unwrap_or(text))?;
    Ok(text.to_owned())
}

const EXAMPLES: &str = "\
Examples:
  minivmm run                                   boot the built-in guest on this terminal
  minivmm run --name web --kernel vmlinux --initrd initrd.img --memory 1G --cpus 2 --console socket
  minivmm console web                           attach to it; Ctrl-A x leaves
  minivmm save web web.vm --stop                save it and end it
  minivmm restore web.vm                        go on where it was, in a new process
  minivmm stop web --timeout 20 --force         power button, and kill it after 20 s
  minivmm list --json | jq '.[].name'

Exit codes:
  0  done; run and restore: the guest powered off, or was ended on request
  1  it was tried and failed
  2  wrong usage or configuration
  3  the guest crashed
  4  no VM of that name runs; network: there is none of that name
  5  refused in the present state (name taken, disk, tap or network in use, VM migrates, ...)
  6  it did not happen in time
  7  it is not known which host owns the VM (see `minivmm resolve --help`)
  8  the VM was handed over, and a part of its memory never followed it

Files:
  Sockets and locks are in $MINIVMM_RUNTIME_DIR, else $XDG_RUNTIME_DIR/minivmm, else
  /run/minivmm for root, else /tmp/minivmm-UID. A VM's socket NAME.sock speaks HTTP and JSON as
  docs/openapi.yaml says:
  curl --unix-socket $XDG_RUNTIME_DIR/minivmm/web.sock http://vm/v1/vm";

/// A virtual machine monitor for Linux/KVM built around live migration.
#[derive(Debug, Parser)]
#[command(name = "minivmm", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Boot a VM in this process, until it powers off
    Run(Box<RunArgs>),
    /// Go on with a saved VM in this process
    Restore(RestoreArgs),
    /// Save a VM to a file, and let it go on
    Save(SaveArgs),
    /// List the running VMs
    List(Output),
    /// Show name, process, status and configuration of a VM
    Info(Named),
    /// Stop the vCPUs of a VM
    Pause(Named),
    /// Let the vCPUs of a paused VM go on
    Resume(Named),
    /// Press the power button of a VM and wait for its end
    Stop(StopArgs),
    /// End a VM at once, without asking its guest
    Kill(Named),
    /// Press the reset button of a VM
    Reset(Named),
    /// Attach to the console of a VM (Ctrl-A x leaves, Ctrl-A Ctrl-A types one Ctrl-A)
    Console(ConsoleArgs),
    /// Show the counters of a VM
    Stats(Named),
    /// Set how much memory the balloon of a VM takes from its guest
    Balloon(BalloonArgs),
    /// Plug the cable of a network card in or out
    Link(LinkArgs),
    /// Show what happened to a VM
    Events(EventsArgs),
    /// Wait for a VM that is migrated here, and run it
    Receive(ReceiveArgs),
    /// Move a running VM to another host
    Migrate(MigrateArgs),
    /// Show how far a migration is, and those that are over
    Migration(MigrationArgs),
    /// Change a migration that is under way
    MigrateSet(MigrateSetArgs),
    /// Let the guest of a migration move now, and the rest of its memory follow it
    MigrateStartPostcopy(Named),
    /// Give up a migration that is under way; the VM goes on where it is
    Cancel(Named),
    /// Decide who owns a VM when the other host of a migration is gone for good
    Resolve(ResolveArgs),
    /// Declare the networks of this host that network cards are attached to by name
    Network(NetworkArgs),
}

/// What `run` and `restore` have in common.
#[derive(Debug, Args)]
pub(super) struct ProcessArgs {
    /// Where the serial console goes: stdio, pty, socket, or file:PATH (emptied first)
    ///
    /// On stdio with a terminal, Ctrl-A x ends the VM and Ctrl-A Ctrl-A types one Ctrl-A.
    #[arg(long, value_name = "KIND")]
    console: Option<ConsoleConfig>,
    /// Build the VM, or let it arrive, and wait for `minivmm resume`
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    paused: Option<bool>,
    /// Write the process id to a file, which is removed at the end
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// What to log, to standard error or a file: FILTER[:FILE] [default: warn]
    ///
    /// FILTER is off, error, warn, info, debug or trace, or a list such as warn,vmm::api=debug.
    #[arg(long, value_name = "FILTER")]
    log: Option<LogConfig>,
    /// Which system calls the threads may make: on (those they need; another one ends the process),
    /// log (the kernel logs others) or off [default: on]
    #[arg(long, value_name = "MODE")]
    sandbox: Option<SandboxMode>,
}

impl ProcessArgs {
    /// Console and process of a command that has no other files.
    pub(super) fn settings(self) -> Result<(Option<ConsoleConfig>, ProcessSettings), ConfigError> {
        let Self { console, paused, pidfile, log, sandbox } = self;
        let (console, mut process) =
            ProcessSettings::with_console(console, paused.unwrap_or(false), pidfile, log)?;
        process.sandbox = sandbox.unwrap_or_default();
        Ok((console, process))
    }
}

const RUN_HELP: &str = "\
Without --kernel, the built-in guest `beacon` boots; --cmdline configures it.

A configuration file says what flags can, under the same names; flags win over it:
  name = \"web\"
  kernel = \"vmlinux\"       # relative to the file
  cmdline = \"console=ttyS0\"
  cpus = 2
  console = \"socket\"
  [memory]
  size = \"1G\"
  hugepages = false
Limits of the rounds of `minivmm migrate`, whose flags win, are said there only:
  [migration]
  max-rounds = 30
  max-bytes = 3.0           # as a multiple of the memory in use
  dirty-pages = 16          # so few are few enough

Examples:
  minivmm run --memory 64M --cpus 2
  minivmm run --config web.toml --memory 2G --paused
  minivmm run --kernel bzImage --initrd initrd.img --cmdline 'console=ttyS0 quiet' --cpu x86-64-v3,-rdrand";

#[derive(Debug, Args)]
#[command(after_help = RUN_HELP)]
pub(super) struct RunArgs {
    /// Name of the VM, out of [A-Za-z0-9._-] [default: vm-PID]
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// Kernel: bzImage, or ELF by PVH or the 64-bit Linux protocol [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; needs a kernel
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line [default with --kernel: console=ttyS0]
    #[arg(long, value_name = "TEXT", value_parser = parse_cmdline, allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Guest memory: 512M, 1G, 64MiB or bytes; at least 16M [default: 256M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// Back the memory with 2 MiB pages of hugetlbfs (the same as 2M; other sizes are refused)
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL|2M", value_parser = parse_hugepages)]
    hugepages: Option<bool>,
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(long, value_name = "N", value_parser = parse_cpus, allow_negative_numbers = true)]
    cpus: Option<u8>,
    /// CPU model host, x86-64-v2, x86-64-v3 or x86-64-v4, then ,+FEATURE or ,-FEATURE
    /// [default: host]
    #[arg(long, value_name = "MODEL", value_parser = parse_cpu)]
    cpu: Option<String>,
    /// What a reboot of the guest does: restart, or exit [default: restart]
    #[arg(long, value_name = "ACTION")]
    on_reboot: Option<OnReboot>,
    /// Disk: id=NAME,path=FILE[,readonly][,cache=writeback|writethrough|unsafe]; may be repeated
    ///
    /// FILE is a raw image or a block device; the VM locks it. The guest's writes are on stable
    /// storage when it flushes (writeback), at once, or never for certain (unsafe).
    /// A migration flushes it in any case.
    #[arg(long = "disk", value_name = "SETTINGS")]
    disks: Vec<DiskConfig>,
    /// Network card: id=NAME,tap=INTERFACE|bridge=BRIDGE|network=NAME[,mac=ADDRESS][,mtu=BYTES]; may
    /// be repeated
    ///
    /// A tap must exist (ip tuntap add dev tap0 mode tap). On a bridge, or a network of
    /// `minivmm network`, a tap is made for as long as the VM's process lives, which takes
    /// CAP_NET_ADMIN. Without mac, the address is made from the names of VM and card; without mtu, a guest
    /// on a network is told the network's.
    #[arg(long = "net", value_name = "SETTINGS")]
    nets: Vec<NetOptions>,
    /// Give the guest random numbers of the host
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    rng: Option<bool>,
    /// Memory balloon, steered by `minivmm balloon`; with deflate-on-oom the guest takes memory
    /// back when it runs out
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "", value_name = "SETTINGS")]
    balloon: Option<BalloonConfig>,
    /// Add a virtio console (hvc0), which shares --console with the serial port
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    virtio_console: Option<bool>,
    /// Read settings from a TOML file
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    process: ProcessArgs,
}

impl RunArgs {
    /// The flags laid over the configuration file.
    pub(super) fn options(self) -> Result<RunOptions, ConfigError> {
        let flags = RunOptions {
            name: self.name,
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            memory_size: self.memory,
            hugepages: self.hugepages,
            cpus: self.cpus,
            cpu: self.cpu,
            console: self.process.console,
            on_reboot: self.on_reboot,
            paused: self.process.paused,
            pidfile: self.process.pidfile,
            log: self.process.log,
            sandbox: self.process.sandbox,
            disks: self.disks,
            nets: self.nets,
            rng: self.rng,
            balloon: self.balloon,
            virtio_console: self.virtio_console,
            migration: MigrationOptions::default(),
        };
        match self.config {
            Some(path) => Ok(flags.over(RunOptions::from_file(&path)?)),
            None => Ok(flags),
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  minivmm restore web.vm
  minivmm restore web.vm --name web-copy --console socket --paused")]
pub(super) struct RestoreArgs {
    /// File that `save` wrote
    file: PathBuf,
    /// Another name [default: as it was saved]
    #[arg(long, value_parser = parse_name)]
    name: Option<String>,
    /// Another file or block device for a disk: ID=PATH; may be repeated
    #[arg(long = "disk", value_name = "ID=PATH")]
    disks: Vec<Replacement>,
    /// Another tap, bridge or network for a network card: ID=TAP, ID=bridge=BRIDGE, ID=network=NAME; may be repeated
    #[arg(long = "net", value_name = "ID=WHERE")]
    nets: Vec<Replacement>,
    #[command(flatten)]
    process: ProcessArgs,
}

impl RestoreArgs {
    pub(super) fn settings(self) -> Result<RestoreSettings, ConfigError> {
        let ProcessArgs { console, paused, pidfile, log, sandbox } = self.process;
        let paused = paused.unwrap_or(false);
        let mut settings =
            RestoreSettings::new(self.file, self.name, console, paused, pidfile, log)?;
        settings.process.sandbox = sandbox.unwrap_or_default();
        Ok(RestoreSettings { disks: self.disks, nets: self.nets, ..settings })
    }
}

#[derive(Debug, Args)]
pub(super) struct Output {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The file is written under a temporary name and renamed when it is complete. A running VM stands
still while it is saved.

Examples:
  minivmm save web web.vm
  minivmm save web web.vm --stop --json")]
pub(super) struct SaveArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// File to write
    pub(super) file: PathBuf,
    /// End the VM when it is saved
    #[arg(long)]
    pub(super) stop: bool,
    /// Of a VM that has moved by post-copy and whose new host is gone: write the memory that is still here
    ///
    /// It is the memory as it was when the guest moved, without vCPUs and devices: for looking into it, not for going on.
    /// `restore` refuses it.
    #[arg(long, conflicts_with = "stop")]
    pub(super) incomplete: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  minivmm stop web                        power button; wait 30 s for the end
  minivmm stop web --timeout 60 --force   kill it when it has not ended after 60 s
  minivmm stop web --force                kill it at once")]
pub(super) struct StopArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// Kill the VM: at once, or after --timeout when that is given
    #[arg(long)]
    pub(super) force: bool,
    /// Seconds to wait for the end [default: 30]
    #[arg(long, value_name = "SECONDS")]
    pub(super) timeout: Option<u32>,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
pub(super) struct ConsoleArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The guest gives memory as it can: `minivmm stats` tells how much the balloon holds.

Examples:
  minivmm balloon web 256M   take 256 MiB from the guest
  minivmm balloon web 0      give all of it back")]
pub(super) struct BalloonArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// Memory in the balloon: 512M, 1G or bytes; whole pages of 4 KiB
    #[arg(value_parser = parse_size)]
    pub(super) size: u64,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  minivmm link web eth0 down")]
pub(super) struct LinkArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// Name of the network card
    #[arg(value_parser = parse_id)]
    pub(super) card: String,
    /// up or down
    pub(super) link: LinkState,
    #[command(flatten)]
    pub(super) output: Output,
}

/// Whether a cable is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum LinkState {
    /// Plugged in.
    Up,
    /// Not plugged in.
    Down,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Events are numbered from 1; the VM keeps the last 1024.

Examples:
  minivmm events web
  minivmm events web --follow --json | jq -c .kind")]
pub(super) struct EventsArgs {
    /// Name of the VM
    #[arg(value_parser = parse_vm)]
    pub(super) name: String,
    /// Go on until the VM ends
    #[arg(long, short)]
    pub(super) follow: bool,
    /// Only events with a higher number
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) after: u64,
    #[command(flatten)]
    pub(super) output: Output,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::CommandFactory;

    fn run_options(line: &str) -> RunOptions {
        let words = ["minivmm", "run"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).unwrap().command {
            Command::Run(args) => args.options().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_say_all_that_options_can() {
        let options = run_options(
            "--name web --kernel k --initrd i --cmdline quiet --memory 1G --hugepages --cpus 2 \
             --cpu host,-rdrand --console file:c --on-reboot exit --paused --pidfile p --log info:l \
             --disk id=a,path=/a --disk id=b,path=/b,readonly --net id=n,tap=t --rng \
             --balloon=deflate-on-oom --virtio-console --sandbox log",
        );
        let expected = RunOptions {
            name: Some("web".into()),
            kernel: Some("k".into()),
            initrd: Some("i".into()),
            cmdline: Some("quiet".into()),
            memory_size: Some(1 << 30),
            hugepages: Some(true),
            cpus: Some(2),
            cpu: Some("host,-rdrand".into()),
            console: Some(ConsoleConfig::File("c".into())),
            on_reboot: Some(OnReboot::Exit),
            paused: Some(true),
            pidfile: Some("p".into()),
            log: Some(LogConfig { filter: "info".into(), file: Some("l".into()) }),
            sandbox: Some(SandboxMode::Log),
            disks: vec!["id=a,path=/a".parse().unwrap(), "id=b,path=/b,readonly".parse().unwrap()],
            nets: vec!["id=n,tap=t".parse().unwrap()],
            rng: Some(true),
            balloon: Some(BalloonConfig { deflate_on_oom: true }),
            virtio_console: Some(true),
            migration: MigrationOptions::default(),
        };
        assert_eq!(run_options("--balloon").balloon, Some(BalloonConfig::default()));
        assert_eq!(options, expected);
        assert_eq!(run_options(""), RunOptions::default());
    }

    #[test]
    fn a_flag_can_switch_off_what_the_file_switched_on() {
        assert_eq!(run_options("--paused=false").paused, Some(false));
        assert_eq!(run_options("--hugepages=false").hugepages, Some(false));
        assert_eq!(run_options("--hugepages 2M").hugepages, Some(true));
    }

    #[test]
    fn the_help_tells_every_exit_code() {
        let help = Cli::command().render_long_help().to_string();
        for code in 0..=super::super::Exit::Incomplete as u8 {
            assert!(help.contains(&format!("\n  {code}  ")), "exit code {code}");
        }
    }
}
