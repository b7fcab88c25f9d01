//! Migrations under fire: faults and events in every phase, and what must come of them.
#![allow(clippy::unwrap_used)]

mod events;
mod records;

use std::process::ExitCode;

use tests::fire::{run, Case, Fault};
use tests::{kvm, namespaces, pairwise, Suite};

fn main() -> ExitCode {
    let mut suite = Suite::default();
    let (kvm, namespaces) = (kvm(), namespaces());
    // The complete matrix is a matter of `make soak`.
    for case in pairwise(&Case::all()) {
        let needs = match case.fault {
            Fault::DiskFull => vec![&kvm, &namespaces],
            _ => vec![&kvm],
        };
        suite.case(&needs, &case.to_string(), move || {
            run(case);
        });
    }
    events::add(&mut suite, &[&kvm]);
    records::add(&mut suite, &[&kvm]);
    suite.run()
}
