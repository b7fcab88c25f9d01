//! CPUs built from literal hosts.
#![allow(clippy::unwrap_used)]

use kvm_bindings::CpuId;

use super::cpuid::Leaves;
use super::features::{Feature, FEATURES, KVM_FEATURES};
use super::test_data::{cpuid, AMD, BARE, INTEL};
use super::*;

fn host(rows: &[test_data::Row]) -> CpuId {
    host_cpuid(&cpuid(rows), true).unwrap()
}

fn build(spec: &str, host: &CpuId, vcpu: u8, vcpus: u8) -> CpuId {
    CpuSpec::parse(spec).unwrap().build(host, vcpu, vcpus).unwrap()
}

fn leaf(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
    Leaves::new(cpuid)
        .get(function, index)
        .map_or([0; 4], |leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

fn has(cpuid: &CpuId, name: &str) -> bool {
    Leaves::new(cpuid).has(Feature::by_name(name).unwrap())
}

/// Names of all features but KVM's own, sorted.
fn features(cpuid: &CpuId) -> Vec<&'static str> {
    let leaves = Leaves::new(cpuid);
    let mut names: Vec<_> = Feature::all()
        .filter(|feature| feature.register.function != KVM_FEATURES && leaves.has(*feature))
        .map(|feature| feature.name)
        .collect();
    names.sort_unstable();
    names
}

fn sorted(lists: &[&[&'static str]]) -> Vec<&'static str> {
    let mut names = lists.concat();
    names.sort_unstable();
    names
}

const V1: &[&str] = &[
    "apic",
    "arat",
    "clflush",
    "cmov",
    "cx8",
    "de",
    "fpu",
    "fxsr",
    "hypervisor",
    "lm",
    "mca",
    "mce",
    "mmx",
    "msr",
    "mtrr",
    "nx",
    "pae",
    "pat",
    "pge",
    "pse",
    "pse36",
    "sep",
    "sse",
    "sse2",
    "syscall",
    "tsc",
    "tsc_deadline_timer",
    "x2apic",
];
const V2: &[&str] = &["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"];
const V3: &[&str] = &["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"];
const V4: &[&str] = &["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"];

#[test]
fn a_baseline_has_its_level_and_nothing_else() {
    for rows in [AMD, INTEL] {
        let host = host(rows);
        assert_eq!(features(&build("x86-64-v2", &host, 0, 1)), sorted(&[V1, V2]));
        assert_eq!(features(&build("x86-64-v3", &host, 0, 1)), sorted(&[V1, V2, V3]));
        // Bits without a name are not there either.
        let guest = Leaves::new(&build("x86-64-v3", &host, 0, 1));
        for (register, names) in FEATURES {
            let named = names.iter().fold(0u32, |mask, (bit, _)| mask | 1 << bit);
            let mirrored = if register.function == 0x8000_0001 { 0x0183_F3FF } else { 0 };
            assert_eq!(guest.register(*register) & !(named | mirrored), 0, "{register}");
        }
    }
    let guest = build("x86-64-v4", &host(INTEL), 0, 1);
    assert_eq!(features(&guest), sorted(&[V1, V2, V3, V4]));
}

#[test]
fn the_same_baseline_on_two_hosts_moves_between_them() {
    let mut older = AMD.to_vec();
    // No VAES, no PKU, no SHA, another signature and brand, other caches.
    for row in &mut older {
        match (row.0, row.1) {
            (1, _) => row.3 = 0x0083_0f10,
            (7, 0) => (row.4, row.5) = (0x019c_01ab, 0x0040_0004),
            (0xD, 0) => (row.3, row.4, row.5) = (7, 0x340, 0x340),
            (0x8000_0002..=0x8000_0004, _) => row.3 = 0x2020_2020,
            (0x8000_0006, _) => row.6 = 0,
            _ => (),
        }
    }
    let (new, old) = (host(AMD), host(&older));
    assert_eq!(missing_features(&build("x86-64-v3", &new, 1, 2), &old), Vec::<String>::new());
    assert_eq!(missing_features(&build("x86-64-v3", &old, 1, 2), &new), Vec::<String>::new());
    let reasons = missing_features(&build("host", &new, 0, 1), &old);
    assert_eq!(
        reasons,
        [
            "sha_ni (leaf 7.0 ebx bit 29)",
            "pku (leaf 7.0 ecx bit 3)",
            "vaes (leaf 7.0 ecx bit 9)",
            "vpclmulqdq (leaf 7.0 ecx bit 10)",
            "XSAVE component 9 (XCR0 bit 9)",
        ]
    );
}

#[test]
fn a_host_that_lacks_a_level_says_what_is_missing() {
    let error = CpuSpec::parse("x86-64-v4").unwrap().build(&host(AMD), 0, 1).unwrap_err();
    let CpuError::Unsupported { missing, .. } = &error else { panic!("{error}") };
    assert_eq!(missing.len(), 5);
    assert!(missing.contains(&"avx512f (leaf 7.0 ebx bit 16)".to_owned()), "{error}");
    assert!(error.to_string().contains("CPU x86-64-v4 needs"), "{error}");

    let error = CpuSpec::parse("x86-64-v2").unwrap().build(&host(BARE), 0, 1).unwrap_err();
    let CpuError::Unsupported { missing, .. } = &error else { panic!("{error}") };
    assert_eq!(missing.len(), 5, "{missing:?}");
    assert!(missing[0].starts_with("popcnt"), "{missing:?}");

    // Explicit wishes are checked with model host too.
    let error = CpuSpec::parse("host,+avx512f").unwrap().build(&host(AMD), 0, 1).unwrap_err();
    assert!(error.to_string().contains("avx512f (leaf 7.0 ebx bit 16)"), "{error}");
    // What is removed is not missed.
    assert!(CpuSpec::parse("x86-64-v4,-avx512f").unwrap().build(&host(AMD), 0, 1).is_ok());
}

#[test]
fn features_are_added_and_removed_with_what_belongs_to_them() {
    let intel = host(INTEL);
    let guest = build("x86-64-v2,+avx2,+aes", &intel, 0, 1);
    assert_eq!(features(&guest), sorted(&[V1, V2, &["aes", "avx", "avx2", "xsave"]]));
    let guest = build("x86-64-v3,-avx", &intel, 0, 1);
    assert_eq!(features(&guest), sorted(&[V1, V2, &["abm", "bmi1", "bmi2", "movbe", "xsave"]]));
    let guest = build("x86-64-v3,+avx512_bf16,-tsc_deadline_timer", &intel, 0, 1);
    assert!(has(&guest, "avx512_bf16") && has(&guest, "avx512bw") && !has(&guest, "avx_vnni"));
    assert!(!has(&guest, "tsc_deadline_timer"));
    assert_eq!(leaf(&guest, 7, 0)[0], 1, "sub-leaf 1 of leaf 7 is in use");
    assert_eq!(leaf(&build("x86-64-v3", &intel, 0, 1), 7, 0)[0], 0);
    assert!(!has(&build("host,-kvmclock", &intel, 0, 1), "kvmclock2"));
}

#[test]
fn host_is_what_kvm_supports_without_what_is_not_carried() {
    let amd = host(AMD);
    let guest = build("host", &amd, 0, 1);
    let lost: Vec<_> = features(&amd).into_iter().filter(|name| !has(&guest, name)).collect();
    assert_eq!(lost, ["cmp_legacy", "ht", "ospke", "osxsave", "perfctr_core", "svm"]);
    for function in [0x8000_000A, 0x8000_001F, 0x8000_0022] {
        assert_eq!(leaf(&guest, function, 0), [0; 4], "{function:#x}");
    }
    assert_eq!(leaf(&guest, 0x8000_0002, 0)[0], 0x2044_4d41, "the host's brand");
    assert_eq!(leaf(&guest, 1, 0)[0], 0x00a0_0f11, "the host's signature");

    let intel = host(INTEL);
    let guest = build("host", &intel, 0, 1);
    let lost: Vec<_> = features(&intel).into_iter().filter(|name| !has(&guest, name)).collect();
    assert_eq!(
        lost,
        [
            "arch_lbr",
            "dtes64",
            "dts",
            "ibt",
            "intel_pt",
            "pdcm",
            "sgx",
            "sgx_lc",
            "user_shstk",
            "vmx"
        ]
    );
    for function in [0xA, 0x12, 0x14, 0x1C] {
        assert_eq!(leaf(&guest, function, 0), [0; 4], "{function:#x}");
    }
}

#[test]
fn a_baseline_shows_its_model_not_the_host() {
    for rows in [AMD, INTEL] {
        let host = host(rows);
        let guest = build("x86-64-v3", &host, 0, 1);
        assert_eq!(leaf(&guest, 1, 0)[0], 0x0006_0FB1);
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|function| leaf(&guest, function, 0))
            .flat_map(u32::to_le_bytes)
            .collect();
        assert_eq!(brand[..10], *b"x86-64-v3\0");
        assert_eq!(leaf(&guest, 0x8000_0007, 0), [0; 4]);
        assert_eq!(leaf(&guest, 0, 0)[1..], leaf(&host, 0, 0)[1..], "the vendor stays");
        assert_eq!(leaf(&guest, 0, 0)[0], 0xD);
        assert_eq!(leaf(&guest, 0x8000_0000, 0)[0], 0x8000_0008);
    }
    let guest = build("x86-64-v2", &host(AMD), 0, 1);
    assert_eq!(leaf(&guest, 0x8000_0001, 0)[0], 0x0006_0FB1);
    let mirrored = 0x0183_F3FF;
    assert_eq!(leaf(&guest, 0x8000_0001, 0)[3] & mirrored, leaf(&guest, 1, 0)[3] & mirrored);
}

#[test]
fn kvm_shows_itself() {
    for spec in ["host", "x86-64-v2"] {
        let guest = build(spec, &host(INTEL), 0, 1);
        assert_eq!(leaf(&guest, 0x4000_0000, 0), leaf(&host(INTEL), 0x4000_0000, 0));
        assert_eq!(leaf(&guest, 0x4000_0001, 0)[0], 0x0100_7efb);
        assert!(has(&guest, "hypervisor"));
    }
    let without = host_cpuid(&cpuid(INTEL), false).unwrap();
    assert!(!has(&build("host", &without, 0, 1), "tsc_deadline_timer"));
}

#[test]
fn the_topology_is_one_socket_of_cores() {
    for (vcpus, core_bits) in [(1u8, 0u32), (2, 1), (3, 2), (64, 6)] {
        let (id, count) = (u32::from(vcpus - 1), u32::from(vcpus));
        for spec in ["host", "x86-64-v3"] {
            let intel = build(spec, &host(INTEL), vcpus - 1, vcpus);
            let amd = build(spec, &host(AMD), vcpus - 1, vcpus);
            for guest in [&intel, &amd] {
                assert_eq!(leaf(guest, 1, 0)[1], id << 24 | count << 16 | 0x0800);
                assert_eq!(has(guest, "ht"), vcpus > 1);
                assert_eq!(leaf(guest, 0xB, 0), [0, 1, 0x100, id]);
                assert_eq!(leaf(guest, 0xB, 1), [core_bits, count, 0x201, id]);
                assert_eq!(leaf(guest, 0xB, 2), [0, 0, 2, id]);
            }
            // Leaf 4: own caches of level 1 and 2, a shared one of level 3.
            let last = (1 << core_bits) - 1;
            assert_eq!(leaf(&intel, 4, 0)[0], last << 26 | 0x121);
            assert_eq!(leaf(&intel, 4, 2)[0], last << 26 | 0x143);
            assert_eq!(leaf(&intel, 4, 3)[0], last << 26 | last << 14 | 0x163);
            let expected = if spec == "host" { leaf(&intel, 0xB, 1) } else { [0; 4] };
            assert_eq!(leaf(&intel, 0x1F, 1), expected);
            assert_eq!(leaf(&intel, 0x1F, 3), [0; 4], "no level of dies");
            assert_eq!(leaf(&intel, 0x8000_0008, 0)[2], 0);

            assert_eq!(leaf(&amd, 0x8000_0008, 0)[2], core_bits << 12 | (count - 1));
            assert_eq!(has(&amd, "cmp_legacy"), vcpus > 1);
            assert_eq!(leaf(&amd, 0x8000_0026, 0), [0; 4]);
        }
        let amd = build("host", &host(AMD), vcpus - 1, vcpus);
        assert_eq!(leaf(&amd, 0x8000_001E, 0), [id, id, 0, 0]);
        assert_eq!(leaf(&amd, 0x8000_001D, 0)[0], 0x121);
        assert_eq!(leaf(&amd, 0x8000_001D, 3)[0], (count - 1) << 14 | 0x163);
    }
    let amd = build("x86-64-v3,+topoext", &host(AMD), 1, 2);
    assert_eq!(leaf(&amd, 0x8000_001D, 3)[0], 1 << 14 | 0x163);
    assert_eq!(leaf(&amd, 0x8000_001E, 0), [1, 1, 0, 0]);
    assert_eq!(leaf(&amd, 0x8000_0000, 0)[0], 0x8000_001E);
    for (vcpu, vcpus) in [(0, 0), (1, 1), (64, 64), (0, 65)] {
        let result = CpuSpec::parse("host").unwrap().build(&host(AMD), vcpu, vcpus);
        assert_eq!(result, Err(CpuError::VcpuNumber { vcpu, vcpus }));
    }
}

#[test]
fn xsave_follows_the_features() {
    let intel = host(INTEL);
    // AVX-512 and PKRU, no AMX: 2688 + 8 bytes; compacted, PKRU follows without a gap.
    let guest = build("host,-amx_tile", &intel, 0, 1);
    assert_eq!(leaf(&guest, 0xD, 0), [0x2E7, 0xA88, 0xA88, 0]);
    assert_eq!(leaf(&guest, 0xD, 1), [0x1F, 576 + 256 + 64 + 512 + 1024 + 8, 0, 0]);
    assert_eq!((leaf(&guest, 0xD, 17), leaf(&guest, 0xD, 18)), ([0; 4], [0; 4]));
    assert!(!has(&guest, "amx_int8"));
    // All of it: AMX tiles are aligned in the compacted format.
    let guest = build("host", &intel, 0, 1);
    assert_eq!(leaf(&guest, 0xD, 0), [0x602E7, 0x2B00, 0x2B00, 0]);
    let tiles = (576 + 256 + 64 + 512 + 1024 + 8u32).next_multiple_of(64) + 64 + 8192;
    assert_eq!(leaf(&guest, 0xD, 1), [0x1F, tiles, 0, 0], "no shadow stacks, no trace");
    assert_eq!(leaf(&guest, 0xD, 12), [0; 4]);

    let guest = build("x86-64-v3", &intel, 0, 1);
    assert_eq!(leaf(&guest, 0xD, 0), [7, 832, 832, 0]);
    assert_eq!((leaf(&guest, 0xD, 1), leaf(&guest, 0xD, 9)), ([0; 4], [0; 4]));
    let guest = build("x86-64-v4", &intel, 0, 1);
    assert_eq!(leaf(&guest, 0xD, 0), [0xE7, 0xA80, 0xA80, 0]);
    let guest = build("x86-64-v3,-avx", &intel, 0, 1);
    assert_eq!(leaf(&guest, 0xD, 0), [3, 576, 576, 0]);

    for spec in ["x86-64-v2", "host,-xsave"] {
        let guest = build(spec, &intel, 0, 1);
        assert!(!Leaves::new(&guest).has_leaf(0xD), "{spec}");
        assert!(!has(&guest, "avx") && !has(&guest, "pku") && !has(&guest, "xsaves"), "{spec}");
    }
}

#[test]
fn state_that_kvm_does_not_save_takes_its_features_along() {
    // KVM without permission for AMX: the features are reported, the components are not.
    let mut rows = INTEL.to_vec();
    for row in rows.iter_mut().filter(|row| (row.0, row.1) == (0xD, 0)) {
        row.3 &= 0xFFFF;
    }
    let guest = build("host", &host(&rows), 0, 1);
    for name in ["amx_tile", "amx_bf16", "amx_int8"] {
        assert!(!has(&guest, name), "{name}");
    }
    assert!(has(&guest, "avx512f"));
}

#[test]
fn state_that_kvm_saves_without_reporting_its_features_stays() {
    let guest = build("host", &host(BARE), 0, 2);
    for index in [0, 2, 5, 6, 7] {
        assert_eq!(leaf(&guest, 0xD, index), leaf(&host(BARE), 0xD, index), "{index}");
    }
}

#[test]
fn a_guest_from_another_kind_of_host_is_refused() {
    let (amd, intel) = (host(AMD), host(INTEL));
    let reasons = missing_features(&build("x86-64-v3", &intel, 0, 1), &amd);
    assert_eq!(
        reasons,
        [
            "CPU vendor GenuineIntel (here AuthenticAMD)",
            "physical addresses of 52 bits (here 48)",
            "linear addresses of 57 bits (here 48)",
        ]
    );
    let reasons = missing_features(&build("host", &intel, 0, 1), &amd);
    for expected in [
        "avx512f (leaf 7.0 ebx bit 16)",
        "amx_tile (leaf 7.0 edx bit 24)",
        "XSAVE component 9 of 8 bytes at offset 2688 (here 8 at 2432)",
        "XSAVE component 18 (XCR0 bit 18)",
    ] {
        assert!(reasons.contains(&expected.to_owned()), "{expected}: {reasons:?}");
    }
}

#[test]
fn every_guest_fits_where_it_was_made() {
    for rows in [AMD, INTEL, BARE] {
        let host = host(rows);
        for vcpus in [1, 64] {
            let guest = build("host", &host, 0, vcpus);
            assert_eq!(missing_features(&guest, &host), Vec::<String>::new());
        }
    }
}

#[test]
fn a_bit_that_announces_a_lack_is_not_missed() {
    let wanted = build("host", &host(INTEL), 0, 1);
    assert!(has(&wanted, "zero_fcs_fds"));
    let mut rows = INTEL.to_vec();
    for row in rows.iter_mut().filter(|row| (row.0, row.1) == (7, 0)) {
        row.4 &= !(1 << 13);
    }
    assert_eq!(missing_features(&wanted, &host(&rows)), Vec::<String>::new());
}

#[test]
fn kvms_own_features_and_unnamed_bits_are_compared() {
    let wanted = build("host", &host(AMD), 0, 1);
    let mut rows = AMD.to_vec();
    for row in &mut rows {
        match row.0 {
            0x4000_0001 => row.3 &= !(1 << 5),
            0x8000_0021 => row.3 = 0,
            _ => (),
        }
    }
    let mut newer = wanted.clone();
    for entry in newer.as_mut_slice().iter_mut().filter(|entry| entry.function == 0x8000_0021) {
        entry.eax = 1 << 20;
    }
    let reasons = missing_features(&newer, &host(&rows));
    assert_eq!(
        reasons,
        [
            "unnamed feature (leaf 0x80000021 eax bit 20)",
            "kvm-steal-time (leaf 0x40000001 eax bit 5)",
        ]
    );
    let foreign: Vec<_> = rows.into_iter().filter(|row| row.0 >> 28 != 4).collect();
    let reasons = missing_features(&wanted, &host(&foreign));
    assert!(reasons.iter().any(|reason| reason.contains("paravirtual")), "{reasons:?}");
}
