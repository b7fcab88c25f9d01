//! The VM's console: where the serial port's bytes go, and where its input comes from.
//!
//! ```text
//! vCPU thread: serial device --ConsoleWriter--> 1 MiB buffer --+
//!                   ^                                          v
//!                   +---- ConsoleInput::feed ------- thread "console" <--> stdio, pty, socket, file
//! ```
//!
//! The guest is never held up: output that nobody takes is dropped, the newest first, and counted.
//! Input that the device has no room for waits, and its source with it.
//!
//! | kind        | output                                        | input                                |
//! |-------------|-----------------------------------------------|--------------------------------------|
//! | `stdio`     | standard output                               | standard input; on a terminal raw, with [`Escape`] |
//! | `pty`       | a pseudo-terminal; the oldest 1 MiB waits for a reader | from it                     |
//! | `socket`    | a Unix socket, one client at a time; a new client first gets the last 64 KiB | from it |
//! | `file:PATH` | the file, emptied first (as QEMU's does)      | none                                 |

mod attach;
mod escape;
mod port;
mod shared;
mod terminal;
mod worker;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::ConsoleConfig;
use crate::runtime_dir::RuntimeDirError;
use crate::sandbox::{self, ThreadKind};

pub use attach::{attach, AttachEnd};
pub use escape::Escape;
pub use shared::OUTPUT_BUFFER;
pub use terminal::{restore, set_raw, size, stdin_kind, StdinKind};
pub use worker::REPLAY;

use port::Port;
use shared::{Peer, Shared};

/// Begins what a console socket says to a client that it refuses.
pub const REFUSAL: &str = "minivmm: this console is in use";

/// Why a console cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be written.
    #[error("cannot open {path} for the console: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket cannot be opened.
    #[error("cannot open the console's socket: {0}")]
    Socket(#[from] RuntimeDirError),
    /// No pseudo-terminal can be had.
    #[error("cannot open a pseudo-terminal for the console: {0} (is /dev/pts mounted?)")]
    Pty(io::Error),
    /// Something else that a console needs.
    #[error("cannot set up the console: {0}")]
    Setup(#[from] io::Error),
}

/// The device behind a console.
pub trait ConsoleInput: Send + Sync {
    /// Offers input; returns how many bytes of it were taken. The rest is offered again after
    /// [`ConsoleHandle::input_ready`].
    fn feed(&self, bytes: &[u8]) -> usize;
}

/// Where a console may put its socket, or the link to its pseudo-terminal.
#[derive(Debug, Clone)]
pub struct ConsolePaths {
    /// The socket of `socket`.
    pub socket: PathBuf,
    /// The symbolic link of `pty`.
    pub pty_link: PathBuf,
}

/// A console. Dropping it ends its thread without waiting for what is still to be written.
pub struct Console {
    shared: Arc<Shared>,
    path: Option<PathBuf>,
    /// Removed at the end.
    created: Option<PathBuf>,
    thread: Option<JoinHandle<()>>,
    ended: mpsc::Receiver<()>,
}

impl Console {
    /// Opens a console and starts its thread, named `console`. Output flows at once, input from
    /// [`Console::connect`] on. With `stdio` on a terminal, the terminal is raw from now on:
    /// [`restore`] must be called on every way out.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(
        config: &ConsoleConfig,
        paths: &ConsolePaths,
    ) -> Result<(Self, ConsoleWriter), ConsoleError> {
        let shared = Arc::new(Shared::new()?);
        let port = Port::open(config, paths)?;
        let (path, created) = (port.path.clone(), port.created.clone());
        let (ending, ended) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("console".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || {
                sandbox::enter(ThreadKind::Console);
                worker::run(&shared, port);
                // Tells close() by being dropped, also when the thread panics.
                drop(ending);
            }
        })?;
        let writer = ConsoleWriter { shared: Arc::clone(&shared) };
        Ok((Self { shared, path, created, thread: Some(thread), ended }, writer))
    }

    /// Names the device that input goes to, and what to do when the user asks for the end of
    /// the VM with `Ctrl-A x` (only a terminal on `stdio` can; called on the console's thread).
    pub fn connect(
        &self,
        input: Arc<dyn ConsoleInput>,
        on_quit: impl Fn() + Send + Sync + 'static,
    ) {
        self.shared.lock().peer = Some(Arc::new(Peer { input, on_quit: Box::new(on_quit) }));
        self.shared.wake();
    }

    /// Where others can reach the console: the pseudo-terminal or the socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// A handle for the device and for statistics.
    #[must_use]
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle { shared: Arc::clone(&self.shared) }
    }

    /// Writes what is left, but not for longer than `limit`, then ends the thread, removes the
    /// socket and restores the terminal.
    pub fn close(mut self, limit: Duration) {
        self.end(limit);
    }

    fn end(&mut self, limit: Duration) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.lock().end = Some(Instant::now() + limit);
        self.shared.wake();
        // A little more than the thread allows itself. It may hang in a write to a terminal that
        // takes nothing: then it is left behind.
        let patience = limit + Duration::from_millis(100);
        if self.ended.recv_timeout(patience) == Err(mpsc::RecvTimeoutError::Disconnected) {
            if thread.join().is_err() {
                tracing::error!("the console thread panicked");
            }
        } else {
            tracing::warn!("the console's output is stuck; some of it is lost");
        }
        // The machine has a writer to this console: neither would ever be dropped.
        let peer = self.shared.lock().peer.take();
        drop(peer);
        if let Some(path) = self.created.take() {
            let _ = std::fs::remove_file(path);
        }
        restore();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// A handle to a console; cheap to clone, and good from any thread.
#[derive(Clone)]
pub struct ConsoleHandle {
    shared: Arc<Shared>,
}

impl ConsoleHandle {
    /// The device has room for input again. Never blocks; may be called with the device locked.
    pub fn input_ready(&self) {
        self.shared.wake();
    }

    /// Bytes that the guest wrote so far.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.shared.lock().written
    }

    /// Bytes of them that were dropped, since nobody took them in time.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        self.shared.lock().dropped
    }
}

/// The guest's output. Writing never blocks and never fails. Several devices may write.
#[derive(Clone)]
pub struct ConsoleWriter {
    shared: Arc<Shared>,
}

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.shared.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
