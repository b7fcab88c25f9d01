//! The options of the virtio devices.

use crate::config::{in_range, names, parse_number};

/// Most virtio-mmio windows that are probed.
pub const MAX_WINDOWS: usize = 32;
/// Largest block of the disk load, in bytes.
pub const MAX_BLOCK: u64 = 128 << 10;
/// Most requests of the disk load in flight.
pub const MAX_DEPTH: usize = 32;

/// How the drivers learn of used buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// By looking at the rings.
    Poll,
    /// By interrupt.
    Irq,
}

/// What is done with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskMode {
    /// Nothing.
    Off,
    /// Stamped blocks are written and read back for ever.
    Verify,
    /// Requests as fast as possible, for a time.
    Bench,
}

/// Which requests the disk load makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Half of each.
    Mixed,
}

/// In which order the disk load goes over its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOrder {
    /// Uniformly at random.
    Random,
    /// One after the other.
    Sequential,
}

/// The `disk` options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// `disk=off|verify|bench`.
    pub mode: DiskMode,
    /// `disk-bs=BYTES`: a power of two.
    pub block: u64,
    /// `disk-depth=N`.
    pub depth: usize,
    /// `disk-ws=MIB`: from the beginning of the disk.
    pub mib: u64,
    /// `disk-op=read|write|mixed`.
    pub op: DiskOp,
    /// `disk-order=random|sequential`.
    pub order: DiskOrder,
    /// `disk-rate=IOPS|max`; none is `max`.
    pub rate: Option<u64>,
    /// `disk-ms=MS`: length of a bench.
    pub bench_ms: u64,
    /// `disk-discard=on|off`: discard and zero blocks now and then, if the device can.
    pub discard: bool,
}

/// An IPv4 address.
pub type Ip = [u8; 4];

/// The options of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// `ip=ADDRESS/PREFIX`.
    pub ip: Option<(Ip, u8)>,
    /// `gw=ADDRESS`.
    pub gateway: Option<Ip>,
    /// `udp-to=ADDRESS:PORT`.
    pub udp_to: Option<(Ip, u16)>,
    /// `udp-rate=N`: datagrams per second.
    pub udp_rate: u64,
    /// `net-offload=on|off`: take large and unchecked TCP segments from the device if it has them.
    pub offload: bool,
}

/// A window of registers: `virtio_mmio.device=SIZE@BASE:IRQ`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Interrupt number.
    pub irq: u32,
}

/// All of them.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    windows: [Window; MAX_WINDOWS],
    count: usize,
    /// `virtio=poll|irq`.
    pub notify: Notify,
    /// `disk...`.
    pub disk: DiskOptions,
    /// `ip` and so on.
    pub net: NetOptions,
    /// `rng=on`.
    pub rng: bool,
    /// `balloon=on`.
    pub balloon: bool,
    /// `balloon-pool=MIB`.
    pub balloon_mib: u64,
    /// `attack=SEED`.
    pub attack: Option<u64>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            windows: [Window::default(); MAX_WINDOWS],
            count: 0,
            notify: Notify::Poll,
            disk: DiskOptions {
                mode: DiskMode::Off,
                block: 4096,
                depth: 4,
                mib: 16,
                op: DiskOp::Mixed,
                order: DiskOrder::Random,
                rate: Some(200),
                bench_ms: 2000,
                discard: false,
            },
            net: NetOptions {
                ip: None,
                gateway: None,
                udp_to: None,
                udp_rate: 1000,
                offload: true,
            },
            rng: false,
            balloon: false,
            balloon_mib: 16,
            attack: None,
        }
    }
}

