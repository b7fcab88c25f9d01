//! Checks of a whole VM, wherever its configuration comes from, and what follows from it.

use crate::layout;
use crate::memory::{HUGE_PAGE_SIZE, PAGE_SIZE};

use super::settings::absolute;
use super::{ConfigError, MemoryConfig, MigrationConfig, Replacement, VmConfig, MIN_MEMORY};

/// What the host can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostLimits {
    /// Memory of the host, bytes.
    pub memory: u64,
}

impl HostLimits {
    /// Asks the kernel (sysinfo(2)).
    #[must_use]
    pub fn detect() -> Self {
        let info = rustix::system::sysinfo();
        #[allow(clippy::useless_conversion)] // The field's type differs between platforms.
        let memory = u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit));
        Self { memory }
    }
}

impl VmConfig {
    /// Checks everything that can be known without touching a file or /dev/kvm. Settings that
    /// came from elsewhere than flags and file (a saved VM, a peer) are checked in full too.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self, host: HostLimits) -> Result<(), ConfigError> {
        super::parse_name(&self.name)?;
        super::parse_cmdline(&self.cmdline)?;
        super::parse_cpus(&self.cpus.to_string())?;
        super::parse_cpu(&self.cpu)?;
        self.memory.validate(host)?;
        super::devices::validate(&self.disks, &self.nets, self.other_devices())?;
        super::parse_cmdline(&self.guest_cmdline())?;
        self.migration.validate()?;
        match (&self.kernel, &self.initrd) {
            (None, Some(initrd)) => Err(ConfigError::InitrdWithoutKernel(initrd.clone())),
            _ => Ok(()),
        }
    }

    /// The command line that the guest gets: for guests that do not look for virtio devices in the
    /// ACPI tables, the devices are appended (kernel parameter `virtio_mmio.device`, Linux
    /// Documentation/admin-guide/kernel-parameters.txt). A kernel that looks in both places would
    /// find each device twice.
    #[must_use]
    pub fn guest_cmdline(&self) -> String {
        let mut cmdline = self.cmdline.clone();
        if self.kernel.is_none() || cmdline.split_whitespace().any(|word| word == "acpi=off") {
            for slot in 0..self.device_count() {
                // At most MAX_DEVICES.
                let slot = slot as u32;
                let (base, gsi) = (layout::virtio_mmio(slot), layout::virtio_gsi(slot));
                let space = if cmdline.is_empty() { "" } else { " " };
                cmdline.push_str(&format!("{space}virtio_mmio.device=4K@{base:#x}:{gsi}"));
            }
        }
        cmdline
    }

    fn device_count(&self) -> usize {
        self.disks.len() + self.nets.len() + self.other_devices()
    }

    /// Number of virtio devices that are neither disk nor network card.
    fn other_devices(&self) -> usize {
        [self.rng, self.balloon.is_some(), self.virtio_console].into_iter().filter(|on| *on).count()
    }

    /// Gives disks and network cards other backends than they were saved with.
    ///
    /// # Errors
    /// A device that is not there, or a backend that cannot be.
    pub fn replace_backends(
        &mut self,
        disks: &[Replacement],
        nets: &[Replacement],
    ) -> Result<(), ConfigError> {
        let missing = |what, id: &str, known: Vec<&str>| ConfigError::NoSuchDevice {
            what,
            id: id.to_owned(),
            known: if known.is_empty() { "none".to_owned() } else { known.join(", ") },
        };
        for Replacement { id, backend } in disks {
            match self.disks.iter_mut().find(|disk| disk.id == *id) {
                Some(disk) => disk.path = absolute(backend.into())?,
                None => {
                    let known = self.disks.iter().map(|d| d.id.as_str()).collect();
                    return Err(missing("disk", id, known));
                }
            }
        }
        for Replacement { id, backend } in nets {
            match self.nets.iter_mut().find(|net| net.id == *id) {
                Some(net) => net.attachment = backend.parse()?,
                None => {
                    let known = self.nets.iter().map(|n| n.id.as_str()).collect();
                    return Err(missing("network card", id, known));
                }
            }
        }
        super::devices::validate(&self.disks, &self.nets, self.other_devices())
    }
}

impl MigrationConfig {
    /// Checks what a number alone does not say.
    ///
    /// # Errors
    /// A limit of bytes below the memory that has to be sent.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let factor = self.max_bytes_factor;
        if factor.is_finite() && factor >= 1.0 {
            return Ok(());
        }
        Err(ConfigError::MigrationBytes(factor.to_string()))
    }
}

