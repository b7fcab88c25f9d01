//! A VM, a destination, and a proxy between them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use crate::beacon::goes_on;
use crate::migrating::Migrating;
use crate::proxy::Proxy;
use crate::{number, Host, Vm, PATIENCE};

use super::hurt::SmallDisk;

/// A guest that works hard enough to notice what goes wrong, and shows that it lives.
pub const BUSY: &str = "ws=8 dirty=4000 pattern=random report=0 pace=0 beat=20";

/// Size of the disk of a scene that has one, bytes.
const DISK_BYTES: u64 = 8 << 20;

/// Waits until `done`.
///
/// # Panics
/// Not within [`PATIENCE`].
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::yield_now();
    }
}

/// A host, and how VMs come to it.
#[derive(Debug, Default)]
pub struct Place {
    /// Its state directory, where that can be filled up. Before the host, whose directory it is in.
    pub(super) small: Option<SmallDisk>,
    /// The host.
    pub host: Host,
    /// What its `minivmm receive` is given besides.
    pub receive: Vec<String>,
}

impl Place {
    /// Where VMs come without further ado.
    #[must_use]
    pub fn plain() -> Arc<Self> {
        Arc::default()
    }

    /// Whose state directory can be filled up. To be made in private mounts.
    #[must_use]
    #[track_caller]
    pub fn with_small_disk() -> Self {
        let host = Host::new();
        let small = Some(SmallDisk::mount(&host.root().join("state")));
        Self { small, host, receive: Vec::new() }
    }

    /// Where `minivmm receive` is given this besides.
    #[must_use]
    pub fn receiving(self, receive: &[String]) -> Self {
        Self { receive: receive.to_vec(), ..self }
    }

    /// Waits for a VM, once; gives the address too.
    #[track_caller]
    pub fn receive(&self) -> (Vm, String) {
        let args: Vec<&str> = self.receive.iter().map(String::as_str).collect();
        self.host.receive(&args)
    }

    /// The status of the VM; `None` when none answers.
    #[must_use]
    pub fn status(&self) -> Option<String> {
        let info = self.host.cli(&["info", "vm", "--json"]);
        let info: Value = serde_json::from_str(info.stdout.trim()).ok()?;
        info["status"].as_str().map(str::to_owned)
    }

    /// The ids of migrations away from here that the journal has.
    #[must_use]
    #[track_caller]
    pub fn outgoing(&self) -> Vec<String> {
        let entries = self.host.json(&["migration"]);
        let entries = entries.as_array().unwrap().iter();
        let outgoing = entries.filter(|entry| entry["direction"] == "outgoing");
        outgoing.map(|entry| entry["id"].as_str().unwrap().to_owned()).collect()
    }

    /// What the journal says of a migration from here or to here; `None` when it knows none.
    #[must_use]
    #[track_caller]
    pub fn verdict(&self, id: &str) -> Option<String> {
        let entries = self.host.json(&["migration"]);
        let found = entries.as_array().unwrap().iter().find(|entry| entry["id"] == id)?.clone();
        Some(found["verdict"].as_str().unwrap().to_owned())
    }
}

/// Two places; the VM `vm` runs at the first.
#[derive(Debug)]
pub struct Scene {
    // Processes end before their hosts go.
    /// The process that the VM comes from, while there is one.
    pub source: Option<Vm>,
    /// The one that waits for it.
    pub destination: Option<Vm>,
    /// What is between them.
    pub proxy: Proxy,
    /// Where the VM is.
    pub here: Arc<Place>,
    /// Where it is to go.
    pub there: Arc<Place>,
    /// The VM's disk, if it has one.
    pub disk: Option<PathBuf>,
    /// The guest's last report before all this.
    pub before: Value,
    /// Migrations of before.
    old: Vec<String>,
}

impl Scene {
    /// A small VM at one place, and a destination at another.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_to(Place::default())
    }

    /// As [`Scene::start`], with this destination.
    #[track_caller]
    pub fn start_to(there: Place) -> Self {
        let here = Place::plain();
        Self::with(Self::vm(&here), here, Arc::new(there), None)
    }

    /// A small VM.
    #[track_caller]
    pub fn vm(place: &Place) -> Vm {
        place.host.run(BUSY, &[]).ready()
    }

    /// As [`Scene::start`], with a disk.
    #[track_caller]
    pub fn start_with_disk() -> Self {
        let here = Place::plain();
        let disk = here.host.path("disk");
        let vm = here.host.run(BUSY, &["--disk", &Self::disk(&disk)]).ready();
        Self::with(vm, here, Place::plain(), Some(disk))
    }

    /// A VM that runs at a place, and a destination at another.
    #[track_caller]
    pub fn with(mut vm: Vm, here: Arc<Place>, there: Arc<Place>, disk: Option<PathBuf>) -> Self {
        let before = vm.report();
        let (destination, address) = there.receive();
        let proxy = Proxy::to(&address);
        let old = here.outgoing();
        let (source, destination) = (Some(vm), Some(destination));
        Self { source, destination, proxy, here, there, disk, before, old }
    }

    /// Makes a disk; gives it as an argument.
    #[must_use]
    pub fn disk(path: &Path) -> String {
        File::create(path).unwrap().set_len(DISK_BYTES).unwrap();
        format!("id=disk,path={}", path.display())
    }

    /// Begins to migrate through the proxy.
    #[track_caller]
    pub fn migrate(&self, args: &[&str]) -> Migrating {
        Migrating::start(&self.here.host, &self.proxy.address(), args)
    }

    /// The id of the migration that was begun.
    #[must_use]
    #[track_caller]
    pub fn id(&self) -> String {
        let mut new = self.here.outgoing();
        new.retain(|id| !self.old.contains(id));
        assert_eq!(new.len(), 1, "one migration: {new:?}");
        new.remove(0)
    }

    /// The source's process.
    #[track_caller]
    pub fn source(&mut self) -> &mut Vm {
        self.source.as_mut().expect("the source is there")
    }

    /// The destination's process.
    #[track_caller]
    pub fn destination(&mut self) -> &mut Vm {
        self.destination.as_mut().expect("the destination is there")
    }
}

/// The guest `vm` has gone on since `before` in all that it does, with all of its memory.
#[track_caller]
pub fn runs(vm: &mut Vm, before: &Value) {
    const DEVICES: [&str; 3] = ["disk_verified", "udp_replies", "rng_requests"];
    until("progress of the guest", || {
        let report = vm.report();
        let device_goes_on =
            |name: &str| before[name].is_null() || number(&report, name) > number(before, name);
        goes_on(before, &report) && DEVICES.into_iter().all(device_goes_on)
    });
    vm.verify();
}

/// The VM moves, compared page by page where that can be. Gives its new process.
#[track_caller]
pub fn moves(vm: Vm, from: &Place, to: &Place, args: &[&str]) -> Vm {
    moves_with(vm, from, to, args).0
}

/// As [`moves`]; gives the report of `minivmm migrate` too.
#[track_caller]
pub fn moves_with(mut vm: Vm, from: &Place, to: &Place, args: &[&str]) -> (Vm, Value) {
    let before = vm.report();
    let (mut next, address) = to.receive();
    let mut args = [&["migrate", "vm", "--to", &address], args].concat();
    // What follows its guest cannot be compared with what was there in the pause.
    if !args.contains(&"postcopy") {
        args.push("--verify");
    }
    let report = from.host.json(&args);
    assert_eq!(report["verdict"], "handed-over", "{report}");
    vm.ends_well();
    runs(&mut next, &before);
    (next, report)
}
