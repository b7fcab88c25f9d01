//! The command line.

use std::process::ExitCode;

use vmm::cli::{main_with, CliError, Exit};

fn main() -> ExitCode {
    main_with(|_launch| {
        Err(CliError::text(Exit::Failed, "this build has no machine: run and restore do nothing"))
    })
}
