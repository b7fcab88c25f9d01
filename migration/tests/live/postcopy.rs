//! Memory that follows its guest.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc};
use std::thread;
use std::time::Duration;

use migration::destination::{answer_queries, Arrival};
use migration::prepaging::Prepaging;
use migration::report::Outcome;
use migration::simulated::{Cut, LocalNetwork, Operation};
use migration::source::{Limits, PostcopyOptions, PostcopyReport, SourceControl, SourceOptions};
use migration::transport::{Connector, Transport};
use migration::{Gfn, GuestMemory, MigrationId, Mode, PAGE_BYTES};

use super::common::*;

fn postcopy(connections: u16, push: bool, prepaging: Prepaging) -> SourceOptions {
    SourceOptions {
        mode: Mode::Postcopy,
        postcopy: PostcopyOptions { push, prepaging, ..PostcopyOptions::default() },
        ..options(connections)
    }
}

fn hybrid(connections: u16, rounds: Option<u32>) -> SourceOptions {
    SourceOptions {
        mode: Mode::Hybrid,
        postcopy: PostcopyOptions { rounds, ..PostcopyOptions::default() },
        // Nothing converges to that, unless nothing is written at all.
        downtime: Duration::ZERO,
        limits: Limits { dirty_pages: 0, ..Limits::default() },
        ..options(connections)
    }
}

/// Every page came once, and both ends counted alike.
fn assert_complete(outcome: &super::common::Outcome) -> PostcopyReport {
    let report = &outcome.report;
    assert_eq!(report.outcome, Outcome::HandedOver, "{report:?}");
    assert_eq!(outcome.arrival.outcome, Arrival::RunningHere);
    let postcopy = report.postcopy.clone().expect("a part of memory followed");
    assert_eq!(postcopy.incomplete, None);
    let there = postcopy.destination.clone().expect("the destination's figures");
    let here = outcome.arrival.drain.clone().expect("the destination's own report");
    assert!(here.complete && here.missing_pages == 0);
    assert_eq!((here.requests, here.pushed_pages), (there.requests, there.pushed_pages));
    assert_eq!(there.duplicate_pages, 0);
    assert_eq!(
        there.demand_pages + there.prepaged_pages + there.pushed_pages,
        postcopy.missing_pages,
        "{there:?}"
    );
    assert_eq!(there.latency.count(), there.requests);
    let faults = postcopy.faults.expect("what the figures tell of faults");
    let asked = faults.network_share * postcopy.missing_pages as f64;
    assert!((asked - there.requests as f64).abs() < 0.5, "{postcopy:?}");
    assert_eq!(faults.overtaken_pages, there.requests - there.demand_pages);
    assert_eq!(faults.push_avoided_at_most, there.pushed_pages - faults.overtaken_pages);
    assert_eq!(faults.prepaging_avoided_at_most, there.prepaged_pages);
    postcopy
}

#[test]
fn memory_follows_by_push() {
    for (connections, prepaging) in
        [(1, Prepaging::Off), (3, Prepaging::Linear), (2, Prepaging::Bubble)]
    {
        let world = World::new();
        let populated = world.vm.populated().unwrap().count();
        let outcome = world.migrate(&postcopy(connections, true, prepaging));
        let postcopy = assert_complete(&outcome);
        assert!(outcome.arrival.confirmed);
        assert_eq!(postcopy.missing_pages, populated);
        assert_eq!(outcome.report.pause.unwrap().pages, 0, "none went in the pause");
        world.assert_moved();
        world.assert_not_bloated();
    }
}

#[test]
fn memory_follows_by_demand_alone() {
    for prepaging in [Prepaging::Off, Prepaging::Linear, Prepaging::Bubble] {
        let world = World::new();
        let before = read_all(&world.vm);
        let populated = world.vm.populated().unwrap().count();
        let outcome = thread::scope(|scope| {
            let guest = scope.spawn(|| read_all(&running(&world)));
            let outcome = world.migrate(&postcopy(1, false, prepaging));
            assert!(guest.join().unwrap() == before, "the guest saw what it had written");
            outcome
        });
        let report = assert_complete(&outcome).destination.unwrap();
        assert_eq!(report.pushed_pages, 0);
        match prepaging {
            Prepaging::Off => assert_eq!((report.requests, report.prepaged_pages), (populated, 0)),
            _ => assert!(report.requests < populated / 2, "{report:?}"),
        }
        assert!(report.local_pages > 0, "what never was anywhere was not asked for");
        world.assert_moved();
    }
}

