//! The command line: what is typed, what is printed, and the exit codes.
//!
//! `run`, `restore` and `receive` become a [`Launch`], which the caller carries out; everything else is
//! a client of the control API and is done here.

mod args;
mod attach;
mod exit;
mod migrate_args;
mod migration;
mod network;
mod output;
mod signals;
mod vm_commands;
mod wait;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::config::{HostLimits, LogConfig, ReceiveSettings, RestoreSettings, RunSettings};

pub use args::Cli;
pub use exit::{CliError, Exit};
pub use signals::{on_resize, on_termination};

use args::Command;

/// A VM to bring to life in this process.
#[derive(Debug, Clone, PartialEq)]
pub enum Launch {
    /// `run`
    Run(RunSettings),
    /// `restore`
    Restore(RestoreSettings),
    /// `receive`
    Receive(ReceiveSettings),
}

/// Reads the command line and does what it says; `launch` carries out `run`, `restore` and `receive`, with
/// logging set up.
pub fn main_with(launch: impl FnOnce(Launch) -> Result<Exit, CliError>) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error).into(),
    };
    let result = execute(cli, launch);
    crate::console::restore();
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            error.report(&mut io::stderr());
            error.exit().into()
        }
    }
}

fn execute(
    cli: Cli,
    launch: impl FnOnce(Launch) -> Result<Exit, CliError>,
) -> Result<Exit, CliError> {
    let launched = match cli.command {
        Command::Run(args) => {
            let default_name = format!("vm-{}", std::process::id());
            Launch::Run(args.options()?.finish(HostLimits::detect(), &default_name)?)
        }
        Command::Restore(args) => Launch::Restore(args.settings()?),
        Command::Receive(args) => Launch::Receive(args.settings()?),
        command => {
            start_logging(&LogConfig::default())?;
            return vm_commands::run(command);
        }
    };
    let (Launch::Run(RunSettings { process, .. })
    | Launch::Restore(RestoreSettings { process, .. })
    | Launch::Receive(ReceiveSettings { process, .. })) = &launched;
    start_logging(&process.log)?;
    launch(launched)
}

/// Prints help on standard output, and complaints on standard error in the form of all others.
fn usage(error: &clap::Error) -> Exit {
    if !error.use_stderr() {
        let _ = error.print();
        return Exit::Ok;
    }
    let text = error.render().to_string();
    let _ = write!(io::stderr(), "minivmm: {}", text.strip_prefix("error: ").unwrap_or(&text));
    Exit::Usage
}

/// Starts logging to standard error or a file. A second call changes nothing.
fn start_logging(config: &LogConfig) -> Result<(), CliError> {
    let filter = EnvFilter::try_new(&config.filter).map_err(|e| CliError::new(Exit::Usage, e))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    let _ = match &config.file {
        None => builder.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).try_init(),
        Some(path) => {
            let file = std::fs::File::options().append(true).create(true).open(path);
            let file = file.map_err(|e| {
                let message = format!("cannot open the log file {}: {e}", path.display());
                CliError::text(Exit::Failed, message)
            })?;
            builder.with_ansi(false).with_writer(Mutex::new(file)).try_init()
        }
    };
    Ok(())
}
