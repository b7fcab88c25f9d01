//! Receiving a VM.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::CpuId;
use migration::destination::{
    answer_queries, receive, Arrival, DestinationControl, DestinationOptions,
};
use migration::journal::Journal;
use migration::snapshot::Blob;
use migration::transport::TcpAcceptor;
use migration::{DestinationHost, DestinationVm, MigrationId, Offer};
use serde_json::json;

use super::resources::ResourcesV1;
use super::Records;
use crate::api::{self, ApiHandle};
use crate::config::{ConsoleConfig, HostLimits, NetConfig, ReceiveSettings, VmConfig};
use crate::identity::{decode_config, IdentityError, IdentityV1};
use crate::kvm::HostKvm;
use crate::machine::{memory_layout, Machine, MachineError};
use crate::network;
use crate::privileges;
use crate::run::{Assembled, RunError};
use crate::runtime_dir::RuntimeDir;
use crate::snapshot::media_of;
use crate::virtio::{DiskOwnership, TapError, VirtioError};
use crate::vm_handle::{Incoming, VmHandle};

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far a process is that receives: what a signal ends.
#[derive(Default)]
pub struct Stage {
    signals: AtomicU32,
    at: Mutex<At>,
}

#[derive(Default)]
enum At {
    #[default]
    Between,
    Waiting(DestinationControl),
    Running(Arc<Machine>),
}

impl Stage {
    /// A signal asks the process to end.
    pub fn end(&self) {
        self.signals.fetch_add(1, Ordering::AcqRel);
        self.end_what_is();
    }

    fn end_what_is(&self) {
        match &*lock(&self.at) {
            At::Between => {}
            At::Waiting(control) => end_waiting(control),
            At::Running(machine) => machine.kill(),
        }
    }

    /// How many signals did.
    pub fn signals(&self) -> u32 {
        self.signals.load(Ordering::Acquire)
    }

    /// Whether one did.
    pub fn is_ending(&self) -> bool {
        self.signals() > 0
    }

    /// The VM is here.
    pub fn runs(&self, machine: &Arc<Machine>) {
        self.set(At::Running(Arc::clone(machine)));
    }

    /// A migration is over. The VM may be here and run by now.
    fn over(&self) {
        let mut at = lock(&self.at);
        if matches!(*at, At::Waiting(_)) {
            *at = At::Between;
        }
    }

    fn set(&self, at: At) {
        *lock(&self.at) = at;
        // A signal of meanwhile found nothing to end.
        if self.is_ending() {
            self.end_what_is();
        }
    }
}

fn end_waiting(control: &DestinationControl) {
    control.stop();
    control.cancel();
    // Where it is not known whose the VM is, it stays so.
    control.detach();
}

/// A VM that came, served by this API.
pub type Came = (Box<Assembled>, ApiHandle);

/// What became of an incoming migration.
pub enum Received {
    /// The VM is here.
    Here(Came),
    /// It was given away when its guest ran, and the rest of its memory has followed, or never will.
    Drained,
    /// It is not, for these reasons; the source may still ask, unless this is `None`.
    Not(Vec<String>, Option<MigrationId>),
    /// Nobody knows.
    Unresolved(Vec<String>),
    /// It is here, and was given up before it could run, for these reasons; the source of this migration may still ask.
    NeverRan(Vec<String>, Option<MigrationId>),
    /// None came.
    Stopped,
}

/// Where migrations and questions about them come in.
pub struct FrontDoor {
    acceptor: TcpAcceptor,
    address: String,
    journal: Journal,
    records: Records,
}

