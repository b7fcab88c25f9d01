//! Single records that are not as they were sent, and a source that cannot ask.

use std::fs;

use migration::stream::RecordType;
use serde_json::Value;
use tests::fire::{moves, runs, until, Place, Scene, Thief, BUSY};
use tests::proxy::{Cut, Edit, On, Proxy, Spot, Way};
use tests::{add, loop_devices, LoopDevice, Migrating, Need, Suite};

/// Nothing is written after round 0, which would make a damaged page good again.
const STILL: &str = "ws=8 dirty=0 report=0 pace=0 beat=20";

pub fn add(suite: &mut Suite, needs: &[&Need]) {
    add!(suite, needs;
        a_damaged_page_is_found_by_verify_and_by_nothing_else,
        half_a_record_and_a_record_that_comes_twice_end_the_migration,
        an_answer_that_is_lost_is_asked_for_again,
        a_disk_that_cannot_be_taken_back_is_waited_for,
        a_vm_whose_disk_cannot_be_taken_back_can_be_ended,
        a_vm_that_came_and_cannot_have_its_disk_can_be_ended,
        a_guest_that_runs_twice_is_seen,
        a_receiver_that_lost_a_vm_takes_it_the_next_time,
    );
    add!(suite, &[needs, &[&loop_devices()]].concat();
        what_a_guest_wrote_is_on_its_disk_before_another_host_has_it,
    );
}

fn a_damaged_page_is_found_by_verify_and_by_nothing_else() {
    for verify in [true, false] {
        let here = Place::plain();
        let vm = here.host.run(STILL, &[]).ready();
        let mut scene = Scene::with(vm, here, Place::plain(), None);
        // The middle of the working set: the last stamp of the last page of a record.
        let spot = Spot::new(On::Page(0), Way::Forth, RecordType::Pages).round(0).nth(4);
        let touched = scene.proxy.edit(spot, Edit::FlipLast);
        let migrating = scene.migrate(if verify { &["--verify"] } else { &[] });
        touched.wait();
        let finished = migrating.end();
        if verify {
            assert_eq!(finished.code, Some(1), "{finished:#?}");
            assert!(finished.stdout.contains("memory differs"), "{finished:#?}");
            let mut vm = scene.source.take().unwrap();
            vm.verify();
            vm.ask("dirty 4000", "dirty");
            moves(vm, &scene.here, &scene.there, &[]).kill_9();
        } else {
            assert_eq!(finished.code, Some(0), "{finished:#?}");
            let console = &mut scene.destination().console;
            console.tolerate("corrupt");
            assert_eq!(console.event("corrupt")["kind"], "torn");
        }
    }
}

fn half_a_record_and_a_record_that_comes_twice_end_the_migration() {
    let pages = Spot::new(On::Page(0), Way::Forth, RecordType::Pages).round(0).nth(2);
    let state = Spot::new(On::Main, Way::Forth, RecordType::State).nth(3);
    for spot in [pages, state] {
        for edit in [Edit::Truncate(Cut::Fin), Edit::Truncate(Cut::Reset), Edit::Duplicate] {
            let mut scene = Scene::start();
            let touched = scene.proxy.edit(spot, edit);
            let finished = scene.migrate(&[]).end();
            assert!(touched.happened());
            assert_eq!(finished.code, Some(1), "{finished:#?}");
            let gone = scene.destination().end();
            assert_eq!(gone.code, Some(1), "{gone:#?}");
            let mut vm = scene.source.take().unwrap();
            runs(&mut vm, &scene.before);
            moves(vm, &scene.here, &scene.there, &[]).kill_9();
        }
    }
}

/// COMMIT is lost, and so is the destination's first answer to the question what became of it.
fn an_answer_that_is_lost_is_asked_for_again() {
    for arrives in [false, true] {
        let mut scene = Scene::start();
        let commit = Spot::new(On::Main, Way::Forth, RecordType::Commit);
        let resumed = Spot::new(On::Main, Way::Back, RecordType::Resumed);
        let lost = scene.proxy.hold(if arrives { resumed } else { commit });
        let answer = Spot::new(On::Query, Way::Back, RecordType::Verdict);
        let [first, second] = [0, 1].map(|nth| scene.proxy.hold(answer.nth(nth)));
        let migrating = scene.migrate(&[]);
        lost.wait();
        scene.proxy.cut(On::Main, Cut::Reset);
        first.wait();
        scene.proxy.cut(On::Query, Cut::Reset);
        // Frozen meanwhile.
        assert_eq!(scene.here.status().as_deref(), Some("unresolved"));
        second.wait();
        second.release();
        let finished = migrating.end();
        assert_eq!(finished.code, Some(if arrives { 0 } else { 1 }), "{finished:#?}");
        let (mut source, mut destination) =
            (scene.source.take().unwrap(), scene.destination.take().unwrap());
        if arrives {
            source.ends_well();
            runs(&mut destination, &scene.before);
            moves(destination, &scene.there, &scene.here, &[]).kill_9();
        } else {
            assert_eq!(destination.end().code, Some(1));
            runs(&mut source, &scene.before);
            moves(source, &scene.here, &scene.there, &[]).kill_9();
        }
    }
}

/// COMMIT is lost, the verdict is `not here`, and another process has the disk.
fn without_its_disk() -> (Scene, Migrating, Thief) {
    let scene = Scene::start_with_disk();
    let held = scene.proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Commit));
    let migrating = scene.migrate(&[]);
    held.wait();
    let thief = Thief::take(scene.disk.as_ref().unwrap());
    scene.proxy.cut(On::Main, Cut::Reset);
    until("a note", || {
        let current = &scene.here.host.json(&["migration", "vm"])["current"];
        let note = current["progress"]["note"].as_str().unwrap_or_default().to_owned();
        note.contains("the VM is here and paused")
    });
    (scene, migrating, thief)
}

