//! A source that does anything, and a destination that must end and may run a VM only after COMMIT.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration::destination::{receive, Arrival, DestinationControl, DestinationOptions};
use migration::journal::Journal;
use migration::simulated::{LocalNetwork, SimulatedHost};
use migration::snapshot::Blob;
use migration::stream::{RecordReader, RecordType, StreamKind};
use migration::transport::Connector;
use migration::{DestinationHost, DestinationVm, MigrationId, Offer, Timing};

use super::frames::{Bytes, CHECKSUM, OPTIONAL, TYPES};
use super::wire::{Incoming, Wire};

const ID: [u8; 16] = [0x11; 16];
const HOST_PAGES: u64 = 4096;
const LIMIT: Duration = Duration::from_millis(100);
/// Most things that a source does.
const STEPS: usize = 64;

/// As a VMM: it looks at a layout before it provides memory for it.
struct Host(SimulatedHost);

impl DestinationHost for Host {
    fn check(&self, offer: &Offer) -> Vec<String> {
        let pages: u64 = offer.layout.regions().map(|region| region.pages()).sum();
        match pages > HOST_PAGES {
            true => vec!["so much memory is not there".to_owned()],
            false => self.0.check(offer),
        }
    }

    fn prepare(
        &self,
        offer: &Offer,
        blobs: Vec<Blob>,
    ) -> Result<Arc<dyn DestinationVm>, Vec<String>> {
        self.0.prepare(offer, blobs)
    }

    fn discarded(&self, id: MigrationId) {
        self.0.discarded(id);
    }
}

/// A connection of the source's.
fn open(network: &LocalNetwork, kind: StreamKind) -> Option<Wire> {
    let transport = network.connect(Duration::ZERO).ok()?;
    transport.set_timeouts(Some(LIMIT), Some(LIMIT)).ok()?;
    Some(Wire::begin(transport, kind))
}

/// What an honest source does, in order.
const COURSE: [Step; 13] = [
    Step::Offer,
    Step::Await(RecordType::Accept),
    Step::Join,
    Step::Await(RecordType::Ready),
    Step::Pages(0x14, 0),
    Step::Pages(0x11, 1),
    Step::Pages(0x17, 2),
    Step::Pages(0x15, 3),
    Step::Main(0x20, 4),
    Step::Main(0x21, 5),
    Step::Await(RecordType::Loaded),
    Step::Main(0x31, 6),
    Step::Await(RecordType::Resumed),
];

#[derive(Clone, Copy)]
enum Step {
    Offer,
    Await(RecordType),
    Join,
    /// Type, and which of [`payload`].
    Pages(u16, usize),
    Main(u16, usize),
}

fn payload(which: usize) -> Vec<u8> {
    match which {
        // ROUND 0; one page of ZERO; ECHO 0; SYNC of one page.
        0 | 2 => vec![0],
        1 => [&[1, 0, 0, 0, 0, 0, 0, 0][..], &[0; 8], &[1, 0, 0, 0, 0, 0, 0, 0]].concat(),
        3 => vec![1],
        // STATE of a vCPU; COMPLETE of one; COMMIT.
        4 => [&[4][..], b"vcpu", &[0, 1, 2], b"rg"].concat(),
        5 => vec![1, 0],
        _ => vec![1],
    }
}

struct Source<'a> {
    network: &'a LocalNetwork,
    main: Option<Wire>,
    answers: Option<RecordReader<Incoming>>,
    pages: Option<Wire>,
    token: [u8; 16],
    committed: bool,
    at: usize,
}

impl<'a> Source<'a> {
    fn new(network: &'a LocalNetwork) -> Self {
        let (main, answers, pages) = (None, None, None);
        Self { network, main, answers, pages, token: [0; 16], committed: false, at: 0 }
    }

    /// Does what comes next; `damage` a byte of a payload.
    fn go_on(&mut self, damage: Option<(usize, u8)>) {
        let Some(step) = COURSE.get(self.at).copied() else { return };
        self.at += 1;
        let damaged = |mut bytes: Vec<u8>| {
            if let Some((at, with)) = damage {
                let length = bytes.len();
                if let Some(byte) = bytes.get_mut(at % length.max(1)) {
                    *byte ^= with;
                }
            }
            bytes
        };
        match step {
            Step::Offer => {
                let Some(mut main) = open(self.network, StreamKind::Migration) else {
                    return;
                };
                let records: [(u16, Vec<u8>); 5] = [
                    (0x05, [&ID[..], &[5], b"0.1.0", &[0]].concat()),
                    (0x01, [&[5][..], b"0.1.0", &[1, 3, 1, 2, 3]].concat()),
                    (0x02, [&[2, 8][..], b"cpus = 1"].concat()),
                    (0x04, vec![2, 0, 16, 251, 0, 1, 4]),
                    // Name, mode, one connection, not verified, times, no blobs.
                    (0x06, [&[3][..], b"web", &[1, 1, 0, 100, 1, 20, 200, 1, 0, 0]].concat()),
                ];
                let hurt = damage.map(|(at, _)| at % 6);
                for (number, (record_type, payload)) in records.into_iter().enumerate() {
                    let payload = if hurt == Some(number) { damaged(payload) } else { payload };
                    main.send(record_type, CHECKSUM, &payload);
                }
                self.answers = None;
                self.main = Some(main);
            }
            Step::Await(wanted) => self.wait_for(wanted),
            Step::Join => {
                self.pages = open(self.network, StreamKind::Pages);
                let join = damaged([&ID[..], &[1, 0], &self.token].concat());
                if let Some(pages) = &mut self.pages {
                    pages.send(0x0a, CHECKSUM, &join);
                }
            }
            Step::Pages(number, which) => {
                if let Some(pages) = &mut self.pages {
                    pages.send(number, CHECKSUM, &damaged(payload(which)));
                }
            }
            Step::Main(number, which) => {
                if let Some(main) = &mut self.main {
                    self.committed |= number == 0x31;
                    main.send(number, CHECKSUM, &damaged(payload(which)));
                }
            }
        }
    }

