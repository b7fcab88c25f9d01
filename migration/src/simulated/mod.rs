//! A simulated VM on plain anonymous memory, which implements every trait of [`crate::vm`]: for
//! tests of the engine and of its users.
//!
//! Guest stores are calls of [`SimulatedVm::guest_write`], device stores of
//! [`SimulatedVm::device_write`]; both keep the populated map and the dirty log as the real ones
//! would. Nothing runs by itself, so tests are deterministic.
//!
//! - [`SimulatedHost`]: makes simulated VMs for incoming migrations.
//! - [`LocalNetwork`]: connections inside one process, which can be cut at any byte.

mod frames;
mod host;
mod network;
#[cfg(test)]
mod tests;

pub use host::SimulatedHost;
pub use network::{Cut, LocalNetwork};

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::address::{Gfn, Gpa, PageRange, RangeError, PAGE_BYTES};
use crate::layout::MemoryLayout;
use crate::page_set::PageSet;
use crate::pagemap;
use crate::vm::{
    DestinationMemory, DestinationVm, DirtySource, GuestMemory, LateFrames, PauseReason, Section,
    SourceVm, VmControl, VmError, VmState,
};
use crate::volatile_io::discard;

/// Watches that no two of some VMs ever run at once.
#[derive(Debug, Default)]
pub struct RunGuard {
    running: AtomicUsize,
    violated: AtomicBool,
}

impl RunGuard {
    /// Whether two ran at once.
    pub fn violated(&self) -> bool {
        self.violated.load(Ordering::SeqCst)
    }

    fn change(&self, was: bool, is: bool) {
        if was && !is {
            self.running.fetch_sub(1, Ordering::SeqCst);
        } else if !was && is && self.running.fetch_add(1, Ordering::SeqCst) > 0 {
            self.violated.store(true, Ordering::SeqCst);
        }
    }
}

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// [`DirtySource::start_tracking`].
    StartTracking,
    /// [`DirtySource::collect`].
    Collect,
    /// [`VmControl::pause`].
    Pause,
    /// [`VmState::save_sections`].
    Save,
    /// [`VmState::load_sections`].
    Load,
    /// [`SourceVm::flush_disks`].
    Flush,
    /// [`SourceVm::release_ownership`].
    Release,
    /// [`SourceVm::reclaim_ownership`].
    Reclaim,
    /// [`DestinationVm::check_ownership`].
    CheckOwnership,
    /// [`DestinationVm::take_ownership`].
    TakeOwnership,
    /// [`DestinationVm::start`].
    Start,
}

/// The simulated VM. See the module's documentation.
pub struct SimulatedVm {
    layout: Arc<MemoryLayout>,
    /// One mapping per region of the layout, in the same order.
    regions: Vec<MmapRegion>,
    inner: Mutex<Inner>,
    cards: frames::Cards,
}

struct Inner {
    /// `Some` while tracking is on: written and not cleared since.
    dirty_log: Option<PageSet>,
    /// Written by devices and not collected since.
    device_dirty: PageSet,
    running: bool,
    sections: Vec<Section>,
    guard: Option<Arc<RunGuard>>,
    /// How often each still fails.
    failures: HashMap<Operation, usize>,
    paused_by_operator: bool,
    /// How often somebody asked who writes.
    looks: u64,
    /// All that was said about slowing down.
    throttles: Vec<Vec<f64>>,
    /// Whether this VM owns its disks.
    owns_disks: bool,
    /// Written when the state is taken, as KVM writes its clocks.
    clock_page: Option<Gfn>,
    /// Read when the state is loaded.
    load_page: Option<Gfn>,
    /// Written again as soon as it is cleared.
    eager: Option<Gfn>,
}

impl Inner {
    fn set_running(&mut self, running: bool) {
        if let Some(guard) = &self.guard {
            guard.change(self.running, running);
        }
        self.running = running;
    }
}

