//! From flags and file to the settings of a run: layers, defaults, and checks across settings.

use std::path::{Path, PathBuf};

use crate::layout;
use crate::memory::{HUGE_PAGE_SIZE, PAGE_SIZE};

use super::{
    BalloonConfig, ConfigError, ConsoleConfig, DiskConfig, LogConfig, Mac, MemoryConfig, NetConfig,
    NetOptions, OnReboot, Replacement, VmConfig, DEFAULT_MEMORY, MIN_MEMORY,
};

/// What flags or a file say about a VM; `None` where they say nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// See [`VmConfig::name`].
    pub name: Option<String>,
    /// See [`VmConfig::kernel`].
    pub kernel: Option<PathBuf>,
    /// See [`VmConfig::initrd`].
    pub initrd: Option<PathBuf>,
    /// See [`VmConfig::cmdline`].
    pub cmdline: Option<String>,
    /// See [`MemoryConfig::size`].
    pub memory_size: Option<u64>,
    /// See [`MemoryConfig::hugepages`].
    pub hugepages: Option<bool>,
    /// See [`VmConfig::cpus`].
    pub cpus: Option<u8>,
    /// See [`VmConfig::cpu`].
    pub cpu: Option<String>,
    /// See [`VmConfig::console`].
    pub console: Option<ConsoleConfig>,
    /// See [`VmConfig::on_reboot`].
    pub on_reboot: Option<OnReboot>,
    /// See [`VmConfig::disks`].
    pub disks: Vec<DiskConfig>,
    /// See [`VmConfig::nets`].
    pub nets: Vec<NetOptions>,
    /// See [`VmConfig::rng`].
    pub rng: Option<bool>,
    /// See [`VmConfig::balloon`].
    pub balloon: Option<BalloonConfig>,
    /// See [`VmConfig::virtio_console`].
    pub virtio_console: Option<bool>,
    /// See [`ProcessSettings::paused`].
    pub paused: Option<bool>,
    /// See [`ProcessSettings::pidfile`].
    pub pidfile: Option<PathBuf>,
    /// See [`ProcessSettings::log`].
    pub log: Option<LogConfig>,
}

/// What belongs to one process that runs a VM, and does not travel with the VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessSettings {
    /// Build the VM and wait for `resume`.
    pub paused: bool,
    /// File to write the process id to; absolute.
    pub pidfile: Option<PathBuf>,
    /// What is logged, and where to.
    pub log: LogConfig,
}

/// All that `run` needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunSettings {
    /// The VM, validated.
    pub vm: VmConfig,
    /// The process.
    pub process: ProcessSettings,
}

/// All that `restore` needs. What is `None` is as it was when the VM was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreSettings {
    /// The file to restore from; absolute.
    pub file: PathBuf,
    /// Another name.
    pub name: Option<String>,
    /// Another console.
    pub console: Option<ConsoleConfig>,
    /// Other files for disks.
    pub disks: Vec<Replacement>,
    /// Other taps for network cards.
    pub nets: Vec<Replacement>,
    /// The process.
    pub process: ProcessSettings,
}

/// All that `receive` needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveSettings {
    /// Where to listen: `ADDRESS:PORT`.
    pub listen: String,
    /// Another name for the VM.
    pub name: Option<String>,
    /// Other files for disks.
    pub disks: Vec<Replacement>,
    /// Other taps for network cards.
    pub nets: Vec<Replacement>,
    /// Another console.
    pub console: Option<ConsoleConfig>,
    /// Whether the first migration that fails ends the process.
    pub once: bool,
    /// The process.
    pub process: ProcessSettings,
}

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

