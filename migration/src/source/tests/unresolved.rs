//! From a COMMIT without an answer on, connections that are lost have no say.

use std::time::Instant;

use super::*;
use crate::handover::SourceEvent;
use crate::source::engine::{Engine, Surroundings, Waited};
use crate::source::peer::Message;

#[test]
fn an_operator_is_heard_and_a_lost_connection_is_not() {
    let vm = SimulatedVm::new(small_layout()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(directory.path()).unwrap();
    let network = LocalNetwork::new();
    let control = SourceControl::new(MigrationId::random().unwrap());
    let options = SourceOptions::default();
    let (sender, inbox) = mpsc::channel();
    thread::scope(|scope| {
        let around = Surroundings {
            scope,
            vm: &vm,
            connector: &network,
            journal: &journal,
            options: &options,
            control: &control,
            progress: &|_| {},
        };
        let mut engine = Engine::new(around, small_offering(), sender.clone(), inbox);
        engine.phase = SourcePhase::Committing;
        let zero = Duration::ZERO;
        let resumed = Message::Resumed { own: zero, resume: zero, cpu: zero };
        sender.send(Input::Peer(resumed)).unwrap();
        sender.send(Input::Resolved(Owner::There)).unwrap();
        engine.handle(SourceEvent::Failed(Cause::Protocol));
        // A thread that is left.
        let _ = sender.send(Input::Lost(Cause::Lost, "late".to_owned()));
        assert_eq!(engine.phase, SourcePhase::Unresolved);
        assert!(matches!(engine.wait(Instant::now()), Ok(Waited::Nothing)));
        assert_eq!(engine.resolved, Some(Owner::There));
    });
}
