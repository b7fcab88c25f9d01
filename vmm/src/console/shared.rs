//! What the guest's side of a console (vCPU threads) and its thread share.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{eventfd, EventfdFlags};

use super::ConsoleInput;

/// Output that is kept for a slow reader, bytes.
pub const OUTPUT_BUFFER: usize = 1 << 20;

/// Where input goes, and who is told that the user wants the VM to end.
pub(super) struct Peer {
    pub(super) input: Arc<dyn ConsoleInput>,
    pub(super) on_quit: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
pub(super) struct State {
    /// Output that was not written yet; at most [`OUTPUT_BUFFER`].
    pub(super) output: VecDeque<u8>,
    /// The thread has just written, and looks by itself at what comes meanwhile: a guest writes byte by byte, and to wake
    /// the thread for each would have the vCPU give way to it each time.
    pub(super) gathering: bool,
    /// Bytes that the guest wrote.
    pub(super) written: u64,
    /// Bytes of them that were dropped.
    pub(super) dropped: u64,
    /// The device, once there is one.
    pub(super) peer: Option<Arc<Peer>>,
    /// Set when the console is to end: until when it may write what is left.
    pub(super) end: Option<Instant>,
}

pub(super) struct Shared {
    state: Mutex<State>,
    /// Readable when the thread should look at the state.
    pub(super) wake: OwnedFd,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { state: Mutex::default(), wake })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the thread is woken anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(super) fn clear_wake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Takes output without ever blocking: what does not fit is dropped and counted.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let taken = bytes.len().min(OUTPUT_BUFFER - state.output.len());
        let was_empty = state.output.is_empty();
        state.output.extend(&bytes[..taken]);
        state.written += bytes.len() as u64;
        state.dropped += (bytes.len() - taken) as u64;
        // The thread looks again by itself while there is output.
        let asleep = was_empty && !state.gathering;
        drop(state);
        if asleep && taken > 0 {
            self.wake();
        }
    }
}
