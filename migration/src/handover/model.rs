//! The hand-over under every order of loss, duplication, delay, crash and restart.
//!
//! The state is both processes, what their journals hold, and the messages under way. The network
//! may lose, repeat, delay and reorder anything, which is more than TCP can do to it. A process may
//! die between any two of its actions. Whoever answers a verdict query on the destination's host
//! is another process that reads the same journal, as after a restart; a process that died comes
//! back without the VM and has nothing else to do.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeSet, VecDeque};

use stateright::{Checker, Model, Property};

use super::{
    step_destination, step_source, Cause, DestinationAction, DestinationEvent, DestinationPhase,
    SourceAction, SourceEvent, SourcePhase, Verdict,
};

type SourceStep = fn(SourcePhase, SourceEvent) -> (SourcePhase, Vec<SourceAction>);
type DestinationStep =
    fn(DestinationPhase, DestinationEvent) -> (DestinationPhase, Vec<DestinationAction>);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Offer,
    Accept,
    Refuse,
    Ready,
    /// The last pages, SYNC and the state.
    Everything,
    Loaded,
    Commit,
    Resumed,
    AbortFromSource,
    AbortFromDestination,
    Query,
    VerdictHere,
    VerdictNotHere,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Guest {
    /// No copy of the VM is in this process.
    Gone,
    Paused,
    Running,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum SourceEntry {
    Migrating,
    HandedOver,
    Unresolved,
    Here,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Source {
    alive: bool,
    phase: SourcePhase,
    queue: VecDeque<SourceAction>,
    guest: Guest,
    journal: SourceEntry,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Destination {
    alive: bool,
    phase: DestinationPhase,
    queue: VecDeque<DestinationAction>,
    guest: Guest,
    /// `Some(true)`: `running here`. Survives the process.
    decision: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    source: Source,
    destination: Destination,
    network: BTreeSet<Message>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    /// The process does the next thing on its list.
    SourceActs,
    DestinationActs,
    /// As [`Step::SourceActs`], but what it does fails.
    SourceActFails,
    DestinationActFails,
    Deliver(Message),
    /// Delivers it, and it stays on its way: a duplicate.
    Repeat(Message),
    Lose(Message),
    SourceEvent(SourceEvent),
    DestinationEvent(DestinationEvent),
    SourceDies,
    DestinationDies,
}

struct HandOver {
    source: SourceStep,
    destination: DestinationStep,
}

impl HandOver {
    fn real() -> Self {
        Self { source: step_source, destination: step_destination }
    }

    fn source_event(&self, state: &mut State, event: SourceEvent) {
        let (phase, actions) = (self.source)(state.source.phase, event);
        state.source.phase = phase;
        state.source.queue.extend(actions);
    }

    fn destination_event(&self, state: &mut State, event: DestinationEvent) {
        let (phase, actions) = (self.destination)(state.destination.phase, event);
        state.destination.phase = phase;
        state.destination.queue.extend(actions);
    }

    fn source_acts(&self, state: &mut State) {
        let Some(action) = state.source.queue.pop_front() else { return };
        let source = &mut state.source;
        match action {
            SourceAction::StopGuest => {
                source.guest = Guest::Paused;
                state.network.insert(Message::Everything);
            }
            SourceAction::JournalHandedOver | SourceAction::JournalConfirmed => {
                source.journal = SourceEntry::HandedOver;
            }
            SourceAction::JournalUnresolved => source.journal = SourceEntry::Unresolved,
            SourceAction::JournalHere => source.journal = SourceEntry::Here,
            SourceAction::ResumeGuest => source.guest = Guest::Running,
            SourceAction::SendCommit => drop(state.network.insert(Message::Commit)),
            SourceAction::SendAbort => drop(state.network.insert(Message::AbortFromSource)),
            SourceAction::Ask | SourceAction::Withdraw => {
                state.network.insert(Message::Query);
            }
            SourceAction::StartTracking
            | SourceAction::StopTracking
            | SourceAction::ReleaseOwnership
            | SourceAction::ReclaimOwnership
            | SourceAction::SendDone => {}
        }
    }

    /// Before COMMIT a failing action is an event, and the rest of the list is dropped.
    fn source_act_fails(&self, state: &mut State) {
        state.source.queue.clear();
        let event = match state.source.phase {
            SourcePhase::Committing => SourceEvent::NotCommitted,
            _ => SourceEvent::Failed(Cause::Failed),
        };
        self.source_event(state, event);
    }

    fn destination_acts(&self, state: &mut State) {
        let Some(action) = state.destination.queue.pop_front() else { return };
        let network = &mut state.network;
        match action {
            DestinationAction::Accept => drop(network.insert(Message::Accept)),
            DestinationAction::SendRefuse => drop(network.insert(Message::Refuse)),
            DestinationAction::SendReady => drop(network.insert(Message::Ready)),
            DestinationAction::LoadState => state.destination.guest = Guest::Paused,
            DestinationAction::SendLoaded => drop(network.insert(Message::Loaded)),
            DestinationAction::DecideHere | DestinationAction::DecideNotHere => {
                let wanted = action == DestinationAction::DecideHere;
                let here = *state.destination.decision.get_or_insert(wanted);
                let event = match here {
                    true => DestinationEvent::DecidedHere,
                    false => DestinationEvent::DecidedNotHere,
                };
                self.destination_event(state, event);
            }
            DestinationAction::TakeOwnership => {
                self.destination_event(state, DestinationEvent::Owned);
            }
            DestinationAction::ResumeGuest => {
                state.destination.guest = Guest::Running;
                self.destination_event(state, DestinationEvent::GuestResumed);
            }
            DestinationAction::SendResumed => drop(network.insert(Message::Resumed)),
            DestinationAction::SendAbort => drop(network.insert(Message::AbortFromDestination)),
            DestinationAction::Discard => state.destination.guest = Guest::Gone,
            DestinationAction::TellStuck | DestinationAction::JournalUnresolved => {}
        }
    }

    fn deliver(&self, state: &mut State, message: Message) {
        let to_source = |event| (Some(event), None);
        let to_destination = |event| (None, Some(event));
        let (source, destination) = match message {
            Message::Accept => to_source(SourceEvent::Accepted),
            Message::Refuse => to_source(SourceEvent::Failed(Cause::Refused)),
            Message::Ready => to_source(SourceEvent::Ready),
            Message::Loaded => to_source(SourceEvent::Loaded),
            Message::Resumed => to_source(SourceEvent::Resumed),
            Message::AbortFromDestination => to_source(SourceEvent::Failed(Cause::PeerAborted)),
            Message::VerdictHere => to_source(SourceEvent::Verdict(Verdict::RunningHere)),
            Message::VerdictNotHere => to_source(SourceEvent::Verdict(Verdict::NotHere)),
            Message::Offer => to_destination(DestinationEvent::Acceptable),
            Message::Everything => to_destination(DestinationEvent::AllReceived),
            Message::Commit => to_destination(DestinationEvent::Commit),
            Message::AbortFromSource => {
                to_destination(DestinationEvent::Failed(Cause::PeerAborted))
            }
            Message::Query => {
                // Another process of that host answers from the journal, with reclaim.
                let here = *state.destination.decision.get_or_insert(false);
                state.network.insert(match here {
                    true => Message::VerdictHere,
                    false => Message::VerdictNotHere,
                });
                (None, None)
            }
        };
        // A process handles an event when it has done what the one before it asked for.
        if let Some(event) = source.filter(|_| state.source.alive) {
            self.source_event(state, event);
        }
        if let Some(event) = destination.filter(|_| state.destination.alive) {
            self.destination_event(state, event);
        }
    }

    /// Whether whoever would get the message is not in the middle of something.
    fn can_deliver(state: &State, message: Message) -> bool {
        match message {
            Message::Query => true,
            Message::Offer | Message::Everything | Message::Commit | Message::AbortFromSource => {
                state.destination.queue.is_empty() || !state.destination.alive
            }
            _ => state.source.queue.is_empty() || !state.source.alive,
        }
    }

    /// What happens at the ends by itself.
    fn progress(state: &State) -> Vec<Step> {
        let mut steps = Vec::new();
        if state.source.alive && state.source.queue.is_empty() {
            match state.source.phase {
                SourcePhase::Copying => steps.push(Step::SourceEvent(SourceEvent::Converged)),
                SourcePhase::Unresolved => steps.push(Step::SourceEvent(SourceEvent::NoVerdict)),
                _ => {}
            }
        }
        if state.destination.alive && state.destination.queue.is_empty() {
            match state.destination.phase {
                DestinationPhase::Preparing => {
                    steps.push(Step::DestinationEvent(DestinationEvent::Prepared));
                }
                DestinationPhase::Loading => {
                    steps.push(Step::DestinationEvent(DestinationEvent::StateLoaded));
                }
                // It watches the journal, where others may have decided.
                DestinationPhase::Loaded | DestinationPhase::Unresolved
                    if state.destination.decision == Some(false) =>
                {
                    steps.push(Step::DestinationEvent(DestinationEvent::DecidedNotHere));
                }
                _ => {}
            }
        }
        steps
    }

    fn apply(&self, state: &mut State, step: Step) {
        match step {
            Step::SourceActs => self.source_acts(state),
            Step::DestinationActs => self.destination_acts(state),
            Step::SourceActFails => self.source_act_fails(state),
            Step::DestinationActFails => {
                state.destination.queue.clear();
                self.destination_event(state, DestinationEvent::NotDecided);
            }
            Step::Deliver(message) => {
                state.network.remove(&message);
                self.deliver(state, message);
            }
            Step::Repeat(message) => self.deliver(state, message),
            Step::Lose(message) => drop(state.network.remove(&message)),
            Step::SourceEvent(event) => self.source_event(state, event),
            Step::DestinationEvent(event) => self.destination_event(state, event),
            Step::SourceDies => {
                state.source.alive = false;
                state.source.guest = Guest::Gone;
                state.source.queue.clear();
            }
            Step::DestinationDies => {
                state.destination.alive = false;
                state.destination.guest = Guest::Gone;
                state.destination.queue.clear();
            }
        }
    }

    /// What becomes of `state` when from now on nobody dies and every message arrives once.
    fn heal(&self, state: &State) -> State {
        let mut state = state.clone();
        for _ in 0..200 {
            let step = if state.source.alive && !state.source.queue.is_empty() {
                Step::SourceActs
            } else if state.destination.alive && !state.destination.queue.is_empty() {
                Step::DestinationActs
            } else if let Some(message) = state.network.first() {
                Step::Deliver(*message)
            } else if let Some(step) = Self::progress(&state).first() {
                *step
            } else if state.source.alive && !state.source.phase.is_final() {
                Step::SourceEvent(SourceEvent::Failed(Cause::Lost))
            } else if state.destination.alive
                && !state.destination.phase.is_final()
                && state.destination.phase != DestinationPhase::Unresolved
            {
                Step::DestinationEvent(DestinationEvent::Failed(Cause::Lost))
            } else {
                return state;
            };
            self.apply(&mut state, step);
        }
        state
    }

    /// Whether it ended well: exactly one owner, or none for a good reason.
    fn settles(&self, state: &State) -> bool {
        let end = self.heal(state);
        let (source, destination) = (&end.source, &end.destination);
        let owners = [source.guest, destination.guest]
            .into_iter()
            .filter(|guest| *guest == Guest::Running)
            .count();
        match (owners, source.alive, destination.alive) {
            (1, _, _) => true,
            (0, true, true) => false,
            // The owner died, and the journals agree on who it was.
            (0, true, false) => {
                destination.decision == Some(true) && source.phase == SourcePhase::HandedOver
            }
            // The destination has the whole VM and cannot know, or never had it, or the source
            // had reclaimed it before it died.
            (0, false, true) => match destination.phase {
                DestinationPhase::Unresolved => destination.guest == Guest::Paused,
                // Once the source had handed it over, only by a decision.
                DestinationPhase::Discarded => {
                    destination.decision == Some(false)
                        || !matches!(
                            source.journal,
                            SourceEntry::HandedOver | SourceEntry::Unresolved
                        )
                }
                _ => false,
            },
            (0, false, false) => true,
            _ => false,
        }
    }
}

impl Model for HandOver {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            source: Source {
                alive: true,
                phase: SourcePhase::Offering,
                queue: VecDeque::new(),
                guest: Guest::Running,
                journal: SourceEntry::Migrating,
            },
            destination: Destination {
                alive: true,
                phase: DestinationPhase::Negotiating,
                queue: VecDeque::new(),
                guest: Guest::Gone,
                decision: None,
            },
            network: BTreeSet::from([Message::Offer]),
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.source.alive {
            steps.push(Step::SourceDies);
            match state.source.queue.front() {
                Some(action) => {
                    steps.push(Step::SourceActs);
                    if matches!(
                        action,
                        SourceAction::StartTracking
                            | SourceAction::StopGuest
                            | SourceAction::JournalHandedOver
                            | SourceAction::ReleaseOwnership
                    ) {
                        steps.push(Step::SourceActFails);
                    }
                }
                None if !state.source.phase.is_final() => {
                    for cause in [Cause::Lost, Cause::Cancelled] {
                        steps.push(Step::SourceEvent(SourceEvent::Failed(cause)));
                    }
                }
                None => {}
            }
        }
        if state.destination.alive {
            steps.push(Step::DestinationDies);
            match state.destination.queue.front() {
                Some(action) => {
                    steps.push(Step::DestinationActs);
                    if matches!(
                        action,
                        DestinationAction::DecideHere | DestinationAction::DecideNotHere
                    ) {
                        steps.push(Step::DestinationActFails);
                    }
                }
                None if !state.destination.phase.is_final() => {
                    for cause in [Cause::Lost, Cause::Cancelled, Cause::Failed, Cause::Refused] {
                        steps.push(Step::DestinationEvent(DestinationEvent::Failed(cause)));
                    }
                    if state.source.journal == SourceEntry::HandedOver {
                        let event = DestinationEvent::SourceHandedOver;
                        steps.push(Step::DestinationEvent(event));
                    }
                }
                None => {}
            }
        }
        steps.extend(Self::progress(state));
        for message in &state.network {
            steps.push(Step::Lose(*message));
            if Self::can_deliver(state, *message) {
                steps.push(Step::Deliver(*message));
                steps.push(Step::Repeat(*message));
            }
        }
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        self.apply(&mut next, step);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never twice", |_, state: &State| {
                state.source.guest != Guest::Running || state.destination.guest != Guest::Running
            }),
            Property::always("runs only where the journal says so", |_, state: &State| {
                let source = &state.source;
                let destination = &state.destination;
                (source.guest != Guest::Running
                    || matches!(source.journal, SourceEntry::Migrating | SourceEntry::Here))
                    && (destination.guest != Guest::Running || destination.decision == Some(true))
            }),
            Property::always("settles", |model: &Self, state| model.settles(state)),
            Property::sometimes("handed over", |_, state: &State| {
                state.source.phase == SourcePhase::HandedOver
                    && state.destination.phase == DestinationPhase::Running
            }),
            Property::sometimes("back after a lost acknowledgement", |_, state: &State| {
                state.source.phase == SourcePhase::RolledBack
                    && state.destination.decision == Some(false)
            }),
        ]
    }
}

