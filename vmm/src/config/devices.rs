//! Virtio devices in the configuration: disks, network cards, and the devices without settings.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::value::{parse_id, parse_path, saved_as_text};
use super::{Attachment, ConfigError};

/// Most virtio devices of a VM: one interrupt line of the I/O APIC each.
pub const MAX_DEVICES: usize = 16;
/// Longest name of a network interface, bytes: IFNAMSIZ (linux/if.h) less one.
const MAX_TAP: usize = 15;
/// Smallest MTU (RFC 791).
const MIN_MTU: u16 = 68;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name of the disk, unique among the VM's disks and network cards; the guest can ask for it.
    pub id: String,
    /// Raw image or block device.
    pub path: PathBuf,
    /// The guest cannot write to it.
    #[serde(default)]
    pub readonly: bool,
    /// When writes are on stable storage.
    #[serde(default)]
    pub cache: CacheMode,
}

/// When what the guest wrote is on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// When the guest flushes.
    #[default]
    Writeback,
    /// With each write.
    Writethrough,
    /// Whenever the host likes.
    Unsafe,
}

/// A network card as flags and file describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetOptions {
    /// See [`NetConfig::id`].
    pub id: String,
    /// See [`NetConfig::attachment`].
    pub attachment: Attachment,
    /// See [`NetConfig::mac`]; made from the names of VM and card when absent.
    pub mac: Option<Mac>,
    /// See [`NetConfig::mtu`].
    pub mtu: Option<u16>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the card, unique among the VM's disks and network cards.
    pub id: String,
    /// What it is plugged into.
    pub attachment: Attachment,
    /// Its Ethernet address.
    pub mac: Mac,
    /// The MTU that the guest is told, if any, bytes.
    pub mtu: Option<u16>,
}

/// A memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct BalloonConfig {
    /// The guest may take memory back when it runs out.
    #[serde(alias = "deflate_on_oom")]
    pub deflate_on_oom: bool,
}

/// An Ethernet address of one card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address that depends on the names alone, so that it is the same at the next start:
    /// 52:54 (locally administered, as other hypervisors' are) and 32 bits of FNV-1a
    /// (<http://www.isthe.com/chongo/tech/comp/fnv/>).
    #[must_use]
    pub fn from_names(vm: &str, card: &str) -> Self {
        let bytes = vm.bytes().chain([0]).chain(card.bytes());
        let hash = bytes
            .fold(0x811C_9DC5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let [a, b, c, d] = hash.to_be_bytes();
        Self([0x52, 0x54, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        devices::virtio::net::MacAddress(self.0).fmt(f)
    }
}

saved_as_text!(Mac, ConfigError);

impl FromStr for Mac {
    type Err = ConfigError;

    /// Reads six bytes in hexadecimal with colons between them.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = |why| ConfigError::Mac { text: text.to_owned(), why };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            let number = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = number.ok_or_else(|| wrong("is not six bytes such as 52:54:00:12:34:56"))?;
        }
        if parts.next().is_some() {
            return Err(wrong("is not six bytes such as 52:54:00:12:34:56"));
        }
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(wrong("is no address of a single card: its first byte must be even"));
        }
        Ok(Self(bytes))
    }
}

impl FromStr for CacheMode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            "unsafe" => Ok(Self::Unsafe),
            _ => Err(ConfigError::Cache(text.to_owned())),
        }
    }
}

impl From<CacheMode> for devices::virtio::block::Cache {
    fn from(mode: CacheMode) -> Self {
        match mode {
            CacheMode::Writeback => Self::Writeback,
            CacheMode::Writethrough => Self::Writethrough,
            CacheMode::Unsafe => Self::Unsafe,
        }
    }
}

/// Settings as a flag has them: `id=root,path=disk.img,readonly`.
struct Settings<'a> {
    flag: &'static str,
    keys: &'static str,
    values: Vec<(&'a str, Option<&'a str>)>,
}

