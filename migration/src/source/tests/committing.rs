//! What comes after COMMIT and before its answer.

use std::time::Instant;

use super::*;
use crate::handover::SourceEvent;
use crate::source::engine::{Engine, Surroundings, Waited};
use crate::source::peer::Message;
use crate::stream::Problem;

/// An engine that waits for RESUMED, and a way to its inbox.
fn committing(test: impl FnOnce(&mut Engine<'_, '_, '_>, &mpsc::Sender<Input>)) {
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
        test(&mut engine, &sender);
    });
}

fn resumed() -> Input {
    let zero = Duration::ZERO;
    Input::Peer(Message::Resumed { own: zero, resume: zero, cpu: zero })
}

#[test]
fn an_operator_is_heard_and_a_lost_connection_is_not() {
    committing(|engine, sender| {
        sender.send(resumed()).unwrap();
        sender.send(Input::Resolved(Owner::There)).unwrap();
        engine.handle(SourceEvent::Failed(Cause::Protocol));
        // A thread that is left.
        let _ = sender.send(Input::Lost(Cause::Lost, "late".to_owned()));
        assert_eq!(engine.phase, SourcePhase::Unresolved);
        assert!(matches!(engine.wait(Instant::now()), Ok(Waited::Nothing)));
        assert_eq!(engine.resolved, Some(Owner::There));
    });
}

#[test]
fn what_is_pushed_before_the_answer_counts_and_its_loss_is_one() {
    let limit = Duration::from_secs(10);
    committing(|engine, sender| {
        engine.pushing = 2;
        sender.send(Input::PassDone { index: 0, result: Ok(PassStats::default()) }).unwrap();
        sender.send(resumed()).unwrap();
        let message = engine.wait_for_message(limit, "resume the guest").unwrap();
        assert!(matches!(message, Message::Resumed { .. }));
        assert_eq!(engine.pushing, 1);
        let out = RecordWriter::new(Vec::new(), StreamKind::Pages).unwrap();
        let error = out.error(Problem::Truncated);
        sender.send(Input::PassDone { index: 1, result: Err(error.into()) }).unwrap();
        let failure = engine.wait_for_message(limit, "resume the guest").unwrap_err();
        assert_eq!(failure.cause, Cause::Lost);
        assert!(failure.reasons[0].contains("page connection 1"), "{:?}", failure.reasons);
    });
}

#[test]
fn who_stops_waiting_for_a_verdict_does_not_stop_what_follows_it() {
    committing(|engine, sender| {
        engine.phase = SourcePhase::HandedOver;
        for (asked, detached) in [(SourcePhase::Unresolved, false), (SourcePhase::HandedOver, true)]
        {
            sender.send(Input::Detach(asked)).unwrap();
            assert!(matches!(engine.wait(Instant::now()), Ok(Waited::Nothing)));
            assert_eq!(engine.detached, detached, "{asked:?}");
        }
    });
}