#[test]
fn a_guest_goes_on_while_its_memory_follows() {
    for seed in 1..7 {
        let world = World::new();
        let before = read_all(&world.vm);
        let outcome = thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let vm = running(&world);
                for (gfn, old) in frames().into_iter().zip(&before).step_by(7) {
                    let now: [u8; 8] = vm.read_page(Gfn(gfn)).unwrap()[..8].try_into().unwrap();
                    assert_eq!(now, *old, "page frame {gfn:#x}");
                    vm.guest_write(Gfn(gfn), b"written there").unwrap();
                }
            });
            let prepaging = [Prepaging::Off, Prepaging::Linear, Prepaging::Bubble][seed % 3];
            let outcome = world.migrate(&postcopy(1 + (seed % 2) as u16, true, prepaging));
            guest.join().unwrap();
            outcome
        });
        assert_complete(&outcome);
        let there = world.host.vm().unwrap();
        for (at, gfn) in frames().into_iter().enumerate() {
            let page = there.read_page(Gfn(gfn)).unwrap();
            match at % 7 {
                0 => assert_eq!(&page[..13], b"written there", "page frame {gfn:#x}"),
                _ => assert_eq!(page[..8], before[at], "page frame {gfn:#x}"),
            }
        }
    }
}

#[test]
fn what_was_sent_and_written_again_follows_anew() {
    for seed in 1..9 {
        let world = World::new();
        let rounds = 1 + (seed % 2) as u32;
        let options = hybrid(1 + (seed % 4) as u16, Some(rounds));
        world.vm.set_eager(Gfn(0));
        let outcome = under_load(&world.vm, seed, || world.migrate(&options));
        assert_eq!(outcome.report.rounds.len(), rounds as usize);
        assert_complete(&outcome);
        world.assert_moved();
    }
}

#[test]
fn what_converges_needs_no_postcopy() {
    let world = World::new();
    let outcome = world.migrate(&hybrid(2, Some(5)));
    assert_eq!(outcome.report.outcome, Outcome::HandedOver, "{:?}", outcome.report);
    assert_eq!(outcome.report.postcopy, None);
    assert_eq!(outcome.arrival.drain, None);
    world.assert_moved();
}

#[test]
fn an_operator_starts_postcopy_in_the_middle_of_a_round() {
    let world = World::new();
    let options = SourceOptions {
        // The first round would never end.
        bandwidth: Some(1 << 20),
        ..hybrid(2, None)
    };
    let hooks = Hooks {
        progress: &|progress, control: &SourceControl| {
            if progress.phase == migration::handover::SourcePhase::Copying && progress.bytes > 0 {
                control.start_postcopy();
                control.set_bandwidth(None);
            }
        },
        ..Hooks::default()
    };
    let outcome = under_load(&world.vm, 3, || world.migrate_with(&options, &hooks));
    assert_eq!(outcome.report.rounds.len(), 1);
    assert_complete(&outcome);
    world.assert_moved();
}

/// Whatever is cut where: the guest runs on one side, and what had begun to follow it arrives.
#[test]
fn a_lost_connection_loses_nothing() {
    let connections = 2;
    for (options, name) in [
        (postcopy(connections, true, Prepaging::Bubble), "postcopy"),
        (hybrid(connections, Some(1)), "hybrid"),
    ] {
        let world = World::new();
        world.vm.set_eager(Gfn(0));
        assert_complete(&under_load(&world.vm, 1, || world.migrate(&options)));
        let traffic = world.network.traffic();
        assert_eq!(traffic.len(), 4, "main, two for pages, one for requests");
        let mut recovered = 0;
        for (connection, (sent, received)) in traffic.into_iter().enumerate() {
            for (bytes, outgoing) in [(sent, true), (received, false)] {
                for part in [2, 5, 7, 9, 10] {
                    let bytes = bytes * part / 10;
                    let cut = Cut { connection, bytes: bytes.max(1), outgoing, for_good: false };
                    let world = World::new();
                    world.vm.set_eager(Gfn(0));
                    world.network.cut(Some(cut));
                    let outcome = under_load(&world.vm, bytes, || world.migrate(&options));
                    match &outcome.report.outcome {
                        Outcome::RunningHere { .. } => world.assert_back(),
                        _ => {
                            let report = assert_complete(&outcome);
                            // Only DONE, the last thing of all, is not asked for again.
                            let done_lost = connection == 0 && outgoing;
                            assert!(outcome.arrival.confirmed || done_lost);
                            recovered += report.interruptions;
                            world.assert_moved();
                        }
                    }
                }
            }
        }
        assert!(recovered > 0, "{name}: {recovered}");
    }
}

#[test]
fn requests_that_were_lost_are_made_again() {
    for (bytes, outgoing) in [(20_000, true), (2_000_000, true), (600, false), (5_000, false)] {
        let world = World::new();
        let before = read_all(&world.vm);
        // Main, one for pages, one for requests.
        world.network.cut(Some(Cut { connection: 2, bytes, outgoing, for_good: false }));
        let outcome = thread::scope(|scope| {
            let guest = scope.spawn(|| read_all(&running(&world)));
            let outcome = world.migrate(&postcopy(1, false, Prepaging::Off));
            assert!(guest.join().unwrap() == before, "the guest saw what it had written");
            outcome
        });
        assert_eq!(assert_complete(&outcome).interruptions, 1);
        world.assert_moved();
    }
}

