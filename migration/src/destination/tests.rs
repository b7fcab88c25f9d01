//! A source that lies, and one whose every byte is known.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::address::{Gfn, PageRange};
use crate::handover::Verdict;
use crate::identity::{MigrationId, Token};
use crate::journal::Side;
use crate::layout::MemoryLayout;
use crate::simulated::{LocalNetwork, SimulatedHost};
use crate::source::ask_verdict;
use crate::stream::session::{
    Abort, Accept, Alive, Commit, Complete, Done, Echo, Hello, Join, Joined, Loaded, OfferWire,
    Ready, Resumed, Round, Sync, ROLE_PAGES,
};
use crate::stream::{
    encode_layout, encode_runs, encode_section, Config, Machine, RecordType, RecordWriter,
    StreamError, StreamKind,
};
use crate::transport::Connector;
use crate::vm::{GuestMemory, Mode, Section};

mod frames;
mod postcopy;

const ID: [u8; 16] = [0x11; 16];

pub(super) fn small_layout() -> MemoryLayout {
    MemoryLayout::new([PageRange::new(Gfn(0), 16).unwrap(), PageRange::new(Gfn(256), 4).unwrap()])
        .unwrap()
}

struct Bench {
    network: LocalNetwork,
    host: SimulatedHost,
    journal: Journal,
    _directory: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let (network, host) = (LocalNetwork::new(), SimulatedHost::default());
        Self { network, host, journal, _directory: directory }
    }

    /// Receives from what `source` says.
    fn receive<T>(&self, source: impl FnOnce(&LocalNetwork) -> T) -> (ArrivalReport, T) {
        let control = DestinationControl::new();
        let timing = Timing { accept: Duration::from_secs(2), ..Timing::default() };
        let options = DestinationOptions { timing, ..DestinationOptions::default() };
        thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                receive(&self.host, &self.network, &self.journal, &options, &control, &|_| {})
                    .unwrap()
            });
            // A failure there must not leave this one waiting.
            let source = std::panic::AssertUnwindSafe(|| source(&self.network));
            let result = std::panic::catch_unwind(source);
            control.stop();
            while !receiving.is_finished() {
                control.detach();
                thread::yield_now();
            }
            let report = receiving.join().unwrap();
            (report, result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }
}

/// The source's ends of a connection.
struct Wire {
    out: RecordWriter<Stream>,
    records: RecordReader<Stream>,
    transport: Arc<dyn Transport>,
}

impl Wire {
    fn open(network: &LocalNetwork, kind: StreamKind) -> RecordWriter<Stream> {
        let transport = network.connect(Duration::ZERO).unwrap();
        RecordWriter::new(Stream(transport), kind).unwrap()
    }

    /// A main connection up to ACCEPT.
    fn accepted(network: &LocalNetwork, verify: bool) -> (Self, Accept) {
        Self::accepted_in(network, Mode::Precopy, verify)
    }

    fn accepted_in(network: &LocalNetwork, mode: Mode, verify: bool) -> (Self, Accept) {
        let transport = network.connect(Duration::ZERO).unwrap();
        let mut out =
            RecordWriter::new(Stream(Arc::clone(&transport)), StreamKind::Migration).unwrap();
        offer_in(&mut out, mode, verify, &encode_layout(&small_layout()).unwrap()).unwrap();
        let stream = Stream(Arc::clone(&transport));
        let mut records = RecordReader::new(stream, StreamKind::Migration).unwrap();
        let _: Hello<'_> = records.next_record().unwrap().decode("HELLO").unwrap();
        let accept: Accept = next(&mut records);
        (Self { out, records, transport }, accept)
    }

    /// Joins as a page connection.
    fn join(network: &LocalNetwork, index: u16, token: [u8; 16]) -> Result<Self, StreamError> {
        Self::join_as(network, StreamKind::Pages, ROLE_PAGES, index, token)
    }

