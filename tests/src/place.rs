//! Network namespaces of tests that live beside each other, and wires between them.

use std::sync::mpsc::{self, Sender};

use crate::network::{in_private_network, ip};
use crate::PATIENCE;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread in it. Both end when it is dropped, and with them the processes that were
/// started there.
pub struct Place {
    thread: String,
    jobs: Sender<Job>,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// An empty one.
    ///
    /// # Panics
    /// No namespace can be made.
    #[must_use]
    pub fn new() -> Self {
        let (jobs, work) = mpsc::channel::<Job>();
        let (told, name) = mpsc::channel();
        std::thread::spawn(move || {
            in_private_network(move || {
                told.send(rustix::thread::gettid().as_raw_nonzero().to_string()).unwrap();
                work.into_iter().for_each(|job| job());
            })
        });
        Self { thread: name.recv_timeout(PATIENCE).unwrap(), jobs }
    }

    /// Does `work` in the namespace.
    ///
    /// # Panics
    /// `work` does, or takes longer than anything may.
    #[track_caller]
    pub fn on<R: Send + 'static>(&self, work: impl FnOnce() -> R + Send + 'static) -> R {
        let (done, result) = mpsc::channel();
        let job = move || drop(done.send(work()));
        self.jobs.send(Box::new(job)).unwrap();
        // Whatever is done there has its own, shorter limit.
        result.recv_timeout(2 * PATIENCE).expect("it failed there")
    }

    /// [`ip`] in the namespace, which does it.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn ip(&self, line: &str) {
        let line = line.to_owned();
        self.on(move || ip(&line.split_whitespace().collect::<Vec<_>>()).unwrap());
    }

    /// A wire from `port` here to `others` of `other`. Both ends are up.
    #[track_caller]
    pub fn wire(&self, port: &str, other: &Self, others: &str) {
        let here = &self.thread;
        other.ip(&format!("link add {others} type veth peer name {port} netns {here}"));
        other.ip(&format!("link set {others} up"));
        self.ip(&format!("link set {port} up"));
    }
}
