//! The command line.

use std::process::ExitCode;

use vmm::cli::{main_with, Launch};

fn main() -> ExitCode {
    main_with(|launch| {
        let end = match launch {
            Launch::Run(settings) => vmm::run::run(settings)?,
            Launch::Restore(settings) => vmm::run::restore(settings)?,
            Launch::Receive(settings) => vmm::run::receive(&settings)?,
        };
        Ok(end.into())
    })
}