impl SimulatedVm {
    /// A running VM whose memory is all zeros and unpopulated, and which has no state.
    ///
    /// # Errors
    /// [`VmError::Other`] when the host does not provide the memory.
    pub fn new(layout: MemoryLayout) -> Result<Self, VmError> {
        let layout = Arc::new(layout);
        let mut regions = Vec::new();
        for range in layout.regions() {
            let region = MmapRegion::new(range.bytes() as usize)
                .map_err(|error| VmError::Other(format!("cannot map {range}: {error}")))?;
            regions.push(region);
        }
        let inner = Inner {
            dirty_log: None,
            device_dirty: PageSet::empty(&layout),
            running: true,
            sections: Vec::new(),
            guard: None,
            failures: HashMap::new(),
            paused_by_operator: false,
            looks: 0,
            throttles: Vec::new(),
            owns_disks: true,
            clock_page: None,
            load_page: None,
            eager: None,
        };
        Ok(Self { layout, regions, inner: Mutex::new(inner), cards: frames::Cards::default() })
    }

    /// Stores at the start of a page, as the guest does: the dirty log sees it.
    ///
    /// # Errors
    /// [`VmError::Range`]. Bytes beyond the end of the page are left out.
    pub fn guest_write(&self, gfn: Gfn, bytes: &[u8]) -> Result<(), VmError> {
        let page = self.store(gfn, bytes)?;
        let mut inner = self.inner();
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
        inner.device_dirty.insert(page)?;
        Ok(())
    }

    /// As [`SimulatedVm::guest_write`], by a guest that may have been stopped: `false` then, and
    /// nothing was written.
    ///
    /// # Errors
    /// As [`SimulatedVm::guest_write`].
    pub fn guest_write_if_running(&self, gfn: Gfn, bytes: &[u8]) -> Result<bool, VmError> {
        // Held throughout, so that a pause waits for it.
        let mut inner = self.inner();
        if !inner.running {
            return Ok(false);
        }
        let page = self.store(gfn, bytes)?;
        if let Some(log) = &mut inner.dirty_log {
            log.insert(page)?;
        }
        Ok(true)
    }

    /// From now on `guard` watches that no two of its VMs run at once.
    pub fn watch(&self, guard: &Arc<RunGuard>) {
        let mut inner = self.inner();
        guard.change(false, inner.running);
        inner.guard = Some(Arc::clone(guard));
    }

    /// The process of the VM dies: it runs no more.
    pub fn kill(&self) {
        self.inner().set_running(false);
    }

    /// The next `times` calls of an operation fail.
    pub fn fail(&self, operation: Operation, times: usize) {
        self.inner().failures.insert(operation, times);
    }

    /// An operator pauses the guest, or lets it go on.
    pub fn operator_pause(&self, paused: bool) {
        let mut inner = self.inner();
        inner.paused_by_operator = paused;
        inner.set_running(!paused);
    }

    /// From now on the running guest writes this page again as soon as it is cleared.
    pub fn set_eager(&self, gfn: Gfn) {
        self.inner().eager = Some(gfn);
    }

    /// Taking the state will write to this page.
    pub fn set_clock_page(&self, gfn: Gfn) {
        self.inner().clock_page = Some(gfn);
    }

    /// Loading the state will read this page.
    pub fn set_load_page(&self, gfn: Gfn) {
        self.inner().load_page = Some(gfn);
    }

    /// Whether writes are tracked.
    pub fn is_tracking(&self) -> bool {
        self.inner().dirty_log.is_some()
    }

    /// Whether this VM owns its disks.
    pub fn owns_disks(&self) -> bool {
        self.inner().owns_disks
    }

    /// As a VM is made for an incoming migration: paused, without its disks.
    pub(crate) fn incoming(self) -> Self {
        {
            let mut inner = self.inner();
            inner.set_running(false);
            inner.owns_disks = false;
        }
        self
    }

