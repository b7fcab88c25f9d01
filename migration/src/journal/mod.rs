//! What this host knows about who owns a VM, by migration id. It survives kill -9 of any process.
//!
//! Three small files of JSON per migration, in a directory that the caller names:
//!
//! ```text
//!   ID.source.json        what the source says: migrating, handed over, unresolved, running here
//!   ID.destination.json   what the destination says: incoming, unresolved
//!   ID.decision.json      what was decided at the destination, once: running here, not here
//! ```
//!
//! The first two belong to one process each, and are replaced by rename(2). The third is made by link(2), which
//! succeeds for exactly one writer: the destination that was told to commit, an operator, or any
//! process that answers a source that reclaims its VM. Whoever comes second accepts it.
//!
//! Nothing here is brought to the disk (fsync): a host that dies ends every copy of the memory on
//! it anyway. What the pause has to wait for is written before the pause ([`SourceEntry::stage`],
//! [`DestinationEntry::stage`]), so that one rename or link is left.
//!
//! What is over is removed 30 days later, when a journal is opened, and so is what is undecided for good because
//! its process is no more; what is unresolved stays for ever.

mod prune;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::handover::{Owner, Verdict};
use crate::identity::{from_hex, MigrationId, Token};

/// Longest entry that is read, bytes. Names of VMs and peers are short.
const MAX_ENTRY_BYTES: u64 = 64 << 10;

/// Which end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u16)]
pub enum Side {
    /// Where the VM came from.
    Source = 1,
    /// Where it goes.
    Destination = 2,
}

/// What an end has written about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryState {
    /// Source: under way, and the VM is here.
    Migrating,
    /// Destination: under way, and the VM is there.
    Incoming,
    /// Source: given away.
    HandedOver,
    /// Neither end's answer is known here.
    Unresolved,
    /// Source: it stayed. Decision: it came.
    RunningHere,
    /// Decision: it never will run here.
    NotHere,
}

/// An entry as it is on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Hexadecimal migration id.
    pub id: String,
    /// Which end wrote it.
    pub side: Side,
    /// What it says.
    pub state: EntryState,
    /// Name of the VM.
    pub vm: String,
    /// Address of the other end.
    pub peer: String,
    /// Hexadecimal token; empty before it is known.
    token: String,
    /// Process that wrote it.
    pub pid: u32,
    /// When it was written, seconds since 1970.
    pub updated: u64,
    /// Destination, after the VM came: pages that were still at the source when the guest needed one and could not have it,
    /// or ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_pages: Option<u64>,
    /// Destination, of a VM whose memory followed it: all of it came, or the VM has ended. Its source need not keep anything.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drained: bool,
}

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused.
    #[error("cannot {what} {}: {error}", path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// A file that is no entry.
    #[error("{} is not a journal entry ({problem}): look at it, and remove it if it is not needed", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The operator may decide only what is unresolved.
    #[error(
        "migration {id} is {found:?} at the {side:?}: only what is unresolved can be resolved"
    )]
    NotUnresolved {
        /// Which migration.
        id: MigrationId,
        /// Which end.
        side: Side,
        /// What it is.
        found: Verdict,
    },
}

/// A host's journal.
#[derive(Debug, Clone)]
pub struct Journal {
    directory: PathBuf,
}

