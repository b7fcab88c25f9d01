//! One case, from the VM that runs to the one that runs then.

use std::sync::Arc;

use crate::migrating::Migrating;
use crate::proxy::{Cut, Edit, Held, On};
use crate::Vm;

use super::hurt::{feed, in_private_mounts, starve, SmallDisk, Thief};
use super::scene::{moves, runs, until, Place};
use super::{Case, Fault, Phase, Runs, Scene};

/// A byte of a record header's length, and one that every state has.
const HEADER_BYTE: usize = 9;
const STATE_BYTE: u64 = 40;

/// Runs a case with a VM of its own, which moves without a fault in the end; it fails by
/// panicking. Gives what came of it.
#[track_caller]
pub fn run(case: Case) -> Runs {
    let alone = |scene| finish(case, scene);
    match case.fault {
        Fault::DiskFull => in_private_mounts(|| alone(Scene::start_to(Place::with_small_disk()))),
        Fault::DiskTaken => alone(Scene::start_with_disk()),
        _ => alone(Scene::start()),
    }
}

/// As [`run`], from a scene to the next move.
#[track_caller]
fn finish(case: Case, scene: Scene) -> Runs {
    let places = [Arc::clone(&scene.here), Arc::clone(&scene.there)];
    let mut trial = Trial { case, scene, thief: None };
    let came = trial.run();
    let (vm, here, there) = match trial.check(came) {
        Some(left) => left,
        None => {
            let [here, there] = &places;
            (Scene::vm(here), Arc::clone(here), Arc::clone(there))
        }
    };
    drop(trial);
    let moved = moves(vm, &here, &there, &arguments(&case));
    // All that its guest ever said is with the witness then.
    moved.kill_9();
    came
}

/// Runs a case with the VM of `scene`, which lives on: gives what came of it, the VM, where it is, and the
/// other place.
///
/// # Panics
/// The case is one in which the VM may die; the scene has not what it needs.
#[track_caller]
pub fn run_with(case: Case, scene: Scene) -> (Runs, Vm, Arc<Place>, Arc<Place>) {
    assert!(case.spares_the_vm(), "{case}");
    let mut trial = Trial { case, scene, thief: None };
    let came = trial.run();
    let (vm, here, there) = trial.check(came).expect("somebody has the VM");
    (came, vm, here, there)
}

/// What the migration of a case is started with.
fn arguments(case: &Case) -> [&'static str; 4] {
    let connections = if case.connections == 1 { "1" } else { "4" };
    ["--connections", connections, "--mode", case.mode.name()]
}

struct Trial {
    case: Case,
    scene: Scene,
    thief: Option<Thief>,
}

impl Trial {
    #[track_caller]
    fn run(&mut self) -> Runs {
        let (case, spot) = (self.case, self.case.spot());
        let mut args = arguments(&case).to_vec();
        // Nothing but silence is to be waited for: whoever waits for it all the same is too late here.
        args.extend(["--dead-after", if case.fault == Fault::Stall { "1s" } else { "60s" }]);
        let proxy = &self.scene.proxy;
        let migrating = match case.fault {
            Fault::FlipHeader | Fault::FlipState => {
                let edit = match case.fault {
                    Fault::FlipHeader => Edit::FlipHeader(HEADER_BYTE),
                    _ => Edit::FlipPayload(STATE_BYTE),
                };
                let touched = proxy.edit(spot, edit);
                let migrating = self.scene.migrate(&args);
                touched.wait();
                migrating
            }
            _ => {
                let held = proxy.hold(spot);
                let migrating = self.scene.migrate(&args);
                held.wait();
                self.happens(held);
                migrating
            }
        };
        let came = self.settle(migrating);
        let allowed = case.outcomes();
        assert!(allowed.contains(&came), "{came:?} came of it, expected one of {allowed:?}");
        came
    }

