//! Peers that lie, against the real program: it says what is wrong, keeps its memory, and goes on.
#![allow(clippy::unwrap_used)]

#[path = "hostile/liar.rs"]
mod liar;
#[path = "hostile/postcopy.rs"]
mod postcopy;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use migration::stream::{RecordReader, RecordType, RecordWriter, StreamKind};
use postcopy::{
    a_destination_outlives_a_source_that_lies_after_the_switch,
    a_guest_that_reboots_without_its_memory_can_be_ended,
    a_peer_that_always_lies_pauses_postcopy_and_both_ends_can_be_ended,
    a_source_outlives_a_destination_that_lies_after_the_switch,
    floods_of_requests_are_answered_once,
};
use tests::{add, kvm, userfaultfd, Finished, Host, Migrating, Suite, Vm, PATIENCE};

const GUEST: &str = "ws=8 dirty=1000 pattern=random report=0 pace=0";
const TOKEN: [u8; 16] = [0x5a; 16];
/// What hostile peers together may cost a process, KiB: the longest payload (16 MiB) several times over.
const MEMORY_KIB: u64 = 96 << 10;

fn main() -> ExitCode {
    let mut suite = Suite::default();
    add!(suite, &[&kvm()];
        a_receiver_outlives_sources_that_lie,
        a_source_outlives_destinations_that_lie,
        connections_that_dribble_keep_nobody_out_and_nobody_waiting,
        what_a_peer_says_cannot_steer_the_terminal,
    );
    add!(suite, &[&kvm(), &userfaultfd()];
        a_destination_outlives_a_source_that_lies_after_the_switch,
        a_source_outlives_a_destination_that_lies_after_the_switch,
        floods_of_requests_are_answered_once,
        a_peer_that_always_lies_pauses_postcopy_and_both_ends_can_be_ended,
        a_guest_that_reboots_without_its_memory_can_be_ended,
    );
    suite.run()
}

/// Most memory that a process ever had, KiB; `None` once it has ended.
fn peak_if_alive(vm: &Vm) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

/// The same of one that has not.
fn peak(vm: &Vm) -> u64 {
    peak_if_alive(vm).unwrap()
}

fn connect(to: &str) -> TcpStream {
    let socket = TcpStream::connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A `u16` of a control record (docs/PROTOCOL.md, section 3.1).
fn short(number: u16) -> Vec<u8> {
    match number {
        0..=250 => vec![number as u8],
        _ => [&[251], &number.to_le_bytes()[..]].concat(),
    }
}

fn text(text: &str) -> Vec<u8> {
    [short(text.len() as u16), text.as_bytes().to_vec()].concat()
}

fn hello(id: &[u8]) -> Vec<u8> {
    [id, &text("0.1.0"), &[0]].concat()
}

/// The records that a source sends until its destination has to answer, or make the VM.
struct Source {
    id: Vec<u8>,
    offer: Vec<(RecordType, Vec<u8>)>,
    blobs: Vec<Vec<u8>>,
}

impl Source {
    /// As a real one sends them, to a destination that then hangs up.
    fn listen_to(host: &Host) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let migrating = Migrating::start(host, &to, &[]);
        let (main, _) = listener.accept().unwrap();
        main.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut records =
            RecordReader::new(main.try_clone().unwrap(), StreamKind::Migration).unwrap();
        let mut offer = Vec::new();
        while offer.last().is_none_or(|(record_type, _)| *record_type != RecordType::Offer) {
            let record = records.next_record().unwrap();
            offer.push((record.record_type, record.payload.to_vec()));
        }
        let id = offer[0].1[..16].to_vec();
        let mut out = RecordWriter::new(&main, StreamKind::Migration).unwrap();
        out.write(RecordType::Hello, &[&hello(&id)]).unwrap();
        out.write(RecordType::Accept, &[&TOKEN, &short(1)]).unwrap();
        let (pages, _) = listener.accept().unwrap();
        let mut joined = RecordWriter::new(&pages, StreamKind::Pages).unwrap();
        joined.write(RecordType::Joined, &[&short(0)]).unwrap();
        // The built-in guest's kernel is the only blob (section 3.3).
        let mut blobs: Vec<Vec<u8>> = Vec::new();
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let whole =
            |blob: &Vec<u8>| number(&blob[16..24]) + blob.len() as u64 - 24 == number(&blob[8..16]);
        while !blobs.last().is_some_and(whole) {
            blobs.push(await_record(&mut records, RecordType::Blob));
        }
        main.shutdown(Shutdown::Both).unwrap();
        assert_eq!(migrating.end().code, Some(1));
        Self { id, offer, blobs }
    }

    /// Up to READY, with an id of its own for each `attempt`; the page connection too.
    fn ready(&self, to: &str, attempt: usize) -> Ready {
        let mut id = self.id.clone();
        id[0] ^= 1 + attempt as u8;
        let main = connect(to);
        let mut out = RecordWriter::new(main.try_clone().unwrap(), StreamKind::Migration).unwrap();
        out.write(RecordType::Hello, &[&hello(&id)]).unwrap();
        for (record_type, payload) in &self.offer[1..] {
            out.write(*record_type, &[payload]).unwrap();
        }
        let mut records = RecordReader::new(main, StreamKind::Migration).unwrap();
        let accept = await_record(&mut records, RecordType::Accept);
        for blob in &self.blobs {
            out.write(RecordType::Blob, &[blob]).unwrap();
        }
        let mut pages = RecordWriter::new(connect(to), StreamKind::Pages).unwrap();
        pages.write(RecordType::Join, &[&id, &short(1), &short(0), &accept[..16]]).unwrap();
        await_record(&mut records, RecordType::Ready);
        (records, out, pages)
    }
}