impl Journal {
    /// The journal in this directory, which is made if it does not exist, for its owner only. What
    /// is over since 30 days is removed ([`Journal::prune`]).
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn open(directory: &Path) -> Result<Self, JournalError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| failed("create", directory, error))?;
        let journal = Self { directory: directory.to_owned() };
        let oldest = SystemTime::now().checked_sub(prune::KEPT).unwrap_or(UNIX_EPOCH);
        if let Err(error) = journal.prune(oldest) {
            tracing::warn!(%error, "old entries of the journal are not removed");
        }
        Ok(journal)
    }

    /// Begins the entry of a source.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn begin_source(
        &self,
        id: MigrationId,
        vm: &str,
        peer: &str,
    ) -> Result<SourceEntry, JournalError> {
        let entry = Entry::new(id, Side::Source, EntryState::Migrating, vm, peer);
        let mut begun =
            SourceEntry { journal: self.clone(), id, entry, staged: None, written: true };
        begun.set(EntryState::Migrating)?;
        Ok(begun)
    }

    /// Begins the entry of a destination.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn begin_destination(
        &self,
        id: MigrationId,
        vm: &str,
        peer: &str,
        token: &Token,
    ) -> Result<DestinationEntry, JournalError> {
        let mut entry = Entry::new(id, Side::Destination, EntryState::Incoming, vm, peer);
        entry.set_token(token);
        self.replace(&self.path(id, "destination"), &entry)?;
        Ok(DestinationEntry { journal: self.clone(), id, entry, staged: None, written: true })
    }

    /// What this host says about a migration's end. `None` for the token when the caller is an
    /// operator of this host.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn verdict(
        &self,
        id: MigrationId,
        side: Side,
        token: Option<&Token>,
    ) -> Result<Verdict, JournalError> {
        let Some(entry) = self.entry(id, side)? else { return Ok(Verdict::Unknown) };
        if token.is_some_and(|token| !entry.admits(token)) {
            return Ok(Verdict::Unknown);
        }
        let state = match side {
            Side::Source => entry.state,
            Side::Destination => match self.read(&self.path(id, "decision"))? {
                Some(decision) => decision.state,
                None => entry.state,
            },
        };
        Ok(match state {
            EntryState::Migrating | EntryState::Incoming => Verdict::Undecided,
            EntryState::HandedOver => Verdict::HandedOver,
            EntryState::Unresolved => Verdict::Unresolved,
            EntryState::RunningHere => Verdict::RunningHere,
            EntryState::NotHere => Verdict::NotHere,
        })
    }

    /// Whether nothing that the source of a migration to this host keeps is of use any more: it asked with the migration's
    /// token.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn is_drained(&self, id: MigrationId, token: &Token) -> Result<bool, JournalError> {
        let entry = self.entry(id, Side::Destination)?;
        Ok(entry.is_some_and(|entry| entry.admits(token) && entry.drained))
    }

    /// Answers a source that wants its VM back: decides `not here` if nothing was decided.
    ///
    /// # Errors
    /// [`JournalError`]; nothing was decided by this call.
    pub fn reclaim(&self, id: MigrationId, token: &Token) -> Result<Verdict, JournalError> {
        match self.entry(id, Side::Destination)? {
            Some(entry) if entry.admits(token) => {
                let decision = Entry { state: EntryState::NotHere, ..entry.renewed() };
                let staged = self.stage(&self.path(id, "decision"), &decision)?;
                self.link(id, &staged)
            }
            _ => Ok(Verdict::Unknown),
        }
    }

    /// Decides by an operator's word what is unresolved. The process of that end, if it lives,
    /// sees it at its next look.
    ///
    /// # Errors
    /// [`JournalError::NotUnresolved`] and [`JournalError::File`].
    pub fn resolve(&self, id: MigrationId, side: Side, owner: Owner) -> Result<(), JournalError> {
        let found = self.verdict(id, side, None)?;
        let Some(entry) = self.entry(id, side)?.filter(|_| found == Verdict::Unresolved) else {
            return Err(JournalError::NotUnresolved { id, side, found });
        };
        let mut entry = entry.renewed();
        entry.state = match (side, owner) {
            (_, Owner::Here) => EntryState::RunningHere,
            (Side::Source, Owner::There) => EntryState::HandedOver,
            (Side::Destination, Owner::There) => EntryState::NotHere,
        };
        match side {
            Side::Source => self.replace(&self.path(id, "source"), &entry),
            Side::Destination => {
                let staged = self.stage(&self.path(id, "decision"), &entry)?;
                self.link(id, &staged).map(drop)
            }
        }
    }

    /// All entries, decisions left out; files that are none are left out too.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn list(&self) -> Result<Vec<Entry>, JournalError> {
        let directory = &self.directory;
        let mut entries = Vec::new();
        for file in fs::read_dir(directory).map_err(|error| failed("list", directory, error))? {
            let path = file.map_err(|error| failed("list", directory, error))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.ends_with(".source.json") || name.ends_with(".destination.json") {
                entries.extend(self.read(&path).ok().flatten());
            }
        }
        entries.sort_by(|a, b| (a.updated, &a.id).cmp(&(b.updated, &b.id)));
        Ok(entries)
    }

    /// Removes all of a migration.
    ///
    /// # Errors
    /// [`JournalError::File`].
    pub fn forget(&self, id: MigrationId) -> Result<(), JournalError> {
        for part in ["source", "destination", "decision"] {
            let path = self.path(id, part);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn path(&self, id: MigrationId, part: &str) -> PathBuf {
        self.directory.join(format!("{id}.{part}.json"))
    }

    fn entry(&self, id: MigrationId, side: Side) -> Result<Option<Entry>, JournalError> {
        match side {
            Side::Source => self.read(&self.path(id, "source")),
            Side::Destination => self.read(&self.path(id, "destination")),
        }
    }

    fn read(&self, path: &Path) -> Result<Option<Entry>, JournalError> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.len() <= MAX_ENTRY_BYTES => {}
            Ok(metadata) => {
                let problem = format!("it has {} bytes", metadata.len());
                return Err(JournalError::Malformed { path: path.to_owned(), problem });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", path, error)),
        }
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", path, error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| JournalError::Malformed {
            path: path.to_owned(),
            problem: error.to_string(),
        })
    }

    /// Writes an entry beside its place.
    fn stage(&self, target: &Path, entry: &Entry) -> Result<Staged, JournalError> {
        // Tells writers of one process apart.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut name = target.as_os_str().to_owned();
        name.push(format!(".tmp.{}.{number}", std::process::id()));
        let staged = Staged { path: PathBuf::from(name) };
        let text = serde_json::to_vec(entry).map_err(|error| JournalError::Malformed {
            path: target.to_owned(),
            problem: error.to_string(),
        })?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&staged.path)
            .and_then(|mut file| file.write_all(&text))
            .map_err(|error| failed("write", &staged.path, error))?;
        Ok(staged)
    }

    fn replace(&self, target: &Path, entry: &Entry) -> Result<(), JournalError> {
        self.stage(target, entry)?.rename(target)
    }

    /// Makes a staged decision the decision, unless there is one; gives the one that holds.
    fn link(&self, id: MigrationId, staged: &Staged) -> Result<Verdict, JournalError> {
        let path = self.path(id, "decision");
        match fs::hard_link(&staged.path, &path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("write", &path, error)),
        }
        match self.read(&path)?.map(|decision| decision.state) {
            Some(EntryState::RunningHere) => Ok(Verdict::RunningHere),
            Some(EntryState::NotHere) => Ok(Verdict::NotHere),
            other => Err(JournalError::Malformed { path, problem: format!("it says {other:?}") }),
        }
    }
}

