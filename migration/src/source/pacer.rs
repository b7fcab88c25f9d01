//! The bandwidth cap, shared by all page senders; it may change at any time.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How far the senders may be ahead of the cap, so that short waits need not be exact.
const BURST: Duration = Duration::from_millis(5);

#[derive(Debug)]
struct State {
    bytes_per_second: Option<u64>,
    /// When what was taken so far will have been sent at the cap.
    free_at: Instant,
    /// Nobody waits any more: the rest goes at full speed, or not at all.
    released: bool,
}

/// Lets bytes pass at a rate.
#[derive(Debug)]
pub(crate) struct Pacer {
    state: Mutex<State>,
    changed: Condvar,
}

impl Pacer {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        let state = State { bytes_per_second, free_at: Instant::now(), released: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(crate) fn set(&self, bytes_per_second: Option<u64>) {
        self.change(|state| {
            state.bytes_per_second = bytes_per_second;
            // What was taken at the old rate is not held against the new one.
            state.free_at = Instant::now();
        });
    }

    /// From now on nobody waits: the guest is paused, or the migration ends.
    pub(crate) fn release(&self) {
        self.change(|state| state.released = true);
    }

    /// The cap holds again.
    pub(crate) fn restrain(&self) {
        self.change(|state| {
            state.released = false;
            state.free_at = Instant::now();
        });
    }

    /// Waits until `bytes` may be sent. Returns how long that was.
    pub(crate) fn take(&self, bytes: u64) -> Duration {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        let mut now = started;
        loop {
            let rate = match state.bytes_per_second {
                Some(rate) if !state.released => rate.max(1),
                _ => return now - started,
            };
            let early = state.free_at.saturating_duration_since(now);
            if early <= BURST {
                let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
                state.free_at = state.free_at.max(now) + cost.min(Duration::from_secs(3600));
                return now - started;
            }
            let waited = self.changed.wait_timeout(state, early - BURST);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            now = Instant::now();
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_cap_nobody_waits() {
        let pacer = Pacer::new(None);
        for _ in 0..1000 {
            assert!(pacer.take(1 << 40) < Duration::from_secs(1));
        }
    }

    #[test]
    fn a_cap_is_waited_for_and_its_end_wakes_the_waiting() {
        let pacer = Pacer::new(Some(1));
        pacer.take(1 << 20);
        std::thread::scope(|scope| {
            // At one byte per second this would wait for twelve days.
            let waiting = scope.spawn(|| pacer.take(1));
            pacer.set(Some(u64::MAX));
            waiting.join().expect("the sender does not panic");
            pacer.set(Some(1));
            pacer.take(1 << 20);
            let waiting = scope.spawn(|| pacer.take(1));
            pacer.release();
            waiting.join().expect("the sender does not panic");
        });
    }
}
