//! What the control API can ask of a virtual machine, and what it answers.
//!
//! The HTTP server and the command line know a VM only through [`Control`]; the machine
//! implements it. Every type here is part of the published API (docs/openapi.yaml).

use std::collections::BTreeMap;
use std::path::PathBuf;

use migration::destination::Draining;
use migration::prepaging::Prepaging;
use migration::source::OnStall;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::VmConfig;
use crate::events::EventLog;

/// Life of a VM as the API shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmStatus {
    /// Being built: memory, vCPUs and devices are not all there yet.
    Creating,
    /// Guest code runs.
    Running,
    /// vCPUs are stopped; `resume` goes on.
    Paused,
    /// Being moved here; the guest is still elsewhere.
    Incoming,
    /// Frozen: it was handed over, or not; nobody knows yet who owns it.
    Unresolved,
    /// The guest powered off, was killed or handed over; the process is about to end.
    Stopped,
    /// The guest crashed (triple fault, or KVM gave up); registers are in the event log.
    Crashed,
}

/// Answer to `info`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmInfo {
    /// Name, unique on this host and for this user.
    pub name: String,
    /// Process that runs the VM.
    pub pid: u32,
    /// Program version.
    pub version: String,
    /// Life of the VM.
    pub status: VmStatus,
    /// Time since the VM was started or restored, in milliseconds.
    pub uptime_ms: u64,
    /// The configuration in force.
    pub config: VmConfig,
    /// Where the console can be reached: a pty path or a Unix socket, if it has one.
    pub console_path: Option<PathBuf>,
    /// Memory that is still on the host that the VM came from, if there is any.
    pub draining: Option<Draining>,
}

/// Answer to `stats`: counters since the VM was started, and gauges.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VmStats {
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// Guest memory that is populated on the host, bytes.
    pub memory_populated_bytes: u64,
    /// Resident memory of the process apart from guest memory, bytes.
    pub overhead_bytes: u64,
    /// CPU time of the whole process, milliseconds.
    pub cpu_ms: u64,
    /// One entry per vCPU.
    pub vcpus: Vec<VcpuStats>,
    /// Accesses to addresses where nothing is (reads gave all ones).
    pub unmapped: UnmappedStats,
    /// One entry per virtio device, by slot.
    pub devices: Vec<DeviceStats>,
    /// Bytes that the guest wrote to its console.
    pub console_bytes: u64,
    /// Console output dropped because nobody took it in time, bytes.
    pub console_dropped_bytes: u64,
    /// How often the guest rebooted.
    pub reboots: u64,
    /// How often the VM was paused.
    pub pauses: u64,
}

/// Counters of one vCPU.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VcpuStats {
    /// Exits from KVM_RUN.
    pub exits: u64,
    /// Port I/O exits.
    pub pio: u64,
    /// Memory-mapped I/O exits.
    pub mmio: u64,
    /// CPU time of the vCPU's thread, milliseconds.
    pub cpu_ms: u64,
}

/// Counters of one virtio device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Name of the disk or network card; the kind of any other device.
    pub id: String,
    /// Kind of the device: `virtio-block`, `virtio-net`, ...
    pub kind: String,
    /// Its slot.
    pub slot: u32,
    /// Notifications of queues that the device looked at.
    pub notifications: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Resets by the driver.
    pub resets: u64,
    /// Times that the guest broke the rules, after which only a reset by its driver helps.
    pub needs_resets: u64,
    /// Notifications that came too early, or of no queue: ignored.
    pub early_notifications: u64,
    /// Accesses to registers that are not there, or not like that: ignored.
    pub bad_accesses: u64,
    /// What this kind of device counts, by name.
    pub counters: BTreeMap<String, u64>,
}

/// How a VM is migrated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationMode {
    /// Memory is copied while the guest runs.
    #[default]
    Precopy,
    /// The guest is paused first.
    Cold,
    /// The guest moves at once, and its memory follows it.
    Postcopy,
    /// Memory is copied while the guest runs, for some rounds; what is left follows it.
    Hybrid,
}

/// Body of `PUT /v1/vm/migrate`. What is absent has the default, or is as the VM is configured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where `minivmm receive` listens: `HOST:PORT`.
    pub to: String,
    /// How.
    #[serde(default)]
    pub mode: MigrationMode,
    /// How long the guest may stand still, microseconds.
    #[serde(default)]
    pub downtime_us: Option<u64>,
    /// After so many milliseconds it is given up.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// What is done when a limit is reached before the pause would be short enough.
    #[serde(default)]
    pub on_stall: Option<OnStall>,
    /// After so many milliseconds without a sign of life the other end is taken for dead, 100 to 60000.
    #[serde(default)]
    pub dead_after_ms: Option<u64>,
    /// Connections for memory, 1 to 64.
    #[serde(default)]
    pub connections: Option<u16>,
    /// Bytes per second while the guest runs; 0 is no limit.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Whether both ends hash memory in the pause and compare; not with post-copy.
    #[serde(default)]
    pub verify: bool,
    /// Hybrid: rounds before the guest moves. Without this and `switch_after_ms`: one.
    #[serde(default)]
    pub rounds: Option<u32>,
    /// Hybrid: milliseconds after which the guest moves, in the middle of a round too.
    #[serde(default)]
    pub switch_after_ms: Option<u64>,
    /// Post-copy: whether pages are sent that the guest did not ask for.
    #[serde(default)]
    pub push: Option<bool>,
    /// Post-copy: how the order of pages follows what the guest asks for.
    #[serde(default)]
    pub prepaging: Option<Prepaging>,
    /// Whether packets that reach this host after the pause are sent after the guest.
    #[serde(default)]
    pub forward_packets: Option<bool>,
    /// Most rounds while the guest runs; see [`crate::config::MigrationConfig`].
    #[serde(default)]
    pub max_rounds: Option<u32>,
    /// Most bytes, as a multiple of the memory in use.
    #[serde(default)]
    pub max_bytes_factor: Option<f64>,
    /// So few dirty pages are few enough, whatever the prediction says.
    #[serde(default)]
    pub dirty_pages: Option<u64>,
    /// Answer at once, with the id.
    #[serde(default)]
    pub detach: bool,
}

