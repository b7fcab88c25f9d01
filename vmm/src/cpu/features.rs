//! The features that CPUID has bits for, by the names of Linux' `/proc/cpuinfo`.
//!
//! Sources: Linux `arch/x86/include/asm/cpufeatures.h` for names, Intel SDM volume 2 (CPUID) and
//! AMD APM volume 3, appendix E for positions, Linux `Documentation/virt/kvm/x86/cpuid.rst` for
//! KVM's own leaf, whose features have the names that QEMU gives them.

use std::fmt;

/// One of the four registers of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Register {
    pub(super) function: u32,
    pub(super) index: u32,
    pub(super) reg: Reg,
}

impl fmt::Display for Register {
    /// `leaf 7.0 ebx`, `leaf 0x80000001 ecx`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.function {
            leaf @ 0..10 => write!(f, "leaf {leaf}")?,
            leaf => write!(f, "leaf {leaf:#x}")?,
        }
        if matches!(self.function, 7 | 0xD) {
            write!(f, ".{}", self.index)?;
        }
        f.write_str(match self.reg {
            Reg::Eax => " eax",
            Reg::Ebx => " ebx",
            Reg::Ecx => " ecx",
            Reg::Edx => " edx",
        })
    }
}

/// A named feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    pub(super) name: &'static str,
    pub(super) register: Register,
    pub(super) bit: u8,
}

impl Feature {
    /// The feature of this name.
    pub(super) fn by_name(name: &str) -> Option<Self> {
        Self::all().find(|feature| feature.name == name)
    }

    /// All features that have a name.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        FEATURES.iter().flat_map(|&(register, bits)| {
            bits.iter().map(move |&(bit, name)| Self { name, register, bit })
        })
    }
}

impl fmt::Display for Feature {
    /// `avx512f (leaf 7.0 ebx bit 16)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bit {})", self.name, self.register, self.bit)
    }
}

const fn register(function: u32, index: u32, reg: Reg) -> Register {
    Register { function, index, reg }
}

/// KVM's own features.
pub(super) const KVM_FEATURES: u32 = 0x4000_0001;

