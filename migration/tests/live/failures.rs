//! Migrations that fail: cut connections, cancels, errors at either end. After each, at most one VM runs,
//! nothing is lost, and the next attempt moves it.

use migration::destination::Arrival;
use migration::handover::{Cause, SourcePhase, Verdict};
use migration::journal::{EntryState, Side};
use migration::report::{Outcome, Report};
use migration::simulated::{Cut, Operation};
use migration::source::{Limits, OnStall, SourceOptions};
use migration::Mode;
use proptest::prelude::*;

use super::common::*;

/// A source that waits for a verdict and cannot get one is not waited for.
fn detaching() -> Hooks<'static> {
    Hooks {
        progress: &|progress, control| {
            if progress.phase == SourcePhase::Unresolved && progress.note.is_some() {
                control.detach();
            }
        },
        detach_destination: true,
        ..Hooks::default()
    }
}

/// Whatever happened: what the reports say is true, and nothing is lost.
fn assert_sound(world: &World, outcome: &super::common::Outcome) {
    let there = world.host.vm();
    match &outcome.report.outcome {
        Outcome::HandedOver => {
            assert_eq!(outcome.arrival.outcome, Arrival::RunningHere, "{:?}", outcome.report);
            world.assert_moved();
        }
        Outcome::RunningHere { reasons, .. } => {
            assert!(!reasons.is_empty());
            world.assert_back();
            let here = world.source_journal.verdict(outcome.id, Side::Source, None).unwrap();
            assert_eq!(here, Verdict::RunningHere);
            assert_ne!(outcome.arrival.outcome, Arrival::RunningHere);
        }
        Outcome::Unresolved { .. } => {
            assert!(!world.vm.is_running(), "frozen");
            let here = world.source_journal.verdict(outcome.id, Side::Source, None).unwrap();
            assert_eq!(here, Verdict::Unresolved);
            let there = there.expect("the destination has it");
            let runs = outcome.arrival.outcome == Arrival::RunningHere;
            assert_eq!(there.is_running(), runs);
            world.assert_same_memory();
        }
    }
}

/// The next attempt succeeds, under load.
fn assert_moves(world: &World, connections: u16) {
    world.network.cut(None);
    let outcome = under_load(&world.vm, 99, || {
        world.migrate(&SourceOptions { verify: true, ..options(connections) })
    });
    let (report, arrival) = (&outcome.report, &outcome.arrival);
    assert_eq!(report.outcome, Outcome::HandedOver, "{report:?}; {arrival:?}");
    world.assert_moved();
}

