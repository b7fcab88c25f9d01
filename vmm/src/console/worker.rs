//! The console's thread: moves bytes between the buffer, the device and the port.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::port::Port;
use super::shared::Shared;
use super::{Escape, REFUSAL};

/// Output that a new client of a socket gets, bytes.
pub const REPLAY: usize = 64 << 10;

/// Bytes moved at a time. PIPE_BUF: what poll(2) promises to fit into a writable pipe. The mode of
/// standard output is left as it is, since other processes share it, so a larger write could block.
const CHUNK: usize = 4096;

/// After something was written, output is gathered for so long before it is written: too short to be seen, and long enough
/// for a line.
const GATHER: Duration = Duration::from_millis(2);

/// Keys typed on a terminal that wait for a guest which takes no input, bytes; more are dropped.
const TYPED_AHEAD: usize = 4096;

struct Worker<'a> {
    shared: &'a Shared,
    port: Port,
    escape: Escape,
    /// Input that the device had no room for.
    pending: Vec<u8>,
    /// Last output, for the next client of a socket.
    replay: VecDeque<u8>,
    /// What the present client has not yet got of what was before it.
    backlog: VecDeque<u8>,
    /// The client of a socket, kept to say who it is.
    client: Option<UnixStream>,
    /// Until when output is gathered.
    gather: Option<Instant>,
}

/// What is ready.
#[derive(Default, Clone, Copy)]
struct Ready {
    wake: bool,
    input: bool,
    output: bool,
    hangup: bool,
    client: bool,
}

/// Runs until the console is closed.
pub(super) fn run(shared: &Shared, port: Port) {
    let mut worker = Worker {
        shared,
        port,
        escape: Escape::default(),
        pending: Vec::new(),
        replay: VecDeque::new(),
        backlog: VecDeque::new(),
        client: None,
        gather: None,
    };
    while worker.step() {}
    let mut state = shared.lock();
    state.dropped += state.output.len() as u64;
    state.output.clear();
}

