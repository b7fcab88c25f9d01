//! Frames that reach the old host of a guest: they follow it, or it has them if it stays; none comes twice.

use std::thread;
use std::time::{Duration, Instant};

use migration::report::Outcome;
use migration::simulated::{Operation, SimulatedVm};
use migration::source::{LateOptions, SourceOptions};

use super::common::{self, World};

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

fn options(late: LateOptions) -> SourceOptions {
    SourceOptions { late, ..common::options(1) }
}

/// A VM with a frame before the pause and two in it, the last of them a broadcast.
fn world() -> World {
    let world = World::new();
    world.vm.add_cards();
    world.vm.frame_comes(0, b"before");
    world.vm.frames_of_the_pause(&[(1, b"first"), (0, b"\xffbroadcast")]);
    world
}

fn received(vm: &SimulatedVm) -> Vec<(u16, Vec<u8>)> {
    vm.received().into_iter().map(|frame| (frame.card, frame.bytes)).collect()
}

fn frame(card: u16, bytes: &[u8]) -> (u16, Vec<u8>) {
    (card, bytes.to_vec())
}

#[test]
fn frames_of_the_pause_follow_and_later_ones_that_come_here_alone() {
    let world = world();
    let outcome = thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + PATIENCE;
            while !world.host.vm().is_some_and(|vm| vm.is_running()) {
                assert!(Instant::now() < deadline, "it does not run there");
                thread::yield_now();
            }
            world.vm.frame_comes(0, b"\xffbroadcast to both");
            world.vm.frame_comes(0, b"last");
        });
        let late = LateOptions { quiet: Duration::from_secs(2), ..LateOptions::default() };
        world.migrate(&options(late))
    });
    assert_eq!(outcome.report.outcome, Outcome::HandedOver);
    world.assert_moved();
    assert_eq!(received(&world.vm), [frame(0, b"before")]);
    let there = world.host.vm().unwrap();
    let all = [frame(1, b"first"), frame(0, b"\xffbroadcast"), frame(0, b"last")];
    assert_eq!(received(&there), all);
    let report = outcome.report.late_frames.unwrap();
    assert_eq!((report.frames, report.bytes), (3, 19), "{report:?}");
    assert!(!report.at_limit && !report.interrupted, "{report:?}");
    assert!(outcome.arrival.confirmed, "DONE comes behind them");
}

#[test]
fn a_guest_that_stays_has_the_frames_of_its_pause() {
    let world = world();
    world.host.fail(Operation::CheckOwnership, 1);
    let outcome = world.migrate(&options(LateOptions::default()));
    assert!(matches!(outcome.report.outcome, Outcome::RunningHere { .. }), "{:?}", outcome.report);
    world.assert_back();
    let all = [frame(0, b"before"), frame(1, b"first"), frame(0, b"\xffbroadcast")];
    assert_eq!(received(&world.vm), all);
    assert_eq!(outcome.report.late_frames, None);
}

#[test]
fn nothing_is_forwarded_where_that_is_off() {
    let world = world();
    let outcome = world.migrate(&options(LateOptions { forward: false, ..LateOptions::default() }));
    assert_eq!(outcome.report.outcome, Outcome::HandedOver);
    assert_eq!(outcome.report.late_frames, None);
    assert!(received(&world.host.vm().unwrap()).is_empty());
}

#[test]
fn forwarding_ends_at_its_limit() {
    let world = world();
    let late = LateOptions { limit: Duration::ZERO, ..LateOptions::default() };
    let outcome = world.migrate(&options(late));
    assert_eq!(outcome.report.outcome, Outcome::HandedOver);
    assert!(outcome.report.late_frames.unwrap().at_limit);
    assert!(outcome.arrival.confirmed);
}
