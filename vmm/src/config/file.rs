//! The configuration file: TOML with the names of the flags.
//!
//! ```toml
//! name = "web"
//! kernel = "vmlinux"            # relative to this file
//! initrd = "initrd.img"
//! cmdline = "console=ttyS0"
//! cpus = 2
//! cpu = "x86-64-v3,+aes"
//! console = "socket"            # stdio, pty, socket, file:PATH
//! on-reboot = "restart"         # or exit
//! paused = false
//! pidfile = "web.pid"
//! log = "info:web.log"
//! sandbox = "on"                # or log, off
//!
//! rng = true
//! virtio-console = false
//!
//! [memory]
//! size = "1G"
//! hugepages = false
//!
//! [[disk]]                      # one table for each disk
//! id = "root"
//! path = "root.img"
//! readonly = false
//! cache = "writeback"           # or writethrough, unsafe
//!
//! [[net]]                       # one table for each network card
//! id = "eth0"
//! tap = "tap0"                   # or bridge = "br0", or network = "blue"
//! mac = "52:54:00:12:34:56"
//! mtu = 1500
//!
//! [balloon]                     # there is one if the table is there
//! deflate-on-oom = true
//!
//! [migration]                   # limits of the live rounds; flags of `minivmm migrate` win
//! max-rounds = 30
//! max-bytes = 3.0               # as a multiple of the memory in use
//! dirty-pages = 16              # so few are few enough
//! ```

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::devices::attachment_of;
use super::{
    value, BalloonConfig, CacheMode, ConfigError, ConsoleConfig, DiskConfig, LogConfig, Mac,
    MigrationOptions, NetOptions, OnReboot, RunOptions, SandboxMode,
};