impl<'a> Settings<'a> {
    /// `keys` is what may be given, for messages.
    fn parse(flag: &'static str, keys: &'static str, text: &'a str) -> Self {
        let split = |part: &'a str| match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        Self { flag, keys, values: text.split(',').map(split).collect() }
    }

    fn take(&mut self, key: &str) -> Result<Option<Option<&'a str>>, ConfigError> {
        let Some(at) = self.values.iter().position(|(k, _)| *k == key) else { return Ok(None) };
        let (_, value) = self.values.remove(at);
        if self.values.iter().any(|(k, _)| *k == key) {
            return Err(ConfigError::SettingTwice { flag: self.flag, key: key.to_owned() });
        }
        Ok(Some(value))
    }

    /// The value of `key`, where it is given.
    fn value(&mut self, key: &'static str) -> Result<Option<&'a str>, ConfigError> {
        match self.take(key)? {
            None => Ok(None),
            Some(Some(value)) => Ok(Some(value)),
            Some(None) => Err(ConfigError::SettingMissing { flag: self.flag, key }),
        }
    }

    fn required(&mut self, key: &'static str) -> Result<&'a str, ConfigError> {
        self.value(key)?.ok_or(ConfigError::SettingMissing { flag: self.flag, key })
    }

    /// A setting that is given by its name alone, or by `=true` and `=false`.
    fn switch(&mut self, key: &'static str) -> Result<bool, ConfigError> {
        match self.take(key)? {
            None | Some(Some("false")) => Ok(false),
            Some(None | Some("true")) => Ok(true),
            Some(Some(value)) => Err(self.unknown(&format!("{key}={value}"))),
        }
    }

    fn finish(self) -> Result<(), ConfigError> {
        match self.values.first() {
            Some((key, _)) => Err(self.unknown(key)),
            None => Ok(()),
        }
    }

    fn unknown(&self, found: &str) -> ConfigError {
        let (flag, keys) = (self.flag, self.keys);
        ConfigError::SettingUnknown { flag, found: found.to_owned(), keys }
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut settings = Settings::parse("--disk", "id, path, readonly and cache", text);
        let disk = Self {
            id: parse_id(settings.required("id")?)?,
            path: parse_path(settings.required("path")?, "the disk")?,
            readonly: settings.switch("readonly")?,
            cache: settings.value("cache")?.map(str::parse).transpose()?.unwrap_or_default(),
        };
        settings.finish()?;
        Ok(disk)
    }
}

impl FromStr for NetOptions {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut settings = Settings::parse("--net", "id, tap, bridge, network, mac and mtu", text);
        let id = parse_id(settings.required("id")?)?;
        let attachment = attachment_of(
            &format!("--net id={id}"),
            settings.value("tap")?,
            settings.value("bridge")?,
            settings.value("network")?,
        )?;
        let net = Self {
            id,
            attachment,
            mac: settings.value("mac")?.map(str::parse).transpose()?,
            mtu: settings.value("mtu")?.map(parse_mtu).transpose()?,
        };
        settings.finish()?;
        Ok(net)
    }
}

impl FromStr for BalloonConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let mut settings = Settings::parse("--balloon", "deflate-on-oom", text);
        let balloon = Self { deflate_on_oom: settings.switch("deflate-on-oom")? };
        settings.finish()?;
        Ok(balloon)
    }
}

/// Another backend for a device of a saved VM: `ID=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    /// Which device.
    pub id: String,
    /// Path of the disk, or what the card is plugged into.
    pub backend: String,
}

impl FromStr for Replacement {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once('=') {
            Some((id, backend)) if !backend.is_empty() => {
                Ok(Self { id: parse_id(id)?, backend: backend.to_owned() })
            }
            _ => Err(ConfigError::Replacement(text.to_owned())),
        }
    }
}

