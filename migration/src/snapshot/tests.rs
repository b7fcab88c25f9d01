#![allow(clippy::unwrap_used)]

mod damage;
mod files;
mod round_trip;

use std::ops::ControlFlow;
use std::path::Path;

use crate::address::{Gfn, PageRange};
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::simulated::SimulatedVm;
use crate::snapshot::save::write_snapshot;
use crate::snapshot::{BlobSource, SnapshotError, SnapshotHeader, SnapshotReader, SnapshotSource};
use crate::stream::{BlobKind, Config, Machine, StreamKind};
use crate::vm::{GuestMemory, Section};

/// Two regions that touch and one beyond a hole.
const REGIONS: [(u64, u64); 3] = [(0, 6), (6, 3), (1 << 20, 4)];

fn range(start: u64, pages: u64) -> PageRange {
    PageRange::new(Gfn(start), pages).unwrap()
}

fn layout(regions: &[(u64, u64)]) -> MemoryLayout {
    MemoryLayout::new(regions.iter().map(|(start, pages)| range(*start, *pages))).unwrap()
}

fn empty_vm() -> SimulatedVm {
    SimulatedVm::new(layout(&REGIONS)).unwrap()
}

/// Pages on both sides of a border between regions, a populated page of zeros, two states.
fn small_vm() -> SimulatedVm {
    let vm = empty_vm();
    for gfn in [5, 6, (1 << 20) + 3] {
        vm.guest_write(Gfn(gfn), format!("page {gfn}").as_bytes()).unwrap();
    }
    vm.guest_write(Gfn(2), &[0]).unwrap();
    let section = |kind: &str, instance, data: &[u8]| Section {
        kind: kind.to_owned(),
        instance,
        version: 3,
        data: data.to_vec(),
    };
    vm.set_sections(vec![section("vcpu", 0, b"registers"), section("vcpu", 1, b"")]);
    vm
}

fn machine() -> Machine {
    Machine { program_version: "0.1.0".to_owned(), identity_version: 1, identity: vec![1, 2, 3] }
}

fn config() -> Config {
    Config { version: 2, data: b"cpus = 1".to_vec() }
}

fn source<'a>(vm: &'a SimulatedVm, blobs: Vec<BlobSource<'a>>) -> SnapshotSource<'a> {
    SnapshotSource { machine: machine(), config: config(), blobs, memory: vm, state: vm }
}

fn save_with_blobs(vm: &SimulatedVm, blobs: &[(BlobKind, &[u8])]) -> Vec<u8> {
    let mut readers: Vec<_> = blobs.to_vec();
    let blobs = readers
        .iter_mut()
        .map(|(kind, data)| BlobSource { kind: *kind, length: data.len() as u64, reader: data })
        .collect();
    let mut bytes = Vec::new();
    write_snapshot(&mut bytes, StreamKind::Snapshot, source(vm, blobs), &mut |_| {
        ControlFlow::Continue(())
    })
    .unwrap();
    bytes
}

fn save(vm: &SimulatedVm) -> Vec<u8> {
    save_with_blobs(vm, &[(BlobKind::Kernel, b"kernel")])
}

fn restore_into(
    bytes: &[u8],
    vm: &SimulatedVm,
) -> Result<(SnapshotHeader, Vec<Section>), SnapshotError> {
    let (header, reader) = SnapshotReader::from_stream(bytes, Path::new("test"))?;
    let sections = reader.load_memory(vm)?.sections()?;
    Ok((header, sections))
}

fn restore(bytes: &[u8]) -> Result<(SnapshotHeader, Vec<Section>), SnapshotError> {
    restore_into(bytes, &empty_vm())
}

fn assert_same_memory(a: &SimulatedVm, b: &SimulatedVm) {
    for run in PageSet::full(a.layout()).runs() {
        for gfn in run.start().0..run.end().0 {
            let (mine, theirs) = (a.read_page(Gfn(gfn)).unwrap(), b.read_page(Gfn(gfn)).unwrap());
            assert!(mine == theirs, "page frame {gfn:#x} differs");
        }
    }
}
