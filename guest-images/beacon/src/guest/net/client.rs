//! Numbered datagrams to an echo service, to see what the network loses and for how long.
//!
//! ```text
//! datagram: "beacon\0\0", number (8 bytes, little-endian), TSC when it was sent (8 bytes)
//! ```

use beacon_core::memory::FreeRam;
use beacon_core::pacer::Pacer;
use beacon_core::replies::{Replies, Sent, REMEMBERED};
use beacon_core::time::TscScale;
use smoltcp::socket::udp;
use smoltcp::wire::IpEndpoint;

use crate::phys;

/// The port that it sends from.
pub const PORT: u16 = 40007;
const MAGIC: [u8; 8] = *b"beacon\0\0";
const LENGTH: usize = 24;
/// A datagram without an answer for this long is lost, until one comes.
const LOST_US: u64 = 1_000_000;
/// Answers that are taken in a turn.
const ANSWERS: usize = 16;

/// The client.
pub struct Client {
    to: IpEndpoint,
    pacer: Pacer,
    timeout: u64,
    /// What became of what was sent.
    pub replies: Replies,
}

impl Client {
    /// Sends `rate` datagrams per second to `to`.
    pub fn new(ram: &mut FreeRam, to: IpEndpoint, rate: u64, scale: TscScale) -> Option<Self> {
        // SAFETY: zero is valid: nothing was sent.
        #[allow(unsafe_code)]
        let table = unsafe { phys::allocate::<Sent>(ram, REMEMBERED)? };
        let second = scale.ticks_of_micros(1_000_000);
        Some(Self {
            to,
            pacer: Pacer::new(Some(rate), second),
            timeout: scale.ticks_of_micros(LOST_US),
            replies: Replies::new(table),
        })
    }

    /// One turn.
    pub fn turn(&mut self, socket: &mut udp::Socket, now: u64, elapsed: u64) {
        for _ in 0..ANSWERS {
            let Ok((data, _)) = socket.recv() else { break };
            let number = data.get(8..16).and_then(|bytes| bytes.try_into().ok());
            match number {
                Some(number) if data.len() == LENGTH && data[..8] == MAGIC => {
                    self.replies.reply(u64::from_le_bytes(number), now);
                }
                _ => self.replies.strays += 1,
            }
        }
        self.replies.expire(now, self.timeout);
        self.pacer.pass(elapsed);
        if self.pacer.due() && socket.can_send() {
            self.pacer.spend();
            let number = self.replies.send(now);
            let mut datagram = [0; LENGTH];
            datagram[..8].copy_from_slice(&MAGIC);
            datagram[8..16].copy_from_slice(&number.to_le_bytes());
            datagram[16..].copy_from_slice(&now.to_le_bytes());
            // It has room, and the endpoint is one.
            let _ = socket.send_slice(&datagram, self.to);
        }
    }
}