/// What the card that is described in `whose` is plugged into, of the three settings for that.
pub(super) fn attachment_of(
    whose: &str,
    tap: Option<&str>,
    bridge: Option<&str>,
    network: Option<&str>,
) -> Result<Attachment, ConfigError> {
    match (tap, bridge, network) {
        (Some(tap), None, None) => format!("tap={tap}").parse(),
        (None, Some(bridge), None) => format!("bridge={bridge}").parse(),
        (None, None, Some(network)) => format!("network={network}").parse(),
        _ => Err(ConfigError::Attachment(whose.to_owned())),
    }
}

/// Checks the name of a tap interface.
///
/// # Errors
/// The kernel takes no such name.
pub fn parse_tap(name: &str) -> Result<String, ConfigError> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    let length = (1..=MAX_TAP).contains(&name.len());
    if !length || name.contains(bad) || matches!(name, "." | "..") {
        return Err(ConfigError::Tap(name.to_owned()));
    }
    Ok(name.to_owned())
}

/// Reads an MTU, bytes.
///
/// # Errors
/// Not a number, or less than IPv4 needs.
pub fn parse_mtu(text: &str) -> Result<u16, ConfigError> {
    match text.parse() {
        Ok(mtu) if mtu >= MIN_MTU => Ok(mtu),
        _ => Err(ConfigError::Mtu(text.to_owned())),
    }
}

/// Checks each device, and that no two share what only one can have.
///
/// # Errors
/// The first rule that is broken.
pub(super) fn validate(
    disks: &[DiskConfig],
    nets: &[NetConfig],
    others: usize,
) -> Result<(), ConfigError> {
    let count = disks.len() + nets.len() + others;
    if count > MAX_DEVICES {
        return Err(ConfigError::TooManyDevices(count));
    }
    for id in disks.iter().map(|d| &d.id).chain(nets.iter().map(|n| &n.id)) {
        parse_id(id)?;
    }
    for net in nets {
        net.attachment.validate()?;
        net.mtu.map(|mtu| parse_mtu(&mtu.to_string())).transpose()?;
    }
    let ids = disks.iter().map(|d| d.id.clone()).chain(nets.iter().map(|n| n.id.clone()));
    unique("id", ids)?;
    unique("disk", disks.iter().map(|d| d.path.display().to_string()))?;
    let taps = nets.iter().filter_map(|net| net.attachment.tap());
    unique("tap", taps.map(ToOwned::to_owned))?;
    unique("MAC address", nets.iter().map(|n| n.mac.to_string()))
}