/// No configuration is larger than this, bytes.
const MAX_FILE: u64 = 1 << 20;

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct FileOptions {
    #[serde(deserialize_with = "name")]
    name: Option<String>,
    #[serde(deserialize_with = "kernel")]
    kernel: Option<PathBuf>,
    #[serde(deserialize_with = "initrd")]
    initrd: Option<PathBuf>,
    #[serde(deserialize_with = "cmdline")]
    cmdline: Option<String>,
    memory: FileMemory,
    #[serde(deserialize_with = "cpus")]
    cpus: Option<u8>,
    #[serde(deserialize_with = "cpu")]
    cpu: Option<String>,
    #[serde(deserialize_with = "console")]
    console: Option<ConsoleConfig>,
    #[serde(deserialize_with = "on_reboot")]
    on_reboot: Option<OnReboot>,
    paused: Option<bool>,
    #[serde(deserialize_with = "pidfile")]
    pidfile: Option<PathBuf>,
    #[serde(deserialize_with = "log")]
    log: Option<LogConfig>,
    #[serde(deserialize_with = "sandbox")]
    sandbox: Option<SandboxMode>,
    disk: Vec<FileDisk>,
    net: Vec<FileNet>,
    rng: Option<bool>,
    balloon: Option<BalloonConfig>,
    virtio_console: Option<bool>,
    migration: FileMigration,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct FileMigration {
    max_rounds: Option<u32>,
    max_bytes: Option<f64>,
    dirty_pages: Option<u64>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDisk {
    #[serde(deserialize_with = "id")]
    id: String,
    #[serde(deserialize_with = "disk_path")]
    path: PathBuf,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    cache: CacheMode,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct FileNet {
    #[serde(deserialize_with = "id")]
    id: String,
    tap: Option<String>,
    bridge: Option<String>,
    network: Option<String>,
    mac: Option<Mac>,
    #[serde(default, deserialize_with = "mtu")]
    mtu: Option<u16>,
}

#[derive(Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileMemory {
    #[serde(deserialize_with = "size")]
    size: Option<u64>,
    hugepages: Option<bool>,
}

impl RunOptions {
    /// Reads a configuration file. Relative paths in it start at its directory.
    ///
    /// # Errors
    /// The file cannot be read, or line, column and key of what is wrong in it.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let read = |e: &dyn fmt::Display| ConfigError::FileRead {
            path: path.to_owned(),
            why: e.to_string(),
        };
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(|e| read(&e))?;
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|e| read(&e))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(ConfigError::FileTooLarge { path: path.to_owned(), limit: MAX_FILE });
        }
        let text = String::from_utf8(bytes).map_err(|e| {
            let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            let (line, column) = position(&String::from_utf8_lossy(good), good.len());
            let why = "not UTF-8 text".to_owned();
            ConfigError::File { path: path.to_owned(), line, column, key: String::new(), why }
        })?;
        let mut options = Self::from_toml(&text, path)?;
        let dir = std::path::absolute(path).map_err(|e| read(&e))?;
        options.resolve_against(dir.parent().unwrap_or(Path::new("/")));
        Ok(options)
    }

    /// Reads the text of a configuration file; `path` is for messages.
    ///
    /// # Errors
    /// Line, column and key of what is wrong.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let wrong = |key: String, error: toml::de::Error| {
            let at = error.span().map_or(0, |span| span.start);
            let (line, column) = position(text, at);
            // The parser tells some things in several lines; a message is one.
            let why = error.message().lines().collect::<Vec<_>>().join(", ");
            ConfigError::File { path: path.to_owned(), line, column, key, why }
        };
        let document = toml::Deserializer::parse(text).map_err(|e| wrong(String::new(), e))?;
        let file: FileOptions = serde_path_to_error::deserialize(document).map_err(|e| {
            let key = match e.path().to_string().as_str() {
                "." => String::new(),
                key => format!("{key}: "),
            };
            wrong(key, e.into_inner())
        })?;
        let net = |FileNet { id, tap, bridge, network, mac, mtu }: FileNet| {
            let whose = format!("{}: the network card {id}", path.display());
            let (tap, bridge) = (tap.as_deref(), bridge.as_deref());
            let attachment = attachment_of(&whose, tap, bridge, network.as_deref())?;
            Ok(NetOptions { id, attachment, mac, mtu })
        };
        let nets = file.net.into_iter().map(net).collect::<Result<_, ConfigError>>()?;
        Ok(Self {
            name: file.name,
            kernel: file.kernel,
            initrd: file.initrd,
            cmdline: file.cmdline,
            memory_size: file.memory.size,
            hugepages: file.memory.hugepages,
            cpus: file.cpus,
            cpu: file.cpu,
            console: file.console,
            on_reboot: file.on_reboot,
            paused: file.paused,
            pidfile: file.pidfile,
            log: file.log,
            sandbox: file.sandbox,
            disks: (file.disk.into_iter())
                .map(|FileDisk { id, path, readonly, cache }| DiskConfig {
                    id,
                    path,
                    readonly,
                    cache,
                })
                .collect(),
            nets,
            rng: file.rng,
            balloon: file.balloon,
            virtio_console: file.virtio_console,
            migration: MigrationOptions {
                max_rounds: file.migration.max_rounds,
                max_bytes_factor: file.migration.max_bytes,
                dirty_pages: file.migration.dirty_pages,
            },
        })
    }
}

/// Line and column (in characters) of a byte position, both from 1.
fn position(text: &str, at: usize) -> (usize, usize) {
    let before = text.get(..at).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// A string through the parser that flags use too.
fn text<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, ConfigError>,
) -> Result<Option<T>, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map(Some).map_err(de::Error::custom)
}

fn name<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    text(d, value::parse_name)
}

fn kernel<'de, D: Deserializer<'de>>(d: D) -> Result<Option<PathBuf>, D::Error> {
    text(d, |t| value::parse_path(t, "the kernel"))
}

fn initrd<'de, D: Deserializer<'de>>(d: D) -> Result<Option<PathBuf>, D::Error> {
    text(d, |t| value::parse_path(t, "the initrd"))
}

