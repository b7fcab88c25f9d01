//! A simulated VM on plain anonymous memory, which implements every trait of [`crate::vm`]: for
//! tests of the engine and of its users.
//!
//! Guest stores are calls of [`SimulatedVm::guest_write`], device stores of
//! [`SimulatedVm::device_write`]; both keep the populated map and the dirty log as the real ones
//! would. Nothing runs by itself, so tests are deterministic.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::address::{Gfn, PageRange, RangeError, PAGE_BYTES};
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::vm::{
    DestinationMemory, DirtySource, GuestMemory, PauseReason, Placed, Section, VmControl, VmError,
    VmState,
};

/// The simulated VM. See the module's documentation.
pub struct SimulatedVm {
    layout: Arc<MemoryLayout>,
    /// One mapping per region of the layout, in the same order.
    regions: Vec<MmapRegion>,
    inner: Mutex<Inner>,
}

struct Inner {
    populated: PageSet,
    /// `Some` while tracking is on: written and not cleared since.
    dirty_log: Option<PageSet>,
    /// Written by devices and not collected since.
    device_dirty: PageSet,
    running: bool,
    sections: Vec<Section>,
}

impl SimulatedVm {
    /// A running VM whose memory is all zeros and unpopulated, and which has no state.
    ///
    /// # Errors
    /// [`VmError::Other`] when the host does not provide the memory.
    pub fn new(layout: MemoryLayout) -> Result<Self, VmError> {
        let layout = Arc::new(layout);
        let regions = layout
            .regions()
            .map(|range| {
                MmapRegion::new(range.bytes() as usize)
                    .map_err(|error| VmError::Other(format!("cannot map {range}: {error}")))
            })
            .collect::<Result<_, _>>()?;
        let inner = Inner {
            populated: PageSet::empty(&layout),
            dirty_log: None,
            device_dirty: PageSet::empty(&layout),
            running: true,
            sections: Vec::new(),
        };
        Ok(Self { layout, regions, inner: Mutex::new(inner) })
    }

    /// Stores at the start of a page, as the guest does: the dirty log sees it.
    ///
    /// # Errors
    /// [`VmError::Range`]. Bytes beyond the end of the page are left out.
    pub fn guest_write(&self, gfn: Gfn, bytes: &[u8]) -> Result<(), VmError> {
        let page = self.store(gfn, bytes)?;
        let mut inner = self.inner();
        inner.populated.insert(page)?;
        if let Some(log) = &mut inner.dirty_log {
            log.insert(page)?;
        }
        Ok(())
    }

    /// Stores at the start of a page, as a device does: the dirty log does not see it, the device
    /// bitmap does.
    ///
    /// # Errors
    /// As [`SimulatedVm::guest_write`].
    pub fn device_write(&self, gfn: Gfn, bytes: &[u8]) -> Result<(), VmError> {
        let page = self.store(gfn, bytes)?;
        let mut inner = self.inner();
        inner.populated.insert(page)?;
        inner.device_dirty.insert(page)?;
        Ok(())
    }

    /// The contents of a page.
    ///
    /// # Errors
    /// [`VmError::Range`].
    pub fn read_page(&self, gfn: Gfn) -> Result<[u8; PAGE_BYTES], VmError> {
        let mut bytes = [0; PAGE_BYTES];
        self.slice(PageRange::new(gfn, 1)?)?.copy_to(&mut bytes);
        Ok(bytes)
    }

    /// Sets what [`VmState::save_sections`] gives.
    pub fn set_sections(&self, sections: Vec<Section>) {
        self.inner().sections = sections;
    }

    /// Whether the VM is not paused.
    pub fn is_running(&self) -> bool {
        self.inner().running
    }

