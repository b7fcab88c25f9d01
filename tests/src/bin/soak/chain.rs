//! One VM that is moved again and again, with faults on the way.

use std::path::PathBuf;
use std::sync::Arc;

use tests::fire::{in_private_mounts, moves_with, run_with, Case, Fault, Mode, Place, Scene};
use tests::network::in_private_network;
use tests::{number, Traffic, Vm};

use crate::event::Event;
use crate::random::Random;

const CONNECTIONS: [u16; 4] = [1, 2, 4, 8];
/// Migrations that meet a fault, between two moves.
const FAULTS: [usize; 4] = [0, 1, 1, 2];

/// Moves a VM so many times, here; it fails by panicking.
pub fn run(seed: u64, moves: u32) {
    let work = || in_private_network(|| Chain::start(seed).run(moves)).unwrap();
    in_private_mounts(work);
}

struct Chain {
    random: Random,
    cases: Vec<Case>,
    vm: Vm,
    here: Arc<Place>,
    there: Arc<Place>,
    disk: PathBuf,
    traffic: Traffic,
}

impl Chain {
    #[track_caller]
    fn start(seed: u64) -> Self {
        let [here, there] =
            [0, 1].map(|port| Arc::new(Place::with_small_disk().receiving(&Traffic::at(port))));
        let disk = here.host.path("disk");
        let (traffic, vm) = Traffic::start(&here.host, "irq", "2", &Scene::disk(&disk));
        let cases = Case::all().into_iter().filter(Case::spares_the_vm).collect();
        Self { random: Random::new(seed), cases, vm, here, there, disk, traffic }
    }

    #[track_caller]
    fn run(mut self, moves: u32) {
        for number in 1..=moves {
            for _ in 0..self.random.one_of(&FAULTS) {
                self = self.meets_a_fault();
            }
            self = self.moves(number);
        }
        let report = self.vm.report();
        assert_eq!(report["udp_duplicates"], 0, "{report}");
        self.vm.send("poweroff");
        self.vm.ends_well();
    }

    /// Each fault is as likely as any other, however many phases it has.
    fn case(&mut self) -> Case {
        let mut faults: Vec<Fault> = self.cases.iter().map(|case| case.fault).collect();
        faults.dedup();
        let fault = self.random.one_of(&faults);
        let of_fault = self.cases.iter().filter(|case| case.fault == fault);
        self.random.one_of(&of_fault.copied().collect::<Vec<_>>())
    }

    #[track_caller]
    fn meets_a_fault(mut self) -> Self {
        let case = self.case();
        eprintln!("a fault: {case}");
        let before = self.vm.report();
        let Self { vm, here, there, disk, .. } = self;
        let scene = Scene::with(vm, here, there, Some(disk.clone()));
        let (came, vm, here, there) = run_with(case, scene);
        let mut next = Self { vm, here, there, disk, ..self };
        next.traffic.goes_on_after(&mut next.vm, &before);
        let (case, fault) = (case.to_string(), format!("{:?}", case.fault));
        Event::Fault { case, fault, came: format!("{came:?}") }.say();
        next
    }

    #[track_caller]
    fn moves(mut self, move_number: u32) -> Self {
        let mode = self.random.one_of(&Mode::ALL);
        let connections = self.random.one_of(&CONNECTIONS);
        eprintln!("move {move_number}: {}, connections {connections}", mode.name());
        let before = self.vm.report();
        let args = ["--mode", mode.name(), "--connections", &connections.to_string()];
        let (vm, report) = moves_with(self.vm, &self.here, &self.there, &args);
        let mut next = Self { vm, here: self.there, there: self.here, ..self };
        let after = next.traffic.goes_on_after(&mut next.vm, &before);
        let bytes = report["connection_bytes"].as_array().unwrap();
        Event::Move {
            number: move_number,
            mode: mode.name().to_owned(),
            connections,
            bytes: bytes.iter().filter_map(serde_json::Value::as_u64).sum(),
            pause_us: number(&report["pause"], "total_us"),
            guest_pause_us: after["switch_last_us"].as_f64().unwrap(),
            verified: number(&after, "verified"),
        }
        .say();
        next
    }
}
