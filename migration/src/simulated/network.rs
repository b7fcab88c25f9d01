//! Connections inside one process, which can be cut at any byte.

use std::io::{self, IoSlice};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{mpsc, Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::VolatileSlice;

use crate::transport::{Connector, Listener, Transport};

/// Where a connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Which connection, in the order in which they are made, from 0.
    pub connection: usize,
    /// After so many bytes from the source, or to it.
    pub bytes: u64,
    /// Bytes from the source count, else those to it.
    pub outgoing: bool,
    /// From then on nobody can connect any more.
    pub for_good: bool,
}

/// Something that happens when a connection has carried so many bytes; then they go on.
struct Event {
    at: Cut,
    action: Box<dyn Fn() + Send + Sync>,
    happened: AtomicBool,
}

/// A network with one listener.
pub struct LocalNetwork {
    ends: Mutex<mpsc::Sender<Arc<dyn Transport>>>,
    arrivals: Mutex<mpsc::Receiver<Arc<dyn Transport>>>,
    cut: Mutex<Option<Cut>>,
    event: Mutex<Option<Arc<Event>>>,
    connections: AtomicUsize,
    down: Arc<AtomicBool>,
    /// Bytes from and to the source on each connection.
    counts: Mutex<Vec<Arc<Counts>>>,
}

#[derive(Default)]
struct Counts {
    outgoing: AtomicU64,
    incoming: AtomicU64,
}

impl Default for LocalNetwork {
    fn default() -> Self {
        let (ends, arrivals) = mpsc::channel();
        Self {
            ends: Mutex::new(ends),
            arrivals: Mutex::new(arrivals),
            cut: Mutex::new(None),
            event: Mutex::new(None),
            connections: AtomicUsize::new(0),
            down: Arc::default(),
            counts: Mutex::default(),
        }
    }
}

impl LocalNetwork {
    /// A network on which everything arrives.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cuts a connection that is yet to be made. Connections that nobody has accepted are gone.
    pub fn cut(&self, cut: Option<Cut>) {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        while arrivals.try_recv().is_ok() {}
        drop(arrivals);
        *self.cut.lock().unwrap_or_else(PoisonError::into_inner) = cut;
        self.connections.store(0, Ordering::SeqCst);
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.down.store(false, Ordering::SeqCst);
        *self.event.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Calls `action` once when the traffic comes to `at`, instead of cutting it there.
    pub fn at(&self, at: Cut, action: impl Fn() + Send + Sync + 'static) {
        self.cut(None);
        let event = Event { at, action: Box::new(action), happened: AtomicBool::new(false) };
        *self.event.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(event));
    }

    /// Nobody can connect, or everybody again.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// Bytes from the source, and to it, on each connection so far.
    pub fn traffic(&self) -> Vec<(u64, u64)> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts
            .iter()
            .map(|c| (c.outgoing.load(Ordering::SeqCst), c.incoming.load(Ordering::SeqCst)))
            .collect()
    }
}

impl Connector for LocalNetwork {
    fn connect(&self, _timeout: Duration) -> io::Result<Arc<dyn Transport>> {
        if self.down.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = UnixStream::pair()?;
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        let counts = Arc::new(Counts::default());
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&counts));
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.send(Arc::new(far)).map_err(|_| io::ErrorKind::ConnectionRefused)?;
        let cut = *self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = cut.filter(|cut| cut.connection == number);
        let event = self.event.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let event = event.filter(|event| event.at.connection == number);
        Ok(Arc::new(Wire { socket: near, cut, event, counts, down: Arc::clone(&self.down) }))
    }

    fn address(&self) -> String {
        "the local network".to_owned()
    }
}

impl Listener for LocalNetwork {
    fn accept(&self, wait: Duration) -> io::Result<Option<Arc<dyn Transport>>> {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(arrivals.recv_timeout(wait).ok())
    }
}

/// The source's end of a connection.
struct Wire {
    socket: UnixStream,
    cut: Option<Cut>,
    event: Option<Arc<Event>>,
    counts: Arc<Counts>,
    down: Arc<AtomicBool>,
}

impl Wire {
    /// How many of `wanted` bytes may still pass.
    fn room(&self, outgoing: bool, wanted: usize) -> io::Result<usize> {
        if let Some(event) = self.event.as_ref().filter(|event| event.at.outgoing == outgoing) {
            let counter = if outgoing { &self.counts.outgoing } else { &self.counts.incoming };
            let passed = counter.load(Ordering::SeqCst) + if outgoing { wanted as u64 } else { 0 };
            if passed >= event.at.bytes && !event.happened.swap(true, Ordering::SeqCst) {
                (event.action)();
            }
        }
        let Some(cut) = self.cut.filter(|cut| cut.outgoing == outgoing) else { return Ok(wanted) };
        let counter = if outgoing { &self.counts.outgoing } else { &self.counts.incoming };
        let left = cut.bytes.saturating_sub(counter.load(Ordering::SeqCst));
        if left == 0 && wanted > 0 {
            if cut.for_good {
                self.down.store(true, Ordering::SeqCst);
            }
            Transport::shutdown(&self.socket);
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(wanted.min(usize::try_from(left).unwrap_or(usize::MAX)))
    }
}

impl Transport for Wire {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = self.room(false, buffer.len())?;
        let read = Transport::read(&self.socket, &mut buffer[..room])?;
        self.counts.incoming.fetch_add(read as u64, Ordering::SeqCst);
        Ok(read)
    }

    fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let bytes: Vec<u8> = buffers.iter().flat_map(|buffer| buffer.iter().copied()).collect();
        let room = self.room(true, bytes.len())?;
        let written = self.socket.write_vectored(&[IoSlice::new(&bytes[..room])])?;
        self.counts.outgoing.fetch_add(written as u64, Ordering::SeqCst);
        Ok(written)
    }

    fn write_guest(&self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.cut.is_none() {
            self.room(true, 0)?;
            let bytes = head.len() + slices.iter().map(VolatileSlice::len).sum::<usize>();
            self.counts.outgoing.fetch_add(bytes as u64, Ordering::SeqCst);
            return self.socket.write_guest(head, slices);
        }
        let mut bytes = head.to_vec();
        for slice in slices {
            let at = bytes.len();
            bytes.resize(at + slice.len(), 0);
            slice.copy_to(&mut bytes[at..]);
        }
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let written = self.write_vectored(&[IoSlice::new(rest)])?;
            rest = &rest[written..];
        }
        Ok(())
    }

    fn read_guest(&self, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.socket.read_guest(slices)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.socket.set_timeouts(read, write)
    }

    fn shutdown(&self) {
        Transport::shutdown(&self.socket);
    }

    fn peer(&self) -> String {
        "the destination".to_owned()
    }
}