    fn store(&self, gfn: Gfn, bytes: &[u8]) -> Result<PageRange, VmError> {
        let page = PageRange::new(gfn, 1)?;
        self.slice(page)?.copy_from(bytes);
        Ok(page)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GuestMemory for SimulatedVm {
    fn layout(&self) -> &Arc<MemoryLayout> {
        &self.layout
    }

    fn slice(&self, range: PageRange) -> Result<VolatileSlice<'_>, VmError> {
        for (region, mapping) in self.layout.regions().zip(&self.regions) {
            if region.contains(range) {
                let offset = range.gpa().0 - region.gpa().0;
                return mapping
                    .get_slice(offset as usize, range.bytes() as usize)
                    .map_err(|error| VmError::Other(format!("no memory for {range}: {error}")));
            }
        }
        Err(RangeError::Outside(range).into())
    }

    fn populated(&self) -> Result<PageSet, VmError> {
        Ok(self.inner().populated.clone())
    }
}

impl DirtySource for SimulatedVm {
    fn start_tracking(&self) -> Result<(), VmError> {
        let mut inner = self.inner();
        inner.dirty_log = Some(PageSet::full(&self.layout));
        inner.device_dirty.clear();
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), VmError> {
        self.inner().dirty_log = None;
        Ok(())
    }

    fn collect(&self, dirty: &mut PageSet) -> Result<(), VmError> {
        let mut inner = self.inner();
        let Some(log) = &inner.dirty_log else {
            return Err(VmError::Other("dirty tracking is off: start it first".to_owned()));
        };
        dirty.union(log);
        dirty.union(&inner.device_dirty);
        inner.device_dirty.clear();
        Ok(())
    }

    fn clear(&self, range: PageRange) -> Result<(), VmError> {
        if let Some(log) = &mut self.inner().dirty_log {
            log.remove(range)?;
        }
        Ok(())
    }
}

impl VmControl for SimulatedVm {
    fn pause(&self, _reason: PauseReason, _deadline: Instant) -> Result<(), VmError> {
        self.inner().running = false;
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        self.inner().running = true;
        Ok(())
    }
}

impl VmState for SimulatedVm {
    fn save_sections(&self) -> Result<Vec<Section>, VmError> {
        Ok(self.inner().sections.clone())
    }

    fn load_sections(&self, sections: &[Section]) -> Result<(), VmError> {
        self.set_sections(sections.to_vec());
        Ok(())
    }
}

impl DestinationMemory for SimulatedVm {
    fn populate_ahead(&self, range: PageRange) -> Result<(), VmError> {
        self.inner().populated.insert(range)?;
        Ok(())
    }

    fn zero(&self, range: PageRange) -> Result<(), VmError> {
        let slice = self.slice(range)?;
        let zeros = [0u8; PAGE_BYTES];
        for page in 0..range.pages() as usize {
            slice
                .subslice(page * PAGE_BYTES, PAGE_BYTES)
                .map_err(|error| VmError::Other(format!("no memory for {range}: {error}")))?
                .copy_from(&zeros);
        }
        self.inner().populated.remove(range)?;
        Ok(())
    }

    fn place_page(&self, gfn: Gfn, data: &[u8; PAGE_BYTES]) -> Result<Placed, VmError> {
        let page = PageRange::new(gfn, 1)?;
        let mut inner = self.inner();
        if inner.populated.contains(page) {
            return Ok(Placed::Already);
        }
        self.store(gfn, data)?;
        inner.populated.insert(page)?;
        Ok(Placed::Now)
    }
}

#[cfg(test)]
mod tests {
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
    fn a_placed_page_is_never_overwritten() {
        let vm = vm();
        assert_eq!(vm.place_page(Gfn(5), &[1; PAGE_BYTES]).unwrap(), Placed::Now);
        assert_eq!(vm.place_page(Gfn(5), &[2; PAGE_BYTES]).unwrap(), Placed::Already);
        assert_eq!(vm.read_page(Gfn(5)).unwrap(), [1; PAGE_BYTES]);
        vm.zero(PageRange::new(Gfn(4), 3).unwrap()).unwrap();
        assert_eq!(vm.read_page(Gfn(5)).unwrap(), [0; PAGE_BYTES]);
        assert!(vm.place_page(Gfn(200), &[1; PAGE_BYTES]).is_err());
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
}
