//! The life of a process that runs one VM: from settings to an exit code.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration::MigrationId;
use serde_json::json;

use crate::api;
use crate::boot::{BootError, Image};
use crate::cli::{on_resize, on_termination, CliError, Exit};
use crate::config::{
    ConfigError, ConsoleConfig, OnReboot, ProcessSettings, ReceiveSettings, RestoreSettings,
    RunSettings, VmConfig,
};
use crate::console::{Console, ConsoleError, ConsoleInput};
use crate::control::VmStatus;
use crate::events::EventLog;
use crate::kvm::{HostKvm, KvmError};
use crate::machine::{BootMedia, Machine, MachineBuilder, MachineError};
use crate::migrate::{Ended, FrontDoor, LogbookError, Received, Stage};
use crate::network::{self, NetworkError};
use crate::privileges::PrivilegeError;
use crate::runtime_dir::{ClaimedName, Pidfile, RuntimeDir, RuntimeDirError};
use crate::sandbox::{self, SandboxError};
use crate::snapshot::{self, SaveError};
use crate::vcpu::GuestRequest;
use crate::virtio::DiskOwnership;
use crate::vm_handle::VmHandle;

/// How long a source may take to notice that its connection is lost, at most a minute, and to ask.
const SOURCE_ASKS: Duration = Duration::from_secs(90);

/// How long a VM may take to end that lacks a part of its memory.
const DRAINING_END: Duration = Duration::from_secs(5);

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
    /// The VM was migrated and runs elsewhere.
    HandedOver,
    /// The process ended without knowing whether the VM runs elsewhere.
    Unresolved,
}

/// Why a VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Becoming another user.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// The filters of system calls.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
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
    /// Networks that cards are to be plugged into.
    #[error(transparent)]
    Network(#[from] NetworkError),
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
    /// The journal of migrations.
    #[error(transparent)]
    Logbook(#[from] LogbookError),
    /// It cannot listen.
    #[error(
        "cannot listen on {address} for VMs: {error}; give --listen ADDRESS:PORT of this host"
    )]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// A thread of the migration engine.
    #[error("cannot receive: {0}")]
    Receive(std::io::Error),
    /// No VM came.
    #[error("no VM came: {}", .0.join("; "))]
    NotReceived(Vec<String>),
    /// A VM came and nobody knows who owns it.
    #[error("it is unresolved who owns the VM that came: {}; see `minivmm resolve --help`", .0.join("; "))]
    Unresolved(Vec<String>),
    /// A VM came and was given up.
    #[error("the VM was handed over to this host and ended here before it could run: {}", .0.join("; "))]
    NeverRan(Vec<String>),
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
            RunEnd::PoweredOff | RunEnd::Killed | RunEnd::HandedOver => Self::Ok,
            RunEnd::Unresolved => Self::Unresolved,
            RunEnd::Crashed => Self::GuestCrashed,
        }
    }
}

/// A card that cannot be plugged in: a network that is not there is a wrong name here.
fn plugged(error: NetworkError) -> CliError {
    let exit = match () {
        () if error.is_refused() => Exit::Refused,
        () if error.is_about_what_was_asked() => Exit::Usage,
        () => Exit::Failed,
    };
    CliError::new(exit, error)
}

