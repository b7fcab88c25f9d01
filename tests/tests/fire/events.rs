//! What guests and operators do in the middle of a migration: the table of docs/PROTOCOL.md, section 8.2.

use std::sync::Arc;

use serde_json::Value;
use tests::fire::{moves, runs, until, Case, Fault, Mode, Phase, Place, Scene};
use tests::proxy::Held;
use tests::{add, Migrating, Need, Suite, Vm};

const RUNNING: [Phase; 3] = [Phase::Offering, Phase::Preparing, Phase::Copying];
const PAUSED: [Phase; 2] = [Phase::Stopping, Phase::Loaded];
const COMMITTED: [Phase; 2] = [Phase::CommitSent, Phase::Resumed];

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    add!(suite, needs;
        a_guest_that_reboots_arrives_as_it_is_then,
        a_guest_that_powers_off_ends_at_the_source,
        a_guest_that_crashes_ends_at_the_source,
        an_operator_pauses_until_the_commit,
        an_operator_resumes_until_the_commit,
        a_paused_guest_that_does_not_move_stays_paused,
        the_power_button_is_for_a_guest_that_runs,
        a_reset_is_for_a_guest_that_runs,
        an_operator_kills_until_the_commit,
        a_cancel_is_in_time_until_the_commit,
        a_cancel_at_the_destination_is_in_time_until_the_decision,
        a_resolve_is_for_what_is_unresolved,
        what_came_of_an_older_migration_is_no_answer,
    );
}

/// What is left of a migration that stood still: the VM, the place that it came from, the other one, and the
/// guest's last report before.
type Stood = (Vm, Arc<Place>, Arc<Place>, Value);

/// A migration that stands still in a phase.
struct Standing {
    scene: Scene,
    migrating: Migrating,
    held: Held,
}

impl Standing {
    #[track_caller]
    fn at(phase: Phase) -> Self {
        Self::of(Scene::start(), phase)
    }

    #[track_caller]
    fn of(scene: Scene, phase: Phase) -> Self {
        // Where it stands is the same for all faults but a few.
        let case = Case { fault: Fault::CutControl, phase, connections: 2, mode: Mode::Precopy };
        let held = scene.proxy.hold(case.spot());
        let migrating = scene.migrate(&["--connections", "2", "--dead-after", "60s"]);
        held.wait();
        Self { scene, migrating, held }
    }

    /// It goes on, and the VM arrives. Gives its process at the destination.
    #[track_caller]
    fn arrives(self) -> Stood {
        self.held.release();
        let finished = self.migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let id = self.scene.id();
        let Scene { source, destination, here, there, before, .. } = self.scene;
        source.unwrap().ends_well();
        assert_eq!(here.verdict(&id).as_deref(), Some("handed-over"));
        assert_eq!(there.verdict(&id).as_deref(), Some("running-here"));
        (destination.unwrap(), here, there, before)
    }

    /// It goes on, and the VM stays. Gives its process; the one at the destination has ended, and
    /// said `why`.
    #[track_caller]
    fn stays(mut self, why: &str) -> Stood {
        self.held.release();
        let finished = self.migrating.end();
        assert_eq!(finished.code, Some(1), "{finished:#?}");
        let gone = self.scene.destination().end();
        assert_eq!(gone.code, Some(1), "{gone:#?}");
        assert!(gone.stderr.contains(why), "{gone:#?}");
        let id = self.scene.id();
        let Scene { source, here, there, before, .. } = self.scene;
        assert_eq!(here.verdict(&id).as_deref(), Some("running-here"));
        assert_ne!(there.verdict(&id).as_deref(), Some("running-here"));
        (source.unwrap(), here, there, before)
    }

    /// The command is refused in this phase, and changes nothing.
    #[track_caller]
    fn refuses(&self, command: &str) {
        let refused = self.scene.here.host.cli(&[command, "vm"]);
        assert_eq!(refused.code, Some(5), "{refused:#?}");
        assert!(refused.stderr.contains("handed over"), "{refused:#?}");
    }
}

/// The VM `vm` of `here` runs, and moves.
#[track_caller]
fn runs_and_moves((mut vm, here, there, before): Stood) {
    runs(&mut vm, &before);
    moves(vm, &here, &there, &[]).kill_9();
}

