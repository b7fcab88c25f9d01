//! The thread that reads a card's tap while memory of its guest is still on its way.
//!
//! Then the guest may offer no buffers for as long as it waits for a page, and the card's own thread may wait for one
//! itself: longer than the queue of a tap lasts. This thread touches no guest memory.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use super::port::Port;
use super::worker::short_name;
use crate::sandbox::{self, ThreadKind};

const STOP: u64 = 0;
const TAP: u64 = 1;

/// The running thread; it ends with this.
pub(super) struct Backlog {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Backlog {
    /// Has frames of the tap of card `id` wait at `port`; `came` is called when some did.
    pub(super) fn start(
        id: &str,
        port: Arc<Port>,
        came: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        for (fd, mark) in [(stop.as_raw_fd(), STOP), (port.tap().as_raw_fd(), TAP)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, mark))?;
        }
        let thread = std::thread::Builder::new().name(short_name(&format!("tap-{id}"))).spawn(
            move || {
                sandbox::enter(ThreadKind::Card);
                run(&epoll, &port, came);
            },
        )?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that reads a tap panicked");
        }
    }
}

fn run(epoll: &Epoll, port: &Port, came: impl Fn()) {
    let mut ready = [EpollEvent::default(); 2];
    loop {
        let count = match epoll.wait(-1, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "epoll_wait of a tap");
                return;
            }
        };
        for event in &ready[..count] {
            if event.data() == STOP {
                return;
            }
            port.take_in();
            came();
            if event.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) {
                // The tap was deleted; the card's own thread says so.
                return;
            }
        }
    }
}