    fn join_as(
        network: &LocalNetwork,
        kind: StreamKind,
        role: u16,
        index: u16,
        token: [u8; 16],
    ) -> Result<Self, StreamError> {
        let transport = network.connect(Duration::ZERO).unwrap();
        let mut out = RecordWriter::new(Stream(Arc::clone(&transport)), kind)?;
        out.send(&Join { id: ID, role, index, token })?;
        let stream = Stream(Arc::clone(&transport));
        let mut records = RecordReader::new(stream, kind)?;
        let _: Joined = records.next_record()?.decode("JOINED")?;
        Ok(Self { out, records, transport })
    }

    /// Main and page connection up to READY.
    fn ready(network: &LocalNetwork, verify: bool) -> (Self, Self) {
        let (mut main, accept) = Self::accepted(network, verify);
        let pages = Self::join(network, 0, accept.token).unwrap();
        let _: Ready = next(&mut main.records);
        (main, pages)
    }

    /// What the destination gives up with.
    fn abort(&mut self) -> String {
        loop {
            let record = self.records.next_record().expect("ABORT comes");
            match record.record_type {
                RecordType::Alive | RecordType::Loaded => {}
                _ => {
                    let abort: Abort<'_> = record.decode("ABORT").unwrap();
                    return abort.text.to_owned();
                }
            }
        }
    }

    /// Whether the other end closes it without a word.
    fn is_closed(&mut self) -> bool {
        self.records.next_record().is_err()
    }
}

/// The next record that is not ALIVE.
fn next<T>(records: &mut RecordReader<Stream>) -> T
where
    T: crate::stream::session::Payload + for<'a> serde::Deserialize<'a>,
{
    loop {
        let record = records.next_record().unwrap();
        if record.record_type != RecordType::Alive {
            return record.decode("the next record").unwrap();
        }
    }
}

pub(super) fn offer(
    out: &mut RecordWriter<Stream>,
    verify: bool,
    layout: &[u8],
) -> Result<(), StreamError> {
    offer_in(out, Mode::Precopy, verify, layout)
}

fn offer_in(
    out: &mut RecordWriter<Stream>,
    mode: Mode,
    verify: bool,
    layout: &[u8],
) -> Result<(), StreamError> {
    out.send(&Hello { id: ID, program: "0.1.0", features: 0 })?;
    let machine = Machine {
        program_version: "0.1.0".to_owned(),
        identity_version: 1,
        identity: vec![1, 2, 3],
    };
    out.write(RecordType::Machine, &[&machine.encode().unwrap()])?;
    let config = Config { version: 2, data: b"cpus = 1".to_vec() };
    out.write(RecordType::Config, &[&config.encode().unwrap()])?;
    out.write(RecordType::Layout, &[layout])?;
    out.send(&OfferWire {
        name: "web",
        mode: mode as u16,
        connections: 1,
        verify,
        downtime_us: 20_000,
        populated_pages: 2,
        alive_ms: 10_000,
        dead_ms: 20_000,
        resources_version: 1,
        resources: b"disk",
        blobs: vec![],
    })
}

fn table(runs: &[(u64, u64)]) -> Vec<u8> {
    let runs: Vec<_> =
        runs.iter().map(|(gfn, pages)| PageRange::new(Gfn(*gfn), *pages).unwrap()).collect();
    let mut table = Vec::new();
    encode_runs(&runs, &mut table);
    table
}

fn state(instance: u32) -> Vec<u8> {
    encode_section(&Section {
        kind: "vcpu".to_owned(),
        instance,
        version: 1,
        data: b"registers".to_vec(),
    })
    .unwrap()
}

/// Everything up to LOADED.
fn loaded(network: &LocalNetwork) -> (Wire, Wire) {
    let (mut main, mut pages) = Wire::ready(network, false);
    pages.out.send(&Round { number: 0 }).unwrap();
    pages.out.send(&Sync { pages: 0 }).unwrap();
    main.out.write(RecordType::State, &[&state(0)]).unwrap();
    main.out.send(&Complete { sections: 1, paused_us: 0 }).unwrap();
    let _: Loaded = next(&mut main.records);
    (main, pages)
}

