#![allow(clippy::unwrap_used)]
use super::*;

fn journal() -> (tempfile::TempDir, Journal) {
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal::open(&directory.path().join("state/minivmm")).unwrap();
    (directory, journal)
}

#[test]
fn a_source_is_followed_from_its_beginning_to_its_end() {
    let (_directory, journal) = journal();
    let id = MigrationId::random().unwrap();
    let verdict = || journal.verdict(id, Side::Source, None).unwrap();
    assert_eq!(verdict(), Verdict::Unknown);
    let mut entry = journal.begin_source(id, "web", "there:1").unwrap();
    assert_eq!(verdict(), Verdict::Undecided);
    entry.stage().unwrap();
    assert_eq!(verdict(), Verdict::Undecided, "staging says nothing");
    entry.hand_over().unwrap();
    assert_eq!(verdict(), Verdict::HandedOver);
    let resolved = journal.resolve(id, Side::Source, Owner::Here);
    assert!(matches!(resolved, Err(JournalError::NotUnresolved { .. })), "it is final");
    entry.set(EntryState::Unresolved).unwrap();
    assert_eq!(verdict(), Verdict::Unresolved);
    assert_eq!(entry.resolved(), None);
    journal.resolve(id, Side::Source, Owner::Here).unwrap();
    assert_eq!((verdict(), entry.resolved()), (Verdict::RunningHere, Some(Owner::Here)));
    let found = journal.list().unwrap();
    assert_eq!((found.len(), found[0].vm.as_str()), (1, "web"));
    journal.forget(id).unwrap();
    assert_eq!(verdict(), Verdict::Unknown);
    assert_eq!(fs::read_dir(&journal.directory).unwrap().count(), 0, "nothing lies about");
}

/// A journal in the same directory that can be read and not written: names of files that are staged are too long.
fn full(journal: &Journal, id: MigrationId) -> Journal {
    /// PATH_MAX, with the zero at its end.
    const MOST: usize = 4096;
    let mut directory = journal.directory.clone().into_os_string();
    while directory.len() + "/.".len() + journal.path(id, "destination").file_name().unwrap().len()
        < MOST - 2
    {
        directory.push("/.");
    }
    Journal { directory: directory.into() }
}

#[test]
fn nobody_has_resolved_what_is_not_written_yet() {
    let (_directory, journal) = journal();
    let (id, token) = (MigrationId::random().unwrap(), Token::random().unwrap());
    let mut source = journal.begin_source(id, "web", "there:1").unwrap();
    let mut destination = journal.begin_destination(id, "web", "from:1", &token).unwrap();
    source.hand_over().unwrap();
    (source.journal, destination.journal) = (full(&journal, id), full(&journal, id));
    source.set(EntryState::Unresolved).unwrap_err();
    destination.unresolved().unwrap_err();
    let verdict = |side| journal.verdict(id, side, None).unwrap();
    assert_eq!(verdict(Side::Source), Verdict::HandedOver, "as it was written before");
    assert_eq!((source.resolved(), destination.decision()), (None, None));
    (source.journal, destination.journal) = (journal.clone(), journal.clone());
    assert_eq!((source.resolved(), destination.decision()), (None, None));
    for side in [Side::Source, Side::Destination] {
        assert_eq!(verdict(side), Verdict::Unresolved, "there is room again");
        journal.resolve(id, side, Owner::Here).unwrap();
    }
    assert_eq!(source.resolved(), Some(Owner::Here));
    assert_eq!(destination.decision(), Some(Owner::Here));
}

#[test]
fn only_the_first_decision_counts() {
    for first in [Owner::Here, Owner::There] {
        let (_directory, journal) = journal();
        let id = MigrationId::random().unwrap();
        let token = Token::random().unwrap();
        let mut entry = journal.begin_destination(id, "web", "from:1", &token).unwrap();
        entry.stage().unwrap();
        match first {
            Owner::Here => {
                assert_eq!(entry.decide(Owner::Here).unwrap(), Owner::Here);
                assert_eq!(journal.reclaim(id, &token).unwrap(), Verdict::RunningHere);
            }
            Owner::There => {
                assert_eq!(journal.reclaim(id, &token).unwrap(), Verdict::NotHere);
                assert_eq!(entry.decide(Owner::Here).unwrap(), Owner::There);
            }
        }
        assert_eq!(entry.decision(), Some(first));
        assert_eq!(entry.decide(Owner::There).unwrap(), first);
    }
}

#[test]
fn racing_deciders_agree() {
    for _ in 0..50 {
        let (_directory, journal) = journal();
        let id = MigrationId::random().unwrap();
        let token = Token::random().unwrap();
        let mut entry = journal.begin_destination(id, "web", "from:1", &token).unwrap();
        let (here, reclaimed) = std::thread::scope(|scope| {
            let reclaim = scope.spawn(|| journal.reclaim(id, &token).unwrap());
            (entry.decide(Owner::Here).unwrap(), reclaim.join().unwrap())
        });
        assert_eq!(here == Owner::Here, reclaimed == Verdict::RunningHere);
    }
}

#[test]
fn a_stranger_learns_and_decides_nothing() {
    let (_directory, journal) = journal();
    let id = MigrationId::random().unwrap();
    let (token, wrong) = (Token::random().unwrap(), Token::random().unwrap());
    let mut entry = journal.begin_destination(id, "web", "from:1", &token).unwrap();
    assert_eq!(journal.reclaim(id, &wrong).unwrap(), Verdict::Unknown);
    let verdict = |token| journal.verdict(id, Side::Destination, token).unwrap();
    assert_eq!(verdict(Some(&wrong)), Verdict::Unknown);
    assert_eq!(verdict(Some(&token)), Verdict::Undecided);
    assert_eq!(entry.decision(), None);
    let mode = |path: &Path| {
        use std::os::unix::fs::PermissionsExt;
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode(&journal.directory), 0o700);
    assert_eq!(mode(&journal.path(id, "destination")), 0o600);
}

#[test]
fn a_destination_on_the_same_host_sees_that_the_source_gave_up() {
    let (_directory, journal) = journal();
    let id = MigrationId::random().unwrap();
    let token = Token::random().unwrap();
    let mut source = journal.begin_source(id, "web", "here").unwrap();
    let mut destination = journal.begin_destination(id, "web", "here", &token).unwrap();
    assert!(!destination.source_handed_over());
    source.hand_over().unwrap();
    assert!(destination.source_handed_over());
    destination.unresolved().unwrap();
    journal.resolve(id, Side::Destination, Owner::Here).unwrap();
    assert_eq!(destination.decision(), Some(Owner::Here));
}

#[test]
fn damage_is_named_and_litter_ignored() {
    let (_directory, journal) = journal();
    let id = MigrationId::random().unwrap();
    fs::write(journal.path(id, "source"), b"{").unwrap();
    let error = journal.verdict(id, Side::Source, None).unwrap_err();
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    fs::write(journal.path(id, "source"), vec![b' '; 100 << 10]).unwrap();
    assert!(journal.verdict(id, Side::Source, None).is_err());
    fs::write(journal.directory.join("x.source.json.tmp.1.1"), b"").unwrap();
    assert_eq!(journal.list().unwrap(), []);
}
