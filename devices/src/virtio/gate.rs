//! The gate before a device's work: what quiescing closes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    closed: bool,
    inside: usize,
    /// Threads that wait until nobody is inside.
    waiting: usize,
}

/// Lets threads work on a device until it is closed; closing waits for those inside.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    left: Condvar,
    /// The same as `state.closed`, for who is inside and asks between two requests.
    closing: AtomicBool,
}

impl Gate {
    /// Goes inside, unless the gate is closed.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.inside += 1;
        Some(Inside(self))
    }

    /// Closes the gate and waits for nobody.
    pub(super) fn begin_close(&self) {
        self.lock().closed = true;
        self.closing.store(true, Ordering::Relaxed);
    }

    /// Closes the gate and waits until nobody is inside. False when somebody still is at
    /// `deadline`: the gate is closed all the same.
    pub(super) fn close(&self, deadline: Instant) -> bool {
        self.begin_close();
        let mut state = self.lock();
        state.waiting += 1;
        while state.inside > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.left.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waiting -= 1;
        state.inside == 0
    }

    pub(super) fn open(&self) {
        self.lock().closed = false;
        self.closing.store(false, Ordering::Relaxed);
    }

    /// Whether somebody wants everybody out.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody is inside for as long as this lives.
pub(super) struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        // A system call, even where nobody waits: for each look at a queue that is too much.
        if state.waiting > 0 {
            self.0.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn nobody_enters_a_closed_gate() {
        let gate = Gate::default();
        assert!(gate.enter().is_some());
        assert!(gate.close(Instant::now()));
        assert!(gate.enter().is_none() && gate.is_closing());
        gate.open();
        assert!(gate.enter().is_some() && !gate.is_closing());
    }

    #[test]
    fn closing_waits_for_those_inside_and_no_longer_than_it_may() {
        let gate = Gate::default();
        let inside = gate.enter().unwrap();
        assert!(!gate.close(Instant::now()));
        assert!(gate.enter().is_none(), "closed all the same");

        std::thread::scope(|scope| {
            let (send, receive) = mpsc::channel();
            let closer = &gate;
            scope.spawn(move || {
                send.send(closer.close(Instant::now() + Duration::from_secs(60))).unwrap();
            });
            assert!(receive.try_recv().is_err());
            drop(inside);
            assert!(receive.recv().unwrap());
        });
    }
}
