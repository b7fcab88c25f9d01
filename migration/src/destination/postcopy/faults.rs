//! The thread that reads page faults and asks the source for pages.
//!
//! It touches no memory of the guest, and waits for nothing but faults and the room to send a request; whoever brings
//! pages is another thread. So a page that is missing can hold up the guest only.

use std::io::BufWriter;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};

use crate::address::PageRange;
use crate::destination::postcopy::arrivals::Arrivals;
use crate::stream::pages::MAX_REQUEST_RUNS;
use crate::stream::{encode_runs, RecordType, RecordWriter, StreamError};
use crate::transport::{Stream, Transport};
use crate::vm::VmError;

/// What goes out on the connection for requests, and the connection.
type Out = (RecordWriter<BufWriter<Stream>>, Arc<dyn Transport>);

/// The way to the source for requests; there is none while the connection is lost.
#[derive(Default)]
pub(in crate::destination) struct Requests {
    out: Mutex<Option<Out>>,
}

impl Requests {
    /// Asks for these pages. What cannot be sent is asked for again when there is a connection.
    pub(super) fn ask(&self, pages: &[PageRange]) {
        let mut out = self.out();
        let Some((writer, transport)) = out.as_mut() else { return };
        let sent = pages.chunks(MAX_REQUEST_RUNS).try_for_each(|runs| send(writer, runs));
        if let Err(error) = sent {
            tracing::info!(%error, "pages cannot be asked for");
            // Who reads from it notices.
            transport.shutdown();
            *out = None;
        }
    }

    /// From now on requests go out here.
    pub(in crate::destination) fn connect(
        &self,
        writer: RecordWriter<BufWriter<Stream>>,
        transport: Arc<dyn Transport>,
    ) {
        transport.hurry();
        *self.out() = Some((writer, transport));
    }

    pub(super) fn disconnect(&self) {
        if let Some((_, transport)) = self.out().take() {
            transport.shutdown();
        }
    }

    fn out(&self) -> MutexGuard<'_, Option<Out>> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send(out: &mut RecordWriter<BufWriter<Stream>>, runs: &[PageRange]) -> Result<(), StreamError> {
    let mut table = Vec::new();
    encode_runs(runs, &mut table);
    out.write(RecordType::Request, &[&table])?;
    out.flush()
}

/// Ends the thread.
pub(in crate::destination) struct StopFaults(OwnedFd);

impl StopFaults {
    pub(in crate::destination) fn new() -> std::io::Result<Arc<Self>> {
        Ok(Arc::new(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub(in crate::destination) fn stop(&self) {
        // Fails only when it is told already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Sees to faults until it is told to stop.
pub(in crate::destination) fn serve(arrivals: &Arrivals, requests: &Requests, stop: &StopFaults) {
    if let Err(error) = run(arrivals, requests, stop) {
        // Nobody is helped with a guest that waits for ever: whoever watches sees that nothing comes in.
        tracing::error!(%error, "page faults are no longer served");
    }
}

fn run(arrivals: &Arrivals, requests: &Requests, stop: &StopFaults) -> Result<(), VmError> {
    let mut faults = Vec::new();
    let mut ask = Vec::new();
    loop {
        let mut ready =
            [PollFd::new(arrivals.userfault(), PollFlags::IN), PollFd::new(&stop.0, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                let what = "waiting for page faults".to_owned();
                return Err(VmError::Os { what, error: error.into() });
            }
        }
        if !ready[1].revents().is_empty() {
            return Ok(());
        }
        arrivals.userfault().faults(&mut faults)?;
        let now = Instant::now();
        for fault in faults.drain(..) {
            arrivals.fault(fault, now, &mut ask)?;
        }
        if !ask.is_empty() {
            requests.ask(&ask);
            ask.clear();
        }
    }
}