impl FrontDoor {
    /// Listens at `ADDRESS:PORT`, then becomes `user`, if one is given.
    ///
    /// # Errors
    /// It cannot, or there is no journal.
    pub fn open(listen: &str, user: Option<&str>) -> Result<Self, RunError> {
        let failed = |error| RunError::Listen { address: listen.to_owned(), error };
        let acceptor = TcpAcceptor::bind(listen).map_err(failed)?;
        let address = acceptor.local_address().map_err(failed)?.to_string();
        if let Some(user) = user {
            // That user may not.
            migration::userfault::keep_device();
            privileges::become_user(user)?;
        }
        let journal = super::journal()?;
        let records = Records::open()?;
        Ok(Self { acceptor, address, journal, records })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Receives one migration. With post-copy the VM goes to `early` as soon as its guest runs, and this returns when its
    /// memory is here.
    ///
    /// # Errors
    /// No thread for it.
    pub fn receive(
        &self,
        host: &HostKvm,
        settings: &ReceiveSettings,
        stage: &Stage,
        early: &Sender<Came>,
    ) -> Result<Received, RunError> {
        let control = DestinationControl::new();
        stage.set(At::Waiting(control.clone()));
        let incoming = IncomingHost {
            host,
            settings,
            control: control.clone(),
            made: Mutex::default(),
            early,
        };
        let options = DestinationOptions::default();
        let report = receive(&incoming, &self.acceptor, &self.journal, &options, &control, &|_| {});
        stage.over();
        let report = report.map_err(RunError::Receive)?;
        let value = json!(report);
        if !report.id.is_empty() {
            self.records.keep("incoming", &value);
        }
        let made = match std::mem::take(&mut *lock(&incoming.made)) {
            Made::Early(handle, machine) => {
                let kind = if report.drain.as_ref().is_some_and(|d| d.complete) {
                    "drained"
                } else {
                    "drain-failed"
                };
                machine.events().push(kind, value.clone());
                handle.end_arrival(value);
                return Ok(Received::Drained);
            }
            Made::Here(vm, api) => Some((vm, api)),
            Made::Nothing => None,
        };
        let reasons = match report.outcome {
            Arrival::RunningHere => {
                let (vm, api) = made.ok_or_else(|| {
                    RunError::NotReceived(vec!["the VM came and is not there".to_owned()])
                })?;
                vm.machine.events().push("arrived", value.clone());
                vm.handle.end_arrival(value);
                return Ok(Received::Here((vm, api)));
            }
            Arrival::NotHere { reasons, .. } => {
                let id = report.id.parse().ok();
                Received::Not(reasons, id.filter(|_| !report.confirmed))
            }
            Arrival::Unresolved { reasons } => Received::Unresolved(reasons),
            Arrival::OwnedHere { reasons } => {
                let id = report.id.parse().ok();
                Received::NeverRan(reasons, id.filter(|_| !report.confirmed))
            }
            Arrival::Stopped => Received::Stopped,
        };
        if let Some((vm, api)) = made {
            vm.machine.events().push("migration-failed", value);
            vm.machine.events().close();
            api.shutdown();
            vm.dismantle();
        }
        Ok(reasons)
    }

    /// Tells whoever asks what became of migrations to this host, until `is_over`, which is told
    /// whose sources have got an answer.
    pub fn answer(&self, is_over: &dyn Fn(&[MigrationId]) -> bool) {
        let answered = {
            let timing = DestinationOptions::default().timing;
            answer_queries(&self.acceptor, &self.journal, timing, is_over)
        };
        if let Err(error) = answered {
            tracing::warn!(%error, "questions about migrations are not answered");
        }
    }
}

/// Makes machines for VMs that come.
struct IncomingHost<'a> {
    host: &'a HostKvm,
    settings: &'a ReceiveSettings,
    control: DestinationControl,
    made: Mutex<Made>,
    early: &'a Sender<Came>,
}

/// The VM that was made for a migration.
#[derive(Default)]
enum Made {
    #[default]
    Nothing,
    Here(Box<Assembled>, ApiHandle),
    /// It has an owner, and its memory follows.
    Early(Arc<VmHandle>, Arc<Machine>),
}