/// As [`runs_and_moves`], of the VM that has arrived at `there`.
#[track_caller]
fn runs_and_moves_back((vm, here, there, before): Stood) {
    runs_and_moves((vm, there, here, before));
}

fn a_guest_that_reboots_arrives_as_it_is_then() {
    for phase in RUNNING {
        let mut standing = Standing::at(phase);
        let source = standing.scene.source();
        source.send("reboot");
        source.console.event("reboot");
        source.console.event("ready");
        standing.scene.before = standing.scene.source().report();
        runs_and_moves_back(standing.arrives());
    }
}

fn a_guest_that_powers_off_ends_at_the_source() {
    for phase in RUNNING {
        let mut standing = Standing::at(phase);
        standing.scene.source().send("poweroff");
        standing.scene.source().ends_well();
        let (_, here, ..) = standing.stays("guest ended");
        assert_eq!(here.host.json(&["list"]), Value::Array(Vec::new()));
    }
}

fn a_guest_that_crashes_ends_at_the_source() {
    for phase in RUNNING {
        let mut standing = Standing::at(phase);
        standing.scene.source().send("triple");
        let finished = standing.scene.source().end();
        assert_eq!(finished.code, Some(3), "{finished:#?}");
        standing.stays("guest ended");
    }
}

fn an_operator_pauses_until_the_commit() {
    for phase in [RUNNING.as_slice(), &PAUSED].concat() {
        let standing = Standing::at(phase);
        standing.scene.here.host.ok(&["pause", "vm"]);
        let arrived = standing.arrives();
        assert_eq!(arrived.2.status().as_deref(), Some("paused"), "{phase:?}");
        assert_eq!(arrived.0.console.last_beat(), None, "{phase:?}: it has run");
        arrived.2.host.ok(&["resume", "vm"]);
        runs_and_moves_back(arrived);
    }
    for phase in COMMITTED {
        let standing = Standing::at(phase);
        standing.refuses("pause");
        runs_and_moves_back(standing.arrives());
    }
}

fn an_operator_resumes_until_the_commit() {
    let paused = || {
        let scene = Scene::start();
        scene.here.host.ok(&["pause", "vm"]);
        scene
    };
    for phase in [RUNNING.as_slice(), &PAUSED].concat() {
        let standing = Standing::of(paused(), phase);
        standing.scene.here.host.ok(&["resume", "vm"]);
        runs_and_moves_back(standing.arrives());
    }
    for phase in COMMITTED {
        let standing = Standing::of(paused(), phase);
        standing.refuses("resume");
        let arrived = standing.arrives();
        assert_eq!(arrived.2.status().as_deref(), Some("paused"));
        arrived.2.host.ok(&["resume", "vm"]);
        runs_and_moves_back(arrived);
    }
}

fn a_paused_guest_that_does_not_move_stays_paused() {
    for phase in [RUNNING.as_slice(), &PAUSED].concat() {
        let standing = Standing::at(phase);
        standing.scene.here.host.ok(&["pause", "vm"]);
        standing.scene.here.host.ok(&["cancel", "vm"]);
        let stayed = standing.stays("");
        assert_eq!(stayed.1.status().as_deref(), Some("paused"), "{phase:?}");
        stayed.1.host.ok(&["resume", "vm"]);
        runs_and_moves(stayed);
    }
}

fn the_power_button_is_for_a_guest_that_runs() {
    for phase in RUNNING {
        let mut standing = Standing::at(phase);
        // Waits for the end of the VM, which comes when the migration has been given up.
        standing.scene.here.host.ok(&["stop", "vm"]);
        standing.scene.source().console.event("power-button");
        standing.scene.source().ends_well();
        standing.stays("guest ended");
    }
    for phase in [PAUSED, COMMITTED].concat() {
        let standing = Standing::at(phase);
        let refused = standing.scene.here.host.cli(&["stop", "vm"]);
        assert_eq!(refused.code, Some(5), "{phase:?}: {refused:#?}");
        runs_and_moves_back(standing.arrives());
    }
}

