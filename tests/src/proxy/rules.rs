//! Where something happens, and what.

use std::sync::Arc;
use std::time::Instant;

use migration::stream::RecordType;

use super::{Edit, Shared};
use crate::PATIENCE;

/// Which connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// The main one.
    Main,
    /// A page connection, in the order in which they were made.
    Page(u16),
    /// All page connections.
    Pages,
    /// The one for requests of single pages, in post-copy.
    Requests,
    /// Those that ask for a verdict.
    Query,
    /// All of them.
    Any,
}

/// Which direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination.
    Forth,
    /// From the destination to the source.
    Back,
}

/// A place in the stream of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Spot {
    on: On,
    way: Way,
    record: RecordType,
    round: Option<u32>,
    skip: u32,
    after: bool,
}

impl Spot {
    /// Before the first record of this type.
    #[must_use]
    pub fn new(on: On, way: Way, record: RecordType) -> Self {
        Self { on, way, record, round: None, skip: 0, after: false }
    }

    /// The first one in this round: after so many ROUND records and one more.
    #[must_use]
    pub fn round(self, round: u32) -> Self {
        Self { round: Some(round), ..self }
    }

    /// Not the first one: so many come before it.
    #[must_use]
    pub fn nth(self, skip: u32) -> Self {
        Self { skip, ..self }
    }

    /// When the record has gone through.
    #[must_use]
    pub fn after(self) -> Self {
        Self { after: true, ..self }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Hold,
    Edit(Edit),
}

/// A rule's place in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RuleId(pub(super) usize);

#[derive(Debug)]
pub(super) struct Rule {
    spot: Spot,
    pub(super) action: Action,
    /// How many records there were that come before it.
    skipped: u32,
    met: bool,
    pub(super) reached: bool,
    pub(super) released: bool,
}

/// A record as it passes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Passing {
    pub(super) on: On,
    pub(super) way: Way,
    pub(super) number: u16,
    /// ROUND records so far, this one included.
    pub(super) rounds: u32,
}

impl Rule {
    pub(super) fn new(spot: Spot, action: Action) -> Self {
        Self { spot, action, skipped: 0, met: false, reached: false, released: false }
    }

    /// Whether this is the record, which is then done with. To be called once for each record and
    /// moment.
    pub(super) fn meets(&mut self, passing: &Passing, after: bool) -> bool {
        let Spot { on, way, record, round, skip, .. } = self.spot;
        let here = !self.met
            && covers(on, passing.on)
            && way == passing.way
            && record as u16 == passing.number
            && self.spot.after == after
            && round.is_none_or(|round| passing.rounds == round + 1);
        if here && self.skipped < skip {
            self.skipped += 1;
            return false;
        }
        self.met |= here;
        here
    }
}

/// Whether the connection `one` is meant by `on`.
pub(super) fn covers(on: On, one: On) -> bool {
    match on {
        On::Any => true,
        On::Pages => matches!(one, On::Page(_)),
        on => on == one,
    }
}

/// A record that stands still at its spot, or will. Released when dropped.
#[derive(Debug)]
pub struct Held {
    shared: Arc<Shared>,
    id: RuleId,
}

impl Held {
    pub(super) fn new(shared: Arc<Shared>, id: RuleId) -> Self {
        Self { shared, id }
    }

    /// Waits until the record is there.
    ///
    /// # Panics
    /// It does not come within [`PATIENCE`].
    #[track_caller]
    pub fn wait(&self) {
        wait(&self.shared, self.id);
    }

    /// Whether the record is, or was, there.
    #[must_use]
    pub fn reached(&self) -> bool {
        self.shared.lock().rules[self.id.0].reached
    }

    /// Lets it go on.
    pub fn release(self) {}
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.lock().rules[self.id.0].released = true;
        self.shared.changed.notify_all();
    }
}

/// A record that was changed, or will be.
#[derive(Debug)]
pub struct Touched {
    shared: Arc<Shared>,
    id: RuleId,
}

impl Touched {
    pub(super) fn new(shared: Arc<Shared>, id: RuleId) -> Self {
        Self { shared, id }
    }

    /// As [`Held::wait`].
    ///
    /// # Panics
    /// As there.
    #[track_caller]
    pub fn wait(&self) {
        wait(&self.shared, self.id);
    }

    /// Whether it happened.
    #[must_use]
    pub fn happened(&self) -> bool {
        self.shared.lock().rules[self.id.0].reached
    }
}

#[track_caller]
fn wait(shared: &Shared, id: RuleId) {
    let deadline = Instant::now() + PATIENCE;
    let mut state = shared.lock();
    while !state.rules[id.0].reached {
        let left = deadline.saturating_duration_since(Instant::now());
        let spot = state.rules[id.0].spot;
        assert!(!left.is_zero(), "it did not come to {spot:?}");
        state = shared.changed.wait_timeout(state, left).unwrap().0;
    }
}
