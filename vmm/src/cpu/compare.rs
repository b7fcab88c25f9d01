//! Whether a guest that was started elsewhere finds its processor here.

use kvm_bindings::CpuId;

use super::cpuid::Leaves;
use super::features::{Feature, Reg, FEATURES, KVM_FEATURES};
use super::model::DERIVED;
use super::xsave;

/// Feature bits that say that something is *not* there: a guest gets along without them.
const INVERTED: &[&str] = &["fdp_excptn_only", "zero_fcs_fds"];
/// Name of a feature that has none here.
const UNNAMED: &str = "unnamed feature";

/// What the guest's CPUID promises (`wanted`, of any of its vCPUs) and this host cannot keep
/// (`host`, of [`super::host_cpuid`]). The guest may come here when the list is empty.
///
/// Features are named with their bit, as in `avx512f (leaf 7.0 ebx bit 16)`. Further entries are
/// another vendor, wider addresses, and XSAVE state that is not saved here or is laid out in
/// another way. Caches, topology and signatures are not compared: they are the guest's own.
pub fn missing_features(wanted: &CpuId, host: &CpuId) -> Vec<String> {
    let (wanted, host) = (Leaves::new(wanted), Leaves::new(host));
    let mut missing = Vec::new();
    if wanted.vendor() != host.vendor() {
        let letters = |leaves: &Leaves| leaves.vendor().escape_ascii().to_string();
        missing.push(format!("CPU vendor {} (here {})", letters(&wanted), letters(&host)));
    }
    missing.extend(missing_bits(&wanted, &host));
    missing.extend(narrower_addresses(&wanted, &host));
    missing.extend(other_state(&wanted, &host));
    missing
}

fn missing_bits(wanted: &Leaves, host: &Leaves) -> Vec<String> {
    let mut missing = Vec::new();
    for (register, names) in FEATURES {
        let name_of = |bit| names.iter().find(|(b, _)| *b == bit).map(|(_, name)| *name);
        let mut lacking = wanted.register(*register) & !host.register(*register);
        // AMD repeats leaf 1 here: those bits have no name of their own.
        if register.function == 0x8000_0001 && register.reg == Reg::Edx {
            lacking &= names.iter().fold(0, |mask, (bit, _)| mask | 1 << bit);
        }
        // Leaf 6 eax holds more than features: thermal sensors that no guest has.
        if register.function == 6 {
            lacking &= names.iter().fold(0, |mask, (bit, _)| mask | 1 << bit);
        }
        for bit in (0..32).filter(|bit| lacking & 1 << bit != 0) {
            let name = name_of(bit);
            let ignored = |name: &str| {
                INVERTED.contains(&name) || DERIVED.iter().any(|(derived, _)| *derived == name)
            };
            if !name.is_some_and(ignored) {
                let name = name.unwrap_or(UNNAMED);
                missing.push(Feature { name, register: *register, bit }.to_string());
            }
        }
    }
    // KVM's features mean nothing without its signature.
    let signature =
        |leaves: &Leaves| leaves.get(0x4000_0000, 0).map(|leaf| [leaf.ebx, leaf.ecx, leaf.edx]);
    if wanted.has_leaf(KVM_FEATURES) && signature(wanted) != signature(host) {
        missing.push("KVM's paravirtual interface (leaf 0x40000000)".to_owned());
    }
    missing
}

fn narrower_addresses(wanted: &Leaves, host: &Leaves) -> Vec<String> {
    let widths =
        |leaves: &Leaves| leaves.get(0x8000_0008, 0).map_or([0; 4], |leaf| leaf.eax.to_le_bytes());
    let (wanted, host) = (widths(wanted), widths(host));
    ["physical", "linear"]
        .into_iter()
        .zip(wanted.into_iter().zip(host))
        .filter(|(_, (wanted, host))| wanted > host)
        .map(|(what, (wanted, host))| format!("{what} addresses of {wanted} bits (here {host})"))
        .collect()
}

fn other_state(wanted: &Leaves, host: &Leaves) -> Vec<String> {
    let ((user, supervisor), (host_user, host_supervisor)) =
        (xsave::components(wanted), xsave::components(host));
    let mut missing = Vec::new();
    for component in 0..u64::BITS {
        let bit = 1 << component;
        if user & bit & !host_user != 0 {
            missing.push(format!("XSAVE component {component} (XCR0 bit {component})"));
        } else if supervisor & bit & !host_supervisor != 0 {
            missing.push(format!("XSAVES component {component} (IA32_XSS bit {component})"));
        } else if user & bit != 0 && component >= 2 {
            let area = |leaves: &Leaves| {
                leaves.get(0xD, component).map_or((0, 0), |leaf| (leaf.ebx, leaf.eax))
            };
            let (there, here) = (area(wanted), area(host));
            if there != here {
                missing.push(format!(
                    "XSAVE component {component} of {} bytes at offset {} (here {} at {})",
                    there.1, there.0, here.1, here.0
                ));
            }
        }
    }
    missing
}