fn check(model: HandOver) -> impl Checker<HandOver> {
    model.checker().threads(2).spawn_bfs().join()
}

#[test]
fn the_hand_over_is_safe_and_settles() {
    let checker = check(HandOver::real());
    checker.assert_properties();
    assert!(checker.is_done());
    println!("{} states, {} of them unique", checker.state_count(), checker.unique_state_count());
}

/// A broken variant of the hand-over, and the property that must notice.
fn assert_caught(model: HandOver, property: &'static str) {
    let checker = check(model);
    let found = checker.discovery(property);
    assert!(found.is_some(), "nobody noticed: {property}");
}

#[test]
fn resuming_on_a_lost_acknowledgement_is_caught() {
    fn resumes(phase: SourcePhase, event: SourceEvent) -> (SourcePhase, Vec<SourceAction>) {
        match (phase, event) {
            (SourcePhase::Committing, SourceEvent::Failed(Cause::Lost)) => (
                SourcePhase::RolledBack,
                vec![SourceAction::JournalHere, SourceAction::ResumeGuest],
            ),
            _ => step_source(phase, event),
        }
    }
    assert_caught(HandOver { source: resumes, ..HandOver::real() }, "never twice");
}

#[test]
fn committing_before_the_journal_is_caught() {
    fn commits_early(phase: SourcePhase, event: SourceEvent) -> (SourcePhase, Vec<SourceAction>) {
        let (next, mut actions) = step_source(phase, event);
        if next == SourcePhase::Committing && phase == SourcePhase::Stopping {
            actions.reverse();
        }
        (next, actions)
    }
    // The journal then fails after COMMIT has left, and the source goes on by itself.
    assert_caught(HandOver { source: commits_early, ..HandOver::real() }, "never twice");
}