    /// What goes wrong, with the record at its spot; then it goes on, if its connection does.
    #[track_caller]
    fn happens(&mut self, held: Held) {
        let Self { case, scene, .. } = self;
        match case.fault {
            Fault::KillSource => scene.source.take().unwrap().kill_9(),
            Fault::LoseSource => {
                scene.source.take().unwrap().kill_9();
                scene.proxy.cut(On::Any, Cut::Reset);
            }
            Fault::KillDestination => scene.destination.take().unwrap().kill_9(),
            Fault::LoseDestination => {
                scene.destination.take().unwrap().kill_9();
                scene.proxy.close_door(true);
                scene.proxy.cut(On::Any, Cut::Reset);
            }
            Fault::CutControl => scene.proxy.cut(On::Main, Cut::Reset),
            Fault::CutPages => scene.proxy.cut(On::Page(case.connections - 1), Cut::Reset),
            Fault::Stall => scene.proxy.stall(On::Any),
            Fault::DiskFull => scene.there.small.as_ref().unwrap().fill(),
            Fault::NoMemory => starve(scene.destination().pid()),
            Fault::DiskTaken => self.thief = Some(Thief::take(scene.disk.as_ref().unwrap())),
            Fault::FlipHeader | Fault::FlipState => {}
        }
        held.release();
    }

    /// Waits until it is known what came of it; helps where nothing can come of it without help.
    #[track_caller]
    fn settle(&mut self, mut migrating: Migrating) -> Runs {
        if self.scene.source.is_none() {
            let failed = migrating.end();
            // The process that was asked is dead, or had answered before.
            let may_know = self.case.phase >= Phase::CommitArrived;
            assert!(failed.code != Some(0) || may_know, "{failed:#?}");
            return self.settle_there();
        }
        let mut helped = false;
        until("the end of the migration", || {
            if !helped && self.wants_help() {
                self.help();
                helped = true;
            }
            migrating.is_over()
        });
        let finished = migrating.end();
        match finished.code {
            Some(0) => match self.case.fault {
                // If it is there, it was started again.
                Fault::KillDestination | Fault::LoseDestination => Runs::Nobody,
                _ if self.scene.destination().is_alive() => Runs::Destination,
                _ => Runs::Nobody,
            },
            Some(1) => {
                assert!(finished.stdout.contains("runs here as before"), "{finished:#?}");
                Runs::Source
            }
            _ => panic!("{finished:#?}"),
        }
    }

    /// The source is gone: what the destination makes of that.
    #[track_caller]
    fn settle_there(&mut self) -> Runs {
        let mut came = Runs::Nobody;
        let Scene { destination, there, .. } = &mut self.scene;
        let destination = destination.as_mut().unwrap();
        let phase = self.case.phase;
        until("the destination's decision", || {
            let status = there.status();
            came = match status.as_deref() {
                Some("running") => Runs::Destination,
                Some("unresolved") => Runs::Unresolved,
                Some(_) => return false,
                // It never got an offer, and waits for another.
                None if phase == Phase::Offering => Runs::Nobody,
                None => return !destination.is_alive(),
            };
            true
        });
        came
    }

    /// Whether it will not end by itself.
    fn wants_help(&mut self) -> bool {
        let Scene { destination, here, there, .. } = &mut self.scene;
        match self.case.fault {
            Fault::KillDestination | Fault::LoseDestination => {
                here.status().as_deref() == Some("unresolved")
            }
            Fault::DiskFull => there.status().as_deref() == Some("unresolved"),
            Fault::DiskTaken => {
                destination.as_ref().unwrap().log().contains("the VM is owned here and paused")
            }
            _ => false,
        }
    }

    #[track_caller]
    fn help(&mut self) {
        let scene = &mut self.scene;
        match self.case.fault {
            Fault::KillDestination => {
                // Any minivmm of that host has its journal.
                let (again, address) = scene.there.receive();
                scene.proxy.retarget(&address);
                scene.destination = Some(again);
            }
            Fault::LoseDestination => {
                // The operator knows that the host is gone, and what had come to it.
                let owner = if self.case.phase < Phase::CommitArrived { "here" } else { "there" };
                scene.here.host.ok(&["resolve", &scene.id(), "--owner", owner]);
            }
            Fault::DiskFull => scene.there.small.as_ref().unwrap().free(),
            Fault::DiskTaken => self.thief = None,
            _ => {}
        }
    }