impl Entry {
    fn new(id: MigrationId, side: Side, state: EntryState, vm: &str, peer: &str) -> Self {
        Self {
            id: id.to_string(),
            side,
            state,
            vm: vm.to_owned(),
            peer: peer.to_owned(),
            token: String::new(),
            pid: std::process::id(),
            updated: now(),
            missing_pages: None,
            drained: false,
        }
    }

    fn renewed(&self) -> Self {
        Self { pid: std::process::id(), updated: now(), ..self.clone() }
    }

    fn set_token(&mut self, token: &Token) {
        self.token = MigrationId(token.bytes()).to_string();
    }

    fn admits(&self, token: &Token) -> bool {
        from_hex(&self.token).is_some_and(|mine| Token::from_bytes(mine).matches(token))
    }
}

/// A complete file beside its place; removed when dropped.
#[derive(Debug)]
struct Staged {
    path: PathBuf,
}

impl Staged {
    fn rename(&self, target: &Path) -> Result<(), JournalError> {
        fs::rename(&self.path, target).map_err(|error| failed("write", target, error))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a rename there is nothing of this name.
        let _ = fs::remove_file(&self.path);
    }
}

/// The entry of a running source.
#[derive(Debug)]
pub struct SourceEntry {
    journal: Journal,
    id: MigrationId,
    entry: Entry,
    /// `handed over`, written ahead.
    staged: Option<Staged>,
    /// The file says the same.
    written: bool,
}

impl SourceEntry {
    /// Notes the token, which a destination on this host is asked with.
    pub(crate) fn set_token(&mut self, token: &Token) -> Result<(), JournalError> {
        self.entry.set_token(token);
        self.set(self.entry.state)
    }

    /// Writes `handed over` beside its place, so that [`SourceEntry::hand_over`] is a rename.
    pub(crate) fn stage(&mut self) -> Result<(), JournalError> {
        let entry = Entry { state: EntryState::HandedOver, ..self.entry.renewed() };
        self.staged = Some(self.journal.stage(&self.journal.path(self.id, "source"), &entry)?);
        Ok(())
    }

