//! From what the host offers to what the guest gets.

use kvm_bindings::CpuId;

use super::cpuid::{Leaves, BASIC, EXTENDED};
use super::features::{Feature, KVM_FEATURES};
use super::model::{Model, MASKED_LEAVES, NOT_CARRIED, PROVIDED_BY_KVM};
use super::spec::{with_requirements, with_users};
use super::{topology, xsave, CpuError, CpuSpec, MAX_VCPUS};

/// Family 15, model 107, stepping 1: what QEMU's `qemu64` says too, so that every kernel has seen
/// it. No kernel finds a processor there whose model-specific registers it would want to use.
const BASELINE_SIGNATURE: u32 = 0x0006_0FB1;
/// Leaf 1 ebx: size of a cache line.
const CLFLUSH_SIZE: u32 = 0xFF << 8;
/// Bits of leaf 1 edx that AMD processors repeat in leaf 0x8000_0001 edx (APM volume 3, E.4.2).
const MIRRORED: u32 = 0x0183_F3FF;
/// Leaves of the brand string, sixteen letters each.
const BRAND_LEAVES: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
/// Leaves that a baseline model takes over: vendor, caches, address widths, KVM's signature.
const COPIED: &[u32] =
    &[0, 2, 4, 0xD, 0x4000_0000, KVM_FEATURES, 0x8000_0000, 0x8000_0005, 0x8000_0006];

/// What this host offers: KVM_GET_SUPPORTED_CPUID, and the two features that every KVM provides
/// but old ones do not report there.
///
/// `tsc_deadline_timer` is what KVM_CHECK_EXTENSION says of KVM_CAP_TSC_DEADLINE_TIMER.
///
/// # Errors
///
/// When KVM reported no leaf 1 and there is no room for one.
pub fn host_cpuid(supported: &CpuId, tsc_deadline_timer: bool) -> Result<CpuId, CpuError> {
    let mut leaves = Leaves::new(supported);
    leaves.set_name("hypervisor", true);
    if tsc_deadline_timer {
        leaves.set_name("tsc_deadline_timer", true);
    }
    leaves.into_cpuid()
}

impl CpuSpec {
    /// The CPUID of one vCPU, for KVM_SET_CPUID2.
    ///
    /// `host` is what [`host_cpuid`] gave, `vcpu` the vCPU's number (its APIC id) and `vcpus` their
    /// count.
    ///
    /// # Errors
    ///
    /// When the host lacks a feature that the specification asks for: all of them are named.
    pub fn build(&self, host: &CpuId, vcpu: u8, vcpus: u8) -> Result<CpuId, CpuError> {
        if vcpu >= vcpus || vcpus > MAX_VCPUS {
            return Err(CpuError::VcpuNumber { vcpu, vcpus });
        }
        let offered = offered(host);
        let baseline = self.model != Model::Host;
        let mut leaves = if baseline { self.empty_baseline(&offered) } else { offered.clone() };

        self.choose(&mut leaves, &offered)?;
        leaves.set_name("hypervisor", true);
        topology::apply(&mut leaves, vcpu, vcpus);
        xsave::apply(&mut leaves, &offered, baseline);
        if leaves.is_amd() {
            let features = leaves.entry(1, 0).edx & MIRRORED;
            let extended = leaves.entry(0x8000_0001, 0);
            extended.edx = extended.edx & !MIRRORED | features;
        }
        set_limits(&mut leaves, baseline);
        leaves.into_cpuid()
    }

    /// A baseline model before it has features.
    fn empty_baseline(&self, offered: &Leaves) -> Leaves {
        let mut leaves = offered.clone();
        let wants = |name| self.added.iter().any(|feature| feature.name == name);
        leaves.retain(|leaf| {
            COPIED.contains(&leaf.function)
                || leaf.function == 0x8000_001D && wants("topoext")
                || matches!(leaf.function, 0x1D | 0x1E) && wants("amx_tile")
        });
        if leaves.has_leaf(0xD) {
            leaves.entry(0xD, 1).eax = 0;
        }

        let line_size = offered.get(1, 0).map_or(0, |leaf| leaf.ebx & CLFLUSH_SIZE);
        let first = leaves.entry(1, 0);
        (first.eax, first.ebx) = (BASELINE_SIGNATURE, line_size);
        if leaves.is_amd() {
            leaves.entry(0x8000_0001, 0).eax = BASELINE_SIGNATURE;
        }
        // Physical and virtual address bits are those of the host: KVM cannot make them smaller.
        let widths = offered.get(0x8000_0008, 0).map_or(0, |leaf| leaf.eax);
        leaves.entry(0x8000_0008, 0).eax = widths;

        let mut brand = [0; 48];
        let name = self.model.name().as_bytes();
        brand[..name.len()].copy_from_slice(name);
        for (function, letters) in BRAND_LEAVES.into_iter().zip(brand.chunks_exact(16)) {
            let word = |at: usize| {
                u32::from_le_bytes([letters[at], letters[at + 1], letters[at + 2], letters[at + 3]])
            };
            let leaf = leaves.entry(function, 0);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (word(0), word(4), word(8), word(12));
        }
        leaves
    }

    /// Sets the features of the model and those added, clears those removed.
    fn choose(&self, leaves: &mut Leaves, offered: &Leaves) -> Result<(), CpuError> {
        let removed: Vec<Feature> =
            self.removed.iter().flat_map(|feature| with_users(*feature)).collect();
        let of_model = self.model.features().into_iter().filter_map(Feature::by_name);
        let added = self.added.iter().flat_map(|feature| with_requirements(*feature));
        let mut missing = Vec::new();
        for feature in of_model.chain(added).filter(|feature| !removed.contains(feature)) {
            if offered.has(feature) {
                leaves.set(feature, true);
            } else if !missing.contains(&feature.to_string()) {
                missing.push(feature.to_string());
            }
        }
        if !missing.is_empty() {
            return Err(CpuError::Unsupported { spec: self.to_string(), missing });
        }
        for feature in PROVIDED_BY_KVM.iter().filter_map(|name| Feature::by_name(name)) {
            leaves.set(feature, offered.has(feature));
        }
        for feature in removed {
            leaves.set(feature, false);
        }
        Ok(())
    }
}

/// What can be offered of what the host supports.
fn offered(host: &CpuId) -> Leaves {
    let mut leaves = Leaves::new(host);
    for name in NOT_CARRIED.iter().flat_map(|(names, _)| *names) {
        leaves.set_name(name, false);
    }
    // These are the guest's, and KVM keeps them up to date.
    leaves.set_name("osxsave", false);
    leaves.set_name("ospke", false);
    for function in MASKED_LEAVES {
        leaves.remove(*function);
    }
    for name in xsave::without_state(&leaves) {
        for feature in Feature::by_name(name).into_iter().flat_map(with_users) {
            leaves.set(feature, false);
        }
    }
    leaves
}

/// Tells how far basic leaves, extended leaves and the sub-leaves of leaf 7 go.
fn set_limits(leaves: &mut Leaves, baseline: bool) {
    for range in [BASIC, EXTENDED] {
        let highest = leaves.highest(&range).unwrap_or(*range.start());
        let limit = leaves.entry(*range.start(), 0);
        limit.eax = if baseline { highest } else { limit.eax.max(highest) };
    }
    if baseline {
        let used = |leaves: &Leaves, index| {
            leaves.get(7, index).is_some_and(|leaf| leaf.eax | leaf.ebx | leaf.ecx | leaf.edx != 0)
        };
        let last = (1..=2).rev().find(|index| used(leaves, *index)).unwrap_or(0);
        leaves.entry(7, 0).eax = last;
    }
}
