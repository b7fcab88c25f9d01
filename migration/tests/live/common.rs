//! A source, a destination and a network between them.

use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration::destination::{receive, ArrivalReport, DestinationControl, DestinationOptions};
use migration::journal::Journal;
use migration::report::{Progress, Report};
use migration::simulated::{Cut, LocalNetwork, RunGuard, SimulatedHost, SimulatedVm};
use migration::snapshot::BlobSource;
use migration::source::{migrate_to, Offering, SourceControl, SourceOptions};
use migration::stream::{BlobKind, Config, Machine};
use migration::transport::{Connector, Listener};
use migration::{Gfn, GuestMemory, MemoryLayout, MigrationId, PageRange, Section, Timing};

/// Two regions that touch, one beyond a hole; none a multiple of 64 pages.
pub const REGIONS: [(u64, u64); 3] = [(0, 1500), (1500, 100), (1 << 20, 1030)];

pub fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(Gfn(start), pages).unwrap()
}

pub fn layout() -> MemoryLayout {
    MemoryLayout::new(REGIONS.map(|(start, pages)| range(start, pages))).unwrap()
}

/// All page frames.
pub fn frames() -> Vec<u64> {
    REGIONS.iter().flat_map(|(start, pages)| *start..start + pages).collect()
}

/// Time limits that a test need not wait long for, but a busy machine keeps.
pub fn timing() -> Timing {
    Timing {
        alive: Duration::from_millis(100),
        dead: Duration::from_secs(5),
        connect: Duration::from_secs(5),
        accept: Duration::from_secs(10),
        ready: Duration::from_secs(10),
        pause: Duration::from_secs(10),
        loaded: Duration::from_secs(10),
        resumed: Duration::from_secs(10),
    }
}

pub fn options(connections: u16) -> SourceOptions {
    SourceOptions { connections, timing: timing(), ..SourceOptions::default() }
}

pub fn section(kind: &str, instance: u32, data: &[u8]) -> Section {
    Section { kind: kind.to_owned(), instance, version: 3, data: data.to_vec() }
}

/// Both ends.
pub struct World {
    pub vm: Arc<SimulatedVm>,
    pub host: SimulatedHost,
    pub guard: Arc<RunGuard>,
    pub network: LocalNetwork,
    pub source_journal: Journal,
    pub destination_journal: Journal,
    _directory: tempfile::TempDir,
}

impl World {
    /// A running VM with something in a third of its memory, zeros in some, nothing in most.
    pub fn new() -> Self {
        let guard = Arc::new(RunGuard::default());
        let vm = Arc::new(SimulatedVm::new(layout()).unwrap());
        vm.watch(&guard);
        for gfn in frames() {
            match gfn % 6 {
                0 | 1 => vm.guest_write(Gfn(gfn), &gfn.wrapping_mul(77).to_le_bytes()).unwrap(),
                2 => vm.guest_write(Gfn(gfn), &[0]).unwrap(),
                _ => {}
            }
        }
        vm.set_sections(vec![section("vcpu", 0, b"registers"), section("clock", 0, &[7; 3000])]);
        let directory = tempfile::tempdir().unwrap();
        let journal = |name| Journal::open(&directory.path().join(name)).unwrap();
        Self {
            vm,
            host: SimulatedHost::new(&guard),
            guard,
            network: LocalNetwork::new(),
            source_journal: journal("source"),
            destination_journal: journal("destination"),
            _directory: directory,
        }
    }

    pub fn migrate(&self, options: &SourceOptions) -> Outcome {
        self.migrate_with(options, &Hooks::default())
    }

    pub fn migrate_with(&self, options: &SourceOptions, hooks: &Hooks<'_>) -> Outcome {
        self.migrate_over(&self.network, &self.network, options, hooks)
    }

    /// Migrates while `hooks` watches.
    pub fn migrate_over(
        &self,
        connector: &dyn Connector,
        listener: &dyn Listener,
        options: &SourceOptions,
        hooks: &Hooks<'_>,
    ) -> Outcome {
        let control = SourceControl::new(MigrationId::random().unwrap());
        let arriving = DestinationControl::new();
        self.run(connector, listener, options, hooks, &control, &arriving)
    }

