//! The configuration of a VM: one structure for flags, file, API and saved state.
//!
//! Flags and file each give [`RunOptions`]; the flags are laid over the file, defaults fill the
//! rest, and [`RunOptions::finish`] gives a validated [`RunSettings`].

mod attachment;
mod devices;
mod error;
mod file;
mod options;
mod settings;
mod size;
mod validate;
mod value;

use std::path::PathBuf;

use migration::source::Limits;
use serde::{Deserialize, Serialize};

pub use attachment::Attachment;
pub use devices::{
    parse_mtu, parse_tap, BalloonConfig, CacheMode, DiskConfig, Mac, NetConfig, NetOptions,
    Replacement, MAX_DEVICES,
};
pub use error::ConfigError;
pub use options::{MigrationOptions, RunOptions};
pub use settings::{ProcessSettings, ReceiveSettings, RestoreSettings, RunSettings};
pub use size::{format_size, parse_size};
pub use validate::HostLimits;
pub(crate) use value::saved_as_text;
pub use value::{
    parse_cmdline, parse_cpu, parse_cpus, parse_hugepages, parse_id, parse_name, parse_path,
    LogConfig, SandboxMode,
};

/// Longest name of a VM, characters.
pub const MAX_NAME: usize = 64;
/// Longest name of a disk or network card, characters: what a guest can be told (virtio 1.2,
/// section 5.2.6.1).
pub const MAX_ID: usize = ::devices::virtio::block::ID_BYTES;
/// Most vCPUs of a VM.
pub const MAX_CPUS: u8 = 64;
/// Least memory of a VM, bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Memory of a VM that was told nothing else, bytes.
pub const DEFAULT_MEMORY: u64 = 256 << 20;
/// Longest kernel command line, bytes without its final NUL: COMMAND_LINE_SIZE of x86 Linux
/// (arch/x86/include/asm/setup.h) less one.
pub const MAX_CMDLINE: usize = 2047;

/// All that defines a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name, unique on this host and for this user.
    pub name: String,
    /// Kernel image; the embedded `beacon` guest when absent.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Number of vCPUs, 1 to 64.
    pub cpus: u8,
    /// CPU model and features, as in `--cpu`: `x86-64-v3,+aes,-rdrand`.
    pub cpu: String,
    /// Where the serial console goes.
    pub console: ConsoleConfig,
    /// What a guest reboot does.
    pub on_reboot: OnReboot,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Network cards, in the order in which the guest finds them.
    pub nets: Vec<NetConfig>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// The memory balloon, if there is one.
    pub balloon: Option<BalloonConfig>,
    /// Whether the console is a virtio device (hvc0) beside the serial port.
    pub virtio_console: bool,
    /// Limits of its migrations.
    pub migration: MigrationConfig,
}

/// Limits of the live rounds when the VM is migrated away, unless a request says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationConfig {
    /// Most rounds while the guest runs.
    pub max_rounds: u32,
    /// Most bytes, as a multiple of the memory in use.
    pub max_bytes_factor: f64,
    /// So few dirty pages are few enough, whatever the prediction says.
    pub dirty_pages: u64,
}

impl Default for MigrationConfig {
    fn default() -> Self {
        let Limits { rounds, bytes_factor, dirty_pages, .. } = Limits::default();
        Self { max_rounds: rounds, max_bytes_factor: bytes_factor, dirty_pages }
    }
}

/// Guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in bytes; a multiple of 4 KiB (of 2 MiB with huge pages), at least 16 MiB.
    pub size: u64,
    /// Back the memory with 2 MiB pages of hugetlbfs.
    pub hugepages: bool,
}

/// Where the serial console goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleConfig {
    /// Standard input and output of the process.
    Stdio,
    /// A pseudo-terminal; its path is in `info`.
    Pty,
    /// A Unix socket beside the control socket.
    Socket,
    /// Output is written to a file; there is no input.
    File(PathBuf),
}

/// What a guest reboot does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// The machine starts anew.
    #[default]
    Restart,
    /// The process ends with exit code 0.
    Exit,
}
