//! A destination that does anything, and a source that must end, and may give its VM away only to one
//! that has loaded it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::Duration;

use migration::journal::Journal;
use migration::report::Outcome;
use migration::simulated::{LocalNetwork, SimulatedVm};
use migration::source::{migrate_to, Offering, PostcopyOptions, SourceControl, SourceOptions};
use migration::stream::{Config, Machine, RecordReader, RecordType, StreamKind};
use migration::transport::Listener;
use migration::{Gfn, MemoryLayout, MigrationId, Mode, PageRange, Timing};

use super::frames::{Bytes, CHECKSUM, OPTIONAL, TYPES};
use super::wire::{Incoming, Wire};

const ID: [u8; 16] = [0x11; 16];
const LIMIT: Duration = Duration::from_millis(100);
/// Most things that a destination does.
const STEPS: usize = 64;
const LOADED: u16 = 0x30;
/// Pages of the VM that are not as new.
const WRITTEN: [u64; 3] = [3, 5, 9];
/// After these a source may think that its VM runs elsewhere.
const GIVEN: [u16; 2] = [0x32, 0x37];

/// What has come, so that it can be waited for: types, and pages with contents.
#[derive(Default)]
struct Heard {
    so_far: Mutex<(Vec<RecordType>, u64)>,
    more: Condvar,
}

impl Heard {
    fn note(&self, record_type: RecordType, payload: &[u8]) {
        let mut so_far = self.so_far.lock().unwrap_or_else(PoisonError::into_inner);
        so_far.0.push(record_type);
        if record_type == RecordType::Pages {
            so_far.1 += pages(payload);
        }
        self.more.notify_all();
    }

    fn wait_for(&self, has_come: impl Fn(&[RecordType], u64) -> bool) {
        let so_far = self.so_far.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |so_far: &mut (Vec<RecordType>, u64)| !has_come(&so_far.0, so_far.1);
        drop(self.more.wait_timeout_while(so_far, LIMIT, missing));
    }
}