/// Body of `PUT /v1/vm/migrate-set`. What is absent stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrateSettings {
    /// See [`MigrateRequest::bandwidth`].
    pub bandwidth: Option<u64>,
    /// See [`MigrateRequest::downtime_us`].
    pub downtime_us: Option<u64>,
    /// See [`MigrateRequest::push`].
    pub push: Option<bool>,
}

/// Body of `PUT /v1/vm/migrate-recover`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// Another address of the destination: `HOST:PORT`.
    #[serde(default)]
    pub to: Option<String>,
}

/// Answer to `GET /v1/vm/migration`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// The migration that is under way: id, direction, peer, phase, progress. Null when there is none.
    pub current: Value,
    /// The report of the last one that is over. Null before the first.
    pub last: Value,
}

/// Accesses to nowhere: ignored, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnmappedStats {
    /// Port reads.
    pub pio_reads: u64,
    /// Port writes.
    pub pio_writes: u64,
    /// Memory-mapped reads.
    pub mmio_reads: u64,
    /// Memory-mapped writes.
    pub mmio_writes: u64,
}

/// What a finished `save` did.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SaveReport {
    /// The file.
    pub path: PathBuf,
    /// Size of the file, bytes.
    pub file_bytes: u64,
    /// Pages written.
    pub pages: u64,
    /// Populated pages that held only zeros and were not written.
    pub zero_pages: u64,
    /// Pages never touched by anybody, not written.
    pub absent_pages: u64,
    /// Time the guest stood still for it, milliseconds.
    pub paused_ms: f64,
    /// Time in all, milliseconds, including fsync.
    pub total_ms: f64,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The VM's state does not allow it now (HTTP 409).
    #[error("{0}")]
    Conflict(String),
    /// The request itself is wrong (HTTP 400).
    #[error("{0}")]
    BadRequest(String),
    /// It was tried and failed (HTTP 500).
    #[error("{0}")]
    Failed(String),
}

/// A VM as its control API sees it. Calls may block for as long as the work takes: the server
/// makes them on its blocking pool. None touches guest memory except `save`.
pub trait Control: Send + Sync {
    /// Name, status, configuration.
    fn info(&self) -> VmInfo;
    /// Counters.
    fn stats(&self) -> VmStats;
    /// Stops all vCPUs and returns when they stand. Pausing a paused VM is no error.
    fn pause(&self) -> Result<(), ControlError>;
    /// Lets the vCPUs go on. Resuming a running VM is no error.
    fn resume(&self) -> Result<(), ControlError>;
    /// Presses the ACPI power button; returns at once. The guest decides.
    fn power_button(&self) -> Result<(), ControlError>;
    /// Ends the VM without asking the guest: `stop --force` and `kill`.
    fn kill(&self) -> Result<(), ControlError>;
    /// Resets the machine as the reset button would.
    fn reset(&self) -> Result<(), ControlError>;
    /// Saves the whole VM to `path`. A running VM is paused for it and goes on afterwards,
    /// unless `then_stop`. Written under a temporary name, renamed when complete.
    fn save(&self, path: PathBuf, then_stop: bool) -> Result<SaveReport, ControlError>;
    /// Saves to `path` what a VM left behind that has moved by post-copy, while it cannot follow: memory alone, as
    /// it was then.
    fn save_incomplete(&self, path: PathBuf) -> Result<SaveReport, ControlError>;
    /// Sets the memory that the balloon is to take from the guest, bytes: whole pages of 4 KiB.
    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError>;
    /// Plugs the cable of network card `id` in or out.
    fn set_link(&self, id: &str, up: bool) -> Result<(), ControlError>;
    /// Tells the guest the size of its virtio console, characters.
    fn resize_console(&self, columns: u16, rows: u16) -> Result<(), ControlError>;
    /// Migrates the VM away. Unless it is to be detached, returns when the migration is over, with
    /// its report; else with its id.
    fn migrate(&self, request: &MigrateRequest) -> Result<Value, ControlError>;
    /// The migration that is under way, and the last one.
    fn migration(&self) -> MigrationInfo;
    /// Changes the migration that is under way.
    fn set_migration(&self, settings: &MigrateSettings) -> Result<(), ControlError>;
    /// Lets the guest move now and the rest of its memory follow it.
    fn start_postcopy(&self) -> Result<(), ControlError>;
    /// Lets a post-copy migration that lost its connections try again now.
    fn recover_migration(&self, request: &RecoverRequest) -> Result<(), ControlError>;
    /// Gives the migration up that is under way, whichever way it goes.
    fn cancel_migration(&self) -> Result<(), ControlError>;
    /// The event log, to read and to follow.
    fn events(&self) -> &EventLog;
}