/// What `source` sends on the main connection after READY is refused with these words.
fn assert_refused(words: &str, source: impl FnOnce(&mut Wire, &mut Wire)) {
    let bench = Bench::new();
    let (report, text) = bench.receive(|network| {
        let (mut main, mut pages) = Wire::ready(network, false);
        source(&mut main, &mut pages);
        main.abort()
    });
    assert!(text.contains(words), "{text:?} without {words:?}");
    let cause = Cause::Protocol;
    match report.outcome {
        Arrival::NotHere { cause: found, .. } => assert_eq!(found, cause, "{text}"),
        other => panic!("{other:?}"),
    }
    assert!(bench.host.vm().is_none(), "it was discarded");
}

#[test]
fn records_out_of_order_are_refused() {
    assert_refused("COMMIT", |main, _| {
        // Before anything is loaded.
        main.out.send(&Complete { sections: 0, paused_us: 0 }).unwrap();
        main.out.send(&Commit { run: true }).unwrap();
    });
    assert_refused("Blob", |main, _| {
        main.out.write(RecordType::Blob, &[&[0; 24]]).unwrap();
    });
    assert_refused("Announce", |main, _| {
        main.out.write(RecordType::State, &[&state(0)]).unwrap();
        main.out.write(RecordType::Announce, &[&table(&[(0, 1)])]).unwrap();
    });
    assert_refused("Hash", |main, _| {
        main.out.write(RecordType::State, &[&state(0)]).unwrap();
        main.out.write(RecordType::Hash, &[&[0; 16]]).unwrap();
    });
    assert_refused("hashes", |main, _| {
        main.out.write(RecordType::Hash, &[&[0; 16]]).unwrap();
    });
    assert_refused("second state", |main, _| {
        main.out.write(RecordType::State, &[&state(0)]).unwrap();
        main.out.write(RecordType::State, &[&state(0)]).unwrap();
    });
    assert_refused("2 states", |main, _| {
        main.out.send(&Complete { sections: 2, paused_us: 0 }).unwrap();
    });
    assert_refused("second time", |main, _| {
        main.out.write(RecordType::Announce, &[&table(&[(0, 2), (1, 1)])]).unwrap();
    });
    assert_refused("region", |main, _| {
        main.out.write(RecordType::Announce, &[&table(&[(15, 2)])]).unwrap();
    });
}

#[test]
fn hostile_pages_are_refused() {
    assert_refused("ROUND", |_, pages| {
        // Before a round.
        pages.out.write(RecordType::Zero, &[&table(&[(0, 1)])]).unwrap();
    });
    assert_refused("round 1", |_, pages| pages.out.send(&Round { number: 1 }).unwrap());
    assert_refused("region", |_, pages| {
        pages.out.send(&Round { number: 0 }).unwrap();
        pages.out.write(RecordType::Zero, &[&table(&[(16, 1)])]).unwrap();
    });
    assert_refused("not pages of a running guest", |_, pages| {
        pages.out.send(&Round { number: 0 }).unwrap();
        let data = [1; 4096];
        pages.out.write(RecordType::Pages, &[&table(&[(0, 1)]), &data]).unwrap();
    });
    assert_refused("pages", |_, pages| {
        pages.out.send(&Round { number: 0 }).unwrap();
        pages.out.send(&Sync { pages: 3 }).unwrap();
    });
    assert_refused("State", |_, pages| {
        pages.out.send(&Round { number: 0 }).unwrap();
        pages.out.write(RecordType::State, &[&state(0)]).unwrap();
    });
}

