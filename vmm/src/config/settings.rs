//! What the commands that become a VM's process need: the VM and what belongs to the process.

use std::path::PathBuf;

use super::{ConfigError, ConsoleConfig, LogConfig, Replacement, SandboxMode, VmConfig};

/// What belongs to one process that runs a VM, and does not travel with the VM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessSettings {
    /// Build the VM and wait for `resume`.
    pub paused: bool,
    /// File to write the process id to; absolute.
    pub pidfile: Option<PathBuf>,
    /// What is logged, and where to.
    pub log: LogConfig,
    /// Which system calls its threads may make.
    pub sandbox: SandboxMode,
}

/// All that `run` needs.
#[derive(Debug, Clone, PartialEq)]
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
    /// Whose the process is to be, once it listens; see [`crate::privileges::become_user`].
    pub user: Option<String>,
    /// The process.
    pub process: ProcessSettings,
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

    pub(super) fn with_files(
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

    pub(super) fn check_files(&self, console: &ConsoleConfig) -> Result<(), ConfigError> {
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

pub(super) fn absolute(path: PathBuf) -> Result<PathBuf, ConfigError> {
    std::path::absolute(&path)
        .map_err(|e| ConfigError::Absolute { path: path.clone(), why: e.to_string() })
}

pub(super) fn absolute_console(console: ConsoleConfig) -> Result<ConsoleConfig, ConfigError> {
    match console {
        ConsoleConfig::File(path) => absolute(path).map(ConsoleConfig::File),
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{HostLimits, RunOptions};

    const HOST: HostLimits = HostLimits { memory: 4 << 30 };

    fn finish(options: RunOptions) -> Result<RunSettings, ConfigError> {
        options.finish(HOST, "vm-7")
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
}