fn pidfile<'de, D: Deserializer<'de>>(d: D) -> Result<Option<PathBuf>, D::Error> {
    text(d, |t| value::parse_path(t, "the pidfile"))
}

fn cmdline<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    text(d, value::parse_cmdline)
}

fn cpu<'de, D: Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    text(d, value::parse_cpu)
}

fn console<'de, D: Deserializer<'de>>(d: D) -> Result<Option<ConsoleConfig>, D::Error> {
    text(d, str::parse)
}

fn on_reboot<'de, D: Deserializer<'de>>(d: D) -> Result<Option<OnReboot>, D::Error> {
    text(d, str::parse)
}

fn log<'de, D: Deserializer<'de>>(d: D) -> Result<Option<LogConfig>, D::Error> {
    text(d, str::parse)
}

fn sandbox<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SandboxMode>, D::Error> {
    text(d, str::parse)
}

/// As [`text`], of a key that must be there.
fn needed<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, ConfigError>,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map_err(de::Error::custom)
}

fn id<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    needed(d, value::parse_id)
}

fn disk_path<'de, D: Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    needed(d, |t| value::parse_path(t, "the disk"))
}

fn mtu<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u16>, D::Error> {
    let number = i64::deserialize(d)?;
    super::parse_mtu(&number.to_string()).map(Some).map_err(de::Error::custom)
}

fn cpus<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u8>, D::Error> {
    let number = i64::deserialize(d)?;
    value::parse_cpus(&number.to_string()).map(Some).map_err(de::Error::custom)
}