/// Answers, main connection and page connection.
type Ready = (RecordReader<TcpStream>, RecordWriter<TcpStream>, RecordWriter<TcpStream>);

fn await_record(records: &mut RecordReader<TcpStream>, wanted: RecordType) -> Vec<u8> {
    loop {
        let record =
            records.next_record().unwrap_or_else(|e| panic!("{wanted:?} does not come: {e}"));
        if record.record_type == wanted {
            return record.payload.to_vec();
        }
    }
}

/// Waits until the other end has hung up, whatever it says before.
fn is_hung_up(mut socket: &TcpStream) {
    let mut bytes = [0; 4096];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return,
            Err(e) => panic!("the other end does not hang up: {e}"),
        }
    }
}

/// Waits until the receiver has said so often that no VM came, and listens on.
fn refused(receiver: &Vm, times: usize) {
    let deadline = Instant::now() + PATIENCE;
    while receiver.log().matches("no VM came").count() < times {
        assert!(Instant::now() < deadline, "{times} times: {}", receiver.log());
        std::thread::yield_now();
    }
}

/// The header of a record whose payload does not come (section 2.2).
fn header(record_type: u16, flags: u16, length: u64) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..2].copy_from_slice(&record_type.to_le_bytes());
    bytes[2..4].copy_from_slice(&flags.to_le_bytes());
    bytes[8..16].copy_from_slice(&length.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..28]);
    bytes[28..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn preamble(kind: u8) -> Vec<u8> {
    let mut bytes = [b"MINIVMM", &[kind][..], &[1, 0, 0, 0]].concat();
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Bytes that are refused wherever a peer sends them first.
fn nonsense(kind: u8) -> Vec<Vec<u8>> {
    let first = |bytes: &[u8]| [&preamble(kind), bytes].concat();
    vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 64 << 10],
        // A version that nobody has.
        {
            let mut bytes = [b"MINIVMM", &[kind][..], &[9, 0, 0, 0]].concat();
            bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
            bytes
        },
        // Lengths: of a known type, of an unknown optional one, beyond all.
        first(&header(0x0005, 2, 1 << 40)),
        first(&header(0x8001, 1, u64::MAX)),
        first(&header(0x0020, 2, u64::MAX - 7)),
        // A type that must be known and is not.
        first(&header(0x00aa, 2, 0)),
        first(&header(0x0005, 0x8000, 0)),
    ]
}

