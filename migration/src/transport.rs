//! The connections of a migration: blocking, one thread per direction, room for encryption.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::{recv, send, sockopt, RecvFlags, SendFlags};
use vm_memory::VolatileSlice;

use crate::volatile_io::{self, ReadGuest, WriteGuest};

/// One connection, reliable and in order, in both directions at once. An implementation that
/// encrypts does it inside these methods.
pub trait Transport: Send + Sync {
    /// Reads at least one byte, or 0 at the end.
    ///
    /// # Errors
    /// As read(2); [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`] at the time limit.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes at least one byte.
    ///
    /// # Errors
    /// As write(2), and as [`Transport::read`] at the time limit.
    fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Writes all of `head`, then all of `slices`.
    ///
    /// # Errors
    /// As [`Transport::write_vectored`].
    fn write_guest(&self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Fills all of `slices`.
    ///
    /// # Errors
    /// As [`Transport::read`], and [`io::ErrorKind::UnexpectedEof`].
    fn read_guest(&self, slices: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// How long one read or write may wait without moving a byte; `None` is for ever.
    ///
    /// # Errors
    /// As setsockopt(2).
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()>;

    /// What is sent here is small and somebody waits for it: it may go before what other connections have sent. A wish, which
    /// needs no privilege.
    fn hurry(&self) {}

    /// The kernel keeps about so many bytes that were sent here and have not arrived, no more: what is sent elsewhere does not
    /// wait behind them for long. A wish.
    fn bound_backlog(&self, bytes: usize) {
        let _ = bytes;
    }

    /// Whether the other end is known to be on this host.
    fn is_local(&self) -> bool {
        false
    }

    /// Ends both directions. Whoever waits in another method returns.
    fn shutdown(&self);

    /// The other end, for a person.
    fn peer(&self) -> String;
}

/// A backlog from which on it is left to the kernel, whose buffers grow with what is on its way: a bound would end that, and
/// may not be as large (net.core.wmem_max).
const MOST_BACKLOG: usize = 2 << 20;

/// Makes connections to one destination.
pub trait Connector: Send + Sync {
    /// Makes a connection.
    ///
    /// # Errors
    /// As connect(2).
    fn connect(&self, timeout: Duration) -> io::Result<Arc<dyn Transport>>;

    /// Where it connects to, for a person.
    fn address(&self) -> String;

    /// The same to another address; `None` where that makes no sense.
    fn elsewhere(&self, address: &str) -> Option<Box<dyn Connector>> {
        let _ = address;
        None
    }
}

/// Accepts connections.
pub trait Listener: Send + Sync {
    /// Waits for a connection, but not longer than `wait`; `None` then.
    ///
    /// # Errors
    /// As accept(2).
    fn accept(&self, wait: Duration) -> io::Result<Option<Arc<dyn Transport>>>;
}

macro_rules! socket_transport {
    ($socket:ty, $peer:expr, $hurry:expr, $is_local:expr) => {
        impl Transport for $socket {
            fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
                Ok(recv(self, buffer, RecvFlags::empty())?.0)
            }

            fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
                match buffers {
                    // NOSIGNAL: a program that uses this crate may not ignore SIGPIPE.
                    [only] => Ok(send(self, only, SendFlags::NOSIGNAL)?),
                    _ => {
                        let mut control = rustix::net::SendAncillaryBuffer::default();
                        Ok(rustix::net::sendmsg(self, buffers, &mut control, SendFlags::NOSIGNAL)?)
                    }
                }
            }

            fn write_guest(&self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()> {
                volatile_io::write_all(self.as_fd(), head, slices)
            }

            fn read_guest(&self, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
                volatile_io::read_exact(self.as_fd(), slices)
            }

            fn set_timeouts(
                &self,
                read: Option<Duration>,
                write: Option<Duration>,
            ) -> io::Result<()> {
                self.set_read_timeout(read)?;
                self.set_write_timeout(write)
            }

            fn hurry(&self) {
                ($hurry)(self);
            }

            fn bound_backlog(&self, bytes: usize) {
                if bytes >= MOST_BACKLOG {
                    return;
                }
                if let Err(error) = sockopt::set_socket_send_buffer_size(self, bytes) {
                    tracing::debug!(%error, "the send buffer stays as it is");
                }
            }

            fn is_local(&self) -> bool {
                ($is_local)(self)
            }

            fn shutdown(&self) {
                // Fails when it is not connected any more, which is as good.
                let _ = <$socket>::shutdown(self, Shutdown::Both);
            }

            fn peer(&self) -> String {
                ($peer)(self)
            }
        }
    };
}

socket_transport!(
    TcpStream,
    |socket: &TcpStream| socket
        .peer_addr()
        .map_or_else(|_| "a closed connection".to_owned(), |address| address.to_string()),
    low_delay,
    |socket: &TcpStream| match (socket.local_addr(), socket.peer_addr()) {
        (Ok(here), Ok(there)) => here.ip() == there.ip(),
        _ => false,
    }
);
socket_transport!(UnixStream, |_: &UnixStream| "a local socket".to_owned(), |_| (), |_| true);

/// The type of service "low delay" (RFC 1349), which puts packets into the first band of this host's queue as well
/// (tc-pfifo_fast(8)).
fn low_delay(socket: &TcpStream) {
    const LOW_DELAY: u8 = 0x10;
    let set = match socket.local_addr() {
        Ok(SocketAddr::V4(_)) => sockopt::set_ip_tos(socket, LOW_DELAY),
        _ => sockopt::set_ipv6_tclass(socket, LOW_DELAY.into()),
    };
    if let Err(error) = set {
        tracing::debug!(%error, "packets of a connection have no precedence");
    }
}

/// Connects by TCP.
#[derive(Debug, Clone)]
pub struct TcpConnector {
    address: String,
}

impl TcpConnector {
    /// To `HOST:PORT`.
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into() }
    }
}