#[test]
fn running_without_a_decision_is_caught() {
    fn runs_at_once(
        phase: DestinationPhase,
        event: DestinationEvent,
    ) -> (DestinationPhase, Vec<DestinationAction>) {
        match (phase, event) {
            (DestinationPhase::Loaded, DestinationEvent::Commit) => {
                (DestinationPhase::Owning, vec![DestinationAction::TakeOwnership])
            }
            _ => step_destination(phase, event),
        }
    }
    assert_caught(HandOver { destination: runs_at_once, ..HandOver::real() }, "never twice");
}

#[test]
fn dropping_a_loaded_vm_on_a_lost_connection_is_caught() {
    fn drops(
        phase: DestinationPhase,
        event: DestinationEvent,
    ) -> (DestinationPhase, Vec<DestinationAction>) {
        match (phase, event) {
            (DestinationPhase::Loaded, DestinationEvent::Failed(Cause::Lost)) => {
                (DestinationPhase::Discarded, vec![DestinationAction::Discard])
            }
            _ => step_destination(phase, event),
        }
    }
    assert_caught(HandOver { destination: drops, ..HandOver::real() }, "settles");
}

/// The order that was in the first draft: the checker found that a source whose disks could not be
/// given up went on, while the destination had read `handed over` in its journal.
#[test]
fn failing_after_handed_over_was_journalled_is_caught() {
    fn journals_first(phase: SourcePhase, event: SourceEvent) -> (SourcePhase, Vec<SourceAction>) {
        let (next, mut actions) = step_source(phase, event);
        if next == SourcePhase::Committing && phase == SourcePhase::Stopping {
            actions.swap(0, 1);
        }
        (next, actions)
    }
    assert_caught(HandOver { source: journals_first, ..HandOver::real() }, "never twice");
}