fn a_receiver_outlives_sources_that_lie() {
    let (a, b) = (Host::new(), Host::new());
    let mut vm = a.run(GUEST, &[]).ready();
    let source = Source::listen_to(&a);
    let mut receiver = b.launch(&["receive", "--listen", "127.0.0.1:0"]);
    receiver.console.may_begin_within_a_line();
    let to = receiver.listens_at();
    let before = peak(&receiver);
    for kind in [b'M', b'P', b'Q', b'S', b'R'] {
        for bytes in nonsense(kind) {
            let mut socket = connect(&to);
            // It may hang up before it has all of it.
            let _ = socket.write_all(&bytes);
            is_hung_up(&socket);
        }
    }
    // A page connection with a token that nobody has, a question with one.
    let mut join = RecordWriter::new(connect(&to), StreamKind::Pages).unwrap();
    join.write(RecordType::Join, &[&source.id, &short(1), &short(0), &TOKEN]).unwrap();
    // State before the configuration; a configuration of another version; one that is none.
    let (first, rest) = (&source.offer[0], &source.offer[1..]);
    let mut twisted: Vec<Vec<(RecordType, Vec<u8>)>> = vec![
        vec![first.clone(), (RecordType::State, vec![0; 64])],
        vec![first.clone(), (RecordType::Commit, vec![1])],
        [std::slice::from_ref(first), &rest[1..]].concat(),
    ];
    let hostile_layout = vec![1, 0, 253, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0];
    for (record_type, payload) in [
        (RecordType::Layout, hostile_layout),
        (RecordType::Config, [short(999), text("{}")].concat()),
        (RecordType::Config, [short(1), text("[[[[[[[[[[")].concat()),
        (RecordType::Machine, [text("9.9.9"), short(999), short(0)].concat()),
    ] {
        let replace = |(old, kept): &(RecordType, Vec<u8>)| match *old == record_type {
            true => (record_type, payload.clone()),
            false => (*old, kept.clone()),
        };
        twisted.push(source.offer.iter().map(replace).collect());
    }
    // The last four are offers, which are refused; the others are no offers.
    for (number, records) in twisted.iter().enumerate() {
        let main = connect(&to);
        let mut out = RecordWriter::new(main.try_clone().unwrap(), StreamKind::Migration).unwrap();
        for (record_type, payload) in records {
            let _ = out.write(*record_type, &[payload]);
        }
        let _ = main.shutdown(Shutdown::Write);
        is_hung_up(&main);
        if number >= 3 {
            refused(&receiver, number - 2);
        }
    }
    assert_eq!(receiver.log().matches("has version 999").count(), 2, "{}", receiver.log());
    // Whatever comes before it is wanted, is beyond memory, or comes too often.
    type Lie = fn(&mut RecordWriter<TcpStream>, &mut RecordWriter<TcpStream>);
    let run = |gfn: u64, pages: u32| {
        [&[1, 0, 0, 0, 0, 0, 0, 0][..], &gfn.to_le_bytes(), &pages.to_le_bytes(), &[0; 4]].concat()
    };
    let beyond = [run((64 << 20) / 4096, 1), run(u64::MAX - 1, u32::MAX), run(0, 1 << 30)];
    let lies: [Lie; 3] = [
        |main, _| drop(main.write(RecordType::Commit, &[&[1]])),
        |main, _| drop(main.write(RecordType::Complete, &[&[250, 0]])),
        |_, pages| drop(pages.write(RecordType::Sync, &[&[9]])),
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let (mut records, mut main, mut pages) = source.ready(&to, number);
        lie(&mut main, &mut pages);
        await_record(&mut records, RecordType::Abort);
        assert!(records.next_record().is_err());
        refused(&receiver, 5 + number);
    }
    for (number, runs) in beyond.into_iter().enumerate() {
        let (mut records, _main, mut pages) = source.ready(&to, 100 + number);
        pages.write(RecordType::Round, &[&[0]]).unwrap();
        pages.write(RecordType::Zero, &[&runs]).unwrap();
        let reason = await_record(&mut records, RecordType::Abort);
        assert!(String::from_utf8_lossy(&reason).contains("page connection 0"), "{reason:?}");
        refused(&receiver, 8 + number);
    }
    let grown = peak(&receiver) - before;
    assert!(grown < MEMORY_KIB, "it grew by {grown} KiB: {}", receiver.log());
    assert!(receiver.is_alive() && !receiver.log().contains("panicked"), "{}", receiver.log());
    // And an honest one moves its VM here.
    a.ok(&["migrate", "vm", "--to", &to, "--verify"]);
    vm.ends_well();
    receiver.verify();
}

