//! What was saved comes back.

use proptest::prelude::*;

use super::*;
use crate::vm::VmState;

#[test]
fn a_small_vm_comes_back_whole() {
    let vm = small_vm();
    let (header, sections) = {
        let destination = empty_vm();
        let loaded = restore_into(&save(&vm), &destination).unwrap();
        assert_same_memory(&vm, &destination);
        let populated: Vec<_> = destination.populated().unwrap().runs().collect();
        assert_eq!(
            populated,
            [range(5, 1), range(6, 1), range((1 << 20) + 3, 1)],
            "neither zero nor absent pages cost memory"
        );
        loaded
    };
    assert_eq!(header.machine, machine());
    assert_eq!(header.config, config());
    assert_eq!(header.layout, layout(&REGIONS));
    assert_eq!(header.blobs.len(), 1);
    assert_eq!(
        (header.blobs[0].kind, &header.blobs[0].data[..]),
        (BlobKind::Kernel, &b"kernel"[..])
    );
    assert_eq!(sections, vm.save_sections().unwrap());
}

#[test]
fn blobs_of_every_size_come_back() {
    for size in [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20] {
        let kernel: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let blobs = [(BlobKind::Initrd, &b"initrd"[..]), (BlobKind::Kernel, &kernel[..])];
        let (header, _) = restore(&save_with_blobs(&empty_vm(), &blobs)).unwrap();
        assert_eq!(header.blobs.len(), 2);
        assert_eq!(header.blobs[0].data, b"initrd");
        assert!(header.blobs[1].data == kernel, "a kernel of {size} bytes");
    }
}

#[test]
fn a_blob_shorter_than_announced_or_doubled_is_refused() {
    let vm = empty_vm();
    let mut data = &b"short"[..];
    let blobs = vec![BlobSource { kind: BlobKind::Kernel, length: 6, reader: &mut data }];
    let mut go_on = |_| ControlFlow::Continue(());
    let error =
        write_snapshot(&mut Vec::new(), StreamKind::Snapshot, source(&vm, blobs), &mut go_on)
            .unwrap_err();
    assert!(error.at(Path::new("f")).to_string().contains("cannot read Kernel"));
    let (mut one, mut two) = (&b"1"[..], &b"2"[..]);
    let blobs = vec![
        BlobSource { kind: BlobKind::Kernel, length: 1, reader: &mut one },
        BlobSource { kind: BlobKind::Kernel, length: 1, reader: &mut two },
    ];
    assert!(write_snapshot(&mut Vec::new(), StreamKind::Snapshot, source(&vm, blobs), &mut go_on)
        .is_err());
}

#[test]
fn memory_that_was_used_before_is_zeroed_where_the_snapshot_has_nothing() {
    let vm = small_vm();
    let destination = empty_vm();
    for run in PageSet::full(destination.layout()).runs() {
        for gfn in run.start().0..run.end().0 {
            destination.guest_write(Gfn(gfn), &[0xaa; 4096]).unwrap();
        }
    }
    restore_into(&save(&vm), &destination).unwrap();
    assert_same_memory(&vm, &destination);
}

#[test]
fn another_memory_layout_is_refused_by_name() {
    let other = SimulatedVm::new(layout(&[(0, 9), (1 << 20, 4)])).unwrap();
    let error = restore_into(&save(&small_vm()), &other).unwrap_err();
    assert!(matches!(error, SnapshotError::LayoutDiffers { .. }));
    assert!(error.to_string().contains("6 pages at page frame 0x0"), "{error}");
    assert!(error.to_string().contains("9 pages at page frame 0x0"), "{error}");
}