#[test]
fn an_offer_that_makes_no_sense_gets_no_answer() {
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        // State before configuration; regions that overlap; a huge length; another protocol.
        let closed = |send: &dyn Fn(&mut RecordWriter<Stream>)| {
            let transport = network.connect(Duration::ZERO).unwrap();
            let stream = Stream(Arc::clone(&transport));
            let mut out = RecordWriter::new(stream, StreamKind::Migration).unwrap();
            send(&mut out);
            let mut byte = [0];
            assert_eq!(transport.read(&mut byte).unwrap_or(0), 0, "nothing is answered");
        };
        closed(&|out| drop(out.write(RecordType::State, &[&state(0)])));
        closed(&|out| drop(offer(out, false, &[2, 0, 16, 8, 16])));
        closed(&|out| drop(offer(out, false, &[0xfd; 9])));
        closed(&|out| drop(out.send(&Alive {})));
        let transport = network.connect(Duration::ZERO).unwrap();
        transport.write_vectored(&[std::io::IoSlice::new(b"GET / HTTP/1.1\r\n\r\n")]).unwrap();
        assert_eq!(transport.read(&mut [0]).unwrap_or(0), 0);
    });
    assert_eq!(report.outcome, Arrival::Stopped, "and the door stayed open");
}

#[test]
fn a_stranger_cannot_join_and_disturbs_nothing() {
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let (mut main, accept) = Wire::accepted(network, false);
        assert!(Wire::join(network, 0, [0; 16]).is_err(), "wrong token");
        assert!(Wire::join(network, 1, accept.token).is_err(), "wrong index");
        let mut pages = Wire::join(network, 0, accept.token).unwrap();
        assert!(Wire::join(network, 0, accept.token).is_err(), "joined before");
        let _: Ready = next(&mut main.records);
        // Nor does a second migration.
        let mut other = Wire::open(network, StreamKind::Migration);
        drop(offer(&mut other, false, &encode_layout(&small_layout()).unwrap()));
        pages.out.send(&Round { number: 0 }).unwrap();
        pages.out.send(&Sync { pages: 0 }).unwrap();
        main.out.send(&Complete { sections: 0, paused_us: 0 }).unwrap();
        let _: Loaded = next(&mut main.records);
        main.out.send(&Commit { run: true }).unwrap();
        let _: Resumed = next(&mut main.records);
        main.out.send(&Done {}).unwrap();
        assert!(main.is_closed());
    });
    assert_eq!((report.outcome, report.confirmed), (Arrival::RunningHere, true));
}

#[test]
fn a_second_commit_changes_nothing() {
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let (mut main, _pages) = loaded(network);
        main.out.send(&Commit { run: true }).unwrap();
        main.out.send(&Commit { run: false }).unwrap();
        let _: Resumed = next(&mut main.records);
    });
    assert_eq!((report.outcome, report.confirmed), (Arrival::RunningHere, false));
    assert!(bench.host.vm().unwrap().is_running());
}

#[test]
fn memory_that_differs_is_found_before_the_state_is_loaded() {
    let bench = Bench::new();
    let (report, text) = bench.receive(|network| {
        let (mut main, mut pages) = Wire::ready(network, true);
        pages.out.send(&Round { number: 0 }).unwrap();
        pages.out.send(&Sync { pages: 0 }).unwrap();
        let hashes = [0u64.to_le_bytes(), 1u64.to_le_bytes()].concat();
        main.out.write(RecordType::Hash, &[&hashes]).unwrap();
        main.out.send(&Complete { sections: 0, paused_us: 0 }).unwrap();
        main.abort()
    });
    assert!(text.contains("4 pages at page frame 0x100"), "{text}");
    assert!(matches!(report.outcome, Arrival::NotHere { cause: Cause::Failed, .. }));
}