impl RunOptions {
    /// Lays these options over `base`: what is said here wins. A device with the name of one of
    /// `base` takes its place, any other is added.
    #[must_use]
    pub fn over(self, base: Self) -> Self {
        Self {
            name: self.name.or(base.name),
            kernel: self.kernel.or(base.kernel),
            initrd: self.initrd.or(base.initrd),
            cmdline: self.cmdline.or(base.cmdline),
            memory_size: self.memory_size.or(base.memory_size),
            hugepages: self.hugepages.or(base.hugepages),
            cpus: self.cpus.or(base.cpus),
            cpu: self.cpu.or(base.cpu),
            console: self.console.or(base.console),
            on_reboot: self.on_reboot.or(base.on_reboot),
            disks: laid_over(self.disks, base.disks, |disk| &disk.id),
            nets: laid_over(self.nets, base.nets, |net| &net.id),
            rng: self.rng.or(base.rng),
            balloon: self.balloon.or(base.balloon),
            virtio_console: self.virtio_console.or(base.virtio_console),
            paused: self.paused.or(base.paused),
            pidfile: self.pidfile.or(base.pidfile),
            log: self.log.or(base.log),
        }
    }

    /// Resolves relative paths against `dir`.
    pub(super) fn resolve_against(&mut self, dir: &Path) {
        let paths = [&mut self.kernel, &mut self.initrd, &mut self.pidfile];
        for path in paths.into_iter().flatten().chain(self.disks.iter_mut().map(|d| &mut d.path)) {
            *path = dir.join(&*path);
        }
        if let Some(ConsoleConfig::File(path)) = &mut self.console {
            *path = dir.join(&*path);
        }
        if let Some(path) = self.log.as_mut().and_then(|log| log.file.as_mut()) {
            *path = dir.join(&*path);
        }
    }

    /// Fills in the defaults, makes paths absolute (the VM's configuration outlives the current
    /// directory) and validates. `default_name` is for a VM that was given none.
    ///
    /// # Errors
    /// As [`VmConfig::validate`], and two outputs that would go to one file.
    pub fn finish(self, host: HostLimits, default_name: &str) -> Result<RunSettings, ConfigError> {
        let kernel = self.kernel.map(absolute).transpose()?;
        // A Linux kernel says nothing on the serial port unless it is told to.
        let default_cmdline = if kernel.is_some() { "console=ttyS0" } else { "" };
        let name = self.name.unwrap_or_else(|| default_name.to_owned());
        let disk = |disk: DiskConfig| Ok(DiskConfig { path: absolute(disk.path)?, ..disk });
        let net = |NetOptions { id, tap, mac, mtu }| {
            let mac = mac.unwrap_or_else(|| Mac::from_names(&name, &id));
            NetConfig { id, tap, mac, mtu }
        };
        let vm = VmConfig {
            disks: self.disks.into_iter().map(disk).collect::<Result<_, _>>()?,
            nets: self.nets.into_iter().map(net).collect(),
            rng: self.rng.unwrap_or(false),
            balloon: self.balloon,
            virtio_console: self.virtio_console.unwrap_or(false),
            name,
            initrd: self.initrd.map(absolute).transpose()?,
            cmdline: self.cmdline.unwrap_or_else(|| default_cmdline.to_owned()),
            memory: MemoryConfig {
                size: self.memory_size.unwrap_or(DEFAULT_MEMORY),
                hugepages: self.hugepages.unwrap_or(false),
            },
            cpus: self.cpus.unwrap_or(1),
            cpu: self.cpu.unwrap_or_else(|| "host".to_owned()),
            console: absolute_console(self.console.unwrap_or(ConsoleConfig::Stdio))?,
            on_reboot: self.on_reboot.unwrap_or_default(),
            kernel,
        };
        vm.validate(host)?;
        let process =
            ProcessSettings { paused: self.paused.unwrap_or(false), ..Default::default() }
                .with_files(self.pidfile, self.log)?;
        process.check_files(&vm.console)?;
        Ok(RunSettings { vm, process })
    }
}

/// `upper` over `base`, by the name that `id` gives.
fn laid_over<T>(upper: Vec<T>, mut base: Vec<T>, id: impl Fn(&T) -> &String) -> Vec<T> {
    for one in upper {
        match base.iter_mut().find(|other| id(other) == id(&one)) {
            Some(other) => *other = one,
            None => base.push(one),
        }
    }
    base
}