impl From<RunError> for CliError {
    fn from(error: RunError) -> Self {
        let exit = match error {
            RunError::RuntimeDir(error) => return error.into(),
            RunError::Network(error) => return plugged(error),
            RunError::Unresolved(_) => Exit::Unresolved,
            // What was asked for cannot be: another command line may do.
            RunError::Privileges(
                PrivilegeError::NoSuchUser(_)
                | PrivilegeError::NoSuchGroup(_)
                | PrivilegeError::NoGroup(_)
                | PrivilegeError::Root(_)
                | PrivilegeError::NotRoot { .. },
            )
            | RunError::ConsoleFile(_)
            | RunError::Listen { .. }
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
    let RunSettings { vm: mut config, process } = settings;
    restrict(&process)?;
    network::offer_mtus(&mut config.nets)?;
    can_be_plugged_in(&config)?;
    let host = HostKvm::open()?;
    let media = open_media(&config)?;
    let name = RuntimeDir::open()?.claim(&config.name)?;
    run_machine(&host, name, &process, config, media, None)
}

/// Makes a VM from a saved file and stays until it has ended.
pub fn restore(settings: RestoreSettings) -> Result<RunEnd, RunError> {
    restrict(&settings.process)?;
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
    can_be_plugged_in(&config)?;
    run_machine(&host, name, &settings.process, config, media, Some((cpuid, loader)))
}

/// The first reason why a network card cannot be plugged in.
fn can_be_plugged_in(config: &VmConfig) -> Result<(), NetworkError> {
    network::obstacles(&config.nets, None).into_iter().next().map_or(Ok(()), Err)
}

/// Leaves this process the system calls that it needs. There is no other thread yet.
fn restrict(process: &ProcessSettings) -> Result<(), SandboxError> {
    migration::threads::on_start(sandbox::enter_engine);
    sandbox::install(process.sandbox)
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

/// A machine with all that surrounds it in its process.
pub struct Assembled {
    /// Its name.
    pub(crate) name: ClaimedName,
    /// Its console.
    pub(crate) console: Console,
    /// The machine; its vCPUs stand.
    pub(crate) machine: Arc<Machine>,
    /// What its guest and operators ask for.
    pub(crate) requests: Receiver<GuestRequest>,
    /// The control API's way to it.
    pub(crate) handle: Arc<VmHandle>,
}

impl Assembled {
    /// Makes a machine under a name that was claimed.
    pub(crate) fn new(
        host: &HostKvm,
        name: ClaimedName,
        config: VmConfig,
        media: BootMedia,
        cpuid: Option<Vec<kvm_bindings::CpuId>>,
        disks: DiskOwnership,
    ) -> Result<Self, RunError> {
        let events = EventLog::default();
        let (console, writer) = Console::open(&config.console, &name.console_paths())?;
        let builder = MachineBuilder { host, config, media, console: writer, events, disks, cpuid };
        let (machine, requests) = builder.build()?;
        wire_console(&console, &machine);
        let path = console.path().map(Into::into);
        let handle = Arc::new(VmHandle::new(Arc::clone(&machine), console.handle(), path));
        Ok(Self { name, console, machine, requests, handle })
    }

    /// Tells the guest the size of this terminal, if that is its console.
    fn follow_terminal(&self) -> Result<(), RunError> {
        let config = self.machine.config();
        if !config.virtio_console || config.console != ConsoleConfig::Stdio {
            return Ok(());
        }
        let sized = Arc::clone(&self.machine);
        on_resize(move |columns, rows| drop(sized.resize_console(columns, rows)))
            .map_err(RunError::Signals)
    }

    /// Serves requests until the VM has ended.
    fn stay(&self) -> RunEnd {
        let (machine, handle) = (&*self.machine, &*self.handle);
        wait_for_end(machine, handle, &self.requests, machine.config().on_reboot)
    }

    /// Ends what still runs. The name is free afterwards.
    pub(crate) fn dismantle(self) {
        self.machine.end(VmStatus::Stopped);
        self.console.close(CONSOLE_FLUSH);
    }
}

fn run_machine(
    host: &HostKvm,
    name: ClaimedName,
    process: &ProcessSettings,
    config: VmConfig,
    media: BootMedia,
    saved: Option<SavedParts>,
) -> Result<RunEnd, RunError> {
    let _pidfile = process.pidfile.as_deref().map(Pidfile::create).transpose()?;
    let restored = saved.is_some();
    let (cpuid, loader) = saved.map_or((None, None), |(c, l)| (Some(c), Some(l)));
    let vm = Assembled::new(host, name, config, media, cpuid, DiskOwnership::Owner)?;
    // Whatever goes wrong from here on, the vCPU threads end and the API's socket goes away.
    let result = (|| {
        let machine = &vm.machine;
        let ending = Arc::clone(machine);
        on_termination(move |_| ending.kill()).map_err(RunError::Signals)?;
        vm.follow_terminal()?;
        match loader {
            Some(loader) => loader.load(machine)?,
            None => machine.load_boot(false)?,
        }
        machine.set_created();
        let detail = json!({ "pid": std::process::id(), "restored": restored });
        machine.events().push("created", detail);
        let listener = vm.name.listen()?;
        let api = api::serve(listener, Arc::clone(&vm.handle) as _).map_err(RunError::Api)?;
        if !process.paused {
            machine.resume()?;
        }
        if restored {
            machine.announce_move();
        }
        let end = vm.stay();
        machine.events().close();
        api.shutdown();
        Ok(end)
    })();
    vm.dismantle();
    result
}

/// Waits for a VM that is migrated here, and stays until it has ended.
pub fn receive(settings: &ReceiveSettings) -> Result<RunEnd, RunError> {
    let _pidfile = settings.process.pidfile.as_deref().map(Pidfile::create).transpose()?;
    let host = HostKvm::open()?;
    let door = FrontDoor::open(&settings.listen, settings.user.as_deref())?;
    restrict(&settings.process)?;
    let stage = Arc::new(Stage::default());
    let signalled = Arc::clone(&stage);
    on_termination(move |_| signalled.end()).map_err(RunError::Signals)?;
    eprintln!("minivmm: listening on {}", door.address());
    loop {
        let received = thread::scope(|scope| {
            let (early, came) = mpsc::channel();
            let (door, host, stage) = (&door, &host, &*stage);
            // Gives its end of the channel back when it is over.
            let receiving = thread::Builder::new()
                .name("receive".to_owned())
                .spawn_scoped(scope, move || door.receive(host, settings, stage, &early))
                .map_err(RunError::Receive)?;
            if let Ok((vm, api)) = came.recv() {
                let end = arrived(vm, api, door, stage, Some(receiving))?;
                return Ok(Err(end));
            }
            joined(receiving).map(Ok)
        });
        let received = match received? {
            Ok(received) => received,
            Err(end) => return Ok(end),
        };
        match received {
            Received::Here((vm, api)) => return arrived(vm, api, &door, &stage, None),
            // Its VM was given away, and is what this process lives for.
            Received::Drained => return Ok(RunEnd::Killed),
            Received::Not(reasons, asks) if settings.once || stage.is_ending() => {
                let error = RunError::NotReceived(reasons);
                if let Some(id) = asks {
                    answer_source(&door, &stage, id, &error);
                }
                return Err(error);
            }
            Received::Not(reasons, _) => {
                eprintln!("minivmm: no VM came: {}; listening on", reasons.join("; "));
            }
            Received::Unresolved(reasons) => return Err(RunError::Unresolved(reasons)),
            Received::NeverRan(reasons, asks) => {
                let error = RunError::NeverRan(reasons);
                if let Some(id) = asks {
                    answer_source(&door, &stage, id, &error);
                }
                return Err(error);
            }
            Received::Stopped => return Ok(RunEnd::Killed),
        }
    }
}

/// The VM was given up when its source might have handed it over, or had: it asks what became of it. Another signal than
/// the one that the VM was given up for ends this.
fn answer_source(door: &FrontDoor, stage: &Stage, id: MigrationId, why: &RunError) {
    eprintln!(
        "minivmm: {why}; until its source knows, at most {SOURCE_ASKS:?}, this process answers"
    );
    // One may have been why it is given up.
    let (deadline, signals) = (Instant::now() + SOURCE_ASKS, u32::from(stage.is_ending()));
    door.answer(&|told| {
        told.contains(&id) || stage.signals() > signals || Instant::now() >= deadline
    });
}

type Receiving<'scope> = thread::ScopedJoinHandle<'scope, Result<Received, RunError>>;

fn joined(receiving: Receiving<'_>) -> Result<Received, RunError> {
    receiving.join().unwrap_or_else(|_| {
        Err(RunError::NotReceived(vec!["the thread that receives panicked".to_owned()]))
    })
}

/// The life of a VM that came from elsewhere; what receives the rest of its memory, if it follows.
fn arrived(
    mut vm: Box<Assembled>,
    api: api::ApiHandle,
    door: &FrontDoor,
    stage: &Stage,
    receiving: Option<Receiving<'_>>,
) -> Result<RunEnd, RunError> {
    stage.runs(&vm.machine);
    vm.follow_terminal()?;
    let over = AtomicBool::new(false);
    let is_over = || over.load(Ordering::Acquire);
    let answered_enough = |_: &[MigrationId]| is_over();
    let handle = Arc::clone(&vm.handle);
    let end = thread::scope(|scope| {
        // Whoever lost the acknowledgement asks what became of the VM.
        let answers = scope.spawn(|| {
            // Until then that thread answers.
            if let Some(Err(error)) = receiving.map(joined) {
                tracing::warn!(%error, "the rest of the VM's memory");
            }
            door.answer(&answered_enough);
        });
        let Assembled { name, machine, requests, .. } = &mut *vm;
        scope.spawn(|| take_name_over(name, &handle, &is_over));
        let end = wait_for_end(machine, &handle, requests, machine.config().on_reboot);
        over.store(true, Ordering::Release);
        // No more of its memory is needed.
        handle.end_draining();
        answers.thread().unpark();
        end
    });
    vm.machine.events().close();
    api.shutdown();
    vm.dismantle();
    Ok(end)
}

/// Takes the VM's name once the process that it comes from, if that is on this host, gives it up.
fn take_name_over(name: &mut ClaimedName, handle: &VmHandle, is_over: &dyn Fn() -> bool) {
    const SOON: Duration = Duration::from_millis(20);
    const LATER: Duration = Duration::from_secs(1);
    let begin = Instant::now();
    while !is_over() {
        match name.take_over() {
            Ok(()) => {
                handle.moved_to(&name.console_paths());
                return;
            }
            Err(RuntimeDirError::NameTaken { .. }) => {}
            Err(error) => tracing::warn!(%error, "cannot take the VM's name over"),
        }
        let patience = if begin.elapsed() < 10 * LATER { SOON } else { LATER };
        thread::sleep(patience);
    }
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
    handle: &VmHandle,
    requests: &Receiver<GuestRequest>,
    on_reboot: OnReboot,
) -> RunEnd {
    // A machine whose senders are gone has ended.
    while let Ok(request) = requests.recv() {
        if request == GuestRequest::Reset && on_reboot == OnReboot::Restart {
            if let Err(error) = reset(machine, handle) {
                let reason = format!("the machine could not be reset: {error}");
                return crashed(machine, &reason, "");
            }
            continue;
        }
        if machine.is_draining() {
            end_within_limit(handle);
        }
        // A migration that is under way ends first; it may turn out that the VM is gone.
        match handle.end_migration() {
            Ended::Ours => {}
            Ended::HandedOver => {
                machine.end(VmStatus::Stopped);
                return RunEnd::HandedOver;
            }
            Ended::Unresolved => {
                machine.end(VmStatus::Stopped);
                return RunEnd::Unresolved;
            }
        }
        match request {
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
            GuestRequest::HandedOver => {}
            GuestRequest::Crash { vcpu, reason, registers } => {
                return crashed(machine, &format!("vCPU {vcpu}: {reason}"), &registers);
            }
        }
    }
    RunEnd::Killed
}

/// Resets the machine once it stands: who waits for a slow disk, or for a page, does not stop in time. The kernel is loaded
/// into memory that may never come: an operator who ends the VM does not wait for that.
fn reset(machine: &Machine, handle: &VmHandle) -> Result<(), MachineError> {
    const LOOK: Duration = Duration::from_millis(20);
    let reset = || loop {
        match machine.reset() {
            Err(error @ (MachineError::NotStopped | MachineError::NotQuiet(_))) => {
                // Who ends the VM is heard next.
                if machine.is_ending() {
                    return Ok(());
                }
                tracing::warn!(%error, "the guest reboots; trying again");
                // Others may want to know meanwhile.
                thread::sleep(LOOK);
            }
            result => return result,
        }
    };
    if !machine.is_draining() {
        return reset();
    }
    thread::scope(|scope| {
        let resetting = scope.spawn(reset);
        while !resetting.is_finished() && !machine.is_ending() {
            thread::sleep(LOOK);
        }
        if !resetting.is_finished() {
            end_within_limit(handle);
        }
        resetting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A VM ends that lacks a part of its memory. Who waits for a missing page cannot be stopped, and must not go on with
/// another in its place: what does not end in time ends with the process. Its source is told at once.
fn end_within_limit(handle: &VmHandle) {
    handle.end_draining();
    let spawned = thread::Builder::new().name("end-limit".to_owned()).spawn(|| {
        thread::sleep(DRAINING_END);
        eprintln!(
            "minivmm: the VM ended while a part of its memory was on the host that it came from"
        );
        std::process::exit(i32::from(Exit::Failed as u8));
    });
    if let Err(error) = spawned {
        tracing::error!(%error, "no thread to end this process in time");
    }
}

fn crashed(machine: &Machine, reason: &str, registers: &str) -> RunEnd {
    machine.end(VmStatus::Crashed);
    machine.events().push("crashed", json!({ "reason": reason, "registers": registers }));
    crate::console::restore();
    eprintln!("minivmm: the guest crashed: {reason}\n{registers}");
    RunEnd::Crashed
}
