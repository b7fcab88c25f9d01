//! A VM without KVM, behind the real API.

#![allow(dead_code)] // Each test program uses its part.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::Value;
use vmm::api::{serve_with, ApiHandle, Limits};
use vmm::config::{HostLimits, RunOptions, VmConfig};
use vmm::control::{
    Control, ControlError, MigrateRequest, MigrateSettings, MigrationInfo, RecoverRequest,
    SaveReport, VmInfo, VmStats, VmStatus,
};
use vmm::events::EventLog;
use vmm::runtime_dir::listen;
use vmm_sys_util::tempdir::TempDir;

/// Longest wait in a test for what must happen; only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Records what it is asked.
pub struct FakeVm {
    pub config: VmConfig,
    pub console_path: Option<PathBuf>,
    pub events: EventLog,
    pub calls: Mutex<Vec<String>>,
    pub status: Mutex<VmStatus>,
    /// While closed, `save` does not return.
    pub gate: Gate,
    /// What `pause` answers.
    pub pause_answer: Mutex<Result<(), ControlError>>,
    /// What the guest does when its power button is pressed.
    pub heeds_power_button: bool,
}

#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    pub fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    pub fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            closed = self.opened.wait(closed).unwrap();
        }
    }
}

pub fn config(name: &str) -> VmConfig {
    RunOptions::default().finish(HostLimits { memory: 1 << 40 }, name).unwrap().vm
}

impl FakeVm {
    pub fn new(name: &str) -> Self {
        let events = EventLog::default();
        events.push("running", serde_json::json!({}));
        Self {
            config: config(name),
            console_path: None,
            events,
            calls: Mutex::default(),
            status: Mutex::new(VmStatus::Running),
            gate: Gate::default(),
            pause_answer: Mutex::new(Ok(())),
            heeds_power_button: true,
        }
    }

    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }

    fn end(&self, kind: &str) {
        *self.status.lock().unwrap() = VmStatus::Stopped;
        self.events.push(kind, serde_json::json!({}));
        self.events.close();
    }

    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

impl Control for FakeVm {
    fn info(&self) -> VmInfo {
        VmInfo {
            name: self.config.name.clone(),
            pid: std::process::id(),
            version: "0.0.0".into(),
            status: *self.status.lock().unwrap(),
            uptime_ms: 61_000,
            config: self.config.clone(),
            console_path: self.console_path.clone(),
            draining: None,
        }
    }

    fn stats(&self) -> VmStats {
        VmStats {
            memory_bytes: 256 << 20,
            reboots: 3,
            vcpus: vec![Default::default()],
            ..Default::default()
        }
    }

    fn pause(&self) -> Result<(), ControlError> {
        self.note("pause");
        self.pause_answer.lock().unwrap().clone()?;
        *self.status.lock().unwrap() = VmStatus::Paused;
        self.events.push("paused", serde_json::json!({}));
        Ok(())
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.note("resume");
        *self.status.lock().unwrap() = VmStatus::Running;
        Ok(())
    }

    fn power_button(&self) -> Result<(), ControlError> {
        self.note("power-button");
        if self.heeds_power_button {
            self.end("power-off");
        }
        Ok(())
    }

    fn kill(&self) -> Result<(), ControlError> {
        self.note("kill");
        self.end("killed");
        Ok(())
    }

    fn reset(&self) -> Result<(), ControlError> {
        self.note("reset");
        Ok(())
    }

    fn save(&self, path: PathBuf, then_stop: bool) -> Result<SaveReport, ControlError> {
        self.note(format!("save {} {then_stop}", path.display()));
        self.gate.pass();
        Ok(SaveReport { path, pages: 7, ..Default::default() })
    }

    fn save_incomplete(&self, path: PathBuf) -> Result<SaveReport, ControlError> {
        self.note(format!("save-incomplete {}", path.display()));
        Ok(SaveReport { path, pages: 7, ..Default::default() })
    }

    fn set_balloon(&self, bytes: u64) -> Result<(), ControlError> {
        self.note(format!("balloon {bytes}"));
        Ok(())
    }

    fn set_link(&self, id: &str, up: bool) -> Result<(), ControlError> {
        self.note(format!("link {id} {up}"));
        Ok(())
    }

    fn resize_console(&self, columns: u16, rows: u16) -> Result<(), ControlError> {
        self.note(format!("console-size {columns} {rows}"));
        Ok(())
    }

    fn migrate(&self, request: &MigrateRequest) -> Result<Value, ControlError> {
        self.note(format!("migrate {} {:?}", request.to, request.mode));
        Ok(serde_json::json!({ "id": "1", "vm": self.config.name, "verdict": "running-here",
            "cause": "refused", "reasons": ["no room"] }))
    }

    fn migration(&self) -> MigrationInfo {
        MigrationInfo::default()
    }

    fn set_migration(&self, settings: &MigrateSettings) -> Result<(), ControlError> {
        self.note(format!("migrate-set {:?} {:?}", settings.bandwidth, settings.downtime_us));
        Ok(())
    }

    fn start_postcopy(&self) -> Result<(), ControlError> {
        self.note("migrate-start-postcopy");
        Ok(())
    }

    fn recover_migration(&self, request: &RecoverRequest) -> Result<(), ControlError> {
        self.note(format!("migrate-recover {:?}", request.to));
        Ok(())
    }

    fn cancel_migration(&self) -> Result<(), ControlError> {
        self.note("migrate-cancel");
        Err(ControlError::Conflict("no migration of this VM is under way".into()))
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}

/// A served fake VM in a directory of its own.
pub struct Served {
    pub vm: Arc<FakeVm>,
    pub socket: PathBuf,
    pub api: ApiHandle,
    _dir: TempDir,
}

pub fn serve_vm(vm: FakeVm, limits: Limits) -> Served {
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("vm.sock");
    let vm = Arc::new(vm);
    let api = serve_with(listen(&socket).unwrap(), vm.clone(), limits).unwrap();
    Served { vm, socket, api, _dir: dir }
}
