//! The thread of one device: waits for its queues and its backend.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::virtio::{QueueNotifier, VirtioControl};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::sandbox::{self, ThreadKind};

/// How long a thread may take to end. One that hangs in its backend is left behind.
const END: Duration = Duration::from_secs(2);

/// Longest name of a thread that Linux shows (TASK_COMM_LEN), bytes.
const MAX_NAME: usize = 15;

/// What Linux shows of the name of a thread.
pub(super) fn short_name(name: &str) -> String {
    name.chars().take(MAX_NAME).collect()
}

/// The notifications of a device: one eventfd for each queue.
pub(super) struct Kicks(Vec<EventFd>);

impl Kicks {
    pub(super) fn new(queues: usize) -> io::Result<Self> {
        Ok(Self((0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?))
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        (0..).zip(&self.0)
    }
}

impl QueueNotifier for Kicks {
    fn notify(&self, index: usize) {
        if let Some(kick) = self.0.get(index) {
            // Full only after 2^64 notifications, and then it is readable.
            let _ = kick.write(1);
        }
    }
}

/// What else a device waits for: a descriptor that becomes readable.
pub(super) struct Backend {
    pub(super) fd: OwnedFd,
    /// The queue whose notification makes waiting worth while again after `ready` gave it up.
    pub(super) queue: usize,
    /// Takes what is there. False when waiting for more is of no use for now.
    pub(super) ready: Box<dyn FnMut() -> bool + Send>,
    /// Does what is due by now, and tells when it is to be called at the latest; also called whenever the
    /// thread wakes.
    pub(super) timer: Box<dyn FnMut(Instant) -> Option<Instant> + Send>,
}

/// The running thread.
pub(super) struct Worker {
    stop: EventFd,
    ended: mpsc::Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn start(
        name: &str,
        control: Arc<dyn VirtioControl>,
        kicks: Arc<Kicks>,
        backend: Option<Backend>,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let events = Events::new(&kicks, &stop, backend.as_ref())?;
        let (ending, ended) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name(short_name(name)).spawn(move || {
            sandbox::enter(ThreadKind::of_device(control.name()));
            run(events, &*control, &kicks, backend);
            // Tells `stop` by being dropped.
            drop(ending);
        })?;
        Ok(Self { stop, ended, thread: Some(thread) })
    }

    /// Ends the thread, if it does not hang.
    pub(super) fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let _ = self.stop.write(1);
        let name = thread.thread().name().unwrap_or_default().to_owned();
        match self.ended.recv_timeout(END) {
            Err(mpsc::RecvTimeoutError::Disconnected) if thread.join().is_ok() => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                tracing::error!(thread = name, "the thread of a device panicked");
            }
            _ => tracing::warn!(thread = name, "a device's backend is stuck; it is left behind"),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Marks of descriptors; queues have their numbers.
const STOP: u64 = u64::MAX;
const BACKEND: u64 = u64::MAX - 1;

struct Events {
    epoll: Epoll,
    backend: Option<RawFd>,
}

impl Events {
    fn new(kicks: &Kicks, stop: &EventFd, backend: Option<&Backend>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, mark| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, mark))
        };
        add(stop.as_raw_fd(), STOP)?;
        for (index, kick) in kicks.fds() {
            add(kick.as_raw_fd(), index.into())?;
        }
        let backend = backend.map(|backend| backend.fd.as_raw_fd());
        if let Some(fd) = backend {
            add(fd, BACKEND)?;
        }
        Ok(Self { epoll, backend })
    }

    /// Never waits for the backend again. To wait for nothing of it is not enough once it is gone:
    /// errors and hang-ups are reported unasked, over and over.
    fn forget_backend(&mut self) {
        let Some(fd) = self.backend.take() else { return };
        if let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()) {
            tracing::error!(%error, "epoll_ctl of a device's backend");
        }
    }

    /// Waits for the backend, or does not.
    fn watch_backend(&self, watch: bool) {
        let Some(fd) = self.backend else { return };
        let set = if watch { EventSet::IN } else { EventSet::empty() };
        let event = EpollEvent::new(set, BACKEND);
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            tracing::error!(%error, "epoll_ctl of a device's backend");
        }
    }
}

fn run(
    mut events: Events,
    control: &dyn VirtioControl,
    kicks: &Kicks,
    mut backend: Option<Backend>,
) {
    let mut ready = [EpollEvent::default(); 8];
    let mut watching = true;
    loop {
        let due = backend.as_mut().and_then(|backend| (backend.timer)(Instant::now()));
        let count = match events.epoll.wait(due.map_or(-1, millis_until), &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, device = control.name(), "epoll_wait");
                return;
            }
        };
        for event in &ready[..count] {
            match (event.data(), &mut backend) {
                (STOP, _) => return,
                (BACKEND, Some(found)) => {
                    watching = (found.ready)();
                    if event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) {
                        // A tap that was deleted, for one.
                        tracing::warn!(device = control.name(), "the backend is gone");
                        events.forget_backend();
                    } else if !watching {
                        events.watch_backend(false);
                    }
                }
                (BACKEND, None) => {}
                (queue, backend) => {
                    // At most the number of queues.
                    let queue = queue as usize;
                    if let Some(kick) = kicks.0.get(queue) {
                        // Before the look at the queue: what comes after it is a new event.
                        let _ = kick.read();
                    }
                    control.process_queue(queue);
                    let of_backend = backend.as_ref().is_some_and(|b| b.queue == queue);
                    if of_backend && !watching {
                        watching = true;
                        events.watch_backend(true);
                    }
                }
            }
        }
    }
}