    fn wait_for(&mut self, wanted: RecordType) {
        let Some(main) = &self.main else { return };
        if self.answers.is_none() {
            let incoming = Incoming(Arc::clone(&main.transport));
            self.answers = RecordReader::new(incoming, StreamKind::Migration).ok();
        }
        let Some(answers) = &mut self.answers else { return };
        for _ in 0..100 {
            let Ok(record) = answers.next_record() else { return };
            if record.record_type == RecordType::Accept {
                self.token.copy_from_slice(&record.payload[..16]);
            }
            if record.record_type == wanted {
                return;
            }
        }
    }

    fn step(&mut self, input: &mut Bytes<'_>) {
        let deed = input.byte() % 16;
        let choose = input.0.first().is_some_and(|byte| byte % 2 == 1);
        let wire = if choose { &mut self.pages } else { &mut self.main };
        match deed {
            0..=8 => self.go_on(None),
            9 | 10 => {
                let (at, with) = (input.byte(), input.byte());
                self.go_on(Some((at.into(), with)));
            }
            11 => {
                input.byte();
                let number = TYPES[usize::from(input.byte()) % TYPES.len()];
                let flags = if number == 0x8001 { OPTIONAL } else { CHECKSUM };
                let payload = input.some();
                if let Some(wire) = wire {
                    self.committed |= number == 0x31;
                    wire.send(number, flags, payload);
                }
            }
            12 => {
                input.byte();
                let bytes = input.some();
                // It may be a COMMIT.
                self.committed |= bytes.len() >= 32;
                if let Some(wire) = wire {
                    wire.raw(bytes);
                }
            }
            13 => {
                if let Some(wire) = wire.take() {
                    wire.transport.shutdown();
                }
            }
            14 => {
                let query = input.byte();
                let token = if query & 1 != 0 { self.token } else { [0; 16] };
                let payload = [&ID[..], &[query >> 2 & 3, query >> 1 & 1], &token].concat();
                if let Some(mut wire) = open(self.network, StreamKind::Query) {
                    wire.send(0x36, CHECKSUM, &payload);
                }
            }
            _ => self.at = usize::from(input.byte()) % COURSE.len(),
        }
    }

    /// Gives up, which is told rather than found out: that takes a destination its time.
    fn end(&mut self) {
        if let Some(main) = &mut self.main {
            main.send(0x34, CHECKSUM, &[1, 0]);
        }
        for wire in [&mut self.main, &mut self.pages].into_iter().filter_map(Option::take) {
            wire.transport.shutdown();
        }
    }
}

/// A source that does what `bytes` say.
pub fn destination(bytes: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    let journal = Journal::open(directory.path()).expect("a journal");
    let (network, host) = (LocalNetwork::new(), Host(SimulatedHost::default()));
    let control = DestinationControl::new();
    let timing =
        Timing { accept: 2 * LIMIT, ready: 2 * LIMIT, resumed: 2 * LIMIT, ..Timing::default() };
    let options = DestinationOptions { timing, ..DestinationOptions::default() };
    let (report, committed) = thread::scope(|scope| {
        let receiving =
            scope.spawn(|| receive(&host, &network, &journal, &options, &control, &|_| {}));
        let mut source = Source::new(&network);
        let mut input = Bytes(bytes);
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            source.step(&mut input);
        }
        source.end();
        control.stop();
        while !receiving.is_finished() {
            control.detach();
            thread::park_timeout(Duration::from_millis(1));
        }
        let report = receiving.join().expect("it does not panic").expect("threads");
        (report, source.committed)
    });
    let runs = host.0.vm().is_some_and(|vm| vm.is_running());
    match report.outcome {
        Arrival::RunningHere => assert!(committed && runs, "{report:?}"),
        Arrival::NotHere { .. } | Arrival::Stopped => {
            assert!(host.0.vm().is_none(), "it is kept: {report:?}");
        }
        Arrival::Unresolved { .. } | Arrival::OwnedHere { .. } => assert!(!runs, "{report:?}"),
    }
}