/// Every register that is a set of features, and the names of its bits.
#[rustfmt::skip]
pub(super) const FEATURES: &[(Register, &[(u8, &str)])] = &[
    (register(1, 0, Reg::Edx), &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"),
        (7, "mce"), (8, "cx8"), (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"),
        (15, "cmov"), (16, "pat"), (17, "pse36"), (18, "pn"), (19, "clflush"), (21, "dts"),
        (22, "acpi"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2"), (27, "ss"),
        (28, "ht"), (29, "tm"), (30, "ia64"), (31, "pbe"),
    ]),
    (register(1, 0, Reg::Ecx), &[
        (0, "pni"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds_cpl"), (5, "vmx"),
        (6, "smx"), (7, "est"), (8, "tm2"), (9, "ssse3"), (10, "cid"), (11, "sdbg"), (12, "fma"),
        (13, "cx16"), (14, "xtpr"), (15, "pdcm"), (17, "pcid"), (18, "dca"), (19, "sse4_1"),
        (20, "sse4_2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"), (24, "tsc_deadline_timer"),
        (25, "aes"), (26, "xsave"), (27, "osxsave"), (28, "avx"), (29, "f16c"), (30, "rdrand"),
        (31, "hypervisor"),
    ]),
    (register(6, 0, Reg::Eax), &[(2, "arat")]),
    (register(7, 0, Reg::Ebx), &[
        (0, "fsgsbase"), (1, "tsc_adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"),
        (6, "fdp_excptn_only"), (7, "smep"), (8, "bmi2"), (9, "erms"), (10, "invpcid"),
        (11, "rtm"), (12, "cqm"), (13, "zero_fcs_fds"), (14, "mpx"), (15, "rdt_a"),
        (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"), (20, "smap"),
        (21, "avx512ifma"), (23, "clflushopt"), (24, "clwb"), (25, "intel_pt"), (26, "avx512pf"),
        (27, "avx512er"), (28, "avx512cd"), (29, "sha_ni"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    (register(7, 0, Reg::Ecx), &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (4, "ospke"), (5, "waitpkg"),
        (6, "avx512_vbmi2"), (7, "user_shstk"), (8, "gfni"), (9, "vaes"), (10, "vpclmulqdq"),
        (11, "avx512_vnni"), (12, "avx512_bitalg"), (13, "tme"), (14, "avx512_vpopcntdq"),
        (16, "la57"), (22, "rdpid"), (24, "bus_lock_detect"), (25, "cldemote"), (27, "movdiri"),
        (28, "movdir64b"), (29, "enqcmd"), (30, "sgx_lc"), (31, "pks"),
    ]),
    (register(7, 0, Reg::Edx), &[
        (2, "avx512_4vnniw"), (3, "avx512_4fmaps"), (4, "fsrm"), (5, "uintr"),
        (8, "avx512_vp2intersect"), (9, "srbds_ctrl"), (10, "md_clear"), (11, "rtm_always_abort"),
        (13, "tsx_force_abort"), (14, "serialize"), (15, "hybrid_cpu"), (16, "tsxldtrk"),
        (18, "pconfig"), (19, "arch_lbr"), (20, "ibt"), (22, "amx_bf16"), (23, "avx512_fp16"),
        (24, "amx_tile"), (25, "amx_int8"), (26, "spec_ctrl"), (27, "intel_stibp"),
        (28, "flush_l1d"), (29, "arch_capabilities"), (30, "core_capabilities"),
        (31, "spec_ctrl_ssbd"),
    ]),
    (register(7, 1, Reg::Eax), &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (3, "rao_int"), (4, "avx_vnni"), (5, "avx512_bf16"),
        (6, "lass"), (7, "cmpccxadd"), (8, "arch_perfmon_ext"), (10, "fzrm"), (11, "fsrs"),
        (12, "fsrc"), (17, "fred"), (18, "lkgs"), (19, "wrmsrns"), (21, "amx_fp16"),
        (22, "hreset"), (23, "avx_ifma"), (26, "lam"),
    ]),
    (register(7, 1, Reg::Edx), &[
        (4, "avx_vnni_int8"), (5, "avx_ne_convert"), (8, "amx_complex"), (10, "avx_vnni_int16"),
        (14, "prefetchi"), (19, "avx10"),
    ]),
    (register(7, 2, Reg::Edx), &[
        (0, "intel_psfd"), (1, "ipred_ctrl"), (2, "rrsba_ctrl"), (3, "ddpd_u"), (4, "bhi_ctrl"),
        (5, "mcdt_no"),
    ]),
    (register(0xD, 1, Reg::Eax), &[
        (0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd"),
    ]),
    (register(0x8000_0001, 0, Reg::Edx), &[
        (11, "syscall"), (19, "mp"), (20, "nx"), (22, "mmxext"), (25, "fxsr_opt"),
        (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm"), (30, "3dnowext"), (31, "3dnow"),
    ]),
    (register(0x8000_0001, 0, Reg::Ecx), &[
        (0, "lahf_lm"), (1, "cmp_legacy"), (2, "svm"), (3, "extapic"), (4, "cr8_legacy"),
        (5, "abm"), (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"),
        (10, "ibs"), (11, "xop"), (12, "skinit"), (13, "wdt"), (15, "lwp"), (16, "fma4"),
        (17, "tce"), (19, "nodeid_msr"), (21, "tbm"), (22, "topoext"), (23, "perfctr_core"),
        (24, "perfctr_nb"), (26, "bpext"), (27, "ptsc"), (28, "perfctr_llc"), (29, "mwaitx"),
    ]),
    (register(0x8000_0007, 0, Reg::Edx), &[(8, "nonstop_tsc")]),
    (register(0x8000_0008, 0, Reg::Ebx), &[
        (0, "clzero"), (1, "irperf"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd"),
        (12, "ibpb"), (14, "ibrs"), (15, "stibp"), (16, "ibrs_always"), (17, "stibp_always"),
        (23, "amd_ppin"), (24, "amd_ssbd"), (25, "virt_ssbd"), (26, "amd_ssb_no"), (27, "cppc"),
        (28, "amd_psfd"), (29, "btc_no"), (30, "ibpb_ret"),
    ]),
    (register(0x8000_0021, 0, Reg::Eax), &[
        (0, "no_nested_data_bp"), (2, "lfence_rdtsc"), (6, "null_sel_clr_base"), (8, "autoibrs"),
        (9, "no_smm_ctl_msr"), (27, "sbpb"), (28, "ibpb_brtype"), (29, "srso_no"),
    ]),
    (register(KVM_FEATURES, 0, Reg::Eax), &[
        (0, "kvmclock"), (1, "kvm-nopiodelay"), (2, "kvm-mmu"), (3, "kvmclock2"),
        (4, "kvm-asyncpf"), (5, "kvm-steal-time"), (6, "kvm-pv-eoi"), (7, "kvm-pv-unhalt"),
        (9, "kvm-pv-tlb-flush"), (10, "kvm-asyncpf-vmexit"), (11, "kvm-pv-ipi"),
        (12, "kvm-poll-control"), (13, "kvm-pv-sched-yield"), (14, "kvm-asyncpf-int"),
        (15, "kvm-msi-ext-dest-id"), (16, "kvm-hc-map-gpa-range"), (17, "kvm-migration-control"),
        (24, "kvmclock-stable-bit"),
    ]),
];

/// Features that need another one, which alone makes their state or their instructions usable.
///
/// Adding the first adds the second, removing the second removes the first.
#[rustfmt::skip]
pub(super) const REQUIRES: &[(&str, &str)] = &[
    ("xsaveopt", "xsave"), ("xsavec", "xsave"), ("xgetbv1", "xsave"), ("xsaves", "xsave"),
    ("xfd", "xsave"), ("avx", "xsave"), ("mpx", "xsave"), ("pku", "xsave"), ("amx_tile", "xsave"),
    ("avx2", "avx"), ("fma", "avx"), ("f16c", "avx"), ("vaes", "avx"), ("vpclmulqdq", "avx"),
    ("xop", "avx"), ("fma4", "avx"), ("sha512", "avx2"), ("sm3", "avx"), ("sm4", "avx2"),
    ("avx_vnni", "avx2"), ("avx_ifma", "avx2"), ("avx_vnni_int8", "avx2"),
    ("avx_vnni_int16", "avx2"), ("avx_ne_convert", "avx2"),
    ("avx512f", "avx2"), ("avx512dq", "avx512f"), ("avx512ifma", "avx512f"),
    ("avx512pf", "avx512f"), ("avx512er", "avx512f"), ("avx512cd", "avx512f"),
    ("avx512bw", "avx512f"), ("avx512vl", "avx512f"), ("avx512vbmi", "avx512bw"),
    ("avx512_vbmi2", "avx512bw"), ("avx512_vnni", "avx512f"), ("avx512_bitalg", "avx512bw"),
    ("avx512_vpopcntdq", "avx512f"), ("avx512_4vnniw", "avx512f"), ("avx512_4fmaps", "avx512f"),
    ("avx512_vp2intersect", "avx512f"), ("avx512_fp16", "avx512bw"), ("avx512_bf16", "avx512bw"),
    ("avx10", "avx512f"),
    ("amx_bf16", "amx_tile"), ("amx_int8", "amx_tile"), ("amx_fp16", "amx_tile"),
    ("amx_complex", "amx_tile"), ("invpcid", "pcid"), ("x2apic", "apic"),
    ("tsc_deadline_timer", "apic"), ("tsc_deadline_timer", "tsc"),
    ("kvmclock2", "kvmclock"), ("kvmclock-stable-bit", "kvmclock"),
    ("kvm-asyncpf-vmexit", "kvm-asyncpf"), ("kvm-asyncpf-int", "kvm-asyncpf"),
];

/// Names that other documents use for a feature.
pub(super) const ALIASES: &[(&str, &str)] = &[
    ("sse3", "pni"),
    ("pclmul", "pclmulqdq"),
    ("pclmuldq", "pclmulqdq"),
    ("cmpxchg16b", "cx16"),
    ("cmpxchg8b", "cx8"),
    ("lzcnt", "abm"),
    ("lahf-sahf", "lahf_lm"),
    ("osfxsr", "fxsr"),
    ("invtsc", "nonstop_tsc"),
    ("constant_tsc", "nonstop_tsc"),
    ("shstk", "user_shstk"),
    ("ssbd", "spec_ctrl_ssbd"),
    ("sha", "sha_ni"),
];