impl Worker<'_> {
    /// One turn; false at the end.
    fn step(&mut self) -> bool {
        self.feed();
        let now = Instant::now();
        let (unsent, has_peer, end) = {
            let mut state = self.shared.lock();
            if self.gather.is_some_and(|until| now >= until) {
                self.gather = None;
                state.gathering = !state.output.is_empty();
            }
            let unsent = !state.output.is_empty() || !self.backlog.is_empty();
            (unsent, state.peer.is_some(), state.end)
        };
        let left = end.map(|end| end.saturating_duration_since(now));
        if left.is_some_and(|left| !unsent || left.is_zero()) {
            return false;
        }
        let gather = self.gather.filter(|_| end.is_none());
        let want_output = unsent && gather.is_none();
        if want_output && self.port.output.is_none() {
            self.swallow();
            self.gather_from(now);
            return true;
        }
        let left = left.or(gather.map(|until| until - now));
        // The escape key works even when the guest takes no input.
        let want_input = has_peer && (self.pending.is_empty() || self.port.interactive);
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let ready = self.wait(want_input, want_output, timeout.as_ref());
        if ready.wake {
            self.shared.clear_wake();
        }
        if ready.input {
            self.read();
        }
        if ready.output {
            self.write();
            self.gather_from(Instant::now());
        }
        // In this order: a client may come just when the one before it goes.
        if ready.hangup {
            self.hang_up();
        }
        if ready.client {
            self.accept();
        }
        true
    }

    /// Once all was written, no more is until a moment later.
    fn gather_from(&mut self, now: Instant) {
        let mut state = self.shared.lock();
        if state.output.is_empty() && self.backlog.is_empty() {
            state.gathering = true;
            self.gather = Some(now + GATHER);
        }
    }

    fn wait(&self, want_input: bool, want_output: bool, timeout: Option<&Timespec>) -> Ready {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        let mut add = |fd: Option<_>, events| -> Option<usize> {
            fds.push(PollFd::from_borrowed_fd(fd?, events));
            Some(fds.len() - 1)
        };
        let input = self.port.input.as_ref().filter(|_| want_input);
        let input = add(input.map(AsFd::as_fd), PollFlags::IN);
        let output = self.port.output.as_ref().filter(|_| want_output);
        let output = add(output.map(AsFd::as_fd), PollFlags::OUT);
        // poll(2) reports a hang-up without being asked.
        let client = add(self.client.as_ref().map(AsFd::as_fd), PollFlags::empty());
        let listener = add(self.port.listener.as_ref().map(AsFd::as_fd), PollFlags::IN);
        if let Err(e) = poll(&mut fds, timeout) {
            if e != Errno::INTR {
                tracing::error!(error = %e, "console poll");
            }
            return Ready::default();
        }
        let at = |index: Option<usize>| index.is_some_and(|i| !fds[i].revents().is_empty());
        Ready {
            wake: at(Some(0)),
            input: at(input),
            output: at(output),
            hangup: at(client),
            client: at(listener),
        }
    }

    /// Offers the device what it had no room for.
    fn feed(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let peer = self.shared.lock().peer.clone();
        if let Some(peer) = peer {
            let taken = peer.input.feed(&self.pending).min(self.pending.len());
            self.pending.drain(..taken);
        }
    }

    fn read(&mut self) {
        let Some(input) = &self.port.input else { return };
        let mut bytes = [0; CHUNK];
        let typed = match rustix::io::read(input, &mut bytes) {
            Ok(n) if n > 0 => &bytes[..n],
            Err(Errno::AGAIN | Errno::INTR) => return,
            // The end of input, or a terminal that is gone. Output goes on.
            _ => {
                self.port.input = None;
                return;
            }
        };
        if !self.port.interactive {
            self.pending.extend_from_slice(typed);
            return;
        }
        let quit = self.escape.filter(typed, &mut self.pending);
        self.pending.truncate(TYPED_AHEAD);
        if quit {
            let peer = self.shared.lock().peer.clone();
            if let Some(peer) = peer {
                (peer.on_quit)();
            }
        }
    }

    fn write(&mut self) {
        let from_backlog = !self.backlog.is_empty();
        let chunk: Vec<u8> = if from_backlog {
            self.backlog.iter().take(CHUNK).copied().collect()
        } else {
            self.shared.lock().output.iter().take(CHUNK).copied().collect()
        };
        let Some(output) = &self.port.output else { return };
        match rustix::io::write(output, &chunk) {
            Ok(n) if from_backlog => drop(self.backlog.drain(..n)),
            Ok(n) => {
                self.shared.lock().output.drain(..n);
                self.remember(&chunk[..n]);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) if self.client.is_some() => self.hang_up(),
            Err(Errno::NOSPC) => {
                // The disk may have room again later: only this much is lost.
                let mut state = self.shared.lock();
                state.dropped += chunk.len() as u64;
                state.output.drain(..chunk.len());
            }
            Err(error) => {
                tracing::warn!(%error, "the console's output is gone; the VM goes on without");
                self.port.output = None;
            }
        }
    }

    /// Takes output while nobody is there: a socket remembers its last part, others drop it.
    fn swallow(&mut self) {
        let output = {
            let mut state = self.shared.lock();
            if self.port.listener.is_none() {
                state.dropped += state.output.len() as u64;
            }
            std::mem::take(&mut state.output)
        };
        let (a, b) = output.as_slices();
        self.remember(a);
        self.remember(b);
    }

    fn remember(&mut self, bytes: &[u8]) {
        if self.port.listener.is_none() {
            return;
        }
        let bytes = &bytes[bytes.len().saturating_sub(REPLAY)..];
        let excess = (self.replay.len() + bytes.len()).saturating_sub(REPLAY);
        self.replay.drain(..excess);
        self.replay.extend(bytes);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.port.listener else { return };
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a console client");
                return;
            }
        };
        if let Some(client) = &self.client {
            let pid = rustix::net::sockopt::socket_peercred(client)
                .map_or(0, |peer| peer.pid.as_raw_nonzero().get());
            // A fresh socket's buffer has room for it.
            let _ = stream.set_nonblocking(true);
            let _ = (&stream).write_all(format!("{REFUSAL} by process {pid}\r\n").as_bytes());
            return;
        }
        let fds = || -> std::io::Result<(OwnedFd, OwnedFd)> {
            stream.set_nonblocking(true)?;
            let fd = stream.as_fd();
            Ok((fd.try_clone_to_owned()?, fd.try_clone_to_owned()?))
        };
        match fds() {
            Ok((input, output)) => {
                self.port.input = Some(input);
                self.port.output = Some(output);
                self.backlog = self.replay.clone();
                self.client = Some(stream);
            }
            Err(error) => tracing::warn!(%error, "cannot serve a console client"),
        }
    }

    /// The client of the socket is gone. What it sent before is still read.
    fn hang_up(&mut self) {
        self.client = None;
        self.port.output = None;
        self.backlog.clear();
    }
}
