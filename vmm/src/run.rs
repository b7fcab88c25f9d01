//! The life of a process that runs one VM: from settings to an exit code.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::api;
use crate::boot::{BootError, Image};
use crate::cli::{on_resize, on_termination, CliError, Exit};
use crate::config::{
    ConfigError, ConsoleConfig, OnReboot, ProcessSettings, RestoreSettings, RunSettings, VmConfig,
};
use crate::console::{Console, ConsoleError, ConsoleHandle, ConsoleInput};
use crate::control::{Control, ControlError, SaveReport, VmInfo, VmStats, VmStatus};
use crate::events::EventLog;
use crate::kvm::{HostKvm, KvmError};
use crate::machine::{BootMedia, Machine, MachineBuilder, MachineError};
use crate::process;
use crate::runtime_dir::{ClaimedName, Pidfile, RuntimeDir, RuntimeDirError};
use crate::snapshot::{self, SaveError};
use crate::vcpu::GuestRequest;
use crate::virtio::DiskOwnership;

/// How long console output may take to flow out at the end.
const CONSOLE_FLUSH: Duration = Duration::from_secs(2);

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunEnd {
    /// The guest switched itself off, or rebooted with `--on-reboot exit`.
    PoweredOff,
    /// An operator or a signal ended it.
    Killed,
    /// The guest crashed; its registers were printed.
    Crashed,
}

/// Why a VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Kernel or initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Names, sockets, pidfile.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// Backends for the saved VM that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The saved file.
    #[error(transparent)]
    Restore(#[from] SaveError),
    /// The saved VM wrote its console to a file.
    #[error(
        "the saved VM's console went to the file {}, which would be emptied: say where it is to go \
         with --console", .0.display()
    )]
    ConsoleFile(PathBuf),
    /// The control API.
    #[error("cannot start the control API: {0}")]
    Api(std::io::Error),
    /// Signals.
    #[error("cannot wait for signals: {0}")]
    Signals(std::io::Error),
}

impl From<RunEnd> for Exit {
    fn from(end: RunEnd) -> Self {
        match end {
            RunEnd::PoweredOff | RunEnd::Killed => Self::Ok,
            RunEnd::Crashed => Self::GuestCrashed,
        }
    }
}