impl RestoreSettings {
    /// Makes paths absolute and checks them against each other.
    ///
    /// # Errors
    /// Two outputs that would go to one file.
    pub fn new(
        file: PathBuf,
        name: Option<String>,
        console: Option<ConsoleConfig>,
        paused: bool,
        pidfile: Option<PathBuf>,
        log: Option<LogConfig>,
    ) -> Result<Self, ConfigError> {
        let file = absolute(file)?;
        let (console, process) = ProcessSettings::with_console(console, paused, pidfile, log)?;
        for (path, second) in process.files() {
            if *path == file {
                return Err(ConfigError::SameFile { first: "the saved VM", second, path: file });
            }
        }
        if console == Some(ConsoleConfig::File(file.clone())) {
            let (first, second) = ("the saved VM", "the console");
            return Err(ConfigError::SameFile { first, second, path: file });
        }
        Ok(Self { file, name, console, disks: Vec::new(), nets: Vec::new(), process })
    }
}

impl ProcessSettings {
    /// Of a process with a console, whose paths are made absolute and checked against each other.
    ///
    /// # Errors
    /// Two outputs that would go to one file.
    pub fn with_console(
        console: Option<ConsoleConfig>,
        paused: bool,
        pidfile: Option<PathBuf>,
        log: Option<LogConfig>,
    ) -> Result<(Option<ConsoleConfig>, Self), ConfigError> {
        let console = console.map(absolute_console).transpose()?;
        let process = Self { paused, ..Self::default() }.with_files(pidfile, log)?;
        process.check_files(console.as_ref().unwrap_or(&ConsoleConfig::Stdio))?;
        Ok((console, process))
    }

    fn with_files(
        mut self,
        pidfile: Option<PathBuf>,
        log: Option<LogConfig>,
    ) -> Result<Self, ConfigError> {
        self.pidfile = pidfile.map(absolute).transpose()?;
        self.log = log.unwrap_or_default();
        self.log.file = self.log.file.map(absolute).transpose()?;
        Ok(self)
    }

    fn files(&self) -> impl Iterator<Item = (&PathBuf, &'static str)> {
        let pidfile = self.pidfile.iter().map(|p| (p, "the pidfile"));
        pidfile.chain(self.log.file.iter().map(|p| (p, "the log")))
    }

    fn check_files(&self, console: &ConsoleConfig) -> Result<(), ConfigError> {
        let mut seen: Vec<(&PathBuf, &'static str)> = Vec::new();
        if let ConsoleConfig::File(path) = console {
            seen.push((path, "the console"));
        }
        for (path, second) in self.files() {
            if let Some((_, first)) = seen.iter().find(|(p, _)| *p == path) {
                return Err(ConfigError::SameFile { first, second, path: path.clone() });
            }
            seen.push((path, second));
        }
        Ok(())
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
        match (&self.kernel, &self.initrd) {
            (None, Some(initrd)) => Err(ConfigError::InitrdWithoutKernel(initrd.clone())),
            _ => Ok(()),
        }
    }
}

impl VmConfig {
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
                Some(net) => net.tap = super::parse_tap(backend)?,
                None => {
                    let known = self.nets.iter().map(|n| n.id.as_str()).collect();
                    return Err(missing("network card", id, known));
                }
            }
        }
        super::devices::validate(&self.disks, &self.nets, self.other_devices())
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

fn absolute(path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path)
        .map_err(|e| ConfigError::Absolute { path: path.clone(), why: e.to_string() })
}