/// Pages in a PAGES record (docs/PROTOCOL.md, section 4).
fn pages(payload: &[u8]) -> u64 {
    let number = |at: usize| {
        let bytes = payload.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    (0..number(0) as usize).map(|run| u64::from(number(8 + 16 * run + 8))).sum()
}

#[derive(Clone, Copy)]
enum Step {
    /// A connection of this kind.
    Accept(StreamKind),
    Await(RecordType),
    /// So many pages.
    AwaitPages(u64),
    /// Which connection, from the last one; type; payload.
    Send(usize, u16, &'static [u8]),
}

/// Its HELLO, with the id of the migration, and its ACCEPT of one page connection.
const HELLO: &[u8] =
    b"\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x11\x050.1.0\x00";
const ACCEPT: &[u8] = &[2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1];
/// REQUESTs of a page, and of two.
const ONE: &[u8] = &[1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
const TWO: &[u8] = &[1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
/// DRAINED: pages by their ways, requests, times, no latencies, nobody blocked.
const DRAINED: &[u8] = &[2, 0, 0, 0, 0, 0, 2, 9, 9, 0, 0];

/// What an honest destination does, in order.
fn course(mode: Mode) -> Vec<Step> {
    use Step::{Accept, Await, AwaitPages, Send};
    let mut course = vec![
        Accept(StreamKind::Migration),
        Await(RecordType::Offer),
        Send(0, 0x05, HELLO),
        Send(0, 0x07, ACCEPT),
        Accept(StreamKind::Pages),
        Await(RecordType::Join),
        Send(0, 0x0b, &[0]),
    ];
    // How far back the main connection is.
    let mut main = 1;
    if matches!(mode, Mode::Postcopy | Mode::Hybrid) {
        main = 2;
        course.extend([Accept(StreamKind::Requests), Send(0, 0x0b, &[0])]);
    }
    course.push(Send(main, 0x09, &[0]));
    if mode.is_live() {
        // The round has arrived.
        course.extend([Await(RecordType::Echo), Send(main - 1, 0x17, &[0])]);
    }
    if mode == Mode::Postcopy {
        course.extend([Await(RecordType::Switch), Send(0, 0x18, ONE)]);
    }
    course.extend([
        Await(RecordType::Complete),
        Send(main, LOADED, &[0]),
        Await(RecordType::Commit),
        Send(main, 0x32, &[0, 0, 0, 0]),
    ]);
    if mode == Mode::Postcopy {
        course.extend([
            Send(0, 0x18, TWO),
            AwaitPages(WRITTEN.len() as u64),
            Send(main, 0x38, DRAINED),
        ]);
    }
    course
}

struct Destination<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    network: &'env LocalNetwork,
    course: Vec<Step>,
    heard: Arc<Heard>,
    /// The newest is the last.
    wires: Vec<Wire>,
    at: usize,
    loaded: bool,
    given: bool,
}

impl Destination<'_, '_> {
    fn go_on(&mut self, damage: Option<(usize, u8)>) {
        let Some(step) = self.course.get(self.at).copied() else { return };
        self.at += 1;
        match step {
            Step::Accept(kind) => self.accept(kind),
            Step::Await(wanted) => self.heard.wait_for(|types, _| types.contains(&wanted)),
            Step::AwaitPages(count) => self.heard.wait_for(|_, pages| pages >= count),
            Step::Send(back, number, payload) => {
                let mut payload = payload.to_vec();
                if let Some((at, with)) = damage {
                    let length = payload.len();
                    payload[at % length] ^= with;
                }
                self.send(back, number, CHECKSUM, &payload);
            }
        }
    }

    fn accept(&mut self, kind: StreamKind) {
        let Ok(Some(transport)) = self.network.accept(LIMIT) else { return };
        let _ = transport.set_timeouts(None, Some(LIMIT));
        let incoming = Incoming(Arc::clone(&transport));
        let heard = Arc::clone(&self.heard);
        self.scope.spawn(move || {
            let Ok(mut records) = RecordReader::new(incoming, kind) else { return };
            while let Ok(record) = records.next_record() {
                heard.note(record.record_type, record.payload);
            }
        });
        self.wires.push(Wire::begin(transport, kind));
    }

    fn send(&mut self, back: usize, number: u16, flags: u16, payload: &[u8]) {
        let Some(at) = self.wires.len().checked_sub(back + 1) else { return };
        self.loaded |= number == LOADED;
        self.given |= GIVEN.contains(&number);
        self.wires[at].send(number, flags, payload);
    }

    fn step(&mut self, input: &mut Bytes<'_>) {
        match input.byte() % 16 {
            0..=8 => self.go_on(None),
            9 | 10 => {
                let (at, with) = (input.byte(), input.byte());
                self.go_on(Some((at.into(), with)));
            }
            11 => {
                let back = input.byte() % 4;
                let number = TYPES[usize::from(input.byte()) % TYPES.len()];
                let flags = if number == 0x8001 { OPTIONAL } else { CHECKSUM };
                self.send(back.into(), number, flags, input.some());
            }
            12 => {
                let bytes = input.some();
                // It may be anything.
                self.loaded |= bytes.len() >= 32;
                self.given |= bytes.len() >= 32;
                if let Some(wire) = self.wires.last() {
                    wire.raw(bytes);
                }
            }
            13 => {
                if let Some(wire) = self.wires.pop() {
                    wire.transport.shutdown();
                }
            }
            14 => {
                let kinds = [StreamKind::Pages, StreamKind::Query, StreamKind::Continue];
                self.accept(kinds[usize::from(input.byte()) % kinds.len()]);
            }
            _ => self.at = usize::from(input.byte()) % self.course.len(),
        }
    }
}

fn vm() -> SimulatedVm {
    let range = PageRange::new(Gfn(0), 16).expect("a range");
    let vm = SimulatedVm::new(MemoryLayout::new([range]).expect("a layout")).expect("memory");
    for page in WRITTEN {
        vm.guest_write(Gfn(page), &page.to_le_bytes()).expect("a page");
    }
    vm
}

fn offering() -> Offering<'static> {
    Offering {
        name: "web".to_owned(),
        machine: Machine { program_version: String::new(), identity_version: 1, identity: vec![] },
        config: Config { version: 1, data: vec![] },
        resources: Config { version: 1, data: vec![] },
        blobs: vec![],
    }
}

/// A migration to a destination that does what `bytes` say.
pub fn source(bytes: &[u8]) {
    migrated(bytes);
}

/// The same; true when the destination has the VM.
pub fn migrated(bytes: &[u8]) -> bool {
    let directory = tempfile::tempdir().expect("a directory");
    let journal = Journal::open(directory.path()).expect("a journal");
    let (network, vm) = (LocalNetwork::new(), vm());
    let mut input = Bytes(bytes);
    let mode =
        [Mode::Precopy, Mode::Cold, Mode::Postcopy, Mode::Hybrid][usize::from(input.byte() % 4)];
    let timing = Timing {
        alive: LIMIT / 2,
        dead: 2 * LIMIT,
        connect: LIMIT,
        accept: LIMIT,
        ready: LIMIT,
        pause: LIMIT,
        loaded: LIMIT,
        resumed: LIMIT,
    };
    let options = SourceOptions {
        mode,
        timing,
        postcopy: PostcopyOptions::default(),
        ..SourceOptions::default()
    };
    let control = SourceControl::new(MigrationId(ID));
    let (report, loaded, given) = thread::scope(|scope| {
        let migrating = scope
            .spawn(|| migrate_to(&vm, offering(), &network, &journal, &options, &control, &|_| {}));
        let course = course(mode);
        let (heard, wires) = (Arc::default(), Vec::new());
        let network = &network;
        let mut destination = Destination {
            scope,
            network,
            course,
            heard,
            wires,
            at: 0,
            loaded: false,
            given: false,
        };
        for _ in 0..STEPS {
            if input.is_empty() || migrating.is_finished() {
                break;
            }
            destination.step(&mut input);
        }
        for wire in &destination.wires {
            wire.transport.shutdown();
        }
        network.set_down(true);
        while !migrating.is_finished() {
            while let Ok(Some(late)) = network.accept(Duration::ZERO) {
                late.shutdown();
            }
            control.detach();
            thread::park_timeout(Duration::from_millis(1));
        }
        let report = migrating.join().expect("it does not panic");
        (report, destination.loaded, destination.given)
    });
    match report.outcome {
        Outcome::RunningHere { .. } => {
            assert!(vm.is_running() && !vm.is_tracking(), "not as before: {report:?}");
        }
        _ => assert!(!vm.is_running() && loaded, "{report:?}"),
    }
    let handed_over = matches!(report.outcome, Outcome::HandedOver);
    assert!(!handed_over || given, "nobody said that it runs: {report:?}");
    handed_over
}