impl Connector for TcpConnector {
    fn connect(&self, timeout: Duration) -> io::Result<Arc<dyn Transport>> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, timeout) {
                Ok(socket) => {
                    // Small records must not wait for acknowledgements of others.
                    socket.set_nodelay(true)?;
                    return Ok(Arc::new(socket));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn address(&self) -> String {
        self.address.clone()
    }

    fn elsewhere(&self, address: &str) -> Option<Box<dyn Connector>> {
        Some(Box::new(Self::new(address)))
    }
}

/// Accepts by TCP.
#[derive(Debug)]
pub struct TcpAcceptor {
    socket: TcpListener,
}

impl TcpAcceptor {
    /// Listens at `ADDRESS:PORT`; port 0 lets the kernel choose.
    ///
    /// # Errors
    /// As bind(2).
    pub fn bind(address: impl ToSocketAddrs) -> io::Result<Self> {
        let socket = TcpListener::bind(address)?;
        // A connection that is gone again between poll and accept must not block.
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// As getsockname(2).
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

impl Listener for TcpAcceptor {
    fn accept(&self, wait: Duration) -> io::Result<Option<Arc<dyn Transport>>> {
        let deadline = Instant::now() + wait;
        loop {
            match self.socket.accept() {
                Ok((socket, _)) => {
                    socket.set_nonblocking(false)?;
                    socket.set_nodelay(true)?;
                    return Ok(Some(Arc::new(socket)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The connection ended before it was accepted (accept(2)).
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)) {
                Err(error) if error != rustix::io::Errno::INTR => return Err(error.into()),
                _ => {}
            }
        }
    }
}

/// A connection as the record layer takes it.
#[derive(Clone)]
pub(crate) struct Stream(pub(crate) Arc<dyn Transport>);

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.write_vectored(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl WriteGuest for Stream {
    fn write_guest(&mut self, head: &[u8], slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.write_guest(head, slices)
    }
}

impl ReadGuest for Stream {
    fn read_guest(&mut self, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.read_guest(slices)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({})", self.0.peer())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn wishes_reach_the_socket() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A machine may have no IPv6.
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            socket.hurry();
            socket.bound_backlog(64 << 10);
            let precedence = match listener.local_addr().unwrap() {
                SocketAddr::V4(_) => sockopt::ip_tos(&socket).unwrap(),
                SocketAddr::V6(_) => sockopt::ipv6_tclass(&socket).unwrap() as u8,
            };
            assert_eq!(precedence, 0x10, "{address}");
            // Twice as much as was asked for, for the kernel's own needs (socket(7)).
            assert_eq!(sockopt::socket_send_buffer_size(&socket).unwrap(), 128 << 10);
            socket.bound_backlog(MOST_BACKLOG);
            assert_eq!(sockopt::socket_send_buffer_size(&socket).unwrap(), 128 << 10, "as it is");
        }
    }
}