    /// Makes the entry `handed over`.
    pub(crate) fn hand_over(&mut self) -> Result<(), JournalError> {
        match self.staged.take() {
            Some(staged) => {
                staged.rename(&self.journal.path(self.id, "source"))?;
                self.entry.state = EntryState::HandedOver;
                Ok(())
            }
            None => self.set(EntryState::HandedOver),
        }
    }

    pub(crate) fn set(&mut self, state: EntryState) -> Result<(), JournalError> {
        self.entry.state = state;
        let path = self.journal.path(self.id, "source");
        let written = self.journal.replace(&path, &self.entry.renewed());
        self.written = written.is_ok();
        written
    }

    /// What an operator made of it, if one did: nobody can before it is written what there is to resolve, which is tried
    /// again.
    pub(crate) fn resolved(&mut self) -> Option<Owner> {
        if !self.written {
            self.set(self.entry.state).ok()?;
        }
        let entry = self.journal.entry(self.id, Side::Source).ok()??;
        match entry.state {
            EntryState::RunningHere => Some(Owner::Here),
            EntryState::HandedOver => Some(Owner::There),
            _ => None,
        }
    }
}

/// The entry of a running destination.
#[derive(Debug)]
pub struct DestinationEntry {
    journal: Journal,
    id: MigrationId,
    entry: Entry,
    /// The decision `running here`, written ahead.
    staged: Option<Staged>,
    /// The file says the same.
    written: bool,
}

impl DestinationEntry {
    /// Writes the decision `running here` beside its place, so that deciding is a link.
    pub(crate) fn stage(&mut self) -> Result<(), JournalError> {
        self.staged = Some(self.stage_decision(EntryState::RunningHere)?);
        Ok(())
    }

    fn stage_decision(&self, state: EntryState) -> Result<Staged, JournalError> {
        let decision = Entry { state, ..self.entry.renewed() };
        self.journal.stage(&self.journal.path(self.id, "decision"), &decision)
    }

    /// Decides, unless it was decided; says what holds.
    pub(crate) fn decide(&mut self, owner: Owner) -> Result<Owner, JournalError> {
        let staged = match (owner, self.staged.take()) {
            (Owner::Here, Some(staged)) => staged,
            (Owner::Here, None) => self.stage_decision(EntryState::RunningHere)?,
            (Owner::There, _) => self.stage_decision(EntryState::NotHere)?,
        };
        match self.journal.link(self.id, &staged)? {
            Verdict::RunningHere => Ok(Owner::Here),
            _ => Ok(Owner::There),
        }
    }

    /// The decision, if it was made, by whomever. An operator makes none before it is written that there is one to make,
    /// which is tried again.
    pub(crate) fn decision(&mut self) -> Option<Owner> {
        if !self.written {
            // The next time, if not now.
            let _ = self.write();
        }
        let entry = self.journal.read(&self.journal.path(self.id, "decision")).ok()??;
        Some(if entry.state == EntryState::RunningHere { Owner::Here } else { Owner::There })
    }

    /// Whether the source is on this host and has given the VM away.
    pub(crate) fn source_handed_over(&self) -> bool {
        let entry = self.journal.entry(self.id, Side::Source);
        entry.is_ok_and(|entry| entry.is_some_and(|e| e.state == EntryState::HandedOver))
    }

    /// Notes how many pages are missing, or that none is.
    pub(crate) fn set_missing(&mut self, pages: Option<u64>) -> Result<(), JournalError> {
        self.entry.missing_pages = pages;
        self.write()
    }

    /// Notes that pages are waited for no more, of which so many did not come before the VM ended.
    pub(crate) fn drained(&mut self, missing: Option<u64>) -> Result<(), JournalError> {
        self.entry.drained = true;
        self.set_missing(missing)
    }

    /// Notes that nobody knows who owns the VM.
    pub(crate) fn unresolved(&mut self) -> Result<(), JournalError> {
        self.entry.state = EntryState::Unresolved;
        self.write()
    }

    fn write(&mut self) -> Result<(), JournalError> {
        let path = self.journal.path(self.id, "destination");
        let written = self.journal.replace(&path, &self.entry.renewed());
        self.written = written.is_ok();
        written
    }
}

fn failed(what: &'static str, path: &Path, error: io::Error) -> JournalError {
    JournalError::File { what, path: path.to_owned(), error }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
