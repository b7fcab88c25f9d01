//! Why the work of a phase ended early.

use std::io;

use crate::handover::Cause;
use crate::journal::JournalError;
use crate::stream::StreamError;
use crate::vm::VmError;

/// The cause, and every reason for a person.
pub(super) struct Failure {
    pub(super) cause: Cause,
    pub(super) reasons: Vec<String>,
}

impl Failure {
    pub(super) fn new(cause: Cause, reason: impl Into<String>) -> Self {
        Self { cause, reasons: vec![reason.into()] }
    }
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        Failure::new(Cause::Failed, error.to_string())
    }
}

impl From<JournalError> for Failure {
    fn from(error: JournalError) -> Self {
        Failure::new(Cause::Failed, error.to_string())
    }
}

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        Failure::new(Cause::Lost, error.problem.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::new(Cause::Failed, error.to_string())
    }
}
