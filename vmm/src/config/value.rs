//! Single settings, from the text that flags and file have in common.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

use crate::cpu::CpuSpec;
use crate::memory::HUGE_PAGE_SIZE;

use super::{
    parse_size, ConfigError, ConsoleConfig, OnReboot, MAX_CMDLINE, MAX_CPUS, MAX_ID, MAX_NAME,
};

/// Has a value saved as the text that it is read from (`#[serde(into = "String", try_from = "String")]`).
macro_rules! saved_as_text {
    ($type:ty, $error:ty) => {
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }

        impl TryFrom<String> for $type {
            type Error = $error;

            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }
    };
}

pub(crate) use saved_as_text;

/// Checks the name of a VM: 1 to 64 characters out of `[A-Za-z0-9._-]`, not beginning with `.`
/// (hidden files in the runtime directory) or `-` (looks like a flag).
///
/// # Errors
/// The first of these rules that is broken.
pub fn parse_name(name: &str) -> Result<String, ConfigError> {
    if name.is_empty() {
        return Err(ConfigError::NameEmpty);
    }
    if name.len() > MAX_NAME {
        return Err(ConfigError::NameTooLong(name.len()));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(found) = name.chars().find(|&c| !allowed(c)) {
        return Err(ConfigError::NameCharacter { name: name.to_owned(), found });
    }
    if let Some(first @ ('.' | '-')) = name.chars().next() {
        return Err(ConfigError::NameStart(name.to_owned(), first));
    }
    Ok(name.to_owned())
}

/// Reads whether memory is in huge pages: `true`, `false`, or their size, of which there is one.
///
/// # Errors
/// Another size, or neither.
pub fn parse_hugepages(text: &str) -> Result<bool, ConfigError> {
    match (text, parse_size(text)) {
        ("true", _) | (_, Ok(HUGE_PAGE_SIZE)) => Ok(true),
        ("false", _) => Ok(false),
        (_, Ok(size)) => Err(ConfigError::HugePageSize(size)),
        (_, Err(_)) => Err(ConfigError::HugePages(text.to_owned())),
    }
}

/// Checks the name of a disk or network card: as that of a VM, but no longer than the id that a
/// guest can ask a disk for.
///
/// # Errors
/// The rule that is broken.
pub fn parse_id(id: &str) -> Result<String, ConfigError> {
    let refused = |why| ConfigError::DeviceId { id: id.to_owned(), why };
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(found) = id.chars().find(|&c| !allowed(c)) {
        return Err(refused(format!("it has {found:?} in it")));
    }
    if !(1..=MAX_ID).contains(&id.len()) {
        return Err(refused(format!("it is {} bytes long", id.len())));
    }
    Ok(id.to_owned())
}

/// Reads a number of vCPUs, 1 to 64.
///
/// # Errors
/// Anything else.
pub fn parse_cpus(text: &str) -> Result<u8, ConfigError> {
    match text.parse::<u8>() {
        Ok(n) if (1..=MAX_CPUS).contains(&n) => Ok(n),
        _ => Err(ConfigError::CpusOutOfRange(text.to_owned())),
    }
}

/// Checks the form of a kernel command line: no NUL byte, and not more than Linux takes.
///
/// # Errors
/// Either rule broken.
pub fn parse_cmdline(text: &str) -> Result<String, ConfigError> {
    if let Some(at) = text.bytes().position(|b| b == 0) {
        return Err(ConfigError::CmdlineNul(at));
    }
    if text.len() > MAX_CMDLINE {
        return Err(ConfigError::CmdlineTooLong(text.len()));
    }
    Ok(text.to_owned())
}

/// Checks a `--cpu` and keeps it as it was written.
///
/// # Errors
/// As [`CpuSpec::parse`]. Whether this host has what it asks for is found out when the VM is made.
pub fn parse_cpu(text: &str) -> Result<String, ConfigError> {
    CpuSpec::parse(text).map_err(ConfigError::Cpu)?;
    Ok(text.to_owned())
}

impl FromStr for ConsoleConfig {
    type Err = ConfigError;

    /// Reads `stdio`, `pty`, `socket` or `file:PATH`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "pty" => Ok(Self::Pty),
            "socket" => Ok(Self::Socket),
            "file" | "file:" => Err(ConfigError::ConsoleFile),
            _ => text
                .strip_prefix("file:")
                .map(|path| Self::File(PathBuf::from(path)))
                .ok_or_else(|| ConfigError::Console(text.to_owned())),
        }
    }
}

impl fmt::Display for ConsoleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Pty => f.write_str("pty"),
            Self::Socket => f.write_str("socket"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl FromStr for OnReboot {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "restart" => Ok(Self::Restart),
            "exit" => Ok(Self::Exit),
            _ => Err(ConfigError::OnReboot(text.to_owned())),
        }
    }
}

/// What becomes of a thread that makes a system call which it has no need of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SandboxMode {
    /// The process is killed.
    #[default]
    On,
    /// The kernel logs the call and lets it pass.
    Log,
    /// There are no filters.
    Off,
}

impl FromStr for SandboxMode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "on" => Ok(Self::On),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err(ConfigError::Sandbox(text.to_owned())),
        }
    }
}

/// What is logged, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// Filter in the syntax of `tracing_subscriber::EnvFilter`: `info`, `warn,vmm::api=debug`.
    pub filter: String,
    /// File to append to; standard error when absent.
    pub file: Option<PathBuf>,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "warn".to_owned(), file: None }
    }
}

impl FromStr for LogConfig {
    type Err = ConfigError;

