//! The machine: memory, vCPUs and devices put together, and its life from power-on to power-off.
//!
//! Life-changing operations (pause, resume, reset, save) hold one lock, `life`, for as long as
//! they take; `info` and `stats` take none of the locks that those hold.

mod build;
mod first_pages;
mod hold;
mod lines;
mod memory;
mod sections;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use devices::virtio::mmio::QuiesceError;
use devices::{AcpiPm, Serial, I8042};
use migration::snapshot::SaveSummary;
use migration::MemoryLayout;
use serde_json::json;

use crate::boot::{BootError, BootSource, Image};
use crate::config::VmConfig;
use crate::console::ConsoleWriter;
use crate::control::{DeviceStats, UnmappedStats, VcpuStats, VmStatus};
use crate::events::EventLog;
use crate::gate::Target;
use crate::identity::IdentityV1;
use crate::kvm::{KvmError, VmKvm};
use crate::memory::{GuestRam, MemoryError, PAGE_SIZE};
use crate::snapshot::{Extent, SaveError};
use crate::throttle::Throttle;
use crate::vcpu::{GuestRequest, Vcpu, VcpuContext};
use crate::virtio::{VirtioError, VirtioSet};

pub use memory::layout_for as memory_layout;

pub use build::{MachineBuilder, RequestSender};
pub use sections::{differences, StateError};

