//! What a machine is, in the form that is saved: compared before it is restored anywhere.

use std::path::PathBuf;

use devices::{Payload, Persist, PersistError};
use kvm_bindings::{kvm_cpuid_entry2, CpuId};
use serde::{Deserialize, Serialize};

use crate::config::{
    Attachment, BalloonConfig, CacheMode, ConsoleConfig, DiskConfig, Mac, MemoryConfig,
    MigrationConfig, NetConfig, OnReboot, VmConfig,
};
use crate::cpu::missing_features;
use crate::kvm::{HostKvm, KvmError};

/// The part of the platform that a guest depends on, version 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IdentityV1 {
    /// CPUID of each vCPU.
    pub cpuid: Vec<Vec<kvm_cpuid_entry2>>,
    /// Frequency of the TSC, kHz; 0 where KVM did not tell.
    pub tsc_khz: u32,
}

/// The configuration of a VM as it is saved, version 1: a copy, because [`VmConfig`] may grow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigV1 {
    name: String,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    memory: u64,
    hugepages: bool,
    cpus: u8,
    cpu: String,
    console: ConsoleV1,
    restart_on_reboot: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum ConsoleV1 {
    Stdio,
    Pty,
    Socket,
    File(PathBuf),
}

/// The configuration of a VM as it is saved, version 2: with virtio devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigV2 {
    machine: ConfigV1,
    disks: Vec<DiskV1>,
    nets: Vec<NetV1>,
    rng: bool,
    balloon_deflates_on_oom: Option<bool>,
    virtio_console: bool,
}

