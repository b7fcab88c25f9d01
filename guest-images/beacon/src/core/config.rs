//! The kernel command line.

use crate::devices::DeviceOptions;
use crate::pages::PAGE_SIZE;

/// Most vCPUs that beacon uses.
pub const MAX_CPUS: u32 = 64;
/// Most samples of `mode=exits`: they are kept on the stack.
pub const MAX_SAMPLES: usize = 2000;
/// Bad options remembered for the console.
const MAX_BAD: usize = 4;
/// Bytes kept of a bad option.
const BAD_LENGTH: usize = 64;

/// How many pages a vCPU writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Pages per second.
    PerSecond(u64),
    /// As many as possible.
    Max,
}

/// The size of the working set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkingSet {
    /// Mebibytes, all vCPUs together.
    Mib(u64),
    /// All RAM that is free after beacon's own tables.
    Max,
}

/// In which order pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other.
    Sequential,
    /// Uniformly at random.
    Random,
    /// Nine of ten writes go to a tenth of the pages.
    Hotspot,
    /// Every n-th page, starting one further after each pass.
    Stride,
}

/// Where a page of the working set lies in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// In pseudo-random places.
    Scattered,
    /// In the order of the page numbers.
    Linear,
}

/// What beacon does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The work loop.
    Beat,
    /// Measure the cost of exits first.
    Exits,
}

/// The widest registers that the register check uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Registers {
    /// x87 and SSE.
    Sse,
    /// And AVX.
    Avx,
    /// And AVX-512.
    Avx512,
}

/// The options of the command line, with the defaults for what it does not say.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// `cpus=N`: use this many vCPUs instead of those that ACPI lists.
    pub cpus: Option<u32>,
    /// `report=MS`: time between reports; 0 reports on demand only.
    pub report_ms: u64,
    /// `beat=MS`: time between numbered signs of life on the console; 0 gives none.
    pub beat_ms: u64,
    /// `dirty=PAGES|max`: pages per second and vCPU.
    pub dirty: Rate,
    /// `ws=MIB|max`.
    pub working_set: WorkingSet,
    /// `pattern=...`.
    pub pattern: Pattern,
    /// `stride=PAGES`.
    pub stride: u64,
    /// `order=...`.
    pub order: Order,
    /// `verify=on|off`.
    pub verify: bool,
    /// `runtime=MS`: power off after this time.
    pub runtime_ms: Option<u64>,
    /// `mode=...`.
    pub mode: Mode,
    /// `mmio=ADDRESS`: what `mode=exits` reads.
    pub mmio: u64,
    /// `samples=N`: how often `mode=exits` reads each.
    pub samples: u64,
    /// `then=poweroff`: power off after `mode=exits`.
    pub then_poweroff: bool,
    /// `pace=US`: least time between two bytes on the console.
    pub pace_us: u64,
    /// `fpu=sse|avx|avx512`: limit of the register check.
    pub registers: Registers,
    /// The options of the devices.
    pub devices: DeviceOptions,
    /// Options whose key is known and whose value is not.
    pub bad: BadOptions,
}

/// The first few bad options, for the console.
#[derive(Clone, Copy, Debug)]
pub struct BadOptions {
    text: [[u8; BAD_LENGTH]; MAX_BAD],
    length: [usize; MAX_BAD],
    count: usize,
}

impl BadOptions {
    const NONE: Self = Self { text: [[0; BAD_LENGTH]; MAX_BAD], length: [0; MAX_BAD], count: 0 };

    fn add(&mut self, option: &[u8]) {
        if self.count < MAX_BAD {
            let length = option.len().min(BAD_LENGTH);
            self.text[self.count][..length].copy_from_slice(&option[..length]);
            self.length[self.count] = length;
            self.count += 1;
        }
    }

    /// The bad options as they stood on the command line, cut to 64 bytes.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.count).map(|i| &self.text[i][..self.length[i]])
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cpus: None,
            report_ms: 1000,
            beat_ms: 0,
            dirty: Rate::PerSecond(0),
            working_set: WorkingSet::Mib(16),
            pattern: Pattern::Sequential,
            stride: 7,
            order: Order::Scattered,
            verify: true,
            runtime_ms: None,
            mode: Mode::Beat,
            mmio: 0xD800_0000,
            samples: 1000,
            then_poweroff: false,
            pace_us: 100,
            registers: Registers::Avx512,
            devices: DeviceOptions::default(),
            bad: BadOptions::NONE,
        }
    }
}

impl Config {
    /// Parses a command line. Unknown keys are ignored, since loaders add their own (`console=`); bad values of known keys are kept in `bad`.
    #[must_use]
    pub fn parse(command_line: &[u8]) -> Self {
        let mut config = Self::default();
        for option in command_line.split(|byte| byte.is_ascii_whitespace()) {
            let Some(equals) = option.iter().position(|&byte| byte == b'=') else { continue };
            if config.set(&option[..equals], &option[equals + 1..]).is_none() {
                config.bad.add(option);
            }
        }
        config
    }

