//! A destination that lies, or says nothing.

#![allow(clippy::unwrap_used)]

use std::thread;

use super::*;
use crate::address::{Gfn, PageRange};
use crate::layout::MemoryLayout;
use crate::report::Outcome;
use crate::simulated::{LocalNetwork, SimulatedVm};
use crate::stream::session::{Accept, Hello, Loaded, Ready, Refuse, Resumed};
use crate::stream::{RecordReader, RecordType, RecordWriter, StreamKind};
use crate::transport::{Listener, Stream};

mod committing;
mod peer;
mod retract;

type Out = RecordWriter<Stream>;

fn small_layout() -> MemoryLayout {
    MemoryLayout::new([PageRange::new(Gfn(0), 16).unwrap()]).unwrap()
}

fn small_offering() -> Offering<'static> {
    Offering {
        name: "web".to_owned(),
        machine: Machine {
            program_version: String::new(),
            identity_version: 1,
            identity: Vec::new(),
        },
        config: Config { version: 1, data: Vec::new() },
        resources: Config { version: 1, data: Vec::new() },
        blobs: Vec::new(),
    }
}

/// Offers a VM to a destination that reads the offer and then does `answer`.
fn offer_to(answer: impl FnOnce(&mut Out, [u8; 16]) + Send) -> (Cause, String) {
    let timing = Timing {
        alive: Duration::from_millis(100),
        dead: Duration::from_millis(400),
        ..Timing::default()
    };
    let options = SourceOptions { timing, ..SourceOptions::default() };
    offer_with(options, |_, _, out, id| answer(out, id))
}

/// As [`offer_to`]; `answer` also has the network for further connections, and the source's words.
fn offer_with(
    options: SourceOptions,
    answer: impl FnOnce(&LocalNetwork, &mut RecordReader<Stream>, &mut Out, [u8; 16]) + Send,
) -> (Cause, String) {
    let vm = SimulatedVm::new(small_layout()).unwrap();
    vm.guest_write(Gfn(3), b"contents").unwrap();
    // It never converges entirely.
    vm.set_eager(Gfn(3));
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(directory.path()).unwrap();
    let network = LocalNetwork::new();
    let report = thread::scope(|scope| {
        scope.spawn(|| {
            let transport = network.accept(Duration::from_secs(10)).unwrap().unwrap();
            let stream = Stream(Arc::clone(&transport));
            let mut records = RecordReader::new(stream, StreamKind::Migration).unwrap();
            let hello: Hello<'_> = records.next_record().unwrap().decode("HELLO").unwrap();
            let id = hello.id;
            while records.next_record().unwrap().record_type != RecordType::Offer {}
            let stream = Stream(Arc::clone(&transport));
            let mut out = RecordWriter::new(stream, StreamKind::Migration).unwrap();
            answer(&network, &mut records, &mut out, id);
            // Until the source closes it.
            while records.next_record().is_ok() {}
        });
        let control = SourceControl::new(MigrationId::random().unwrap());
        migrate_to(&vm, small_offering(), &network, &journal, &options, &control, &|_| {})
    });
    assert!(vm.is_running() && !vm.is_tracking(), "nothing has changed");
    match report.outcome {
        Outcome::RunningHere { cause, reasons } => (cause, reasons.join("; ")),
        other => panic!("{other:?}"),
    }
}

fn hello(out: &mut Out, id: [u8; 16]) {
    out.send(&Hello { id, program: "0.1.0", features: u64::MAX }).unwrap();
}

fn assert_breach(words: &str, answer: impl FnOnce(&mut Out, [u8; 16]) + Send) {
    let (cause, text) = offer_to(answer);
    assert_eq!(cause, Cause::Protocol, "{text}");
    assert!(text.contains(words), "{text:?} without {words:?}");
}

#[test]
fn answers_that_make_no_sense_are_breaches() {
    let accept = |connections| Accept { token: [1; 16], connections };
    assert_breach("another migration id", |out, _| hello(out, [0; 16]));
    assert_breach("HELLO", |out, _| out.send(&accept(1)).unwrap());
    assert_breach("number of connections", |out, id| {
        hello(out, id);
        out.send(&accept(2)).unwrap();
    });
    assert_breach("number of connections", |out, id| {
        hello(out, id);
        out.send(&accept(0)).unwrap();
    });
    assert_breach("no reason", |out, id| {
        hello(out, id);
        out.send(&Refuse { reasons: vec![] }).unwrap();
    });
    assert_breach("Ready", |out, id| {
        hello(out, id);
        out.send(&Ready { load_us: 0 }).unwrap();
    });
    assert_breach("Loaded", |out, id| {
        hello(out, id);
        out.send(&Loaded { load_us: 0 }).unwrap();
    });
    assert_breach("Resumed", |out, id| {
        hello(out, id);
        out.send(&Resumed { load_us: 0, own_us: 0, resume_us: 0, cpu_us: 0 }).unwrap();
    });
    assert_breach("Pages", |out, id| {
        hello(out, id);
        out.write(RecordType::Pages, &[&[0; 8]]).unwrap();
    });
    // A huge expected time is only a bad estimate, but pages must be joined before READY.
    assert_breach("Accept", |out, id| {
        hello(out, id);
        out.send(&accept(1)).unwrap();
        out.send(&accept(1)).unwrap();
    });
}

#[test]
fn a_destination_that_falls_silent_is_dead() {
    let (cause, text) = offer_to(hello);
    assert_eq!(cause, Cause::Lost, "{text}");
}

#[test]
fn a_cancel_before_the_beginning_counts() {
    let control = SourceControl::new(MigrationId::random().unwrap());
    assert!(control.cancel());
    assert_eq!(control.state().early, Some(Cause::Cancelled));
}
