//! The frozen state of the block device.

use serde::{Deserialize, Serialize};

use super::{Block, BlockBackend, ID_BYTES};
use crate::{Persist, PersistError};

/// State of a block device, version 1: what its driver knows of the disk. What is on the disk is
/// not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size of the disk, sectors of 512 bytes.
    pub sectors: u64,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Its id.
    pub id: [u8; ID_BYTES],
}

impl<B: BlockBackend> Persist for Block<B> {
    const KIND: &'static str = "virtio-block";
    const VERSION: u16 = 1;
    type State = BlockState;
    type Error = PersistError;

    fn save(&self) -> Result<BlockState, PersistError> {
        Ok(BlockState {
            sectors: self.sectors(),
            read_only: self.backend.is_read_only(),
            id: self.id,
        })
    }

    fn restore(&mut self, state: &BlockState) -> Result<(), PersistError> {
        let invalid = |reason| PersistError::Invalid { kind: Self::KIND, reason };
        let here = self.sectors();
        if state.sectors != here {
            let saved = state.sectors;
            return Err(invalid(format!(
                "the guest knows a disk of {saved} sectors, the one here has {here}: is it another?"
            )));
        }
        if state.read_only != self.backend.is_read_only() {
            let was = if state.read_only { "read-only" } else { "writable" };
            return Err(invalid(format!("the disk was {was}: configure it so here")));
        }
        self.id = state.id;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::test_utils::*;
    use super::super::Cache;
    use super::*;
    use crate::Payload;

    #[test]
    fn version_1_still_decodes() {
        let mut data = vec![251, 0, 1, 0];
        data.extend(*b"disk-0");
        data.extend([0; 14]);
        let payload = Payload { kind: "virtio-block".into(), instance: 0, version: 1, data };
        let mut block = block(RamDisk::new(256));
        assert_eq!(block.save_payload(0).unwrap(), payload);
        block.restore_payload(&payload).unwrap();
    }

    #[test]
    fn another_disk_is_refused() {
        let state = block(RamDisk::new(256)).save().unwrap();
        let error = block(RamDisk::new(255)).restore(&state).unwrap_err().to_string();
        assert!(error.contains("256 sectors, the one here has 255"), "{error}");
        let read_only = RamDisk { read_only: true, ..RamDisk::new(256) };
        let error = block(read_only).restore(&state).unwrap_err().to_string();
        assert!(error.contains("was writable"), "{error}");
    }

    #[test]
    fn the_id_follows_the_guest() {
        let state = block(RamDisk::new(256)).save().unwrap();
        let mut there = Block::new(RamDisk::new(256), "other", Cache::Writeback);
        there.restore(&state).unwrap();
        assert_eq!(&there.id[..7], b"disk-0\0");
    }
}
