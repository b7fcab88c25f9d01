//! Small numbered datagrams to the guest's echo service at a steady rate, and when each answer came.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{sleep, JoinHandle};
use std::time::{Duration, Instant};

use ::tests::bench::Result;

/// Datagrams that are due leave together, so often.
const TICK: Duration = Duration::from_millis(1);
/// The last answers are over after so long a silence.
const SILENCE: Duration = Duration::from_secs(1);
/// Room for answers while nobody reads, bytes.
const BUFFER: usize = 32 << 20;

/// A stream under way.
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Vec<Instant>>,
    receiver: JoinHandle<Vec<(u64, Instant)>>,
}

/// What became of a stream.
#[derive(Debug, Default)]
pub struct Stream {
    /// When each was sent.
    pub sent: Vec<Instant>,
    /// Numbers of answers and when they came.
    pub answers: Vec<(u64, Instant)>,
}

impl Datagrams {
    /// Begins to send so many per second, from the network of this thread.
    pub fn start(to: SocketAddr, per_second: u64) -> Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(SILENCE))?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (out, halt) = (socket.try_clone()?, Arc::clone(&stop));
        let sender = std::thread::spawn(move || {
            let start = Instant::now();
            let mut sent: Vec<Instant> = Vec::new();
            while !halt.load(Ordering::Relaxed) {
                let due = start.elapsed().as_nanos() as u64 * per_second / 1_000_000_000;
                while (sent.len() as u64) < due {
                    // What cannot be sent counts as lost.
                    let _ = out.send(&(sent.len() as u64).to_le_bytes());
                    sent.push(Instant::now());
                }
                sleep(TICK);
            }
            sent
        });
        let halt = Arc::clone(&stop);
        let receiver = std::thread::spawn(move || receive(&socket, &halt));
        Ok(Self { stop, sender, receiver })
    }

    /// Ends it, and waits for the last answers.
    pub fn finish(self) -> Result<Stream> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.join().map_err(|_| "the sender panicked")?;
        let answers = self.receiver.join().map_err(|_| "the receiver panicked")?;
        Ok(Stream { sent, answers })
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool) -> Vec<(u64, Instant)> {
    let mut answers = Vec::new();
    let mut number = [0; 8];
    loop {
        match socket.recv(&mut number) {
            Ok(8) => answers.push((u64::from_le_bytes(number), Instant::now())),
            // Nobody is there while a guest moves, for one.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            // As long as datagrams are sent, silence is not the end.
            _ if !stop.load(Ordering::Relaxed) => {}
            _ => return answers,
        }
    }
}

impl Stream {
    /// Of those sent from `from` until `to`: how many, how many were not answered, how many more than once.
    pub fn between(&self, from: Instant, to: Instant) -> (u64, u64, u64) {
        let counts = self.counts();
        let theirs = self.sent.iter().zip(&counts);
        theirs.filter(|(at, _)| (from..to).contains(at)).fold(
            (0, 0, 0),
            |(all, lost, twice), one| {
                (all + 1, lost + u64::from(*one.1 == 0), twice + u64::from(*one.1 > 1))
            },
        )
    }

    /// When the first and the last of those was sent that were not answered.
    pub fn lost_at(&self, from: Instant, to: Instant) -> Option<(Instant, Instant)> {
        let counts = self.counts();
        let lost = self
            .sent
            .iter()
            .zip(&counts)
            .filter(|(at, count)| (from..to).contains(at) && **count == 0);
        let mut lost = lost.map(|(at, _)| *at);
        let first = lost.next()?;
        Some((first, lost.next_back().unwrap_or(first)))
    }

    /// How often each was answered.
    fn counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.sent.len()];
        for (number, _) in &self.answers {
            if let Some(count) = counts.get_mut(*number as usize) {
                *count += 1;
            }
        }
        counts
    }

    /// The longest time without an answer from `from` until `to`.
    pub fn silence(&self, from: Instant, to: Instant) -> Duration {
        self.silences(from, to, (from, to))[0].0
    }

    /// The longest times without an answer from `from` until `to`, and when they began: of those that overlap with `stood`,
    /// and of the others.
    pub fn silences(
        &self,
        from: Instant,
        to: Instant,
        stood: (Instant, Instant),
    ) -> [(Duration, Instant); 2] {
        let within = self.answers.iter().map(|(_, at)| *at).filter(|at| (from..to).contains(at));
        let ends = [from].into_iter().chain(within).chain([to]).collect::<Vec<_>>();
        let longest = |overlapping: bool| {
            let overlaps = |pair: &[Instant]| pair[0] <= stood.1 && stood.0 <= pair[1];
            let those = ends.windows(2).filter(|pair| overlaps(pair) == overlapping);
            those.map(|pair| (pair[1] - pair[0], pair[0])).max().unwrap_or((Duration::ZERO, from))
        };
        [true, false].map(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_or_doubled_is_counted_where_it_was_sent() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let stream = Stream {
            sent: vec![at(0), at(10), at(20), at(30)],
            answers: vec![(0, at(1)), (2, at(25)), (2, at(26)), (3, at(31))],
        };
        assert_eq!(stream.between(at(0), at(40)), (4, 1, 1));
        assert_eq!(stream.between(at(0), at(10)), (1, 0, 0));
        assert_eq!(stream.silence(at(0), at(40)), Duration::from_millis(24));
        assert_eq!(stream.silence(at(26), at(60)), Duration::from_millis(29));
        let silences = [(5, 26), (24, 1)].map(|(ms, from)| (Duration::from_millis(ms), at(from)));
        assert_eq!(stream.silences(at(0), at(33), (at(27), at(29))), silences);
    }
}
