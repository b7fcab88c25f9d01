//! The fuzz targets of `migration/fuzz` on inputs of ordinary tests: the seeds that are kept there,
//! and a few random ones. A finding of the fuzzer is kept as a seed.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use proptest::prelude::*;

#[allow(missing_docs)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 5] = [
    ("records", targets::records),
    ("snapshot", targets::snapshot),
    ("journal", targets::journal),
    ("destination", targets::destination),
    ("source", targets::source),
];

#[test]
fn every_seed_is_survived() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in TARGETS {
        let mut seeds = 0;
        for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
            let path = entry.unwrap().path();
            // What a fuzzer left there is its own.
            if path.file_name().unwrap().to_string_lossy().starts_with("seed-") {
                println!("{}", path.display());
                target(&std::fs::read(path).unwrap());
                seeds += 1;
            }
        }
        assert_ne!(seeds, 0, "{name} has none");
    }
}

/// A target that refuses everything at once would find nothing.
#[test]
fn an_honest_destination_gets_the_vm() {
    for mode in 0..4 {
        let honest = [&[mode][..], &[0; 20]].concat();
        assert!(targets::migrated(&honest), "mode {mode}");
    }
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..1500)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn records(bytes in bytes()) {
        targets::records(&bytes);
    }

    #[test]
    fn snapshot(bytes in bytes()) {
        targets::snapshot(&bytes);
    }

    #[test]
    fn journal(bytes in bytes()) {
        targets::journal(&bytes);
    }

    #[test]
    fn destination(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        targets::destination(&bytes);
    }

    #[test]
    fn source(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        targets::source(&bytes);
    }
}