fn unique(what: &'static str, values: impl Iterator<Item = String>) -> Result<(), ConfigError> {
    let mut seen = std::collections::HashSet::new();
    for value in values {
        if !seen.insert(value.clone()) {
            return Err(ConfigError::DeviceTwice { what, value });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refused<T: FromStr<Err = ConfigError> + fmt::Debug>(text: &str) -> String {
        text.parse::<T>().unwrap_err().to_string()
    }

    fn net(text: &str) -> NetConfig {
        let NetOptions { id, attachment, mac, mtu } = text.parse().unwrap();
        NetConfig { mac: mac.unwrap_or(Mac::from_names("vm", &id)), id, attachment, mtu }
    }

    #[test]
    fn disks() {
        let disk: DiskConfig = "id=root,path=/d.img".parse().unwrap();
        let want = DiskConfig {
            id: "root".into(),
            path: "/d.img".into(),
            readonly: false,
            cache: CacheMode::Writeback,
        };
        assert_eq!(disk, want);
        let disk: DiskConfig = "readonly,cache=writethrough,path=/d,id=a".parse().unwrap();
        assert!(disk.readonly && disk.cache == CacheMode::Writethrough);
        assert_eq!(refused::<DiskConfig>("path=/d"), "--disk has no id: write id=VALUE");
        assert_eq!(refused::<DiskConfig>("id=a"), "--disk has no path: write path=VALUE");
        assert_eq!(
            refused::<DiskConfig>("id=a,path=/d,size=3"),
            "--disk has no setting \"size\": use id, path, readonly and cache"
        );
        assert_eq!(
            refused::<DiskConfig>("id=a,path=/d,cache=none"),
            "\"none\" is not a cache mode: use writeback, writethrough or unsafe"
        );
        assert_eq!(refused::<DiskConfig>("id=a,path=/d,id=b"), "--disk has id twice");
        assert!(refused::<DiskConfig>("id=a/b,path=/d").contains("has '/' in it"));
        assert!(refused::<DiskConfig>("id=a,path=").contains("empty path"));
        assert!(refused::<DiskConfig>("id=a,path=/d,readonly=x").contains("readonly=x"));
    }

    #[test]
    fn cards() {
        let card: NetOptions = "id=eth0,tap=tap0,mac=52:54:00:12:34:56,mtu=9000".parse().unwrap();
        assert_eq!(card.mac, Some(Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56])));
        assert_eq!(card.mtu, Some(9000));
        assert!(refused::<NetOptions>("id=a,tap=0123456789abcdef").contains("at most 15"));
        assert!(refused::<NetOptions>("id=a,tap=t,mtu=67").contains("68"));
        for mac in ["52:54", "52:54:00:12:34:56:78", "5:54:00:12:34:56", "53:54:00:12:34:56", ""] {
            let text = refused::<NetOptions>(&format!("id=a,tap=t,mac={mac}"));
            assert!(text.starts_with(&format!("{mac:?} is no")), "{text}");
        }
    }

    #[test]
    fn an_address_made_up_depends_on_both_names() {
        let mac = Mac::from_names("a", "b");
        assert_eq!(mac, Mac::from_names("a", "b"));
        assert_ne!(mac, Mac::from_names("ab", ""));
        assert_eq!(mac.to_string().parse(), Ok(mac));
    }

    #[test]
    fn balloons() {
        assert!(!"".parse::<BalloonConfig>().unwrap().deflate_on_oom);
        assert!("deflate-on-oom".parse::<BalloonConfig>().unwrap().deflate_on_oom);
        assert!(refused::<BalloonConfig>("size=4").contains("use deflate-on-oom"));
    }

    #[test]
    fn what_only_one_device_can_have_is_given_once() {
        let disk = |text: &str| text.parse::<DiskConfig>().unwrap();
        let (a, b) = (disk("id=a,path=/a"), disk("id=b,path=/b"));
        let (c, d) = (net("id=c,tap=c"), net("id=d,tap=d"));
        let both = [a.clone(), b.clone()];
        assert_eq!(validate(&both, &[c.clone(), d.clone()], 3), Ok(()));
        let twice = |disks: &[DiskConfig], nets: &[NetConfig]| {
            validate(disks, nets, 0).unwrap_err().to_string()
        };
        let same = DiskConfig { id: "a".into(), ..b.clone() };
        assert_eq!(twice(&[a.clone(), same], &[]), "id a is given to two devices: change one");
        let same = NetConfig { id: "a".into(), ..d.clone() };
        assert_eq!(twice(&both, &[same]), "id a is given to two devices: change one");
        let same = DiskConfig { path: "/a".into(), ..b };
        assert_eq!(twice(&[a, same], &[]), "disk /a is given to two devices: change one");
        let same = NetConfig { attachment: c.attachment.clone(), ..d.clone() };
        assert_eq!(twice(&[], &[c.clone(), same]), "tap c is given to two devices: change one");
        let same = NetConfig { mac: c.mac, ..d };
        assert!(twice(&[], &[c, same]).starts_with("MAC address 52:54:"));
        assert_eq!(validate(&both, &[], 15), Err(ConfigError::TooManyDevices(17)));
    }

    #[test]
    fn a_replacement_names_device_and_backend() {
        let other: Replacement = "root=/x=y.img".parse().unwrap();
        assert_eq!((other.id.as_str(), other.backend.as_str()), ("root", "/x=y.img"));
        for bad in ["root", "root=", "=/x", ""] {
            assert!(bad.parse::<Replacement>().is_err(), "{bad}");
        }
    }
}