impl DiskOptions {
    /// Takes an option over; false when the key is none of these.
    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<bool> {
        match key {
            b"disk" => {
                self.mode = match value {
                    b"off" => DiskMode::Off,
                    b"verify" => DiskMode::Verify,
                    b"bench" => DiskMode::Bench,
                    _ => return None,
                }
            }
            b"disk-bs" => {
                self.block =
                    in_range(value, 512, MAX_BLOCK).filter(|bytes| bytes.is_power_of_two())?;
            }
            b"disk-depth" => self.depth = in_range(value, 1, MAX_DEPTH as u64)? as usize,
            b"disk-ws" => self.mib = in_range(value, 1, 1 << 20)?,
            b"disk-op" => {
                self.op = match value {
                    b"read" => DiskOp::Read,
                    b"write" => DiskOp::Write,
                    b"mixed" => DiskOp::Mixed,
                    _ => return None,
                }
            }
            b"disk-order" => {
                self.order = match value {
                    b"random" => DiskOrder::Random,
                    b"sequential" => DiskOrder::Sequential,
                    _ => return None,
                }
            }
            b"disk-rate" => {
                self.rate = match value {
                    b"max" => None,
                    _ => Some(in_range(value, 1, 10_000_000)?),
                }
            }
            b"disk-ms" => self.bench_ms = in_range(value, 1, 3_600_000)?,
            b"disk-discard" => self.discard = on_off(value)?,
            _ => return Some(false),
        }
        Some(true)
    }

    /// Takes over the options of a console command, all or none of them.
    #[must_use]
    pub fn with(mut self, options: &[u8]) -> Option<Self> {
        for option in options.split(u8::is_ascii_whitespace).filter(|option| !option.is_empty()) {
            let equals = option.iter().position(|&byte| byte == b'=')?;
            self.set(&option[..equals], &option[equals + 1..])?.then_some(())?;
        }
        Some(self)
    }
}

impl DeviceOptions {
    /// The windows in the order of the command line.
    #[must_use]
    pub fn windows(&self) -> &[Window] {
        &self.windows[..self.count]
    }

    /// Takes one option over; `None` when the value is not one of those allowed. Keys that it does
    /// not know are ignored.
    pub(crate) fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"virtio_mmio.device" => {
                let window = parse_window(value)?;
                if self.count < MAX_WINDOWS {
                    self.windows[self.count] = window;
                    self.count += 1;
                }
            }
            b"virtio" => {
                self.notify = match value {
                    b"poll" => Notify::Poll,
                    b"irq" => Notify::Irq,
                    _ => return None,
                }
            }
            b"ip" => {
                let (address, prefix) = split(value, b'/')?;
                self.net.ip = Some((parse_ip(address)?, in_range(prefix, 0, 32)? as u8));
            }
            b"gw" => self.net.gateway = Some(parse_ip(value)?),
            b"udp-to" => {
                let (address, port) = split(value, b':')?;
                self.net.udp_to = Some((parse_ip(address)?, in_range(port, 1, 65535)? as u16));
            }
            b"udp-rate" => self.net.udp_rate = in_range(value, 1, 100_000)?,
            b"net-offload" => self.net.offload = on_off(value)?,
            b"rng" => self.rng = on_off(value)?,
            b"balloon" => self.balloon = on_off(value)?,
            b"balloon-pool" => self.balloon_mib = in_range(value, 1, 1 << 20)?,
            b"attack" => self.attack = Some(parse_number(value)?),
            _ => {
                self.disk.set(key, value)?;
            }
        }
        Some(())
    }
}

fn on_off(value: &[u8]) -> Option<bool> {
    match value {
        b"on" => Some(true),
        b"off" => Some(false),
        _ => None,
    }
}

fn split(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&byte| byte == separator)?;
    Some((&text[..at], &text[at + 1..]))
}

/// `SIZE@BASE:IRQ[:ID]` (Linux Documentation/admin-guide/kernel-parameters.txt). Only windows below
/// 4 GiB are taken: what is above need not be mapped.
fn parse_window(text: &[u8]) -> Option<Window> {
    let (size, rest) = split(text, b'@')?;
    let (base, irq) = split(rest, b':')?;
    let irq = split(irq, b':').map_or(irq, |(irq, _)| irq);
    let (size, unit) = match size.split_last()? {
        (b'K' | b'k', number) => (number, 1 << 10),
        (b'M' | b'm', number) => (number, 1 << 20),
        _ => (size, 1),
    };
    let size = in_range(size, 1, 1 << 20)? * unit;
    let base = in_range(base, 0, (1 << 32) - 1)?;
    // The configuration space begins at 0x100.
    (size > 0x100 && base + size <= 1 << 32 && base % 4 == 0).then_some(())?;
    Some(Window { base, size, irq: in_range(irq, 0, 255)? as u32 })
}

