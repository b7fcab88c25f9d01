//! Which system calls the threads of a VM's process may make (seccomp(2)).
//!
//! ```text
//!   install()   before the first other thread: the calls that the process needs over its life
//!   enter()     at the start of a thread: of those, the calls that this kind of thread needs
//! ```
//!
//! Filters are only ever added, and a thread inherits those of the thread that starts it. What a
//! filter does not name kills the process with SIGSYS; with `--sandbox log` the kernel logs it.

mod calls;
mod filter;

use std::cell::Cell;
use std::sync::OnceLock;

use seccompiler::{apply_filter, apply_filter_all_threads, BackendError, BpfProgram};

use crate::config::SandboxMode;

pub use calls::ThreadKind;

/// How this process treats its threads; unset where there are no filters.
static MODE: OnceLock<SandboxMode> = OnceLock::new();

thread_local! {
    static NARROWED: Cell<bool> = const { Cell::new(false) };
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A filter that cannot be compiled.
    #[error("cannot make the system call filter of {whose}: {error}")]
    Compile {
        /// Whose.
        whose: String,
        /// What is wrong with it.
        error: BackendError,
    },
    /// The kernel refuses.
    #[error(
        "cannot install the system call filter of {whose}: {error}; where the kernel has no seccomp \
         filters, use --sandbox off"
    )]
    Install {
        /// Whose.
        whose: String,
        /// What it said.
        error: seccompiler::Error,
    },
}

/// Restricts this process, all of its threads, for good. Later threads are restricted further by
/// [`enter`]. A process that was restricted before stays as it was.
///
/// # Errors
/// See [`SandboxError`].
pub fn install(mode: SandboxMode) -> Result<(), SandboxError> {
    if mode == SandboxMode::Off || MODE.set(mode).is_err() {
        return Ok(());
    }
    let whose = || "the process".to_owned();
    let compiled = |error| SandboxError::Compile { whose: whose(), error };
    let failed = |error| SandboxError::Install { whose: whose(), error };
    read_allocator_settings();
    // All of them can be made: a thread has nobody to complain to.
    for kind in ThreadKind::ALL {
        thread_filter(kind, mode)?;
    }
    if mode == SandboxMode::On {
        apply_filter_all_threads(&filter::no_clone3().map_err(compiled)?).map_err(failed)?;
    }
    let process = filter::process(mode).map_err(compiled)?;
    apply_filter_all_threads(&process).map_err(failed)?;
    print_panics_without_backtrace();
    Ok(())
}

/// Restricts the calling thread to what one of `kind` needs. Without effect in a process that is
/// not restricted itself.
///
/// # Panics
/// Does not return where the filter cannot be installed, which takes a kernel without memory: the
/// process is aborted rather than gone on with unprotected.
pub fn enter(kind: ThreadKind) {
    let Some(mode) = MODE.get() else { return };
    let entered = thread_filter(kind, *mode).and_then(|program| {
        let whose = format!("a thread of kind {kind:?}");
        apply_filter(&program).map_err(|error| SandboxError::Install { whose, error })
    });
    if let Err(error) = entered {
        tracing::error!(%error, "a thread cannot be restricted");
        std::process::abort();
    }
    NARROWED.set(true);
}

/// [`enter`] for a thread of the migration engine, by its name.
pub fn enter_engine(name: &str) {
    if let Some(kind) = ThreadKind::of_engine(name) {
        enter(kind);
    }
}

/// The first time that a thread gives a lot of memory back, glibc reads /proc/sys/vm/overcommit_memory, and remembers what
/// it read (`check_may_shrink_heap`, malloc/arena.c). Most threads may open no files, so it is to do that here.
fn read_allocator_settings() {
    /// Together more than a thread's heap keeps (M_TRIM_THRESHOLD: 128 KiB as long as nothing large was given back, as here,
    /// early in the life of the process), in pieces that are not mapped by themselves.
    const PIECES: usize = 32;
    const PIECE: usize = 100 << 10;
    let body = || {
        let pieces: Vec<Vec<u8>> = (0..PIECES).map(|_| Vec::with_capacity(PIECE)).collect();
        drop(std::hint::black_box(pieces));
    };
    // A thread other than the first has a heap of the kind in question.
    let read = std::thread::Builder::new().name("settings".to_owned()).spawn(body);
    if read.map(std::thread::JoinHandle::join).is_err() {
        tracing::debug!("no thread to read the allocator's settings");
    }
}

fn thread_filter(kind: ThreadKind, mode: SandboxMode) -> Result<BpfProgram, SandboxError> {
    let whose = || format!("threads of kind {kind:?}");
    filter::thread(kind, mode).map_err(|error| SandboxError::Compile { whose: whose(), error })
}

/// A backtrace reads the program's file, which most threads may not: they print where they panicked
/// and why.
fn print_panics_without_backtrace() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !NARROWED.get() {
            return previous(info);
        }
        let thread = std::thread::current();
        eprintln!("thread '{}' {info}", thread.name().unwrap_or_default());
    }));
}