    fn run(
        &self,
        connector: &dyn Connector,
        listener: &dyn Listener,
        options: &SourceOptions,
        hooks: &Hooks<'_>,
        control: &SourceControl,
        arriving: &DestinationControl,
    ) -> Outcome {
        let receive_options =
            DestinationOptions { timing: timing(), ..DestinationOptions::default() };
        let (report, arrival) = thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                receive(
                    &self.host,
                    listener,
                    &self.destination_journal,
                    &receive_options,
                    arriving,
                    &|arrival| (hooks.arriving)(arrival, arriving),
                )
                .unwrap()
            });
            let (mut kernel, mut initrd) = (&b"kernel"[..], &[5u8; 3 << 20][..]);
            let report = migrate_to(
                self.vm.as_ref(),
                offering(&mut kernel, &mut initrd),
                connector,
                &self.source_journal,
                options,
                control,
                &|progress| (hooks.progress)(progress, control),
            );
            arriving.stop();
            if hooks.detach_destination {
                while !receiving.is_finished() {
                    arriving.detach();
                    thread::yield_now();
                }
            }
            (report, receiving.join().unwrap())
        });
        assert!(!self.guard.violated(), "two ran at once");
        Outcome { id: control.id(), report, arrival }
    }

    /// Migrates, and cancels at either end, or ends the guest, when the traffic comes to `at`.
    pub fn migrate_cancelled(
        &self,
        options: &SourceOptions,
        at: Cut,
        there: bool,
        guest_ends: bool,
    ) -> Outcome {
        let id = MigrationId::random().unwrap();
        let (control, arriving) = (SourceControl::new(id), DestinationControl::new());
        let (near, far) = (control.clone(), arriving.clone());
        self.network.at(at, move || match (there, guest_ends) {
            (_, true) => drop(near.guest_ended()),
            (true, _) => far.cancel(),
            (false, _) => drop(near.cancel()),
        });
        let hooks = Hooks::default();
        self.run(&self.network, &self.network, options, &hooks, &control, &arriving)
    }

    /// What both ends have in memory must be the same.
    pub fn assert_same_memory(&self) {
        let there = self.host.vm().expect("a VM at the destination");
        for gfn in frames() {
            let (a, b) = (self.vm.read_page(Gfn(gfn)).unwrap(), there.read_page(Gfn(gfn)).unwrap());
            assert!(a == b, "page frame {gfn:#x} differs: {:?} {:?}", &a[..16], &b[..16]);
        }
    }

    /// The VM runs here, as if nothing had happened.
    pub fn assert_back(&self) {
        assert!(self.vm.is_running(), "it runs here");
        assert!(!self.vm.is_tracking(), "nothing is tracked");
        assert!(self.vm.owns_disks());
        assert!(self.host.vm().is_none_or(|there| !there.is_running()));
    }

    /// The VM runs there, with the same memory and state.
    pub fn assert_moved(&self) {
        let there = self.host.vm().expect("a VM at the destination");
        assert!(!self.vm.is_running() && !self.vm.owns_disks());
        assert!(there.is_running() && there.owns_disks());
        self.assert_same_memory();
        use migration::VmState;
        assert_eq!(there.save_sections().unwrap(), self.vm.save_sections().unwrap());
    }

    /// Pages that hold anything at the destination never were more than at the source.
    pub fn assert_not_bloated(&self) {
        let there = self.host.vm().unwrap();
        let mut extra = there.populated().unwrap();
        extra.minus(&self.vm.populated().unwrap());
        assert!(extra.is_empty(), "{extra:?} were never touched at the source");
    }
}

pub fn offering<'a>(kernel: &'a mut dyn Read, initrd: &'a mut dyn Read) -> Offering<'a> {
    Offering {
        name: "web".to_owned(),
        machine: Machine {
            program_version: "0.1.0".to_owned(),
            identity_version: 1,
            identity: vec![1, 2, 3],
        },
        config: Config { version: 2, data: b"cpus = 1".to_vec() },
        resources: Config { version: 1, data: b"disk".to_vec() },
        blobs: vec![
            BlobSource { kind: BlobKind::Kernel, length: 6, reader: kernel },
            BlobSource { kind: BlobKind::Initrd, length: 3 << 20, reader: initrd },
        ],
    }
}

/// What watches a migration.
pub struct Hooks<'a> {
    pub progress: &'a (dyn Fn(&Progress, &SourceControl) + Sync),
    pub arriving: &'a (dyn Fn(&migration::destination::Arriving, &DestinationControl) + Sync),
    /// Do not wait for a verdict at the destination once the source is done.
    pub detach_destination: bool,
}

impl Default for Hooks<'_> {
    fn default() -> Self {
        Self { progress: &|_, _| {}, arriving: &|_, _| {}, detach_destination: false }
    }
}

pub struct Outcome {
    pub id: MigrationId,
    pub report: Report,
    pub arrival: ArrivalReport,
}

/// Waits until the guest runs at the destination.
pub fn running(world: &World) -> Arc<SimulatedVm> {
    loop {
        match world.host.vm() {
            Some(vm) if vm.is_running() => return vm,
            _ => thread::yield_now(),
        }
    }
}

/// Reads all memory as a guest does, and gives every page back.
pub fn read_all(vm: &SimulatedVm) -> Vec<[u8; 8]> {
    frames()
        .into_iter()
        .map(|gfn| vm.read_page(Gfn(gfn)).unwrap()[..8].try_into().unwrap())
        .collect()
}

/// Runs `job` while the guest and a device write to random pages, as fast as `pages` at a time.
pub fn under_load<T>(vm: &Arc<SimulatedVm>, seed: u64, job: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    let writes = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let frames = frames();
            let mut random = seed | 1;
            while !stop.load(Ordering::Relaxed) {
                // Marsaglia's xorshift64.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let gfn = frames[(random % frames.len() as u64) as usize];
                let value = if random & 0x7000 == 0 { 0 } else { random };
                let written = vm.guest_write_if_running(Gfn(gfn), &value.to_le_bytes()).unwrap();
                if written && writes.fetch_add(1, Ordering::Relaxed) % 64 == 0 {
                    thread::yield_now();
                }
            }
        });
        let result = job();
        stop.store(true, Ordering::Relaxed);
        result
    })
}
