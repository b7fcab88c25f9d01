//! Files that nobody wrote.

use std::path::Path;

use migration::handover::Owner;
use migration::journal::{Journal, Side};
use migration::simulated::SimulatedVm;
use migration::snapshot::SnapshotReader;
use migration::stream::StreamKind;
use migration::{MigrationId, Token};

use super::frames::{stream, Bytes};

/// Most memory that a host provides for a saved VM here, pages.
const HOST_PAGES: u64 = 4096;

/// Restores a VM.
pub fn snapshot(bytes: &[u8]) {
    let stream = stream(bytes, StreamKind::Snapshot);
    let path = Path::new("a file");
    let Ok((header, reader)) = SnapshotReader::from_stream(&stream[..], path) else { return };
    let pages: u64 = header.layout.regions().map(|region| region.pages()).sum();
    if pages > HOST_PAGES {
        return;
    }
    let vm = SimulatedVm::new(header.layout).expect("so much memory is there");
    let Ok(state) = reader.load_memory(&vm) else { return };
    let _ = state.sections();
}

/// Asks a journal that has these files.
pub fn journal(bytes: &[u8]) {
    let directory = tempfile::tempdir().expect("a directory");
    let id = MigrationId([0x11; 16]);
    let mut input = Bytes(bytes);
    let deeds = input.byte();
    for part in ["source", "destination", "decision"] {
        let contents = input.some();
        if !contents.is_empty() {
            let path = directory.path().join(format!("{id}.{part}.json"));
            std::fs::write(path, contents).expect("a file");
        }
    }
    let Ok(journal) = Journal::open(directory.path()) else { return };
    let token = Token::random().expect("random bytes");
    let _ = journal.list();
    for side in [Side::Source, Side::Destination] {
        let _ = journal.verdict(id, side, Some(&token));
        let _ = journal.verdict(id, side, None);
    }
    if deeds & 1 != 0 {
        let _ = journal.reclaim(id, &token);
    }
    if deeds & 2 != 0 {
        let _ = journal.resolve(id, Side::Destination, Owner::Here);
    }
    if deeds & 4 != 0 {
        let _ = journal.resolve(id, Side::Source, Owner::There);
    }
    let decided = journal.verdict(id, Side::Destination, None);
    // A decision stands.
    let _ = journal.resolve(id, Side::Destination, Owner::There);
    if let (Ok(before), Ok(after)) = (decided, journal.verdict(id, Side::Destination, None)) {
        use migration::handover::Verdict::{NotHere, RunningHere};
        if matches!(before, RunningHere | NotHere) {
            assert_eq!(before, after);
        }
    }
}