fn absolute_console(console: ConsoleConfig) -> Result<ConsoleConfig, ConfigError> {
    match console {
        ConsoleConfig::File(path) => absolute(path).map(ConsoleConfig::File),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const HOST: HostLimits = HostLimits { memory: 4 << 30 };

    fn finish(options: RunOptions) -> Result<RunSettings, ConfigError> {
        options.finish(HOST, "vm-7")
    }

    fn memory(size: u64, hugepages: bool) -> Result<(), ConfigError> {
        MemoryConfig { size, hugepages }.validate(HOST)
    }

    #[test]
    fn nothing_said_gives_the_defaults() {
        let settings = finish(RunOptions::default()).unwrap();
        assert_eq!(settings.vm.name, "vm-7");
        assert_eq!(settings.vm.cmdline, "");
        assert_eq!(settings.vm.memory, MemoryConfig { size: DEFAULT_MEMORY, hugepages: false });
        assert_eq!((settings.vm.cpus, settings.vm.cpu.as_str()), (1, "host"));
        assert_eq!(settings.vm.console, ConsoleConfig::Stdio);
        assert_eq!(settings.process, ProcessSettings::default());
    }

    #[test]
    fn a_kernel_gets_a_serial_console_unless_told_otherwise() {
        let kernel = RunOptions { kernel: Some("/k".into()), ..Default::default() };
        assert_eq!(finish(kernel.clone()).unwrap().vm.cmdline, "console=ttyS0");
        let told = RunOptions { cmdline: Some(String::new()), ..kernel };
        assert_eq!(finish(told).unwrap().vm.cmdline, "");
    }

    #[test]
    fn the_upper_layer_wins_field_by_field() {
        let file = RunOptions {
            cpus: Some(2),
            memory_size: Some(32 << 20),
            hugepages: Some(true),
            paused: Some(true),
            ..Default::default()
        };
        let flags = RunOptions { cpus: Some(4), paused: Some(false), ..Default::default() };
        let settings = finish(flags.over(file)).unwrap();
        assert_eq!(settings.vm.cpus, 4);
        assert_eq!(settings.vm.memory, MemoryConfig { size: 32 << 20, hugepages: true });
        assert!(!settings.process.paused);
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
    fn a_device_of_the_upper_layer_replaces_that_of_its_name() {
        let disk = |text: &str| text.parse::<DiskConfig>().unwrap();
        let layer = |disks: &[&str]| RunOptions {
            disks: disks.iter().map(|d| disk(d)).collect(),
            ..Default::default()
        };
        let both = layer(&["id=b,path=/new", "id=c,path=/c"])
            .over(layer(&["id=a,path=/a", "id=b,path=/b"]));
        let want = ["id=a,path=/a", "id=b,path=/new", "id=c,path=/c"].map(disk);
        assert_eq!(both.disks, want);
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
        assert_eq!((vm.disks[1].path.as_path(), vm.nets[0].tap.as_str()), (Path::new("/c"), "u"));
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
    fn an_initrd_needs_a_kernel() {
        let options = RunOptions { initrd: Some("/i".into()), ..Default::default() };
        assert_eq!(finish(options.clone()), Err(ConfigError::InitrdWithoutKernel("/i".into())));
        assert!(finish(RunOptions { kernel: Some("/k".into()), ..options }).is_ok());
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
        let bad = VmConfig { cmdline: "\0".into(), ..good };
        assert!(matches!(refused(bad), ConfigError::CmdlineNul(0)));
    }

    #[test]
    fn two_outputs_do_not_share_a_file() {
        let log = LogConfig { filter: "info".into(), file: Some("/x".into()) };
        let options = RunOptions {
            console: Some(ConsoleConfig::File("/x".into())),
            log: Some(log.clone()),
            ..Default::default()
        };
        let error = finish(options).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the console and the log are both /x: give each its own file"
        );

        let options =
            RunOptions { pidfile: Some("/x".into()), log: Some(log), ..Default::default() };
        assert!(matches!(finish(options), Err(ConfigError::SameFile { .. })));

        let restore = RestoreSettings::new("/x".into(), None, None, false, Some("/x".into()), None);
        assert!(matches!(restore, Err(ConfigError::SameFile { .. })));
    }

    #[test]
    fn paths_become_absolute() {
        let options = RunOptions { kernel: Some("k".into()), ..Default::default() };
        let kernel = finish(options).unwrap().vm.kernel.unwrap();
        assert_eq!(kernel, std::env::current_dir().unwrap().join("k"));
    }
}
