//! A set of CPUID leaves that can be looked up and changed.

use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};

use super::features::{Feature, Reg, Register};
use super::CpuError;

/// First and last of the extended leaves.
pub(super) const EXTENDED: std::ops::RangeInclusive<u32> = 0x8000_0000..=0x8000_FFFF;
/// First and last of the basic leaves.
pub(super) const BASIC: std::ops::RangeInclusive<u32> = 0..=0xFFFF;

/// CPUID leaves. What is not there reads as zeros, as in KVM.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    pub(super) fn new(cpuid: &CpuId) -> Self {
        Self(cpuid.as_slice().to_vec())
    }

    /// As KVM takes it. Leaves of zeros are left out, so that there is room.
    pub(super) fn into_cpuid(mut self) -> Result<CpuId, CpuError> {
        self.0.retain(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] != [0; 4]);
        self.0.sort_by_key(|leaf| (leaf.function, leaf.index));
        CpuId::from_entries(&self.0).map_err(|_| CpuError::TooManyLeaves { leaves: self.0.len() })
    }

    pub(super) fn get(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.0.iter().find(|leaf| leaf.function == function && leaf.index == index)
    }

    /// All leaves of a function, by index.
    pub(super) fn of(&mut self, function: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.0.iter_mut().filter(move |leaf| leaf.function == function)
    }

    /// The leaf, made if need be.
    pub(super) fn entry(&mut self, function: u32, index: u32) -> &mut kvm_cpuid_entry2 {
        let at = |leaf: &kvm_cpuid_entry2| leaf.function == function && leaf.index == index;
        let position = self.0.iter().position(at).unwrap_or_else(|| {
            let indexed = matches!(function, 4 | 7 | 0xB | 0xD | 0x1F | 0x8000_001D);
            let flags = if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            self.0.push(kvm_cpuid_entry2 { function, index, flags, ..Default::default() });
            self.0.len() - 1
        });
        &mut self.0[position]
    }

    pub(super) fn remove(&mut self, function: u32) {
        self.retain(|leaf| leaf.function != function);
    }

    pub(super) fn retain(&mut self, keep: impl FnMut(&kvm_cpuid_entry2) -> bool) {
        self.0.retain(keep);
    }

    /// Whether any leaf of this function is there.
    pub(super) fn has_leaf(&self, function: u32) -> bool {
        self.0.iter().any(|leaf| leaf.function == function)
    }

    /// The highest function of a range.
    pub(super) fn highest(&self, range: &std::ops::RangeInclusive<u32>) -> Option<u32> {
        self.0.iter().map(|leaf| leaf.function).filter(|function| range.contains(function)).max()
    }

    pub(super) fn register(&self, register: Register) -> u32 {
        self.get(register.function, register.index).map_or(0, |leaf| match register.reg {
            Reg::Eax => leaf.eax,
            Reg::Ebx => leaf.ebx,
            Reg::Ecx => leaf.ecx,
            Reg::Edx => leaf.edx,
        })
    }

    pub(super) fn set_register(&mut self, register: Register, value: u32) {
        let leaf = self.entry(register.function, register.index);
        match register.reg {
            Reg::Eax => leaf.eax = value,
            Reg::Ebx => leaf.ebx = value,
            Reg::Ecx => leaf.ecx = value,
            Reg::Edx => leaf.edx = value,
        }
    }

    pub(super) fn has(&self, feature: Feature) -> bool {
        self.register(feature.register) & 1 << feature.bit != 0
    }

    /// Whether the feature of this name is there; no feature of an unknown name is.
    pub(super) fn has_name(&self, name: &str) -> bool {
        Feature::by_name(name).is_some_and(|feature| self.has(feature))
    }

    pub(super) fn set(&mut self, feature: Feature, there: bool) {
        if self.has(feature) != there {
            self.set_register(feature.register, self.register(feature.register) ^ 1 << feature.bit);
        }
    }

    /// Sets the feature of this name, which is one of our lists.
    pub(super) fn set_name(&mut self, name: &str, there: bool) {
        if let Some(feature) = Feature::by_name(name) {
            self.set(feature, there);
        }
    }

    /// The vendor's twelve letters, as in leaf 0.
    pub(super) fn vendor(&self) -> [u8; 12] {
        let mut vendor = [0; 12];
        if let Some(leaf) = self.get(0, 0) {
            for (bytes, register) in vendor.chunks_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
                bytes.copy_from_slice(&register.to_le_bytes());
            }
        }
        vendor
    }

    /// Whether the extended leaves are laid out as AMD does it.
    pub(super) fn is_amd(&self) -> bool {
        matches!(&self.vendor(), b"AuthenticAMD" | b"HygonGenuine")
    }
}