impl From<RunError> for CliError {
    fn from(error: RunError) -> Self {
        let exit = match error {
            RunError::RuntimeDir(error) => return error.into(),
            // What was asked for cannot be: another command line may do.
            RunError::ConsoleFile(_)
            | RunError::Boot(_)
            | RunError::Config(_)
            | RunError::Machine(MachineError::Boot(_) | MachineError::Cpu(_)) => Exit::Usage,
            RunError::Machine(MachineError::Virtio(ref error)) if error.is_in_use() => {
                Exit::Refused
            }
            RunError::Machine(MachineError::Virtio(ref error))
                if error.is_about_what_was_asked() =>
            {
                Exit::Usage
            }
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

/// Boots a VM and stays until it has ended.
pub fn run(settings: RunSettings) -> Result<RunEnd, RunError> {
    let RunSettings { vm: config, process } = settings;
    let host = HostKvm::open()?;
    let media = open_media(&config)?;
    let name = RuntimeDir::open()?.claim(&config.name)?;
    run_machine(&host, name, &process, config, media, None)
}

/// Makes a VM from a saved file and stays until it has ended.
pub fn restore(settings: RestoreSettings) -> Result<RunEnd, RunError> {
    let host = HostKvm::open()?;
    let saved = snapshot::open(&settings.file, &host)?;
    let (mut config, media, cpuid, loader) = saved.split();
    config.name = settings.name.unwrap_or(config.name);
    config.replace_backends(&settings.disks, &settings.nets)?;
    config.console = match (settings.console, config.console) {
        (Some(told), _) => told,
        // A console file is emptied: not one that a saved file names.
        (None, ConsoleConfig::File(path)) => return Err(RunError::ConsoleFile(path)),
        (None, saved) => saved,
    };
    let name = RuntimeDir::open()?.claim(&config.name)?;
    run_machine(&host, name, &settings.process, config, media, Some((cpuid, loader)))
}

fn open_media(config: &VmConfig) -> Result<BootMedia, BootError> {
    let kernel = match &config.kernel {
        Some(path) => Image::open("kernel", path)?,
        None => Image::embedded("beacon", guest_images::BEACON),
    };
    let initrd = config.initrd.as_ref().map(|path| Image::open("initrd", path)).transpose()?;
    Ok(BootMedia { kernel, initrd })
}

type SavedParts = (Vec<kvm_bindings::CpuId>, snapshot::Loader);

fn run_machine(
    host: &HostKvm,
    name: ClaimedName,
    process: &ProcessSettings,
    config: VmConfig,
    media: BootMedia,
    saved: Option<SavedParts>,
) -> Result<RunEnd, RunError> {
    let _pidfile = process.pidfile.as_deref().map(Pidfile::create).transpose()?;
    let events = EventLog::default();
    let (console, writer) = Console::open(&config.console, &name.console_paths())?;
    let on_reboot = config.on_reboot;
    let stdio = config.console == ConsoleConfig::Stdio;
    let virtio_console = config.virtio_console;
    let restored = saved.is_some();
    let (cpuid, loader) = saved.map_or((None, None), |(c, l)| (Some(c), Some(l)));
    let builder = MachineBuilder {
        host,
        config,
        media,
        console: writer,
        events: events.clone(),
        disks: DiskOwnership::Owner,
        cpuid,
    };
    let (machine, requests) = builder.build()?;
    let handle = Arc::new(VmHandle {
        machine: Arc::clone(&machine),
        console: console.handle(),
        console_path: console.path().map(Into::into),
    });
    // Whatever goes wrong from here on, the vCPU threads end and the API's socket goes away.
    let result = (|| {
        let ending = Arc::clone(&machine);
        on_termination(move |_| ending.kill()).map_err(RunError::Signals)?;
        wire_console(&console, &machine);
        if virtio_console && stdio {
            let sized = Arc::clone(&machine);
            on_resize(move |columns, rows| drop(sized.resize_console(columns, rows)))
                .map_err(RunError::Signals)?;
        }
        match loader {
            Some(loader) => loader.load(&machine)?,
            None => machine.load_boot(false)?,
        }
        machine.set_created();
        events.push("created", json!({ "pid": std::process::id(), "restored": restored }));
        let api = api::serve(name.listen()?, Arc::clone(&handle) as _).map_err(RunError::Api)?;
        if !process.paused {
            machine.resume()?;
        }
        let end = wait_for_end(&machine, &requests, on_reboot);
        events.close();
        api.shutdown();
        Ok(end)
    })();
    machine.end(VmStatus::Stopped);
    console.close(CONSOLE_FLUSH);
    result
}

fn wire_console(console: &Console, machine: &Arc<Machine>) {
    struct Input(Arc<Machine>);
    impl ConsoleInput for Input {
        fn feed(&self, bytes: &[u8]) -> usize {
            self.0.console_input(bytes)
        }
    }
    let quit = Arc::clone(machine);
    console.connect(Arc::new(Input(Arc::clone(machine))), move || quit.kill());
    let wake = console.handle();
    machine.on_console_input_wanted(move || wake.input_ready());
}

/// Serves the guest's requests until one ends the VM.
fn wait_for_end(
    machine: &Machine,
    requests: &Receiver<GuestRequest>,
    on_reboot: OnReboot,
) -> RunEnd {
    // A machine whose senders are gone has ended.
    while let Ok(request) = requests.recv() {
        match request {
            GuestRequest::Reset if on_reboot == OnReboot::Restart => {
                if let Err(error) = machine.reset() {
                    let reason = format!("the machine could not be reset: {error}");
                    return crashed(machine, &reason, "");
                }
            }
            GuestRequest::Reset | GuestRequest::PowerOff => {
                let kind = if request == GuestRequest::Reset { "reboot" } else { "power-off" };
                machine.end(VmStatus::Stopped);
                machine.events().push(kind, serde_json::Value::Null);
                return RunEnd::PoweredOff;
            }
            GuestRequest::Kill => {
                machine.end(VmStatus::Stopped);
                machine.events().push("killed", serde_json::Value::Null);
                return RunEnd::Killed;
            }
            GuestRequest::Crash { vcpu, reason, registers } => {
                return crashed(machine, &format!("vCPU {vcpu}: {reason}"), &registers);
            }
        }
    }
    RunEnd::Killed
}

fn crashed(machine: &Machine, reason: &str, registers: &str) -> RunEnd {
    machine.end(VmStatus::Crashed);
    machine.events().push("crashed", json!({ "reason": reason, "registers": registers }));
    crate::console::restore();
    eprintln!("minivmm: the guest crashed: {reason}\n{registers}");
    RunEnd::Crashed
}

/// A machine behind the control API.
struct VmHandle {
    machine: Arc<Machine>,
    console: ConsoleHandle,
    console_path: Option<PathBuf>,
}

impl From<MachineError> for ControlError {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Ended(_)
            | MachineError::Busy
            | MachineError::Held
            | MachineError::Blocked(_)
            | MachineError::NoDevice(_) => Self::Conflict(error.to_string()),
            MachineError::Size(message) => Self::BadRequest(message),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl Control for VmHandle {
    fn info(&self) -> VmInfo {
        let millis = self.machine.started().elapsed().as_millis();
        VmInfo {
            name: self.machine.config().name.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            status: self.machine.status(),
            uptime_ms: u64::try_from(millis).unwrap_or(u64::MAX),
            config: self.machine.config().clone(),
            console_path: self.console_path.clone(),
        }
    }

    fn stats(&self) -> VmStats {
        let (unmapped, vcpus, pauses, reboots) = self.machine.counters();
        let ram = self.machine.ram();
        VmStats {
            memory_bytes: ram.size(),
            memory_populated_bytes: ram.populated_bytes(),
            overhead_bytes: process::overhead_bytes(),
            cpu_ms: process::cpu_ms(),
            vcpus,
            unmapped,
            devices: self.machine.device_stats(),
            console_bytes: self.console.written_bytes(),
            console_dropped_bytes: self.console.dropped_bytes(),
            reboots,
            pauses,
        }
    }

    fn pause(&self) -> Result<(), ControlError> {
        Ok(self.machine.pause()?)
    }

    fn resume(&self) -> Result<(), ControlError> {
        Ok(self.machine.resume()?)
    }

    fn power_button(&self) -> Result<(), ControlError> {
        self.machine.press_power_button()?;
        Ok(())
    }

    fn kill(&self) -> Result<(), ControlError> {
        self.machine.kill();
        Ok(())
    }

    fn reset(&self) -> Result<(), ControlError> {
        Ok(self.machine.reset()?)
    }

    fn save(&self, path: PathBuf, then_stop: bool) -> Result<SaveReport, ControlError> {
        let begin = Instant::now();
        let (summary, paused) = self.machine.save_to(&path, then_stop)?;
        let report = SaveReport {
            path,
            file_bytes: summary.file_bytes,
            pages: summary.data_pages,
            zero_pages: summary.zero_pages,
            absent_pages: summary.absent_pages,
            paused_ms: paused.as_secs_f64() * 1e3,
            total_ms: begin.elapsed().as_secs_f64() * 1e3,
        };
        self.machine.events().push("saved", json!(report));
        if then_stop {
            self.machine.kill();
        }
        Ok(report)
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        Ok(self.machine.set_balloon(bytes)?)
    }

    fn set_link(&self, id: &str, up: bool) -> Result<(), ControlError> {
        Ok(self.machine.set_link(id, up)?)
    }

    fn resize_console(&self, columns: u16, rows: u16) -> Result<(), ControlError> {
        Ok(self.machine.resize_console(columns, rows)?)
    }

    fn events(&self) -> &EventLog {
        self.machine.events()
    }
}
