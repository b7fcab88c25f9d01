//! Stopping all vCPU threads, and knowing that they stand.
//!
//! One target for all (run, park, exit), one count of those that are parked. A thread looks at
//! the target before each KVM_RUN; a signal whose handler sets `immediate_exit` makes it look.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Target {
    /// Run guest code.
    Run = 0,
    /// Stand still.
    Park = 1,
    /// End.
    Exit = 2,
}

#[derive(Debug)]
struct Inner {
    target: Target,
    parked: usize,
}

/// Shared by all vCPU threads of a VM and whoever controls them.
#[derive(Debug)]
pub struct Gate {
    threads: usize,
    /// Copy of `inner.target`, readable without the lock on the way into KVM_RUN.
    target: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Gate {
    /// A gate for `threads` threads, closed: they park as soon as they come.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self {
            threads,
            target: AtomicU8::new(Target::Park as u8),
            inner: Mutex::new(Inner { target: Target::Park, parked: 0 }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether guest code may be run now.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.target.load(Ordering::Acquire) == Target::Run as u8
    }

    /// Sets the target. `Exit` is final. Who sets `Park` or `Exit` kicks the threads afterwards.
    pub fn set(&self, target: Target) {
        let mut inner = self.lock();
        if inner.target != Target::Exit {
            inner.target = target;
            self.target.store(target as u8, Ordering::Release);
        }
        self.changed.notify_all();
    }

    /// Called by a vCPU thread that found it may not run: parks until it may again (true) or is
    /// to end (false).
    pub fn park(&self) -> bool {
        let mut inner = self.lock();
        inner.parked += 1;
        self.changed.notify_all();
        loop {
            match inner.target {
                Target::Park => {
                    inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                }
                Target::Run => {
                    inner.parked -= 1;
                    return true;
                }
                // Stays counted: a thread that has ended stands still.
                Target::Exit => return false,
            }
        }
    }

    /// Called by a vCPU thread that is to rest: returns after `rest`, or as soon as it is to do anything but run.
    pub fn rest(&self, rest: Duration) {
        let deadline = Instant::now() + rest;
        let mut inner = self.lock();
        while inner.target == Target::Run {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            inner =
                self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all threads are parked or have ended; `kick` is called again now and then
    /// for those that are not. False when the time is over.
    #[must_use]
    pub fn wait_parked(&self, deadline: Instant, kick: impl Fn()) -> bool {
        const KICK_AGAIN: Duration = Duration::from_millis(20);
        let mut inner = self.lock();
        while inner.parked < self.threads {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (guard, waited) = self
                .changed
                .wait_timeout(inner, left.min(KICK_AGAIN))
                .unwrap_or_else(PoisonError::into_inner);
            inner = guard;
            if waited.timed_out() {
                kick();
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::Arc;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn threads_park_run_and_end() {
        let gate = Arc::new(Gate::new(3));
        let turns = Arc::new(AtomicUsize::new(0));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, turns) = (Arc::clone(&gate), Arc::clone(&turns));
                std::thread::spawn(move || loop {
                    if gate.may_run() {
                        turns.fetch_add(1, Ordering::Relaxed);
                    } else if !gate.park() {
                        return;
                    }
                })
            })
            .collect();
        for _ in 0..100 {
            assert!(gate.wait_parked(far(), || {}));
            let before = turns.load(Ordering::Relaxed);
            std::thread::yield_now();
            assert_eq!(turns.load(Ordering::Relaxed), before, "somebody ran while parked");
            gate.set(Target::Run);
            while turns.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            gate.set(Target::Park);
        }
        gate.set(Target::Exit);
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn exit_is_final_and_waiting_ends_in_time() {
        let gate = Gate::new(1);
        gate.set(Target::Exit);
        gate.set(Target::Run);
        assert!(!gate.may_run());
        assert!(!gate.wait_parked(Instant::now(), || {}));
        assert!(!gate.park());
        assert!(gate.wait_parked(Instant::now(), || {}));
    }
}