/// A size: a string with a unit, or a number of bytes.
fn size<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    struct Size;
    impl Visitor<'_> for Size {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size such as \"512M\", \"1G\" or a number of bytes")
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<u64, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<u64, E> {
            Ok(number)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            super::parse_size(text).map_err(E::custom)
        }
    }
    d.deserialize_any(Size).map(Some)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<RunOptions, ConfigError> {
        RunOptions::from_toml(text, Path::new("vm.toml"))
    }

    fn refusal(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_file_says_all_that_flags_can() {
        let options = parse(
            r#"
            name = "web"
            kernel = "vmlinux"
            initrd = "initrd.img"
            cmdline = "quiet"
            cpus = 2
            cpu = "x86-64-v3,+aes"
            console = "file:web.log"
            on-reboot = "exit"
            paused = true
            pidfile = "web.pid"
            log = "debug:vmm.log"
            sandbox = "off"
            rng = true
            virtio-console = true
            [memory]
            size = "1G"
            hugepages = true
            [[disk]]
            id = "root"
            path = "root.img"
            readonly = true
            cache = "unsafe"
            [[disk]]
            id = "data"
            path = "/data.img"
            [[net]]
            id = "eth0"
            tap = "tap0"
            mac = "52:54:00:12:34:56"
            mtu = 1400
            [balloon]
            deflate-on-oom = true
            [migration]
            max-rounds = 5
            max-bytes = 2
            dirty-pages = 100
            "#,
        )
        .unwrap();
        // Named one by one: a field added to the options must be added to the file too.
        let expected = RunOptions {
            name: Some("web".into()),
            kernel: Some("vmlinux".into()),
            initrd: Some("initrd.img".into()),
            cmdline: Some("quiet".into()),
            memory_size: Some(1 << 30),
            hugepages: Some(true),
            cpus: Some(2),
            cpu: Some("x86-64-v3,+aes".into()),
            console: Some(ConsoleConfig::File("web.log".into())),
            on_reboot: Some(OnReboot::Exit),
            paused: Some(true),
            pidfile: Some("web.pid".into()),
            log: Some(LogConfig { filter: "debug".into(), file: Some("vmm.log".into()) }),
            sandbox: Some(SandboxMode::Off),
            disks: vec![
                "id=root,path=root.img,readonly,cache=unsafe".parse().unwrap(),
                "id=data,path=/data.img".parse().unwrap(),
            ],
            nets: vec!["id=eth0,tap=tap0,mac=52:54:00:12:34:56,mtu=1400".parse().unwrap()],
            rng: Some(true),
            balloon: Some("deflate-on-oom".parse().unwrap()),
            virtio_console: Some(true),
            migration: MigrationOptions {
                max_rounds: Some(5),
                max_bytes_factor: Some(2.0),
                dirty_pages: Some(100),
            },
        };
        assert_eq!(options, expected);
        assert_eq!(parse(""), Ok(RunOptions::default()));
    }

    #[test]
    fn limits_of_migrations_are_located() {
        let text = refusal("[migration]\nmax-rounds = -1\n");
        assert!(text.starts_with("vm.toml:2:14: migration.max-rounds: "), "{text}");
        let text = refusal("[migration]\nrounds = 1\n");
        assert!(text.contains("migration.rounds: ") && text.contains("`max-rounds`"), "{text}");
    }

    #[test]
    fn a_size_may_be_a_number() {
        assert_eq!(parse("memory.size = 16777216").unwrap().memory_size, Some(16 << 20));
        assert!(refusal("memory.size = -1").contains("1:15: memory.size: \"-1\" is not a size"));
        assert!(refusal("memory.size = 1.5").contains("expected a size such as"));
    }

    #[test]
    fn an_unknown_key_is_named_with_what_is_allowed() {
        let text = refusal("cpus = 2\nmemroy = 4\n");
        assert!(text.starts_with("vm.toml:2:1: memroy: unknown field `memroy`"), "{text}");
        assert!(text.contains("`memory`") && text.contains("`on-reboot`"), "{text}");
        let text = refusal("[memory]\nsize = \"1G\"\nhuge = true\n");
        assert!(text.starts_with("vm.toml:3:1: memory.huge: "), "{text}");
        assert!(text.contains("`hugepages`"), "{text}");
    }

    #[test]
    fn a_wrong_value_is_located() {
        let text = refusal("name = \"x\"\n\n  cpus = 65\n");
        assert_eq!(text, "vm.toml:3:10: cpus: 65 vCPUs are not possible: use 1 to 64");
        let text = refusal("cpus = \"two\"");
        assert!(text.starts_with("vm.toml:1:8: cpus: invalid type: string"), "{text}");
        let text = refusal("console = \"tty\"");
        assert!(text.contains("use stdio, pty, socket or file:PATH"), "{text}");
        let text = refusal("name = \"a b\"");
        assert!(text.starts_with("vm.toml:1:8: name: "), "{text}");
        let text = refusal("kernel = \"\"");
        assert!(text.contains("kernel: the kernel is an empty path"), "{text}");
    }

    #[test]
    fn broken_toml_is_located() {
        let text = refusal("cpus = 1\ncpus = 2\n");
        assert!(text.starts_with("vm.toml:2:1: ") && text.contains("duplicate"), "{text}");
        let text = refusal("name = \"äö\ncpus = 1\n");
        assert!(text.starts_with("vm.toml:1:"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    #[test]
    fn paths_start_at_the_file() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("vm.toml");
        std::fs::write(&path, "kernel = \"k\"\nconsole = \"file:c\"\nlog = \"info:/abs\"").unwrap();
        let options = RunOptions::from_file(&path).unwrap();
        assert_eq!(options.kernel, Some(dir.as_path().join("k")));
        assert_eq!(options.console, Some(ConsoleConfig::File(dir.as_path().join("c"))));
        assert_eq!(options.log.unwrap().file, Some("/abs".into()));
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("vm.toml");
        let refusal = || RunOptions::from_file(&path).unwrap_err();
        assert!(matches!(refusal(), ConfigError::FileRead { .. }));
        std::fs::write(&path, b"cpus = 1\nname = \"\xff\"").unwrap();
        assert!(matches!(refusal(), ConfigError::File { line: 2, column: 9, .. }));
        std::fs::write(&path, vec![b'#'; 1 << 20 | 1]).unwrap();
        assert!(matches!(refusal(), ConfigError::FileTooLarge { .. }));
    }
}