fn cut_at(world: &World, connections: u16, cut: Cut) {
    world.network.cut(Some(cut));
    let outcome = under_load(&world.vm, cut.bytes, || {
        world.migrate_with(&options(connections), &detaching())
    });
    assert_sound(world, &outcome);
    if matches!(outcome.report.outcome, Outcome::RunningHere { .. }) {
        assert_moves(world, connections);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        // What fails becomes a test of its own.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Any connection, any byte, either direction, with or without a way back.
    #[test]
    fn a_cut_anywhere_loses_nothing(
        connections in 1..4u16,
        connection in 0..4usize,
        share in 0.0..1.0f64,
        outgoing: bool,
        for_good: bool,
    ) {
        let world = World::new();
        let connection = connection.min(usize::from(connections));
        // Connection 0 is the main one: kernel, initrd and state outwards; answers inwards.
        let most = match (connection, outgoing) {
            (0, true) => 3_300_000.0,
            (0, false) => 700.0,
            (_, true) => 5_000_000.0 / f64::from(connections),
            (_, false) => 60.0,
        };
        let bytes = (share * most) as u64;
        cut_at(&world, connections, Cut { connection, bytes, outgoing, for_good });
    }

    /// The end of the main connection, where the hand-over is.
    #[test]
    fn a_cut_around_the_commit_loses_nothing(
        back in 0..800u64,
        outgoing: bool,
        for_good: bool,
    ) {
        let world = World::new();
        let probe = World::new();
        probe.migrate(&options(1));
        let (out, in_) = probe.network.traffic()[0];
        let bytes = if outgoing { out } else { in_ }.saturating_sub(back);
        cut_at(&world, 1, Cut { connection: 0, bytes, outgoing, for_good });
    }

    #[test]
    fn a_cancel_anywhere_is_clean_or_too_late(
        connection in 0..3usize,
        share in 0.0..1.0f64,
        outgoing: bool,
        there: bool,
        ended: bool,
    ) {
        let world = World::new();
        let most = match (connection, outgoing) {
            (0, true) => 3_300_000.0,
            (0, false) => 700.0,
            (_, true) => 2_500_000.0,
            (_, false) => 60.0,
        };
        let at = Cut { connection, bytes: (share * most) as u64, outgoing, for_good: false };
        let outcome = world.migrate_cancelled(&options(2), at, there, ended);
        if ended && matches!(&outcome.report.outcome, Outcome::RunningHere { cause, .. } if *cause == Cause::GuestEnded) {
            // The guest is gone, and stays as it was: nobody resumed it.
            prop_assert!(!world.vm.is_tracking());
            prop_assert!(outcome.arrival.outcome != Arrival::RunningHere);
        } else {
            assert_sound(&world, &outcome);
            if matches!(outcome.report.outcome, Outcome::RunningHere { .. }) {
                assert_moves(&world, 1);
            }
        }
    }
}

#[test]
fn every_reason_of_a_refusal_is_known_at_both_ends() {
    for late in [false, true] {
        let world = World::new();
        let reasons = ["this CPU lacks avx2", "there is no disk root.img"];
        match late {
            false => world.host.refuse(&reasons),
            true => world.host.refuse_to_prepare(&reasons),
        }
        let outcome = world.migrate(&options(2));
        let reasons: Vec<String> = reasons.map(str::to_owned).into();
        let cause = Cause::Refused;
        let expected = Outcome::RunningHere { cause, reasons: reasons.clone() };
        assert_eq!(outcome.report.outcome, expected);
        assert_eq!(outcome.arrival.outcome, Arrival::NotHere { cause, reasons });
        assert_eq!(outcome.report.data_pages, 0, "before any page moved");
        world.assert_back();
        world.host.refuse(&[]);
        world.host.refuse_to_prepare(&[]);
        assert_moves(&world, 2);
    }
}

#[test]
fn an_error_at_the_source_leaves_the_vm_here() {
    for operation in [
        Operation::StartTracking,
        Operation::Flush,
        Operation::Collect,
        Operation::Pause,
        Operation::Save,
        Operation::Release,
    ] {
        for mode in [Mode::Precopy, Mode::Cold] {
            let world = World::new();
            world.vm.fail(operation, 1);
            let outcome = world.migrate(&SourceOptions { mode, ..options(1) });
            let cold_skips = [Operation::StartTracking, Operation::Collect];
            if mode == Mode::Cold && cold_skips.contains(&operation) {
                assert_eq!(outcome.report.outcome, Outcome::HandedOver);
                continue;
            }
            match &outcome.report.outcome {
                Outcome::RunningHere { cause: Cause::Failed, reasons } => {
                    assert!(reasons[0].contains(&format!("{operation:?}")), "{reasons:?}");
                }
                other => panic!("{operation:?}: {other:?}"),
            }
            assert_sound(&world, &outcome);
            match &outcome.arrival.outcome {
                Arrival::NotHere { cause: Cause::PeerAborted, reasons } => {
                    assert!(reasons[0].contains(&format!("{operation:?}")), "{reasons:?}");
                }
                other => panic!("{operation:?}: {other:?}"),
            }
            assert_moves(&world, 1);
        }
    }
}

#[test]
fn an_error_at_the_destination_leaves_the_vm_at_the_source() {
    for operation in [Operation::Load, Operation::CheckOwnership] {
        let world = World::new();
        world.host.fail(operation, 1);
        let outcome = world.migrate(&options(2));
        match &outcome.report.outcome {
            Outcome::RunningHere { cause: Cause::PeerAborted, reasons } => {
                assert!(reasons[0].contains(&format!("{operation:?}")), "{reasons:?}");
            }
            other => panic!("{operation:?}: {other:?}"),
        }
        assert_sound(&world, &outcome);
    }
}

#[test]
fn disks_that_cannot_be_had_after_the_commit_are_waited_for() {
    for operation in [Operation::TakeOwnership, Operation::Start] {
        let world = World::new();
        world.host.fail(operation, 2);
        let outcome = world.migrate(&options(1));
        assert_eq!(outcome.report.outcome, Outcome::HandedOver);
        world.assert_moved();
    }
}

#[test]
fn disks_that_cannot_be_taken_back_are_waited_for() {
    let world = World::new();
    world.vm.fail(Operation::Release, 1);
    world.vm.fail(Operation::Reclaim, 2);
    let outcome = world.migrate(&options(1));
    assert_sound(&world, &outcome);
    assert_moves(&world, 1);
}

#[test]
fn a_guest_that_an_operator_paused_arrives_paused_or_stays_paused() {
    for fails in [false, true] {
        for mode in [Mode::Precopy, Mode::Cold] {
            let world = World::new();
            world.vm.operator_pause(true);
            if fails {
                world.host.fail(Operation::Load, 1);
            }
            let outcome = world.migrate(&SourceOptions { mode, ..options(1) });
            assert!(!world.vm.is_running());
            if fails {
                assert!(matches!(outcome.report.outcome, Outcome::RunningHere { .. }));
            } else {
                assert_eq!(outcome.report.outcome, Outcome::HandedOver);
                assert!(!world.host.vm().unwrap().is_running(), "it arrives paused");
                world.assert_same_memory();
            }
        }
    }
}

/// The guest writes a page as soon as it is sent, and no pause is short enough.
fn never_converges(world: &World, cancel_at: Option<usize>) -> Report {
    let limits = Limits { rounds: 3, dirty_pages: 0, ..Limits::default() };
    let options = SourceOptions {
        limits,
        on_stall: OnStall::Throttle,
        downtime: std::time::Duration::ZERO,
        ..options(1)
    };
    let hooks = Hooks {
        progress: &|progress, control| {
            let steps = world.vm.throttles().len();
            if progress.phase == SourcePhase::Copying && cancel_at.is_some_and(|at| steps >= at) {
                control.cancel();
            }
        },
        ..Hooks::default()
    };
    world.vm.guest_write(migration::Gfn(0), b"again").unwrap();
    world.vm.set_eager(migration::Gfn(0));
    let outcome = world.migrate_with(&options, &hooks);
    assert_sound(world, &outcome);
    outcome.report
}

#[test]
fn a_guest_that_does_not_converge_is_slowed_down_and_no_longer_than_needed() {
    let world = World::new();
    let report = never_converges(&world, None);
    assert_eq!(report.outcome, Outcome::HandedOver);
    assert!(report.stall.unwrap().contains("pages/s"));
    let throttles = world.vm.throttles();
    let (last, steps) = throttles.split_last().unwrap();
    assert!(last.is_empty(), "undone: {throttles:?}");
    assert!(steps.len() > 1 && steps.windows(2).all(|two| two[1][0] <= two[0][0]), "{throttles:?}");
    assert!(
        steps.iter().all(|run| run[0] >= 0.1 && run[1] == 1.0),
        "who does not write: {throttles:?}"
    );
    assert_eq!(report.rounds.last().unwrap().vcpu_run[0], 0.1, "as far as it may be");

    let world = World::new();
    let report = never_converges(&world, Some(2));
    assert!(matches!(report.outcome, Outcome::RunningHere { cause: Cause::Cancelled, .. }));
    assert!(world.vm.throttles().last().unwrap().is_empty(), "undone by the cancel");
}

#[test]
fn a_guest_that_does_not_converge_is_stopped_or_left_alone() {
    for on_stall in [OnStall::Stop, OnStall::Cancel] {
        let world = World::new();
        let limits = Limits { rounds: 3, dirty_pages: 0, ..Limits::default() };
        // Nothing is ever fast enough, and every round leaves something.
        let options =
            SourceOptions { limits, on_stall, downtime: std::time::Duration::ZERO, ..options(1) };
        let outcome = world.migrate_with(
            &options,
            &Hooks {
                progress: &|progress, _| {
                    if progress.phase == SourcePhase::Copying {
                        world.vm.guest_write(migration::Gfn(0), b"again").unwrap();
                    }
                },
                ..Hooks::default()
            },
        );
        match on_stall {
            OnStall::Stop => assert_eq!(outcome.report.outcome, Outcome::HandedOver),
            _ => assert!(
                matches!(
                    &outcome.report.outcome,
                    Outcome::RunningHere { cause: Cause::NotConverging, .. } | Outcome::HandedOver
                ),
                "{:?}",
                outcome.report.outcome
            ),
        }
        assert_sound(&world, &outcome);
    }
}

#[test]
fn an_operator_resolves_what_nobody_can_answer() {
    use migration::handover::Owner;
    for owner in [Owner::Here, Owner::There] {
        let world = World::new();
        // Signs of life would come between what is counted.
        let mut options = options(1);
        options.timing.alive = std::time::Duration::from_secs(20);
        options.timing.dead = std::time::Duration::from_secs(40);
        // COMMIT arrives; RESUMED, the last on the way back, does not, and nobody can be asked.
        let probe = World::new();
        probe.migrate(&options);
        let bytes = probe.network.traffic()[0].1.saturating_sub(20);
        world.network.cut(Some(Cut { connection: 0, bytes, outgoing: false, for_good: true }));
        let journal = world.source_journal.clone();
        let outcome = world.migrate_with(
            &options,
            &Hooks {
                detach_destination: true,
                progress: &|progress, control| {
                    if progress.phase != SourcePhase::Unresolved || progress.note.is_none() {
                        return;
                    }
                    if owner == Owner::Here {
                        // The operator knows what the source cannot: that host is no more.
                        world.host.vm().unwrap().kill();
                    }
                    journal.resolve(control.id(), Side::Source, owner).unwrap();
                },
                ..Hooks::default()
            },
        );
        let entry = world.source_journal.list().unwrap().remove(0);
        match owner {
            Owner::Here => {
                assert!(matches!(outcome.report.outcome, Outcome::RunningHere { .. }));
                assert!(world.vm.is_running() && world.vm.owns_disks());
                assert_eq!(entry.state, EntryState::RunningHere);
            }
            Owner::There => {
                assert_eq!(outcome.report.outcome, Outcome::HandedOver);
                assert!(!world.vm.is_running());
                assert_eq!(entry.state, EntryState::HandedOver);
            }
        }
    }
}