    /// Reads `FILTER[:FILE]`. The file begins after the first colon that is not part of a `::`.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bytes = text.as_bytes();
        let colon = |i: usize| bytes.get(i) == Some(&b':');
        let split =
            (0..bytes.len()).find(|&i| colon(i) && !colon(i + 1) && (i == 0 || !colon(i - 1)));
        let (filter, file) = match split {
            Some(at) => (&text[..at], Some(&text[at + 1..])),
            None => (text, None),
        };
        if file == Some("") {
            return Err(ConfigError::EmptyPath("the log's FILE"));
        }
        let wrong = |why: String| ConfigError::Log { filter: filter.to_owned(), why };
        if filter.is_empty() {
            return Err(wrong("it is empty".to_owned()));
        }
        // EnvFilter takes a bare word that is no level for the name of a module: a misspelt level
        // would silently log nothing.
        let levels = ["off", "error", "warn", "info", "debug", "trace"];
        for part in filter.split(',') {
            if !part.contains('=') && !levels.contains(&part.to_ascii_lowercase().as_str()) {
                return Err(wrong(format!("{part:?} is not a level")));
            }
        }
        EnvFilter::try_new(filter).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { filter: filter.to_owned(), file: file.map(PathBuf::from) })
    }
}

/// Takes a path that is not empty.
///
/// # Errors
/// An empty one; `what` names it.
pub fn parse_path(text: &str, what: &'static str) -> Result<PathBuf, ConfigError> {
    if text.is_empty() {
        return Err(ConfigError::EmptyPath(what));
    }
    Ok(PathBuf::from(text))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "vm-1", "A.b_c-9", "_x", &"n".repeat(64)] {
            assert_eq!(parse_name(good).as_deref(), Ok(good));
        }
        assert_eq!(parse_name(""), Err(ConfigError::NameEmpty));
        assert_eq!(parse_name(&"n".repeat(65)), Err(ConfigError::NameTooLong(65)));
        for (bad, found) in [("a/b", '/'), ("../x", '/'), ("a b", ' '), ("ä", 'ä'), ("a\0", '\0')]
        {
            let name = bad.to_owned();
            assert_eq!(parse_name(bad), Err(ConfigError::NameCharacter { name, found }));
        }
        assert_eq!(parse_name("-v"), Err(ConfigError::NameStart("-v".into(), '-')));
        assert_eq!(parse_name(".."), Err(ConfigError::NameStart("..".into(), '.')));
    }

    #[test]
    fn cpus() {
        assert_eq!(parse_cpus("1"), Ok(1));
        assert_eq!(parse_cpus("64"), Ok(64));
        for bad in ["0", "65", "256", "-1", "two", "", "1.0"] {
            assert_eq!(parse_cpus(bad), Err(ConfigError::CpusOutOfRange(bad.into())));
        }
    }

    #[test]
    fn cmdlines() {
        assert_eq!(parse_cmdline(&"x".repeat(MAX_CMDLINE)).unwrap().len(), MAX_CMDLINE);
        let long = "x".repeat(MAX_CMDLINE + 1);
        assert_eq!(parse_cmdline(&long), Err(ConfigError::CmdlineTooLong(MAX_CMDLINE + 1)));
        assert_eq!(parse_cmdline("ab\0c"), Err(ConfigError::CmdlineNul(2)));
    }

    #[test]
    fn cpu_models() {
        assert_eq!(parse_cpu("x86-64-v3,+aes").as_deref(), Ok("x86-64-v3,+aes"));
        for bad in ["", "Host", "x86-64-v5", "+aes", "host,aes", "host,+", "host,+svm"] {
            assert!(matches!(parse_cpu(bad), Err(ConfigError::Cpu(_))), "{bad}");
        }
    }

    #[test]
    fn consoles() {
        for text in ["stdio", "pty", "socket", "file:/tmp/a:b"] {
            let console: ConsoleConfig = text.parse().unwrap();
            assert_eq!(console.to_string(), text);
        }
        assert_eq!("file:".parse::<ConsoleConfig>(), Err(ConfigError::ConsoleFile));
        assert_eq!("file".parse::<ConsoleConfig>(), Err(ConfigError::ConsoleFile));
        assert_eq!("tty".parse::<ConsoleConfig>(), Err(ConfigError::Console("tty".into())));
    }

    #[test]
    fn logs() {
        let log: LogConfig = "warn,vmm::api=debug:/tmp/l".parse().unwrap();
        assert_eq!(log.filter, "warn,vmm::api=debug");
        assert_eq!(log.file, Some("/tmp/l".into()));
        assert_eq!("INFO".parse::<LogConfig>().unwrap().file, None);
        assert_eq!("off:a::b".parse::<LogConfig>().unwrap().file, Some("a::b".into()));
        for bad in ["", "debgu", "vmm=loud", "info,", ":/tmp/l"] {
            let got = bad.parse::<LogConfig>();
            assert!(matches!(got, Err(ConfigError::Log { .. })), "{bad:?}: {got:?}");
        }
        assert!(matches!("info:".parse::<LogConfig>(), Err(ConfigError::EmptyPath(_))));
    }

    #[test]
    fn reboots() {
        assert_eq!("exit".parse(), Ok(OnReboot::Exit));
        assert_eq!("restart".parse(), Ok(OnReboot::Restart));
        assert_eq!("halt".parse::<OnReboot>(), Err(ConfigError::OnReboot("halt".into())));
        assert_eq!("log".parse(), Ok(SandboxMode::Log));
        assert_eq!("no".parse::<SandboxMode>(), Err(ConfigError::Sandbox("no".into())));
    }
}
