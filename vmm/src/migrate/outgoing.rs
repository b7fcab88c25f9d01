//! Migrating the VM of this process away.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use migration::handover::SourcePhase;
use migration::identity::MigrationId;
use migration::report::{Outcome, Progress, Report};
use migration::source::{
    migrate_to, LateOptions, Limits, Offering, OnStall, PostcopyOptions, SourceControl,
    SourceOptions,
};
use migration::transport::TcpConnector;
use migration::Timing;
use serde_json::{json, Value};

use super::resources::ResourcesV1;
use super::Records;
use crate::config::MigrationConfig;
use crate::control::{ControlError, MigrateRequest, MigrateSettings, MigrationMode};
use crate::machine::Machine;
use crate::snapshot::{self, MediaReaders};
use crate::vcpu::GuestRequest;

/// How long to wait before looking at a migration again that is about to be decided.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How long in all memory that a guest elsewhere needs waits for lost connections when its process is to end.
const GIVE_UP: Duration = Duration::from_secs(3);

/// Silence that a peer may be taken for dead after, milliseconds.
const DEAD_AFTER_MS: std::ops::RangeInclusive<u64> = 100..=60_000;

/// What became of a migration when its VM was to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The VM is this process's to end.
    Ours,
    /// The destination has it.
    HandedOver,
    /// Nobody knows who has it.
    Unresolved,
}

/// The migrations of a VM away from here, one at a time.
pub struct Outgoing {
    machine: Arc<Machine>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    last: Option<Value>,
}

struct Running {
    id: MigrationId,
    control: SourceControl,
    to: String,
    /// Whether memory may follow the guest.
    may_switch: bool,
}

