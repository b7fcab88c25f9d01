//! The CPU models, and what is masked in all of them.

use std::fmt;

/// A named set of features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// All that KVM supports on this host. Moves only to hosts that support as much.
    Host,
    /// x86-64-v2: SSE4.2, since about 2009.
    V2,
    /// x86-64-v3: AVX2, since about 2015.
    V3,
    /// x86-64-v4: AVX-512.
    V4,
}

impl Model {
    /// All models, by name.
    pub(super) const ALL: [Self; 4] = [Self::Host, Self::V2, Self::V3, Self::V4];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// The features of a baseline model; nothing for `host`.
    pub(super) fn features(self) -> Vec<&'static str> {
        let levels: &[&[&'static str]] = match self {
            Self::Host => &[],
            Self::V2 => &[BASELINE, KERNEL, LEVEL_2],
            Self::V3 => &[BASELINE, KERNEL, LEVEL_2, LEVEL_3],
            Self::V4 => &[BASELINE, KERNEL, LEVEL_2, LEVEL_3, LEVEL_4],
        };
        levels.concat()
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

// The micro-architecture levels of the System V psABI for x86-64, version 1.0, table 3.1, under the
// names of /proc/cpuinfo. OSFXSR and OSXSAVE there mean what the operating system turns on; here
// they are `fxsr` and `xsave`, which let it.

/// Baseline of the psABI: every 64-bit program. SCE is `syscall`.
pub(super) const BASELINE: &[&str] =
    &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2"];

/// x86-64-v2. CMPXCHG16B is `cx16`, LAHF-SAHF `lahf_lm`, SSE3 `pni`.
const LEVEL_2: &[&str] = &["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"];

/// x86-64-v3. LZCNT is `abm`.
const LEVEL_3: &[&str] = &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"];

/// x86-64-v4.
const LEVEL_4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

/// What the psABI does not name because programs do not see it, and 64-bit kernels rely on (Linux:
/// `required-features.h`, and what its drivers for page attributes and machine checks probe).
pub(super) const KERNEL: &[&str] = &[
    "de", "pse", "tsc", "msr", "pae", "mce", "apic", "sep", "mtrr", "pge", "mca", "pat", "pse36",
    "clflush", "nx", "lm",
];

/// What KVM provides by itself, whatever the processor: a baseline model has it where KVM says so.
pub(super) const PROVIDED_BY_KVM: &[&str] = &["x2apic", "tsc_deadline_timer", "arat"];

/// Without these no 64-bit guest starts, so they cannot be removed.
pub(super) const INDISPENSABLE: &[&str] = &[
    "cmov", "cx8", "fpu", "fxsr", "syscall", "sse", "sse2", "pse", "tsc", "msr", "pae", "apic",
    "pge", "lm",
];

/// Features that nobody gets, with the reason.
pub(super) const NOT_CARRIED: &[(&[&str], &str)] = &[
    (&["vmx", "smx", "svm", "skinit"], "state of nested virtual machines is not saved"),
    (
        &[
            "pdcm",
            "dtes64",
            "ds_cpl",
            "dts",
            "perfctr_core",
            "perfctr_nb",
            "perfctr_llc",
            "ibs",
            "arch_lbr",
            "intel_pt",
            "arch_perfmon_ext",
        ],
        "state of the performance monitoring unit is not saved",
    ),
    (&["sgx", "sgx_lc"], "the contents of SGX enclaves cannot be saved"),
    (&["user_shstk", "ibt"], "KVM keeps the shadow stack pointer outside of the saved registers"),
];

/// Leaves that describe what [`NOT_CARRIED`] masks, and memory encryption: Intel performance
/// monitoring, SGX, processor trace, last branch records, extended performance monitoring; AMD SVM,
/// IBS, memory encryption, performance monitoring version 2.
pub(super) const MASKED_LEAVES: &[u32] =
    &[0xA, 0x12, 0x14, 0x1C, 0x23, 0x8000_000A, 0x8000_001B, 0x8000_001F, 0x8000_0022];

/// Features whose bits follow from something else, with what that is.
pub(super) const DERIVED: &[(&str, &str)] = &[
    ("hypervisor", "it is always set, since there is a hypervisor"),
    ("ht", "it follows from the number of vCPUs"),
    ("cmp_legacy", "it follows from the number of vCPUs"),
    ("osxsave", "it follows from the guest's CR4"),
    ("ospke", "it follows from the guest's CR4"),
];