    fn try_operation(&self, operation: Operation) -> Result<(), VmError> {
        match self.inner().failures.get_mut(&operation) {
            Some(times) if *times > 0 => {
                *times -= 1;
                Err(VmError::Other(format!("{operation:?} was made to fail")))
            }
            _ => Ok(()),
        }
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

    /// What was said about slowing vCPUs down, one call after the other.
    pub fn throttles(&self) -> Vec<Vec<f64>> {
        self.inner().throttles.clone()
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
        let mut populated = PageSet::empty(&self.layout);
        for (region, mapping) in self.layout.regions().zip(&self.regions) {
            let found = pagemap::populated(mapping.as_ptr() as u64, region.bytes());
            let what = || "looking for populated pages".to_owned();
            for (at, len) in found.map_err(|error| VmError::Os { what: what(), error })? {
                populated.insert(PageRange::from_bytes(Gpa(region.gpa().0 + at), len)?)?;
            }
        }
        Ok(populated)
    }
}

impl DirtySource for SimulatedVm {
    fn start_tracking(&self) -> Result<(), VmError> {
        self.try_operation(Operation::StartTracking)?;
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
        self.try_operation(Operation::Collect)?;
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
        let mut inner = self.inner();
        let again = inner.eager.filter(|_| inner.running).map(|gfn| PageRange::new(gfn, 1));
        if let Some(log) = &mut inner.dirty_log {
            log.remove(range)?;
            if let Some(page) = again.transpose()?.filter(|page| range.contains(*page)) {
                log.insert(page)?;
            }
        }
        Ok(())
    }
}

impl VmControl for SimulatedVm {
    fn pause(&self, _reason: PauseReason, _deadline: Instant) -> Result<(), VmError> {
        self.try_operation(Operation::Pause)?;
        self.inner().set_running(false);
        self.cards.keep();
        Ok(())
    }

    fn resume(&self) -> Result<(), VmError> {
        self.cards.open();
        self.inner().set_running(true);
        Ok(())
    }

    fn paused_by_operator(&self) -> bool {
        self.inner().paused_by_operator
    }
}

impl VmState for SimulatedVm {
    fn save_sections(&self) -> Result<Vec<Section>, VmError> {
        self.try_operation(Operation::Save)?;
        let (sections, clock_page) = {
            let inner = self.inner();
            (inner.sections.clone(), inner.clock_page)
        };
        if let Some(gfn) = clock_page {
            let now = self.read_page(gfn)?[0].wrapping_add(1);
            self.guest_write(gfn, &[now; 16])?;
        }
        Ok(sections)
    }

    fn load_sections(&self, sections: &[Section]) -> Result<(), VmError> {
        self.try_operation(Operation::Load)?;
        let load_page = self.inner().load_page;
        if let Some(gfn) = load_page {
            self.read_page(gfn)?;
        }
        self.set_sections(sections.to_vec());
        Ok(())
    }
}

impl SourceVm for SimulatedVm {
    fn vcpus(&self) -> usize {
        2
    }

    /// The first vCPU does it all.
    fn write_counts(&self) -> Option<Vec<u64>> {
        let mut inner = self.inner();
        inner.looks += 1;
        Some(vec![inner.looks, 0])
    }

    fn throttle(&self, run: &[f64]) {
        self.inner().throttles.push(run.to_vec());
    }

    fn flush_disks(&self) -> Result<(), VmError> {
        self.try_operation(Operation::Flush)
    }

    fn late_frames(&self) -> Option<&dyn LateFrames> {
        self.cards.present()
    }

    fn release_ownership(&self) -> Result<(), VmError> {
        self.try_operation(Operation::Release)?;
        self.inner().owns_disks = false;
        Ok(())
    }

    fn reclaim_ownership(&self) -> Result<(), VmError> {
        self.try_operation(Operation::Reclaim)?;
        self.inner().owns_disks = true;
        Ok(())
    }
}

impl DestinationVm for SimulatedVm {
    fn late_frame(&self, card: u16, bytes: &[u8]) -> Result<(), VmError> {
        self.cards.late(card, bytes)
    }

    fn check_ownership(&self) -> Result<(), VmError> {
        self.try_operation(Operation::CheckOwnership)
    }

    fn take_ownership(&self) -> Result<(), VmError> {
        self.try_operation(Operation::TakeOwnership)?;
        self.inner().owns_disks = true;
        Ok(())
    }

    fn start(&self, run: bool) -> Result<(), VmError> {
        self.try_operation(Operation::Start)?;
        let mut inner = self.inner();
        inner.paused_by_operator = !run;
        inner.set_running(run);
        Ok(())
    }
}

impl Drop for SimulatedVm {
    fn drop(&mut self) {
        self.kill();
    }
}

impl DestinationMemory for SimulatedVm {
    fn zero(&self, range: PageRange) -> Result<(), VmError> {
        discard(&self.slice(range)?)
            .map_err(|error| VmError::Os { what: format!("discarding {range}"), error })
    }
}