#[test]
fn a_loaded_vm_is_kept_when_the_source_falls_silent_and_can_be_reclaimed() {
    for (reclaim, given_up) in [(false, false), (true, false), (false, true)] {
        let bench = Bench::new();
        let (report, ()) = bench.receive(|network| {
            let (main, _pages) = loaded(network);
            let token = {
                // As the journal of this host has it.
                let entry = bench.journal.list().unwrap().remove(0);
                let text = serde_json::to_value(&entry).unwrap();
                let hex = text["token"].as_str().unwrap().to_owned();
                Token::from_bytes(crate::identity::from_hex(&hex).unwrap())
            };
            main.transport.shutdown();
            let id = MigrationId(ID);
            let limit = Duration::from_secs(5);
            let ask = |reclaim| {
                let side = Side::Destination;
                ask_verdict(network, id, &token, side, reclaim, limit).unwrap()
            };
            while ask(false) == Verdict::Undecided {
                thread::yield_now();
            }
            assert_eq!(ask(false), Verdict::Unresolved);
            assert!(bench.host.vm().is_some(), "kept");
            if reclaim {
                assert_eq!(ask(true), Verdict::NotHere);
            }
            if given_up {
                bench.journal.resolve(id, Side::Destination, Owner::There).unwrap();
            }
            if reclaim || given_up {
                while bench.host.vm().is_some() {
                    thread::yield_now();
                }
            }
        });
        match report.outcome {
            Arrival::NotHere { .. } => assert!(reclaim || given_up),
            Arrival::Unresolved { .. } => assert!(!reclaim && !given_up),
            other => panic!("{other:?}"),
        }
        assert_eq!(report.confirmed, reclaim, "only who was asked has told");
    }
}

/// The bytes of a small migration's source, kept since version 1 of the protocol: main
/// connection, and what follows JOIN on the page connection.
#[test]
fn the_golden_migration_still_moves() {
    let golden = include_str!("tests/golden-migration-v1.hex");
    let bytes = |name: &str| -> Vec<u8> {
        let lines = golden.lines().skip_while(|line| *line != format!("# {name}")).skip(1);
        lines
            .take_while(|line| !line.starts_with('#'))
            .flat_map(|line| {
                let mut parts = line.split_whitespace();
                let times = parts.next().unwrap().parse().unwrap();
                let bytes = parts.map(|byte| u8::from_str_radix(byte, 16).unwrap());
                bytes.collect::<Vec<_>>().repeat(times)
            })
            .collect()
    };
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let main = network.connect(Duration::ZERO).unwrap();
        let send = |transport: &Arc<dyn Transport>, name: &str| {
            let bytes = bytes(name);
            assert!(!bytes.is_empty(), "{name}");
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let written = transport.write_vectored(&[std::io::IoSlice::new(rest)]).unwrap();
                rest = &rest[written..];
            }
        };
        send(&main, "main: offer");
        let stream = Stream(Arc::clone(&main));
        let mut records = RecordReader::new(stream, StreamKind::Migration).unwrap();
        let hello: Hello<'_> = records.next_record().unwrap().decode("HELLO").unwrap();
        assert_eq!(hello.id, ID);
        let accept: Accept = next(&mut records);
        let pages = Wire::join(network, 0, accept.token).unwrap();
        let _: Ready = next(&mut records);
        // After preamble and JOIN, which hold the token of this run.
        send(&pages.transport, "pages: after JOIN");
        send(&main, "main: memory and state");
        let _: Loaded = next(&mut records);
        send(&main, "main: commit");
        let _: Resumed = next(&mut records);
        send(&main, "main: done");
    });
    assert_eq!((report.outcome, report.confirmed), (Arrival::RunningHere, true));
    let vm = bench.host.vm().unwrap();
    assert_eq!(vm.read_page(Gfn(2)).unwrap(), [0xa5; 4096]);
    assert_eq!(vm.read_page(Gfn(256)).unwrap(), [0x5a; 4096]);
    assert_eq!(vm.read_page(Gfn(3)).unwrap(), [0; 4096], "sent, and then zero");
    assert_eq!(vm.populated().unwrap().count(), 2);
    assert_eq!((report.data_pages, report.zero_pages), (3, 2));
}

