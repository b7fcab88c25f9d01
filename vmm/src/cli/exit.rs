//! Exit codes, and errors on their way to them.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use migration::journal::JournalError;

use crate::api::ClientError;
use crate::config::ConfigError;
use crate::migrate::LogbookError;
use crate::network::NetworkError;
use crate::runtime_dir::RuntimeDirError;

/// Exit codes of `minivmm`; also in its help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done; with `run` and `restore`: the guest powered off, or was ended on request.
    Ok = 0,
    /// It was tried and failed.
    Failed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// The guest crashed.
    GuestCrashed = 3,
    /// No VM of that name runs, or no such network.
    NoSuchVm = 4,
    /// Refused in the present state: name taken, VM migrates, ...
    Refused = 5,
    /// It did not happen in time.
    TimedOut = 6,
    /// It is not known which host owns the VM.
    Unresolved = 7,
    /// The VM was handed over, and a part of its memory never followed.
    Incomplete = 8,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What went wrong, and the exit code that tells.
#[derive(Debug)]
pub struct CliError {
    exit: Exit,
    error: Box<dyn Error + Send + Sync>,
}

impl CliError {
    /// From an error.
    pub fn new(exit: Exit, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { exit, error: error.into() }
    }

    /// From a sentence.
    pub fn text(exit: Exit, message: impl Into<String>) -> Self {
        Self::new(exit, message.into())
    }

    /// The exit code.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// Writes `minivmm: ...` and, where it says more, the cause.
    pub fn report(&self, to: &mut dyn Write) {
        if self.exit == Exit::Ok {
            return;
        }
        let mut said = self.error.to_string();
        // Nothing is left to do when standard error is gone.
        let _ = writeln!(to, "minivmm: {said}");
        let mut cause = self.error.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.contains(&text) {
                let _ = writeln!(to, "  because: {text}");
                said = text;
            }
            cause = error.source();
        }
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::new(Exit::Usage, error)
    }
}

impl From<RuntimeDirError> for CliError {
    fn from(error: RuntimeDirError) -> Self {
        let exit = match error {
            RuntimeDirError::NoSuchVm { .. } => Exit::NoSuchVm,
            RuntimeDirError::NameTaken { .. } | RuntimeDirError::PidfileTaken { .. } => {
                Exit::Refused
            }
            RuntimeDirError::Name(_) | RuntimeDirError::PathTooLong { .. } => Exit::Usage,
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

impl From<LogbookError> for CliError {
    fn from(error: LogbookError) -> Self {
        let exit = match error {
            LogbookError::Journal(JournalError::NotUnresolved { .. }) => Exit::Refused,
            LogbookError::NoSuchMigration(_) | LogbookError::Ambiguous(_) => Exit::Usage,
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

impl From<NetworkError> for CliError {
    fn from(error: NetworkError) -> Self {
        let exit = match error {
            NetworkError::NoSuchNetwork(_) => Exit::NoSuchVm,
            _ if error.is_refused() => Exit::Refused,
            _ if error.is_about_what_was_asked() => Exit::Usage,
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let exit = match error {
            ClientError::Lookup(error) => return (*error).into(),
            ClientError::Refused { status: 409, .. } => Exit::Refused,
            ClientError::Refused { status: 400, .. } => Exit::Usage,
            ClientError::Timeout { .. } => Exit::TimedOut,
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

/// Output that cannot be written. A reader that has seen enough (`| head`) is no failure.
impl From<io::Error> for CliError {
    fn from(error: io::Error) -> Self {
        let exit = match error.kind() {
            io::ErrorKind::BrokenPipe => Exit::Ok,
            _ => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn report(error: &CliError) -> String {
        let mut text = Vec::new();
        error.report(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_cause_is_told_once() {
        let error = CliError::new(Exit::Failed, Outer(io::Error::other("inner")));
        assert_eq!(report(&error), "minivmm: outer\n  because: inner\n");
        let source = io::Error::other("inner");
        let error = ClientError::Connect { socket: "/s".into(), source };
        assert_eq!(report(&error.into()), "minivmm: cannot connect to /s: inner\n");
    }

    #[test]
    fn a_reader_that_has_seen_enough_is_no_failure() {
        let error = CliError::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((error.exit(), report(&error).as_str()), (Exit::Ok, ""));
    }
}
