//! Old entries of migrations that are over.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::io::Errno;
use rustix::process::{test_kill_process, Pid};

use super::{failed, Entry, EntryState, Journal, JournalError};

/// How long the entries of a migration that is over are kept. A peer that has been unreachable for
/// longer gets no answer: it stays frozen until its operator decides.
pub(super) const KEPT: Duration = Duration::from_secs(30 * 24 * 3600);

/// What the journal has of one migration.
#[derive(Default)]
struct Parts {
    source: Option<PathBuf>,
    destination: Option<PathBuf>,
    decision: Option<PathBuf>,
    /// Files that a killed process was about to put in place.
    staged: Vec<PathBuf>,
}

impl Journal {
    /// Removes the entries of migrations of which all that this host knows is older than `before`, and final or
    /// abandoned: under way by the word of a process that is no more, and took its copy of the VM along.
    /// What is unresolved stays, and so do files that are no entries.
    ///
    /// # Errors
    /// [`JournalError::File`]; some may have been removed.
    pub fn prune(&self, before: SystemTime) -> Result<(), JournalError> {
        for parts in self.parts()?.into_values() {
            if self.is_over(&parts, before)? {
                // The decision last: as long as there is an entry, nobody may decide again.
                let entries = parts.source.into_iter().chain(parts.destination);
                for path in entries.chain(parts.staged).chain(parts.decision) {
                    match fs::remove_file(&path) {
                        // Others prune too.
                        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                            return Err(failed("remove", &path, error));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// The journal's files by migration id.
    fn parts(&self) -> Result<BTreeMap<String, Parts>, JournalError> {
        let directory = &self.directory;
        let mut all: BTreeMap<String, Parts> = BTreeMap::new();
        for file in fs::read_dir(directory).map_err(|error| failed("list", directory, error))? {
            let path = file.map_err(|error| failed("list", directory, error))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some((id, part)) = name.split_once('.') else { continue };
            let parts = all.entry(id.to_owned()).or_default();
            match part {
                "source.json" => parts.source = Some(path),
                "destination.json" => parts.destination = Some(path),
                "decision.json" => parts.decision = Some(path),
                _ if part.contains(".json.tmp.") => parts.staged.push(path),
                _ => {}
            }
        }
        Ok(all)
    }

    fn is_over(&self, parts: &Parts, before: SystemTime) -> Result<bool, JournalError> {
        let files = [&parts.source, &parts.destination, &parts.decision];
        let files = files.into_iter().flatten().chain(&parts.staged);
        // Without reading those that are new, which are most.
        for path in files {
            match fs::metadata(path).and_then(|metadata| metadata.modified()) {
                Ok(modified) if modified < before => {}
                Ok(_) => return Ok(false),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("examine", path, error)),
            }
        }
        let read = |path: &PathBuf| self.read(path).ok().flatten();
        let source = parts.source.as_ref().is_none_or(|path| {
            read(path).is_some_and(|entry| match entry.state {
                EntryState::HandedOver | EntryState::RunningHere => true,
                EntryState::Migrating => is_abandoned(&entry),
                _ => false,
            })
        });
        let destination = match (&parts.destination, &parts.decision) {
            (None, None) => true,
            (_, Some(decision)) => read(decision).is_some_and(|entry| {
                matches!(entry.state, EntryState::NotHere | EntryState::RunningHere)
            }),
            (Some(path), None) => read(path)
                .is_some_and(|entry| entry.state == EntryState::Incoming && is_abandoned(&entry)),
        };
        Ok(source && destination)
    }
}

/// Whether the process that wrote an entry is no more. One that has its number now counts as that one, so
/// that the entry stays too long rather than go too early.
///
/// Such a source never sent COMMIT, since `handed over` comes before it, and such a destination never ran the guest, since
/// its decision comes before that. What is left to answer is *undecided*, which resolves nothing, as *unknown* does.
fn is_abandoned(entry: &Entry) -> bool {
    let pid = i32::try_from(entry.pid).ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::handover::{Owner, Verdict};
    use crate::identity::{MigrationId, Token};
    use crate::journal::{DestinationEntry, Side, SourceEntry};

    struct Bench {
        journal: Journal,
        _directory: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            Self { journal: Journal::open(directory.path()).unwrap(), _directory: directory }
        }

        fn source(&self, id: MigrationId) -> SourceEntry {
            self.journal.begin_source(id, "web", "there").unwrap()
        }

        fn destination(&self, id: MigrationId) -> DestinationEntry {
            let token = Token::random().unwrap();
            self.journal.begin_destination(id, "web", "there", &token).unwrap()
        }

        fn files(&self) -> usize {
            fs::read_dir(&self.journal.directory).unwrap().count()
        }

        /// Prunes as if it were so much later.
        fn prune_after(&self, later: Duration) {
            self.journal.prune(SystemTime::now() + later - KEPT).unwrap();
        }
    }

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn what_is_over_goes_when_it_is_old() {
        let bench = Bench::new();
        let new = || MigrationId::random().unwrap();
        bench.source(new()).hand_over().unwrap();
        bench.source(new()).set(EntryState::RunningHere).unwrap();
        bench.destination(new()).decide(Owner::Here).unwrap();
        bench.destination(new()).decide(Owner::There).unwrap();
        // Both ends on one host, one of them resolved by an operator.
        let id = new();
        bench.source(id).hand_over().unwrap();
        bench.destination(id).unresolved().unwrap();
        bench.journal.resolve(id, Side::Destination, Owner::Here).unwrap();
        // Killed before the last step.
        let mut staged = bench.source(new());
        staged.stage().unwrap();
        staged.set(EntryState::RunningHere).unwrap();
        std::mem::forget(staged);

        let all = bench.files();
        bench.prune_after(29 * DAY);
        assert_eq!(bench.files(), all);
        bench.prune_after(31 * DAY);
        assert_eq!(bench.files(), 0);
    }

    #[test]
    fn what_is_not_over_stays() {
        let bench = Bench::new();
        let new = || MigrationId::random().unwrap();
        let (migrating, incoming, unresolved, frozen) = (new(), new(), new(), new());
        let _source = bench.source(migrating);
        let _destination = bench.destination(incoming);
        bench.destination(unresolved).unresolved().unwrap();
        bench.source(frozen).set(EntryState::Unresolved).unwrap();
        // One end is done and the other, on the same host, is not.
        let half = new();
        bench.source(half).hand_over().unwrap();
        bench.destination(half).unresolved().unwrap();
        let other_half = new();
        bench.source(other_half).set(EntryState::Unresolved).unwrap();
        bench.destination(other_half).decide(Owner::Here).unwrap();
        fs::write(bench.journal.directory.join("note.txt"), "").unwrap();
        fs::write(bench.journal.path(new(), "source"), "damaged").unwrap();

        let all = bench.files();
        bench.prune_after(1000 * DAY);
        assert_eq!(bench.files(), all);
        let verdict = |id, side| bench.journal.verdict(id, side, None).unwrap();
        assert_eq!(verdict(unresolved, Side::Destination), Verdict::Unresolved);
        assert_eq!(verdict(half, Side::Source), Verdict::HandedOver);
        assert_eq!(verdict(other_half, Side::Destination), Verdict::RunningHere);
    }

    /// A number that no process has.
    fn nobody() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn what_its_process_left_undecided_goes_when_it_is_old() {
        let bench = Bench::new();
        let new = || MigrationId::random().unwrap();
        let dead = nobody();
        // As a process that is killed leaves it.
        let killed = |path: PathBuf| {
            let entry = bench.journal.read(&path).unwrap().unwrap();
            bench.journal.replace(&path, &Entry { pid: dead, ..entry }).unwrap();
        };
        let (migrating, incoming, unresolved, frozen) = (new(), new(), new(), new());
        let _source = bench.source(migrating);
        let _destination = bench.destination(incoming);
        bench.destination(unresolved).unresolved().unwrap();
        bench.source(frozen).set(EntryState::Unresolved).unwrap();
        // The destination of the same host may have it all.
        let half = new();
        let _half = bench.source(half);
        bench.destination(half).unresolved().unwrap();
        for id in [migrating, frozen, half] {
            killed(bench.journal.path(id, "source"));
        }
        for id in [incoming, unresolved, half] {
            killed(bench.journal.path(id, "destination"));
        }

        bench.prune_after(29 * DAY);
        assert_eq!(bench.files(), 6);
        bench.prune_after(31 * DAY);
        let left: Vec<_> =
            bench.journal.list().unwrap().into_iter().map(|e| (e.id, e.side)).collect();
        assert_eq!(left.len(), 4, "{left:?}");
        assert!(left
            .iter()
            .all(|(id, _)| ![migrating, incoming].map(|id| id.to_string()).contains(id)));
    }

    #[test]
    fn opening_prunes() {
        let bench = Bench::new();
        let id = MigrationId::random().unwrap();
        bench.source(id).hand_over().unwrap();
        let reopen = || Journal::open(&bench.journal.directory).unwrap();
        assert_eq!(reopen().list().unwrap().len(), 1);
        let file = fs::File::options().write(true).open(bench.journal.path(id, "source")).unwrap();
        file.set_modified(SystemTime::now() - KEPT - DAY).unwrap();
        assert_eq!(reopen().list().unwrap(), []);
    }
}
