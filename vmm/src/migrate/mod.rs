//! Live migration of this VMM's machines: what the engine in the `migration` crate needs to know
//! of them, at both ends.
//!
//! ```text
//!   source                                        destination
//!   `minivmm migrate` -> API -> [`Outgoing`]      `minivmm receive` -> [`FrontDoor`]
//!        thread `migration`: migrate_to()              main thread: receive()
//!            the machine is the SourceVm                   IncomingHost makes the machine
//! ```

mod incoming;
mod outgoing;
mod records;
mod resources;

use std::path::PathBuf;

use migration::handover::Owner;
use migration::journal::{Entry, EntryState, Journal, JournalError, Side};

pub use incoming::{FrontDoor, Received, Stage};
pub use outgoing::{Ended, Outgoing};
pub use records::Records;
pub use resources::ResourcesV1;

use crate::state_dir::{self, StateDirError};

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogbookError {
    /// No directory.
    #[error(transparent)]
    Directory(#[from] StateDirError),
    /// Journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// No migration of that id.
    #[error("no migration {0} is known here: `minivmm migration` lists those that are")]
    NoSuchMigration(String),
    /// The id names several.
    #[error("{0} begins the ids of several migrations: write more of it")]
    Ambiguous(String),
}

/// The host's journal of migrations.
///
/// # Errors
/// See [`LogbookError`].
pub fn journal() -> Result<Journal, LogbookError> {
    Ok(Journal::open(&journal_dir()?)?)
}

fn journal_dir() -> Result<PathBuf, StateDirError> {
    Ok(state_dir::open()?.join("journal"))
}

/// What an operator decided by [`resolve`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The entry as it was.
    pub entry: Entry,
    /// Who owns the VM now.
    pub owner: Owner,
}

/// Decides an unresolved migration, whose id begins with `id`, by an operator's word. A process that waits for it
/// sees it in the journal.
///
/// # Errors
/// See [`LogbookError`]; only what is unresolved can be decided.
pub fn resolve(id: &str, owner: Owner) -> Result<Resolved, LogbookError> {
    let journal = journal()?;
    let mut found: Vec<Entry> =
        journal.list()?.into_iter().filter(|entry| entry.id.starts_with(id)).collect();
    // On one host both ends are here: the word is for the one that does not know.
    if found.len() > 1 {
        let unresolved = |entry: &Entry| entry.state == EntryState::Unresolved;
        if found.iter().any(unresolved) {
            found.retain(unresolved);
        }
    }
    let several = found.windows(2).any(|pair| pair[0].id != pair[1].id);
    let Some(entry) = found.pop().filter(|_| !id.is_empty()) else {
        return Err(LogbookError::NoSuchMigration(id.to_owned()));
    };
    if several {
        return Err(LogbookError::Ambiguous(id.to_owned()));
    }
    let parsed = entry.id.parse().map_err(|_| LogbookError::NoSuchMigration(id.to_owned()))?;
    journal.resolve(parsed, entry.side, owner)?;
    Ok(Resolved { entry, owner })
}

/// The end that this entry is of, in words.
#[must_use]
pub fn side_text(side: Side) -> &'static str {
    match side {
        Side::Source => "outgoing",
        Side::Destination => "incoming",
    }
}