fn a_source_outlives_destinations_that_lie() {
    let host = Host::new();
    let mut vm = host.run(GUEST, &[]).ready();
    let before = peak(&vm);
    let lies: Vec<Vec<(RecordType, Vec<u8>)>> = vec![
        vec![(RecordType::Accept, [&TOKEN[..], &short(65_000)].concat())],
        vec![(RecordType::Accept, [&TOKEN[..], &short(0)].concat())],
        vec![(RecordType::Ready, vec![0])],
        vec![(RecordType::Loaded, vec![0])],
        vec![(RecordType::Resumed, vec![0; 4])],
        vec![(RecordType::Refuse, vec![0])],
        vec![(RecordType::Refuse, vec![253, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
        vec![(RecordType::Abort, [short(999), text("because")].concat())],
        vec![(RecordType::Hello, vec![0; 18])],
        vec![
            (RecordType::Accept, [&TOKEN[..], &short(1)].concat()),
            (RecordType::Accept, [&TOKEN[..], &short(1)].concat()),
        ],
        vec![
            (RecordType::Accept, [&TOKEN[..], &short(1)].concat()),
            (RecordType::Resumed, vec![0; 4]),
        ],
    ];
    for lie in &lies {
        let finished = answered(&host, |main, id| {
            let mut out = RecordWriter::new(main, StreamKind::Migration).unwrap();
            out.write(RecordType::Hello, &[&hello(id)]).unwrap();
            for (record_type, payload) in lie {
                let _ = out.write(*record_type, &[payload]);
            }
        });
        finished_here(&finished);
    }
    for bytes in nonsense(b'M') {
        let finished = answered(&host, |mut main, _| drop(main.write_all(&bytes)));
        finished_here(&finished);
    }
    finished_here(&answered(&host, |main, _| drop(main.shutdown(Shutdown::Both))));
    let grown = peak(&vm) - before;
    assert!(grown < MEMORY_KIB, "it grew by {grown} KiB");
    assert!(!vm.log().contains("panicked"), "{}", vm.log());
    vm.verify();
    let there = Host::new();
    let (mut destination, to) = there.receive(&[]);
    host.ok(&["migrate", "vm", "--to", &to, "--verify"]);
    vm.ends_well();
    destination.verify();
}

#[track_caller]
fn finished_here(finished: &Finished) {
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert!(finished.stdout.contains("runs here as before"), "{finished:#?}");
}

/// How a migration ends whose destination says this.
fn answered(host: &Host, say: impl FnOnce(&TcpStream, &[u8])) -> Finished {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let migrating = Migrating::start(host, &to, &[]);
    let (main, _) = listener.accept().unwrap();
    main.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut records = RecordReader::new(main.try_clone().unwrap(), StreamKind::Migration).unwrap();
    let id = records.next_record().unwrap().payload[..16].to_vec();
    await_record(&mut records, RecordType::Offer);
    say(&main, &id);
    migrating.end()
}

fn connections_that_dribble_keep_nobody_out_and_nobody_waiting() {
    let (a, b) = (Host::new(), Host::new());
    let mut vm = a.run(GUEST, &[]).ready();
    let (mut destination, to) = b.receive(&[]);
    // They begin as what they are not, and say nothing more, or never stop saying nothing.
    let silent: Vec<TcpStream> = (0..16)
        .map(|number| {
            let mut socket = connect(&to);
            socket.write_all(&preamble([b'P', b'Q', b'M'][number % 3])).unwrap();
            socket
        })
        .collect();
    let babbling: Vec<_> = (0..4)
        .map(|number| {
            let mut socket = connect(&to);
            std::thread::spawn(move || {
                socket.write_all(&preamble([b'P', b'Q', b'M'][number % 3])).unwrap();
                for sequence in 0_u64.. {
                    let mut record = header(0x8001, 1, 0);
                    record[16..24].copy_from_slice(&sequence.to_le_bytes());
                    let checksum = crc32c::crc32c(&record[..28]);
                    record[28..].copy_from_slice(&checksum.to_le_bytes());
                    // Not as fast as it can: others need the processor.
                    std::thread::park_timeout(Duration::from_millis(1));
                    if socket.write_all(&record).is_err() {
                        return;
                    }
                }
            })
        })
        .collect();
    a.ok(&["migrate", "vm", "--to", &to, "--verify"]);
    vm.ends_well();
    destination.verify();
    // The process sees to its VM, and waits for none of them.
    b.ok(&["stop", "vm", "--timeout", "30"]);
    destination.ends_well();
    drop(silent);
    let deadline = Instant::now() + PATIENCE;
    for peer in babbling {
        peer.join().unwrap();
        assert!(Instant::now() < deadline);
    }
}

fn what_a_peer_says_cannot_steer_the_terminal() {
    let host = Host::new();
    let vm = host.run(GUEST, &[]).ready();
    let evil = "no\u{1b}]0;owned\u{7}\u{1b}[2J\r\nminivmm: all is well\u{9b}1m";
    for record_type in [RecordType::Refuse, RecordType::Abort] {
        let finished = answered(&host, |main, id| {
            let mut out = RecordWriter::new(main, StreamKind::Migration).unwrap();
            out.write(RecordType::Hello, &[&hello(id)]).unwrap();
            let said = [short(1), text(evil)].concat();
            let _ = out.write(record_type, &[&said]);
        });
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        let all = format!("{}{}", finished.stdout, finished.stderr);
        assert!(all.contains("all is well"), "{all:?}");
        assert!(!all.lines().any(|line| line.starts_with("minivmm: all is well")), "{all:?}");
        assert!(!all.chars().any(|c| c.is_control() && c != '\n'), "{all:?}");
    }
    assert!(!vm.log().chars().any(|c| c.is_control() && c != '\n'), "{:?}", vm.log());
}
