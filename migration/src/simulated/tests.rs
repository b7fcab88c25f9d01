#![allow(clippy::unwrap_used)]
use super::*;

fn vm() -> SimulatedVm {
    let regions = [(0, 200), (1 << 20, 70)];
    let ranges = regions.map(|(start, pages)| PageRange::new(Gfn(start), pages).unwrap());
    SimulatedVm::new(MemoryLayout::new(ranges).unwrap()).unwrap()
}

fn collect(vm: &SimulatedVm) -> Vec<u64> {
    let mut dirty = PageSet::empty(vm.layout());
    vm.collect(&mut dirty).unwrap();
    dirty.runs().flat_map(|run| run.start().0..run.end().0).collect()
}

#[test]
fn a_page_stays_dirty_until_cleared_and_is_dirty_again_when_written() {
    let vm = vm();
    assert!(vm.collect(&mut PageSet::empty(vm.layout())).is_err(), "tracking is off");
    vm.start_tracking().unwrap();
    assert_eq!(collect(&vm).len(), 270, "initially all set");
    for region in vm.layout().regions() {
        vm.clear(region).unwrap();
    }
    assert_eq!(collect(&vm), [0u64; 0]);
    vm.guest_write(Gfn(3), b"guest").unwrap();
    vm.device_write(Gfn(1 << 20), b"device").unwrap();
    assert_eq!(collect(&vm), [3, 1 << 20]);
    assert_eq!(collect(&vm), [3], "the log keeps, the device bitmap is drained");
    vm.clear(PageRange::new(Gfn(3), 1).unwrap()).unwrap();
    assert_eq!(collect(&vm), [0u64; 0]);
}

#[test]
fn the_traits_are_object_safe() {
    let vm = vm();
    let memory: &dyn DestinationMemory = &vm;
    let source: &dyn DirtySource = &vm;
    let control: &dyn VmControl = &vm;
    let state: &dyn VmState = &vm;
    control.pause(PauseReason::Snapshot, Instant::now()).unwrap();
    assert!(!vm.is_running());
    source.start_tracking().unwrap();
    assert_eq!(memory.layout().total_pages(), 270);
    assert_eq!(state.save_sections().unwrap(), []);
}
