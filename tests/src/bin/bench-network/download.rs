//! A TCP download from the guest, checked byte by byte: when how much of it came.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::tests::bench::{Result, LIMIT};
use rustix::net::sockopt::set_socket_recv_buffer_size;

/// Length of a bin of throughput.
pub const BIN: Duration = Duration::from_millis(10);
/// A rate is that of so many bins.
const RATE_BINS: usize = 5;
/// The share of the rate before that counts as back.
const BACK: f64 = 0.9;
/// Bytes that are read at once.
const BLOCK: usize = 256 << 10;

/// A download under way.
pub struct Download {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::result::Result<Vec<(Instant, usize)>, String>>,
}

/// A download that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Course {
    /// Bytes in each bin, from the begin on.
    pub bins: Vec<u64>,
    /// The bin of the order to migrate.
    pub order: usize,
    /// Bytes per second before it.
    pub before: f64,
    /// The longest time without a byte after it.
    pub silence: Duration,
    /// From the begin of that until the rate was back; `None` if it never was.
    pub back: Option<Duration>,
}

impl Download {
    /// Begins it, from the network of this thread; with so large a receive buffer, bytes, or what the kernel thinks best.
    pub fn start(from: SocketAddr, buffer: Option<usize>) -> Result<Self> {
        let mut stream = TcpStream::connect(from)?;
        if let Some(buffer) = buffer {
            set_socket_recv_buffer_size(&stream, buffer)?;
        }
        stream.set_read_timeout(Some(LIMIT))?;
        let stop = Arc::new(AtomicBool::new(false));
        let halt = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (mut came, mut block, mut offset) = (Vec::new(), vec![0; BLOCK], 0);
            while !halt.load(Ordering::Relaxed) {
                let length = match stream.read(&mut block) {
                    Ok(0) => return Err("the guest closed the connection".to_owned()),
                    Ok(length) => length,
                    Err(error) => return Err(format!("the connection broke: {error}")),
                };
                came.push((Instant::now(), length));
                if !block[..length].iter().zip(offset..).all(|(byte, n)| *byte == generated(n)) {
                    return Err(format!("wrong bytes from {offset} on"));
                }
                offset += length as u64;
            }
            Ok(came)
        });
        Ok(Self { stop, thread })
    }

    /// Ends it; the order to migrate was given at `order`.
    pub fn finish(self, order: Instant) -> Result<Course> {
        self.stop.store(true, Ordering::Relaxed);
        let came = self.thread.join().map_err(|_| "the reader panicked")??;
        course(&came, order).ok_or_else(|| "nothing came before the migration".into())
    }
}

/// What beacon's generator sends.
fn generated(offset: u64) -> u8 {
    (offset ^ offset >> 8 ^ offset >> 16) as u8
}

fn course(came: &[(Instant, usize)], order: Instant) -> Option<Course> {
    let begin = came.first()?.0;
    let bin = |at: Instant| ((at - begin).as_nanos() / BIN.as_nanos()) as usize;
    let mut bins = vec![0; bin(came.last()?.0) + 1];
    came.iter().for_each(|(at, length)| bins[bin(*at)] += *length as u64);
    let order_bin = bin(order);
    // The first bins are those of a connection that gathers speed.
    let steady = bins.get(order_bin / 2..order_bin).filter(|steady| !steady.is_empty())?;
    let before = steady.iter().sum::<u64>() as f64 / steady.len() as f64 / BIN.as_secs_f64();
    let after: Vec<Instant> = came.iter().map(|(at, _)| *at).filter(|at| *at >= order).collect();
    let pairs = after.windows(2).map(|pair| (pair[1] - pair[0], pair[0]));
    let (silence, from) = pairs.max_by_key(|(length, _)| *length)?;
    let until = from + silence;
    let back = (bin(until)..bins.len()).find(|first| {
        let window = bins.get(*first..first + RATE_BINS);
        window.is_some_and(|window| {
            let rate = window.iter().sum::<u64>() as f64 / window.len() as f64 / BIN.as_secs_f64();
            rate >= BACK * before
        })
    });
    let back = back.map(|first| (begin + BIN * first as u32).max(until) - from);
    Some(Course { bins, order: order_bin, before, silence, back })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_course_tells_the_gap_and_when_the_rate_is_back() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        // 100 bytes per bin; nothing from 400 to 450 ms; less than half the rate until 500 ms.
        let reads = (0..90).filter(|n| !(41..45).contains(n));
        let rate = |n| if (45..50).contains(&n) { 40 } else { 100 };
        let came: Vec<(Instant, usize)> = reads.map(|n| (at(n * 10), rate(n))).collect();
        let course = course(&came, at(300)).unwrap();
        assert_eq!((course.order, course.before), (30, 10_000.0));
        assert_eq!(course.silence, Duration::from_millis(50));
        assert_eq!(course.back, Some(Duration::from_millis(100)));
        let never = super::course(&came[..46], at(300)).unwrap();
        assert_eq!(never.back, None);
    }
}