fn parse_ip(text: &[u8]) -> Option<Ip> {
    let mut parts = text.split(|&byte| byte == b'.');
    let mut ip = [0; 4];
    for byte in &mut ip {
        *byte = in_range(parts.next()?, 0, 255)? as u8;
    }
    parts.next().is_none().then_some(ip)
}

names!(DiskMode { Off = "off", Verify = "verify", Bench = "bench" });
names!(DiskOp { Read = "read", Write = "write", Mixed = "mixed" });
names!(DiskOrder { Random = "random", Sequential = "sequential" });

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::Config;

    #[test]
    fn every_option_is_understood() {
        let config = Config::parse(
            b"virtio=irq disk=verify disk-bs=131072 disk-depth=32 disk-ws=64 disk-op=write \
              disk-order=sequential disk-rate=max disk-ms=500 disk-discard=on ip=10.0.0.2/24 gw=10.0.0.1 \
              udp-to=10.0.0.1:7000 udp-rate=500 net-offload=off rng=on balloon=on balloon-pool=8 \
              attack=7 virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=4K@0xd0001000:6:1",
        );
        assert_eq!(config.bad.iter().count(), 0);
        let devices = config.devices;
        assert_eq!(
            devices.windows(),
            [
                Window { base: 0xFEB0_0E00, size: 512, irq: 12 },
                Window { base: 0xD000_1000, size: 4096, irq: 6 }
            ]
        );
        assert_eq!(devices.notify, Notify::Irq);
        assert_eq!(
            devices.disk,
            DiskOptions {
                mode: DiskMode::Verify,
                block: 131_072,
                depth: 32,
                mib: 64,
                op: DiskOp::Write,
                order: DiskOrder::Sequential,
                rate: None,
                bench_ms: 500,
                discard: true,
            }
        );
        assert_eq!(
            devices.net,
            NetOptions {
                ip: Some(([10, 0, 0, 2], 24)),
                gateway: Some([10, 0, 0, 1]),
                udp_to: Some(([10, 0, 0, 1], 7000)),
                udp_rate: 500,
                offload: false,
            }
        );
        assert!(devices.rng && devices.balloon);
        assert_eq!((devices.balloon_mib, devices.attack), (8, Some(7)));
    }

    #[test]
    fn bad_values_are_refused() {
        let mut devices = DeviceOptions::default();
        for (key, value) in [
            ("disk-bs", "1000"),
            ("disk-bs", "262144"),
            ("disk-depth", "33"),
            ("ip", "10.0.0.2"),
            ("ip", "10.0.0/24"),
            ("ip", "10.0.0.2.1/24"),
            ("ip", "10.0.0.256/24"),
            ("ip", "10.0.0.1/33"),
            ("udp-to", "10.0.0.1:0"),
            ("virtio_mmio.device", "512"),
            ("virtio_mmio.device", "512@0xfeb00e00"),
            ("virtio_mmio.device", "4K@0x100000000:1"),
            ("virtio_mmio.device", "256@0xfeb00e00:1"),
            ("virtio", "maybe"),
        ] {
            assert_eq!(devices.set(key.as_bytes(), value.as_bytes()), None, "{key}={value}");
        }
        assert_eq!(devices.windows(), []);
    }

    #[test]
    fn a_command_changes_all_or_nothing() {
        let disk = DeviceOptions::default().disk;
        let changed = disk.with(b" disk=bench  disk-depth=8 ").unwrap();
        assert_eq!((changed.mode, changed.depth), (DiskMode::Bench, 8));
        assert_eq!(disk.with(b"disk=bench ws=1"), None);
        assert_eq!(disk.with(b"disk"), None);
    }
}
