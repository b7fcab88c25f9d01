//! What the destination lacks, given out to all who send: each page once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::address::{Gfn, PageRange};
use crate::prepaging::Plan;

/// Pages that are pushed at a time: a request waits for no more than that on each connection.
pub(crate) const BATCH_PAGES: u64 = 32;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Outflow {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    plan: Plan,
    push: bool,
    /// Requests that are being answered.
    answering: u32,
    /// No more is given out.
    closed: bool,
    pushed: u64,
}

impl Outflow {
    pub(super) fn new(plan: Plan, push: bool) -> Self {
        let state = State { plan, push, answering: 0, closed: false, pushed: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// What to push next: waits while a request is being answered, or pushing is off. `None`: there is no more.
    pub(crate) fn next(&self) -> Option<Vec<PageRange>> {
        let mut state = self.lock();
        loop {
            if state.closed || state.plan.left() == 0 {
                return None;
            }
            if state.push && state.answering == 0 {
                return Some(state.plan.push(BATCH_PAGES)).filter(|runs| !runs.is_empty());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// So many pages went out.
    pub(crate) fn pushed(&self, pages: u64) {
        self.lock().pushed += pages;
    }

    /// The answer to a request: the page, then what goes with it; empty if it was given out before. From here until
    /// [`Outflow::answered`] nothing else is given out. `None`: it is closed.
    pub(super) fn answer(&self, gfn: Gfn) -> Option<Vec<PageRange>> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        state.answering += 1;
        Some(state.plan.demand(gfn))
    }

    pub(super) fn answered(&self) {
        let mut state = self.lock();
        state.answering -= 1;
        if state.answering == 0 || state.plan.left() == 0 {
            self.changed.notify_all();
        }
    }

    /// Pages that were not given out yet.
    pub(crate) fn left(&self) -> u64 {
        self.lock().plan.left()
    }

    pub(crate) fn set_push(&self, push: bool) {
        self.lock().push = push;
        self.changed.notify_all();
    }

    /// Nothing is given out any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
