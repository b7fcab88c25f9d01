//! A source that lies about memory that is to follow its guest.

use super::*;
use crate::simulated::SimulatedVm;
use crate::stream::session::{Recover, Recovered, Switch, ROLE_REQUESTS};
use crate::userfault::Userfault;

/// Two pages, which are missing from the switch on.
const MISSING: (u64, u64) = (3, 2);

/// Whether post-copy can be tried here.
fn possible() -> bool {
    Userfault::open().inspect_err(|error| println!("skipped: {error}")).is_ok()
}

/// All connections up to READY, and the token.
fn ready(network: &LocalNetwork) -> (Wire, Wire, Wire, [u8; 16]) {
    let (mut main, accept) = Wire::accepted_in(network, Mode::Postcopy, false);
    let pages = Wire::join(network, 0, accept.token).unwrap();
    let kind = StreamKind::Requests;
    let requests = Wire::join_as(network, kind, ROLE_REQUESTS, 0, accept.token).unwrap();
    let _: Ready = next(&mut main.records);
    (main, pages, requests, accept.token)
}

/// Up to LOADED: [`MISSING`] is missing.
fn switched(network: &LocalNetwork) -> (Wire, Wire, Wire, [u8; 16]) {
    let (mut main, mut pages, requests, token) = ready(network);
    pages.out.send(&Round { number: 0 }).unwrap();
    pages.out.send(&Sync { pages: 0 }).unwrap();
    main.out.write(RecordType::Missing, &[&table(&[MISSING])]).unwrap();
    main.out.send(&Switch { pages: MISSING.1, unit: 1 }).unwrap();
    main.out.write(RecordType::State, &[&state(0)]).unwrap();
    main.out.send(&Complete { sections: 1, paused_us: 0 }).unwrap();
    let _: Loaded = next(&mut main.records);
    (main, pages, requests, token)
}

/// Up to RESUMED.
fn draining(network: &LocalNetwork) -> (Wire, Wire, Wire, [u8; 16]) {
    let mut all = switched(network);
    all.0.out.send(&Commit { run: true }).unwrap();
    let _: Resumed = next(&mut all.0.records);
    all
}

/// As [`assert_refused`], before the switch. `cause`: a breach, or what cannot be here.
fn assert_not_announced(words: &str, cause: Cause, source: impl FnOnce(&mut Wire)) {
    if !possible() {
        return;
    }
    let bench = Bench::new();
    let (report, text) = bench.receive(|network| {
        let (mut main, mut pages, _requests, _) = ready(network);
        pages.out.send(&Round { number: 0 }).unwrap();
        pages.out.send(&Sync { pages: 0 }).unwrap();
        source(&mut main);
        main.out.write(RecordType::State, &[&state(0)]).ok();
        main.out.send(&Complete { sections: 1, paused_us: 0 }).ok();
        main.abort()
    });
    assert!(text.contains(words), "{text:?} without {words:?}");
    match report.outcome {
        Arrival::NotHere { cause: found, .. } => assert_eq!(found, cause, "{text}"),
        other => panic!("{other:?}"),
    }
    assert!(bench.host.vm().is_none(), "it was discarded");
}

#[test]
fn memory_that_cannot_be_missing_is_refused() {
    let breach = |words, source: &dyn Fn(&mut Wire)| {
        assert_not_announced(words, Cause::Protocol, source);
    };
    breach("region", &|main| {
        main.out.write(RecordType::Missing, &[&table(&[(15, 2)])]).unwrap();
    });
    breach("missing pages", &|main| {
        main.out.write(RecordType::Missing, &[&table(&[MISSING])]).unwrap();
        main.out.send(&Switch { pages: 3, unit: 1 }).unwrap();
    });
    breach("Missing", &|main| {
        main.out.send(&Switch { pages: 0, unit: 1 }).unwrap();
        main.out.write(RecordType::Missing, &[&table(&[MISSING])]).unwrap();
    });
    breach("Switch", &|main| {
        main.out.send(&Switch { pages: 0, unit: 1 }).unwrap();
        main.out.send(&Switch { pages: 0, unit: 1 }).unwrap();
    });
    breach("once", &|main| {
        main.out.send(&Echo { number: 0 }).unwrap();
        let _: Echo = next(&mut main.records);
        main.out.send(&Echo { number: 0 }).unwrap();
    });
    assert_not_announced("units of 512 pages", Cause::Failed, |main| {
        main.out.send(&Switch { pages: 0, unit: 512 }).unwrap();
    });
}

#[test]
fn precopy_has_no_switch() {
    for record_type in [RecordType::Missing, RecordType::Echo, RecordType::Switch] {
        assert_refused(&format!("{record_type:?}"), |main, _| {
            let payload = match record_type {
                RecordType::Missing => table(&[MISSING]),
                RecordType::Echo => vec![0],
                _ => vec![0, 1],
            };
            main.out.write(record_type, &[&payload]).unwrap();
        });
    }
}

