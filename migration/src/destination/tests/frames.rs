//! Frames that reached the guest's old host.

use super::*;
use crate::simulated::SimulatedVm;
use crate::stream::session::{FrameWire, Frames};
use crate::vm::MAX_LATE_FRAME;

/// What the destination says of FRAMES like these after RESUMED.
fn frames_after_resumed(frames: Vec<(u16, Vec<u8>)>) -> (Arc<SimulatedVm>, bool) {
    let bench = Bench::new();
    let (report, ()) = bench.receive(|network| {
        let (mut main, _pages) = loaded(network);
        main.out.send(&Commit { run: true }).unwrap();
        let _: Resumed = next(&mut main.records);
        let wires = frames.iter().map(|(card, bytes)| FrameWire { card: *card, bytes });
        main.out.send(&Frames { frames: wires.collect() }).unwrap();
        let _ = main.out.send(&Done {});
        assert!(main.is_closed());
    });
    // Whatever they are: the guest is here.
    assert_eq!(report.outcome, Arrival::RunningHere);
    (bench.host.vm().unwrap(), report.confirmed)
}

#[test]
fn frames_come_after_resumed_in_order() {
    let frames = vec![(1, vec![1; 60]), (0, vec![2; MAX_LATE_FRAME]), (1, vec![3; 1])];
    let (vm, confirmed) = frames_after_resumed(frames.clone());
    let received: Vec<_> = vm.received().into_iter().map(|f| (f.card, f.bytes)).collect();
    assert_eq!(received, frames);
    assert!(confirmed);
}

#[test]
fn frames_that_cannot_be_end_the_connection_and_not_the_guest() {
    for bad in [(2, vec![0; 60]), (0, vec![0; MAX_LATE_FRAME + 1]), (0, vec![])] {
        let (vm, confirmed) = frames_after_resumed(vec![(0, vec![7; 60]), bad, (0, vec![8; 60])]);
        assert_eq!(vm.received().len(), 1, "what comes after it is not used");
        assert!(!confirmed);
    }
    let (vm, confirmed) = frames_after_resumed(vec![(0, vec![7; 60]); Frames::MOST + 1]);
    assert!(vm.received().is_empty() && !confirmed, "too many in one record");
}

#[test]
fn frames_before_their_time_are_refused() {
    assert_refused("Frames", |main, _| {
        main.out.send(&Frames { frames: vec![FrameWire { card: 0, bytes: &[1; 60] }] }).unwrap();
    });
}
