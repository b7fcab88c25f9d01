//! What is true of a VM's backends now, for the destination to compare with its own.

use devices::virtio::block::{BlockBackend, DiskFile};
use devices::{Payload, Persist, PersistError};
use migration::stream::Config;
use serde::{Deserialize, Serialize};

use crate::config::VmConfig;
use crate::identity::plain_payload;

/// Backends, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourcesV1 {
    disks: Vec<DiskV1>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DiskV1 {
    id: String,
    bytes: u64,
}

plain_payload!(ResourcesV1, "resources", 1);

impl ResourcesV1 {
    /// Those of a VM of this host.
    pub(super) fn of(config: &VmConfig) -> Result<Self, String> {
        let disks = config.disks.iter().map(|disk| {
            let file = DiskFile::open(&disk.path, true).map_err(|error| error.to_string())?;
            Ok(DiskV1 { id: disk.id.clone(), bytes: file.size() })
        });
        Ok(Self { disks: disks.collect::<Result<_, String>>()? })
    }

    pub(super) fn encode(&self) -> Result<Config, PersistError> {
        let Payload { version, data, .. } = self.save_payload(0)?;
        Ok(Config { version, data })
    }

    /// All that differs from the disks that `config` names here.
    pub(super) fn differences(&self, config: &VmConfig) -> Vec<String> {
        let mut reasons = Vec::new();
        for disk in &config.disks {
            let file = match DiskFile::open(&disk.path, disk.readonly) {
                Ok(file) => file,
                Err(error) => {
                    reasons.push(format!("disk {}: {error}", disk.id));
                    continue;
                }
            };
            let theirs = self.disks.iter().find(|other| other.id == disk.id);
            let bytes = theirs.map(|disk| disk.bytes);
            if bytes != Some(file.size()) {
                let there = bytes.map_or("not there".to_owned(), |bytes| format!("{bytes} bytes"));
                let (id, path, here) = (&disk.id, disk.path.display(), file.size());
                reasons.push(format!(
                    "disk {id}: {path} has {here} bytes, the disk at the source {there}: it is \
                     not the same disk"
                ));
            }
        }
        reasons
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{HostLimits, RunOptions};

    fn config(path: &std::path::Path) -> VmConfig {
        let disk = format!("id=a,path={}", path.display());
        let options = RunOptions { disks: vec![disk.parse().unwrap()], ..RunOptions::default() };
        options.finish(HostLimits { memory: u64::MAX }, "x").unwrap().vm
    }

    #[test]
    fn another_disk_is_named() {
        let temp = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = temp.as_path().join("a");
        std::fs::write(&path, [0; 1024]).unwrap();
        let config = config(&path);
        let resources = ResourcesV1::of(&config).unwrap();
        let encoded = resources.encode().unwrap();
        assert_eq!(ResourcesV1::decode(encoded.version, encoded.data).unwrap(), resources);
        assert!(resources.differences(&config).is_empty());
        std::fs::write(&path, [0; 2048]).unwrap();
        let text = resources.differences(&config).join("");
        assert!(text.contains("has 2048 bytes, the disk at the source 1024 bytes"), "{text}");
        std::fs::remove_file(&path).unwrap();
        assert!(resources.differences(&config)[0].starts_with("disk a: cannot open"));
        assert!(ResourcesV1::of(&config).is_err());
    }
}
