//! The configuration of a VM: one structure for flags, file, API and saved state.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// All that defines a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
