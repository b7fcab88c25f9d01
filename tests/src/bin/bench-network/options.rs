//! The command line.

use std::path::PathBuf;

use ::tests::topology::Topology;

use crate::subject::{Mode, Subject};

const USAGE: &str = "\
Usage: bench-network [--quick] [--topology LIST] [--mode LIST] [--subjects LIST] [--rate N] [--runs N] [--bandwidth MIB]
                     [--own-wire] [--json FILE]

  --topology LIST  bridge, vxlan, ovs, nat [default: all that can be had here]
  --mode LIST      precopy, postcopy [default: both]
  --subjects LIST  minivmm, qemu [default: both]
  --rate N         datagrams per second to the guest and back [default: 10000, or what the guest sustains without
                   a migration]
  --runs N         runs of each [default: 10]
  --bandwidth MIB  move at most so many MiB of memory per second [default: no limit]
  --own-wire       memory goes over a wire of its own, beside the network that the guest is in
  --quick          bridge and two runs: a look, no figures
  --json FILE      write all samples to FILE: throughput in bins of 10 ms among them

Lists are separated by commas. Needs root, for network namespaces.";

/// The topologies by name.
pub const TOPOLOGIES: [(&str, Topology); 4] = [
    ("bridge", Topology::Bridge),
    ("vxlan", Topology::Vxlan),
    ("ovs", Topology::Ovs),
    ("nat", Topology::Nat),
];
/// The modes by name.
pub const MODES: [(&str, Mode); 2] = [("precopy", Mode::Precopy), ("postcopy", Mode::Postcopy)];
/// The subjects by name.
pub const SUBJECTS: [(&str, Subject); 2] = [("minivmm", Subject::Minivmm), ("qemu", Subject::Qemu)];

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// In this order.
    pub topologies: Vec<Topology>,
    /// As above.
    pub modes: Vec<Mode>,
    /// As above.
    pub subjects: Vec<Subject>,
    /// Datagrams per second.
    pub rate: u64,
    /// Runs of each.
    pub runs: usize,
    /// MiB per second that memory moves with at most.
    pub bandwidth: Option<u64>,
    /// Memory goes over a wire of its own.
    pub own_wire: bool,
    /// Where samples go.
    pub json: Option<PathBuf>,
}

/// Those of a list, which are among `all`.
fn chosen<T: Copy>(text: &str, all: &[(&str, T)]) -> Result<Vec<T>, String> {
    let find = |word| {
        let found = all.iter().find(|(name, _)| *name == word);
        found.map(|(_, what)| *what).ok_or_else(|| format!("{word} is not known\n{USAGE}"))
    };
    text.split(',').map(find).collect()
}

/// The name of one of `all`.
pub fn name<T: PartialEq>(what: T, all: &[(&'static str, T)]) -> &'static str {
    all.iter().find(|(_, one)| *one == what).map_or("?", |(name, _)| name)
}

impl Options {
    /// Reads the command line; an error is to be shown as it is.
    pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let values = |all: &[(&str, Topology)]| all.iter().map(|(_, what)| *what).collect();
        let mut options = Self {
            topologies: values(&TOPOLOGIES),
            modes: MODES.map(|(_, mode)| mode).to_vec(),
            subjects: SUBJECTS.map(|(_, subject)| subject).to_vec(),
            rate: 10_000,
            runs: 10,
            bandwidth: None,
            own_wire: false,
            json: None,
        };
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value\n{USAGE}"));
            let number = |text: String| {
                let number = text.parse().ok().filter(|number| *number > 0_u64);
                number.ok_or_else(|| format!("{argument} needs a number above 0\n{USAGE}"))
            };
            match argument.as_str() {
                "--quick" => (options.topologies, options.runs) = (vec![Topology::Bridge], 2),
                "--topology" => options.topologies = chosen(&value()?, &TOPOLOGIES)?,
                "--mode" => options.modes = chosen(&value()?, &MODES)?,
                "--subjects" => options.subjects = chosen(&value()?, &SUBJECTS)?,
                "--rate" => options.rate = number(value()?)?,
                "--runs" => options.runs = number(value()?)? as usize,
                "--bandwidth" => options.bandwidth = Some(number(value()?)?),
                "--own-wire" => options.own_wire = true,
                "--json" => options.json = Some(value()?.into()),
                "--help" | "-h" => return Err(USAGE.to_owned()),
                other => return Err(format!("{other} is not known\n{USAGE}")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn lists_choose() {
        let all = parse("").unwrap();
        assert_eq!((all.topologies.len(), all.modes.len(), all.runs), (4, 2, 10));
        let some = parse(
            "--quick --topology nat,ovs --mode postcopy --subjects qemu --rate 7 --bandwidth 50 --own-wire",
        )
        .unwrap();
        assert_eq!(some.topologies, [Topology::Nat, Topology::Ovs]);
        assert_eq!((some.modes, some.subjects), (vec![Mode::Postcopy], vec![Subject::Qemu]));
        assert_eq!((some.rate, some.runs, some.bandwidth), (7, 2, Some(50)));
        assert!(some.own_wire && !all.own_wire);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for wrong in ["--topology star", "--mode hybrid", "--runs 0", "--rate x", "--rate", "quick"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
