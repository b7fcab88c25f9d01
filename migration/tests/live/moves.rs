//! Migrations that succeed.

use migration::destination::Arrival;
use migration::handover::Verdict;
use migration::journal::Side;
use migration::report::{Outcome, Report};
use migration::{Gfn, GuestMemory, Mode};

use super::common::*;

fn assert_journals(world: &World, outcome: &super::common::Outcome) {
    let source = world.source_journal.verdict(outcome.id, Side::Source, None).unwrap();
    let there = world.destination_journal.verdict(outcome.id, Side::Destination, None).unwrap();
    assert_eq!((source, there), (Verdict::HandedOver, Verdict::RunningHere));
}

fn assert_complete(report: &Report) {
    assert_eq!(report.outcome, Outcome::HandedOver, "{report:?}");
    let pause = report.pause.unwrap();
    assert!(pause.total >= pause.stop + pause.save + pause.harvest + pause.send);
    assert!(report.total >= pause.total);
    assert!(report.cpu_destination.is_some());
}

#[test]
fn an_idle_vm_moves() {
    for connections in [1, 2, 4] {
        for verify in [false, true] {
            let world = World::new();
            world.vm.set_clock_page(Gfn(1));
            let outcome =
                world.migrate(&migration::source::SourceOptions { verify, ..options(connections) });
            assert_complete(&outcome.report);
            assert_eq!(outcome.arrival.outcome, Arrival::RunningHere);
            assert!(outcome.arrival.confirmed);
            world.assert_same_memory();
            assert_journals(&world, &outcome);
            world.assert_not_bloated();
            let report = &outcome.report;
            assert_eq!(report.connection_bytes.len(), usize::from(connections));
            assert!(report.connection_bytes.iter().all(|bytes| *bytes > 0), "{report:?}");
            assert_eq!(report.pause.unwrap().pages, 1, "only the clock's page was left");
            assert_eq!(
                report.skipped_pages,
                2630 - world.vm.populated().unwrap().count(),
                "what was never touched was not even looked at"
            );
            let offer = world.host.offer().unwrap();
            assert_eq!((offer.name.as_str(), offer.connections), ("web", connections));
            let blobs = world.host.blobs();
            assert_eq!((blobs[0].data.len(), blobs[1].data.len()), (6, 3 << 20));
        }
    }
}

#[test]
fn a_cold_vm_moves() {
    let world = World::new();
    let outcome =
        world.migrate(&migration::source::SourceOptions { mode: Mode::Cold, ..options(2) });
    assert_complete(&outcome.report);
    assert!(outcome.report.rounds.is_empty());
    world.assert_moved();
}

#[test]
fn a_busy_vm_moves_with_every_write() {
    for seed in 1..9 {
        let world = World::new();
        let connections = 1 + (seed % 4) as u16;
        let outcome = under_load(&world.vm, seed, || {
            world.migrate(&migration::source::SourceOptions {
                verify: seed % 2 == 0,
                ..options(connections)
            })
        });
        assert_complete(&outcome.report);
        assert!(!outcome.report.rounds.is_empty());
        world.assert_moved();
    }
}

#[test]
fn device_writes_move_too() {
    let world = World::new();
    let outcome = world.migrate_with(
        &options(1),
        &Hooks {
            progress: &|progress, _| {
                if progress.phase == migration::handover::SourcePhase::Copying {
                    world.vm.device_write(Gfn(3), b"from a device").unwrap();
                }
            },
            ..Hooks::default()
        },
    );
    assert_complete(&outcome.report);
    assert!(world.host.vm().unwrap().read_page(Gfn(3)).unwrap().starts_with(b"from a device"));
    world.assert_moved();
}

#[test]
fn a_vm_moves_over_tcp() {
    use migration::transport::{TcpAcceptor, TcpConnector};
    let world = World::new();
    let listener = TcpAcceptor::bind("127.0.0.1:0").unwrap();
    let connector = TcpConnector::new(listener.local_address().unwrap().to_string());
    let options = migration::source::SourceOptions {
        verify: true,
        // Changed while it runs, below.
        bandwidth: Some(1),
        ..options(3)
    };
    let hooks =
        Hooks { progress: &|_, control| control.set_bandwidth(Some(1 << 30)), ..Hooks::default() };
    let outcome =
        under_load(&world.vm, 5, || world.migrate_over(&connector, &listener, &options, &hooks));
    assert_complete(&outcome.report);
    world.assert_moved();
}

#[test]
fn a_vm_moves_back_and_forth() {
    let mut world = World::new();
    for turn in 0..6 {
        let outcome = under_load(&world.vm, 11 + turn, || world.migrate(&options(2)));
        assert_complete(&outcome.report);
        world.assert_moved();
        // What arrived is what moves next.
        world.vm = world.host.vm().unwrap();
        std::mem::swap(&mut world.source_journal, &mut world.destination_journal);
    }
}
