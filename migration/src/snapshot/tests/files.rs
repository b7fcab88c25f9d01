//! A snapshot's file appears complete or not at all.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::simulated::Operation;
use crate::snapshot::PendingSnapshot;
use crate::vm::VmState;

fn go_on(_: crate::snapshot::SaveProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A disk that is full after so many bytes.
struct FullDisk<'a> {
    file: File,
    room: &'a Cell<usize>,
}

impl Write for FullDisk<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(self.room.get());
        if length == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.room.set(self.room.get() - length);
        self.file.write(&bytes[..length])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_snapshot_has_its_name_only_after_commit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let vm = small_vm();
    let pending = PendingSnapshot::write(&path, source(&vm, Vec::new()), &mut go_on).unwrap();
    assert!(!path.exists());
    assert_eq!(names(directory.path()).len(), 1);
    let summary = pending.commit().unwrap();
    assert_eq!(names(directory.path()), ["vm.snap"]);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), summary.file_bytes);
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    let destination = empty_vm();
    let (_, reader) = SnapshotReader::open(&path).unwrap();
    reader.load_memory(&destination).unwrap().sections().unwrap();
    assert_same_memory(&vm, &destination);
}

#[test]
fn a_full_disk_keeps_the_old_file_and_leaves_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    fs::write(&path, b"the old one").unwrap();
    let vm = small_vm();
    let size = {
        let pending = PendingSnapshot::write(&path, source(&vm, Vec::new()), &mut go_on).unwrap();
        drop(pending);
        save_with_blobs(&vm, &[]).len()
    };
    for room in (0..size).step_by(13).chain([size - 1]) {
        let room_left = Cell::new(room);
        let error = PendingSnapshot::write_through(
            &path,
            StreamKind::Snapshot,
            source(&vm, Vec::new()),
            &mut go_on,
            |file| FullDisk { file, room: &room_left },
        )
        .unwrap_err();
        assert!(matches!(error, SnapshotError::Save { .. }), "{error}");
        assert!(error.to_string().contains("untouched"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"the old one");
        assert_eq!(names(directory.path()), ["vm.snap"], "with room for {room} bytes");
    }
    let room_left = Cell::new(size);
    let pending = PendingSnapshot::write_through(
        &path,
        StreamKind::Snapshot,
        source(&vm, Vec::new()),
        &mut go_on,
        |file| FullDisk { file, room: &room_left },
    )
    .unwrap();
    pending.commit().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), size as u64);
}

#[test]
fn a_cancelled_save_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.snap");
    let error = PendingSnapshot::write(&path, source(&small_vm(), Vec::new()), &mut |_| {
        ControlFlow::Break(())
    })
    .unwrap_err();
    assert!(matches!(error, SnapshotError::Cancelled));
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn only_regular_files_are_replaced_or_read() {
    let directory = tempfile::tempdir().unwrap();
    let vm = small_vm();
    for path in [directory.path(), Path::new("/dev/null"), Path::new("/")] {
        let error = PendingSnapshot::write(path, source(&vm, Vec::new()), &mut go_on).unwrap_err();
        assert!(matches!(error, SnapshotError::NotAFile(_)), "{error}");
        let error = SnapshotReader::open(path).unwrap_err();
        assert!(matches!(error, SnapshotError::NotAFile(_)), "{error}");
    }
    let nowhere = directory.path().join("no/such/directory/vm.snap");
    let error = PendingSnapshot::write(&nowhere, source(&vm, Vec::new()), &mut go_on).unwrap_err();
    assert!(error.to_string().contains("no/such/directory"), "{error}");
    assert!(SnapshotReader::open(&nowhere).is_err());
}

/// Taking the state would write to memory that others still need as it is.
#[test]
fn what_was_left_behind_is_memory_alone_and_no_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("remains");
    let vm = small_vm();
    vm.fail(Operation::Save, 1);
    let pending = PendingSnapshot::write_remains(&path, source(&vm, Vec::new()), &mut go_on);
    assert!(pending.unwrap().commit().unwrap().data_pages > 0);
    let refused = SnapshotReader::open(&path).err().unwrap();
    assert!(matches!(&refused, SnapshotError::Remains(at) if *at == path), "{refused}");
    assert!(vm.save_sections().is_err(), "it was not asked before");
}
