//! A stream of numbered datagrams to a guest's echo service and back: what was lost or came twice.

use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{sleep, JoinHandle};
use std::time::{Duration, Instant};

use crate::network::{guest, EVERYBODY};

/// Port of beacon's echo.
const ECHO: u16 = 7;
/// Datagrams that leave together.
const BURST: u64 = 10;
/// The last replies are over after so long a silence.
const SILENCE: Duration = Duration::from_secs(2);
/// Room for replies while nobody reads, bytes.
const BUFFER: usize = 16 << 20;

/// A stream that is under way.
pub struct Numbered {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<(Vec<u8>, Duration)>,
}

/// What became of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    /// Datagrams sent.
    pub sent: u64,
    /// Of those, not answered.
    pub lost: u64,
    /// Of those, answered more than once.
    pub doubled: u64,
    /// The longest time between two answers.
    pub silence: Duration,
}

impl Numbered {
    /// Sends so many datagrams per second to the guest, from [`crate::network::HOST_ADDRESS`]. The guest answers
    /// already.
    ///
    /// # Panics
    /// There is no such network.
    #[must_use]
    pub fn start(per_second: u64) -> Self {
        Self::to(guest(ECHO), per_second)
    }

    /// As [`Numbered::start`], to an address that leads to the guest's echo service.
    ///
    /// # Panics
    /// As [`Numbered::start`].
    #[must_use]
    pub fn to(address: impl ToSocketAddrs, per_second: u64) -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(address).unwrap();
        let to = socket.peer_addr().unwrap();
        Self::stream(socket, to, per_second)
    }

    /// As [`Numbered::start`], to everybody on the guest's network, of whom the guest alone answers.
    ///
    /// # Panics
    /// As [`Numbered::start`].
    #[must_use]
    pub fn to_everybody(per_second: u64) -> Self {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        Self::stream(socket, (EVERYBODY, ECHO).into(), per_second)
    }

    fn stream(socket: UdpSocket, to: SocketAddr, per_second: u64) -> Self {
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (out, halt) = (socket.try_clone().unwrap(), Arc::clone(&stop));
        let sender = std::thread::spawn(move || {
            let start = Instant::now();
            let mut sent = 0;
            while !halt.load(Ordering::Relaxed) {
                for number in sent..sent + BURST {
                    out.send_to(&number.to_le_bytes(), to).unwrap();
                }
                sent += BURST;
                let next = start + Duration::from_nanos(sent * 1_000_000_000 / per_second);
                // The pace of a source of packets.
                sleep(next.saturating_duration_since(Instant::now()));
            }
            sent
        });
        let over = Arc::clone(&stop);
        let receiver = std::thread::spawn(move || receive(&socket, &over));
        Self { stop, sender, receiver }
    }

    /// Ends the stream, and waits for the last answers.
    ///
    /// # Panics
    /// A thread of it did.
    #[must_use]
    pub fn finish(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap();
        let (counts, silence) = self.receiver.join().unwrap();
        let count = |number: u64| counts.get(number as usize).copied().unwrap_or(0);
        Tally {
            sent,
            lost: (0..sent).filter(|number| count(*number) == 0).count() as u64,
            doubled: (0..sent).filter(|number| count(*number) > 1).count() as u64,
            silence,
        }
    }
}

/// How often each number came, and the longest time without any.
fn receive(socket: &UdpSocket, stop: &AtomicBool) -> (Vec<u8>, Duration) {
    let (mut counts, mut silence) = (Vec::new(), Duration::ZERO);
    let mut last = None;
    let mut number = [0; 8];
    loop {
        // Nobody is there while a guest moves, for one.
        match socket.recv(&mut number) {
            Ok(8) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => continue,
            // As long as datagrams are sent, silence is not the end.
            _ if !stop.load(Ordering::Relaxed) => continue,
            _ => return (counts, silence),
        }
        let now = Instant::now();
        silence = silence.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        let at = u64::from_le_bytes(number) as usize;
        if counts.len() <= at {
            counts.resize(at + 1, 0u8);
        }
        counts[at] = counts[at].saturating_add(1);
    }
}
