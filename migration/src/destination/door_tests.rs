//! Peers that never stop: whoever waits for the door's threads must not depend on them.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::door::Door;
use super::tests::{offer, small_layout};
use super::Input;
use crate::journal::Journal;
use crate::link::Timing;
use crate::simulated::LocalNetwork;
use crate::stream::session::Alive;
use crate::stream::{encode_layout, RecordHeader, RecordWriter, StreamKind};
use crate::transport::{Connector, Stream};

/// Far longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a door until `peer` has returned, and closes it; fails if it does not end then.
fn with_door(
    accept: Duration,
    peer: impl FnOnce(&LocalNetwork, &mpsc::Receiver<Input>) + Send + 'static,
) {
    let (ending, ended) = mpsc::channel();
    // Left behind where it hangs.
    let door = thread::spawn(move || {
        let directory = tempfile::tempdir().unwrap();
        let journal = Journal::open(directory.path()).unwrap();
        let network = LocalNetwork::new();
        let (sender, inbox) = mpsc::channel();
        let door = Door::new(journal, Timing { accept, ..Timing::default() }, Some(sender));
        thread::scope(|scope| {
            scope.spawn(|| door.serve(scope, &network));
            peer(&network, &inbox);
            door.close();
        });
        ending.send(()).unwrap();
    });
    if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("the door does not close");
    }
    door.join().unwrap();
}

/// An optional record of a type that nobody knows.
fn nothing(sequence: u64) -> [u8; 32] {
    let header =
        RecordHeader { record_type: 0x8001, flags: 1, payload_checksum: 0, length: 0, sequence };
    header.encode()
}

/// Connects for a purpose, and then says nothing of meaning until the other end hangs up.
fn babble(network: &LocalNetwork, kind: StreamKind) -> thread::JoinHandle<()> {
    let transport = network.connect(Duration::ZERO).unwrap();
    thread::spawn(move || {
        let mut out = Stream(transport);
        drop(RecordWriter::new(out.clone(), kind).unwrap());
        let records = (0..).map(nothing);
        for record in records {
            if out.write_all(&record).is_err() {
                return;
            }
        }
    })
}

#[test]
fn who_never_says_what_for_is_shut_out() {
    let kinds = [StreamKind::Migration, StreamKind::Pages, StreamKind::Query];
    with_door(Duration::from_millis(100), move |network, _| {
        let started = Instant::now();
        for peer in kinds.map(|kind| babble(network, kind)) {
            peer.join().unwrap();
        }
        assert!(started.elapsed() < PATIENCE);
    });
}

#[test]
fn a_closed_door_waits_for_nobody_who_babbles() {
    for kind in [StreamKind::Migration, StreamKind::Pages, StreamKind::Query] {
        with_door(Duration::from_millis(100), move |network, _| drop(babble(network, kind)));
    }
}

#[test]
fn an_offer_that_nobody_takes_does_not_keep_the_door_open() {
    with_door(Duration::from_secs(10), |network, inbox| {
        let transport = network.connect(Duration::ZERO).unwrap();
        let mut out = RecordWriter::new(Stream(transport), StreamKind::Migration).unwrap();
        offer(&mut out, false, &encode_layout(&small_layout()).unwrap()).unwrap();
        // It came just when the receiver was told to stop.
        assert!(matches!(inbox.recv_timeout(PATIENCE), Ok(Input::Offer { .. })));
        thread::spawn(move || while out.send(&Alive {}).is_ok() {});
    });
}
