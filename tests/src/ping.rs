//! Echo requests to a guest, one after the other.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{sleep, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{set_socket_timeout, Timeout};
use rustix::net::{
    connect, ipproto, recv, send, socket_with, AddressFamily, RecvFlags, SendFlags, SocketFlags,
    SocketType,
};

use crate::network::guest;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Time between an answer and the next request.
const PACE: Duration = Duration::from_millis(10);
/// An answer that has not come after so long does not come any more.
const LOST: Duration = Duration::from_secs(5);

/// Echo requests that are under way.
pub struct Pings {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Answers>,
}

/// What became of echo requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Answers {
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that were not.
    pub lost: u64,
}

impl Pings {
    /// Begins, from this thread's network.
    ///
    /// # Panics
    /// Without the right to, or without a way there.
    #[must_use]
    pub fn start() -> Self {
        let flags = SocketFlags::CLOEXEC;
        let icmp = Some(ipproto::ICMP);
        let socket = socket_with(AddressFamily::INET, SocketType::RAW, flags, icmp).unwrap();
        let to: IpAddr = guest(0).0.parse().unwrap();
        connect(&socket, &SocketAddr::new(to, 0)).unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(LOST)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let halt = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut answers = Answers::default();
            while !halt.load(Ordering::Relaxed) {
                let number = (answers.answered + answers.lost) as u16;
                send(&socket, &request(number), SendFlags::empty()).unwrap();
                if is_answered(&socket, number) {
                    answers.answered += 1;
                } else {
                    answers.lost += 1;
                }
                sleep(PACE);
            }
            answers
        });
        Self { stop, thread }
    }

    /// Ends it.
    ///
    /// # Panics
    /// The thread did.
    #[track_caller]
    #[must_use]
    pub fn finish(self) -> Answers {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Waits for the answer to a request.
fn is_answered(socket: &OwnedFd, number: u16) -> bool {
    let deadline = Instant::now() + LOST;
    let mut packet = [0; 2048];
    while Instant::now() < deadline {
        // A host without a guest says so.
        let Ok((length, _)) = recv(socket, &mut packet, RecvFlags::empty()) else { continue };
        if is_reply(&packet[..length], number) {
            return true;
        }
    }
    false
}

/// An echo request with this sequence number (RFC 792).
fn request(number: u16) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = ECHO_REQUEST;
    packet[6..8].copy_from_slice(&number.to_be_bytes());
    packet[8..].copy_from_slice(b"minivmm ");
    let words = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

/// Whether an IPv4 packet is the answer to the request of this number.
fn is_reply(packet: &[u8], number: u16) -> bool {
    let header = packet.first().map_or(0, |byte| usize::from(byte & 0xf) * 4);
    let from =
        packet.get(12..16).map(|bytes| Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]));
    let reply = packet.get(header..).filter(|reply| reply.len() == 16);
    from.is_some_and(|from| from.to_string() == guest(0).0)
        && reply.is_some_and(|reply| {
            reply[0] == ECHO_REPLY
                && reply[6..8] == number.to_be_bytes()
                && reply[8..] == *b"minivmm "
        })
}