    /// Both ends and both journals agree with what came of it. Gives the VM that runs, where it is, and the
    /// other place; `None` if nobody has it.
    #[track_caller]
    fn check(&mut self, came: Runs) -> Option<(Vm, Arc<Place>, Arc<Place>)> {
        let case = self.case;
        let (here, there) = (Arc::clone(&self.scene.here), Arc::clone(&self.scene.there));
        let id = self.scene.id();
        let (mine, theirs) = (here.verdict(&id), there.verdict(&id));
        let (mine, theirs) = (mine.as_deref(), theirs.as_deref());
        let journals = format!("here {mine:?}, there {theirs:?}");
        let before = self.scene.before.clone();
        there.small.iter().for_each(SmallDisk::free);
        match came {
            Runs::Source => {
                assert_eq!(mine, Some("running-here"), "{journals}");
                assert_ne!(theirs, Some("running-here"), "{journals}");
                let mut vm = self.scene.source.take().unwrap();
                runs(&mut vm, &before);
                self.destination_has_nothing();
                Some((vm, here, there))
            }
            Runs::Destination => {
                assert_eq!((mine, theirs), (Some("handed-over"), Some("running-here")));
                if let Some(mut source) = self.scene.source.take() {
                    source.ends_well();
                }
                let mut vm = self.scene.destination.take().unwrap();
                runs(&mut vm, &before);
                feed(vm.pid());
                Some((vm, there, here))
            }
            Runs::Unresolved => {
                let expected =
                    if case.phase <= Phase::Loaded { "undecided" } else { "handed-over" };
                assert_eq!((mine, theirs), (Some(expected), Some("unresolved")));
                let mut vm = self.scene.destination.take().unwrap();
                let exits = || there.host.json(&["stats", "vm"])["vcpus"].clone();
                assert_eq!(exits(), exits(), "it is frozen");
                assert_eq!(vm.console.last_beat(), None, "it has not run");
                there.host.ok(&["resolve", &id, "--owner", "here"]);
                runs(&mut vm, &before);
                Some((vm, there, here))
            }
            Runs::Nobody => {
                let killed = matches!(case.fault, Fault::KillSource | Fault::LoseSource);
                let expected = if killed { "undecided" } else { "handed-over" };
                assert_eq!(mine, Some(expected), "{journals}");
                // With a host that is lost, what its journal had is an operator's guess.
                let guess = case.fault == Fault::LoseDestination;
                assert!(killed || guess || theirs == Some("running-here"), "{journals}");
                // What `minivmm migrate` says comes before the end of the process.
                if let Some(mut source) = self.scene.source.take() {
                    source.ends_well();
                }
                None
            }
        }
    }

    /// The destination is gone, or waits for another VM.
    #[track_caller]
    fn destination_has_nothing(&mut self) {
        let Trial { case, scene, .. } = self;
        let Some(mut destination) = scene.destination.take() else { return };
        // It got no offer, or none that it could read.
        let unasked = matches!(case.fault, Fault::FlipHeader | Fault::CutControl | Fault::Stall)
            && case.phase == Phase::Offering;
        let waits = unasked
            || case.fault == Fault::KillDestination
            // The connection came when there was no memory for its thread any more.
            || destination.log().contains("no thread for a connection")
                && scene.there.status().is_none()
                && destination.is_alive();
        if waits {
            assert_eq!(scene.there.status(), None);
            return destination.kill_9();
        }
        let finished = destination.end();
        match case.fault {
            // It may abort where memory for something small is refused.
            Fault::NoMemory => assert_ne!(finished.code, Some(0), "{finished:#?}"),
            _ => {
                assert_eq!(finished.code, Some(1), "{finished:#?}");
                assert!(finished.stderr.contains("no VM came"), "{finished:#?}");
            }
        }
    }
}
