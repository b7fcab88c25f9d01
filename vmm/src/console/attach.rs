//! The other side: a user's terminal on the console of a VM that runs elsewhere.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;

use super::Escape;

/// Typed bytes that wait for the VM, at most.
const PENDING: usize = 64 << 10;
const CHUNK: usize = 4096;

/// How an attachment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachEnd {
    /// The user left with `Ctrl-A x`.
    Left,
    /// The VM closed the console.
    Closed,
}

/// Moves bytes between `input`, `output` and the console `console` (a socket or a pseudo-terminal,
/// in non-blocking mode) until the user leaves or the console closes. The end of `input` is not
/// the end: output goes on. With `interactive`, [`Escape`] is honoured, and keeps being while the
/// VM takes no input (what does not fit then is dropped).
///
/// # Errors
/// Reading or writing fails.
pub fn attach(
    console: BorrowedFd<'_>,
    input: BorrowedFd<'_>,
    output: &mut dyn io::Write,
    interactive: bool,
) -> io::Result<AttachEnd> {
    let mut escape = Escape::default();
    let mut pending: Vec<u8> = Vec::new();
    let mut input_open = true;
    let mut bytes = [0; CHUNK];
    loop {
        let mut wanted = PollFlags::IN;
        if !pending.is_empty() {
            wanted |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::from_borrowed_fd(console.as_fd(), wanted)];
        if input_open && (interactive || pending.is_empty()) {
            fds.push(PollFd::from_borrowed_fd(input, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        let console_ready = fds[0].revents();
        let input_ready = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if input_ready {
            match rustix::io::read(input, &mut bytes)? {
                0 => input_open = false,
                n if interactive => {
                    if escape.filter(&bytes[..n], &mut pending) {
                        return Ok(AttachEnd::Left);
                    }
                    pending.truncate(PENDING);
                }
                n => pending.extend_from_slice(&bytes[..n]),
            }
        }
        if console_ready.contains(PollFlags::OUT) {
            match rustix::io::write(console, &pending) {
                Ok(n) => drop(pending.drain(..n)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                // What the console said last is still to be read.
                Err(Errno::PIPE | Errno::CONNRESET | Errno::IO) => pending.clear(),
                Err(e) => return Err(e.into()),
            }
        }
        if console_ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            match rustix::io::read(console, &mut bytes) {
                // A pseudo-terminal whose VM is gone says EIO.
                Ok(0) | Err(Errno::CONNRESET | Errno::IO) => return Ok(AttachEnd::Closed),
                Ok(n) => {
                    output.write_all(&bytes[..n])?;
                    output.flush()?;
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