#[test]
fn only_populated_pages_that_hold_something_cost_room() {
    // 16 GiB with the hole below 4 GiB; the simulated VM maps it and touches next to nothing.
    let vm = SimulatedVm::new(layout(&[(0, 0xc_0000), (0x10_0000, 0x34_0000)])).unwrap();
    for i in 0..300 {
        vm.guest_write(Gfn(0x10_0000 + i * 3), &[1; 100]).unwrap();
        vm.guest_write(Gfn(0x10_0000 + i * 3 + 1), &[0; 100]).unwrap();
    }
    let mut bytes = Vec::new();
    let mut last = None;
    let summary = write_snapshot(
        &mut bytes,
        StreamKind::Snapshot,
        source(&vm, Vec::new()),
        &mut |progress| {
            last = Some(progress);
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    assert_eq!((summary.data_pages, summary.zero_pages), (300, 300));
    assert_eq!(summary.absent_pages, (16 << 18) - 600);
    assert_eq!(summary.file_bytes, bytes.len() as u64);
    assert!(bytes.len() < 300 * 4096 + 30_000, "{} bytes", bytes.len());
    let last = last.unwrap();
    assert_eq!((last.pages_done, last.pages_total), (600, 600));
}

/// The bytes of the format, so that it cannot change unnoticed. If this fails, the change needs a
/// new protocol version, and readers of the old one.
#[test]
fn the_format_is_what_it_was() {
    let vm = SimulatedVm::new(layout(&[(0, 2), (0x10_0000, 2)])).unwrap();
    vm.guest_write(Gfn(0), &[0x11; 4096]).unwrap();
    vm.guest_write(Gfn(1), &[0]).unwrap();
    vm.set_sections(small_vm().save_sections().unwrap());
    let bytes = save(&vm);
    let golden = include_str!("golden-v1.hex");
    assert_eq!(to_text(&bytes), golden, "the new bytes are on the left");
    let golden = from_text(golden);
    let destination = SimulatedVm::new(layout(&[(0, 2), (0x10_0000, 2)])).unwrap();
    restore_into(&golden, &destination).unwrap();
    assert_same_memory(&vm, &destination);
}

/// Sixteen bytes a line; a line that repeats is counted instead.
fn to_text(bytes: &[u8]) -> String {
    let mut lines: Vec<(String, usize)> = Vec::new();
    for chunk in bytes.chunks(16) {
        let line = chunk.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        match lines.last_mut() {
            Some((last, count)) if *last == line => *count += 1,
            _ => lines.push((line, 1)),
        }
    }
    lines.iter().map(|(line, count)| format!("{count} x {line}\n")).collect()
}

fn from_text(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in text.lines() {
        let (count, hex) = line.split_once(" x ").unwrap();
        let chunk: Vec<u8> = hex.split(' ').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        (0..count.parse::<usize>().unwrap()).for_each(|_| bytes.extend_from_slice(&chunk));
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_vm_comes_back(
        pages in prop::collection::btree_map(0..700u64, any::<u8>(), 0..500),
        low in 1..400u64,
        states in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..5),
        kernel in prop::collection::vec(any::<u8>(), 0..1000),
    ) {
        let regions = [(0, low), (low, 300), (1 << 22, 700 - low)];
        let new_vm = || SimulatedVm::new(layout(&regions)).unwrap();
        let vm = new_vm();
        for (index, byte) in &pages {
            // Every third page is populated with zeros only.
            let byte = if index % 3 == 0 { 0 } else { *byte };
            let gfn = vm.layout().gfn(*index).unwrap();
            vm.guest_write(gfn, &[byte; 4096]).unwrap();
        }
        let sections: Vec<_> = states
            .into_iter()
            .enumerate()
            .map(|(i, data)| Section { kind: "part".into(), instance: i as u32, version: 1, data })
            .collect();
        vm.set_sections(sections.clone());
        let bytes = save_with_blobs(&vm, &[(BlobKind::Kernel, &kernel)]);
        let destination = new_vm();
        let (header, loaded) = restore_into(&bytes, &destination).unwrap();
        assert_same_memory(&vm, &destination);
        prop_assert_eq!(loaded, sections);
        prop_assert_eq!(&header.blobs[0].data, &kernel);
    }
}

/// A machine whose state cannot be taken without a store to guest memory, as with kvmclock.
struct StoresWhenSaved<'a>(&'a SimulatedVm);

impl VmState for StoresWhenSaved<'_> {
    fn save_sections(&self) -> Result<Vec<Section>, crate::VmError> {
        self.0.guest_write(Gfn(7), b"stored by taking the state")?;
        self.0.save_sections()
    }

    fn load_sections(&self, sections: &[Section]) -> Result<(), crate::VmError> {
        self.0.load_sections(sections)
    }
}

#[test]
fn what_taking_the_state_stores_is_in_the_snapshot() {
    let vm = small_vm();
    let state = StoresWhenSaved(&vm);
    let source = SnapshotSource { state: &state, ..source(&vm, Vec::new()) };
    let mut bytes = Vec::new();
    write_snapshot(&mut bytes, StreamKind::Snapshot, source, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    let destination = empty_vm();
    restore_into(&bytes, &destination).unwrap();
    assert_same_memory(&vm, &destination);
}

#[test]
fn states_that_a_reader_would_refuse_are_not_written() {
    let vm = small_vm();
    let section = |instance, bytes| Section {
        kind: "part".into(),
        instance,
        version: 1,
        data: vec![0; bytes],
    };
    for sections in [
        vec![section(0, 1), section(0, 1)],
        vec![section(0, 17 << 20)],
        (0..4097).map(|instance| section(instance, 0)).collect(),
        (0..20).map(|instance| section(instance, 14 << 20)).collect(),
    ] {
        vm.set_sections(sections);
        let mut go_on = |_| ControlFlow::Continue(());
        write_snapshot(&mut Vec::new(), StreamKind::Snapshot, source(&vm, Vec::new()), &mut go_on)
            .unwrap_err();
    }
    vm.set_sections((0..4096).map(|instance| section(instance, 3)).collect());
    assert_eq!(restore(&save(&vm)).unwrap().1.len(), 4096);
}
