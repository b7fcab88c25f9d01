//! From flags and file to the settings of a run: layers, defaults, and checks across settings.

use std::path::{Path, PathBuf};

use crate::memory::{HUGE_PAGE_SIZE, PAGE_SIZE};

use super::{
    ConfigError, ConsoleConfig, LogConfig, MemoryConfig, OnReboot, VmConfig, DEFAULT_MEMORY,
    MIN_MEMORY,
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
    /// Lays these options over `base`: what is said here wins.
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
            paused: self.paused.or(base.paused),
            pidfile: self.pidfile.or(base.pidfile),
            log: self.log.or(base.log),
        }
    }

    /// Resolves relative paths against `dir`.
    pub(super) fn resolve_against(&mut self, dir: &Path) {
        let paths = [&mut self.kernel, &mut self.initrd, &mut self.pidfile];
        for path in paths.into_iter().flatten() {
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
        let vm = VmConfig {
            name: self.name.unwrap_or_else(|| default_name.to_owned()),
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
        let console = console.map(absolute_console).transpose()?;
        let process = ProcessSettings { paused, ..Default::default() }.with_files(pidfile, log)?;
        process.check_files(console.as_ref().unwrap_or(&ConsoleConfig::Stdio))?;
        for (path, second) in process.files() {
            if *path == file {
                return Err(ConfigError::SameFile { first: "the saved VM", second, path: file });
            }
        }
        if console == Some(ConsoleConfig::File(file.clone())) {
            let (first, second) = ("the saved VM", "the console");
            return Err(ConfigError::SameFile { first, second, path: file });
        }
        Ok(Self { file, name, console, process })
    }
}

impl ProcessSettings {
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
        match (&self.kernel, &self.initrd) {
            (None, Some(initrd)) => Err(ConfigError::InitrdWithoutKernel(initrd.clone())),
            _ => Ok(()),
        }
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
