//! Every writer is tracked: what changed in guest memory is in the dirty log.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration::{DirtySource, Gpa, GuestMemory, PageRange, PageSet, PAGE_SIZE};
use tests::{add, kvm, Suite};
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::Image;
use vmm::config::{ConsoleConfig, MemoryConfig, MigrationConfig, OnReboot, VmConfig};
use vmm::console::{Console, ConsolePaths};
use vmm::control::VmStatus;
use vmm::events::EventLog;
use vmm::kvm::HostKvm;
use vmm::machine::{BootMedia, Machine, MachineBuilder};
use vmm::virtio::DiskOwnership;

const LIMIT: Duration = Duration::from_secs(60);
const MEMORY: u64 = 64 << 20;
/// A page that beacon has no use for: below its image, above the boot data.
const VMM_WRITES: u64 = 0x8_0000;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    add!(suite, &[&kvm()];
        what_changed_is_in_the_log,
        clearing_touches_only_its_range,
    );
    suite.run()
}

/// A guest that writes memory, in this process.
struct Guest {
    machine: Arc<Machine>,
    lines: BufReader<UnixStream>,
    _console: Console,
    _folder: tempfile::TempDir,
}

impl Guest {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("console");
        let paths = ConsolePaths { socket: socket.clone(), pty_link: folder.path().join("pty") };
        let (console, writer) = Console::open(&ConsoleConfig::Socket, &paths).unwrap();
        let config = VmConfig {
            name: "dirty".into(),
            kernel: None,
            initrd: None,
            cmdline: "ws=8 dirty=2000 report=100 pace=0".into(),
            memory: MemoryConfig { size: MEMORY, hugepages: false },
            cpus: 2,
            cpu: "host".into(),
            console: ConsoleConfig::Socket,
            on_reboot: OnReboot::Exit,
            disks: Vec::new(),
            nets: Vec::new(),
            rng: false,
            balloon: None,
            virtio_console: false,
            migration: MigrationConfig::default(),
        };
        let kernel = Image::embedded("beacon", guest_images::BEACON);
        let (machine, _requests) = MachineBuilder {
            host: &HostKvm::open().unwrap(),
            config,
            media: BootMedia { kernel, initrd: None },
            console: writer,
            events: EventLog::default(),
            disks: DiskOwnership::Owner,
            cpuid: None,
        }
        .build()
        .unwrap();
        machine.load_boot(false).unwrap();
        machine.set_created();
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        machine.resume().unwrap();
        let mut guest =
            Self { machine, lines: BufReader::new(stream), _console: console, _folder: folder };
        guest.wait_for("\"ready\"");
        guest
    }

    fn wait_for(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "the console ended");
        }
    }

    fn dirty(&self) -> PageSet {
        let mut set = PageSet::empty(self.machine.layout());
        self.machine.collect(&mut set).unwrap();
        set
    }

    fn clear_all(&self) {
        let regions: Vec<_> = self.machine.layout().regions().collect();
        regions.into_iter().for_each(|range| self.machine.clear(range).unwrap());
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
        self.machine.ram().memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.machine.end(VmStatus::Stopped);
    }
}

fn page(gpa: u64) -> PageRange {
    PageRange::from_bytes(Gpa(gpa), PAGE_SIZE).unwrap()
}

fn what_changed_is_in_the_log() {
    let guest = Guest::start();
    guest.machine.pause().unwrap();
    guest.machine.start_tracking().unwrap();
    guest.clear_all();
    assert!(guest.dirty().is_empty(), "nobody wrote, and all was cleared");
    let before = guest.contents();

    guest.machine.resume().unwrap();
    let deadline = Instant::now() + LIMIT;
    while guest.dirty().count() < 1000 {
        assert!(Instant::now() < deadline, "the guest does not write");
        std::thread::yield_now();
    }
    guest.machine.ram().memory().write_slice(&[1], GuestAddress(VMM_WRITES)).unwrap();
    guest.machine.pause().unwrap();

    let dirty = guest.dirty();
    let after = guest.contents();
    let size = usize::try_from(PAGE_SIZE).unwrap();
    let pages = before.chunks(size).zip(after.chunks(size)).zip(0_u64..);
    let changed: Vec<u64> =
        pages.filter(|((a, b), _)| a != b).map(|(_, number)| number * PAGE_SIZE).collect();
    assert!(changed.contains(&VMM_WRITES) && changed.len() > 100, "{} changed", changed.len());
    let missed: Vec<&u64> = changed.iter().filter(|gpa| !dirty.contains(page(**gpa))).collect();
    assert!(missed.is_empty(), "changed, but not in the log: {missed:x?}");
    assert!(dirty.count() < MEMORY / PAGE_SIZE / 2, "{} pages are dirty", dirty.count());
    guest.machine.stop_tracking().unwrap();
}

fn clearing_touches_only_its_range() {
    let guest = Guest::start();
    guest.machine.pause().unwrap();
    guest.machine.start_tracking().unwrap();
    // KVM begins with every page set.
    let all = MEMORY / PAGE_SIZE;
    assert_eq!(guest.dirty().count(), all);
    let cleared = PageRange::from_bytes(Gpa(70 * PAGE_SIZE), 130 * PAGE_SIZE).unwrap();
    guest.machine.clear(cleared).unwrap();
    let dirty = guest.dirty();
    assert_eq!(dirty.count(), all - 130);
    assert!(!dirty.intersects(cleared));
    assert!(dirty.contains(page(69 * PAGE_SIZE)) && dirty.contains(page(200 * PAGE_SIZE)));
}
