//! The pages that loading a vCPU's state and its first instructions touch: at a destination whose memory comes
//! later each of them would be a fault.

use devices::Persist;
use migration::{Gfn, Section};
use vm_memory::{Bytes, GuestAddress};

use super::sections::payload;
use super::Machine;
use crate::kvm::{VcpuKvm, VcpuStateV1};
use crate::memory::{Memory, PAGE_SIZE};

/// MSRs that hold the guest-physical address of what KVM writes or reads when they are set, and before the guest
/// runs (Documentation/virt/kvm/x86/msr.rst): wall clock and system time, old and new, asynchronous page faults,
/// steal time, end of interrupt.
const MSR_KVM: [u32; 7] =
    [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];
/// Low bits of those MSRs that are no address.
const MSR_FLAGS: u64 = 3;

/// Long mode is active (EFER).
const EFER_LMA: u64 = 1 << 10;
/// Page tables have five levels (CR4).
const CR4_LA57: u64 = 1 << 12;
/// A page table's entry (Intel SDM vol. 3, section 4.5).
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// At most so many pages in all: what is beyond comes when it is asked for.
const MOST: usize = 256;

impl Machine {
    /// The frames of those pages, each once: what KVM needs, then the queues of devices, then each vCPU's way to
    /// its next instruction. The guest stands.
    pub(super) fn first_pages(&self, sections: &[Section]) -> Vec<Gfn> {
        let vcpus: Vec<VcpuStateV1> = sections
            .iter()
            .filter(|section| section.kind == VcpuKvm::KIND)
            .filter_map(|section| VcpuKvm::decode_payload(&payload(section)).ok())
            .collect();
        let mut pages = Pages::default();
        for vcpu in &vcpus {
            let addresses = vcpu.msrs.iter().filter(|(index, _)| MSR_KVM.contains(index));
            addresses.filter(|(_, value)| *value != 0).for_each(|(_, value)| {
                pages.add(value & !MSR_FLAGS);
            });
        }
        for (start, length) in self.virtio.rings() {
            (start / PAGE_SIZE..=(start.saturating_add(length) / PAGE_SIZE))
                .take(MOST)
                .for_each(|page| pages.add(page.saturating_mul(PAGE_SIZE)));
        }
        for vcpu in &vcpus {
            walk(vcpu, self.ram.memory(), &mut pages);
        }
        pages.0
    }
}

#[derive(Default)]
struct Pages(Vec<Gfn>);

impl Pages {
    fn add(&mut self, gpa: u64) {
        let gfn = Gfn(gpa / PAGE_SIZE);
        if self.0.len() < MOST && !self.0.contains(&gfn) {
            self.0.push(gfn);
        }
    }
}

/// Code, stack, descriptor tables and task state, and the page tables on the way to each.
fn walk(vcpu: &VcpuStateV1, memory: &Memory, pages: &mut Pages) {
    let (regs, sregs) = (&vcpu.regs, &vcpu.sregs);
    if sregs.efer & EFER_LMA == 0 {
        return;
    }
    let addresses = [
        sregs.cs.base.wrapping_add(regs.rip),
        regs.rsp,
        // What is pushed next.
        regs.rsp.wrapping_sub(8),
        sregs.gdt.base,
        sregs.idt.base,
        sregs.tr.base,
        sregs.fs.base,
        sregs.gs.base,
    ];
    let levels = if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
    for address in addresses {
        translate(sregs.cr3, levels, address, memory, pages);
    }
}

fn translate(cr3: u64, levels: u32, address: u64, memory: &Memory, pages: &mut Pages) {
    let mut table = cr3 & ADDRESS;
    for level in (0..levels).rev() {
        pages.add(table);
        let shift = 12 + 9 * level;
        let index = address >> shift & 0x1ff;
        let entry: u64 = match memory.read_obj(GuestAddress(table + index * 8)) {
            Ok(entry) if entry & PRESENT != 0 => entry,
            _ => return,
        };
        if level == 0 || (level < 3 && entry & LARGE != 0) {
            let within = (1 << shift) - 1;
            pages.add((entry & ADDRESS & !within) | (address & within));
            return;
        }
        table = entry & ADDRESS;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::memory::GuestRam;

    fn walked(entries: &[(u64, u64)], cr3: u64, levels: u32, address: u64) -> Vec<u64> {
        let ram = GuestRam::new(16 << 20, false).unwrap();
        for (at, entry) in entries {
            ram.memory().write_obj(*entry, GuestAddress(*at)).unwrap();
        }
        let mut pages = Pages::default();
        translate(cr3, levels, address, ram.memory(), &mut pages);
        pages.0.into_iter().map(|gfn| gfn.0).collect()
    }

    #[test]
    fn page_tables_are_walked_as_the_processor_walks_them() {
        let small = [(0x1ff8, 0x2003), (0x2008, 0x3003), (0x3010, 0x4003), (0x4018, 0x5003)];
        let address = 0xffff_ff80_4040_3abc;
        assert_eq!(walked(&small, 0x1018, 4, address), [1, 2, 3, 4, 5]);
        // The same with a page of 2 MiB, whose frames count from its start.
        let large = [small[0], small[1], (0x3010, 0x0080_0083)];
        assert_eq!(walked(&large, 0x1000, 4, address), [1, 2, 3, 0x803]);
        let five = [(0x6ff8, 0x1003), small[0], small[1], small[2], small[3]];
        assert_eq!(walked(&five, 0x6000, 5, address), [6, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn what_leads_nowhere_ends_there() {
        assert_eq!(walked(&[(0x1000, 0x2002)], 0x1000, 4, 0), [1], "not present");
        let beyond = (1 << 40) | 3;
        assert_eq!(walked(&[(0x1000, beyond)], 0x1000, 4, 0), [1, 1 << 28], "beyond memory");
        let everywhere = [(0x1000, 0x1003)];
        assert_eq!(walked(&everywhere, 0x1000, 4, 0), [1], "each page once");
    }
}
