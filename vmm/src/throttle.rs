//! vCPUs that may run only a share of the time: a thread makes each rest for a part of every period.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::sandbox::{self, ThreadKind};
use crate::vcpu::Vcpu;

/// A vCPU runs and rests once in it. Short, so that the guest's timers and connections live.
const PERIOD: Duration = Duration::from_millis(10);

/// Slows vCPUs down until it is dropped, or told otherwise.
#[derive(Debug, Default)]
pub struct Throttle {
    active: Mutex<Option<Active>>,
}

#[derive(Debug)]
struct Active {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The share of time that each vCPU may run; empty ends the thread.
    run: Mutex<Vec<f64>>,
    changed: Condvar,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Throttle {
    /// Lets vCPU n run the share `run[n]` of the time; those beyond its end all of it.
    pub fn set(&self, vcpus: &[Arc<Vcpu>], run: &[f64]) {
        let mut active = lock(&self.active);
        if run.iter().all(|share| *share >= 1.0) {
            if let Some(Active { shared, thread }) = active.take() {
                lock(&shared.run).clear();
                shared.changed.notify_all();
                if thread.join().is_err() {
                    tracing::error!("the thread that slows vCPUs down panicked");
                }
            }
            for vcpu in vcpus {
                vcpu.rest(Duration::ZERO);
            }
            return;
        }
        if let Some(active) = active.as_ref() {
            *lock(&active.shared.run) = run.to_vec();
            return;
        }
        let shared = Arc::new(Shared { run: Mutex::new(run.to_vec()), ..Shared::default() });
        let (theirs, vcpus) = (Arc::clone(&shared), vcpus.to_vec());
        let thread = thread::Builder::new().name("throttle".to_owned()).spawn(move || {
            sandbox::enter(ThreadKind::Throttle);
            make_rest(&theirs, &vcpus);
        });
        match thread {
            Ok(thread) => *active = Some(Active { shared, thread }),
            // The migration then does not converge, and says so.
            Err(error) => tracing::warn!(%error, "vCPUs are not slowed down"),
        }
    }
}

fn make_rest(shared: &Shared, vcpus: &[Arc<Vcpu>]) {
    let mut run = lock(&shared.run);
    while !run.is_empty() {
        for (vcpu, share) in vcpus.iter().zip(run.iter()) {
            if *share < 1.0 {
                vcpu.rest(PERIOD.mul_f64(1.0 - share.max(0.0)));
                vcpu.kick();
            }
        }
        run = shared.changed.wait_timeout(run, PERIOD).unwrap_or_else(PoisonError::into_inner).0;
    }
}
