//! The control queue (virtio 1.2, section 5.1.6.5): class, command, data; then the answer.

use vm_memory::GuestMemory;

use super::device::{Net, CONTROL};
use super::NetBackend;
use crate::virtio::{Chain, DeviceError};

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Class and command by which the guest says that it announced itself.
const ANNOUNCE_ACK: [u8; 2] = [3, 0];

impl<B: NetBackend> Net<B> {
    pub(super) fn control<M: GuestMemory>(
        &mut self,
        chain: &Chain<'_, M>,
    ) -> Result<u32, DeviceError> {
        let broken = |reason: &str| DeviceError::Request { index: CONTROL, reason: reason.into() };
        let command: [u8; 2] =
            chain.readable.array(0).ok_or_else(|| broken("a command without its number"))?;
        let answer = match command {
            ANNOUNCE_ACK if self.announce_wanted => {
                self.announce_wanted = false;
                self.metrics.announcements.increment();
                OK
            }
            ANNOUNCE_ACK => OK,
            _ => ERROR,
        };
        if chain.writable.copy_from(0, &[answer]) != 1 {
            return Err(broken("a command without room for its answer"));
        }
        Ok(1)
    }
}