impl MemoryConfig {
    /// Checks size and alignment.
    ///
    /// # Errors
    /// Too small, too large for the host, or not whole pages.
    pub fn validate(&self, host: HostLimits) -> Result<(), ConfigError> {
        let size = self.size;
        if size < MIN_MEMORY {
            return Err(ConfigError::MemoryTooSmall(size));
        }
        if size > host.memory {
            return Err(ConfigError::MemoryTooLarge { size, host: host.memory });
        }
        if size % PAGE_SIZE != 0 {
            return Err(ConfigError::MemoryAlignment(size));
        }
        if self.hugepages && size % HUGE_PAGE_SIZE != 0 {
            return Err(ConfigError::MemoryHugeAlignment(size));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;
    use crate::config::{RunOptions, RunSettings};

    const HOST: HostLimits = HostLimits { memory: 4 << 30 };

    fn finish(options: RunOptions) -> Result<RunSettings, ConfigError> {
        options.finish(HOST, "vm-7")
    }

    fn memory(size: u64, hugepages: bool) -> Result<(), ConfigError> {
        MemoryConfig { size, hugepages }.validate(HOST)
    }

    #[test]
    fn memory_is_between_16_mib_and_the_hosts() {
        assert_eq!(memory(16 << 20, false), Ok(()));
        assert_eq!(memory(4 << 30, true), Ok(()));
        assert_eq!(memory(0, false), Err(ConfigError::MemoryTooSmall(0)));
        let little = (16 << 20) - 4096;
        assert_eq!(memory(little, false), Err(ConfigError::MemoryTooSmall(little)));
        let size = (4 << 30) + 4096;
        let host = HOST.memory;
        assert_eq!(memory(size, false), Err(ConfigError::MemoryTooLarge { size, host }));
        assert_eq!(
            memory(u64::MAX, true),
            Err(ConfigError::MemoryTooLarge { size: u64::MAX, host })
        );
    }

    #[test]
    fn memory_is_whole_pages() {
        let odd = (16 << 20) + 1;
        assert_eq!(memory(odd, false), Err(ConfigError::MemoryAlignment(odd)));
        assert_eq!(memory(odd, true), Err(ConfigError::MemoryAlignment(odd)));
        let small_pages = (16 << 20) + 4096;
        assert_eq!(memory(small_pages, false), Ok(()));
        assert_eq!(memory(small_pages, true), Err(ConfigError::MemoryHugeAlignment(small_pages)));
    }

    #[test]
    fn messages_say_what_to_do() {
        let text = |e: Result<(), ConfigError>| e.unwrap_err().to_string();
        assert_eq!(text(memory(0, false)), "memory of 0 bytes is too small: use at least 16 MiB");
        assert_eq!(
            text(memory(8 << 30, false)),
            "memory of 8 GiB is more than this host has (4 GiB): use at most 4 GiB"
        );
        assert_eq!(
            text(memory((16 << 20) + 1, false)),
            "memory of 16777217 bytes is not a multiple of 4 KiB: use 16781312 bytes, or a size in M or G"
        );
        assert_eq!(
            text(memory(17 << 20, true)),
            "memory of 17 MiB with huge pages is not a multiple of 2 MiB: use 18 MiB, or leave out --hugepages"
        );
    }

    #[test]
    fn a_guest_without_acpi_is_told_of_its_devices() {
        let mut vm = finish(RunOptions::default()).unwrap().vm;
        vm.rng = true;
        vm.disks = vec!["id=a,path=/a".parse().unwrap()];
        let told = "virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:17";
        assert_eq!(vm.guest_cmdline(), told);
        vm.kernel = Some("/k".into());
        vm.cmdline = "quiet".into();
        assert_eq!(vm.guest_cmdline(), "quiet");
        vm.cmdline = "quiet acpi=off".into();
        assert_eq!(vm.guest_cmdline(), format!("quiet acpi=off {told}"));
        vm.cmdline = format!("acpi=off {}", "x".repeat(crate::config::MAX_CMDLINE - 9));
        assert!(matches!(vm.validate(HOST), Err(ConfigError::CmdlineTooLong(_))));
    }

    #[test]
    fn backends_are_replaced_by_name() {
        let mut vm = finish(RunOptions {
            disks: vec!["id=a,path=/a".parse().unwrap(), "id=b,path=/b".parse().unwrap()],
            nets: vec!["id=n,tap=t".parse().unwrap()],
            ..Default::default()
        })
        .unwrap()
        .vm;
        let other = |text: &str| vec![text.parse::<Replacement>().unwrap()];
        vm.replace_backends(&other("b=/c"), &other("n=u")).unwrap();
        assert_eq!(vm.disks[1].path.as_path(), Path::new("/c"));
        assert_eq!(vm.nets[0].attachment.tap(), Some("u"));
        vm.replace_backends(&[], &other("n=network=blue")).unwrap();
        assert_eq!(vm.nets[0].attachment.to_string(), "network=blue");
        let refused = |vm: &mut VmConfig, disk: &str, net: &str| {
            let list = |text: &str| if text.is_empty() { Vec::new() } else { other(text) };
            vm.replace_backends(&list(disk), &list(net)).unwrap_err().to_string()
        };
        let text = refused(&mut vm, "x=/c", "");
        assert_eq!(text, "the saved VM has no disk x: it has a, b");
        assert!(refused(&mut vm, "", "a=u").contains("no network card a: it has n"));
        assert!(refused(&mut vm, "a=/c", "").contains("disk /c is given to two devices"));
        assert!(refused(&mut vm, "", "n=a/b").contains("no name of a tap"));
    }

    #[test]
    fn settings_from_elsewhere_are_checked_in_full() {
        let good = finish(RunOptions::default()).unwrap().vm;
        let refused = |vm: VmConfig| vm.validate(HOST).unwrap_err();
        let bad = VmConfig { name: "a/b".into(), ..good.clone() };
        assert!(matches!(refused(bad), ConfigError::NameCharacter { .. }));
        let bad = VmConfig { cpus: 0, ..good.clone() };
        assert!(matches!(refused(bad), ConfigError::CpusOutOfRange(_)));
        let bad = VmConfig { cpu: "pentium".into(), ..good.clone() };
        assert!(matches!(refused(bad), ConfigError::Cpu(_)));
        let bad = VmConfig { cmdline: "\0".into(), ..good.clone() };
        assert!(matches!(refused(bad), ConfigError::CmdlineNul(0)));
        for max_bytes_factor in [0.5, f64::NAN, f64::INFINITY] {
            let migration = MigrationConfig { max_bytes_factor, ..good.migration };
            let bad = VmConfig { migration, ..good.clone() };
            assert!(matches!(refused(bad), ConfigError::MigrationBytes(_)));
        }
    }
}