fn a_reset_is_for_a_guest_that_runs() {
    for phase in RUNNING {
        let mut standing = Standing::at(phase);
        standing.scene.here.host.ok(&["reset", "vm"]);
        // The line that was cut off.
        standing.scene.source().console.may_begin_within_a_line();
        standing.scene.source().console.event("ready");
        standing.scene.before = standing.scene.source().report();
        runs_and_moves_back(standing.arrives());
    }
    for phase in [PAUSED, COMMITTED].concat() {
        let standing = Standing::at(phase);
        let refused = standing.scene.here.host.cli(&["reset", "vm"]);
        assert_eq!(refused.code, Some(5), "{phase:?}: {refused:#?}");
        runs_and_moves_back(standing.arrives());
    }
}

fn an_operator_kills_until_the_commit() {
    for phase in [RUNNING.as_slice(), &PAUSED].concat() {
        let mut standing = Standing::at(phase);
        standing.scene.here.host.ok(&["kill", "vm"]);
        standing.scene.source().ends_well();
        let (_, here, ..) = standing.stays("guest ended");
        assert_eq!(here.host.json(&["list"]), Value::Array(Vec::new()), "{phase:?}");
    }
    for phase in COMMITTED {
        let standing = Standing::at(phase);
        standing.refuses("kill");
        runs_and_moves_back(standing.arrives());
    }
}

fn a_cancel_is_in_time_until_the_commit() {
    for phase in [RUNNING.as_slice(), &PAUSED].concat() {
        let standing = Standing::at(phase);
        standing.scene.here.host.ok(&["cancel", "vm"]);
        runs_and_moves(standing.stays(""));
    }
    for phase in COMMITTED {
        let standing = Standing::at(phase);
        standing.refuses("cancel");
        runs_and_moves_back(standing.arrives());
    }
}

fn a_cancel_at_the_destination_is_in_time_until_the_decision() {
    for phase in [Phase::Copying, Phase::Stopping, Phase::Loaded] {
        let standing = Standing::at(phase);
        standing.scene.there.host.ok(&["cancel", "vm"]);
        runs_and_moves(standing.stays("cancelled"));
    }
    // COMMIT is on its way: the destination decides before it comes, and the source hears of it.
    let standing = Standing::at(Phase::CommitSent);
    standing.scene.there.host.ok(&["cancel", "vm"]);
    runs_and_moves(standing.stays("cancelled"));
    // So it does when a signal ends its process, which stays until then.
    let mut standing = Standing::at(Phase::CommitSent);
    standing.scene.destination().terminate();
    let id = standing.scene.id();
    until("the decision", || standing.scene.there.verdict(&id).as_deref() == Some("not-here"));
    runs_and_moves(standing.stays("cancelled"));
    let standing = Standing::at(Phase::Resumed);
    let refused = standing.scene.there.host.cli(&["cancel", "vm"]);
    assert_eq!(refused.code, Some(5), "{refused:#?}");
    runs_and_moves_back(standing.arrives());
}

fn a_resolve_is_for_what_is_unresolved() {
    for phase in [RUNNING.as_slice(), &PAUSED, &COMMITTED].concat() {
        let standing = Standing::at(phase);
        for owner in ["here", "there"] {
            let (here, id) = (&standing.scene.here.host, standing.scene.id());
            let refused = here.cli(&["resolve", &id, "--owner", owner]);
            assert_eq!(refused.code, Some(5), "{phase:?}: {refused:#?}");
        }
        until("an answer", || standing.scene.here.status().is_some());
        runs_and_moves_back(standing.arrives());
    }
}

/// The command asks what was written down when the process is gone that it was waiting for.
fn what_came_of_an_older_migration_is_no_answer() {
    let (here, there) = (Place::plain(), Place::plain());
    let vm = moves(Scene::vm(&here), &here, &there, &[]);
    let vm = moves(vm, &there, &here, &[]);
    let Standing { mut scene, migrating, held } =
        Standing::of(Scene::with(vm, here, there, None), Phase::Loaded);
    scene.source.take().unwrap().kill_9();
    held.release();
    let finished = migrating.end();
    assert_eq!((finished.code, finished.stdout.as_str()), (Some(1), ""), "{finished:#?}");
    scene.there.host.ok(&["resolve", &scene.id(), "--owner", "here"]);
    runs(scene.destination.as_mut().unwrap(), &scene.before);
}