fn a_vm_whose_disk_cannot_be_taken_back_can_be_ended() {
    let (mut scene, migrating, thief) = without_its_disk();
    scene.here.host.ok(&["kill", "vm"]);
    scene.source().ends_well();
    let finished = migrating.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    assert_eq!(scene.destination().end().code, Some(1));
    assert_eq!(scene.here.host.json(&["list"]), Value::Array(Vec::new()));
    drop(thief);
    // Nobody has it any more.
    drop(Thief::take(scene.disk.as_ref().unwrap()));
}

fn a_vm_that_came_and_cannot_have_its_disk_can_be_ended() {
    let mut scene = Scene::start_with_disk();
    let held = scene.proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Commit));
    let migrating = scene.migrate(&["--dead-after", "60s"]);
    held.wait();
    let thief = Thief::take(scene.disk.as_ref().unwrap());
    held.release();
    until("a note", || scene.destination().log().contains("the VM is owned here and paused"));
    let refused = scene.there.host.cli(&["cancel", "vm"]);
    assert_eq!(refused.code, Some(5), "{refused:#?}");
    assert!(refused.stderr.contains("too late"), "{refused:#?}");
    scene.there.host.ok(&["kill", "vm"]);
    // Its source asks, and is told what was decided.
    assert_eq!(migrating.end().code, Some(0));
    scene.source().ends_well();
    let gone = scene.destination().end();
    assert_eq!(gone.code, Some(1), "{gone:#?}");
    assert!(gone.stderr.contains("ended here before it could run"), "{gone:#?}");
    assert_eq!(scene.there.verdict(&scene.id()).as_deref(), Some("running-here"));
    drop(thief);
}

fn a_disk_that_cannot_be_taken_back_is_waited_for() {
    let (mut scene, migrating, thief) = without_its_disk();
    // The guest stands still until it has its disk.
    let beats = scene.source().console.last_beat();
    let exits = || scene.here.host.json(&["stats", "vm"])["vcpus"].clone();
    assert_eq!(exits(), exits(), "it stands still");
    assert_eq!(scene.source.as_ref().unwrap().console.last_beat(), beats);
    drop(thief);
    let finished = migrating.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    let mut vm = scene.source.take().unwrap();
    runs(&mut vm, &scene.before);
    moves(vm, &scene.here, &scene.there, &[]).kill_9();
}

/// It keeps nothing of the first attempt: not even who is to own the disk next.
fn a_receiver_that_lost_a_vm_takes_it_the_next_time() {
    let (here, there) = (Place::plain(), Place::plain());
    let disk = here.host.path("disk");
    let mut vm = here.host.run(BUSY, &["--disk", &Scene::disk(&disk)]).ready();
    let before = vm.report();
    let (mut destination, address) = there.host.receive_more();
    let proxy = Proxy::to(&address);
    let ready = proxy.hold(Spot::new(On::Main, Way::Back, RecordType::Loaded));
    let migrating = Migrating::start(&here.host, &proxy.address(), &[]);
    ready.wait();
    proxy.cut(On::Main, Cut::Reset);
    let finished = migrating.end();
    assert_eq!(finished.code, Some(1), "{finished:#?}");
    until("it listens again", || destination.log().contains("listening on\n"));
    here.host.ok(&["migrate", "vm", "--to", &address]);
    vm.ends_well();
    runs(&mut destination, &before);
}

/// Whose cache it does not share, and though the guest never asked for it.
fn what_a_guest_wrote_is_on_its_disk_before_another_host_has_it() {
    let here = Place::plain();
    let image = here.host.path("image");
    drop(Scene::disk(&image));
    let device = LoopDevice::of(&image);
    // It writes all the time.
    let guest = format!("{BUSY} disk=verify disk-ws=4 disk-rate=max disk-depth=16");
    let argument = format!("id=disk,path={},cache=unsafe", device.path().display());
    let mut vm = here.host.run(&guest, &["--disk", &argument]).ready();
    vm.console.event("disk-ready");
    let scene = Scene::with(vm, here, Place::plain(), None);
    let held = scene.proxy.hold(Spot::new(On::Main, Way::Forth, RecordType::Commit));
    let migrating = scene.migrate(&["--dead-after", "60s"]);
    held.wait();
    let (seen, stored) = (fs::read(device.path()).unwrap(), fs::read(&image).unwrap());
    assert!(seen.iter().any(|byte| *byte != 0), "the guest has written");
    assert!(seen == stored, "the device has other contents than its cache");
    held.release();
    assert_eq!(migrating.end().code, Some(0));
    let Scene { source, destination, before, .. } = scene;
    source.unwrap().ends_well();
    runs(&mut destination.unwrap(), &before);
}

/// The witness' own test: two processes run one guest on purpose.
fn a_guest_that_runs_twice_is_seen() {
    let place = Place::plain();
    let mut vm = place.host.run("ws=1 report=0 pace=0 beat=20", &[]).ready();
    until("a beat", || vm.console.last_beat().is_some());
    let file = place.host.file("saved");
    place.host.ok(&["save", "vm", &file, "--stop"]);
    vm.ends_well();
    let places = [Place::plain(), Place::plain()];
    let one = places[0].host.restore(&file, &[]);
    until("more beats", || one.console.last_beat() > vm.console.last_beat());
    assert_eq!(one.console.ran_twice(), None, "it went on, in another process");
    let other = places[1].host.restore(&file, &[]);
    until("the witness' word", || one.console.ran_twice().is_some());
    assert!(other.console.ran_twice().is_some());
}