#[test]
fn memory_that_follows_cannot_be_compared() {
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let transport = network.connect(Duration::ZERO).unwrap();
        let stream = Stream(Arc::clone(&transport));
        let mut out = RecordWriter::new(stream, StreamKind::Migration).unwrap();
        let layout = encode_layout(&small_layout()).unwrap();
        drop(offer_in(&mut out, Mode::Postcopy, true, &layout));
        assert_eq!(transport.read(&mut [0]).unwrap_or(0), 0, "nothing is answered");
    });
    assert_eq!(report.outcome, Arrival::Stopped);
}

/// What a source sends on the page connection.
type Lie<'a> = &'a dyn Fn(&mut Wire);

/// Whether all memory came, in the end, by what `source` sends on the page connection. Honest pages follow it there.
fn drains(source: impl FnOnce(&mut Wire)) -> bool {
    let bench = Bench::new();
    let (report, drained) = bench.receive(|network| {
        let (mut main, mut pages, _requests, _) = draining(network);
        source(&mut pages);
        for gfn in MISSING.0..MISSING.0 + MISSING.1 {
            // The other end may have had enough.
            let _ = pages.out.write(RecordType::Pages, &[&table(&[(gfn, 1)]), &[7; 4096]]);
        }
        loop {
            match main.records.next_record() {
                Ok(record) if record.record_type == RecordType::Drained => break true,
                Ok(_) => {}
                Err(_) => break false,
            }
        }
    });
    // Whatever they are: the guest is here.
    assert_eq!(report.outcome, Arrival::RunningHere);
    drained
}

#[test]
fn pages_that_cannot_follow_end_the_connection_and_not_the_guest() {
    if !possible() {
        return;
    }
    let page = [1; 4096];
    assert!(drains(|_| {}), "honest ones do");
    let hostile: [(&str, Lie); 7] = [
        ("twice in one record", &|pages| {
            let _ = pages.out.write(RecordType::Zero, &[&table(&[(3, 1), (3, 1)])]);
        }),
        ("never missing", &|pages| {
            let _ = pages.out.write(RecordType::Pages, &[&table(&[(5, 1)]), &page]);
        }),
        ("some of them not missing", &|pages| {
            let _ = pages.out.write(RecordType::Zero, &[&table(&[(4, 2)])]);
        }),
        ("no memory", &|pages| {
            let _ = pages.out.write(RecordType::Zero, &[&table(&[(16, 1)])]);
        }),
        ("no checksum", &|pages| {
            let vm = SimulatedVm::new(small_layout()).unwrap();
            let run = PageRange::new(Gfn(MISSING.0), MISSING.1).unwrap();
            let _ = pages.out.write_live_pages(&vm, &[run]);
        }),
        ("a page too few", &|pages| {
            let _ = pages.out.write(RecordType::Pages, &[&table(&[(6, 2)]), &page]);
        }),
        ("a round", &|pages| drop(pages.out.send(&Round { number: 1 }))),
    ];
    for (what, source) in hostile {
        assert!(!drains(source), "{what}: it was taken");
    }
}

/// A main connection that wants to go on, and the answer to it.
fn recover(network: &LocalNetwork, token: [u8; 16], connections: u16) -> Option<(Wire, Recovered)> {
    let transport = network.connect(Duration::ZERO).unwrap();
    let stream = || Stream(Arc::clone(&transport));
    let mut out = RecordWriter::new(stream(), StreamKind::Continue).ok()?;
    out.send(&Hello { id: ID, program: "0.1.0", features: 0 }).ok()?;
    out.send(&Recover { token, connections }).ok()?;
    let mut records = RecordReader::new(stream(), StreamKind::Continue).ok()?;
    let _: Hello<'_> = records.next_record().ok()?.decode("HELLO").ok()?;
    let recovered = records.next_record().ok()?.decode("RECOVERED").ok()?;
    Some((Wire { out, records, transport }, recovered))
}

#[test]
fn only_who_has_the_token_goes_on_with_what_was_interrupted() {
    if !possible() {
        return;
    }
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let (mut main, _pages, _requests, token) = draining(network);
        assert!(recover(network, [0; 16], 1).is_none(), "wrong token");
        assert!(Wire::join(network, 0, token).is_err(), "nobody said how many there are");
        main.transport.shutdown();
        assert!(main.is_closed());
        // It may be too early; a source then tries again.
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let (mut main, recovered) = loop {
            match recover(network, token, 1000) {
                Some(recovered) => break recovered,
                None => assert!(std::time::Instant::now() < deadline, "it is not let in"),
            }
        };
        assert_eq!(recovered.pages, MISSING.1);
        let most = DestinationOptions::default().max_connections;
        assert_eq!(recovered.connections, most, "as many as are allowed");
        let record = main.records.next_record().unwrap();
        assert_eq!(
            (record.record_type, record.payload),
            (RecordType::Missing, &table(&[MISSING])[..])
        );
        assert!(Wire::join(network, most, token).is_err(), "one too many");
        let mut pages: Vec<_> =
            (0..most).map(|index| Wire::join(network, index, token).unwrap()).collect();
        assert!(Wire::join(network, 0, token).is_err(), "joined before");
        let kind = StreamKind::Requests;
        let _requests = Wire::join_as(network, kind, ROLE_REQUESTS, 0, token).unwrap();
        let data = [7; 2 * 4096];
        pages[0].out.write(RecordType::Pages, &[&table(&[MISSING]), &data]).unwrap();
        while main.records.next_record().unwrap().record_type != RecordType::Drained {}
        main.out.send(&Done {}).unwrap();
        assert!(main.is_closed());
    });
    assert_eq!(report.outcome, Arrival::RunningHere);
    let drain = report.drain.unwrap();
    assert!(report.confirmed && drain.complete);
    // Three connections were lost at once.
    assert_eq!(drain.interruptions, 1);
}