/// Whole milliseconds until then, rounded up: to wake too early would be to look in vain.
fn millis_until(at: Instant) -> i32 {
    let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
    i32::try_from(left).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Receiver, Sender};

    use devices::virtio::mmio::QuiesceError;
    use devices::{Payload, PersistError};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// Tells of every queue that is looked at.
    struct Looks(Sender<usize>);

    impl VirtioControl for Looks {
        fn name(&self) -> &'static str {
            "looks"
        }
        fn queue_count(&self) -> usize {
            2
        }
        fn process_queue(&self, index: usize) {
            self.0.send(index).unwrap();
        }
        fn begin_quiesce(&self) {}
        fn quiesce(&self, _: Instant) -> Result<(), QuiesceError> {
            Ok(())
        }
        fn resume(&self) {}
        fn raise_pending(&self) {}
        fn migration_blocker(&self) -> Option<String> {
            None
        }
        fn save_device(&self, _: u32) -> Result<Payload, PersistError> {
            unreachable!()
        }
        fn restore_device(&self, _: &Payload) -> Result<(), PersistError> {
            unreachable!()
        }
    }

    struct Running {
        worker: Worker,
        kicks: Arc<Kicks>,
        looks: Receiver<usize>,
    }

    impl Running {
        fn start(backend: Option<Backend>) -> Self {
            let (sender, looks) = mpsc::channel();
            let kicks = Arc::new(Kicks::new(2).unwrap());
            let control = Arc::new(Looks(sender));
            let worker = Worker::start("looks", control, Arc::clone(&kicks), backend).unwrap();
            Self { worker, kicks, looks }
        }

        /// Notifies of queue `index` and waits until it was looked at.
        fn kick(&self, index: usize) {
            self.kicks.notify(index);
            assert_eq!(self.looks.recv_timeout(PATIENCE).unwrap(), index);
        }
    }

    /// A backend that takes a byte at a time and tells of each call; `more` is what it answers.
    fn bytes(more: bool) -> (Backend, [UnixStream; 2], Receiver<Option<u8>>) {
        let (near, far) = UnixStream::pair().unwrap();
        // As with a card: its backend is open in the device as well.
        let of_device = near.try_clone().unwrap();
        let (sender, taken) = mpsc::channel();
        let mut source = near.try_clone().unwrap();
        source.set_nonblocking(true).unwrap();
        let ready = move || {
            let mut byte = [0];
            let read = source.read(&mut byte).ok().filter(|read| *read > 0);
            sender.send(read.map(|_| byte[0])).unwrap();
            more
        };
        let timer = Box::new(|_| None);
        (
            Backend { fd: near.into(), queue: 1, ready: Box::new(ready), timer },
            [far, of_device],
            taken,
        )
    }

    #[test]
    fn every_notification_is_followed_by_a_look() {
        let mut running = Running::start(None);
        for round in 0..1000 {
            running.kick(round % 2);
        }
        running.worker.stop();
        assert!(running.looks.try_recv().is_err(), "and by no other");
    }

    #[test]
    fn a_backend_that_was_given_up_is_waited_for_after_a_notification_of_its_queue() {
        let (backend, [mut far, _of_device], taken) = bytes(false);
        let running = Running::start(Some(backend));
        far.write_all(b"ab").unwrap();
        assert_eq!(taken.recv_timeout(PATIENCE).unwrap(), Some(b'a'));
        running.kick(0);
        running.kick(0);
        assert!(taken.try_recv().is_err(), "nobody can take more");
        running.kick(1);
        assert_eq!(taken.recv_timeout(PATIENCE).unwrap(), Some(b'b'));
    }

    #[test]
    fn a_backend_that_has_more_is_called_again() {
        let (backend, [mut far, _of_device], taken) = bytes(true);
        let _running = Running::start(Some(backend));
        far.write_all(b"abc").unwrap();
        for byte in *b"abc" {
            assert_eq!(taken.recv_timeout(PATIENCE).unwrap(), Some(byte));
        }
    }

    #[test]
    fn a_backend_that_is_gone_is_forgotten_and_the_queues_are_not() {
        for more in [true, false] {
            let (backend, [far, _of_device], taken) = bytes(more);
            let running = Running::start(Some(backend));
            drop(far);
            assert_eq!(taken.recv_timeout(PATIENCE).unwrap(), None);
            for round in 0..100 {
                running.kick(round % 2);
            }
            // An event of before may have been on its way.
            assert!(taken.try_iter().count() <= 1, "called over and over");
        }
    }

    #[test]
    fn what_is_due_is_done_without_a_notification() {
        let (mut backend, _ends, _taken) = bytes(true);
        let (sender, calls) = mpsc::channel();
        let start = Instant::now();
        let mut left = 3;
        backend.timer = Box::new(move |now| {
            sender.send(now).unwrap();
            left -= 1;
            (left > 0).then(|| now + Duration::from_millis(5))
        });
        let _running = Running::start(Some(backend));
        let times: Vec<_> = (0..3).map(|_| calls.recv_timeout(PATIENCE).unwrap()).collect();
        assert!(times[0] >= start);
        assert!(
            times.windows(2).all(|two| two[1] - two[0] >= Duration::from_millis(5)),
            "{times:?}"
        );
    }
}
