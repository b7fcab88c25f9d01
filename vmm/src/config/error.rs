//! What can be wrong with a configuration: one sentence each, and what to do about it.

use std::path::PathBuf;

use super::size::format_size;
use crate::cpu::CpuError;

use super::{MAX_CMDLINE, MAX_CPUS, MAX_DEVICES, MAX_ID, MAX_NAME, MIN_MEMORY};

/// A configuration that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The name is empty.
    #[error("the name is empty: give one of 1 to {MAX_NAME} characters out of [A-Za-z0-9._-]")]
    NameEmpty,
    /// The name is too long.
    #[error("the name is {0} bytes long: use at most {MAX_NAME}")]
    NameTooLong(usize),
    /// The name holds a character that is not allowed.
    #[error("the name {name:?} has {found:?} in it: use only [A-Za-z0-9._-]")]
    NameCharacter {
        /// The name.
        name: String,
        /// The first character that is not allowed.
        found: char,
    },
    /// The name begins with something that is mistaken for a flag or hidden by `ls`.
    #[error("the name {0:?} begins with {1:?}: begin it with a letter, a digit or an underscore")]
    NameStart(String, char),

    /// Not a number with a unit.
    #[error("{0:?} is not a size: write a whole number of bytes, or one with a unit such as 512M, 1G or 64MiB (K, M, G, T are powers of 1024)")]
    SizeSyntax(String),
    /// More than 64 bits.
    #[error("{0:?} is more than 2^64 bytes: use a smaller size")]
    SizeOverflow(String),

    /// Too little memory.
    #[error("memory of {} is too small: use at least {}", format_size(*.0), format_size(MIN_MEMORY))]
    MemoryTooSmall(u64),
    /// More memory than the host has.
    #[error("memory of {} is more than this host has ({}): use at most {}", format_size(*.size), format_size(*.host), format_size(.host & !((2 << 20) - 1)))]
    MemoryTooLarge {
        /// What was asked for, bytes.
        size: u64,
        /// What the host has, bytes.
        host: u64,
    },
    /// Not whole pages.
    #[error("memory of {0} bytes is not a multiple of 4 KiB: use {next} bytes, or a size in M or G", next = .0.next_multiple_of(4096))]
    MemoryAlignment(u64),
    /// Not whole huge pages.
    #[error("memory of {} with huge pages is not a multiple of 2 MiB: use {}, or leave out --hugepages", format_size(*.0), format_size(.0.next_multiple_of(2 << 20)))]
    MemoryHugeAlignment(u64),
    /// Huge pages of another size than the one that there is.
    #[error(
        "huge pages of {} are not possible: use --hugepages, which means 2 MiB; with pages of 1 GiB a guest that is \
         migrated by post-copy would wait for 1 GiB whenever it touches one that is missing",
        format_size(*.0)
    )]
    HugePageSize(u64),
    /// Neither a switch nor a size.
    #[error("{0:?} is not a setting of huge pages: use --hugepages or --hugepages=2M for pages of 2 MiB, --hugepages=false for none")]
    HugePages(String),

    /// Not a number of vCPUs.
    #[error("{0} vCPUs are not possible: use 1 to {MAX_CPUS}")]
    CpusOutOfRange(String),

    /// Not a CPU model with features.
    #[error(transparent)]
    Cpu(CpuError),

    /// No such kind of console.
    #[error("{0:?} is not a console: use stdio, pty, socket or file:PATH")]
    Console(String),
    /// `file:` without a path.
    #[error("the console is a file without a path: write file:PATH")]
    ConsoleFile,

    /// Neither restart nor exit.
    #[error("{0:?} is not something to do on a reboot: use restart or exit")]
    OnReboot(String),

    /// Not a way to treat system calls.
    #[error("{0:?} is not a mode of the sandbox: use on, log or off")]
    Sandbox(String),

    /// The log filter cannot be parsed.
    #[error("{filter:?} is not a log filter ({why}): use off, error, warn, info, debug, trace, or MODULE=LEVEL,... and then :FILE")]
    Log {
        /// The filter.
        filter: String,
        /// What the parser said.
        why: String,
    },

    /// A path is empty.
    #[error("{0} is an empty path: give a file, or leave it out")]
    EmptyPath(&'static str),
    /// An initrd belongs to a kernel.
    #[error("--initrd {0} needs a --kernel: the built-in guest takes no initrd")]
    InitrdWithoutKernel(PathBuf),
    /// The command line cannot hold a NUL byte.
    #[error("the kernel command line has a NUL byte at position {0}: remove it")]
    CmdlineNul(usize),
    /// The command line is longer than Linux takes.
    #[error("the kernel command line is {0} bytes long: use at most {MAX_CMDLINE}")]
    CmdlineTooLong(usize),
    /// Two outputs into one file.
    #[error("{first} and {second} are both {path}: give each its own file")]
    SameFile {
        /// The first use of the path.
        first: &'static str,
        /// The second use of the path.
        second: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A path cannot be made absolute.
    #[error("cannot tell the absolute path of {path}: {why}")]
    Absolute {
        /// The path.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {why}")]
    FileRead {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// The file is larger than any configuration.
    #[error("the configuration file {path} is more than {limit} bytes long: is it one?")]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// The limit, bytes.
        limit: u64,
    },
    /// The file's contents are wrong.
    #[error("{path}:{line}:{column}: {key}{why}")]
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The key followed by a colon and a space, or nothing when there is none.
        key: String,
        /// What is wrong and what is allowed.
        why: String,
    },
    /// A disk's or card's name is none.
    #[error(
        "{id:?} is no name of a device ({why}): use 1 to {MAX_ID} characters out of [A-Za-z0-9._-]"
    )]
    DeviceId {
        /// The name.
        id: String,
        /// What is wrong with it.
        why: String,
    },
    /// A setting that must be there is not, or has no value.
    #[error("{flag} has no {key}: write {key}=VALUE")]
    SettingMissing {
        /// The flag.
        flag: &'static str,
        /// The setting.
        key: &'static str,
    },
    /// A setting is there twice.
    #[error("{flag} has {key} twice")]
    SettingTwice {
        /// The flag.
        flag: &'static str,
        /// The setting.
        key: String,
    },
    /// No such setting.
    #[error("{flag} has no setting {found:?}: use {keys}")]
    SettingUnknown {
        /// The flag.
        flag: &'static str,
        /// What was found.
        found: String,
        /// What there is.
        keys: &'static str,
    },
    /// Not a cache mode.
    #[error("{0:?} is not a cache mode: use writeback, writethrough or unsafe")]
    Cache(String),
    /// Not an Ethernet address of a card.
    #[error("{text:?} {why}")]
    Mac {
        /// What was found.
        text: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Not a name that an interface can have.
    #[error(
        "{0:?} is no name of a tap interface: use at most 15 characters, without / : and space"
    )]
    Tap(String),
    /// Not a name that a bridge can have.
    #[error("{0:?} is no name of a bridge: use at most 15 characters, without / : and space")]
    Bridge(String),
    /// Not a name that a network can have.
    #[error("{0:?} is no name of a network: use 1 to 10 characters out of [A-Za-z0-9_-], a letter or a digit first")]
    Network(String),
    /// A card that is plugged into nothing, or into several things.
    #[error("{0} has to be plugged into one thing: write tap=TAP, bridge=BRIDGE or network=NAME")]
    Attachment(String),
    /// Not an MTU.
    #[error("{0:?} is no MTU: use 68 to 65535 bytes")]
    Mtu(String),
    /// Not another backend for a device.
    #[error(
        "{0:?} names no backend for a device: write ID=PATH for a disk, ID=TAP, ID=bridge=BRIDGE or ID=network=NAME for a network card"
    )]
    Replacement(String),
    /// A backend for a device that is not there.
    #[error("the saved VM has no {what} {id}: it has {known}")]
    NoSuchDevice {
        /// `disk` or `network card`.
        what: &'static str,
        /// The name given.
        id: String,
        /// The names there are.
        known: String,
    },
    /// Two devices with the same what only one can have.
    #[error("{what} {value} is given to two devices: change one")]
    DeviceTwice {
        /// What is the same.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// Not a multiple of memory.
    #[error("{0} is no limit of what a migration sends: it is a multiple of the memory in use, use 1 or more")]
    MigrationBytes(String),
    /// More devices than interrupts.
    #[error("{0} virtio devices are too many: use at most {MAX_DEVICES}")]
    TooManyDevices(usize),
}