/// How long vCPUs may take to stop. They leave KVM_RUN within microseconds; only a host in
/// trouble (swapping, stopped) takes longer.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Why a machine could not be made or did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd, command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// CPU model.
    #[error(transparent)]
    Cpu(#[from] crate::cpu::CpuError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] crate::acpi::AcpiError),
    /// Saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Saving to a file.
    #[error(transparent)]
    Save(#[from] Box<SaveError>),
    /// Devices overlap.
    #[error(transparent)]
    Bus(#[from] devices::BusError),
    /// A thread could not be started.
    #[error("cannot start thread {name}: {error}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// A virtio device did not come to rest.
    #[error("{0}; the VM goes on")]
    NotQuiet(#[from] QuiesceError),
    /// A device cannot be saved.
    #[error("the VM cannot be saved: {0}")]
    Blocked(String),
    /// What is asked needs a device that is not there.
    #[error("{0}")]
    NoDevice(String),
    /// A size that the guest cannot give.
    #[error("{0}")]
    Size(String),
    /// vCPUs did not stop.
    #[error("vCPUs did not stop within {} s; the VM goes on", STOP_LIMIT.as_secs())]
    NotStopped,
    /// The guest is about to reset or to end.
    #[error("the guest is resetting or ending: try again")]
    Busy,
    /// The engine holds the guest.
    #[error("the VM is being handed over: try again")]
    Held,
    /// The VM has ended.
    #[error("the VM has ended ({0:?})")]
    Ended(VmStatus),
}

/// The devices that have state of their own.
struct DeviceSet {
    serial: Arc<Mutex<Serial<ConsoleWriter>>>,
    i8042: Arc<Mutex<I8042>>,
    power: Arc<Mutex<AcpiPm>>,
}

/// Kernel and initrd, kept for reboots.
#[derive(Debug)]
pub struct BootMedia {
    /// Kernel.
    pub kernel: Image,
    /// Initial RAM disk.
    pub initrd: Option<Image>,
}

/// A virtual machine.
pub struct Machine {
    config: VmConfig,
    identity: IdentityV1,
    media: BootMedia,
    acpi: crate::acpi::AcpiImage,
    ram: GuestRam,
    layout: Arc<MemoryLayout>,
    vm: VmKvm,
    vcpus: Vec<Arc<Vcpu>>,
    throttle: Throttle,
    context: Arc<VcpuContext>,
    devices: DeviceSet,
    virtio: VirtioSet,
    /// State at power-on: a reset puts it back.
    pristine: Vec<migration::Section>,
    life: Mutex<()>,
    /// Whether console input is taken: not while the guest stands, so that the serial port does
    /// not change under who reads its state.
    takes_input: Mutex<bool>,
    input_wanted: OnceLock<Box<dyn Fn() + Send + Sync>>,
    status: AtomicU8,
    /// An operator wants the VM gone: long work stops early.
    ending: AtomicBool,
    /// See [`Machine::guest_tsc_khz`]: known without a vCPU's lock, which is held while it runs.
    tsc_khz: AtomicU32,
    /// The migration engine holds the guest: it is paused, and may be somebody else's soon.
    held: AtomicBool,
    /// Whether an operator wants a held guest paused.
    operator_paused: AtomicBool,
    /// See [`Machine::arrive_paused`].
    arrives_paused: AtomicBool,
    /// A part of its memory is still at the source.
    draining: AtomicBool,
    /// See [`DestinationVm::freeze`](migration::DestinationVm::freeze).
    frozen: AtomicBool,
    events: EventLog,
    pauses: AtomicU64,
    reboots: AtomicU64,
    started: Instant,
}

/// Locks a mutex whose holder may have panicked: devices stay consistent access by access.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const STATUSES: [VmStatus; 5] =
    [VmStatus::Creating, VmStatus::Running, VmStatus::Paused, VmStatus::Stopped, VmStatus::Crashed];

impl Machine {
    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// What it is, for whoever is to restore it.
    #[must_use]
    pub fn identity(&self) -> &IdentityV1 {
        &self.identity
    }

    /// Frequency of the guest's TSC, kHz; 0 where KVM does not tell.
    #[must_use]
    pub fn guest_tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Ordering::Relaxed)
    }

    /// Kernel and initrd.
    #[must_use]
    pub fn media(&self) -> &BootMedia {
        &self.media
    }

    /// The event log.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Life of the VM now.
    #[must_use]
    pub fn status(&self) -> VmStatus {
        STATUSES[usize::from(self.status.load(Ordering::Acquire))]
    }

    fn set_status(&self, status: VmStatus) {
        let index = STATUSES.iter().position(|s| *s == status).unwrap_or(0);
        self.status.store(u8::try_from(index).unwrap_or(0), Ordering::Release);
    }

    /// When it was made.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Counters: unmapped accesses, vCPUs, pauses, reboots.
    #[must_use]
    pub fn counters(&self) -> (UnmappedStats, Vec<VcpuStats>, u64, u64) {
        (
            self.context.unmapped.stats(),
            self.vcpus.iter().map(|v| v.stats()).collect(),
            self.pauses.load(Ordering::Relaxed),
            self.reboots.load(Ordering::Relaxed),
        )
    }

    fn kick(&self) {
        self.vcpus.iter().for_each(|v| v.kick());
    }

    /// Stops all vCPUs, then all devices; caller holds `life`. If they do not stop in time the VM
    /// goes on.
    fn park(&self, deadline: Instant) -> Result<(), MachineError> {
        self.context.gate.set(Target::Park);
        self.kick();
        let stopped = if self.context.gate.wait_parked(deadline, || self.kick()) {
            self.virtio.quiesce(deadline).map_err(MachineError::from)
        } else {
            Err(MachineError::NotStopped)
        };
        if stopped.is_err() {
            self.let_run();
        }
        stopped
    }

    /// Opens the gate, unless a request of the guest waits: who serves it opens it, or ends the VM. A guest that is frozen
    /// stands until it is not.
    fn let_run(&self) {
        let frozen = self.frozen.load(Ordering::Acquire);
        if !frozen && !self.context.requested.load(Ordering::SeqCst) {
            self.context.gate.set(Target::Run);
        }
    }

    /// Loads kernel and parameters and sets the boot CPU. The machine stands.
    pub fn load_boot(&self, again: bool) -> Result<(), MachineError> {
        let cmdline = self.config.guest_cmdline();
        let source = BootSource {
            kernel: &self.media.kernel,
            initrd: self.media.initrd.as_ref(),
            cmdline: &cmdline,
            acpi: &self.acpi.bytes,
            rsdp: self.acpi.rsdp_address,
            again,
        };
        let boot_cpu = source.load(&self.ram)?;
        if let Some(first) = self.vcpus.first() {
            boot_cpu.apply(&first.kvm().fd)?;
        }
        Ok(())
    }

    fn check_alive(&self) -> Result<(), MachineError> {
        match self.status() {
            status @ (VmStatus::Stopped | VmStatus::Crashed) => Err(MachineError::Ended(status)),
            _ => Ok(()),
        }
    }

    /// Stops the guest. Pausing a paused VM is no error.
    pub fn pause(&self) -> Result<(), MachineError> {
        let _life = lock(&self.life);
        if self.wish(true) {
            return Ok(());
        }
        self.pause_held(Instant::now() + STOP_LIMIT)
    }

    fn pause_held(&self, deadline: Instant) -> Result<(), MachineError> {
        self.check_alive()?;
        if self.status() != VmStatus::Running {
            return Ok(());
        }
        let since = Instant::now();
        self.park(deadline)?;
        self.take_input(false);
        self.set_status(VmStatus::Paused);
        self.pauses.fetch_add(1, Ordering::Relaxed);
        self.events.push("paused", json!({ "stop_us": since.elapsed().as_micros() as u64 }));
        Ok(())
    }

    /// Lets the guest go on. Resuming a running VM is no error.
    pub fn resume(&self) -> Result<(), MachineError> {
        let _life = lock(&self.life);
        if self.wish(false) {
            return Ok(());
        }
        self.resume_held()
    }

    fn resume_held(&self) -> Result<(), MachineError> {
        self.check_alive()?;
        if self.status() == VmStatus::Running {
            return Ok(());
        }
        self.vcpus.iter().for_each(|v| v.kvm().notify_stopped());
        // What was on its way when the guest stopped is in nobody's state: raise it again.
        lock(&self.devices.serial).raise_pending();
        lock(&self.devices.power).raise_pending();
        self.virtio.resume();
        self.set_status(VmStatus::Running);
        self.take_input(true);
        self.let_run();
        self.events.push("running", serde_json::Value::Null);
        Ok(())
    }

    /// Resets the machine: the state of power-on is put back and the kernel loaded again. Guest
    /// memory keeps its contents, as on hardware. A paused VM stays paused.
    pub fn reset(&self) -> Result<(), MachineError> {
        let _life = lock(&self.life);
        self.check_alive()?;
        self.check_not_held()?;
        let running = self.status() == VmStatus::Running;
        self.park(Instant::now() + STOP_LIMIT)?;
        self.context.requested.store(false, Ordering::SeqCst);
        if let Err(error) = self.load_power_on_state().and_then(|()| self.load_boot(true)) {
            // Neither the old guest nor a new one: nothing here may be run any more.
            let reason = format!("the machine could not be reset: {error}");
            let registers = String::new();
            (self.context.requests)(GuestRequest::Crash { vcpu: 0, reason, registers });
            return Err(error);
        }
        self.reboots.fetch_add(1, Ordering::Relaxed);
        self.events.push("reboot", serde_json::Value::Null);
        if running {
            self.virtio.resume();
            self.let_run();
        }
        Ok(())
    }

    /// Saves the machine to `path`. A running VM stands still while its memory is written, and
    /// goes on before the file is brought to the disk, unless `stay_paused`. Returns what was
    /// written and how long the guest stood still.
    pub fn save_to(
        &self,
        path: &Path,
        stay_paused: bool,
    ) -> Result<(SaveSummary, Duration), MachineError> {
        let mut life = Some(lock(&self.life));
        self.check_alive()?;
        self.check_not_held()?;
        if let Some(why) = self.migration_blocker() {
            return Err(MachineError::Blocked(why));
        }
        let was_running = self.status() == VmStatus::Running;
        let stopped = Instant::now();
        self.pause_held(stopped + STOP_LIMIT)?;
        if self.context.requested.load(Ordering::SeqCst) {
            // The request is in this process only: a file without it would hold a guest that
            // waits for ever.
            if was_running {
                self.resume_held()?;
            }
            return Err(MachineError::Busy);
        }
        let written = crate::snapshot::write(self, path, Extent::Whole);
        let failed = written.is_err();
        // A VM that was not saved goes on, whatever was to become of it afterwards.
        if was_running && (failed || !stay_paused) {
            self.resume_held()?;
        }
        let paused = if was_running { stopped.elapsed() } else { Duration::ZERO };
        // The disk takes its time: a VM that goes on can be killed, paused and reset meanwhile.
        if !stay_paused {
            drop(life.take());
        }
        let committed = written.and_then(|pending| Ok(pending.commit()?));
        if stay_paused && committed.is_ok() {
            // The file is the VM now: nobody resumes this copy.
            self.set_status(VmStatus::Stopped);
        } else if stay_paused && was_running {
            self.resume_held()?;
        }
        Ok((committed.map_err(Box::new)?, paused))
    }

    /// Writes the memory of a VM that runs elsewhere since, as it was when it moved.
    pub fn save_remains(&self, path: &Path) -> Result<SaveSummary, MachineError> {
        let _life = lock(&self.life);
        self.check_alive()?;
        let written = crate::snapshot::write(self, path, Extent::Remains);
        Ok(written.and_then(|pending| Ok(pending.commit()?)).map_err(Box::new)?)
    }

    /// Everything is in place: from now on the machine can be resumed.
    pub fn set_created(&self) {
        self.set_status(VmStatus::Paused);
    }

    /// Presses the ACPI power button; tells whether the guest listens.
    pub fn press_power_button(&self) -> Result<bool, MachineError> {
        let _life = lock(&self.life);
        self.check_alive()?;
        self.check_not_held()?;
        let heard = lock(&self.devices.power).press_power_button();
        self.events.push("power-button", json!({ "guest_listens": heard }));
        Ok(heard)
    }

    /// Counters of the virtio devices.
    #[must_use]
    pub fn device_stats(&self) -> Vec<DeviceStats> {
        self.virtio.stats()
    }

    /// Sets the memory that the balloon is to take, bytes.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), MachineError> {
        let _life = lock(&self.life);
        self.check_alive()?;
        self.check_not_held()?;
        let most = self.ram.size();
        if bytes > most || bytes % PAGE_SIZE != 0 {
            let message = format!(
                "a balloon of {bytes} bytes is not possible: use whole pages of 4 KiB, at most the \
                 {most} bytes of memory"
            );
            return Err(MachineError::Size(message));
        }
        if !self.virtio.set_balloon(bytes) {
            let message = "the VM has no balloon: run it with --balloon".to_owned();
            return Err(MachineError::NoDevice(message));
        }
        self.events.push("balloon", json!({ "target_bytes": bytes }));
        Ok(())
    }

    /// Plugs the cable of network card `id` in or out.
    pub fn set_link(&self, id: &str, up: bool) -> Result<(), MachineError> {
        let _life = lock(&self.life);
        self.check_alive()?;
        self.check_not_held()?;
        if !self.virtio.set_link(id, up) {
            let known: Vec<_> = self.config.nets.iter().map(|net| net.id.as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let message = format!("the VM has no network card {id}: it has {known}");
            return Err(MachineError::NoDevice(message));
        }
        self.events.push("link", json!({ "card": id, "up": up }));
        Ok(())
    }

    /// Tells the guest the size of its virtio console.
    pub fn resize_console(&self, columns: u16, rows: u16) -> Result<(), MachineError> {
        let _life = lock(&self.life);
        self.check_alive()?;
        self.check_not_held()?;
        if !self.virtio.resize_console(columns, rows) {
            let message = "the VM has no virtio console: run it with --virtio-console".to_owned();
            return Err(MachineError::NoDevice(message));
        }
        Ok(())
    }

    /// Takes console input, as much as the device has room for; none while the guest stands. The
    /// virtio console has it once it has a driver, the serial port otherwise.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        let takes = lock(&self.takes_input);
        if !*takes {
            return 0;
        }
        let virtio = self.virtio.console_input(bytes);
        virtio.unwrap_or_else(|| lock(&self.devices.serial).receive(bytes))
    }

    /// Has `callback` called when refused console input would be taken. Once per machine.
    pub fn on_console_input_wanted(&self, callback: impl Fn() + Clone + Send + Sync + 'static) {
        lock(&self.devices.serial).on_input_wanted(callback.clone());
        self.virtio.on_console_input_wanted(callback.clone());
        let _ = self.input_wanted.set(Box::new(callback));
    }

    fn take_input(&self, take: bool) {
        *lock(&self.takes_input) = take;
        if let (true, Some(wanted)) = (take, self.input_wanted.get()) {
            wanted();
        }
    }

    /// Whether an operator wants the VM gone.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Asks something of the thread that owns the machine.
    pub fn request(&self, request: GuestRequest) {
        (self.context.requests)(request);
    }

    /// Asks the thread that owns the machine to end it at once; a save that is under way is
    /// given up.
    pub fn kill(&self) {
        self.ending.store(true, Ordering::Relaxed);
        (self.context.requests)(GuestRequest::Kill);
    }

    /// Marks the VM as ended and stops its vCPUs for good.
    pub fn end(&self, status: VmStatus) {
        let _life = lock(&self.life);
        self.set_status(status);
        self.context.gate.set(Target::Exit);
        self.kick();
        // A vCPU that is not out yet is kicked again: one that holds on would hold the process.
        let deadline = Instant::now() + STOP_LIMIT;
        if self.context.gate.wait_parked(deadline, || self.kick()) {
            self.vcpus.iter().for_each(|v| v.join());
        }
        self.virtio.stop();
    }
}
