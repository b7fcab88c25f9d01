//! Raw mode of the terminal on standard input, and its way back.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use rustix::stdio::stdin;
use rustix::termios::{
    isatty, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr, OptionalActions, OutputModes, Termios,
};

/// The terminal's settings before this process changed them.
static SAVED: OnceLock<Termios> = OnceLock::new();
/// Whether they are changed now.
static RAW: AtomicBool = AtomicBool::new(false);
static PANIC_HOOK: Once = Once::new();

/// What standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StdinKind {
    /// A terminal that we may read.
    Terminal,
    /// A terminal, but another job has it: reading or changing it would stop this process.
    Background,
    /// A pipe, a file, ...
    Other,
}

/// Looks at standard input.
#[must_use]
pub fn stdin_kind() -> StdinKind {
    if !isatty(stdin()) {
        return StdinKind::Other;
    }
    match tcgetpgrp(stdin()) {
        Ok(group) if group == rustix::process::getpgrp() => StdinKind::Terminal,
        _ => StdinKind::Background,
    }
}

/// Columns and rows of the terminal on standard input; `None` where it is none, or has no size.
#[must_use]
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Puts the terminal on standard input into raw mode, until [`restore`] is called. A panic
/// restores it too. Output keeps its newline conversion: messages of this program and guests
/// that send bare newlines stay readable.
///
/// # Errors
/// Standard input is no terminal, or its settings cannot be changed.
pub fn set_raw() -> io::Result<()> {
    let current = tcgetattr(stdin())?;
    let mut raw = SAVED.get_or_init(|| current).clone();
    raw.make_raw();
    raw.output_modes.insert(OutputModes::OPOST);
    PANIC_HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
    });
    RAW.store(true, Ordering::SeqCst);
    tcsetattr(stdin(), OptionalActions::Now, &raw)?;
    Ok(())
}

/// Gives the terminal back its settings, if [`set_raw`] changed them. To be called on every way
/// out of the process; harmless when called twice, and async-signal-safe (an atomic and
/// tcsetattr(3)).
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst) {
        if let Some(saved) = SAVED.get() {
            // Nothing could be done about a failure: the terminal is gone.
            let _ = tcsetattr(stdin(), OptionalActions::Now, saved);
        }
    }
}
