//! A machine and its migrations, as the control API sees them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::destination::{DestinationControl, Draining};
use migration::handover::{DestinationPhase, SourcePhase};
use migration::snapshot::SaveSummary;
use serde_json::{json, Value};

use crate::config::ConsoleConfig;
use crate::console::{ConsoleHandle, ConsolePaths};
use crate::control::{
    Control, ControlError, MigrateRequest, MigrateSettings, MigrationInfo, RecoverRequest,
    SaveReport, VmInfo, VmStats, VmStatus,
};
use crate::events::EventLog;
use crate::machine::{Machine, MachineError};
use crate::migrate::{Ended, Outgoing};
use crate::process;

/// A machine behind the control API.
pub struct VmHandle {
    machine: Arc<Machine>,
    console: ConsoleHandle,
    console_path: Mutex<Option<PathBuf>>,
    outgoing: Arc<Outgoing>,
    /// The migration that brings the VM here, until it is over.
    incoming: Mutex<Option<Incoming>>,
    /// The report of the one that brought it.
    arrival: Mutex<Value>,
}

/// A migration that brings a VM here.
#[derive(Clone)]
pub struct Incoming {
    /// Steers it.
    pub control: DestinationControl,
    /// Its id.
    pub id: String,
    /// Where the VM comes from.
    pub peer: String,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VmHandle {
    /// Of a machine and its console, which can be reached at `console_path`.
    pub fn new(
        machine: Arc<Machine>,
        console: ConsoleHandle,
        console_path: Option<PathBuf>,
    ) -> Self {
        let outgoing = Outgoing::new(Arc::clone(&machine));
        Self {
            machine,
            console,
            console_path: Mutex::new(console_path),
            outgoing,
            incoming: Mutex::default(),
            arrival: Mutex::default(),
        }
    }

    /// The VM is being moved here: it is not this process's yet.
    pub fn begin_arrival(&self, incoming: Incoming) {
        *lock(&self.incoming) = Some(incoming);
    }

    /// The migration that brings the VM here, while the VM is not this process's. The source hears
    /// that it is, and may tell others, before the migration is over here.
    fn arriving(&self) -> Option<Incoming> {
        let incoming = lock(&self.incoming).clone();
        incoming.filter(|incoming| incoming.control.phase() != Some(DestinationPhase::Running))
    }

    /// The migration that brought the guest here, while a part of its memory is still where it came from.
    fn draining(&self) -> Option<(Incoming, Draining)> {
        let incoming = lock(&self.incoming).clone()?;
        let drain = incoming.control.drain()?;
        Some((incoming, drain))
    }

    /// The VM has ended: no more of its memory is needed.
    pub fn end_draining(&self) {
        if let Some(incoming) = lock(&self.incoming).as_ref() {
            incoming.control.guest_ended();
        }
    }

    /// The migration that brought the VM here is over.
    pub fn end_arrival(&self, report: Value) {
        *lock(&self.arrival) = report;
        *lock(&self.incoming) = None;
    }

    /// The console's files have other names now.
    pub fn moved_to(&self, paths: &ConsolePaths) {
        let new = match self.machine.config().console {
            ConsoleConfig::Socket => Some(paths.socket.clone()),
            // The terminal itself stays; only a link to it is renamed.
            _ => return,
        };
        *lock(&self.console_path) = new;
    }

    /// Ends a migration because the VM ends; tells whose it is.
    #[must_use]
    pub fn end_migration(&self) -> Ended {
        self.outgoing.end()
    }

    /// Refuses what only the owner of the VM may do.
    fn check_here(&self) -> Result<(), ControlError> {
        if let Some(incoming) = self.arriving() {
            let message = format!(
                "the VM is being moved here from {} and not this host's yet",
                incoming.peer
            );
            return Err(ControlError::Conflict(message));
        }
        match self.outgoing.phase() {
            Some(SourcePhase::Unresolved) => Err(ControlError::Conflict(
                "it is not known yet who owns the VM; if the other host is gone for good, decide \
                 with `minivmm resolve`"
                    .to_owned(),
            )),
            Some(SourcePhase::HandedOver) if self.outgoing.is_interrupted() => {
                Err(ControlError::Conflict(
                    "the VM runs on the other host, and a part of its memory is only here: make the connection \
                     work again. If it is gone there, it is lost: what is here is its memory as it was when it moved, \
                     no VM; `minivmm save NAME FILE --incomplete` writes that. To give it up for good, end this process \
                     with SIGTERM"
                        .to_owned(),
                ))
            }
            Some(SourcePhase::Committing | SourcePhase::HandedOver) => Err(ControlError::Conflict(
                "too late here: the VM is being handed over to the other host".to_owned(),
            )),
            _ => Ok(()),
        }
    }

    fn status(&self) -> VmStatus {
        if let Some(incoming) = self.arriving() {
            return match incoming.control.phase() {
                Some(DestinationPhase::Unresolved) => VmStatus::Unresolved,
                _ => VmStatus::Incoming,
            };
        }
        match (self.outgoing.phase(), self.machine.status()) {
            (Some(SourcePhase::Unresolved), VmStatus::Paused) => VmStatus::Unresolved,
            (_, status) => status,
        }
    }
}

/// What a save did that began at `begin` and for which the guest stood for `paused`.
fn save_report(
    path: PathBuf,
    summary: &SaveSummary,
    paused: Duration,
    begin: Instant,
) -> SaveReport {
    SaveReport {
        path,
        file_bytes: summary.file_bytes,
        pages: summary.data_pages,
        zero_pages: summary.zero_pages,
        absent_pages: summary.absent_pages,
        paused_ms: paused.as_secs_f64() * 1e3,
        total_ms: begin.elapsed().as_secs_f64() * 1e3,
    }
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

/// Whether it is decided that the VM is owned here, where it does not run yet.
fn is_owned(incoming: &Incoming) -> bool {
    let phase = incoming.control.phase();
    matches!(phase, Some(DestinationPhase::Owning | DestinationPhase::Resuming))
}

impl Control for VmHandle {
    fn info(&self) -> VmInfo {
        let millis = self.machine.started().elapsed().as_millis();
        VmInfo {
            name: self.machine.config().name.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            status: self.status(),
            uptime_ms: u64::try_from(millis).unwrap_or(u64::MAX),
            config: self.machine.config().clone(),
            console_path: lock(&self.console_path).clone(),
            draining: self.draining().map(|(_, drain)| drain),
        }
    }

    fn stats(&self) -> VmStats {
        let (unmapped, vcpus, pauses, reboots) = self.machine.counters();
        let ram = self.machine.ram();
        let populated = ram.populated_bytes();
        VmStats {
            memory_bytes: ram.size(),
            memory_populated_bytes: populated,
            overhead_bytes: process::overhead_bytes(populated),
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
        self.check_here()?;
        self.machine.pause()?;
        // If it has been committed meanwhile, it may have been too late.
        self.check_here()
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.check_here()?;
        self.machine.resume()?;
        // As above.
        self.check_here()
    }

    fn power_button(&self) -> Result<(), ControlError> {
        self.check_here()?;
        self.machine.press_power_button()?;
        Ok(())
    }

    fn kill(&self) -> Result<(), ControlError> {
        if let Some(incoming) = self.arriving() {
            match is_owned(&incoming) {
                // Its disks cannot be had, or its guest cannot run; or it is about to.
                true => {
                    incoming.control.detach();
                    self.machine.kill();
                }
                false => incoming.control.cancel(),
            }
            return Ok(());
        }
        self.check_here()?;
        self.machine.kill();
        Ok(())
    }

    fn reset(&self) -> Result<(), ControlError> {
        self.check_here()?;
        // The kernel is loaded into memory that may never come.
        if self.machine.is_draining() {
            return Err(ControlError::Conflict(
                "guest memory is not all here: wait until the migration is complete (`minivmm migration` tells), or end the VM \
                 with `minivmm kill`"
                    .to_owned(),
            ));
        }
        Ok(self.machine.reset()?)
    }

    fn save(&self, path: PathBuf, then_stop: bool) -> Result<SaveReport, ControlError> {
        self.check_here()?;
        let begin = Instant::now();
        let (summary, paused) = self.machine.save_to(&path, then_stop)?;
        let report = save_report(path, &summary, paused, begin);
        self.machine.events().push("saved", json!(report));
        if then_stop {
            self.machine.kill();
        }
        Ok(report)
    }

    fn save_incomplete(&self, path: PathBuf) -> Result<SaveReport, ControlError> {
        let left_behind = self.outgoing.phase() == Some(SourcePhase::HandedOver);
        if !left_behind || !self.outgoing.is_interrupted() {
            return Err(ControlError::Conflict(
                "nothing of the VM was left behind here by post-copy without a way to follow: save it without \
                 --incomplete, on the host that it runs on"
                    .to_owned(),
            ));
        }
        let begin = Instant::now();
        let summary = self.machine.save_remains(&path)?;
        let report = save_report(path, &summary, Duration::ZERO, begin);
        self.machine.events().push("saved-incomplete", json!(report));
        Ok(report)
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        self.check_here()?;
        Ok(self.machine.set_balloon(bytes)?)
    }

    fn set_link(&self, id: &str, up: bool) -> Result<(), ControlError> {
        self.check_here()?;
        Ok(self.machine.set_link(id, up)?)
    }

    fn resize_console(&self, columns: u16, rows: u16) -> Result<(), ControlError> {
        self.check_here()?;
        Ok(self.machine.resize_console(columns, rows)?)
    }

    fn migrate(&self, request: &MigrateRequest) -> Result<Value, ControlError> {
        self.check_here()?;
        let id = self.outgoing.start(request)?;
        Ok(match request.detach {
            true => json!({ "id": id.to_string() }),
            false => self.outgoing.wait(id),
        })
    }

    fn migration(&self) -> MigrationInfo {
        if let Some((Incoming { control: _, id, peer }, drain)) = self.draining() {
            let current = json!({
                "id": id,
                "direction": "incoming",
                "peer": peer,
                "phase": "draining",
                "interrupted": !drain.connected,
                "missing_pages": drain.missing_pages,
                "missing": drain.missing,
                "frozen": drain.frozen,
                "note": drain.note,
                "progress": null,
            });
            return MigrationInfo { current, last: Value::Null };
        }
        if let Some(Incoming { control, id, peer }) = self.arriving() {
            let current = json!({
                "id": id,
                "direction": "incoming",
                "peer": peer,
                "phase": control.phase(),
                "progress": null,
            });
            return MigrationInfo { current, last: Value::Null };
        }
        let (current, last) = self.outgoing.status();
        let last = if last.is_null() { lock(&self.arrival).clone() } else { last };
        MigrationInfo { current, last }
    }

    fn start_postcopy(&self) -> Result<(), ControlError> {
        self.outgoing.start_postcopy()
    }

    fn recover_migration(&self, request: &RecoverRequest) -> Result<(), ControlError> {
        self.outgoing.recover(request.to.clone())
    }

    fn set_migration(&self, settings: &MigrateSettings) -> Result<(), ControlError> {
        self.outgoing.set(settings)
    }

    fn cancel_migration(&self) -> Result<(), ControlError> {
        if let Some(incoming) = self.arriving() {
            if is_owned(&incoming) {
                let message = "too late to cancel: the VM is owned here; `minivmm kill` ends it";
                return Err(ControlError::Conflict(message.to_owned()));
            }
            incoming.control.cancel();
            return Ok(());
        }
        self.outgoing.cancel()
    }

    fn events(&self) -> &EventLog {
        self.machine.events()
    }
}