impl IncomingHost<'_> {
    /// The VM as it is to be here, or every reason why it cannot be.
    fn examine(&self, offer: &Offer) -> Result<(VmConfig, Vec<CpuId>), Vec<String>> {
        let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
        let mut config = decode_config(offer.config.version, offer.config.data.clone())
            .map_err(|error| one(&error))?;
        let mut reasons = Vec::new();
        let settings = self.settings;
        config.name = settings.name.clone().unwrap_or(config.name);
        if let Err(error) = config.replace_backends(&settings.disks, &settings.nets) {
            reasons.push(error.to_string());
        }
        match (&settings.console, &config.console) {
            (Some(console), _) => config.console = console.clone(),
            (None, ConsoleConfig::File(path)) => reasons.push(format!(
                "its console goes to the file {}: say where it is to go here with --console",
                path.display()
            )),
            (None, _) => {}
        }
        if let Err(error) = config.validate(HostLimits::detect()) {
            reasons.push(error.to_string());
        }
        let expected = memory_layout(config.memory.size);
        if offer.layout != expected {
            reasons.push(format!(
                "its memory is {:?}, which its configuration does not ask for",
                offer.layout
            ));
        }
        let obstacles = network::obstacles(&config.nets, Some(&offer.name));
        reasons.extend(obstacles.iter().map(ToString::to_string));
        let machine = &offer.machine;
        let identity = IdentityV1::decode(machine.identity_version, machine.identity.clone());
        let mut cpuid = Vec::new();
        match identity.map_err(IdentityError::from).and_then(|i| i.check(self.host, &config)) {
            Ok(found) => cpuid = found,
            Err(IdentityError::Incompatible(all)) => reasons.extend(all),
            Err(error) => reasons.push(error.to_string()),
        }
        let resources = &offer.resources;
        match ResourcesV1::decode(resources.version, resources.data.clone()) {
            Ok(resources) => reasons.extend(resources.differences(&config)),
            Err(error) => reasons.push(error.to_string()),
        }
        if reasons.is_empty() {
            Ok((config, cpuid))
        } else {
            Err(reasons)
        }
    }

    fn make(&self, offer: &Offer, blobs: Vec<Blob>) -> Result<Arc<Machine>, Vec<String>> {
        let (config, cpuid) = self.examine(offer)?;
        let nets = config.nets.clone();
        let make = || -> Result<_, RunError> {
            let media = media_of(blobs)?;
            let name = RuntimeDir::open()?.claim_incoming(&config.name)?;
            let disks = DiskOwnership::Incoming;
            let vm = Assembled::new(self.host, name, config, media, Some(cpuid), disks)?;
            if self.settings.process.paused {
                vm.machine.arrive_paused();
            }
            vm.handle.begin_arrival(Incoming {
                control: self.control.clone(),
                id: offer.id.to_string(),
                peer: offer.peer.clone(),
            });
            let listener = vm.name.listen()?;
            let api = api::serve(listener, Arc::clone(&vm.handle) as _).map_err(RunError::Api)?;
            Ok((vm, api))
        };
        let (vm, api) = make().map_err(|error| vec![refusal(&error, &nets)])?;
        let detail = json!({ "id": offer.id.to_string(), "from": offer.peer });
        vm.machine.events().push("incoming", detail);
        let machine = Arc::clone(&vm.machine);
        *lock(&self.made) = Made::Here(Box::new(vm), api);
        Ok(machine)
    }
}

/// Why the VM cannot be made here, for people at both ends.
fn refusal(error: &RunError, nets: &[NetConfig]) -> String {
    let RunError::Machine(MachineError::Virtio(VirtioError::Tap(tap_error))) = error else {
        return error.to_string();
    };
    let TapError::Busy { tap } = tap_error else { return error.to_string() };
    let id = nets.iter().find(|net| net.attachment.tap() == Some(tap)).map_or("ID", |net| &net.id);
    format!(
        "network {id}: tap {tap} is in use on the destination's host, by the VM itself if it comes from there: \
         give it another tap (minivmm receive --net {id}=TAP)"
    )
}

impl DestinationHost for IncomingHost<'_> {
    fn check(&self, offer: &Offer) -> Vec<String> {
        self.examine(offer).err().unwrap_or_default()
    }

    fn prepare(
        &self,
        offer: &Offer,
        blobs: Vec<Blob>,
    ) -> Result<Arc<dyn DestinationVm>, Vec<String>> {
        self.make(offer, blobs).map(|machine| machine as _)
    }

    fn draining(&self, id: MigrationId) {
        let mut made = lock(&self.made);
        if let Made::Here(vm, api) = std::mem::take(&mut *made) {
            let detail = json!({ "id": id.to_string() });
            vm.machine.events().push("draining", detail);
            *made = Made::Early(Arc::clone(&vm.handle), Arc::clone(&vm.machine));
            // Who waits for it takes it.
            let _ = self.early.send((vm, api));
        }
    }
}