/// Leads one connection to another host.
struct Astray<'a> {
    home: &'a LocalNetwork,
    stranger: &'a LocalNetwork,
    /// Which one, from 0; how many there were.
    which: usize,
    made: AtomicUsize,
}

impl Connector for Astray<'_> {
    fn connect(&self, timeout: Duration) -> io::Result<Arc<dyn Transport>> {
        match self.made.fetch_add(1, Ordering::Relaxed) == self.which {
            true => self.stranger.connect(timeout),
            false => self.home.connect(timeout),
        }
    }

    fn address(&self) -> String {
        self.home.address()
    }
}

/// A host that knows nothing of the migration does not make the source give up what only it has.
#[test]
fn a_stranger_has_no_say() {
    in_time(|| {
        let (world, elsewhere, stranger) = (World::new(), World::new(), LocalNetwork::new());
        let before = read_all(&world.vm);
        let cut = Cut { connection: 2, bytes: 20_000, outgoing: true, for_good: false };
        world.network.cut(Some(cut));
        let astray = Astray {
            home: &world.network,
            stranger: &stranger,
            // After main, one for pages, one for requests.
            which: 3,
            made: AtomicUsize::new(0),
        };
        let over = AtomicBool::new(false);
        let outcome = thread::scope(|scope| {
            scope.spawn(|| {
                let is_over = |_: &[MigrationId]| over.load(Ordering::Relaxed);
                answer_queries(&stranger, &elsewhere.destination_journal, timing(), &is_over)
            });
            let guest = scope.spawn(|| read_all(&running(&world)));
            let options = postcopy(1, false, Prepaging::Off);
            let outcome = world.migrate_over(&astray, &world.network, &options, &Hooks::default());
            over.store(true, Ordering::Relaxed);
            assert!(guest.join().unwrap() == before, "the guest saw what it had written");
            outcome
        });
        assert_complete(&outcome);
        assert_eq!(stranger.traffic().len(), 1, "it was asked");
        world.assert_moved();
    });
}

/// What `job` gives; whatever hangs would take longer.
#[track_caller]
fn in_time<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || done.send(job()));
    outcome.recv_timeout(Duration::from_secs(60)).expect("it hangs")
}

/// Loading the state waits for a page that does not come any more. The guest has not run there: it goes on at the
/// source, and moves the next time.
#[test]
fn state_that_waits_for_a_page_is_given_up_with_the_connection() {
    /// Main, one for pages, one for requests.
    const REQUESTS: usize = 2;
    let options = postcopy(1, false, Prepaging::Off);
    let world = || {
        let world = World::new();
        world.host.set_load_page(Gfn(6));
        world
    };
    // What goes over it as long as only loading asks for anything: the guest does not come to run.
    let traffic = in_time(move || {
        let world = world();
        world.host.fail(Operation::CheckOwnership, 1);
        world.migrate(&options);
        world.assert_back();
        world.network.traffic()
    });
    let (sent, received) = traffic[REQUESTS];
    assert!(sent > PAGE_BYTES as u64, "the page was asked for: {traffic:?}");
    // The last byte of the request is lost, or of its answer.
    for (bytes, outgoing) in [(received - 1, false), (sent - 1, true)] {
        in_time(move || {
            let world = world();
            world.network.cut(Some(Cut { connection: REQUESTS, bytes, outgoing, for_good: false }));
            let outcome = world.migrate(&options);
            let here = matches!(outcome.report.outcome, Outcome::RunningHere { .. });
            assert!(here, "{:?}", outcome.report);
            let not_here = matches!(outcome.arrival.outcome, Arrival::NotHere { .. });
            assert!(not_here, "{:?}", outcome.arrival);
            world.assert_back();
            world.network.cut(None);
            let outcome = thread::scope(|scope| {
                let guest = scope.spawn(|| read_all(&running(&world)));
                let outcome = world.migrate(&options);
                guest.join().unwrap();
                outcome
            });
            assert_complete(&outcome);
            world.assert_moved();
        });
    }
}

/// A second batch of what is pushed would wait for hours: nothing of it may be kept from a guest that asks.
#[test]
fn what_is_asked_for_does_not_wait_for_the_cap() {
    for connections in [1, 2] {
        in_time(move || {
            let world = World::new();
            let before = read_all(&world.vm);
            let options = SourceOptions {
                bandwidth: Some(1),
                ..postcopy(connections, true, Prepaging::Bubble)
            };
            let outcome = thread::scope(|scope| {
                let guest = scope.spawn(|| read_all(&running(&world)));
                let outcome = world.migrate(&options);
                assert!(guest.join().unwrap() == before, "the guest saw what it had written");
                outcome
            });
            assert_complete(&outcome);
            world.assert_moved();
        });
    }
}
