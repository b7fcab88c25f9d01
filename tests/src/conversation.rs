//! A TCP connection that something is sent over all the time, and comes back.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crate::PATIENCE;

/// Bytes that are sent at once.
const CHUNK: usize = 10_000;

/// A conversation that is under way.
pub struct Conversation {
    stop: Arc<AtomicBool>,
    echoed: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Conversation {
    /// Begins it with who echoes at the other end.
    #[must_use]
    pub fn begin(mut stream: TcpStream) -> Self {
        let (stop, echoed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, count) = (Arc::clone(&stop), Arc::clone(&echoed));
        let thread = std::thread::spawn(move || {
            let mut next = 0_u8;
            while !told.load(Ordering::Acquire) {
                next = next.wrapping_add(1);
                exchange(&mut stream, next);
                count.fetch_add(CHUNK as u64, Ordering::AcqRel);
            }
            stream.shutdown(Shutdown::Both).unwrap();
        });
        Self { stop, echoed, thread }
    }

    /// Waits until it has gone on.
    ///
    /// # Panics
    /// It has not.
    #[track_caller]
    pub fn goes_on(&self) {
        let count = || self.echoed.load(Ordering::Acquire);
        let (before, deadline) = (count(), Instant::now() + PATIENCE);
        while count() < before + 10 * CHUNK as u64 {
            assert!(!self.thread.is_finished(), "the connection broke");
            assert!(Instant::now() < deadline, "the connection stands still");
            std::thread::yield_now();
        }
    }

    /// Ends it.
    ///
    /// # Panics
    /// Something else came back than was sent, or the connection broke.
    #[track_caller]
    pub fn end(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the connection carries what was sent");
    }
}

/// Sends something that `byte` makes, and checks what comes back.
///
/// # Panics
/// It is something else, or nothing.
pub fn exchange(stream: &mut TcpStream, byte: u8) {
    let sent: Vec<u8> = (0..CHUNK).map(|at| byte ^ (at >> 6) as u8).collect();
    stream.write_all(&sent).unwrap();
    let mut back = vec![0; sent.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == sent, "the connection carries something else");
}
