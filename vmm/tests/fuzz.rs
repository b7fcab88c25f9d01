//! The fuzz targets of `vmm/fuzz` on inputs of ordinary tests: the seeds that are kept there, and
//! what is made of them by damage.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;

#[allow(missing_docs)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 3] =
    [("payloads", targets::payloads), ("kernel", targets::kernel), ("config", targets::config)];

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut seeds = Vec::new();
    for entry in std::fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        // What a fuzzer left there is its own.
        if path.file_name().unwrap().to_string_lossy().starts_with("seed-") {
            seeds.push(std::fs::read(path).unwrap());
        }
    }
    assert_ne!(seeds.len(), 0, "{name} has none");
    seeds
}

#[test]
fn every_seed_is_survived() {
    for (name, target) in TARGETS {
        seeds(name).iter().for_each(|seed| target(seed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn every_damage_is_survived(
        which in any::<Index>(),
        damage in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..4),
    ) {
        for (name, target) in TARGETS {
            let mut seed = which.get(&seeds(name)).clone();
            for (at, with) in &damage {
                *at.get_mut(&mut seed) = *with;
            }
            target(&seed);
        }
    }
}
