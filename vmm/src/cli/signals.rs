//! Signals that ask a process to end.

use std::io;

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
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
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
    })?;
    Ok(())
}
