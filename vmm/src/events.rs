//! The event log of a VM: bounded, numbered, and followed without missing any.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How many events are kept; older ones are dropped and can be seen to be missing by their number.
pub const EVENTS_KEPT: usize = 1024;

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Number, from 1, without gaps.
    pub seq: u64,
    /// Wall-clock time, milliseconds since 1970.
    pub unix_ms: u64,
    /// What happened: `created`, `running`, `paused`, `reboot`, `power-off`, `crashed`, ...
    pub kind: String,
    /// Details; an object.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub detail: serde_json::Value,
}

#[derive(Debug, Default)]
struct Inner {
    events: VecDeque<Event>,
    next_seq: u64,
    closed: bool,
    /// Number of the newest event, for followers that must not block a thread.
    newest: watch::Sender<u64>,
}

/// Shared log. Cloning it gives another handle to the same log.
#[derive(Debug, Clone, Default)]
pub struct EventLog {
    inner: Arc<(Mutex<Inner>, Condvar)>,
}

impl EventLog {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an event and wakes the followers.
    pub fn push(&self, kind: &str, detail: serde_json::Value) {
        let unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX));
        tracing::info!(event = kind, %detail, "event");
        let mut inner = self.lock();
        inner.next_seq += 1;
        let event = Event { seq: inner.next_seq, unix_ms, kind: kind.to_owned(), detail };
        if inner.events.len() == EVENTS_KEPT {
            inner.events.pop_front();
        }
        inner.events.push_back(event);
        let newest = inner.next_seq;
        inner.newest.send_replace(newest);
        self.inner.1.notify_all();
    }

    /// No more events will come: followers end.
    pub fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        let newest = inner.next_seq;
        inner.newest.send_replace(newest);
        self.inner.1.notify_all();
    }

    /// True once no more events will come.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// A handle that sees every change: a new event, or the end of the log.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.lock().newest.subscribe()
    }

    /// Events with a number above `after`, oldest first.
    #[must_use]
    pub fn after(&self, after: u64) -> Vec<Event> {
        let inner = self.lock();
        inner.events.iter().filter(|e| e.seq > after).cloned().collect()
    }

    /// Waits until there are events above `after`, the log is closed (`None` once nothing is
    /// left), or the time is over (an empty list).
    #[must_use]
    pub fn wait_after(&self, after: u64, timeout: Duration) -> Option<Vec<Event>> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.lock();
        loop {
            let found: Vec<Event> =
                inner.events.iter().filter(|e| e.seq > after).cloned().collect();
            if !found.is_empty() {
                return Some(found);
            }
            if inner.closed {
                return None;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Some(found);
            }
            inner =
                self.inner.1.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
