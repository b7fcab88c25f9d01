//! Signals that ask a process to end, and those that tell of a terminal's new size.

use std::io;

use crate::console::size;
use crate::sandbox::{self, ThreadKind};
use tokio::signal::unix::{signal, SignalKind};

/// Calls `then` with the number of each SIGINT, SIGTERM and SIGHUP that arrives, on a thread of
/// its own named `signals`. They no longer end the process by themselves.
///
/// # Errors
/// The handlers or the thread cannot be set up.
pub fn on_termination(mut then: impl FnMut(i32) + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _context = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        )
    };
    on_thread("signals", move || {
        runtime.block_on(async {
            loop {
                let number = tokio::select! {
                    _ = interrupt.recv() => libc::SIGINT,
                    _ = terminate.recv() => libc::SIGTERM,
                    _ = hangup.recv() => libc::SIGHUP,
                };
                then(number);
            }
        });
    })
}

/// Calls `then` with columns and rows of the terminal on standard input, now and whenever they
/// change, on a thread of its own named `resize`. Without a terminal it is never called.
///
/// # Errors
/// The handler or the thread cannot be set up.
pub fn on_resize(mut then: impl FnMut(u16, u16) + Send + 'static) -> io::Result<()> {
    if size().is_none() {
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut changed = {
        let _context = runtime.enter();
        signal(SignalKind::window_change())?
    };
    on_thread("resize", move || loop {
        if let Some((columns, rows)) = size() {
            then(columns, rows);
        }
        if runtime.block_on(changed.recv()).is_none() {
            return;
        }
    })
}

fn on_thread(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let body = move || {
        sandbox::enter(ThreadKind::Signals);
        body();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
}
