//! CPUID: what processor the guest believes it has.
//!
//! ```text
//! KVM_GET_SUPPORTED_CPUID --host_cpuid--> what this host offers
//!      --cpu x86-64-v3,+aes --parse-----> CpuSpec
//! CpuSpec::build(what this host offers, vCPU) --> KVM_SET_CPUID2
//! missing_features(saved CPUID, what this host offers) --> why a guest cannot come here
//! ```
//!
//! The saved CPUID is the one that was given to KVM_SET_CPUID2. KVM_GET_CPUID2 gives it back with
//! the guest's own settings worked in (OSXSAVE, the size of the XSAVE area in use), and a
//! paravirtual KVM that does not filter CPUID gives the host's bits.
//!
//! Rules:
//! - Nothing is advertised that KVM does not support here.
//! - State that is not saved is not offered: nested virtualization (SVM, VMX), the PMU, SGX, shadow
//!   stacks, memory encryption.
//! - A baseline model has exactly the features of its psABI level, those that 64-bit kernels rely
//!   on, and those that KVM provides by itself. Mitigations for side channels (`spec_ctrl`, `ibpb`,
//!   ...) differ between processors and have to be added by name.
//! - The vendor is the host's, since the guest picks instructions by it (`vmcall` or `vmmcall`).
//! - All vCPUs are cores of one socket; the APIC id of a vCPU is its number.

mod build;
mod compare;
mod cpuid;
mod features;
mod model;
mod spec;
#[cfg(test)]
mod test_data;
#[cfg(test)]
mod tests;
mod topology;
mod xsave;

pub use build::host_cpuid;
pub use compare::missing_features;
pub use model::Model;
pub use spec::CpuSpec;

/// Most vCPUs a machine can have.
pub const MAX_VCPUS: u8 = crate::config::MAX_CPUS;

/// Why a CPU specification is no good, here or anywhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// There is no such model.
    #[error(
        "unknown CPU model \"{name}\": choose one of host, x86-64-v2, x86-64-v3, x86-64-v4, then \
         ,+FEATURE and ,-FEATURE as you like"
    )]
    UnknownModel {
        /// What was asked for.
        name: String,
    },
    /// A feature without a sign.
    #[error(
        "\"{part}\" in the CPU specification: write +{part} to add it or -{part} to remove it"
    )]
    NoSign {
        /// What was found.
        part: String,
    },
    /// There is no such feature.
    #[error("unknown CPU feature \"{name}\": {}", hint(close))]
    UnknownFeature {
        /// What was asked for.
        name: String,
        /// Known names that are close.
        close: Vec<&'static str>,
    },
    /// The feature has state that is not saved.
    #[error("CPU feature {feature} cannot be offered: {reason}")]
    NotCarried {
        /// The feature.
        feature: &'static str,
        /// What is not saved.
        reason: &'static str,
    },
    /// The feature cannot be chosen.
    #[error("CPU feature {feature} cannot be added or removed: {reason}")]
    Derived {
        /// The feature.
        feature: &'static str,
        /// What decides about it.
        reason: &'static str,
    },
    /// The feature cannot be removed.
    #[error("CPU feature {feature} cannot be removed: no 64-bit guest starts without it")]
    Indispensable {
        /// The feature.
        feature: &'static str,
    },
    /// One feature needs another, which is removed.
    #[error("+{added} and -{removed} contradict each other: drop one of them")]
    Contradiction {
        /// What is added.
        added: &'static str,
        /// What is removed and needed.
        removed: &'static str,
    },
    /// The host lacks features.
    #[error(
        "CPU {spec} needs what KVM on this host does not support: {}; choose host or a lower \
         model, or remove them with -NAME",
        missing.join(", ")
    )]
    Unsupported {
        /// The specification.
        spec: String,
        /// Each feature that is missing.
        missing: Vec<String>,
    },
    /// The number of a vCPU is out of range.
    #[error("vCPU {vcpu} of {vcpus}: a machine has 1 to {MAX_VCPUS} of them, counted from 0")]
    VcpuNumber {
        /// Number of the vCPU.
        vcpu: u8,
        /// Number of vCPUs of the machine.
        vcpus: u8,
    },
    /// KVM takes fewer leaves.
    #[error("{leaves} CPUID leaves are more than KVM takes: use a baseline model")]
    TooManyLeaves {
        /// Number of leaves.
        leaves: usize,
    },
}

fn hint(close: &[&str]) -> String {
    if close.is_empty() {
        "names are those in the flags line of /proc/cpuinfo".to_owned()
    } else {
        format!("did you mean {}?", close.join(", "))
    }
}
