//! The leaves that say how many processors there are and which one this is.
//!
//! All vCPUs are cores of one socket, each with one thread, and the APIC id is the vCPU's number.
//! Caches of level 1 and 2 are each core's own, higher ones are shared by all.
//!
//! Sources: Intel SDM volume 2 (CPUID, leaves 1, 4, 0xB and 0x1F), AMD APM volume 3, appendix E
//! (leaves 0x8000_0008, 0x8000_001D and 0x8000_001E).

use super::cpuid::Leaves;

/// Leaf 4 and 0x8000_001D: type of the cache, its level.
const CACHE_TYPE: u32 = 0x1F;
const CACHE_LEVEL_SHIFT: u32 = 5;
const CACHE_LEVEL: u32 = 0b111;
/// Leaf 4 and 0x8000_001D: highest number of a processor that shares the cache, 12 bits.
const SHARING_SHIFT: u32 = 14;
const SHARING: u32 = 0xFFF << SHARING_SHIFT;
/// Leaf 4: highest number of a core in the package, 6 bits.
const CORES_SHIFT: u32 = 26;
/// Leaf 0xB ecx: what a level consists of.
const LEVEL_SMT: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

pub(super) fn apply(leaves: &mut Leaves, vcpu: u8, vcpus: u8) {
    let (id, count) = (u32::from(vcpu), u32::from(vcpus));
    // Bits of an APIC id that number the cores.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let amd = leaves.is_amd();

    let first = leaves.entry(1, 0);
    first.ebx = first.ebx & 0xFFFF | count << 16 | id << 24;
    leaves.set_name("ht", count > 1);
    leaves.set_name("cmp_legacy", amd && count > 1);

    for leaf in leaves.of(4).filter(|leaf| leaf.eax & CACHE_TYPE != 0) {
        let last = (1 << core_bits) - 1;
        let sharing = if cache_is_shared(leaf.eax) { last } else { 0 };
        leaf.eax = leaf.eax & 0x3FFF | sharing << SHARING_SHIFT | last << CORES_SHIFT;
    }
    for leaf in leaves.of(0x8000_001D).filter(|leaf| leaf.eax & CACHE_TYPE != 0) {
        let sharing = if cache_is_shared(leaf.eax) { count - 1 } else { 0 };
        leaf.eax = leaf.eax & !SHARING | sharing << SHARING_SHIFT;
    }

    let mut extended = vec![0xB];
    // Leaf 0x1F supersedes leaf 0xB where it exists, and tells the same here.
    if leaves.has_leaf(0x1F) {
        extended.push(0x1F);
    }
    for function in extended {
        leaves.remove(function);
        for (index, (shift, threads, level)) in
            [(0, 1, LEVEL_SMT), (core_bits, count, LEVEL_CORE), (0, 0, 0)].into_iter().enumerate()
        {
            let index = index as u32;
            let leaf = leaves.entry(function, index);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (shift, threads, level | index, id);
        }
    }

    if amd {
        leaves.entry(0x8000_0008, 0).ecx = core_bits << 12 | (count - 1);
        // One node in the processor, one thread in each core.
        leaves.remove(0x8000_001E);
        if leaves.has_name("topoext") {
            let leaf = leaves.entry(0x8000_001E, 0);
            (leaf.eax, leaf.ebx) = (id, id);
        }
        // The newer topology leaf of AMD would have to repeat all this; kernels do without it.
        leaves.remove(0x8000_0026);
    }
}

fn cache_is_shared(eax: u32) -> bool {
    eax >> CACHE_LEVEL_SHIFT & CACHE_LEVEL >= 3
}
