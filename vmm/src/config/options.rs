//! From flags and file to the settings of a run: layers and defaults.

use std::path::{Path, PathBuf};

use super::settings::{absolute, absolute_console};
use super::{
    BalloonConfig, ConfigError, ConsoleConfig, DiskConfig, HostLimits, LogConfig, Mac,
    MemoryConfig, MigrationConfig, NetConfig, NetOptions, OnReboot, ProcessSettings, RunSettings,
    SandboxMode, VmConfig, DEFAULT_MEMORY,
};

/// What flags or a file say about a VM; `None` where they say nothing.
#[derive(Debug, Clone, Default, PartialEq)]
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
    /// See [`VmConfig::migration`].
    pub migration: MigrationOptions,
    /// See [`ProcessSettings::paused`].
    pub paused: Option<bool>,
    /// See [`ProcessSettings::pidfile`].
    pub pidfile: Option<PathBuf>,
    /// See [`ProcessSettings::log`].
    pub log: Option<LogConfig>,
    /// See [`ProcessSettings::sandbox`].
    pub sandbox: Option<SandboxMode>,
}

/// What is said about migrations; only a file does.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MigrationOptions {
    /// See [`MigrationConfig::max_rounds`].
    pub max_rounds: Option<u32>,
    /// See [`MigrationConfig::max_bytes_factor`].
    pub max_bytes_factor: Option<f64>,
    /// See [`MigrationConfig::dirty_pages`].
    pub dirty_pages: Option<u64>,
}

impl MigrationOptions {
    /// As [`RunOptions::over`].
    fn over(self, base: Self) -> Self {
        Self {
            max_rounds: self.max_rounds.or(base.max_rounds),
            max_bytes_factor: self.max_bytes_factor.or(base.max_bytes_factor),
            dirty_pages: self.dirty_pages.or(base.dirty_pages),
        }
    }

    fn finish(self) -> MigrationConfig {
        let default = MigrationConfig::default();
        MigrationConfig {
            max_rounds: self.max_rounds.unwrap_or(default.max_rounds),
            max_bytes_factor: self.max_bytes_factor.unwrap_or(default.max_bytes_factor),
            dirty_pages: self.dirty_pages.unwrap_or(default.dirty_pages),
        }
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
            migration: self.migration.over(base.migration),
            paused: self.paused.or(base.paused),
            pidfile: self.pidfile.or(base.pidfile),
            log: self.log.or(base.log),
            sandbox: self.sandbox.or(base.sandbox),
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
        let net = |NetOptions { id, attachment, mac, mtu }| {
            let mac = mac.unwrap_or_else(|| Mac::from_names(&name, &id));
            NetConfig { id, attachment, mac, mtu }
        };
        let vm = VmConfig {
            disks: self.disks.into_iter().map(disk).collect::<Result<_, _>>()?,
            nets: self.nets.into_iter().map(net).collect(),
            rng: self.rng.unwrap_or(false),
            balloon: self.balloon,
            virtio_console: self.virtio_console.unwrap_or(false),
            migration: self.migration.finish(),
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
        let process = ProcessSettings {
            paused: self.paused.unwrap_or(false),
            sandbox: self.sandbox.unwrap_or_default(),
            ..Default::default()
        }
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const HOST: HostLimits = HostLimits { memory: 4 << 30 };

    fn finish(options: RunOptions) -> Result<RunSettings, ConfigError> {
        options.finish(HOST, "vm-7")
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
            migration: MigrationOptions { max_rounds: Some(5), ..Default::default() },
            ..Default::default()
        };
        let flags = RunOptions {
            cpus: Some(4),
            paused: Some(false),
            migration: MigrationOptions { dirty_pages: Some(7), ..Default::default() },
            ..Default::default()
        };
        let settings = finish(flags.over(file)).unwrap();
        assert_eq!(settings.vm.cpus, 4);
        assert_eq!(settings.vm.memory, MemoryConfig { size: 32 << 20, hugepages: true });
        assert!(!settings.process.paused);
        let migration =
            MigrationConfig { max_rounds: 5, dirty_pages: 7, ..MigrationConfig::default() };
        assert_eq!(settings.vm.migration, migration);
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
    fn an_initrd_needs_a_kernel() {
        let options = RunOptions { initrd: Some("/i".into()), ..Default::default() };
        assert_eq!(finish(options.clone()), Err(ConfigError::InitrdWithoutKernel("/i".into())));
        assert!(finish(RunOptions { kernel: Some("/k".into()), ..options }).is_ok());
    }

    #[test]
    fn paths_become_absolute() {
        let options = RunOptions { kernel: Some("k".into()), ..Default::default() };
        let kernel = finish(options).unwrap().vm.kernel.unwrap();
        assert_eq!(kernel, std::env::current_dir().unwrap().join("k"));
    }
}
