//! Which tests there are, and which of them can run here.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// What a test needs of the machine: there, or why it is not.
pub type Need = Result<(), String>;

/// The tests of one program, for its `main`.
#[derive(Default)]
pub struct Suite {
    trials: Vec<Trial>,
}

impl Suite {
    /// Adds a test that fails by panicking. Where one of `needs` is not met it is ignored, and
    /// says why.
    pub fn test(&mut self, needs: &[&Need], name: &str, test: fn()) {
        self.case(needs, name, test);
    }

    /// Adds a test of many that are made from data.
    pub fn case(&mut self, needs: &[&Need], name: &str, test: impl FnOnce() + Send + 'static) {
        let trial = Trial::test(name, move || {
            test();
            Ok(())
        });
        self.add(needs, trial);
    }

    fn add(&mut self, needs: &[&Need], trial: Trial) {
        let missing = needs.iter().find_map(|need| need.as_ref().err());
        self.trials.push(match missing {
            Some(why) => trial.with_kind(why.clone()).with_ignored_flag(true),
            None => trial,
        });
    }

    /// Runs what the command line asks for, as `cargo test` gives it, and reports.
    #[must_use]
    pub fn run(self) -> ExitCode {
        libtest_mimic::run(&Arguments::from_args(), self.trials).exit_code()
    }
}

/// Adds test functions to a suite under their own names: `add!(suite, &[&kvm]: one, two)`.
#[macro_export]
macro_rules! add {
    ($suite:expr, $needs:expr; $($test:ident),+ $(,)?) => {
        $($suite.test($needs, stringify!($test), $test);)+
    };
}