/// The configuration of a VM as it is saved, version 3: with limits of its migrations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfigV3 {
    devices: ConfigV2,
    max_rounds: u32,
    max_bytes_factor: f64,
    dirty_pages: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DiskV1 {
    id: String,
    path: PathBuf,
    readonly: bool,
    cache: CacheV1,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum CacheV1 {
    Writeback,
    Writethrough,
    Unsafe,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct NetV1 {
    id: String,
    /// The tap's name alone, or what else it is plugged into as text.
    tap: String,
    mac: [u8; 6],
    mtu: Option<u16>,
}

/// A TSC whose frequency is off by more than this share is another frequency: what NTP corrects
/// (500 ppm), halved (KVM's own tolerance, arch/x86/kvm/x86.c `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Why a saved machine cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// One or more things differ.
    #[error("this host cannot run the saved machine: {}", .0.join("; "))]
    Incompatible(Vec<String>),
    /// The saved identity is malformed or from a newer program.
    #[error(transparent)]
    Payload(#[from] PersistError),
    /// KVM did not answer.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl IdentityV1 {
    /// Checks that this host can run the machine. Every difference is named.
    pub fn check(&self, host: &HostKvm, config: &VmConfig) -> Result<Vec<CpuId>, IdentityError> {
        let mut reasons = Vec::new();
        let mut cpuids = Vec::with_capacity(self.cpuid.len());
        for entries in &self.cpuid {
            match CpuId::from_entries(entries) {
                Ok(cpuid) => cpuids.push(cpuid),
                Err(_) => reasons.push(format!("its CPUID has {} entries", entries.len())),
            }
        }
        if self.cpuid.len() != usize::from(config.cpus) {
            let (found, wanted) = (self.cpuid.len(), config.cpus);
            reasons.push(format!("it has CPUID for {found} vCPUs, its configuration {wanted}"));
        }
        if let Some(first) = cpuids.first() {
            let missing = missing_features(first, &host.cpuid()?);
            if !missing.is_empty() {
                reasons.push(format!(
                    "this CPU lacks {} (start the VM with a --cpu model that all hosts have, such as x86-64-v2)",
                    missing.join(", ")
                ));
            }
        }
        let (khz, scaling) = host.tsc();
        if !scaling && tsc_differs(self.tsc_khz, khz) {
            let saved = self.tsc_khz;
            reasons.push(format!(
                "its TSC runs at {saved} kHz, this host's at {khz} kHz, and KVM cannot scale it here"
            ));
        }
        if reasons.is_empty() {
            Ok(cpuids)
        } else {
            Err(IdentityError::Incompatible(reasons))
        }
    }
}

/// Whether two TSC frequencies, kHz, are not the same for a guest; 0 is unknown and differs from none.
pub(crate) fn tsc_differs(a: u32, b: u32) -> bool {
    a != 0 && b != 0 && u64::from(a.abs_diff(b)) * 1_000_000 > u64::from(a) * TSC_TOLERANCE_PPM
}

impl From<ConfigV1> for VmConfig {
    fn from(saved: ConfigV1) -> Self {
        Self {
            name: saved.name,
            kernel: saved.kernel,
            initrd: saved.initrd,
            cmdline: saved.cmdline,
            memory: MemoryConfig { size: saved.memory, hugepages: saved.hugepages },
            cpus: saved.cpus,
            cpu: saved.cpu,
            console: match saved.console {
                ConsoleV1::Stdio => ConsoleConfig::Stdio,
                ConsoleV1::Pty => ConsoleConfig::Pty,
                ConsoleV1::Socket => ConsoleConfig::Socket,
                ConsoleV1::File(path) => ConsoleConfig::File(path),
            },
            on_reboot: if saved.restart_on_reboot { OnReboot::Restart } else { OnReboot::Exit },
            // Version 1 is from before there were such devices.
            disks: Vec::new(),
            nets: Vec::new(),
            rng: false,
            balloon: None,
            virtio_console: false,
            migration: MigrationConfig::default(),
        }
    }
}

impl From<&VmConfig> for ConfigV2 {
    fn from(config: &VmConfig) -> Self {
        let config = config.clone();
        let machine = ConfigV1 {
            name: config.name,
            kernel: config.kernel,
            initrd: config.initrd,
            cmdline: config.cmdline,
            memory: config.memory.size,
            hugepages: config.memory.hugepages,
            cpus: config.cpus,
            cpu: config.cpu,
            console: match config.console {
                ConsoleConfig::Stdio => ConsoleV1::Stdio,
                ConsoleConfig::Pty => ConsoleV1::Pty,
                ConsoleConfig::Socket => ConsoleV1::Socket,
                ConsoleConfig::File(path) => ConsoleV1::File(path),
            },
            restart_on_reboot: config.on_reboot == OnReboot::Restart,
        };
        let disk = |disk: DiskConfig| DiskV1 {
            id: disk.id,
            path: disk.path,
            readonly: disk.readonly,
            cache: match disk.cache {
                CacheMode::Writeback => CacheV1::Writeback,
                CacheMode::Writethrough => CacheV1::Writethrough,
                CacheMode::Unsafe => CacheV1::Unsafe,
            },
        };
        let net = |NetConfig { id, attachment, mac, mtu }: NetConfig| {
            let tap = attachment.tap().map_or_else(|| attachment.to_string(), ToOwned::to_owned);
            NetV1 { id, tap, mac: mac.0, mtu }
        };
        Self {
            machine,
            disks: config.disks.into_iter().map(disk).collect(),
            nets: config.nets.into_iter().map(net).collect(),
            rng: config.rng,
            balloon_deflates_on_oom: config.balloon.map(|balloon| balloon.deflate_on_oom),
            virtio_console: config.virtio_console,
        }
    }
}

impl From<ConfigV2> for VmConfig {
    fn from(saved: ConfigV2) -> Self {
        let disk = |disk: DiskV1| DiskConfig {
            id: disk.id,
            path: disk.path,
            readonly: disk.readonly,
            cache: match disk.cache {
                CacheV1::Writeback => CacheMode::Writeback,
                CacheV1::Writethrough => CacheMode::Writethrough,
                CacheV1::Unsafe => CacheMode::Unsafe,
            },
        };
        let net = |NetV1 { id, tap, mac, mtu }: NetV1| {
            // What is no name at all is found when the configuration is validated.
            let attachment = tap.parse().unwrap_or(Attachment::Tap(tap));
            NetConfig { id, attachment, mac: Mac(mac), mtu }
        };
        Self {
            disks: saved.disks.into_iter().map(disk).collect(),
            nets: saved.nets.into_iter().map(net).collect(),
            rng: saved.rng,
            balloon: (saved.balloon_deflates_on_oom)
                .map(|deflate_on_oom| BalloonConfig { deflate_on_oom }),
            virtio_console: saved.virtio_console,
            ..Self::from(saved.machine)
        }
    }
}

impl From<&VmConfig> for ConfigV3 {
    fn from(config: &VmConfig) -> Self {
        let MigrationConfig { max_rounds, max_bytes_factor, dirty_pages } = config.migration;
        Self { devices: config.into(), max_rounds, max_bytes_factor, dirty_pages }
    }
}

impl From<ConfigV3> for VmConfig {
    fn from(saved: ConfigV3) -> Self {
        let ConfigV3 { devices, max_rounds, max_bytes_factor, dirty_pages } = saved;
        let migration = MigrationConfig { max_rounds, max_bytes_factor, dirty_pages };
        Self { migration, ..Self::from(devices) }
    }
}

/// The configuration as it is saved: kind, newest version, and the encoded form.
pub fn encode_config(config: &VmConfig) -> Result<Payload, PersistError> {
    ConfigV3::from(config).save_payload(0)
}

/// Decodes what [`encode_config`] made, or an older version of it.
pub fn decode_config(version: u16, data: Vec<u8>) -> Result<VmConfig, PersistError> {
    match version {
        1 => ConfigV1::decode(version, data).map(VmConfig::from),
        2 => ConfigV2::decode(version, data).map(VmConfig::from),
        _ => ConfigV3::decode(version, data).map(VmConfig::from),
    }
}

/// Plain data as a payload with kind and version: what [`Persist`] gives a live part, for values
/// that are their own state.
macro_rules! plain_payload {
    ($type:ty, $kind:literal, $version:literal) => {
        impl Persist for $type {
            const KIND: &'static str = $kind;
            const VERSION: u16 = $version;
            type State = Self;
            type Error = PersistError;

            fn save(&self) -> Result<Self, PersistError> {
                Ok(self.clone())
            }

            fn restore(&mut self, state: &Self) -> Result<(), PersistError> {
                *self = state.clone();
                Ok(())
            }
        }

        impl $type {
            /// Decodes what [`Persist::save_payload`] made.
            pub fn decode(version: u16, data: Vec<u8>) -> Result<Self, PersistError> {
                Self::decode_payload(&Payload {
                    kind: $kind.to_owned(),
                    instance: 0,
                    version,
                    data,
                })
            }
        }
    };
}

pub(crate) use plain_payload;

plain_payload!(IdentityV1, "identity", 1);
plain_payload!(ConfigV1, "config", 1);
plain_payload!(ConfigV2, "config", 2);
plain_payload!(ConfigV3, "config", 3);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            name: "a".into(),
            kernel: Some("/k".into()),
            initrd: None,
            cmdline: "c".into(),
            memory: MemoryConfig { size: 64 << 20, hugepages: false },
            cpus: 2,
            cpu: "host".into(),
            console: ConsoleConfig::File("/f".into()),
            on_reboot: OnReboot::Exit,
            disks: vec!["id=d,path=/d,readonly".parse().unwrap()],
            nets: vec![NetConfig {
                id: "n".into(),
                attachment: Attachment::Tap("t".into()),
                mac: Mac([2, 0, 0, 0, 0, 1]),
                mtu: Some(1400),
            }],
            rng: true,
            balloon: Some(BalloonConfig { deflate_on_oom: true }),
            virtio_console: false,
            migration: MigrationConfig { max_rounds: 5, max_bytes_factor: 2.5, dirty_pages: 300 },
        }
    }

    const VERSION_1: [u8; 26] = [
        1, b'a', 1, 2, b'/', b'k', 0, 1, b'c', 252, 0, 0, 0, 4, 0, 2, 4, b'h', b'o', b's', b't', 3,
        2, b'/', b'f', 0,
    ];

    #[test]
    fn configuration_version_1_still_decodes() {
        let back = decode_config(1, VERSION_1.to_vec()).unwrap();
        let before = VmConfig {
            disks: Vec::new(),
            nets: Vec::new(),
            rng: false,
            balloon: None,
            virtio_console: false,
            migration: MigrationConfig::default(),
            ..config()
        };
        assert_eq!(back, before);
    }

    const DEVICES_OF_VERSION_2: [u8; 27] = [
        1, 1, b'd', 2, b'/', b'd', 1, 0, 1, 1, b'n', 1, b't', 2, 0, 0, 0, 0, 1, 1, 251, 120, 5, 1,
        1, 1, 0,
    ];

    #[test]
    fn configuration_version_2_still_decodes() {
        let data = [&VERSION_1[..], &DEVICES_OF_VERSION_2].concat();
        let before = VmConfig { migration: MigrationConfig::default(), ..config() };
        assert_eq!(decode_config(2, data).unwrap(), before);
    }

    #[test]
    fn configuration_version_3_is_frozen() {
        let payload = encode_config(&config()).unwrap();
        // 5, 2.5 as IEEE 754 has it, 300.
        let limits = [5, 0, 0, 0, 0, 0, 0, 4, 64, 251, 44, 1];
        let expected = [&VERSION_1[..], &DEVICES_OF_VERSION_2, &limits].concat();
        assert_eq!((payload.version, &payload.data), (3, &expected));
        assert_eq!(decode_config(payload.version, payload.data).unwrap(), config());
    }

    #[test]
    fn a_card_on_a_network_is_saved_by_its_name() {
        let mut before = config();
        for text in ["network=blue", "bridge=br0", "tap=t"] {
            before.nets[0].attachment = text.parse().unwrap();
            let payload = encode_config(&before).unwrap();
            assert_eq!(decode_config(payload.version, payload.data).unwrap(), before);
        }
    }

    #[test]
    fn a_newer_configuration_is_refused() {
        let payload = encode_config(&config()).unwrap();
        assert!(matches!(
            decode_config(4, payload.data),
            Err(PersistError::UnknownVersion { found: 4, .. })
        ));
    }

    #[test]
    fn tsc_frequencies_within_250_ppm_are_one() {
        assert!(!tsc_differs(2_596_000, 2_596_600));
        assert!(tsc_differs(2_596_000, 2_597_000));
        assert!(!tsc_differs(0, 2_597_000));
    }
}