    /// Takes one option over; `None` when the value is not one of those allowed.
    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"cpus" => self.cpus = Some(in_range(value, 1, u64::from(MAX_CPUS))? as u32),
            b"report" => self.report_ms = in_range(value, 0, 3_600_000)?,
            b"beat" => self.beat_ms = in_range(value, 0, 3_600_000)?,
            b"dirty" => self.dirty = parse_rate(value)?,
            b"ws" => {
                self.working_set = match value {
                    b"max" => WorkingSet::Max,
                    _ => WorkingSet::Mib(in_range(
                        value,
                        1,
                        (u64::from(u32::MAX) * PAGE_SIZE) >> 20,
                    )?),
                }
            }
            b"pattern" => {
                self.pattern = match value {
                    b"sequential" => Pattern::Sequential,
                    b"random" => Pattern::Random,
                    b"hotspot" => Pattern::Hotspot,
                    b"stride" => Pattern::Stride,
                    _ => return None,
                }
            }
            b"stride" => self.stride = in_range(value, 1, u64::from(u32::MAX))?,
            b"order" => {
                self.order = match value {
                    b"scattered" => Order::Scattered,
                    b"linear" => Order::Linear,
                    _ => return None,
                }
            }
            b"verify" => {
                self.verify = match value {
                    b"on" => true,
                    b"off" => false,
                    _ => return None,
                }
            }
            b"runtime" => self.runtime_ms = Some(in_range(value, 1, 1 << 40)?),
            b"mode" => {
                self.mode = match value {
                    b"beat" => Mode::Beat,
                    b"exits" => Mode::Exits,
                    _ => return None,
                }
            }
            b"mmio" => self.mmio = in_range(value, 0, u64::from(u32::MAX) & !7)?,
            b"samples" => self.samples = in_range(value, 1, MAX_SAMPLES as u64)?,
            b"then" => self.then_poweroff = (value == b"poweroff").then_some(true)?,
            b"pace" => self.pace_us = in_range(value, 0, 1_000_000)?,
            b"fpu" => {
                self.registers = match value {
                    b"sse" => Registers::Sse,
                    b"avx" => Registers::Avx,
                    b"avx512" => Registers::Avx512,
                    _ => return None,
                }
            }
            _ => self.devices.set(key, value)?,
        }
        Some(())
    }
}

/// Parses the value of `dirty=` and of the console command of that name.
#[must_use]
pub fn parse_rate(value: &[u8]) -> Option<Rate> {
    match value {
        b"max" => Some(Rate::Max),
        _ => in_range(value, 0, 1_000_000_000).map(Rate::PerSecond),
    }
}

/// Parses a decimal or `0x` number.
#[must_use]
pub fn parse_number(text: &[u8]) -> Option<u64> {
    let text = core::str::from_utf8(text).ok()?;
    if !text.bytes().next()?.is_ascii_digit() {
        return None;
    }
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

pub(crate) fn in_range(text: &[u8], least: u64, most: u64) -> Option<u64> {
    parse_number(text).filter(|number| (least..=most).contains(number))
}

/// The name that an option value has on the command line.
macro_rules! names {
    ($type:ty { $($variant:ident = $name:literal),* $(,)? }) => {
        impl $type {
            /// The name that this value has on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
        }
    };
}
pub(crate) use names;
names!(Pattern { Sequential = "sequential", Random = "random", Hotspot = "hotspot", Stride = "stride" });
names!(Order { Scattered = "scattered", Linear = "linear" });
names!(Mode { Beat = "beat", Exits = "exits" });
names!(Registers { Sse = "sse", Avx = "avx", Avx512 = "avx512" });

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_option_is_understood() {
        let config = Config::parse(
            b"console=ttyS0 quiet cpus=3 report=250 dirty=10000 ws=64 pattern=stride stride=0x11 \
              order=linear verify=off runtime=5000 mode=exits mmio=0xd8001000 samples=10 \
              then=poweroff pace=0 fpu=avx virtio_mmio.device=512@0xfeb00e00:12\n",
        );
        assert_eq!(config.cpus, Some(3));
        assert_eq!(config.report_ms, 250);
        assert_eq!(config.dirty, Rate::PerSecond(10_000));
        assert_eq!(config.working_set, WorkingSet::Mib(64));
        assert_eq!((config.pattern, config.stride), (Pattern::Stride, 0x11));
        assert_eq!(config.order, Order::Linear);
        assert!(!config.verify);
        assert_eq!(config.runtime_ms, Some(5000));
        assert_eq!((config.mode, config.mmio, config.samples), (Mode::Exits, 0xD800_1000, 10));
        assert!(config.then_poweroff);
        assert_eq!((config.pace_us, config.registers), (0, Registers::Avx));
        assert_eq!(config.bad.iter().count(), 0);
    }

    #[test]
    fn bad_values_are_named_and_the_default_stays() {
        let config = Config::parse(b"dirty=fast ws=0 cpus=65 pattern= then=x verify=maybe");
        let bad: Vec<_> = config.bad.iter().collect();
        assert_eq!(bad, [&b"dirty=fast"[..], b"ws=0", b"cpus=65", b"pattern="]);
        assert_eq!(config.dirty, Rate::PerSecond(0));
        assert_eq!(config.working_set, WorkingSet::Mib(16));
        assert_eq!(config.cpus, None);
        assert!(config.verify && !config.then_poweroff);
    }

    #[test]
    fn numbers() {
        assert_eq!(parse_number(b"0"), Some(0));
        assert_eq!(parse_number(b"0xfF"), Some(255));
        for bad in [&b""[..], b"+1", b"-1", b"0x", b"1k", b"18446744073709551616", b"\xFF"] {
            assert_eq!(parse_number(bad), None, "{bad:?}");
        }
        assert_eq!(parse_rate(b"max"), Some(Rate::Max));
    }
}