/// A source may notice first. That the old connections end is then nothing that concerns the new ones.
#[test]
fn a_source_that_comes_again_unexpectedly_goes_on() {
    if !possible() {
        return;
    }
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let (_main, _pages, _requests, token) = draining(network);
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        let (mut main, _) = loop {
            match recover(network, token, 1) {
                Some(recovered) => break recovered,
                None => assert!(std::time::Instant::now() < deadline, "it is not let in"),
            }
        };
        let mut pages = Wire::join(network, 0, token).unwrap();
        let kind = StreamKind::Requests;
        let _requests = Wire::join_as(network, kind, ROLE_REQUESTS, 0, token).unwrap();
        let data = [7; 2 * 4096];
        pages.out.write(RecordType::Pages, &[&table(&[MISSING]), &data]).unwrap();
        while main.records.next_record().unwrap().record_type != RecordType::Drained {}
        main.out.send(&Done {}).unwrap();
        assert!(main.is_closed());
    });
    let drain = report.drain.unwrap();
    assert!(report.confirmed && drain.complete);
    assert_eq!(drain.interruptions, 1);
}

/// What somebody who asks to go on is told by a host to which nothing comes at present.
fn word_of(bench: &Bench, token: [u8; 16]) -> Option<RecordType> {
    let over = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let is_over = |_: &[MigrationId]| over.load(std::sync::atomic::Ordering::Relaxed);
        let timing = Timing::default();
        let door =
            scope.spawn(move || answer_queries(&bench.network, &bench.journal, timing, &is_over));
        let transport = bench.network.connect(Duration::ZERO).unwrap();
        let stream = || Stream(Arc::clone(&transport));
        let mut out = RecordWriter::new(stream(), StreamKind::Continue).unwrap();
        out.send(&Hello { id: ID, program: "0.1.0", features: 0 }).unwrap();
        out.send(&Recover { token, connections: 1 }).unwrap();
        let word =
            RecordReader::new(stream(), StreamKind::Continue).ok().and_then(|mut records| {
                let _: Hello<'_> = records.next_record().ok()?.decode("HELLO").ok()?;
                Some(records.next_record().ok()?.record_type)
            });
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        door.join().unwrap().unwrap();
        word
    })
}

/// A source gives the only copy of pages up when it is told that nobody waits for them.
#[test]
fn only_who_knows_says_that_nothing_is_waited_for() {
    if !possible() {
        return;
    }
    let bench = Bench::new();
    assert_eq!(word_of(&bench, [3; 16]), None, "never heard of it");
    let (report, token) = bench.receive(|network| {
        let (main, mut pages, _requests, token) = draining(network);
        assert!(!bench.journal.is_drained(MigrationId(ID), &Token::from_bytes(token)).unwrap());
        let data = [7; 2 * 4096];
        pages.out.write(RecordType::Pages, &[&table(&[MISSING]), &data]).unwrap();
        // What it says at last is lost.
        let mut records = main.records;
        while records.next_record().unwrap().record_type != RecordType::Drained {}
        main.transport.shutdown();
        token
    });
    assert!(report.drain.unwrap().complete);
    assert_eq!(word_of(&bench, [3; 16]), None, "wrong token");
    assert_eq!(word_of(&bench, token), Some(RecordType::Refuse));
    let elsewhere = Bench::new();
    assert_eq!(word_of(&elsewhere, token), None, "another host");
}

#[test]
fn an_unresolved_vm_whose_memory_was_to_follow_can_be_given_up() {
    if !possible() {
        return;
    }
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || {
        let bench = Bench::new();
        let (report, ()) = bench.receive(|network| {
            let (mut main, ..) = switched(network);
            main.transport.shutdown();
            assert!(main.is_closed());
        });
        done.send(report.outcome)
    });
    let outcome = outcome.recv_timeout(Duration::from_secs(60)).expect("it hangs");
    assert!(matches!(outcome, Arrival::Unresolved { .. }), "{outcome:?}");
}
