//! The machine's memory as the migration engine sees it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use migration::{
    DestinationMemory, DirtySource, Gfn, Gpa, GuestMemory, MemoryLayout, PageRange, PageSet,
    PauseReason, VmControl, VmError, PAGE_BYTES,
};
use vm_memory::VolatileSlice;

use super::Machine;
use crate::kvm::{clear_dirty_log, set_dirty_logging};
use crate::memory::{GuestRam, RamRegion, HUGE_PAGE_SIZE, PAGE_SIZE};

pub(super) fn layout_of(ram: &GuestRam) -> Arc<MemoryLayout> {
    let ranges = ram
        .regions()
        .iter()
        .map(|r| PageRange::from_bytes(Gpa(r.gpa), r.len).expect("regions are page-aligned"));
    Arc::new(MemoryLayout::new(ranges).expect("regions are ascending"))
}

/// The layout of a machine with `size` bytes of memory.
///
/// # Panics
/// Never for a size that a configuration may have: whole pages.
#[must_use]
pub fn layout_for(size: u64) -> MemoryLayout {
    let (low, high) = crate::layout::split_ram(size);
    let ranges = [(0, low), (crate::layout::HOLE_END, high)];
    let ranges = ranges.into_iter().filter(|(_, len)| *len > 0);
    MemoryLayout::new(ranges.map(|(gpa, len)| {
        PageRange::from_bytes(Gpa(gpa), len).expect("memory is whole pages below 2^52")
    }))
    .expect("regions are ascending")
}

fn other(error: impl ToString) -> VmError {
    VmError::Other(error.to_string())
}

impl Machine {
    /// Slot and region that hold `range`, and its first page there.
    fn slot_of(&self, range: PageRange) -> Result<(u32, &RamRegion, u64), VmError> {
        self.layout.index_range(range)?;
        let gpa = range.gpa().0;
        let regions = self.ram.regions().iter().enumerate();
        for (slot, region) in regions {
            if gpa >= region.gpa && gpa - region.gpa < region.len {
                let slot = u32::try_from(slot).map_err(other)?;
                return Ok((slot, region, (gpa - region.gpa) / PAGE_SIZE));
            }
        }
        Err(other(format!("no memory at {gpa:#x}")))
    }
}

impl GuestMemory for Machine {
    fn layout(&self) -> &Arc<MemoryLayout> {
        &self.layout
    }

    fn slice(&self, range: PageRange) -> Result<VolatileSlice<'_>, VmError> {
        self.layout.index_range(range)?;
        self.ram.slice(range.gpa().0, range.bytes()).map_err(other)
    }

    fn unit_pages(&self) -> u64 {
        match self.ram.hugepages() {
            true => HUGE_PAGE_SIZE / PAGE_SIZE,
            false => 1,
        }
    }

    fn populated(&self) -> Result<PageSet, VmError> {
        let mut set = PageSet::empty(&self.layout);
        for (index, region) in self.ram.regions().iter().enumerate() {
            for (offset, len) in self.ram.populated(index).map_err(other)? {
                set.insert(PageRange::from_bytes(Gpa(region.gpa + offset), len)?)?;
            }
        }
        Ok(set)
    }
}

impl DirtySource for Machine {
    fn start_tracking(&self) -> Result<(), VmError> {
        // What devices wrote before is no news to who starts by sending everything.
        for slot in 0..self.ram.regions().len() {
            let _ = self.ram.take_device_dirty(slot);
        }
        set_dirty_logging(&self.vm.fd, self.ram.regions(), true).map_err(other)
    }

    fn stop_tracking(&self) -> Result<(), VmError> {
        set_dirty_logging(&self.vm.fd, self.ram.regions(), false).map_err(other)
    }

    fn collect(&self, dirty: &mut PageSet) -> Result<(), VmError> {
        for (index, region) in self.ram.regions().iter().enumerate() {
            let start = Gpa(region.gpa).gfn();
            let size = usize::try_from(region.len).map_err(other)?;
            let slot = u32::try_from(index).map_err(other)?;
            let log = self.vm.fd.get_dirty_log(slot, size).map_err(|e| VmError::Os {
                what: format!("reading the dirty log of slot {slot}"),
                error: io::Error::from_raw_os_error(e.errno()),
            })?;
            dirty.insert_bitmap(start, &log)?;
            dirty.insert_bitmap(start, &self.ram.take_device_dirty(index))?;
        }
        Ok(())
    }

    fn clear_pages(&self, range: PageRange, pages: &[u64]) -> Result<(), VmError> {
        let (slot, region, first) = self.slot_of(range)?;
        let whole_words =
            range.pages() % 64 == 0 || first + range.pages() == region.len / PAGE_SIZE;
        if first % 64 == 0 && whole_words {
            let count = u32::try_from(range.pages()).map_err(other)?;
            return clear_dirty_log(&self.vm.fd, slot, first, count, pages).map_err(other);
        }
        for at in (0..range.pages()).filter(|at| pages[(at / 64) as usize] >> (at % 64) & 1 == 1) {
            self.clear(PageRange::new(Gfn(range.start().0 + at), 1)?)?;
        }
        Ok(())
    }

    fn clear(&self, range: PageRange) -> Result<(), VmError> {
        let (slot, region, first) = self.slot_of(range)?;
        let last = first + range.pages();
        let start = first & !63;
        let end = last.next_multiple_of(64).min(region.len / PAGE_SIZE);
        let words = usize::try_from((end - start).div_ceil(64)).map_err(other)?;
        let mut bits = vec![u64::MAX; words];
        bits[0] &= u64::MAX << (first - start);
        if last % 64 != 0 {
            bits[words - 1] &= u64::MAX >> (64 - last % 64);
        }
        let pages = u32::try_from(end - start).map_err(other)?;
        clear_dirty_log(&self.vm.fd, slot, start, pages, &bits).map_err(other)
    }
}

impl VmControl for Machine {
    fn pause(&self, _reason: PauseReason, deadline: Instant) -> Result<(), VmError> {
        self.hold(deadline).map_err(|e| match e {
            super::MachineError::NotStopped => VmError::Deadline("stopping the vCPUs".to_owned()),
            e => other(e),
        })
    }

    fn resume(&self) -> Result<(), VmError> {
        self.release().map_err(other)
    }

    fn paused_by_operator(&self) -> bool {
        self.operator_paused()
    }
}

impl DestinationMemory for Machine {
    fn fill(&self, range: PageRange, data: &[u8]) -> Result<(), VmError> {
        if self.is_ending() {
            return Err(other("given up: an operator ended the VM"));
        }
        if data.len() as u64 != range.bytes() {
            return Err(other(format!("{} bytes for {range}", data.len())));
        }
        self.slice(range)?.copy_from(data);
        Ok(())
    }

    fn zero(&self, range: PageRange) -> Result<(), VmError> {
        self.layout.index_range(range)?;
        if self.ram.hugepages() {
            // hugetlbfs gives back whole huge pages only.
            let slice = self.slice(range)?;
            for at in (0..slice.len()).step_by(PAGE_BYTES) {
                slice.subslice(at, PAGE_BYTES).map_err(other)?.copy_from(&[0_u8; PAGE_BYTES][..]);
            }
            return Ok(());
        }
        self.ram.discard(range.gpa().0, range.bytes()).map_err(|error| VmError::Os {
            what: format!("discarding {} bytes of guest memory", range.bytes()),
            error,
        })
    }
}
