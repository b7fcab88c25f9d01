//! The ways in which memory follows a guest, and what is the same in all of them: it comes once, and nothing of it differs.

use std::fmt;

use serde_json::Value;

use crate::beacon::number;
use crate::host::Host;
use crate::migrating::Migrating;
use crate::pairs::Fields;

/// One combination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// As `minivmm migrate --mode` has it.
    pub mode: &'static str,
    /// Whether pages come that nobody asked for; if not, until the guest has seen all that it uses.
    pub push: bool,
    /// As `minivmm migrate --prepaging` has it.
    pub prepaging: &'static str,
    /// How the guest goes through its memory.
    pub pattern: &'static str,
    /// Of the guest.
    pub vcpus: u16,
    /// For pages.
    pub connections: u16,
}

impl Way {
    /// Of all combinations.
    #[must_use]
    pub fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for mode in ["postcopy", "hybrid"] {
            for push in [true, false] {
                for prepaging in ["off", "linear", "bubble"] {
                    for pattern in ["sequential", "stride", "hotspot", "random"] {
                        for (vcpus, connections) in [(1, 1), (1, 4), (2, 1), (2, 4)] {
                            all.push(Self { mode, push, prepaging, pattern, vcpus, connections });
                        }
                    }
                }
            }
        }
        all
    }

    /// Moves a guest in this way. It compares all of its memory on both hosts.
    pub fn run(&self) {
        let (a, b) = (Host::new(), Host::new());
        let guest = format!("ws=16 dirty=20000 pattern={} report=250 pace=0", self.pattern);
        let mut source = a.run(&guest, &["--cpus", &self.vcpus.to_string()]).ready();
        let before = source.report();
        let (mut destination, to) = b.receive(&[]);
        let connections = self.connections.to_string();
        let mut args = vec!["--mode", self.mode, "--prepaging", self.prepaging, "--json"];
        args.extend([
            "--connections",
            &connections,
            "--push",
            ["off", "on"][usize::from(self.push)],
        ]);
        if self.mode == "hybrid" {
            // One round, in which the guest writes, and which is not enough for anybody.
            args.extend(["--rounds", "1", "--downtime", "1us", "--dirty-pages", "0"]);
            args.extend(["--bandwidth", "20M"]);
        }
        let migrating = Migrating::start(&a, &to, &args);
        destination.goes_on_after_pauses(1, &before);
        destination.verify();
        if !self.push {
            // There may be nothing left that could be pushed.
            a.cli(&["migrate-set", "vm", "--push", "on"]);
        }
        let finished = migrating.end();
        assert_eq!(finished.code, Some(0), "{finished:#?}");
        let report: Value = serde_json::from_str(&finished.stdout).unwrap();
        let postcopy = followed(&report).expect("a part of memory followed");
        let (missing, there) = (number(postcopy, "missing_pages"), &postcopy["destination"]);
        if self.mode == "postcopy" {
            assert!(missing >= 4096, "{report}");
            assert_eq!(report["pause"]["pages"], 0, "{report}");
            assert!(self.push || number(there, "requests") > 0, "{report}");
        }
        source.ends_well();
        destination.verify();
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, push, prepaging, pattern, vcpus, connections } = self;
        let push = if *push { "push" } else { "demand" };
        write!(f, "{mode}_{push}_{prepaging}_{pattern}_{vcpus}_{connections}")
    }
}

impl Fields for Way {
    fn fields(&self) -> Vec<String> {
        self.to_string().split('_').map(str::to_owned).collect()
    }
}

/// What the report of a migration says of memory that followed, if any did: all of it is there, and came once.
#[track_caller]
pub fn followed(report: &Value) -> Option<&Value> {
    assert_eq!(report["verdict"], "handed-over", "{report}");
    let postcopy = report.get("postcopy").filter(|postcopy| !postcopy.is_null())?;
    assert!(postcopy["incomplete"].is_null(), "{report}");
    let there = &postcopy["destination"];
    assert_eq!(there["duplicate_pages"], 0, "{report}");
    let came: u64 = ["demand_pages", "prepaged_pages", "pushed_pages"]
        .iter()
        .map(|name| number(there, name))
        .sum();
    assert_eq!(came, number(postcopy, "missing_pages"), "{report}");
    Some(postcopy)
}