impl Outgoing {
    /// None yet.
    #[must_use]
    pub fn new(machine: Arc<Machine>) -> Arc<Self> {
        Arc::new(Self { machine, state: Mutex::default(), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a migration and gives its id.
    ///
    /// # Errors
    /// Another one is under way, or the VM or the host cannot.
    pub fn start(self: &Arc<Self>, request: &MigrateRequest) -> Result<MigrationId, ControlError> {
        let options = options(request, self.machine.config().migration)?;
        let may_switch = options.mode.may_switch() || options.on_stall == OnStall::Postcopy;
        let failed = |error: &dyn std::fmt::Display| ControlError::Failed(error.to_string());
        if let Some(why) = self.machine.migration_blocker() {
            return Err(ControlError::Conflict(format!("the VM cannot be migrated: {why}")));
        }
        let journal = super::journal().map_err(|error| failed(&error))?;
        let records = Records::open().map_err(|error| failed(&error))?;
        let mut state = self.lock();
        if let Some(running) = &state.running {
            let message = format!("it is being migrated to {} already", running.to);
            return Err(ControlError::Conflict(message));
        }
        let id = MigrationId::random().map_err(|error| failed(&error))?;
        let control = SourceControl::new(id);
        let started = thread::Builder::new().name("migration".to_owned()).spawn({
            let (outgoing, control, to) = (Arc::clone(self), control.clone(), request.to.clone());
            move || {
                let report = outgoing.migrate(&journal, &options, &control, &to);
                outgoing.finish(&records, &report);
            }
        });
        // It is over only after this lock was given up.
        started.map_err(|error| failed(&error))?;
        state.running = Some(Running { id, control, to: request.to.clone(), may_switch });
        Ok(id)
    }

    fn migrate(
        &self,
        journal: &migration::journal::Journal,
        options: &SourceOptions,
        control: &SourceControl,
        to: &str,
    ) -> Result<Report, String> {
        let machine = &*self.machine;
        let (record, config) = snapshot::records(machine).map_err(|error| error.to_string())?;
        let resources = ResourcesV1::of(machine.config())?;
        let resources = resources.encode().map_err(|error| error.to_string())?;
        let mut media = MediaReaders::new(machine.media());
        let offering = Offering {
            name: machine.config().name.clone(),
            machine: record,
            config,
            resources,
            blobs: media.blobs(),
        };
        let told = Mutex::new((None, None));
        let progress = |progress: &Progress| {
            let now = (Some(progress.phase), progress.round);
            let before =
                std::mem::replace(&mut *told.lock().unwrap_or_else(PoisonError::into_inner), now);
            if before != now {
                machine.events().push("migration", json!(progress));
            }
        };
        let connector = TcpConnector::new(to);
        machine
            .events()
            .push("migration-began", json!({ "id": control.id().to_string(), "to": to }));
        Ok(migrate_to(machine, offering, &connector, journal, options, control, &progress))
    }

    fn finish(&self, records: &Records, result: &Result<Report, String>) {
        let machine = &*self.machine;
        let (value, outcome) = match result {
            Ok(report) => (json!(report), Some(&report.outcome)),
            Err(reason) => {
                let (id, to) = self
                    .lock()
                    .running
                    .as_ref()
                    .map(|running| (running.id.to_string(), running.to.clone()))
                    .unwrap_or_default();
                let vm = &machine.config().name;
                let value = json!({ "id": id, "vm": vm, "peer": to, "verdict": "running-here",
                    "cause": "failed", "reasons": [reason] });
                (value, None)
            }
        };
        records.keep("outgoing", &value);
        if matches!(outcome, Some(Outcome::RunningHere { .. }) | None) {
            if let Err(error) = machine.release() {
                tracing::error!(%error, "the guest stays paused");
            }
        }
        // Who hears of it finds it so.
        let mut state = self.lock();
        let event = match outcome {
            Some(Outcome::HandedOver) => "migrated",
            Some(Outcome::Unresolved { .. }) => "migration-unresolved",
            Some(Outcome::RunningHere { .. }) | None => "migration-failed",
        };
        machine.events().push(event, value.clone());
        state.last = Some(value);
        state.running = None;
        drop(state);
        self.changed.notify_all();
        if matches!(outcome, Some(Outcome::HandedOver)) {
            machine.request(GuestRequest::HandedOver);
        }
    }

    /// Waits until the migration `id` is over and gives its report.
    #[must_use]
    pub fn wait(&self, id: MigrationId) -> Value {
        let mut state = self.lock();
        while state.running.as_ref().is_some_and(|running| running.id == id) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.last.clone().unwrap_or_default()
    }

    fn control(&self) -> Option<SourceControl> {
        self.lock().running.as_ref().map(|running| running.control.clone())
    }

    /// How far the migration is that is under way.
    #[must_use]
    pub fn phase(&self) -> Option<SourcePhase> {
        self.control().map(|control| control.phase())
    }

    /// The migration that is under way, and the report of the last one.
    #[must_use]
    pub fn status(&self) -> (Value, Value) {
        let state = self.lock();
        let current = state.running.as_ref().map(|running| {
            json!({
                "id": running.id.to_string(),
                "direction": "outgoing",
                "peer": running.to,
                "phase": running.control.phase(),
                "interrupted": running.control.is_interrupted(),
                "interruptions": running.control.interruptions(),
                "progress": running.control.progress(),
            })
        });
        (current.unwrap_or_default(), state.last.clone().unwrap_or_default())
    }

    fn current(&self) -> Result<SourceControl, ControlError> {
        let none = || ControlError::Conflict("no migration of this VM is under way".to_owned());
        self.control().ok_or_else(none)
    }

    /// Gives the migration up.
    ///
    /// # Errors
    /// There is none, or it is too late.
    pub fn cancel(&self) -> Result<(), ControlError> {
        match self.current()?.cancel() {
            true => Ok(()),
            false => Err(ControlError::Conflict(
                "too late: the VM is being handed over; its verdict will tell".to_owned(),
            )),
        }
    }

    /// Changes a migration that is under way.
    ///
    /// # Errors
    /// There is none, or a setting is not possible.
    pub fn set(&self, settings: &MigrateSettings) -> Result<(), ControlError> {
        let control = self.current()?;
        if let Some(bandwidth) = settings.bandwidth {
            control.set_bandwidth((bandwidth > 0).then_some(bandwidth));
        }
        if let Some(push) = settings.push {
            control.set_push(push);
        }
        if let Some(downtime) = settings.downtime_us {
            control.set_downtime(Duration::from_micros(downtime));
        }
        Ok(())
    }

    /// Lets the guest move now and the rest of its memory follow it.
    ///
    /// # Errors
    /// There is no migration, or none that may do so.
    pub fn start_postcopy(&self) -> Result<(), ControlError> {
        let control = self.current()?;
        if !self.lock().running.as_ref().is_some_and(|running| running.may_switch) {
            let message = "this migration was not begun with post-copy in view: begin it with --mode hybrid or \
                           --on-stall postcopy";
            return Err(ControlError::Conflict(message.to_owned()));
        }
        control.start_postcopy();
        Ok(())
    }

    /// Lets a post-copy migration that lost its connections try again now.
    ///
    /// # Errors
    /// There is no such migration.
    pub fn recover(&self, to: Option<String>) -> Result<(), ControlError> {
        let control = self.current()?;
        if !control.is_interrupted() {
            let message = "no migration of this VM waits for its destination".to_owned();
            return Err(ControlError::Conflict(message));
        }
        if let Some(running) = self.lock().running.as_mut() {
            running.to = to.clone().unwrap_or_else(|| running.to.clone());
        }
        control.recover(to);
        Ok(())
    }

    /// Whether the guest runs elsewhere, and connections for the rest of its memory are lost.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.control().is_some_and(|control| control.is_interrupted())
    }

    /// The VM is about to end, by its guest or an operator: a migration is given up, or waited for
    /// where it is too late for that.
    #[must_use]
    pub fn end(&self) -> Ended {
        let mut interrupted = Duration::ZERO;
        while let Some(control) = self.control() {
            let stuck = match control.phase() {
                SourcePhase::Unresolved | SourcePhase::RolledBack => true,
                // The VM's memory goes with this process: it is tried for a while to connect again.
                _ if control.is_interrupted() => {
                    interrupted += LOOK_AGAIN;
                    interrupted > GIVE_UP
                }
                _ => false,
            };
            if !control.guest_ended() && stuck {
                control.detach();
            }
            thread::sleep(LOOK_AGAIN);
        }
        let last = self.lock().last.clone().unwrap_or_default();
        match last["verdict"].as_str() {
            Some("handed-over") => Ended::HandedOver,
            Some("unresolved") => Ended::Unresolved,
            _ => Ended::Ours,
        }
    }
}

/// Time limits where a peer is dead after this silence.
fn timing(dead_after_ms: Option<u64>) -> Result<Timing, ControlError> {
    let timing = Timing::default();
    let Some(millis) = dead_after_ms else { return Ok(timing) };
    if !DEAD_AFTER_MS.contains(&millis) {
        return Err(ControlError::BadRequest(format!(
            "{millis} ms of silence is no sign of death: use 100 to 60000 ms"
        )));
    }
    let dead = Duration::from_millis(millis);
    // One sign of life may be late or lost.
    Ok(Timing { dead, alive: timing.alive.min(dead / 5), ..timing })
}

/// How memory is to follow its guest.
fn postcopy(request: &MigrateRequest) -> PostcopyOptions {
    let default = PostcopyOptions::default();
    let after = request.switch_after_ms.map(Duration::from_millis);
    PostcopyOptions {
        rounds: request.rounds.or(default.rounds.filter(|_| after.is_none())),
        after,
        push: request.push.unwrap_or(default.push),
        prepaging: request.prepaging.unwrap_or(default.prepaging),
    }
}

/// What is asked for and, where nothing is, configured.
fn options(
    request: &MigrateRequest,
    configured: MigrationConfig,
) -> Result<SourceOptions, ControlError> {
    let bad = |message: String| Err(ControlError::BadRequest(message));
    let limits = MigrationConfig {
        max_rounds: request.max_rounds.unwrap_or(configured.max_rounds),
        max_bytes_factor: request.max_bytes_factor.unwrap_or(configured.max_bytes_factor),
        dirty_pages: request.dirty_pages.unwrap_or(configured.dirty_pages),
    };
    let options = SourceOptions {
        mode: match request.mode {
            MigrationMode::Precopy => migration::Mode::Precopy,
            MigrationMode::Cold => migration::Mode::Cold,
            MigrationMode::Postcopy => migration::Mode::Postcopy,
            MigrationMode::Hybrid => migration::Mode::Hybrid,
        },
        postcopy: postcopy(request),
        connections: request.connections.unwrap_or(1),
        verify: request.verify,
        downtime: request
            .downtime_us
            .map_or(SourceOptions::default().downtime, Duration::from_micros),
        limits: Limits {
            rounds: limits.max_rounds,
            bytes_factor: limits.max_bytes_factor,
            dirty_pages: limits.dirty_pages,
            time: request.timeout_ms.map(Duration::from_millis),
        },
        on_stall: request.on_stall.unwrap_or_default(),
        bandwidth: request.bandwidth.filter(|bandwidth| *bandwidth > 0),
        late: LateOptions {
            forward: request.forward_packets.unwrap_or(true),
            ..LateOptions::default()
        },
        timing: timing(request.dead_after_ms)?,
    };
    if !(1..=64).contains(&options.connections) {
        return bad(format!("{} connections are not possible: use 1 to 64", options.connections));
    }
    let may_switch = options.mode.may_switch() || options.on_stall == OnStall::Postcopy;
    if options.verify && may_switch {
        return bad("memory cannot be compared in the pause when it follows its guest: leave verify out; each page \
                    has a checksum then"
            .to_owned());
    }
    if let Err(error) = limits.validate() {
        return bad(error.to_string());
    }
    let port = request.to.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    if port.is_none() {
        return bad(format!("{:?} is no destination: write HOST:PORT", request.to));
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const CONFIGURED: MigrationConfig =
        MigrationConfig { max_rounds: 5, max_bytes_factor: 2.0, dirty_pages: 100 };

    fn limits(request: MigrateRequest) -> Result<(u32, f64, u64), ControlError> {
        let request = MigrateRequest { to: "host:1".into(), ..request };
        let Limits { rounds, bytes_factor, dirty_pages, .. } =
            options(&request, CONFIGURED)?.limits;
        Ok((rounds, bytes_factor, dirty_pages))
    }

    #[test]
    fn a_request_goes_before_what_is_configured() {
        assert_eq!(limits(MigrateRequest::default()), Ok((5, 2.0, 100)));
        let request = MigrateRequest { max_rounds: Some(1), ..Default::default() };
        assert_eq!(limits(request), Ok((1, 2.0, 100)));
        let bytes = Some(4.5);
        let request =
            MigrateRequest { max_bytes_factor: bytes, dirty_pages: Some(0), ..Default::default() };
        assert_eq!(limits(request), Ok((5, 4.5, 0)));
        let request = MigrateRequest { max_bytes_factor: Some(0.9), ..Default::default() };
        assert!(matches!(limits(request), Err(ControlError::BadRequest(_))));
    }
}
