//! The engine's threads: named, and told of to whoever wants to know, at their start.

use std::io;
use std::sync::OnceLock;
use std::thread::{self, Scope, ScopedJoinHandle};

static ON_START: OnceLock<fn(&str)> = OnceLock::new();

/// Has `hook` called on each thread of the engine from now on, with its name, before anything else
/// runs there: for who restricts or places threads. Once per process; later calls change nothing.
///
/// Names begin with `mig-`; the modules [`crate::source`] and [`crate::destination`] list them.
pub fn on_start(hook: fn(&str)) {
    let _ = ON_START.set(hook);
}

pub(crate) fn spawn<'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    job: impl FnOnce() + Send + 'scope,
) -> io::Result<ScopedJoinHandle<'scope, ()>> {
    let owned = name.to_owned();
    let body = move || {
        if let Some(hook) = ON_START.get() {
            hook(&owned);
        }
        job();
    };
    thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, body)
}