/// Writes what the test above reads; the bytes must not have changed.
#[test]
fn this_version_writes_the_golden_migration() {
    use std::fmt::Write as _;
    // Sixteen bytes per line, each line preceded by how often it repeats.
    let hex = |bytes: &[u8]| {
        let mut lines: Vec<(usize, &[u8])> = Vec::new();
        for line in bytes.chunks(16) {
            match lines.last_mut() {
                Some((times, last)) if *last == line => *times += 1,
                _ => lines.push((1, line)),
            }
        }
        lines.iter().fold(String::new(), |mut text, (times, line)| {
            let _ = write!(text, "{times}");
            for byte in *line {
                let _ = write!(text, " {byte:02x}");
            }
            text + "\n"
        })
    };
    let mut main = Recorder::new(StreamKind::Migration);
    let offer_bytes = main.part(|out| {
        let layout = encode_layout(&small_layout()).unwrap();
        offer(out, true, &layout).unwrap();
    });
    let hashes = {
        let vm = crate::simulated::SimulatedVm::new(small_layout()).unwrap();
        vm.guest_write(Gfn(2), &[0xa5; 4096]).unwrap();
        vm.guest_write(Gfn(256), &[0x5a; 4096]).unwrap();
        let hashes = crate::verify::hash_memory(&vm).unwrap();
        hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect::<Vec<_>>()
    };
    let state_bytes = main.part(|out| {
        out.write(RecordType::Announce, &[&table(&[(2, 2), (256, 1)])]).unwrap();
        out.write(RecordType::Hash, &[&hashes]).unwrap();
        out.write(RecordType::State, &[&state(0)]).unwrap();
        out.send(&Complete { sections: 1, paused_us: 700 }).unwrap();
    });
    let commit_bytes = main.part(|out| out.send(&Commit { run: true }).unwrap());
    let done_bytes = main.part(|out| out.send(&Done {}).unwrap());
    let mut pages = Recorder::new(StreamKind::Pages);
    let _join = pages.part(|out| {
        out.send(&Join { id: ID, role: ROLE_PAGES, index: 0, token: [0; 16] }).unwrap();
    });
    let vm = crate::simulated::SimulatedVm::new(small_layout()).unwrap();
    for (gfn, byte) in [(2, 0xa5), (3, 0x77), (256, 0x5a)] {
        vm.guest_write(Gfn(gfn), &[byte; 4096]).unwrap();
    }
    let page_bytes = pages.part(|out| {
        out.send(&Round { number: 0 }).unwrap();
        let runs = [(2, 2), (256, 1)].map(|(gfn, n)| PageRange::new(Gfn(gfn), n).unwrap());
        out.write_live_pages(&vm, &runs).unwrap();
        out.write(RecordType::Zero, &[&table(&[(5, 1)])]).unwrap();
        out.send(&Echo { number: 0 }).unwrap();
        out.send(&Round { number: 1 }).unwrap();
        out.write(RecordType::Zero, &[&table(&[(3, 1)])]).unwrap();
        out.send(&Sync { pages: 5 }).unwrap();
    });
    let mut text = String::new();
    for (name, bytes) in [
        ("main: offer", offer_bytes),
        ("pages: after JOIN", page_bytes),
        ("main: memory and state", state_bytes),
        ("main: commit", commit_bytes),
        ("main: done", done_bytes),
    ] {
        let _ = write!(text, "# {name}\n{}", hex(&bytes));
    }
    let golden = include_str!("tests/golden-migration-v1.hex");
    assert!(text == golden, "the protocol has changed without a new version:\n{text}");
}

/// A connection whose bytes are looked at.
struct Recorder {
    out: RecordWriter<Stream>,
    far: Arc<dyn Transport>,
}

impl Recorder {
    fn new(kind: StreamKind) -> Self {
        let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        Self { out: RecordWriter::new(Stream(Arc::new(near)), kind).unwrap(), far: Arc::new(far) }
    }

    /// What `write` writes, with the preamble if it is the first; fits into the socket.
    fn part(&mut self, write: impl FnOnce(&mut RecordWriter<Stream>)) -> Vec<u8> {
        write(&mut self.out);
        let mut bytes = Vec::new();
        self.far.set_timeouts(Some(Duration::from_millis(1)), None).unwrap();
        let mut buffer = [0; 65536];
        while let Ok(read) = self.far.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..read]);
        }
        bytes
    }
}
