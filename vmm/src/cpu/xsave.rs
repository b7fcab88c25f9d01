//! Leaf 0xD: which parts of the processor's state XSAVE saves, where and how large.
//!
//! Source: Intel SDM volume 1, chapter 13 (sections 13.4.1 to 13.4.3 for the sizes).

use super::cpuid::Leaves;

const LEAF: u32 = 0xD;

/// x87 and SSE: always there, in the legacy area.
const LEGACY: u64 = 0b11;
/// Size of the legacy area and the XSAVE header, bytes.
const LEGACY_SIZE: u32 = 512 + 64;
/// First component that has a sub-leaf.
const FIRST_EXTENDED: u32 = 2;

/// State components in XCR0, and the feature that each belongs to.
const COMPONENTS: &[(u32, &str)] = &[
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx_tile"),
    (18, "amx_tile"),
];

/// State components in IA32_XSS whose features are never offered: processor trace, shadow stacks
/// (user, supervisor), user interrupts, last branch records.
const NOT_CARRIED_XSS: u64 = 1 << 8 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15;

/// Sub-leaf 1 eax: the compacted format exists (XSAVEC, XSAVES).
const COMPACTED: u32 = 1 << 1 | 1 << 3;
/// Sub-leaf of a component, ecx: in the compacted format it starts at a multiple of 64.
const ALIGNED: u32 = 1 << 1;
const ALIGNMENT: u32 = 64;

/// The components of XCR0 (user) and IA32_XSS (supervisor) that leaf 0xD allows.
pub(super) fn components(leaves: &Leaves) -> (u64, u64) {
    let user = leaves.get(LEAF, 0).map_or(0, |leaf| u64::from(leaf.edx) << 32 | leaf.eax as u64);
    let supervisor =
        leaves.get(LEAF, 1).map_or(0, |leaf| u64::from(leaf.edx) << 32 | leaf.ecx as u64);
    (user, supervisor)
}

/// Features that are there while the state they work on cannot be saved: without the host's
/// permission KVM reports AMX so, and a processor without XSAVE does AVX.
pub(super) fn without_state(leaves: &Leaves) -> Vec<&'static str> {
    let (user, _) = components(leaves);
    COMPONENTS
        .iter()
        .filter(|(component, name)| user & 1 << component == 0 && leaves.has_name(name))
        .map(|(_, name)| *name)
        .collect()
}

/// Brings leaf 0xD in line with the features that were chosen.
///
/// With model `host` only the state of features that were taken away goes: what KVM reports
/// otherwise is what it saves, whether it reports the feature or not.
pub(super) fn apply(leaves: &mut Leaves, offered: &Leaves, baseline: bool) {
    let gone = |name| !leaves.has_name(name) && (baseline || offered.has_name(name));
    if gone("xsave") {
        leaves.remove(LEAF);
        return;
    }
    if !leaves.has_leaf(LEAF) {
        return;
    }
    let (mut user, mut supervisor) = components(leaves);
    if baseline {
        user &= COMPONENTS.iter().fold(LEGACY, |known, (component, _)| known | 1 << component);
        supervisor = 0;
    }
    for (component, name) in COMPONENTS {
        if gone(name) {
            user &= !(1 << component);
        }
    }
    supervisor &= !NOT_CARRIED_XSS;

    leaves.retain(|leaf| {
        leaf.function != LEAF
            || leaf.index < FIRST_EXTENDED
            || leaf.index < u64::BITS && (user | supervisor) & 1 << leaf.index != 0
    });
    let standard = standard_size(leaves, user);
    let compacted = compacted_size(leaves, user | supervisor);
    let first = leaves.entry(LEAF, 0);
    // KVM keeps ebx, the size for the components that the guest turned on, up to date.
    (first.eax, first.edx) = halves(user);
    (first.ebx, first.ecx) = (standard, standard);
    let second = leaves.entry(LEAF, 1);
    (second.ecx, second.edx) = halves(supervisor);
    second.ebx = if second.eax & COMPACTED != 0 { compacted } else { 0 };
}

/// Low and high half.
fn halves(mask: u64) -> (u32, u32) {
    (mask as u32, (mask >> 32) as u32)
}

/// Size and offset of the extended components in `mask`, ascending.
fn areas(leaves: &Leaves, mask: u64) -> impl Iterator<Item = kvm_bindings::kvm_cpuid_entry2> + '_ {
    (FIRST_EXTENDED..u64::BITS)
        .filter(move |component| mask & 1 << component != 0)
        .filter_map(|component| leaves.get(LEAF, component).copied())
}

/// Bytes that XSAVE writes with these components on.
fn standard_size(leaves: &Leaves, user: u64) -> u32 {
    areas(leaves, user)
        .map(|area| area.ebx.saturating_add(area.eax))
        .fold(LEGACY_SIZE, |size, end| size.max(end))
}

/// Bytes that XSAVES writes with these components on.
fn compacted_size(leaves: &Leaves, all: u64) -> u32 {
    areas(leaves, all).fold(LEGACY_SIZE, |size, area| {
        let start = if area.ecx & ALIGNED != 0 {
            size.checked_next_multiple_of(ALIGNMENT).unwrap_or(u32::MAX)
        } else {
            size
        };
        start.saturating_add(area.eax)
    })
}
